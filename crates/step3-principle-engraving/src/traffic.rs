//! What ranks exchange in one optimizer step, counted from the calls that the trainer makes.
//!
//! Legend: T tokens of a micro-batch, N learned ones of them, C hidden_size, P trained numbers of a rank.

use std::ops::Range;

use dromedary_llama::{LlamaConfig, LoraConfig, Plan, RankPlan, TrainedPart, TrainedTensor};
use serde::Serialize;
use tch::Kind;

use crate::{
    error::Result,
    loss::logits_rows,
    optimizer::{BUCKET, Share, length, overlap},
    plan::{PlanInput, PlannedTraining, trained_numbers},
};

const F32: u64 = size_of::<f32>() as u64;
const F64: u64 = size_of::<f64>() as u64;

/// Ranks that exchange something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Group {
    /// Those that hold one model together.
    Tp,
    /// Those that hold the same share of all replicas.
    Dp,
    /// All.
    World,
}

/// What they do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Operation {
    /// Sums or maxima of what all have, for all.
    AllReduce,
    /// What one has, for all.
    Broadcast,
}

/// Collectives of one kind in an optimizer step, of one rank.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Exchange {
    /// Between whom.
    pub group: Group,
    /// What.
    pub operation: Operation,
    /// Of what.
    pub of: &'static str,
    /// Number of calls.
    pub calls: u64,
    /// Bytes of the tensors of all calls together.
    pub bytes: u64,
}

/// An optimizer step of a rank.
#[derive(Clone, Copy, Debug)]
pub struct StepShape<'a> {
    /// Model, training, rank, and the tokens of a micro-batch.
    pub input: &'a PlanInput<'a>,
    /// Kind that layers compute in: f32 on a CPU, that of the weights on other devices.
    pub compute_kind: Kind,
    /// Replicas.
    pub dp: usize,
    /// Micro-batches of this rank's replica.
    pub micro_batches: u64,
}

/// What the rank exchanges in the step; nothing with itself.
///
/// # Errors
/// Target modules or a number of ranks that the model does not have.
pub fn exchanges(step: &StepShape<'_>) -> Result<Vec<Exchange>> {
    let PlanInput { config, rank, .. } = step.input;
    let plan = Plan::new(config, rank.tp)?;
    let mut all = Vec::new();
    if rank.tp > 1 {
        all.extend(within_replica(step, &plan)?);
    }
    if step.dp > 1 {
        all.extend(between_replicas(step, plan.rank(rank.tp_rank))?);
    }
    if rank.tp * step.dp > 1 {
        // Whether the step is skipped, and whether the run is to stop.
        all.push(all_reduce(Group::World, "flags", [2, 2 * F64]));
    }
    all.retain(|exchange| exchange.calls > 0);
    Ok(all)
}

fn all_reduce(group: Group, of: &'static str, [calls, bytes]: [u64; 2]) -> Exchange {
    Exchange { group, operation: Operation::AllReduce, of, calls, bytes }
}

fn within_replica(step: &StepShape<'_>, plan: &Plan) -> Result<[Exchange; 4]> {
    let PlanInput { config, tokens, targets, .. } = step.input;
    let batches = step.micro_batches;
    let hidden = config.hidden_size as u64 * step.compute_kind.elt_size_in_bytes() as u64;
    let half_blocks = 2 * config.num_hidden_layers as u64;
    // Forward sums what ranks add to the hidden states, backward the gradients of these; a half-block that
    // is computed again sums nothing again.
    let sums = 2 * half_blocks * batches;
    // The largest logits, then the sum of exponentials with the target's logit; in the end the gradient.
    let chunks = targets.div_ceil(logits_rows(config.vocab_size) as u64);
    let head = [(2 * chunks + 1) * batches, (3 * F32 + hidden) * targets * batches];
    let partial = partial_numbers(step.input, plan)?;
    Ok([
        all_reduce(Group::Tp, "hidden states", [sums, sums * tokens * hidden]),
        all_reduce(Group::Tp, "head", head),
        all_reduce(Group::Tp, "partial gradients", [u64::from(partial > 0), F32 * partial]),
        all_reduce(Group::Tp, "gradient norm", [1, F64]),
    ])
}

