//! `plan`: what a run will take, told before anything is loaded.

use std::{fmt::Write as _, path::PathBuf};

use dromedary_command::{ByteSize, Error as CommandError, boolean, required};
use dromedary_llama::{
    Checkpoint, ClosedForm, Dtype, Footprint, LoadOptions, LoraConfig, Outline, Plan, select_kind,
    select_nf4,
};
use dromedary_parallel::planned_device;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind};

use crate::{
    activations::ActivationsMode,
    args::LearnedTurns,
    config::target_modules,
    error::Result,
    formats::DatasetFormat,
    metrics::measured_rate,
    plan::{MemoryPlan, PlanInput, PlannedRank, PlannedTraining},
    scaling::{Network, Rate, Scaling, ScalingInput, Workload},
};

/// Share of the speed of one large product that a whole step reaches.
const EFFICIENCY: f64 = 0.8;

/// Tell what a run will take, from a config.json alone: memory by part, steps, tokens, hours.
///
/// Nothing is loaded. Settings that are not given are those of the table `train` of --config, the file that `train`
/// takes. Weights are counted as --device keeps them; activations, head and process as of a CPU, which computes
/// in f32: on a GPU they were never measured. Hours come from the speed of a product
/// that is measured here for a moment, from --gflops, or from the tokens that one rank was seen to train on in a
/// second. --nodes adds what more nodes bring, with the assumptions behind it.
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
    /// Tokens of the longest rows [default: what source and target are cut at].
    #[arg(long, value_name = "TOKENS")]
    pub max_row_tokens: Option<u64>,
    /// Share of the tokens that is learned [default: 0.5].
    #[arg(long, value_name = "SHARE")]
    pub learned: Option<f64>,
    /// Count rows, tokens and the learned share of this data set, where they are not given. One that the table `train`
    /// names need not be there yet.
    #[arg(long, value_name = "FILE")]
    pub dataset: Option<PathBuf>,
    /// Form of its rows [default: by the fields of the first].
    #[arg(long, value_name = "NAME")]
    pub dataset_format: Option<DatasetFormat>,
    /// Tokenizer file or folder [default: the checkpoint's].
    #[arg(long, alias = "tokenizer-path", alias = "tokenizer-name", value_name = "PATH")]
    pub tokenizer: Option<PathBuf>,
    /// Glob of the short system prompts of dromedary rows.
    #[arg(long, value_name = "GLOB")]
    pub meta_prompt_pattern: Option<String>,
    /// What is learned of a conversation [default: assistant].
    #[arg(long, value_name = "TURNS")]
    pub learned_turns: Option<LearnedTurns>,
    /// Jinja template of sharegpt and chat rows [default: the tokenizer's].
    #[arg(long, value_name = "FILE")]
    pub chat_template: Option<PathBuf>,
    /// Day that strftime_now of a chat template tells.
    #[arg(long, value_name = "DATE")]
    pub chat_date: Option<String>,
    /// Tokens of a source; longer ones lose their beginning [default: 1024].
    #[arg(long, value_name = "TOKENS")]
    pub source_max_len: Option<usize>,
    /// Tokens of a target; longer ones lose their end [default: 256].
    #[arg(long, value_name = "TOKENS")]
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
    /// Replicas of the model, which share the rows of a step [default: 1; with --nodes those of one node].
    #[arg(long, value_name = "N")]
    pub dp: Option<usize>,
    /// Divide the optimizer's moments, and the f32 values behind 16-bit weights, over the replicas
    /// [default: false].
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_parser = boolean)]
    pub shard_optimizer: Option<bool>,
    /// Bits of the frozen linear layers: 4 where `llama quantize` has stored them so, 16 for --dtype. Four bits are
    /// kept on a CPU alone; on a GPU they are held in --dtype [default: as the base is stored].
    #[arg(long, value_name = "BITS")]
    pub bits: Option<u8>,
    /// Where it will be computed: auto, cpu, cuda or cuda:N. A GPU need not be here; auto is one where there is one
    /// here [default: auto].
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<String>,
    /// Kind of the weights: auto, f32, bf16 or f16 [default: auto].
    #[arg(long, value_name = "KIND")]
    pub dtype: Option<String>,
    /// GFLOP/s of a large product [default: measured here].
    #[arg(long, value_name = "GFLOPS")]
    pub gflops: Option<f64>,
    /// Tokens that one rank, which holds the whole model, trains on in a second.
    #[arg(long, value_name = "TOKENS", conflicts_with_all = ["gflops", "measured"])]
    pub tokens_per_second: Option<f64>,
    /// The same from the metrics.jsonl of a run on one rank, its first step left out.
    #[arg(long, value_name = "FILE", conflicts_with = "gflops")]
    pub measured: Option<PathBuf>,
    /// Tell what up to so many nodes bring.
    #[arg(long, value_name = "N")]
    pub nodes: Option<usize>,
    /// Ranks of a node [default: 8].
    #[arg(long, value_name = "N", requires = "nodes")]
    pub ranks_per_node: Option<usize>,
    /// GB/s from a rank to others of its node, in one direction [default: 300, as NVLink 3 of an A100].
    #[arg(long, value_name = "GB/S", requires = "nodes")]
    pub bandwidth_in_node: Option<f64>,
    /// Microseconds until the first byte is there [default: 3.4, as NCCL assumes for NVLink].
    #[arg(long, value_name = "US", requires = "nodes")]
    pub latency_in_node: Option<f64>,
    /// GB/s from a node to others, in one direction [default: 25, as one port of HDR InfiniBand].
    #[arg(long, value_name = "GB/S", requires = "nodes")]
    pub bandwidth_between_nodes: Option<f64>,
    /// Microseconds until the first byte is there [default: 14, as NCCL assumes for a network].
    #[arg(long, value_name = "US", requires = "nodes")]
    pub latency_between_nodes: Option<f64>,
    /// Print JSON, with exact numbers, instead of a table [default: false].
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_parser = boolean)]
    pub json: Option<bool>,
}

