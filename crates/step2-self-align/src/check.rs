//! What is to be said about principles before hours of generation rest on them.

use std::collections::BTreeSet;
use std::fmt;

use dromedary_records::{AlignedResponse, FinishReason};
use dromedary_tokenizer::Tokenizer;
use serde::Serialize;

use crate::citations::{citations, unknown_citations};
use crate::text::{contains_phrase, is_cjk};
use crate::{Exemplar, Filter, Form, MetaPrompt, Principles, Template, Verdict};

/// A figure with fewer digits is too common to tell a copy.
const FIGURE_DIGITS: usize = 4;
/// So many CJK characters that question and answer share are a name or a subject.
const CJK_PHRASE: usize = 3;
/// Words that may stand in any question and any answer.
const COMMON: &str = "the and for with from that this what which when where how your you are was were \
    can could would should some any all not but our their them they there here first second third last \
    next one two three four five please give tell write make each than then into about have has had \
    more most very also will other";

/// What [`check`] finds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "finding", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Finding {
    /// The text before a prompt is longer than a run lets it be. An error.
    OverBudget {
        /// Its tokens.
        tokens: usize,
        /// `max_shared_seq_len`.
        limit: usize,
    },
    /// Prefix and row do not fit into the model's context. An error.
    OverContext {
        /// Tokens of both.
        tokens: usize,
        /// `max_position_embeddings`.
        context: usize,
    },
    /// An exemplar breaks the form that it is to show. An error.
    Form {
        /// Its number, from 1.
        exemplar: usize,
        /// Its subject.
        subject: String,
        /// What is wrong.
        problem: String,
    },
    /// No exemplar cites the rule, so that the model never sees how.
    RuleNotCited {
        /// Its number, from 1.
        rule: usize,
        /// Its name.
        name: String,
    },
    /// A name, a figure or a subject of an exemplar, which an answer can only have from there, is
    /// not in the black list.
    NotListed {
        /// The exemplar's number, from 1.
        exemplar: usize,
        /// The phrase.
        phrase: String,
    },
    /// A phrase of the black list stands in no exemplar: it drops answers that copy nothing.
    ListedForNothing {
        /// The phrase.
        phrase: String,
    },
}

impl Finding {
    /// Whether generation behind these principles is of no use, or refused.
    pub fn is_error(&self) -> bool {
        matches!(self, Self::OverBudget { .. } | Self::OverContext { .. } | Self::Form { .. })
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OverBudget { tokens, limit } => {
                write!(f, "{tokens} tokens before a prompt, max_shared_seq_len allows {limit}")
            }
            Self::OverContext { tokens, context } => {
                write!(f, "prefix and row have up to {tokens} tokens, the context has {context}")
            }
            Self::Form { exemplar, subject, problem } => {
                write!(f, "exemplar {exemplar} ({subject}): {problem}")
            }
            Self::RuleNotCited { rule, name } => {
                write!(f, "no exemplar cites rule {rule} ({name})")
            }
            Self::NotListed { exemplar, phrase } => {
                write!(f, "exemplar {exemplar}: {phrase:?} is not in black_list")
            }
            Self::ListedForNothing { phrase } => {
                write!(f, "black_list: {phrase:?} stands in no exemplar")
            }
        }
    }
}

/// Tokens of a meta prompt, and what a run allows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct TokenBudget {
    /// Of all that stands before a prompt.
    pub prefix: usize,
    /// Of each part, with what it is: opening and rules, then each exemplar.
    pub parts: Vec<(String, usize)>,
    /// `max_shared_seq_len`.
    pub max_shared_seq_len: usize,
    /// `max_seq_len`: what a row may have behind it.
    pub max_seq_len: usize,
    /// The model's context, where it is known.
    pub context: Option<usize>,
}

impl TokenBudget {
    /// Counts with a tokenizer.
    pub fn new(meta_prompt: &MetaPrompt, tokenizer: &Tokenizer, limits: BudgetLimits) -> Self {
        let principles = &meta_prompt.principles;
        let rules = principles.render_rules();
        let mut parts = vec![("opening and rules".to_owned(), tokenizer.len_with_bos(&rules))];
        for (index, exemplar) in principles.exemplars.iter().enumerate() {
            let mut text = String::new();
            principles.render_exemplar(exemplar, &mut text);
            let name = format!("exemplar {} ({})", index + 1, exemplar.subject);
            parts.push((name, tokenizer.encode(&text).len()));
        }
        let BudgetLimits { max_shared_seq_len, max_seq_len, context } = limits;
        let prefix = Template::new(meta_prompt).shared_prefix(tokenizer).len();
        Self { prefix, parts, max_shared_seq_len, max_seq_len, context }
    }

