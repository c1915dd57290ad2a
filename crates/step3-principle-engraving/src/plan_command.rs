//! `plan`: what a run will take, told before anything is loaded.

use std::{fmt::Write as _, path::PathBuf};

use dromedary_command::{ByteSize, Error as CommandError, boolean, required};
use dromedary_llama::{
    Checkpoint, ClosedForm, Footprint, LoadOptions, LoraConfig, Outline, Plan, select_kind,
};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind};

use crate::{
    activations::ActivationsMode,
    args::LearnedTurns,
    config::target_modules,
    error::Result,
    formats::DatasetFormat,
    plan::{MemoryPlan, PlanInput, PlannedRank, PlannedTraining},
};

/// Share of the speed of one large product that a whole step reaches.
const EFFICIENCY: f64 = 0.8;

/// Tell what a run will take, from a config.json alone: memory by part, steps, tokens, hours.
///
/// Nothing is loaded. Memory is that of training in f32 on a CPU; hours come from the speed of a product
/// that is measured here for a moment, or from --gflops.
#[derive(Clone, Debug, Default, clap::Args, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PlanArgs {
    /// Base model: a folder with config.json, or the file.
    #[arg(long, alias = "model-name-or-path", alias = "ckpt-dir", value_name = "PATH")]
    pub checkpoint: Option<PathBuf>,
    /// Rows to train on [default: 10000].
    #[arg(long, value_name = "ROWS")]
    pub rows: Option<u64>,
    /// Mean tokens of a row [default: 512].
    #[arg(long, value_name = "TOKENS")]
    pub row_tokens: Option<u64>,
    /// Tokens of the longest rows [default: 1280, as source and target are cut].
    #[arg(long, value_name = "TOKENS")]
    pub max_row_tokens: Option<u64>,
    /// Share of the tokens that is learned [default: 0.5].
    #[arg(long, value_name = "SHARE")]
    pub learned: Option<f64>,
    /// Count rows, tokens and the learned share of this data set, where they are not given.
    #[arg(long, value_name = "FILE")]
    pub dataset: Option<PathBuf>,
    /// Form of its rows [default: by the fields of the first].
    #[arg(long, value_name = "NAME", requires = "dataset")]
    pub dataset_format: Option<DatasetFormat>,
    /// Tokenizer file or folder [default: the checkpoint's].
    #[arg(
        long,
        alias = "tokenizer-path",
        alias = "tokenizer-name",
        value_name = "PATH",
        requires = "dataset"
    )]
    pub tokenizer: Option<PathBuf>,
    /// Glob of the short system prompts of dromedary rows.
    #[arg(long, value_name = "GLOB", requires = "dataset")]
    pub meta_prompt_pattern: Option<String>,
    /// What is learned of a conversation [default: assistant].
    #[arg(long, value_name = "TURNS", requires = "dataset")]
    pub learned_turns: Option<LearnedTurns>,
    /// Jinja template of sharegpt and chat rows [default: the tokenizer's].
    #[arg(long, value_name = "FILE", requires = "dataset")]
    pub chat_template: Option<PathBuf>,
    /// Day that strftime_now of a chat template tells.
    #[arg(long, value_name = "DATE", requires = "dataset")]
    pub chat_date: Option<String>,
    /// Tokens of a source; longer ones lose their beginning [default: 1024].
    #[arg(long, value_name = "TOKENS", requires = "dataset")]
    pub source_max_len: Option<usize>,
    /// Tokens of a target; longer ones lose their end [default: 256].
    #[arg(long, value_name = "TOKENS", requires = "dataset")]
    pub target_max_len: Option<usize>,
    /// Rank of the adapters [default: 64].
    #[arg(long, value_name = "R")]
    pub lora_r: Option<i64>,
    /// Layers that get adapters: `all`, or names such as q_proj,v_proj [default: all].
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    pub lora_modules: Vec<String>,
    /// Train all weights instead of adapters [default: false].
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_parser = boolean)]
    pub full_finetune: Option<bool>,
    /// Rows of a micro-batch [default: 1].
    #[arg(long, value_name = "ROWS")]
    pub per_device_train_batch_size: Option<u64>,
    /// Micro-batches of an optimizer step [default: 16].
    #[arg(long, value_name = "N")]
    pub gradient_accumulation_steps: Option<u64>,
    /// Passes over the rows [default: 1].
    #[arg(long, value_name = "N")]
    pub num_train_epochs: Option<f64>,
    /// What forward keeps for backward [default: recompute].
    #[arg(long, value_name = "MODE")]
    pub activations: Option<ActivationsMode>,
    /// Memory that `--activations auto` fits into.
    #[arg(long, value_name = "SIZE")]
    pub max_memory: Option<ByteSize>,
    /// Ranks that hold one model together [default: 1].
    #[arg(long, value_name = "N")]
    pub tp: Option<usize>,
    /// Replicas of the model, which share the rows of a step [default: 1].
    #[arg(long, value_name = "N")]
    pub dp: Option<usize>,
    /// Divide the optimizer's moments over the replicas [default: false].
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_parser = boolean)]
    pub shard_optimizer: Option<bool>,
    /// Bits of the frozen linear layers: 4, or 16 for --dtype [default: as the base is stored].
    #[arg(long, value_name = "BITS")]
    pub bits: Option<u8>,
    /// Kind of the weights: auto, f32, bf16 or f16 [default: auto].
    #[arg(long, value_name = "KIND")]
    pub dtype: Option<String>,
    /// GFLOP/s of a large product [default: measured here].
    #[arg(long, value_name = "GFLOPS")]
    pub gflops: Option<f64>,
    /// Print JSON, with exact numbers, instead of a table [default: false].
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_parser = boolean)]
    pub json: Option<bool>,
}

