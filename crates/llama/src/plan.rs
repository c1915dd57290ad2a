//! What each tensor-parallel rank owns. Nothing else in this workspace computes an offset.
//!
//! Query heads, feed-forward columns and vocabulary rows are cut into contiguous ranges. A rank
//! holds every key/value head that one of its query heads reads, so a key/value head at a border
//! lives on two ranks; everything else is covered exactly once. Counts need not divide: where heads
//! do not divide, the first ranks have one more; where feed-forward units do not, the last ones,
//! so that the two remainders even each other out.

mod trained;

use std::ops::Range;

pub use trained::{TrainedPart, TrainedTensor};

use crate::{
    config::LlamaConfig,
    error::{Error, Result},
};

/// The part of a stored tensor that one rank needs: a range of one dimension, or all of it.
///
/// Only a [`Plan`] makes them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Shard {
    /// Every rank holds the whole tensor.
    Replicated,
    /// Column-parallel, vocabulary-parallel: a range of dimension 0, the output features. Each rank
    /// computes its own outputs.
    Rows(Slice),
    /// Row-parallel: a range of dimension 1, the input features. Each rank computes a partial sum
    /// of all outputs that awaits its all-reduce.
    Columns(Slice),
}

/// A range of one dimension of a tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slice {
    range: Range<i64>,
    full: i64,
}

impl Slice {
    fn new(range: Range<i64>, full: i64) -> Self {
        Self { range, full }
    }

    /// The indices that belong to this rank.
    pub fn range(&self) -> Range<i64> {
        self.range.clone()
    }

    /// The number of indices of the whole tensor.
    pub fn full(&self) -> i64 {
        self.full
    }
}

impl Shard {
    /// One of `count` equal parts along a dimension; everything without one.
    pub(crate) fn equal(dim: Option<usize>, shape: &[i64], number: usize, count: usize) -> Self {
        let slice = |size: i64| {
            let part = size / count as i64;
            Slice::new(number as i64 * part..(number as i64 + 1) * part, size)
        };
        match dim {
            None => Self::Replicated,
            Some(0) => Self::Rows(slice(shape[0])),
            Some(dim) => Self::Columns(slice(shape[dim])),
        }
    }

    /// The shape of this rank's part of a tensor of shape `full`.
    pub fn local_shape(&self, full: &[i64]) -> Vec<i64> {
        let mut shape = full.to_vec();
        match self {
            Shard::Replicated => {}
            Shard::Rows(slice) => shape[0] = slice.range.end - slice.range.start,
            Shard::Columns(slice) => shape[1] = slice.range.end - slice.range.start,
        }
        shape
    }

    /// The shape of the whole tensor, of which this rank's part has shape `local`.
    pub fn full_shape(&self, local: &[i64]) -> Vec<i64> {
        let mut shape = local.to_vec();
        match self {
            Shard::Replicated => {}
            Shard::Rows(slice) => shape[0] = slice.full,
            Shard::Columns(slice) => shape[1] = slice.full,
        }
        shape
    }

    /// This rank's part of a whole tensor, as a view.
    ///
    /// # Errors
    /// The tensor is smaller than the plan's.
    pub fn narrow(&self, whole: &tch::Tensor) -> Result<tch::Tensor> {
        let narrow = |dim, slice: &Slice| {
            whole.f_narrow(dim, slice.range.start, slice.range.end - slice.range.start)
        };
        Ok(match self {
            Shard::Replicated => whole.shallow_clone(),
            Shard::Rows(slice) => narrow(0, slice)?,
            Shard::Columns(slice) => narrow(1, slice)?,
        })
    }
}

/// A key/value head and the query heads of one rank that read it.
pub type HeadGroup = (usize, Range<usize>);

