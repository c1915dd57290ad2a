//! One run's way from prompts to rows: what the engine asks for and what it tells.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::{ControlFlow, Range};

use dromedary_llama::generation::{
    Engine, Event, FinishReason as RowEnd, FinishedRow, Request, Statistics,
};
use dromedary_parallel::WorkQueue;
use dromedary_records::{AlignedResponse, FinishReason, Prompt};
use dromedary_tokenizer::Tokenizer;
use serde::{Deserialize, Serialize};

use crate::generate::GenerateConfig;
use crate::live::{Live, Pulse};
use crate::metrics::{RowMetrics, RunMetrics, seconds_since_1970};
use crate::output::{Output, StoredRow};
use crate::work::Task;
use crate::{Error, Result, Template};

/// A group takes this share of its slots at once: few enough that groups end together, many enough
/// that it seldom has to ask.
const BLOCK_OF_SLOTS: usize = 4;

/// So many rows without finite logits, and no answer between, end the run: a model that computes
/// nonsense would reject a million prompts otherwise.
const MAX_NOT_FINITE: usize = 64;

/// What the rows of a run are made with.
#[derive(Clone, Copy)]
pub(crate) struct Source<'a, 'q> {
    pub(crate) config: &'a GenerateConfig,
    pub(crate) template: &'a Template,
    pub(crate) tokenizer: &'a Tokenizer,
    pub(crate) tasks: &'a [Task],
    pub(crate) queue: &'a RefCell<WorkQueue<'q>>,
    pub(crate) pulse: &'a Pulse,
}

/// The rows of one run on their way from prompts to the output.
pub(crate) struct Rows<'a, 'q> {
    source: Source<'a, 'q>,
    /// Taken from the queue.
    in_hand: Range<usize>,
    under_way: BTreeMap<String, UnderWay>,
    output: Option<Output>,
    live: Live<'a>,
    counts: RowCounts,
    /// Rows without finite logits since the last answer.
    not_finite: Vec<String>,
    error: Option<Error>,
}

/// What a run did so far.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct RowCounts {
    pub(crate) answered: usize,
    pub(crate) rejected: usize,
    pub(crate) forced: usize,
}

/// A row in the engine.
struct UnderWay {
    task: usize,
    slot: usize,
    /// Tokens that it was seen to get.
    tokens: u64,
}

impl<'a, 'q> Rows<'a, 'q> {
    pub(crate) fn new(source: Source<'a, 'q>, output: Option<Output>, live: Live<'a>) -> Self {
        Self {
            source,
            in_hand: 0..0,
            under_way: BTreeMap::new(),
            output,
            live,
            counts: RowCounts::default(),
            not_finite: Vec::new(),
            error: None,
        }
    }

    /// Generates until nothing is left or the group stops.
    pub(crate) fn run(&mut self, engine: &mut Engine<'_>) -> Result<Statistics> {
        let result = self.run_engine(engine);
        match self.error.take() {
            Some(error) => Err(error),
            None => Ok(result?),
        }
    }

    fn run_engine(&mut self, engine: &mut Engine<'_>) -> dromedary_llama::Result<Statistics> {
        let rows = RefCell::new(self);
        let mut source = || rows.borrow_mut().next();
        let mut sink = |event: Event<'_>| {
            let mut rows = rows.borrow_mut();
            rows.take(event);
            if rows.source.pulse.stop.get() {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        };
        engine.run(&mut source, &mut sink)
    }

    /// The next prompt that can be run; those that cannot get their row here.
    ///
    /// All ranks of a group come to the same, also where one of them has failed: the step's end tells.
    fn next(&mut self) -> Option<Request> {
        loop {
            if self.source.pulse.stop.get() {
                return None;
            }
            let task = self.next_task()?;
            match self.request(&self.source.tasks[task]) {
                Ok(request) => {
                    let slot = self.free_slot();
                    let row = UnderWay { task, slot, tokens: 0 };
                    self.under_way.insert(request.id.clone(), row);
                    self.count_in_use();
                    return Some(request);
                }
                Err(reason) => self.reject(task, reason),
            }
        }
    }

