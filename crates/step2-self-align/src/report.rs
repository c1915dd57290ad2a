//! What the filter did to the rows, in numbers and samples.

use std::collections::BTreeMap;
use std::fmt;

use dromedary_records::{AlignedResponse, FinishReason};
use serde::{Deserialize, Serialize};

use crate::citations::citations;
use crate::filter::{Rule, Verdict, parts};
use crate::text::words;
use crate::{Form, MetaPrompt, Principles};

/// So many rows are shown of each rule, and of those that were kept.
const SAMPLES: usize = 3;
/// A longer text is cut in its middle.
const MAX_EXCERPT: usize = 900;

/// How many rows came in, were kept, and were dropped by which rule.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Rows in all files.
    pub rows: u64,
    /// Rows that passed the filter.
    pub kept: u64,
    /// Dropped rows by rule.
    pub dropped: BTreeMap<Rule, u64>,
    /// Kept and dropped rows by the source of their prompt.
    pub sources: BTreeMap<String, SourceReport>,
    /// Identity rows that were added.
    pub identity: u64,
    /// Rows by why their generation ended.
    #[serde(default)]
    pub finish_reasons: BTreeMap<FinishReason, u64>,
    /// Rules of the principles in their order, and how the thoughts cite them.
    #[serde(default)]
    pub citations: Vec<CitedRule>,
    /// Rows with thoughts that cite no rule at all.
    #[serde(default)]
    pub citing_nothing: u64,
    /// Rows by the words of their answer: those that were kept, those that were not.
    #[serde(default)]
    pub answer_words: AnswerWords,
}

/// The part of a [`Report`] that one source has.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceReport {
    /// Rows that passed the filter.
    pub kept: u64,
    /// Rows that did not.
    pub dropped: u64,
    /// These by rule.
    #[serde(default)]
    pub rules: BTreeMap<Rule, u64>,
}

/// How the thoughts of rows cite a rule. A row counts once.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CitedRule {
    /// Its name.
    pub name: String,
    /// Rows that cite it.
    pub rows: u64,
    /// Those of them that were kept.
    pub kept: u64,
    /// Those of them that give it another rule's number.
    pub misnumbered: u64,
    /// These rows by the source of their prompt.
    pub sources: BTreeMap<String, u64>,
}

/// Rows by the words of their answer, in classes of [`width`](Self::width) words from 0.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AnswerWords {
    /// Words of a class.
    pub width: u64,
    /// Rows that passed the filter.
    pub kept: Vec<u64>,
    /// Rows that did not and have an answer.
    pub dropped: Vec<u64>,
}

impl AnswerWords {
    fn count(&mut self, answer: &str, kept: bool) {
        self.width = WORDS_OF_A_CLASS;
        let class = words(answer).len() / WORDS_OF_A_CLASS as usize;
        let classes = if kept { &mut self.kept } else { &mut self.dropped };
        if classes.len() <= class {
            classes.resize(class + 1, 0);
        }
        classes[class] += 1;
    }
}

const WORDS_OF_A_CLASS: u64 = 10;

impl fmt::Display for Report {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "kept {} of {} rows", self.kept, self.rows)?;
        for (index, (rule, count)) in self.dropped.iter().enumerate() {
            let before = if index == 0 { "; dropped " } else { ", " };
            write!(formatter, "{before}{rule} {count}")?;
        }
        if self.identity > 0 {
            write!(formatter, "; added {} identity rows", self.identity)?;
        }
        Ok(())
    }
}

/// A row that stands for others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Sample {
    pub(crate) id: String,
    pub(crate) source: String,
    /// Why generation rejected it.
    pub(crate) reason: Option<String>,
    pub(crate) prompt: String,
    pub(crate) output: String,
}

/// Counts rows and keeps some of each kind.
pub(crate) struct Tally {
    pub(crate) report: Report,
    principles: Principles,
    form: Form,
    /// By rule, `None` for rows that were kept; of each those with the smallest ids, which are hashes:
    /// two runs show the same, and they come from all over the files.
    samples: BTreeMap<Option<Rule>, BTreeMap<String, Sample>>,
}

impl Tally {
    pub(crate) fn new(meta_prompt: &MetaPrompt) -> Self {
        let principles = meta_prompt.principles.clone();
        let rules = principles.rules.iter();
        let cited = rules.map(|rule| CitedRule { name: rule.name.clone(), ..CitedRule::default() });
        let report = Report { citations: cited.collect(), ..Report::default() };
        Self { report, principles, form: meta_prompt.form, samples: BTreeMap::new() }
    }

    pub(crate) fn count(&mut self, row: &AlignedResponse, reason: Option<&str>, verdict: &Verdict) {
        let rule = match verdict {
            Verdict::Kept(_) => None,
            Verdict::Dropped(rule) => Some(*rule),
        };
        self.count_row(&row.source, rule);
        *self.report.finish_reasons.entry(row.finish_reason).or_default() += 1;
        let (thoughts, answer) = parts(&row.output, self.form, &self.principles);
        if let Some(answer) = answer.filter(|_| row.finish_reason != FinishReason::Rejected) {
            self.report.answer_words.count(answer, rule.is_none());
        }
        if !thoughts.is_empty() {
            self.count_citations(&row.source, thoughts, rule.is_none());
        }
        self.sample(row, reason, rule);
    }

