//! What goes into an engine and what comes out of it.

use std::fmt;

/// A prompt to be continued.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Names the row in events and errors, and goes into its random numbers.
    pub id: String,
    /// The whole prompt, those tokens included that it shares with the pinned prefix.
    pub tokens: Vec<u32>,
    /// Seed of the row's random numbers.
    pub seed: u64,
}

/// Why a row ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// The model gave an end-of-text token.
    Eos,
    /// A stop string was written.
    Stop,
    /// The row has as many tokens as were asked for, or as fit its slot.
    Length,
}

impl fmt::Display for FinishReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Eos => "eos",
            Self::Stop => "stop",
            Self::Length => "length",
        })
    }
}

/// A row that has ended.
#[derive(Debug, Clone, PartialEq)]
pub struct FinishedRow {
    /// Of the request.
    pub id: String,
    /// The generated tokens, without an end-of-text token.
    pub tokens: Vec<u32>,
    /// Their text as a continuation of the prompt: a leading space is kept, and so is a stop string,
    /// behind which the text is cut even where the last token goes on.
    pub text: String,
    /// Why the row ended.
    pub finish_reason: FinishReason,
    /// Length of the prompt in tokens, the pinned prefix included.
    pub prompt_tokens: usize,
    /// From admission to the end.
    pub seconds: f64,
}

/// What an engine tells while it runs.
#[derive(Debug)]
pub enum Event<'a> {
    /// A row's text grew; the pieces of a row make up its text.
    Token {
        /// The row.
        id: &'a str,
        /// What was added: whole characters.
        text: &'a str,
    },
    /// A row ended.
    Finished(FinishedRow),
    /// A request cannot be run.
    Rejected {
        /// The request.
        id: String,
        /// Why, with the numbers.
        reason: String,
    },
    /// A row has no next token, because the model gave it logits that are NaN or infinite: its text is
    /// worth nothing. The rows beside it go on as if it had never been there.
    Failed {
        /// The row.
        id: String,
        /// Number of tokens that it had generated before.
        position: u64,
    },
}

/// What a run of an engine did.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Statistics {
    /// Rows that ended.
    pub finished: u64,
    /// Requests that were rejected.
    pub rejected: u64,
    /// Rows whose logits were not finite.
    pub failed: u64,
    /// Prompt tokens that were computed, without those taken from the pinned prefix.
    pub prompt_tokens: u64,
    /// Tokens that were chosen, end-of-text tokens included and those of failed rows left out.
    pub output_tokens: u64,
    /// Those of them that decode steps gave; each row's first token comes from reading its prompt.
    pub decode_tokens: u64,
    /// Decode steps.
    pub decode_steps: u64,
    /// Times that all logits of a row were looked at, because its likeliest tokens did not tell the
    /// next one.
    pub gathered_rows: u64,
    /// Decode steps in which every slot had a row.
    pub full_steps: u64,
    /// Seconds in these steps.
    pub full_seconds: f64,
    /// Tokens that were chosen before the source had no more requests.
    pub queue_tokens: u64,
    /// Seconds until then.
    pub queue_seconds: f64,
    /// Seconds in reading prompts.
    pub prefill_seconds: f64,
    /// Seconds in decode steps.
    pub decode_seconds: f64,
    /// Seconds of both in which this rank waited for the others of its group, or exchanged with them.
    pub collective_seconds: f64,
    /// Whether the receiver of the events asked to stop, on this or on another rank.
    pub stopped: bool,
}