/// What `plan` tells.
#[derive(Clone, Debug, Serialize)]
pub struct PlanReport {
    /// Layers whose activations are kept.
    pub kept_layers: usize,
    /// Bytes by part, of the rank that takes most.
    pub memory: MemoryPlan,
    /// Their sum.
    pub total_bytes: u64,
    /// Bytes by part of each rank of a replica; those of the other replicas take the same.
    pub ranks: Vec<MemoryPlan>,
    /// Replicas.
    pub dp: usize,
    /// Optimizer steps.
    pub steps: u64,
    /// Tokens read, over all epochs.
    pub tokens: u64,
    /// Floating-point operations of all steps.
    pub flops: f64,
    /// Wall time.
    pub hours: f64,
}

impl PlanReport {
    /// The plan that `args` ask for.
    ///
    /// # Errors
    /// A missing or unfit setting, a configuration that cannot be read, or no way to fit the run into the
    /// memory that was given.
    pub fn new(args: &PlanArgs) -> anyhow::Result<Self> {
        let path = required(args.checkpoint.clone(), "checkpoint")?;
        let Outline { config, dtype, nf4 } = Checkpoint::outline(path)?;
        let kind = select_kind(args.dtype.as_deref().unwrap_or("auto"), Device::Cpu, dtype)?;
        let training = if args.full_finetune == Some(true) {
            PlannedTraining::Weights
        } else {
            let target_modules = match args.lora_modules.as_slice() {
                [] => target_modules(&["all".to_owned()])?,
                names => target_modules(names)?,
            };
            let r = args.lora_r.unwrap_or(64);
            PlannedTraining::Adapters(LoraConfig { r, target_modules, ..LoraConfig::default() })
        };
        let batch_size = args.per_device_train_batch_size.unwrap_or(1);
        let learned = args.learned.unwrap_or(0.5);
        if !(0.0..=1.0).contains(&learned) {
            return Err(
                CommandError::usage(format!("--learned {learned}: must be in 0..=1")).into()
            );
        }
        let tokens = batch_size * args.max_row_tokens.unwrap_or(1280);
        let mut input = PlanInput {
            config: &config,
            kind,
            training,
            tokens,
            targets: (tokens as f64 * learned).ceil() as u64,
            kept_layers: 0,
            rank: planned_rank(args, nf4)?,
        };
        let mode = args.activations.unwrap_or(ActivationsMode::Recompute);
        input.kept_layers = mode.kept_layers(&input, args.max_memory.map(|size| size.0))?;
        let ranks = (0..input.rank.tp)
            .map(|tp_rank| {
                let rank = PlannedRank { tp_rank, ..input.rank };
                MemoryPlan::new(&PlanInput { rank, ..input.clone() })
            })
            .collect::<Result<Vec<_>>>()?;
        let memory = ranks.iter().copied().max_by_key(MemoryPlan::total);
        let memory = memory.map_or_else(|| MemoryPlan::new(&input), Ok)?;
        let dp = args.dp.unwrap_or(1);
        let (rows, epochs) = (args.rows.unwrap_or(10_000), args.num_train_epochs.unwrap_or(1.0));
        let rows_per_step = batch_size * args.gradient_accumulation_steps.unwrap_or(16) * dp as u64;
        let mean = args.row_tokens.unwrap_or(512);
        let tokens = (rows as f64 * epochs) as u64 * mean;
        let flops = tokens as f64 * flops_per_token(&input, mean, learned)?;
        let speed = match args.gflops {
            Some(gflops) => gflops * 1e9,
            None => ClosedForm::measured_speed()?,
        };
        Ok(Self {
            kept_layers: input.kept_layers,
            memory,
            total_bytes: memory.total(),
            ranks,
            dp,
            steps: (rows.div_ceil(rows_per_step.max(1)) as f64 * epochs).ceil() as u64,
            tokens,
            flops,
            hours: flops / (EFFICIENCY * speed * (dp * input.rank.tp) as f64) / 3600.0,
        })
    }