/// What `plan` tells.
#[derive(Clone, Debug, Serialize)]
pub struct PlanReport {
    /// Where it is computed: `cpu` or `cuda`.
    pub device: &'static str,
    /// Kind of the weights.
    pub dtype: String,
    /// The frozen linear layers are kept in four bits.
    pub nf4: bool,
    /// They would be on a CPU, and are dequantised because the device keeps no four bits.
    pub dequantised: bool,
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
    /// Time over numbers of nodes, where asked for.
    pub scaling: Option<Scaling>,
}

impl PlanReport {
    /// The plan that `args` ask for.
    ///
    /// # Errors
    /// A missing or unfit setting, a device of another name, a configuration that cannot be read, or no way to fit the run into the
    /// memory that was given.
    pub fn new(args: &PlanArgs) -> anyhow::Result<Self> {
        let path = required(args.checkpoint.clone(), "checkpoint")?;
        let Outline { config, dtype, nf4 } = Checkpoint::outline(path)?;
        let device = planned_device(args.device.as_deref().unwrap_or("auto"))?;
        let kind = select_kind(args.dtype.as_deref().unwrap_or("auto"), device, dtype)?;
        let on_cpu = keeps_nf4(args, Device::Cpu, nf4)?;
        let nf4 = keeps_nf4(args, device, nf4)?;
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
        let learned = args.learned.unwrap_or(0.5);
        if !(0.0..=1.0).contains(&learned) {
            return Err(
                CommandError::usage(format!("--learned {learned}: must be in 0..=1")).into()
            );
        }
        let (tp, dp) = layout(args)?;
        let workload = workload(args, dp);
        let cut_at = || {
            args.source_max_len.unwrap_or(1024) as u64 + args.target_max_len.unwrap_or(256) as u64
        };
        let tokens = workload.batch_size * args.max_row_tokens.unwrap_or_else(cut_at);
        let targets = |tokens: u64| (tokens as f64 * learned).ceil() as u64;
        let mut input = PlanInput {
            config: &config,
            kind,
            training,
            tokens,
            targets: targets(tokens),
            kept_layers: 0,
            rank: planned_rank(args, (tp, dp), nf4),
        };
        let mode = args.activations.unwrap_or(ActivationsMode::Recompute);
        input.kept_layers = mode.kept_layers(&input, args.max_memory.map(|size| size.0))?;
        let ranks = (0..tp)
            .map(|tp_rank| {
                let rank = PlannedRank { tp_rank, ..input.rank };
                MemoryPlan::new(&PlanInput { rank, ..input.clone() })
            })
            .collect::<Result<Vec<_>>>()?;
        let memory = ranks.iter().copied().max_by_key(MemoryPlan::total);
        let memory = memory.map_or_else(|| MemoryPlan::new(&input), Ok)?;
        let Workload { rows, row_tokens, epochs, .. } = workload;
        let tokens = (rows as f64 * epochs) as u64 * row_tokens;
        let flops_per_token = flops_per_token(&input, row_tokens, learned)?;
        let rate = rate(args, flops_per_token)?;
        let hours = tokens as f64 / (rate.tokens_per_second * (dp * tp) as f64) / 3600.0;
        let scaling = match args.nodes {
            None => None,
            Some(nodes) => {
                let tokens = workload.batch_size * row_tokens;
                let plan = PlanInput { tokens, targets: targets(tokens), ..input.clone() };
                Some(Scaling::new(&ScalingInput {
                    plan,
                    // A GPU computes in the kind of the weights.
                    compute_kind: kind,
                    shard_optimizer: args.shard_optimizer == Some(true),
                    workload,
                    rate,
                    network: network(args)?,
                    nodes,
                })?)
            }
        };
        Ok(Self {
            device: if device == Device::Cpu { "cpu" } else { "cuda" },
            dtype: Dtype::of_kind(kind).map_or_else(String::new, |dtype| dtype.to_string()),
            nf4,
            dequantised: on_cpu && !nf4,
            kept_layers: input.kept_layers,
            memory,
            total_bytes: memory.total(),
            ranks,
            dp,
            steps: workload.steps(workload.rows_per_step()),
            tokens,
            flops: tokens as f64 * flops_per_token,
            hours,
            scaling,
        })
    }