    fn findings(&self) -> Vec<Finding> {
        let (tokens, limit) = (self.prefix, self.max_shared_seq_len);
        let over = (tokens > limit).then_some(Finding::OverBudget { tokens, limit });
        let tokens = tokens + self.max_seq_len;
        let context = self.context.filter(|&context| tokens > context);
        let beyond = context.map(|context| Finding::OverContext { tokens, context });
        over.into_iter().chain(beyond).collect()
    }
}

/// What a run allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BudgetLimits {
    /// Tokens of the shared prefix.
    pub max_shared_seq_len: usize,
    /// Tokens of a row behind it.
    pub max_seq_len: usize,
    /// Tokens of both that the model can read, where it is known.
    pub context: Option<usize>,
}

/// Looks for what makes principles fail later, errors first.
pub fn check(meta_prompt: &MetaPrompt, budget: Option<&TokenBudget>) -> Vec<Finding> {
    let principles = &meta_prompt.principles;
    let mut findings = budget.map(TokenBudget::findings).unwrap_or_default();
    for (index, exemplar) in principles.exemplars.iter().enumerate() {
        let problems = form_problems(principles, exemplar);
        findings.extend(problems.into_iter().map(|problem| Finding::Form {
            exemplar: index + 1,
            subject: exemplar.subject.clone(),
            problem,
        }));
    }
    findings.extend(rules_not_cited(principles));
    findings.extend(not_listed(principles));
    findings.extend(listed_for_nothing(principles));
    findings
}

fn form_problems(principles: &Principles, exemplar: &Exemplar) -> Vec<String> {
    let mut problems = Vec::new();
    let thoughts = &exemplar.thoughts;
    let cited = citations(thoughts, &principles.rules);
    if cited.is_empty() {
        problems.push("its thoughts cite no rule".to_owned());
    }
    for citation in cited.iter().filter(|citation| !citation.is_right()) {
        let number = citation.number.unwrap_or_default();
        let name = &principles.rules[citation.rule].name;
        problems.push(format!("it cites {number} ({name}), which is rule {}", citation.rule + 1));
    }
    for unknown in unknown_citations(thoughts, &principles.rules) {
        problems.push(format!("it cites {unknown}, which is no rule"));
    }
    if thoughts.contains(&principles.affirmation) {
        problems.push("its thoughts repeat the affirmation, which is put before them".to_owned());
    }
    if let Some(rule) = dropped_by(principles, exemplar) {
        problems.push(format!("the filter would drop such an answer: {rule}"));
    }
    problems
}

/// The rule of the filter that an answer like the exemplar's own breaks, copies left aside.
fn dropped_by(principles: &Principles, exemplar: &Exemplar) -> Option<crate::Rule> {
    let affirmation = &principles.affirmation;
    let principles = Principles { black_list: Vec::new(), ..principles.clone() };
    let (thoughts, answer) = (&exemplar.thoughts, &exemplar.answer);
    let output = format!(" {affirmation} {thoughts}\n\n{} {answer}", principles.cues.answer);
    let (path, form) = ("exemplar".into(), Form::SelfAlign);
    let meta_prompt = MetaPrompt { text: String::new(), principles, path, form };
    let row = AlignedResponse {
        id: String::new(),
        source: String::new(),
        instruction: exemplar.user.clone(),
        input: exemplar.input.clone().unwrap_or_default(),
        output,
        finish_reason: FinishReason::Stop,
        prompt_tokens: 0,
        output_tokens: 0,
        seed: 0,
    };
    match Filter::new(None, &meta_prompt).judge(&row) {
        Verdict::Kept(_) => None,
        Verdict::Dropped(rule) => Some(rule),
    }
}

fn rules_not_cited(principles: &Principles) -> impl Iterator<Item = Finding> {
    let exemplars = principles.exemplars.iter();
    let cited: BTreeSet<usize> = exemplars
        .flat_map(|exemplar| citations(&exemplar.thoughts, &principles.rules))
        .map(|citation| citation.rule)
        .collect();
    let rules = principles.rules.iter().enumerate();
    rules
        .filter(move |(rule, _)| !cited.contains(rule))
        .map(|(rule, of)| Finding::RuleNotCited { rule: rule + 1, name: of.name.clone() })
}

fn not_listed(principles: &Principles) -> Vec<Finding> {
    let mut found = Vec::new();
    let mut seen = BTreeSet::new();
    for (index, exemplar) in principles.exemplars.iter().enumerate() {
        for phrase in telling_phrases(exemplar) {
            let is_own = contains_phrase(&phrase, &principles.names.assistant);
            if !is_own && !is_listed(&phrase, principles) && seen.insert(phrase.clone()) {
                found.push(Finding::NotListed { exemplar: index + 1, phrase });
            }
        }
    }
    found
}