    fn next_task(&mut self) -> Option<usize> {
        if self.in_hand.is_empty() {
            let block = (self.source.config.max_batch_size / BLOCK_OF_SLOTS).max(1);
            match self.source.queue.borrow_mut().take(block) {
                Ok(rows) => self.in_hand = rows,
                Err(error) => self.set_error(error.into()),
            }
        }
        self.in_hand.next()
    }

    fn free_slot(&self) -> usize {
        let taken: BTreeSet<usize> = self.under_way.values().map(|row| row.slot).collect();
        (0..).zip(&taken).find(|(slot, taken)| slot != *taken).map_or(taken.len(), |(slot, _)| slot)
    }

    fn count_in_use(&self) {
        self.source.pulse.in_use.set(self.under_way.len());
    }

    fn request(&self, task: &Task) -> std::result::Result<Request, String> {
        let Source { config, template, tokenizer, .. } = self.source;
        let Task { prompt, bad } = task;
        if let Some(reason) = bad {
            return Err(reason.clone());
        }
        if prompt.instruction.trim().is_empty() && prompt.input.trim().is_empty() {
            return Err("the prompt is empty".to_owned());
        }
        let limit = config.max_seq_len;
        // The bound spares the tokenizer a prompt of megabytes.
        let fits =
            tokenizer.fits(&prompt.instruction, limit) && tokenizer.fits(&prompt.input, limit);
        if !fits {
            return Err(format!(
                "the prompt has more tokens than a row may have (max_seq_len {limit})"
            ));
        }
        let mut text = template.fill(&prompt.instruction, &prompt.input);
        text.extend(config.force_prefix.as_deref());
        let tokens = tokenizer.encode_with_bos(&text);
        Ok(Request { id: prompt.id.clone(), tokens, seed: config.seed })
    }

    fn take(&mut self, event: Event<'_>) {
        match event {
            Event::Token { id, .. } => {
                self.live.tokens(1);
                if let Some(row) = self.under_way.get_mut(id) {
                    row.tokens += 1;
                }
            }
            Event::Finished(finished) => self.answer(finished),
            Event::Rejected { id, reason } => self.give_up(&id, reason),
            Event::Failed { id, position } => {
                let reason = format!("the logits of its output token {position} are not finite");
                self.give_up(&id, reason);
                self.count_not_finite(id);
            }
        }
        if let Some(beat) = self.live.due() {
            self.measure(&beat);
        }
    }

    /// A row that the engine does not answer; tokens that it was seen to get are of no row then.
    fn give_up(&mut self, id: &str, reason: String) {
        let Some(row) = self.under_way.remove(id) else { return };
        self.count_in_use();
        self.live.discard(row.tokens);
        self.reject(row.task, reason);
    }

    /// Where one row after the other has no finite logits, it is not for the prompts.
    fn count_not_finite(&mut self, id: String) {
        self.not_finite.push(id);
        if self.not_finite.len() >= MAX_NOT_FINITE {
            let ids = std::mem::take(&mut self.not_finite);
            self.set_error(Error::NotFinite { ids });
        }
    }

    fn answer(&mut self, finished: FinishedRow) {
        let Some(row) = self.under_way.remove(&finished.id) else { return };
        self.count_in_use();
        self.counts.answered += 1;
        self.not_finite.clear();
        // Tokens that added no whole character were not seen.
        self.live.tokens((finished.tokens.len() as u64).saturating_sub(row.tokens));
        let mut output = finished.text;
        if let Some(forced) = &self.source.config.force_prefix {
            self.counts.forced += 1;
            output.insert_str(0, forced);
        }
        let answer = Answer {
            output,
            finish_reason: match finished.finish_reason {
                RowEnd::Eos => FinishReason::Eos,
                RowEnd::Stop => FinishReason::Stop,
                RowEnd::Length => FinishReason::Length,
            },
            prompt_tokens: count(finished.prompt_tokens),
            output_tokens: count(finished.tokens.len()),
        };
        let row_way = (Some(row.slot), finished.seconds);
        self.write(row.task, answer, None, row_way);
    }