/// What one rank owns. Ranges count in the whole model unless the name says `local`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RankPlan {
    /// Query heads, grouped by the key/value head that they read; both ascend without gaps.
    pub groups: Vec<HeadGroup>,
    /// Feed-forward columns.
    pub intermediate: Range<i64>,
    /// Vocabulary rows of the head.
    pub vocab: Range<i64>,
    sizes: Sizes,
}

/// The whole model's sizes that shards are cut from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Sizes {
    num_attention_heads: i64,
    num_key_value_heads: i64,
    head_dim: i64,
    intermediate_size: i64,
    vocab_size: i64,
}

impl RankPlan {
    /// Query heads of this rank.
    pub fn q_heads(&self) -> Range<usize> {
        let first = self.groups.first().map_or(0, |(_, q_heads)| q_heads.start);
        first..self.groups.last().map_or(0, |(_, q_heads)| q_heads.end)
    }

    /// Key/value heads of this rank.
    pub fn kv_heads(&self) -> Range<usize> {
        let first = self.groups.first().map_or(0, |(kv_head, _)| *kv_head);
        first..self.groups.last().map_or(0, |(kv_head, _)| kv_head + 1)
    }

    /// The groups, counted from this rank's first query head and first key/value head.
    pub fn local_groups(&self) -> Vec<HeadGroup> {
        let (q, kv) = (self.q_heads().start, self.kv_heads().start);
        let local =
            |(kv_head, q_heads): &HeadGroup| (kv_head - kv, q_heads.start - q..q_heads.end - q);
        self.groups.iter().map(local).collect()
    }

    /// Number of query heads of this rank.
    pub fn n_local_heads(&self) -> i64 {
        self.q_heads().len() as i64
    }

    /// Number of key/value heads of this rank.
    pub fn n_local_kv_heads(&self) -> i64 {
        self.groups.len() as i64
    }

    /// Local query heads that read each local key/value head, if it is the same number for all.
    pub fn uniform_group_size(&self) -> Option<i64> {
        let mut sizes = self.groups.iter().map(|(_, q_heads)| q_heads.len());
        let first = sizes.next()?;
        sizes.all(|size| size == first).then_some(first as i64)
    }

    /// Rows of `q_proj`, `k_proj` and `v_proj` in this rank's fused projection.
    pub fn local_qkv_rows(&self) -> [Range<i64>; 3] {
        let q = self.n_local_heads() * self.sizes.head_dim;
        let kv = self.n_local_kv_heads() * self.sizes.head_dim;
        [0..q, q..q + kv, q + kv..q + 2 * kv]
    }

    /// Rows of `gate_proj` and `up_proj` in this rank's fused projection.
    pub fn local_gate_up_rows(&self) -> [Range<i64>; 2] {
        let width = self.intermediate.end - self.intermediate.start;
        [0..width, width..2 * width]
    }

    /// This rank's part of the named tensor (`model.layers.0.self_attn.q_proj.weight`), or of a
    /// module's weight by the module's name.
    pub fn shard(&self, tensor: &str) -> Shard {
        let module = tensor.strip_suffix(".weight").unwrap_or(tensor);
        let sizes = self.sizes;
        match module.rsplit('.').next().unwrap_or(module) {
            "q_proj" => Shard::Rows(self.heads(self.q_heads(), sizes.num_attention_heads)),
            "k_proj" | "v_proj" => {
                Shard::Rows(self.heads(self.kv_heads(), sizes.num_key_value_heads))
            }
            "o_proj" => Shard::Columns(self.heads(self.q_heads(), sizes.num_attention_heads)),
            "gate_proj" | "up_proj" => {
                Shard::Rows(Slice::new(self.intermediate.clone(), sizes.intermediate_size))
            }
            "down_proj" => {
                Shard::Columns(Slice::new(self.intermediate.clone(), sizes.intermediate_size))
            }
            "lm_head" => Shard::Rows(Slice::new(self.vocab.clone(), sizes.vocab_size)),
            _ => Shard::Replicated,
        }
    }