    /// For people.
    pub fn table(&self) -> String {
        let mut text = String::new();
        // Writing into a string does not fail.
        let Self { device, dtype, nf4, .. } = self;
        let layers = if *nf4 { ", linear layers in NF4" } else { "" };
        let _ = writeln!(text, "kept as      {dtype} on {device}{layers}");
        if self.dequantised {
            let _ = writeln!(text, "             dequantised: four bits are kept on a CPU alone");
        }
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
        text + &self.scaling.as_ref().map(Scaling::table).unwrap_or_default()
    }
}

/// Ranks of a replica, and replicas.
fn layout(args: &PlanArgs) -> anyhow::Result<(usize, usize)> {
    let counts = [("tp", args.tp), ("dp", args.dp), ("ranks-per-node", args.ranks_per_node)];
    for (flag, value) in counts {
        if value == Some(0) {
            return Err(CommandError::usage(format!("--{flag} 0: must be at least 1")).into());
        }
    }
    let tp = args.tp.unwrap_or(1);
    let of_node = network(args)?.ranks_per_node / tp;
    let dp = args.dp.unwrap_or(if args.nodes.is_some() { of_node.max(1) } else { 1 });
    Ok((tp, dp))
}

fn workload(args: &PlanArgs, dp: usize) -> Workload {
    Workload {
        rows: args.rows.unwrap_or(10_000),
        row_tokens: args.row_tokens.unwrap_or(512),
        epochs: args.num_train_epochs.unwrap_or(1.0),
        batch_size: args.per_device_train_batch_size.unwrap_or(1),
        accumulation_steps: args.gradient_accumulation_steps.unwrap_or(16),
        replicas: dp as u64,
    }
}

