//! What one rank of a plan stores, reads and computes, in numbers, before anything is loaded.

use serde::Serialize;
use tch::Device;

use crate::{
    LlamaConfig, LoadOptions, Plan, Shard,
    checkpoint::{Dtype, EMBEDDING, HEAD, tensor_shapes},
    generation::PREFILL_TOKENS,
    kernels::numbers_at_once,
    quantised::quantised_bytes,
    quantize::is_linear,
};

/// Bytes that a process holds beside weights, keys, values and activations, once libtorch is loaded:
/// the tokenizer, the threads' stacks, code that is called for the first time.
const PROCESS_BYTES: u64 = 32 << 20;

/// Bytes of what a pass has freed that are too scattered for its own later needs. How much glibc's
/// allocator keeps differs from run to run; what it has left is given back behind each layer that is
/// loaded and behind each large pass.
const ALLOCATOR_BYTES: u64 = 16 << 20;

/// Copies of a step's logits that exist at once where the last units of the vocabulary are cut off.
const LOGIT_COPIES: u64 = 2;

/// The cost of one rank: sums over the slices that the plan gives it.
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
    /// Those of the head among them, which a prompt's last token alone needs.
    pub head_work: u64,
    /// Multiply-adds of one token's attention to one other token, in all layers.
    pub attention_work: u64,
    /// Bytes of what a layer computes for one token, at the point where most of it exists at once.
    pub activation_bytes_per_token: u64,
    /// Bytes that choosing one token takes.
    pub logit_bytes_per_row: u64,
    /// Bytes of the largest layer's weights, which are there twice while they are laid out.
    pub loading_bytes: u64,
    /// Bytes of the largest weight while it is converted to the kind that is computed in, or dequantised
    /// for libtorch, or of what this process's threads dequantise at a time; 0 where none of it happens.
    pub converted_bytes: u64,
}

/// What is generated at once.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Workload {
    /// Tokens of the prefix that all rows share.
    pub prefix_tokens: u64,
    /// Rows at once.
    pub max_batch_size: u64,
    /// Tokens of a row behind the prefix.
    pub max_seq_len: u64,
    /// Tokens of all rows behind it, where these are fewer than rows of that length have.
    pub max_kv_tokens: Option<u64>,
}

/// The memory of one rank that generates, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// Weights.
    pub weight_bytes: u64,
    /// Keys and values of the shared prefix.
    pub prefix_bytes: u64,
    /// Keys and values of the rows behind it.
    pub slot_bytes: u64,
    /// The most that a pass takes beside them.
    pub work_bytes: u64,
    /// All of it, above what a process has once libtorch is loaded.
    pub peak_bytes: u64,
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
        let nf4 = options.nf4 && options.device == Device::Cpu;
        let [mut parameters, mut parameters_read, mut weight_bytes, mut linear_work] = [0; 4];
        let mut head_work = 0;
        for (name, full) in tensor_shapes(config) {
            let shard = rank.shard(&name);
            let own = elements(&shard.local_shape(&full));
            parameters += own;
            parameters_read +=
                if matches!(shard, Shard::Columns(_)) { elements(&full) } else { own };
            // Norms are kept as they are computed with.
            weight_bytes += match full.len() {
                1 => own * kv_size,
                _ if nf4 && is_linear(&name) => quantised_bytes(own),
                _ => own * weight_size,
            };
            if full.len() == 2 && name != EMBEDDING {
                linear_work += own;
                head_work = if name == HEAD { own } else { head_work };
            }
        }
        if config.tie_word_embeddings {
            let head = [config.vocab_size, config.hidden_size];
            let head = elements(&rank.tied_head().local_shape(&head));
            linear_work += head;
            head_work = head;
            // A packed slice is a copy; elsewhere the embedding and the head are one.
            let copied = options.packs() && !options.embeds_by_head(config);
            weight_bytes += if copied { head * weight_size } else { 0 };
        }
        let layers = config.num_hidden_layers as u64;
        let width = |heads: i64| (heads * config.head_dim) as u64;
        let (h, kv) = (width(rank.n_local_heads()), width(rank.n_local_kv_heads()));
        let columns = (rank.intermediate.end - rank.intermediate.start) as u64;
        let hidden = config.hidden_size as u64;
        // The residual stream is in f32. With it in the MLP: gate and up, their product, the result; in
        // the attention: queries, keys and values, rotated ones, the mixed values, the result.
        let computed = hidden + (3 * columns).max(3 * (h + kv));
        let vocab = (rank.vocab.end - rank.vocab.start) as u64;
        let largest_linear = (2 * columns).max(h + 2 * kv) * hidden;
        // What is in four bits is not laid out.
        let laid_out = if nf4 { 0 } else { largest_linear }.max(vocab * hidden);
        let converted = [
            (if weight_size == kv_size { 0 } else { laid_out }),
            match (nf4, options.packs()) {
                (false, _) => 0,
                (true, false) => largest_linear,
                (true, true) => {
                    let depth = hidden.max(h).max(columns) as usize;
                    largest_linear.min(numbers_at_once(depth) as u64)
                }
            },
        ];
        Self {
            parameters,
            parameters_read,
            weight_bytes,
            kv_bytes_per_token: 2 * layers * width(rank.n_local_kv_heads()) * kv_size,
            linear_work,
            head_work,
            attention_work: 2 * layers * h,
            activation_bytes_per_token: 4 * hidden + kv_size * computed,
            logit_bytes_per_row: 4 * vocab * LOGIT_COPIES,
            loading_bytes: laid_out * weight_size,
            converted_bytes: converted[0].max(converted[1]) * kv_size,
        }
    }

    /// The memory of this rank while it generates.
    pub fn memory(&self, of: &Workload) -> Memory {
        let prefix_bytes = self.kv_bytes(of.prefix_tokens);
        let slot_tokens = of.max_batch_size * of.max_seq_len;
        let slot_tokens = slot_tokens.min(of.max_kv_tokens.unwrap_or(u64::MAX));
        let slot_bytes = self.kv_bytes(slot_tokens);
        // Weights are loaded before there is a prefix, and it is read before there are slots. Prompts
        // are read together until they have a number of tokens, which the last of them may pass.
        let together = PREFILL_TOKENS as u64 + of.max_seq_len;
        let prompts = slot_tokens.min(together);
        let work_bytes = (self.activation_bytes_per_token * of.prefix_tokens)
            .saturating_sub(slot_bytes)
            .max(self.loading_bytes.saturating_sub(prefix_bytes + slot_bytes))
            .max(self.activation_bytes_per_token * prompts)
            .max(self.logit_bytes_per_row * of.max_batch_size)
            + self.converted_bytes
            + PROCESS_BYTES
            + ALLOCATOR_BYTES;
        Memory {
            weight_bytes: self.weight_bytes,
            prefix_bytes,
            slot_bytes,
            work_bytes,
            peak_bytes: self.weight_bytes + prefix_bytes + slot_bytes + work_bytes,
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
