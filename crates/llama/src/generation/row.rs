//! One row that is being generated.

use std::time::Instant;

use dromedary_tokenizer::{DecodeStream, Tokenizer};

use super::{FinishReason, FinishedRow, Request, StopRule, sampler::RowKey};

/// A request with its state.
pub(super) struct Row<'t> {
    request: Request,
    /// Tokens of the shared prefix that the row attends to.
    pub(super) prefix: usize,
    /// Tokens of the prefix that are copied into the row's slot.
    pub(super) copied: usize,
    /// Generated tokens that the row may have at most.
    limit: usize,
    tokens: Vec<u32>,
    text: String,
    stream: Option<DecodeStream<'t>>,
    finish_reason: Option<FinishReason>,
    admitted: Instant,
}

impl<'t> Row<'t> {
    pub(super) fn new(
        request: Request,
        tokenizer: &'t Tokenizer,
        [prefix, copied]: [usize; 2],
        limit: usize,
    ) -> Self {
        Self {
            request,
            prefix,
            copied,
            limit,
            tokens: Vec::new(),
            text: String::new(),
            stream: Some(DecodeStream::continuation(tokenizer)),
            finish_reason: None,
            admitted: Instant::now(),
        }
    }

    pub(super) fn id(&self) -> &str {
        &self.request.id
    }

    pub(super) fn key(&self) -> RowKey<'_> {
        RowKey {
            seed: self.request.seed,
            id: &self.request.id,
            position: self.tokens.len() as u64,
            generated: &self.tokens,
        }
    }

    /// The prompt's tokens that the prefix does not hold.
    pub(super) fn suffix(&self) -> &[u32] {
        &self.request.tokens[self.prefix + self.copied..]
    }

    /// The last token, and its position in the whole row.
    pub(super) fn last(&self) -> (u32, i64) {
        let token = self.tokens.last().or(self.request.tokens.last()).copied().unwrap_or(0);
        (token, (self.request.tokens.len() + self.tokens.len()) as i64 - 1)
    }

    /// Tokens in the row's slot once its last token is there.
    pub(super) fn own_len(&self) -> i64 {
        (self.request.tokens.len() - self.prefix + self.tokens.len()) as i64
    }

    /// Tokens whose keys and values are in the row's slot.
    pub(super) fn stored(&self) -> i64 {
        if self.is_started() { self.own_len() - 1 } else { 0 }
    }

    /// Tokens of its slot that the row may need.
    pub(super) fn reserved(&self) -> usize {
        self.copied + self.suffix().len() + self.limit
    }

    /// Whether the prompt was read.
    pub(super) fn is_started(&self) -> bool {
        !self.tokens.is_empty()
    }

    /// Takes the next token; gives the text that it adds.
    pub(super) fn push(&mut self, token: u32, stop: &StopRule) -> &str {
        let before = self.text.len();
        if stop.is_eos(token) {
            self.finish(FinishReason::Eos);
            return &self.text[before..];
        }
        self.tokens.push(token);
        let piece = self.stream.as_mut().and_then(|stream| stream.push(token));
        if let Some(piece) = piece {
            self.text.push_str(&piece);
            if let Some(end) = stop.end_in(&self.text, before) {
                self.text.truncate(end);
                self.finish_reason = Some(FinishReason::Stop);
            }
        }
        if self.finish_reason.is_none() && self.tokens.len() >= self.limit {
            self.finish(FinishReason::Length);
        }
        &self.text[before..]
    }

    /// Adds what the decoder held back for a character that will not be completed.
    fn finish(&mut self, reason: FinishReason) {
        if let Some(rest) = self.stream.take().and_then(DecodeStream::finish) {
            self.text.push_str(&rest);
        }
        self.finish_reason = Some(reason);
    }

    /// The finished row, or the row itself if it has not ended.
    pub(super) fn into_finished(self) -> Result<FinishedRow, Box<Self>> {
        let Some(finish_reason) = self.finish_reason else { return Err(Box::new(self)) };
        Ok(FinishedRow {
            id: self.request.id,
            tokens: self.tokens,
            text: self.text,
            finish_reason,
            prompt_tokens: self.request.tokens.len(),
            seconds: self.admitted.elapsed().as_secs_f64(),
        })
    }
}