fn network(args: &PlanArgs) -> anyhow::Result<Network> {
    let mut network = Network::default();
    if let Some(ranks) = args.ranks_per_node {
        network.ranks_per_node = ranks;
    }
    let Network { within_node, between_nodes, .. } = &mut network;
    for (flag, given, unit, number) in [
        ("bandwidth-in-node", args.bandwidth_in_node, 1e9, &mut within_node.bytes_per_second),
        ("latency-in-node", args.latency_in_node, 1e-6, &mut within_node.latency_seconds),
        (
            "bandwidth-between-nodes",
            args.bandwidth_between_nodes,
            1e9,
            &mut between_nodes.bytes_per_second,
        ),
        (
            "latency-between-nodes",
            args.latency_between_nodes,
            1e-6,
            &mut between_nodes.latency_seconds,
        ),
    ] {
        if let Some(given) = given {
            *number = unit * positive(flag, given)?;
        }
    }
    Ok(network)
}

fn positive(flag: &str, number: f64) -> anyhow::Result<f64> {
    if number.is_finite() && number > 0.0 {
        return Ok(number);
    }
    Err(CommandError::usage(format!("--{flag} {number}: must be above 0")).into())
}

/// The speed of one rank with the whole model.
fn rate(args: &PlanArgs, flops_per_token: f64) -> anyhow::Result<Rate> {
    if let Some(tokens_per_second) = args.tokens_per_second {
        let tokens_per_second = positive("tokens-per-second", tokens_per_second)?;
        return Ok(Rate { tokens_per_second, source: "--tokens-per-second".to_owned() });
    }
    if let Some(path) = &args.measured {
        let (tokens_per_second, steps) = measured_rate(path)?;
        let source = format!("{steps} steps of {}", path.display());
        return Ok(Rate { tokens_per_second, source });
    }
    let (speed, source) = match args.gflops {
        Some(gflops) => (1e9 * positive("gflops", gflops)?, "of --gflops"),
        None => (ClosedForm::measured_speed()?, "of a product measured here"),
    };
    let (gflops, per_token) = (speed / 1e9, flops_per_token / 1e9);
    let source = format!(
        "{EFFICIENCY} x {gflops:.0} GFLOP/s {source}, at {per_token:.2} GFLOP a token; not measured"
    );
    Ok(Rate { tokens_per_second: EFFICIENCY * speed / flops_per_token, source })
}

/// Whether `train` keeps the frozen weights in four bits there: of a base that is stored so, or that --bits 4
/// supposes to be.
fn keeps_nf4(args: &PlanArgs, device: Device, is_stored: bool) -> anyhow::Result<bool> {
    let is_full = args.full_finetune == Some(true);
    let message = match args.bits {
        Some(4) if is_full => "--full-finetune true trains all weights",
        None | Some(4) => {
            let is_stored = is_stored || args.bits == Some(4);
            return Ok(!is_full && select_nf4(None, device, is_stored)?);
        }
        // As `train`, which quantises nothing.
        Some(8 | 16 | 32) => return Ok(false),
        Some(_) => "give 4, 8, 16 or 32",
    };
    let bits = args.bits.unwrap_or_default();
    Err(CommandError::usage(format!("--bits {bits}: {message}")).into())
}

/// The first rank of a replica.
fn planned_rank(args: &PlanArgs, (tp, dp): (usize, usize), nf4: bool) -> PlannedRank {
    let is_divided = args.shard_optimizer == Some(true);
    let optimizer_shares = if is_divided { dp } else { 1 };
    PlannedRank { tp_rank: 0, tp, optimizer_shares, nf4 }
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
