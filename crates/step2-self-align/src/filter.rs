//! Which rows are fit to be trained on, and why the others are not.

use std::fmt;

use dromedary_records::{AlignedResponse, FinishReason};
use serde::{Deserialize, Serialize};

use crate::citations::citations;
use crate::compat;
use crate::text::{self, Ngrams};
use crate::{Form, MetaPrompt, Principles};

/// Behind a complete answer in a training row: the next turn of the user begins.
pub(crate) const END_OF_ANSWER: &str = "\n\n### User\n";

/// Shorter instructions and inputs are quoted by good answers (the original's figure).
pub(crate) const SHORT_PROMPT: usize = 16;

/// An answer that is the prompt itself for more than this share of its characters is an echo.
const ECHO_SHARE: f64 = 0.5;

/// Loops: the share of word 4-grams that came before in the same answer. Poems with a refrain and
/// tables reach 0.2; a sentence that is said over and over passes 0.4 soon.
const LOOP_NGRAM: usize = 4;
const LOOP_SHARE: f64 = 0.3;
/// Fewer 4-grams than this are too few to speak of a rate.
const LOOP_AT_LEAST: usize = 8;

/// Leakage: the share of word 5-grams that stand in the meta prompt and not in the user's text.
const LEAK_NGRAM: usize = 5;
const LEAK_SHARE: f64 = 0.1;

/// A shorter answer shows nobody how to be thorough.
const VERBOSE_WORDS: usize = 40;

/// Why a row is dropped. Rules are asked in this order, and the first that fails is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Rule {
    /// Generation rejected the prompt: there is no output.
    NotGenerated,
    /// Another file has a row with this id.
    SameId,
    /// The output does not open with the affirmation.
    NoAffirmation,
    /// No answer follows the thoughts.
    NoAnswer,
    /// The answer says nothing.
    Empty,
    /// The answer repeats itself.
    Loop,
    /// Generation ended by length, in the middle of the answer.
    Truncated,
    /// The answer is too short: below 40 words where verbose answers are asked for, below 160
    /// characters with `--compat dromedary`; else no answer is.
    Short,
    /// The answer is the prompt, or holds little else.
    Echo,
    /// The mark of a turn begins a line in the middle of a paragraph of the answer.
    TurnMark,
    /// The answer holds thoughts: the affirmation, or a principle cited by number and name.
    Thoughts,
    /// The answer shares too many n-grams with rules and exemplars.
    Leakage,
    /// The answer holds a word of the black list.
    BlackList,
}

impl Rule {
    /// The corrected rules about an answer, in the order in which they are asked.
    pub const CORRECTED: [Rule; 10] = [
        Rule::NoAffirmation,
        Rule::NoAnswer,
        Rule::Empty,
        Rule::Loop,
        Rule::Truncated,
        Rule::Echo,
        Rule::TurnMark,
        Rule::Thoughts,
        Rule::Leakage,
        Rule::BlackList,
    ];

    /// The rules about an answer that is to be long, in the order in which they are asked.
    pub const VERBOSE: [Rule; 7] = [
        Rule::Empty,
        Rule::Loop,
        Rule::Truncated,
        Rule::Short,
        Rule::Echo,
        Rule::TurnMark,
        Rule::Leakage,
    ];

    /// Its name in files and reports.
    pub fn name(self) -> &'static str {
        match self {
            Rule::NotGenerated => "not_generated",
            Rule::SameId => "same_id",
            Rule::NoAffirmation => "no_affirmation",
            Rule::NoAnswer => "no_answer",
            Rule::Empty => "empty",
            Rule::Loop => "loop",
            Rule::Truncated => "truncated",
            Rule::Short => "short",
            Rule::Echo => "echo",
            Rule::TurnMark => "turn_mark",
            Rule::Thoughts => "thoughts",
            Rule::Leakage => "leakage",
            Rule::BlackList => "black_list",
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(self.name())
    }
}

/// `--compat`: whose rules to follow instead of the corrected ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Compat {
    /// Those of `merge_and_fileter_self_align_with_dummy.py`, for comparison with its rows.
    Dromedary,
}

/// What the filter says of a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is fit; this is what is trained on.
    Kept(Kept),
    /// It is not.
    Dropped(Rule),
}

/// The training text of a row that is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// The instruction.
    pub instruction: String,
    /// The input, often empty.
    pub input: String,
    /// The answer without the thoughts; a complete one ends in the mark of the user's turn.
    pub output: String,
}

/// The filter of step 2: rules, and the principles that they look for.
#[derive(Clone, Debug)]
pub struct Filter {
    compat: Option<Compat>,
    form: Form,
    principles: Principles,
    meta_prompt: Ngrams,
}

impl Filter {
    /// A filter for rows that were generated behind this meta prompt.
    ///
    /// Without `compat` the rules are the corrected ones: the reason why generation ended decides
    /// whether an answer is complete, short complete answers stay, loops are told by their rate
    /// and not by the first clause that returns, copies by n-grams and not by single words.
    pub fn new(compat: Option<Compat>, meta_prompt: &MetaPrompt) -> Self {
        Self {
            compat,
            form: meta_prompt.form,
            principles: meta_prompt.principles.clone(),
            meta_prompt: Ngrams::of(&meta_prompt.text, LEAK_NGRAM),
        }
    }

    /// Judges one row.
    pub fn judge(&self, row: &AlignedResponse) -> Verdict {
        if row.finish_reason == FinishReason::Rejected {
            return Verdict::Dropped(Rule::NotGenerated);
        }
        match self.compat {
            Some(Compat::Dromedary) => compat::judge(row),
            None => self.judge_corrected(row),
        }
    }