/// Numbers of gradients that are partial sums over the ranks of a replica.
fn partial_numbers(input: &PlanInput<'_>, plan: &Plan) -> Result<u64> {
    let numbers = |module: &str, tensor, shape: &[i64]| {
        let part = plan.trained_part(input.rank.tp_rank, module, tensor);
        part.map_or(0, |part| partial_of(&part, shape))
    };
    let adapters = match &input.training {
        PlannedTraining::Adapters(lora) => lora.clone(),
        PlannedTraining::Weights => LoraConfig::default(),
    };
    let mut all = 0;
    for (module, [out, inner]) in adapters.modules(input.config)? {
        all += match &input.training {
            PlannedTraining::Weights => numbers(&module, TrainedTensor::Weight, &[out, inner]),
            PlannedTraining::Adapters(lora) => {
                numbers(&module, TrainedTensor::LoraA, &[lora.r, inner])
                    + numbers(&module, TrainedTensor::LoraB, &[out, lora.r])
            }
        };
    }
    if input.training == PlannedTraining::Weights {
        // Every rank holds the embedding and the norms whole.
        let LlamaConfig { vocab_size, hidden_size, num_hidden_layers, .. } = *input.config;
        all += ((vocab_size + 2 * num_hidden_layers + 1) * hidden_size) as u64;
    }
    Ok(all)
}

/// `shape` is that of the whole tensor.
fn partial_of(part: &TrainedPart, shape: &[i64]) -> u64 {
    let row: i64 = shape.iter().skip(1).product();
    let rows = match part.is_replicated() {
        true => shape.first().copied().unwrap_or(0),
        false => part.shared().iter().map(length).sum(),
    };
    (rows * row) as u64
}

fn between_replicas(step: &StepShape<'_>, rank: &RankPlan) -> Result<[Exchange; 3]> {
    let trained = trained_numbers(step.input)?;
    let [calls, bytes] = match step.input.rank.optimizer_shares {
        0 | 1 => [0, 0],
        ranks => updates(step, rank, trained as i64, ranks),
    };
    let (group, operation) = (Group::Dp, Operation::Broadcast);
    Ok([
        all_reduce(group, "gradients", [trained.div_ceil(BUCKET as u64), F32 * trained]),
        all_reduce(group, "loss", [1, F64]),
        Exchange { group, operation, of: "updated values", calls, bytes },
    ])
}

/// Calls and bytes of what each of `ranks` replicas tells the others of its share.
fn updates(step: &StepShape<'_>, rank: &RankPlan, trained: i64, ranks: usize) -> [u64; 2] {
    let PlanInput { training, kind, .. } = step.input;
    let weights = match (training, kind) {
        // One vector, with whose memory the model computes.
        (PlannedTraining::Adapters(_), _) | (_, Kind::Float) => vec![(trained, F32)],
        (PlannedTraining::Weights, _) => weights(step, rank),
    };
    let buckets = |numbers: &Range<i64>| (length(numbers) as u64).div_ceil(BUCKET as u64);
    let (mut start, mut calls, mut bytes) = (0, 0, 0);
    for (numbers, size) in weights {
        let weight = start..start + numbers;
        start = weight.end;
        bytes += numbers as u64 * size;
        let shares = (0..ranks).map(|rank| Share { rank, ranks }.of(trained));
        calls += shares.map(|share| buckets(&overlap(&share, &weight))).sum::<u64>();
    }
    [calls, bytes]
}

/// Numbers of the weights as the model multiplies them, in their order, and the bytes of one.
fn weights(step: &StepShape<'_>, rank: &RankPlan) -> Vec<(i64, u64)> {
    let PlanInput { config, kind, .. } = step.input;
    let LlamaConfig { vocab_size, hidden_size, num_hidden_layers, .. } = **config;
    let stored = kind.elt_size_in_bytes() as u64;
    let norm = (hidden_size, step.compute_kind.elt_size_in_bytes() as u64);
    let linear = |out: i64, inner: i64| (out * inner, stored);
    let queries = rank.n_local_heads() * config.head_dim;
    let keys = rank.n_local_kv_heads() * config.head_dim;
    let ffn = length(&rank.intermediate);
    let layer = [
        norm,
        linear(queries + 2 * keys, hidden_size),
        linear(hidden_size, queries),
        norm,
        linear(2 * ffn, hidden_size),
        linear(hidden_size, ffn),
    ];
    let mut all = vec![linear(vocab_size, hidden_size)];
    (0..num_hidden_layers).for_each(|_| all.extend(layer));
    all.push(norm);
    if !config.tie_word_embeddings {
        all.push(linear(length(&rank.vocab), hidden_size));
    }
    all
}
