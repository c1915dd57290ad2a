//! What a run takes before anything is loaded: memory by part, steps, tokens, hours.
//!
//! The parts are counted from what the trainer holds at its peak, which is the head of a micro-batch of the
//! longest rows: everything that forward kept, and the memory that backward has used and will use again.

// Legend: T tokens of the largest micro-batch, N learned ones of them, C hidden_size, F
// intermediate_size, V vocab_size, P trained numbers.

use std::collections::BTreeMap;

use dromedary_llama::{
    Footprint, LlamaConfig, LoadOptions, LoraConfig, Plan, RankPlan, TrainedTensor,
};
use serde::Serialize;
use tch::Kind;

use crate::{error::Result, loss::logits_rows};

const F32: u64 = size_of::<f32>() as u64;

/// What a process with libtorch holds beside tensors: code that has been touched, thread stacks, the
/// allocator's slack. Measured on models that the plan's test does not use.
const PROCESS: u64 = 150 << 20;

/// Tensors (T, C) of one half-block that come and go: input, partial sum, and the gradients of both.
const PASSING: u64 = 4;

/// Tensors (N, C) of the head: rows picked from the hidden states, normed ones, and their gradients.
const HEAD_PASSING: u64 = 6;

/// Values of packed panels that exist at a time at most.
const PANELS: u64 = 4 << 20;

/// What is trained.
#[derive(Clone, Debug, PartialEq)]
pub enum PlannedTraining {
    /// Adapters.
    Adapters(LoraConfig),
    /// All weights.
    Weights,
}

/// The rank that is planned for, and what it keeps in less memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlannedRank {
    /// Its number among those that hold one model together.
    pub tp_rank: usize,
    /// Their number.
    pub tp: usize,
    /// Replicas over which the moments are divided, and the f32 values behind 16-bit weights.
    pub optimizer_shares: usize,
    /// Linear layers are kept in NF4.
    pub nf4: bool,
}

impl Default for PlannedRank {
    /// One rank alone, nothing in four bits.
    fn default() -> Self {
        Self { tp_rank: 0, tp: 1, optimizer_shares: 1, nf4: false }
    }
}

impl PlannedRank {
    pub(crate) fn footprint(self, config: &LlamaConfig, kind: Kind) -> Result<Footprint> {
        let Self { tp_rank, tp, nf4, .. } = self;
        let options = LoadOptions { kind, pack: false, nf4, tp_rank, tp, ..LoadOptions::default() };
        Ok(Footprint::new(config, &Plan::new(config, tp)?, &options))
    }
}

/// What a plan is made of.
#[derive(Clone, Debug)]
pub struct PlanInput<'a> {
    /// The model.
    pub config: &'a LlamaConfig,
    /// Kind of the frozen or computed weights.
    pub kind: Kind,
    /// What is trained.
    pub training: PlannedTraining,
    /// Tokens of the largest micro-batch, T.
    pub tokens: u64,
    /// Learned tokens of it, N.
    pub targets: u64,
    /// Layers whose activations are kept, the others are computed twice.
    pub kept_layers: usize,
    /// The rank.
    pub rank: PlannedRank,
}

/// Bytes of a run at its peak, by part; for f32 on a CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct MemoryPlan {
    /// The model's weights as they are computed with.
    pub weights: u64,
    /// Adapters, or the f32 values behind 16-bit weights.
    pub trained: u64,
    /// Gradients.
    pub gradients: u64,
    /// Both moments.
    pub moments: u64,
    /// What forward keeps, and what half-blocks work in.
    pub activations: u64,
    /// Logits and what goes with them.
    pub head: u64,
    /// Code, threads, slack.
    pub process: u64,
}

impl MemoryPlan {
    /// The plan of a run.
    ///
    /// # Errors
    /// Target modules that the model does not have.
    pub fn new(input: &PlanInput<'_>) -> Result<Self> {
        let config = input.config;
        let trained = trained_numbers(input)?;
        let weights = input.rank.footprint(config, input.kind)?.weight_bytes;
        let widths = Widths::of(config, Plan::new(config, input.rank.tp)?.rank(input.rank.tp_rank));
        let share = trained.div_ceil(input.rank.optimizer_shares.max(1) as u64);
        let values = match (&input.training, input.kind) {
            (PlannedTraining::Adapters(_), _) => trained,
            // The model computes with the optimizer's own.
            (PlannedTraining::Weights, Kind::Float) => 0,
            (PlannedTraining::Weights, _) => share,
        };
        Ok(Self {
            weights,
            trained: F32 * values,
            gradients: F32 * trained,
            moments: 2 * F32 * share,
            activations: F32 * (activations(input, &widths) + scratch(input, &widths)),
            head: F32 * head(input, &widths),
            process: PROCESS,
        })
    }

    /// All of it.
    pub fn total(&self) -> u64 {
        let Self { weights, trained, gradients, moments, activations, head, process } = *self;
        weights + trained + gradients + moments + activations + head + process
    }