    fn judge_corrected(&self, row: &AlignedResponse) -> Verdict {
        let candidate = Candidate::new(row, self.form, &self.principles);
        let rules = match self.form {
            Form::SelfAlign => Rule::CORRECTED.as_slice(),
            Form::Verbose => &Rule::VERBOSE,
        };
        if let Some(&rule) = rules.iter().find(|&&rule| self.fails(rule, &candidate)) {
            return Verdict::Dropped(rule);
        }
        Verdict::Kept(Kept {
            instruction: row.instruction.clone(),
            input: row.input.clone(),
            output: self.renamed(row, candidate.answer) + END_OF_ANSWER,
        })
    }

    fn fails(&self, rule: Rule, candidate: &Candidate<'_>) -> bool {
        let answer = candidate.answer;
        match rule {
            Rule::NoAffirmation => !candidate.affirmed,
            Rule::NoAnswer => !candidate.answered,
            Rule::Empty => !answer.chars().any(|character| !character.is_whitespace()),
            Rule::Loop => text::repeated_share(&candidate.words, LOOP_NGRAM, LOOP_AT_LEAST)
                .is_some_and(|share| share > LOOP_SHARE),
            Rule::Truncated => !candidate.complete,
            Rule::Echo => candidate.is_echo(),
            Rule::TurnMark => answer.lines().any(|line| self.opens_turn(line)),
            Rule::Thoughts => self.holds_thoughts(answer),
            Rule::Leakage => {
                let own = format!("{}\n{}", candidate.row.instruction, candidate.row.input);
                let own = Ngrams::of(&own, LEAK_NGRAM);
                self.meta_prompt.share_of(&candidate.words, &own) > LEAK_SHARE
            }
            Rule::BlackList => self.black_listed(candidate),
            Rule::Short => candidate.words.len() < VERBOSE_WORDS,
            // Not asked of an answer.
            Rule::NotGenerated | Rule::SameId => false,
        }
    }

    fn opens_turn(&self, line: &str) -> bool {
        self.principles.turn_cues().iter().any(|cue| line.trim_start().starts_with(cue))
    }

    /// A model that cites rules often gets their numbers wrong, so that any number counts.
    fn holds_thoughts(&self, answer: &str) -> bool {
        let Principles { affirmation, rules, .. } = &self.principles;
        answer.contains(affirmation.as_str()) || !citations(answer, rules).is_empty()
    }

    /// A word that the user wrote may be answered with.
    fn black_listed(&self, candidate: &Candidate<'_>) -> bool {
        let row = candidate.row;
        self.principles.black_list.iter().any(|word| {
            text::contains_phrase(candidate.answer, word)
                && !text::contains_phrase(&row.instruction, word)
                && !text::contains_phrase(&row.input, word)
        })
    }

    /// Gives the assistant its name in the training rows.
    ///
    /// Dromedary replaces each `Watson`; where the user speaks of one (Holmes's friend, IBM's
    /// program) it would write nonsense, so such rows keep the word.
    fn renamed(&self, row: &AlignedResponse, answer: &str) -> String {
        let names = &self.principles.names;
        if [&row.instruction, &row.input]
            .iter()
            .any(|text| text.to_lowercase().contains(&names.assistant.to_lowercase()))
        {
            return answer.to_owned();
        }
        text::replace_word(answer, &names.assistant, &names.product)
    }
}

/// A row taken apart.
struct Candidate<'a> {
    row: &'a AlignedResponse,
    affirmed: bool,
    answered: bool,
    /// The answer ends where the model ended it.
    complete: bool,
    answer: &'a str,
    words: Vec<String>,
}

/// Thoughts and answer of an output, with all that was written behind the answer.
pub(crate) fn parts<'o>(
    output: &'o str,
    form: Form,
    principles: &Principles,
) -> (&'o str, Option<&'o str>) {
    let mark = format!("\n\n{}", principles.cues.answer);
    match (form, output.split_once(&mark)) {
        (Form::Verbose, _) => ("", Some(output)),
        (Form::SelfAlign, Some((thoughts, answer))) => (thoughts, Some(answer)),
        (Form::SelfAlign, None) => (output, None),
    }
}

impl<'a> Candidate<'a> {
    /// The answer ends where a paragraph opens the next turn, be it the user's or, with small models,
    /// another one of the assistant's own: what comes before is whole.
    fn new(row: &'a AlignedResponse, form: Form, principles: &Principles) -> Self {
        let output = row.output.trim_start();
        // The marks of turns count the line breaks before them.
        let (_, answer) = parts(&row.output, form, principles);
        let (answered, rest) = (answer.is_some(), answer.unwrap_or_default());
        let next_turns = principles.turn_cues().map(|cue| format!("\n\n{cue}"));
        let stops = principles.stop_strings.iter().chain(&next_turns);
        let end = stops.filter_map(|stop| rest.find(stop.as_str())).min();
        let answer = rest[..end.unwrap_or(rest.len())].trim();
        Self {
            row,
            affirmed: output.starts_with(&principles.affirmation),
            answered,
            complete: end.is_some() || row.finish_reason != FinishReason::Length,
            answer,
            words: text::words(answer),
        }
    }

    fn is_echo(&self) -> bool {
        let length = self.answer.chars().count();
        [&self.row.instruction, &self.row.input].into_iter().any(|text| {
            let text = text.trim();
            let own = text.chars().count();
            own > SHORT_PROMPT
                && own as f64 > ECHO_SHARE * length as f64
                && self.answer.contains(text)
        })
    }
}
