//! What a generation will take, before anything is loaded.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use dromedary_llama::{
    Checkpoint, Footprint, LoadOptions, Memory, Outline, Plan as ShardPlan, Workload, select_kind,
    select_nf4,
};
use dromedary_parallel::{ParallelDims, planned_device};
use dromedary_records::{FoundPrompt, read_prompts};
use dromedary_tokenizer::Tokenizer;
use serde::Serialize;

use crate::generate::GenerateConfig;
use crate::metrics::Line;
use crate::shards::whole_rows;
use crate::{Error, MetaPrompt, Result, Template};

/// Where nothing was measured: an answer takes this share of `max_gen_len`.
const ANSWER_SHARE: f64 = 0.5;

/// Settings of [`plan`].
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct PlanConfig {
    /// The run. Its checkpoint may be a config.json alone, and its device need not be here.
    #[serde(flatten)]
    pub generate: GenerateConfig,
    /// Ranks of each job.
    pub ranks: usize,
    /// Output tokens a second of one group, stated.
    pub tokens_per_second: Option<f64>,
    /// Tokens of an answer on average, stated.
    pub output_tokens: Option<f64>,
    /// The metrics of an earlier run, of which both are taken where they are not stated.
    pub measured: Option<PathBuf>,
}

/// What a generation will take.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct GenerationPlan {
    /// Prompts of the input.
    pub prompts: u64,
    /// Rows that are no prompts, are empty or do not fit a row; they are rejected.
    pub rejected: u64,
    /// Groups: jobs times the models of each job.
    pub groups: u64,
    /// Rows that each group gets, or takes on average where groups share a queue: the most of any
    /// job over its groups.
    pub rows_per_group: u64,
    /// Tokens of the prefix, which each group reads once.
    pub prefix_tokens: u64,
    /// Tokens of all prompts behind the prefix.
    pub prompt_tokens: u64,
    /// Of the longest prompt that fits.
    pub longest_prompt: u64,
    /// Tokens of an answer on average, and where the number is from.
    pub output_tokens: f64,
    /// How that is known: stated, measured or assumed.
    pub output_tokens_from: Origin,
    /// What each rank of a group takes, above what a process has once libtorch is loaded.
    pub ranks: Vec<Memory>,
    /// Output tokens a second of one group; absent where nobody has stated or measured it.
    pub tokens_per_second: Option<f64>,
    /// Hours until the last group ends, absent likewise.
    pub hours: Option<f64>,
}

/// How a number is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Origin {
    /// The user has said it.
    Stated,
    /// From the metrics of a run.
    Measured,
    /// Half of `max_gen_len`.
    Assumed,
}

/// Counts rows, tokens, bytes and hours. Prompts are read and tokenised; of the model its
/// configuration is read alone.
///
/// # Errors
/// What cannot be read by name; [`Error::PrefixTooLong`]; [`Error::PrefixFillsContext`]; a split that the model does not allow.
pub fn plan(config: &PlanConfig) -> Result<GenerationPlan> {
    let PlanConfig { generate: run, ranks, .. } = config;
    let tp = run.tp.unwrap_or(*ranks);
    let meta_prompt = MetaPrompt::open_as(run.template, run.meta_prompt_file.as_deref())?;
    let template = Template::new(&meta_prompt);
    let tokenizer = Tokenizer::open(&run.tokenizer)?;
    let prefix = template.shared_prefix(&tokenizer).len();
    let outline = Checkpoint::outline(&run.checkpoint)?;
    let room = run.room_behind(prefix, &outline.config)?;
    let models = ParallelDims::new(*ranks, tp)?.dp as u64;
    let workload = Workload {
        prefix_tokens: prefix as u64,
        max_batch_size: run.max_batch_size as u64,
        max_seq_len: room as u64,
        max_kv_tokens: run.max_kv_tokens.map(|tokens| tokens as u64),
    };
    let ranks = memory(run, &outline, tp, &workload)?;
    let input = Input::read(run, &template, &tokenizer, prefix, room)?;
    let measured = match &config.measured {
        Some(path) => Some(Measured::read(path)?),
        None => None,
    };
    let (output_tokens, output_tokens_from) = match (config.output_tokens, measured) {
        (Some(tokens), _) => (tokens, Origin::Stated),
        (None, Some(measured)) => (measured.output_tokens, Origin::Measured),
        (None, None) => (ANSWER_SHARE * run.max_gen_len as f64, Origin::Assumed),
    };
    let rate = config.tokens_per_second.or(measured.map(|measured| measured.tokens_per_second));
    let most = input.answered.values().max().copied().unwrap_or(0).div_ceil(models);
    let hours = rate.map(|rate| most as f64 * output_tokens / rate / 3600.0);
    Ok(GenerationPlan {
        prompts: input.prompts,
        rejected: input.prompts - input.answered.values().sum::<u64>(),
        groups: run.group_size as u64 * models,
        rows_per_group: most,
        prefix_tokens: prefix as u64,
        prompt_tokens: input.tokens,
        longest_prompt: input.longest,
        output_tokens,
        output_tokens_from,
        ranks,
        tokens_per_second: rate,
        hours,
    })
}