/// Whether an answer that holds the phrase is dropped, or one that holds a part of it.
fn is_listed(phrase: &str, principles: &Principles) -> bool {
    let phrase = phrase.to_lowercase();
    principles.black_list.iter().any(|word| {
        let word = word.to_lowercase();
        contains_phrase(&phrase, &word) || contains_phrase(&word, &phrase)
    })
}

fn listed_for_nothing(principles: &Principles) -> impl Iterator<Item = Finding> {
    let mut text = String::new();
    for exemplar in &principles.exemplars {
        principles.render_exemplar(exemplar, &mut text);
    }
    let text = text.to_lowercase();
    // A word may be listed in its singular and in its plural.
    let stands = move |word: &str| {
        let word = word.to_lowercase();
        text.contains(&word) || word.strip_suffix('s').is_some_and(|one| text.contains(one))
    };
    let listed = principles.black_list.iter().filter(move |word| !stands(word));
    listed.map(|phrase| Finding::ListedForNothing { phrase: phrase.clone() })
}

/// Names, figures and subjects of an exemplar: words with an underscore, long numbers, capitalised
/// words behind each other within a sentence, and what question and answer share of two words or of
/// some CJK characters.
fn telling_phrases(exemplar: &Exemplar) -> Vec<String> {
    let input = exemplar.input.as_deref().unwrap_or_default();
    let question = format!("{}\n{input}", exemplar.user);
    let mut phrases = Vec::new();
    for text in [&question, &exemplar.thoughts, &exemplar.answer] {
        phrases.extend(names(text));
    }
    phrases.extend(shared_pairs(&question, &exemplar.answer));
    phrases.extend(shared_cjk(&question, &exemplar.answer));
    let mut seen = BTreeSet::new();
    phrases.retain(|phrase| seen.insert(phrase.clone()));
    phrases
}

fn names(text: &str) -> Vec<String> {
    let mut names = Vec::new();
    for line in text.lines() {
        let mut run: Vec<&str> = Vec::new();
        let mut opens = true;
        for raw in line.split_whitespace() {
            let word = raw.trim_matches(|character: char| !character.is_alphanumeric());
            let is_word = |part: char| part.is_alphanumeric() || part == '_';
            if let Some(name) =
                raw.split(|c| !is_word(c)).find(|part| part.trim_matches('_').contains('_'))
            {
                names.push(name.to_owned());
            }
            let is_number = word.chars().all(|character| character.is_ascii_digit());
            if is_number && word.len() >= FIGURE_DIGITS {
                names.push(word.to_owned());
            }
            let capital = word.chars().next().is_some_and(char::is_uppercase) && word.len() > 1;
            if capital && !opens {
                run.push(word);
            }
            let ends = !raw.ends_with(|character: char| character.is_alphanumeric());
            if !capital || opens || ends {
                names.extend((run.len() > 1).then(|| run.join(" ")));
                run.clear();
            }
            opens = raw.ends_with(['.', '?', '!', ':', '"', '\u{201d}']);
        }
        names.extend((run.len() > 1).then(|| run.join(" ")));
    }
    names
}

/// Two words behind each other, neither of them common, that stand in both texts.
fn shared_pairs(question: &str, answer: &str) -> Vec<String> {
    let common: BTreeSet<&str> = COMMON.split_whitespace().collect();
    let words = |text: &str| -> Vec<String> {
        let lower = text.to_lowercase();
        lower.split(|c: char| !c.is_alphanumeric()).map(str::to_owned).collect()
    };
    let tells = |word: &String| word.len() > 3 && !common.contains(word.as_str());
    let answer: BTreeSet<Vec<String>> = words(answer).windows(2).map(<[_]>::to_vec).collect();
    let question = words(question);
    let pairs = question.windows(2).filter(|pair| pair.iter().all(tells) && answer.contains(*pair));
    pairs.map(|pair| pair.join(" ")).collect()
}