    fn reject(&mut self, task: usize, reason: String) {
        tracing::warn!("prompt {} is rejected: {reason}", self.source.tasks[task].prompt.id);
        self.counts.rejected += 1;
        let nothing = Answer {
            output: String::new(),
            finish_reason: FinishReason::Rejected,
            prompt_tokens: 0,
            output_tokens: 0,
        };
        self.write(task, nothing, Some(reason), (None, 0.0));
    }

    fn write(
        &mut self,
        task: usize,
        answer: Answer,
        reason: Option<String>,
        (slot, seconds): (Option<usize>, f64),
    ) {
        self.live.row();
        let Some(output) = &mut self.output else { return };
        let config = self.source.config;
        let row = answer.row(&self.source.tasks[task].prompt, config.seed);
        let metrics = RowMetrics {
            id: row.id.clone(),
            group_rank: output.shard().rank,
            group_size: output.shard().size,
            slot,
            prompt_tokens: row.prompt_tokens,
            output_tokens: row.output_tokens,
            finish_reason: row.finish_reason,
            seconds,
            finished_at: seconds_since_1970(),
        };
        let stored = StoredRow { row, reason };
        let written = output.append(&stored).and_then(|()| output.measure(&metrics));
        if let Err(error) = written {
            self.set_error(error);
        }
    }

    fn measure(&mut self, line: &impl Serialize) {
        let Some(output) = &mut self.output else { return };
        if let Err(error) = output.measure(line) {
            self.set_error(error);
        }
    }

    fn set_error(&mut self, error: Error) {
        self.error.get_or_insert(error);
        self.source.pulse.failed.set(true);
    }

    /// Writes what the run was, and makes its rows survive whatever comes.
    pub(crate) fn end(mut self, statistics: &Statistics) -> Result<(Option<Output>, RowCounts)> {
        let Self { live, output, counts, .. } = &mut self;
        let counts = *counts;
        if let Some(output) = output {
            output.measure(&live.end())?;
            output.measure(&RunMetrics {
                run: if statistics.stopped { "stopped" } else { "finished" }.to_owned(),
                rows: counts.answered as u64,
                forced: counts.forced as u64,
                output_tokens: statistics.output_tokens,
                decode_steps: statistics.decode_steps,
                prefill_seconds: statistics.prefill_seconds,
                decode_seconds: statistics.decode_seconds,
                finished_at: seconds_since_1970(),
            })?;
            output.sync()?;
        }
        Ok((self.output, counts))
    }
}

/// What there is to write of a prompt.
struct Answer {
    output: String,
    finish_reason: FinishReason,
    prompt_tokens: u32,
    output_tokens: u32,
}

impl Answer {
    fn row(self, prompt: &Prompt, seed: u64) -> AlignedResponse {
        AlignedResponse {
            id: prompt.id.clone(),
            source: prompt.source.clone(),
            instruction: prompt.instruction.clone(),
            input: prompt.input.clone(),
            output: self.output,
            finish_reason: self.finish_reason,
            prompt_tokens: self.prompt_tokens,
            output_tokens: self.output_tokens,
            seed,
        }
    }
}