    fn count_row(&mut self, source: &str, rule: Option<Rule>) {
        self.report.rows += 1;
        let of_source = self.report.sources.entry(source.to_owned()).or_default();
        match rule {
            None => {
                self.report.kept += 1;
                of_source.kept += 1;
            }
            Some(rule) => {
                *self.report.dropped.entry(rule).or_default() += 1;
                of_source.dropped += 1;
                *of_source.rules.entry(rule).or_default() += 1;
            }
        }
    }

    fn count_citations(&mut self, source: &str, thoughts: &str, kept: bool) {
        let cited = citations(thoughts, &self.principles.rules);
        self.report.citing_nothing += u64::from(cited.is_empty());
        let mut before = None;
        for citation in &cited {
            // They come in the order of the rules.
            if before.replace(citation.rule) == Some(citation.rule) {
                continue;
            }
            let rule = &mut self.report.citations[citation.rule];
            let mut of_rule = cited.iter().filter(|other| other.rule == citation.rule);
            rule.rows += 1;
            rule.kept += u64::from(kept);
            rule.misnumbered += u64::from(of_rule.any(|citation| !citation.is_right()));
            *rule.sources.entry(source.to_owned()).or_default() += 1;
        }
    }

    fn sample(&mut self, row: &AlignedResponse, reason: Option<&str>, rule: Option<Rule>) {
        let samples = self.samples.entry(rule).or_default();
        let is_last = samples.last_key_value().is_some_and(|(last, _)| *last <= row.id);
        if samples.len() >= SAMPLES && is_last {
            return;
        }
        let input = if row.input.is_empty() { "" } else { "\n\n" };
        let prompt = format!("{}{input}{}", row.instruction, row.input);
        let sample = Sample {
            id: row.id.clone(),
            source: row.source.clone(),
            reason: reason.map(str::to_owned),
            prompt: excerpt(&prompt),
            output: excerpt(&row.output),
        };
        samples.insert(row.id.clone(), sample);
        if samples.len() > SAMPLES {
            samples.pop_last();
        }
    }

    /// The samples of a rule, or of the rows that were kept.
    pub(crate) fn samples(&self, rule: Option<Rule>) -> impl Iterator<Item = &Sample> {
        self.samples.get(&rule).into_iter().flat_map(BTreeMap::values)
    }
}

/// The text, without its middle if it is long.
fn excerpt(text: &str) -> String {
    let chars = text.chars().count();
    if chars <= MAX_EXCERPT {
        return text.to_owned();
    }
    let half = MAX_EXCERPT / 2;
    let head: String = text.chars().take(half).collect();
    let tail: String = text.chars().skip(chars - half).collect();
    format!("{head} [... {} characters ...] {tail}", chars - 2 * half)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(outputs: &[(&str, &str)]) -> Tally {
        let mut tally = Tally::new(&MetaPrompt::open(None).unwrap());
        for (number, (output, source)) in outputs.iter().enumerate() {
            let row = AlignedResponse {
                id: format!("{:02}", 99 - number),
                source: (*source).to_owned(),
                instruction: "q".to_owned(),
                input: String::new(),
                output: (*output).to_owned(),
                finish_reason: FinishReason::Stop,
                prompt_tokens: 1,
                output_tokens: 1,
                seed: 1,
            };
            tally.count(&row, None, &Verdict::Dropped(Rule::Loop));
        }
        tally
    }

    #[test]
    fn a_row_cites_a_rule_once_and_in_its_thoughts() {
        let twice = "By rules 7 (candor), 6 (candor) and 12 (dated knowledge), yes.\n\nWatson: No.";
        let answer = "I think.\n\nWatson: By rule 1 (ethical), no.";
        let report = tally(&[(twice, "a"), (answer, "b"), ("7 (candor)", "b")]).report;
        let cited: Vec<&CitedRule> = report.citations.iter().filter(|rule| rule.rows > 0).collect();
        assert_eq!(cited.len(), 2, "{cited:?}");
        assert_eq!((cited[0].name.as_str(), cited[0].rows, cited[0].misnumbered), ("candor", 2, 1));
        assert_eq!(cited[0].sources, BTreeMap::from([("a".to_owned(), 1), ("b".to_owned(), 1)]));
        assert_eq!((report.citing_nothing, report.citations.len()), (1, 17));
        assert_eq!(report.answer_words.dropped, [2]);
    }

    #[test]
    fn samples_are_few_and_do_not_depend_on_the_order() {
        let rows: Vec<(&str, &str)> = std::iter::repeat_n(("x", "s"), 20).collect();
        let tally = tally(&rows);
        let ids: Vec<&str> =
            tally.samples(Some(Rule::Loop)).map(|sample| sample.id.as_str()).collect();
        assert_eq!(ids, ["80", "81", "82"]);
        assert_eq!(tally.samples(None).count(), 0);
    }

    #[test]
    fn long_texts_keep_their_ends() {
        let text = format!("start{}end", "x".repeat(5000));
        let excerpt = excerpt(&text);
        assert!(excerpt.starts_with("startx") && excerpt.ends_with("xend"), "{excerpt}");
        assert!(excerpt.len() < 1000 && excerpt.contains("[... 4108 characters ...]"), "{excerpt}");
    }
}