    /// For people.
    pub fn table(&self) -> String {
        let mut text = String::new();
        // Writing into a string does not fail.
        if self.ranks.len() > 1 {
            let _ = write!(text, "{:<12}", "rank");
            let names = (0..self.ranks.len()).map(|rank| format!(" {rank:>10}   "));
            let _ = writeln!(text, "{}", names.collect::<String>().trim_end());
        }
        type Part = (&'static str, fn(&MemoryPlan) -> u64);
        let parts: [Part; 8] = [
            ("weights", |memory| memory.weights),
            ("adapter", |memory| memory.trained),
            ("gradients", |memory| memory.gradients),
            ("m and v", |memory| memory.moments),
            ("activations", |memory| memory.activations),
            ("head", |memory| memory.head),
            ("process", |memory| memory.process),
            ("all", MemoryPlan::total),
        ];
        for (part, bytes) in parts {
            let _ = write!(text, "{part:<12}");
            for memory in &self.ranks {
                let _ = write!(text, " {:>10.1} MB", bytes(memory) as f64 / 1e6);
            }
            let _ = writeln!(text);
        }
        if self.dp > 1 {
            let ranks = self.dp * self.ranks.len();
            let _ = writeln!(text, "\n{} replicas, {ranks} ranks", self.dp);
        }
        let Self { kept_layers, steps, tokens, flops, hours, .. } = self;
        let _ = writeln!(text, "\nlayers whose activations are kept  {kept_layers}");
        let _ = writeln!(text, "steps   {steps}\ntokens  {tokens}");
        let _ = writeln!(text, "work    {:.1} TFLOP\nhours   {hours:.2}", flops / 1e12);
        text
    }
}

/// The first rank of a replica; `stored_nf4` says that the base is stored in four bits.
fn planned_rank(args: &PlanArgs, stored_nf4: bool) -> anyhow::Result<PlannedRank> {
    for (flag, value) in [("tp", args.tp), ("dp", args.dp)] {
        if value == Some(0) {
            return Err(CommandError::usage(format!("--{flag} 0: must be at least 1")).into());
        }
    }
    let nf4 = match args.bits {
        Some(4) if args.full_finetune == Some(true) => {
            return Err(
                CommandError::usage("--bits 4: --full-finetune true trains all weights").into()
            );
        }
        None => stored_nf4 && args.full_finetune != Some(true),
        Some(4) => true,
        Some(16) => false,
        Some(bits) => {
            return Err(CommandError::usage(format!("--bits {bits}: give 4 or 16")).into());
        }
    };
    let is_divided = args.shard_optimizer == Some(true);
    let moment_shares = if is_divided { args.dp.unwrap_or(1) } else { 1 };
    Ok(PlannedRank { tp_rank: 0, tp: args.tp.unwrap_or(1), moment_shares, nf4 })
}

/// Operations for one token of rows of `row_tokens`, forward and backward.
fn flops_per_token(input: &PlanInput<'_>, row_tokens: u64, learned: f64) -> Result<f64> {
    let config = input.config;
    let options = LoadOptions { kind: Kind::Float, pack: false, ..LoadOptions::default() };
    let cost = Footprint::new(config, &Plan::new(config, 1)?, &options);
    let head = (config.vocab_size * config.hidden_size) as f64;
    let linears = cost.linear_work as f64 - head;
    // Causal: half of the other tokens on average.
    let attention = cost.attention_work as f64 * row_tokens as f64 / 2.0;
    let recomputed = 1.0 - input.kept_layers as f64 / config.num_hidden_layers as f64;
    // Of a layer that is computed twice, all but the products at the ends of its halves.
    let ends = (config.num_hidden_layers * config.hidden_size) as f64
        * (config.num_attention_heads * config.head_dim + config.intermediate_size) as f64;
    let twice = recomputed * (linears - ends + attention);
    let backward = match &input.training {
        // Through a frozen weight; then A and B, each forward, for its input and for itself.
        PlannedTraining::Adapters(lora) => {
            let modules = lora.modules(config)?;
            let trained: i64 = modules.iter().map(|(_, [out, inner])| lora.r * (out + inner)).sum();
            linears + head * learned + 3.0 * trained as f64
        }
        PlannedTraining::Weights => 2.0 * (linears + head * learned),
    };
    let forward = linears + head * learned + attention;
    Ok(2.0 * (forward + twice + backward + 2.5 * attention))
}