/// The longest runs of CJK characters that both texts have.
fn shared_cjk(question: &str, answer: &str) -> Vec<String> {
    let runs = question.split(|character| !is_cjk(character));
    let mut shared = Vec::new();
    for run in runs {
        let run: Vec<char> = run.chars().collect();
        let mut at = 0;
        while at < run.len() {
            let part = |end: usize| run[at..end].iter().collect::<String>();
            let ends = (at + 1..=run.len()).rev();
            let longest = ends.map(part).find(|part| answer.contains(part.as_str()));
            let length = longest.as_ref().map_or(0, |part| part.chars().count());
            shared.extend(longest.filter(|_| length >= CJK_PHRASE));
            at += length.max(1);
        }
    }
    shared
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    const BUILT_IN: &str = include_str!("../../../prompts/self_align_principles.toml");

    fn found(changes: &[(&str, &str)]) -> Vec<String> {
        let mut text = BUILT_IN.to_owned();
        for (from, to) in changes {
            assert!(text.contains(from), "{from}");
            text = text.replacen(from, to, 1);
        }
        let principles = Principles::parse(&text, Path::new("p.toml")).unwrap();
        let text = principles.render();
        let (path, form) = ("p.toml".into(), Form::SelfAlign);
        let meta_prompt = MetaPrompt { text, principles, path, form };
        check(&meta_prompt, None).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn nothing_is_wrong_with_the_built_in_principles() {
        assert_eq!(found(&[]), [""; 0]);
    }

    #[test]
    fn a_rule_that_no_exemplar_cites_is_told() {
        for (cited, name) in [
            ("4 (question assessment), ", "4 (question assessment)"),
            (
                ", 14 (balanced & informative perspectives)",
                "14 (balanced & informative perspectives)",
            ),
        ] {
            assert_eq!(found(&[(cited, "")]), [format!("no exemplar cites rule {name}")]);
        }
    }

    #[test]
    fn broken_exemplars_are_told_by_number_and_subject() {
        let first = "exemplar 1 (a date after the end of the training data): ";
        let cite =
            "By rules 4 (question assessment), 12 (dated knowledge) and 7 (candor), I should";
        for (by, problem) in [
            ("I should", "its thoughts cite no rule"),
            (
                "By rule 7 (dated knowledge), I should",
                "it cites 7 (dated knowledge), which is rule 12",
            ),
            ("By rules 7 (candor) and 18 (kind), I should", "it cites 18 (kind), which is no rule"),
        ] {
            let problems = found(&[(cite, by)]);
            assert!(problems.contains(&format!("{first}{problem}")), "{problems:?}");
        }
        let cites = ("I cannot tell you which film it was.", "By rule 7 (candor) I pass.");
        let problem = format!("{first}the filter would drop such an answer: thoughts");
        assert_eq!(found(&[cites]), [problem]);
        let repeated = (
            "thoughts = \"The user asks which",
            "thoughts = \"I am a helpful, ethical, and reliable assistant. The user asks which",
        );
        assert!(found(&[repeated])[0].contains("repeat the affirmation"));
    }

    #[test]
    fn what_only_an_exemplar_can_say_is_to_be_listed() {
        for (word, finding) in [
            ("  \"2047\",\n", "exemplar 1: \"2047\" is not in black_list"),
            ("  \"count_vowels\",\n", "exemplar 3: \"count_vowels\" is not in black_list"),
            ("  \"Harbour Gate\",\n", "exemplar 5: \"Harbour Gate\" is not in black_list"),
            ("  \"reading circle\",\n", "exemplar 7: \"reading circle\" is not in black_list"),
            ("  \"quiet island\",\n", "exemplar 3: \"quiet island\" is not in black_list"),
            ("  \"Lin Keheng\",\n", "exemplar 2: \"Lin Keheng\" is not in black_list"),
        ] {
            let findings = found(&[(word, "")]);
            assert!(findings.contains(&finding.to_owned()), "{findings:?}");
        }
        let cjk = "\u{6797}\u{53ef}\u{73e9}";
        let name = format!("  \"{cjk}\",\n");
        assert_eq!(found(&[(&name, "")]), [format!("exemplar 2: {cjk:?} is not in black_list")]);
        let umbrella = ("\"sundews\",", "\"sundews\", \"umbrella\",");
        assert_eq!(found(&[umbrella]), ["black_list: \"umbrella\" stands in no exemplar"]);
    }

    #[test]
    fn a_budget_has_two_limits() {
        let budget = |context| TokenBudget {
            prefix: 2900,
            parts: Vec::new(),
            max_shared_seq_len: 2816,
            max_seq_len: 768,
            context,
        };
        let findings = |context| -> Vec<String> {
            budget(context).findings().iter().map(ToString::to_string).collect()
        };
        let over = "2900 tokens before a prompt, max_shared_seq_len allows 2816";
        assert_eq!(findings(None), [over]);
        assert_eq!(findings(Some(3668)), [over]);
        let beyond = "prefix and row have up to 3668 tokens, the context has 3667";
        assert_eq!(findings(Some(3667)), [over, beyond]);
    }
}
