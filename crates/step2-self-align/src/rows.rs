//! One run's way from prompts to rows: what the engine asks for and what it tells.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::ControlFlow;

use dromedary_command::{Progress, StopFlag};
use dromedary_llama::generation::{
    Engine, Event, FinishReason as RowEnd, FinishedRow, Request, Statistics,
};
use dromedary_records::{AlignedResponse, FinishReason, Prompt};
use dromedary_tokenizer::Tokenizer;

use crate::generate::GenerateConfig;
use crate::output::{Output, RowMetrics, RunMetrics, StoredRow, seconds_since_1970};
use crate::{Error, Result, Template};

/// The rows of one run on their way from prompts to the output.
pub(crate) struct Rows<'a> {
    config: &'a GenerateConfig,
    template: &'a Template,
    tokenizer: &'a Tokenizer,
    left: std::vec::IntoIter<Prompt>,
    under_way: BTreeMap<String, Prompt>,
    pub(crate) output: Option<Output>,
    pub(crate) answered: usize,
    pub(crate) rejected: usize,
    pub(crate) forced: usize,
    tokens: u64,
    error: Option<Error>,
}

impl<'a> Rows<'a> {
    pub(crate) fn new(
        config: &'a GenerateConfig,
        template: &'a Template,
        tokenizer: &'a Tokenizer,
        left: Vec<Prompt>,
        output: Option<Output>,
    ) -> Self {
        Self {
            config,
            template,
            tokenizer,
            left: left.into_iter(),
            under_way: BTreeMap::new(),
            output,
            answered: 0,
            rejected: 0,
            forced: 0,
            tokens: 0,
            error: None,
        }
    }

    pub(crate) fn run(
        &mut self,
        engine: &mut Engine<'_>,
        stop: &StopFlag,
        progress: &Progress,
    ) -> Result<Statistics> {
        let rows = RefCell::new(self);
        let mut source = || rows.borrow_mut().next(progress);
        let mut sink = |event: Event<'_>| {
            let mut rows = rows.borrow_mut();
            rows.take(event, progress);
            if stop.is_set() || rows.error.is_some() {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        };
        let statistics = engine.run(&mut source, &mut sink);
        let rows = rows.into_inner();
        if let Some(error) = rows.error.take() {
            return Err(error);
        }
        let statistics = statistics?;
        rows.measure_run(&statistics)?;
        Ok(statistics)
    }

    /// The next prompt that can be run; those that cannot get their row here.
    fn next(&mut self, progress: &Progress) -> Option<Request> {
        while self.error.is_none() {
            let prompt = self.left.next()?;
            match self.request(&prompt) {
                Ok(request) => {
                    self.under_way.insert(prompt.id.clone(), prompt);
                    return Some(request);
                }
                Err(reason) => self.reject(prompt, reason, progress),
            }
        }
        None
    }

    fn request(&self, prompt: &Prompt) -> std::result::Result<Request, String> {
        if prompt.instruction.trim().is_empty() && prompt.input.trim().is_empty() {
            return Err("the prompt is empty".to_owned());
        }
        let limit = self.config.max_seq_len;
        // The bound spares the tokenizer a prompt of megabytes.
        let fits = self.tokenizer.fits(&prompt.instruction, limit)
            && self.tokenizer.fits(&prompt.input, limit);
        if !fits {
            return Err(format!(
                "the prompt has more tokens than a row may have (max_seq_len {limit})"
            ));
        }
        let mut text = self.template.fill(&prompt.instruction, &prompt.input);
        text.extend(self.config.force_prefix.as_deref());
        let tokens = self.tokenizer.encode_with_bos(&text);
        Ok(Request { id: prompt.id.clone(), tokens, seed: self.config.seed })
    }

    fn take(&mut self, event: Event<'_>, progress: &Progress) {
        match event {
            Event::Token { .. } => self.tokens += 1,
            Event::Finished(finished) => self.answer(finished, progress),
            Event::Rejected { id, reason } => {
                if let Some(prompt) = self.under_way.remove(&id) {
                    self.reject(prompt, reason, progress);
                }
            }
        }
    }

    fn answer(&mut self, finished: FinishedRow, progress: &Progress) {
        let Some(prompt) = self.under_way.remove(&finished.id) else { return };
        self.answered += 1;
        progress.inc(1);
        let seconds = finished.seconds;
        let mut output = finished.text;
        if let Some(forced) = &self.config.force_prefix {
            self.forced += 1;
            output.insert_str(0, forced);
        }
        let row = AlignedResponse {
            id: prompt.id,
            source: prompt.source,
            instruction: prompt.instruction,
            input: prompt.input,
            output,
            finish_reason: match finished.finish_reason {
                RowEnd::Eos => FinishReason::Eos,
                RowEnd::Stop => FinishReason::Stop,
                RowEnd::Length => FinishReason::Length,
            },
            prompt_tokens: count(finished.prompt_tokens),
            output_tokens: count(finished.tokens.len()),
            seed: self.config.seed,
        };
        self.write(StoredRow { row, reason: None }, seconds);
    }

    fn reject(&mut self, prompt: Prompt, reason: String, progress: &Progress) {
        tracing::warn!("prompt {} is rejected: {reason}", prompt.id);
        self.rejected += 1;
        progress.inc(1);
        let row = AlignedResponse {
            id: prompt.id,
            source: prompt.source,
            instruction: prompt.instruction,
            input: prompt.input,
            output: String::new(),
            finish_reason: FinishReason::Rejected,
            prompt_tokens: 0,
            output_tokens: 0,
            seed: self.config.seed,
        };
        self.write(StoredRow { row, reason: Some(reason) }, 0.0);
    }

    fn write(&mut self, stored: StoredRow, seconds: f64) {
        let Some(output) = &mut self.output else { return };
        let row = &stored.row;
        let metrics = RowMetrics {
            id: &row.id,
            group_rank: self.config.group_rank,
            group_size: self.config.group_size,
            prompt_tokens: row.prompt_tokens,
            output_tokens: row.output_tokens,
            finish_reason: row.finish_reason,
            seconds,
            finished_at: seconds_since_1970(),
        };
        let written = output.append(&stored).and_then(|()| output.measure(&metrics));
        if let Err(error) = written {
            self.error.get_or_insert(error);
        }
    }

    fn measure_run(&mut self, statistics: &Statistics) -> Result<()> {
        let Some(output) = &mut self.output else { return Ok(()) };
        output.measure(&RunMetrics {
            run: if statistics.stopped { "stopped" } else { "finished" },
            rows: statistics.finished,
            forced: self.forced as u64,
            output_tokens: statistics.output_tokens,
            decode_steps: statistics.decode_steps,
            prefill_seconds: statistics.prefill_seconds,
            decode_seconds: statistics.decode_seconds,
            finished_at: seconds_since_1970(),
        })
    }
}

/// Token counts of rows are far below 2^32, which a row's own context bounds.
fn count(tokens: usize) -> u32 {
    u32::try_from(tokens).unwrap_or(u32::MAX)
}
