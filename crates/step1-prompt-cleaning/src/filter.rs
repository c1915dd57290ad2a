//! Why a row is left out, and the rules that look at one text.

use std::sync::Arc;

use memchr::memmem::Finder;

use crate::{Lists, Rules, TokenCounter};

/// Why a row does not become a prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum DropReason {
    /// The row cannot be read: a field is missing or has the wrong type.
    BadRow,
    /// The conversation has fewer than two turns.
    SingleTurn,
    /// The first turn is not the human's.
    NotHumanFirst,
    /// A Dolly category that needs a context to be answered.
    OtherCategory,
    /// A Dolly row with a context.
    HasContext,
    /// An oasst1 message that answers another one.
    NotARoot,
    /// An oasst1 prompt that nobody answered.
    NoReply,
    /// No text is left.
    Empty,
    /// Fewer tokens than `--min-prompt-len`.
    TooShort,
    /// More tokens than `--max-prompt-len`.
    TooLong,
    /// A natural-language-inference task.
    NliTask,
    /// The prompt was seen before.
    Duplicate,
    /// A prompt that is kept differs from it in little.
    NearDuplicate,
    /// Not in one of `--languages`.
    OtherLanguage,
    /// A part of it stands in a file of `--decontaminate`.
    Contaminated,
    /// The stratum or source has as many rows as it may without it.
    OverCap,
    /// The mix has no place for it.
    OverMix,
    /// The sample was drawn without it.
    NotSampled,
}

impl DropReason {
    /// Every reason.
    pub const ALL: [DropReason; 18] = [
        DropReason::BadRow,
        DropReason::SingleTurn,
        DropReason::NotHumanFirst,
        DropReason::OtherCategory,
        DropReason::HasContext,
        DropReason::NotARoot,
        DropReason::NoReply,
        DropReason::Empty,
        DropReason::TooShort,
        DropReason::TooLong,
        DropReason::NliTask,
        DropReason::Duplicate,
        DropReason::NearDuplicate,
        DropReason::OtherLanguage,
        DropReason::Contaminated,
        DropReason::OverCap,
        DropReason::OverMix,
        DropReason::NotSampled,
    ];

    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            DropReason::BadRow => "bad_row",
            DropReason::SingleTurn => "single_turn",
            DropReason::NotHumanFirst => "not_human_first",
            DropReason::OtherCategory => "other_category",
            DropReason::HasContext => "has_context",
            DropReason::NotARoot => "not_a_root",
            DropReason::NoReply => "no_reply",
            DropReason::Empty => "empty",
            DropReason::TooShort => "too_short",
            DropReason::TooLong => "too_long",
            DropReason::NliTask => "nli_task",
            DropReason::Duplicate => "duplicate",
            DropReason::NearDuplicate => "near_duplicate",
            DropReason::OtherLanguage => "other_language",
            DropReason::Contaminated => "contaminated",
            DropReason::OverCap => "over_cap",
            DropReason::OverMix => "over_mix",
            DropReason::NotSampled => "not_sampled",
        }
    }

    /// What it means, in the page of a report.
    pub fn meaning(self) -> &'static str {
        match self {
            DropReason::BadRow => {
                "it cannot be read: no JSON, or a field is missing or of another type"
            }
            DropReason::SingleTurn => "the conversation has fewer than two turns",
            DropReason::NotHumanFirst => "the first turn is not the human's",
            DropReason::OtherCategory => "a Dolly category that needs a context to be answered",
            DropReason::HasContext => "a Dolly row with a context",
            DropReason::NotARoot => "a message that answers another one",
            DropReason::NoReply => "a prompt that nobody answered",
            DropReason::Empty => "no text is left",
            DropReason::TooShort => "fewer tokens than --min-prompt-len",
            DropReason::TooLong => "more tokens than --max-prompt-len",
            DropReason::NliTask => "a task of natural-language inference",
            DropReason::Duplicate => "the prompt was seen before",
            DropReason::NearDuplicate => "an earlier prompt differs in little (--near-duplicates)",
            DropReason::OtherLanguage => "surely in none of --languages",
            DropReason::Contaminated => "a part stands in a file of --decontaminate",
            DropReason::OverCap => "the source or stratum has its number of rows without it",
            DropReason::OverMix => "the ratio of --mix has no place for it",
            DropReason::NotSampled => "the share of --sample was drawn without it",
        }
    }
}

/// Recognises the natural-language-inference tasks of OpenOrca by their words.
///
/// Dromedary looks for its keywords anywhere and so loses the shop's `premises`;
/// [`Rules::Corrected`] wants word borders around them.
#[derive(Clone, Debug)]
pub struct NliRule {
    rules: Rules,
    lists: Arc<Lists>,
    /// What looks for each keyword.
    finders: Vec<Finder<'static>>,
}

impl NliRule {
    /// The rule with the keywords of the lists.
    pub fn new(rules: Rules, lists: Arc<Lists>) -> NliRule {
        let finder = |keyword: &String| Finder::new(keyword).into_owned();
        let finders = lists.nli_keywords.iter().map(finder).collect();
        NliRule { rules, lists, finders }
    }

    /// The first keyword that the question has.
    pub fn keyword(&self, question: &str) -> Option<&str> {
        let has = |finder: &Finder<'_>| match self.rules {
            Rules::Dromedary => finder.find(question.as_bytes()).is_some(),
            Rules::Corrected => contains_words(question, finder),
        };
        let found = self.finders.iter().position(has)?;
        Some(&self.lists.nli_keywords[found])
    }
}

fn contains_words(text: &str, words: &Finder<'_>) -> bool {
    words.find_iter(text.as_bytes()).any(|start| {
        let before = text[..start].chars().next_back();
        let behind = text[start + words.needle().len()..].chars().next();
        !before.is_some_and(char::is_alphanumeric) && !behind.is_some_and(char::is_alphanumeric)
    })
}

/// The number of tokens that a prompt may have, a BOS token of the vocabulary counted.
#[derive(Clone, Debug)]
pub struct LengthRule {
    /// What counts them.
    pub counter: Arc<TokenCounter>,
    /// No fewer than this.
    pub min: usize,
    /// No more than this.
    pub max: usize,
    /// What is encoded behind the text.
    pub suffix: &'static str,
}

impl LengthRule {
    /// Why the text breaks the rule, if it does.
    pub fn check(&self, text: &str) -> Option<DropReason> {
        let fits = |max| {
            if self.suffix.is_empty() {
                self.counter.fits(text, max)
            } else {
                self.counter.fits(&[text, self.suffix].concat(), max)
            }
        };
        if !fits(self.max) {
            Some(DropReason::TooLong)
        } else if self.min > 0 && fits(self.min - 1) {
            Some(DropReason::TooShort)
        } else {
            None
        }
    }
}
