//! What a data set holds, found out before any step.

use std::collections::BTreeMap;

use crate::{
    collate::{CollateConfig, Encoded, Lengths},
    formats::DatasetFormat,
};

/// Counts over the rows of a data set.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Audit {
    /// Form of the rows.
    pub format: DatasetFormat,
    /// Rows with a target.
    pub rows: usize,
    /// Number in the file (from 1) and `example_id` of each row without a target.
    pub without_target: Vec<(usize, u64)>,
    /// What is read before the answer, in rows of a source and a target.
    pub source: Side,
    /// The answers.
    pub target: Side,
    /// Conversations whose turns are learned wherever they stand.
    pub conversation: Side,
    /// Tokens that are learned.
    pub learned_tokens: usize,
    /// Stretches of tokens that are learned.
    pub stretches: usize,
    /// Rows whose target ends in a stop mark: a model that never sees one learn does not end.
    pub stop_marks: usize,
    /// Rows by the meta prompt that they read.
    pub meta_prompts: BTreeMap<String, usize>,
    /// Tokens of each row.
    pub lengths: Vec<usize>,
}

/// Counts over one side of all rows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Side {
    /// Tokens that are left.
    pub tokens: usize,
    /// Tokens of the longest.
    pub longest: usize,
    /// Tokens that it may have.
    pub max_len: usize,
    /// Rows that were truncated.
    pub truncated_rows: usize,
    /// Tokens that were cut off.
    pub truncated_tokens: usize,
}

impl Side {
    fn add(&mut self, tokens: usize, truncated: usize) {
        self.tokens += tokens;
        self.longest = self.longest.max(tokens);
        self.truncated_rows += usize::from(truncated > 0);
        self.truncated_tokens += truncated;
    }
}

impl Audit {
    pub(crate) fn new(format: DatasetFormat, config: &CollateConfig) -> Self {
        let side = |max_len| Side { max_len, ..Side::default() };
        let (source, target) = (side(config.source_max_len), side(config.target_max_len));
        let conversation = side(config.conversation_max_len());
        Self { format, source, target, conversation, ..Self::default() }
    }

    pub(crate) fn add_without_target(&mut self, row: usize, example_id: u64) {
        self.without_target.push((row, example_id));
    }

    /// Adds a row, with the name of its meta prompt where it has one.
    pub(crate) fn add(&mut self, row: &Encoded, meta_prompt: Option<String>) {
        let example = &row.example;
        self.rows += 1;
        match row.lengths {
            Lengths::Sides([source, target]) => {
                self.source.add(source, example.truncated_left);
                self.target.add(target, example.truncated_right);
            }
            Lengths::Conversation => {
                self.conversation.add(example.input_ids.len(), example.truncated_right);
            }
        }
        self.learned_tokens += example.num_targets();
        self.stretches += example.learned.len();
        self.stop_marks += usize::from(row.ends_in_stop_mark);
        if let Some(meta_prompt) = meta_prompt {
            *self.meta_prompts.entry(meta_prompt).or_default() += 1;
        }
        self.lengths.push(example.input_ids.len());
    }

    /// Tokens of all rows.
    pub fn tokens(&self) -> usize {
        self.source.tokens + self.target.tokens + self.conversation.tokens
    }

    /// Whether rows are conversations, and not a source and a target each.
    pub(crate) fn has_conversations(&self) -> bool {
        self.conversation.tokens > 0
    }

    /// Share of the targets that end in a stop mark, in percent; 0 without rows.
    pub fn stop_mark_percent(&self) -> f64 {
        percent(self.stop_marks, self.rows)
    }

    /// Says in one line of the log what was read of `name`.
    pub(crate) fn log(&self, name: &str) {
        tracing::info!(
            format = %self.format,
            rows = self.rows,
            dropped = self.without_target.len(),
            tokens = self.tokens(),
            learned = self.learned_tokens,
            truncated_left = self.source.truncated_rows,
            truncated_right = self.target.truncated_rows + self.conversation.truncated_rows,
            stop_marks = format_args!("{:.1} %", self.stop_mark_percent()),
            "{name}"
        );
        if self.stop_marks == 0 {
            tracing::warn!(
                "no target of {name} ends in a stop mark: a model that learns them does not end its \
                 answers"
            );
        }
    }
}

/// `part` of `whole` in percent; 0 of nothing.
pub(crate) fn percent(part: usize, whole: usize) -> f64 {
    100.0 * part as f64 / whole.max(1) as f64
}