#[derive(Default)]
struct Input {
    prompts: u64,
    /// By job.
    answered: BTreeMap<usize, u64>,
    tokens: u64,
    longest: u64,
}

impl Input {
    fn read(
        config: &GenerateConfig,
        template: &Template,
        tokenizer: &Tokenizer,
        prefix: usize,
        room: usize,
    ) -> Result<Self> {
        let mut input = Self::default();
        let limit = config.limit.unwrap_or(usize::MAX);
        for (row, found) in
            read_prompts(&config.input_file)?.with_bad_rows().take(limit).enumerate()
        {
            input.prompts += 1;
            let FoundPrompt::Good(prompt) = found? else { continue };
            let texts = [prompt.instruction.as_str(), prompt.input.as_str()];
            let empty = texts.iter().all(|text| text.trim().is_empty());
            if empty || !texts.iter().all(|text| tokenizer.fits(text, config.max_seq_len)) {
                continue;
            }
            let mut text = template.fill(&prompt.instruction, &prompt.input);
            text.extend(config.force_prefix.as_deref());
            let tokens = tokenizer.len_with_bos(&text) - prefix;
            if tokens < room {
                *input.answered.entry(row % config.group_size).or_default() += 1;
                input.tokens += tokens as u64;
                input.longest = input.longest.max(tokens as u64);
            }
        }
        if input.prompts == 0 {
            let message = "holds no prompt".to_owned();
            return Err(Error::NoPrompts { path: config.input_file.clone(), message });
        }
        Ok(input)
    }
}

fn memory(
    config: &GenerateConfig,
    outline: &Outline,
    tp: usize,
    workload: &Workload,
) -> Result<Vec<Memory>> {
    let Outline { config: model, dtype, nf4 } = outline;
    let shards = ShardPlan::new(model, tp)?;
    let device = planned_device(&config.device)?;
    let kind = select_kind(&config.dtype, device, *dtype)?;
    let nf4 = select_nf4(config.bits, device, *nf4 || config.bits == Some(4))?;
    let of_rank = |tp_rank| {
        let options = LoadOptions { device, kind, pack: true, nf4, tp_rank, tp };
        Footprint::new(model, &shards, &options).memory(workload)
    };
    Ok((0..tp).map(of_rank).collect())
}

/// What an earlier run of one group was like.
#[derive(Clone, Copy)]
struct Measured {
    output_tokens: f64,
    tokens_per_second: f64,
}

impl Measured {
    fn read(path: &Path) -> Result<Self> {
        let (mut rows, mut of_rows) = (0u64, 0u64);
        let (mut tokens, mut seconds) = (0u64, 0.0);
        for line in whole_rows::<Line>(path)? {
            match line? {
                Line::Row(row) if row.output_tokens > 0 => {
                    rows += 1;
                    of_rows += u64::from(row.output_tokens);
                }
                Line::Beat(beat) => {
                    tokens += beat.tokens;
                    seconds += beat.seconds;
                }
                Line::Row(_) | Line::Run(_) | Line::Unknown(_) => {}
            }
        }
        if rows == 0 || seconds == 0.0 {
            return Err(Error::NoMetrics { path: path.to_owned() });
        }
        let output_tokens = of_rows as f64 / rows as f64;
        Ok(Self { output_tokens, tokens_per_second: tokens as f64 / seconds })
    }
}

impl fmt::Display for GenerationPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "prompts    {}, {} of them to be rejected", self.prompts, self.rejected)?;
        writeln!(f, "groups     {}, up to {} rows each", self.groups, self.rows_per_group)?;
        writeln!(
            f,
            "tokens     {} of the prefix once a group; {} of prompts, {} in the longest",
            self.prefix_tokens, self.prompt_tokens, self.longest_prompt
        )?;
        let answered = self.prompts - self.rejected;
        let from = match self.output_tokens_from {
            Origin::Stated => "stated",
            Origin::Measured => "measured",
            Origin::Assumed => "assumed: half of --max-gen-len",
        };
        writeln!(
            f,
            "           {:.0} of answers, {:.0} each ({from})",
            answered as f64 * self.output_tokens,
            self.output_tokens
        )?;
        for (rank, memory) in self.ranks.iter().enumerate() {
            let head = if rank == 0 { "memory     " } else { "           " };
            let Memory { weight_bytes, prefix_bytes, slot_bytes, work_bytes, peak_bytes } = *memory;
            let [total, weights, prefix, slots, work] =
                [peak_bytes, weight_bytes, prefix_bytes, slot_bytes, work_bytes].map(gigabytes);
            writeln!(
                f,
                "{head}rank {rank}: {total} GB ({weights} weights, {prefix} prefix, {slots} slots, \
                 {work} work)"
            )?;
        }
        match (self.tokens_per_second, self.hours) {
            (Some(rate), Some(hours)) => {
                write!(f, "time       {hours:.2} hours at {rate:.1} tokens/s a group")
            }
            _ => write!(
                f,
                "time       unknown: give --tokens-per-second of a group, or --measured with the \
                 metrics.jsonl of a run"
            ),
        }
    }
}

fn gigabytes(bytes: u64) -> String {
    format!("{:.2}", bytes as f64 / 1e9)
}