/// Token counts of rows are far below 2^32, which a row's own context bounds.
fn count(tokens: usize) -> u32 {
    u32::try_from(tokens).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run_file::RunFile;
    use crate::{GenerateArgs, MetaPrompt};
    use dromedary_command::Progress;
    use dromedary_parallel::SingleProcess;
    use std::path::Path;

    fn task(id: &str) -> Task {
        let prompt = Prompt {
            id: id.to_owned(),
            source: "test".to_owned(),
            instruction: format!("Story {id}"),
            input: String::new(),
        };
        Task { prompt, bad: None }
    }

    fn output(folder: &Path) -> Output {
        let run = RunFile {
            input_file: "prompts.json".into(),
            group_rank: 0,
            group_size: 1,
            groups: 1,
            tp: 1,
            max_batch_size: 4,
            started_at: 0,
            counts: None,
        };
        let settings = crate::output::Settings::default();
        Output::open(folder.join("aligned.jsonl"), &settings, &run, false).unwrap()
    }

    /// With the rows of three prompts under way.
    fn with_rows(folder: &Path, then: impl FnOnce(&mut Rows<'_, '_>)) {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../llama/tests/data/stories260k");
        let args = GenerateArgs {
            checkpoint: Some(model.clone()),
            input_file: Some("prompts.json".into()),
            output_file: Some(folder.join("aligned.jsonl")),
            ..GenerateArgs::default()
        };
        let config = GenerateConfig::try_from(args).unwrap();
        let template = Template::new(&MetaPrompt::open(None).unwrap());
        let tokenizer = Tokenizer::open(model).unwrap();
        let tasks = ["a", "b", "c"].map(task);
        let queue = RefCell::new(WorkQueue::new(&SingleProcess, &SingleProcess, 3).unwrap());
        let pulse = Pulse::default();
        let source = Source {
            config: &config,
            template: &template,
            tokenizer: &tokenizer,
            tasks: &tasks,
            queue: &queue,
            pulse: &pulse,
        };
        let live = Live::new(&pulse, Progress::new(None, "rows", false), 4, Vec::new());
        let mut rows = Rows::new(source, Some(output(folder)), live);
        let ids: Vec<String> = std::iter::from_fn(|| rows.next()).map(|row| row.id).collect();
        assert_eq!(ids, ["a", "b", "c"]);
        assert_eq!(pulse.in_use.get(), 3);
        then(&mut rows);
    }

    #[test]
    fn a_row_that_fails_is_recorded_and_those_beside_it_go_on() {
        let folder = tempfile::tempdir().unwrap();
        with_rows(folder.path(), |rows| {
            for id in ["a", "b", "b"] {
                rows.take(Event::Token { id, text: "x" });
            }
            rows.take(Event::Failed { id: "b".to_owned(), position: 7 });
            assert_eq!(rows.counts.rejected, 1);
            assert_eq!(rows.source.pulse.in_use.get(), 2);
            assert!(rows.next().is_none() && rows.error.is_none());
            assert_eq!(rows.live.beat().tokens, 1);
        });
        let text = std::fs::read_to_string(folder.path().join("aligned.jsonl")).unwrap();
        assert_eq!(text.lines().count(), 1);
        assert!(text.contains("\"id\":\"b\"") && text.contains("\"finish_reason\":\"rejected\""));
        assert!(text.contains("the logits of its output token 7 are not finite"), "{text}");
    }

    #[test]
    fn many_rows_that_fail_one_after_the_other_are_an_error() {
        let fails = |rows: &mut Rows<'_, '_>, count: usize| {
            for row in 0..count {
                rows.take(Event::Failed { id: format!("row {row}"), position: 0 });
            }
        };
        let folder = tempfile::tempdir().unwrap();
        with_rows(folder.path(), |rows| {
            fails(rows, MAX_NOT_FINITE - 1);
            rows.take(Event::Finished(FinishedRow {
                id: "a".to_owned(),
                tokens: vec![403],
                text: "x".to_owned(),
                finish_reason: RowEnd::Eos,
                prompt_tokens: 9,
                seconds: 0.1,
            }));
            fails(rows, MAX_NOT_FINITE - 1);
            assert!(rows.error.is_none() && !rows.source.pulse.failed.get());
            fails(rows, 1);
            assert!(rows.source.pulse.failed.get());
            let error = rows.error.take().unwrap().to_string();
            assert!(
                error.contains("64 rows in a row") && error.contains("row 0, row 1"),
                "{error}"
            );
        });
    }

    #[test]
    fn slots_are_the_lowest_free_numbers() {
        let folder = tempfile::tempdir().unwrap();
        with_rows(folder.path(), |rows| {
            assert_eq!(rows.free_slot(), 3);
            rows.under_way.remove("b");
            assert_eq!(rows.free_slot(), 1);
        });
    }
}