    /// The most layers whose activations can be kept in `memory` bytes; `None` where even recomputing all
    /// of them takes more.
    ///
    /// # Errors
    /// As [`MemoryPlan::new`].
    pub fn kept_layers_within(input: &PlanInput<'_>, memory: u64) -> Result<Option<usize>> {
        let all = input.config.num_hidden_layers as usize;
        for kept_layers in (0..=all).rev() {
            let plan = Self::new(&PlanInput { kept_layers, ..input.clone() })?;
            if plan.total() <= memory {
                return Ok(Some(kept_layers));
            }
        }
        Ok(None)
    }
}

/// P, of this rank.
pub(crate) fn trained_numbers(input: &PlanInput<'_>) -> Result<u64> {
    let PlanInput { config, rank, .. } = input;
    let lora = match &input.training {
        PlannedTraining::Weights => return Ok(rank.footprint(config, input.kind)?.parameters),
        PlannedTraining::Adapters(lora) => lora,
    };
    let plan = Plan::new(config, rank.tp)?;
    let mut numbers = 0;
    for (module, [out, inner]) in lora.modules(config)? {
        for (tensor, shape) in
            [(TrainedTensor::LoraA, [lora.r, inner]), (TrainedTensor::LoraB, [out, lora.r])]
        {
            let part = plan.trained_part(rank.tp_rank, &module, tensor);
            let local = part.map_or(shape.to_vec(), |part| part.shard().local_shape(&shape));
            numbers += local.iter().product::<i64>() as u64;
        }
    }
    Ok(numbers)
}

/// Sizes of a layer and of the head on one rank.
struct Widths {
    vocab: u64,
    hidden: u64,
    ffn: u64,
    queries: u64,
    qkv: u64,
    heads: u64,
}

impl Widths {
    fn of(config: &LlamaConfig, rank: &RankPlan) -> Self {
        let head = |heads: i64| (heads * config.head_dim) as u64;
        let length = |range: &std::ops::Range<i64>| (range.end - range.start) as u64;
        let queries = head(rank.n_local_heads());
        Self {
            vocab: length(&rank.vocab),
            hidden: config.hidden_size as u64,
            ffn: length(&rank.intermediate),
            queries,
            qkv: queries + 2 * head(rank.n_local_kv_heads()),
            heads: rank.n_local_heads() as u64,
        }
    }

    /// The fused projections, by out and in features.
    fn linears(&self) -> [[u64; 2]; 4] {
        [
            [self.qkv, self.hidden],
            [self.hidden, self.queries],
            [2 * self.ffn, self.hidden],
            [self.hidden, self.ffn],
        ]
    }
}

/// Numbers of what forward keeps, and of what half-blocks share.
fn activations(input: &PlanInput<'_>, widths: &Widths) -> u64 {
    let Widths { hidden, ffn, queries, qkv, heads, .. } = *widths;
    let layers = input.config.num_hidden_layers as u64;
    let kept = (input.kept_layers as u64).min(layers);
    // A layer that is computed twice has its state for the moment.
    let states = kept.max(1) + u64::from(kept > 0 && kept < layers);
    let state = qkv + queries + heads + 2 * ffn;
    // Memory is shared between half-blocks by the length of a row.
    let mut working = BTreeMap::new();
    let in_attention = [(qkv, 1), (queries, 1), (hidden, 1)];
    let in_mlp = [(ffn, 2), (hidden, 1)];
    for (width, count) in in_attention.into_iter().chain(in_mlp) {
        let most = working.entry(width).or_insert(0);
        *most = count.max(*most);
    }
    let working: u64 = working.into_iter().map(|(width, count)| width * count).sum();
    let low = match &input.training {
        PlannedTraining::Weights => 0,
        // Low-rank values of the widest layer and their gradient.
        PlannedTraining::Adapters(lora) => 2 * (3 + 1 + 2 + 1) * lora.r as u64,
    };
    let inputs = 2 * layers * hidden;
    input.tokens * (states * state + working + low + inputs + PASSING * hidden)
}

/// Numbers that do not depend on the tokens: packed panels, weights with adapters added to them or
/// converted to f32, gradients of weights on their way.
fn scratch(input: &PlanInput<'_>, widths: &Widths) -> u64 {
    let linears = widths.linears().map(|[out, inner]| out * inner);
    let largest = linears.into_iter().max().unwrap_or(0);
    let is_f32 = input.kind == Kind::Float && !input.rank.nf4;
    let of_weights = match input.training {
        PlannedTraining::Weights if is_f32 => largest,
        // Its gradient, and itself in f32.
        PlannedTraining::Weights => 2 * largest,
        PlannedTraining::Adapters(_) if is_f32 => linears.into_iter().sum(),
        // One piece of memory serves all layers.
        PlannedTraining::Adapters(_) => largest,
    };
    PANELS.min(largest.max(widths.hidden * widths.vocab)) + of_weights
}

/// Numbers of the head.
fn head(input: &PlanInput<'_>, widths: &Widths) -> u64 {
    let Widths { hidden, vocab, .. } = *widths;
    let logits = input.targets.min(logits_rows(input.config.vocab_size) as u64) * vocab;
    let converted = if input.kind == Kind::Float { 0 } else { vocab * hidden };
    // The gradient of the head's weight, and what is added to it.
    let of_weight = match input.training {
        PlannedTraining::Weights => 2 * vocab * hidden,
        PlannedTraining::Adapters(_) => 0,
    };
    logits + HEAD_PASSING * input.targets * hidden + input.tokens * hidden + converted + of_weight
}
