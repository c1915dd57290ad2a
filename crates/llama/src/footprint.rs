//! What one rank of a plan stores, reads and computes, in numbers, before anything is loaded.

use serde::Serialize;

use crate::{
    LlamaConfig, LoadOptions, Plan, Shard,
    checkpoint::{Dtype, EMBEDDING, tensor_shapes},
};

/// The cost of one rank: sums over the slices that the plan gives it.
///
/// Rotary tables, activations and what libtorch itself takes are not in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Footprint {
    /// Parameters of the rank's slices. A tied head counts once, as it is read.
    pub parameters: u64,
    /// Parameters that are read from files for them: row-parallel tensors are read whole.
    pub parameters_read: u64,
    /// Bytes of the weights in memory.
    pub weight_bytes: u64,
    /// Bytes of the keys and values of one token, in all layers.
    pub kv_bytes_per_token: u64,
    /// Multiply-adds of the linear layers and the head for one token.
    pub linear_work: u64,
    /// Multiply-adds of one token's attention to one other token, in all layers.
    pub attention_work: u64,
}

impl Footprint {
    /// The cost of rank `options.tp_rank` of a plan of this model, loaded with `options`.
    ///
    /// # Panics
    /// If the rank is not one of the plan's.
    pub fn new(config: &LlamaConfig, plan: &Plan, options: &LoadOptions) -> Self {
        let rank = plan.rank(options.tp_rank);
        let size = |kind| Dtype::of_kind(kind).map_or(4, |dtype| dtype.size() as u64);
        let (weight_size, kv_size) = (size(options.kind), size(options.compute_kind()));
        let [mut parameters, mut parameters_read, mut weight_bytes, mut linear_work] = [0; 4];
        for (name, full) in tensor_shapes(config) {
            let shard = rank.shard(&name);
            let own = elements(&shard.local_shape(&full));
            parameters += own;
            parameters_read +=
                if matches!(shard, Shard::Columns(_)) { elements(&full) } else { own };
            // Norms are kept as they are computed with.
            weight_bytes += own * if full.len() == 1 { kv_size } else { weight_size };
            if full.len() == 2 && name != EMBEDDING {
                linear_work += own;
            }
        }
        if config.tie_word_embeddings {
            let head = [config.vocab_size, config.hidden_size];
            let head = elements(&rank.tied_head().local_shape(&head));
            linear_work += head;
            // Packing copies; elsewhere the head is a view of the embedding.
            weight_bytes += if options.packs() { head * weight_size } else { 0 };
        }
        let layers = config.num_hidden_layers as u64;
        let width = |heads: i64| (heads * config.head_dim) as u64;
        Self {
            parameters,
            parameters_read,
            weight_bytes,
            kv_bytes_per_token: 2 * layers * width(rank.n_local_kv_heads()) * kv_size,
            linear_work,
            attention_work: 2 * layers * width(rank.n_local_heads()),
        }
    }

    /// Bytes of the keys and values of so many tokens, such as a shared prefix.
    pub fn kv_bytes(&self, tokens: u64) -> u64 {
        self.kv_bytes_per_token * tokens
    }

    /// Multiply-adds for one more token behind `context` others.
    pub fn work(&self, context: u64) -> u64 {
        self.linear_work + self.attention_work * context
    }
}

fn elements(shape: &[i64]) -> u64 {
    shape.iter().product::<i64>() as u64
}

/// The rank that the others wait for at every all-reduce.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Slowest {
    /// The rank.
    pub rank: usize,
    /// Its work for one token over the mean of all ranks; 1 where all have the same. The inverse is the
    /// share of an even split's speed that the plan allows.
    pub work_over_mean: f64,
    /// Its bytes of weights over the mean of all ranks.
    pub weights_over_mean: f64,
}

impl Slowest {
    /// The rank with the most work for one more token behind `context` others; nothing of no ranks.
    pub fn of(ranks: &[Footprint], context: u64) -> Option<Self> {
        let work = |rank: &Footprint| rank.work(context);
        let over_mean = |of: &dyn Fn(&Footprint) -> u64, rank: usize| {
            let sum: u64 = ranks.iter().map(of).sum();
            of(&ranks[rank]) as f64 * ranks.len() as f64 / sum as f64
        };
        // Of equals the first.
        let rank = (0..ranks.len()).rev().max_by_key(|&rank| work(&ranks[rank]))?;
        Some(Self {
            rank,
            work_over_mean: over_mean(&work, rank),
            weights_over_mean: over_mean(&|rank| rank.weight_bytes, rank),
        })
    }
}