    /// This rank's rows of the embedding where it serves as the head (tied embeddings).
    pub fn tied_head(&self) -> Shard {
        Shard::Rows(Slice::new(self.vocab.clone(), self.sizes.vocab_size))
    }

    fn heads(&self, heads: Range<usize>, all: i64) -> Slice {
        let dim = self.sizes.head_dim;
        Slice::new(heads.start as i64 * dim..heads.end as i64 * dim, all * dim)
    }
}

/// The split of one model over `tp` ranks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    ranks: Vec<RankPlan>,
}

impl Plan {
    /// Splits a model over `tp` ranks.
    ///
    /// # Errors
    /// [`Error::TooManyRanks`] if `tp` is 0 or some rank would get nothing: more ranks than query
    /// heads, feed-forward columns or vocabulary rows.
    pub fn new(config: &LlamaConfig, tp: usize) -> Result<Self> {
        for (what, count) in [
            ("query heads", config.num_attention_heads),
            ("feed-forward columns", config.intermediate_size),
            ("vocabulary rows", config.vocab_size),
        ] {
            if tp == 0 || i64::try_from(tp).map_or(true, |tp| count < tp) {
                return Err(Error::TooManyRanks { tp, what, count });
            }
        }
        let sizes = Sizes {
            num_attention_heads: config.num_attention_heads,
            num_key_value_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
            intermediate_size: config.intermediate_size,
            vocab_size: config.vocab_size,
        };
        let intermediate = Units::of(config.intermediate_size, tp as i64);
        let vocab = Units::of(config.vocab_size, tp as i64);
        let ranks = (0..tp as i64)
            .map(|rank| RankPlan {
                groups: groups_of(sizes, rank, tp as i64),
                intermediate: intermediate.range(rank),
                vocab: vocab.range(rank),
                sizes,
            })
            .collect();
        Ok(Self { ranks })
    }

    /// Number of ranks.
    pub fn tp(&self) -> usize {
        self.ranks.len()
    }

    /// What `tp_rank` owns.
    ///
    /// # Panics
    /// If `tp_rank` is not below [`Plan::tp`].
    pub fn rank(&self, tp_rank: usize) -> &RankPlan {
        &self.ranks[tp_rank]
    }
}

/// Query heads of a rank; the first `heads % tp` ranks have one more than the others.
fn groups_of(sizes: Sizes, rank: i64, tp: i64) -> Vec<HeadGroup> {
    let (share, longer) = (sizes.num_attention_heads / tp, sizes.num_attention_heads % tp);
    let start = rank * share + rank.min(longer);
    let end = start + share + i64::from(rank < longer);
    let per_kv = sizes.num_attention_heads / sizes.num_key_value_heads;
    (start / per_kv..=(end - 1) / per_kv)
        .map(|kv| {
            let q_heads = (kv * per_kv).max(start)..((kv + 1) * per_kv).min(end);
            (kv as usize, q_heads.start as usize..q_heads.end as usize)
        })
        .collect()
}

/// Indices dealt out in units of 64, 8 or 1: whole units keep the kernels' inner loops full.
struct Units {
    unit: i64,
    count: i64,
    size: i64,
    tp: i64,
}

impl Units {
    fn of(size: i64, tp: i64) -> Self {
        let count = |unit: i64| (size + unit - 1) / unit;
        let unit = [64, 8].into_iter().find(|unit| count(*unit) >= tp).unwrap_or(1);
        Self { unit, count: count(unit), size, tp }
    }

    /// The last `count % tp` ranks have one unit more, and the last unit may be a short one.
    fn range(&self, rank: i64) -> Range<i64> {
        let (share, longer) = (self.count / self.tp, self.count % self.tp);
        let border = |rank: i64| rank * share + (rank - (self.tp - longer)).max(0);
        let end = (border(rank + 1) * self.unit).min(self.size);
        border(rank) * self.unit..end
    }
}
