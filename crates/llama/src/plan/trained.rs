//! What a rank owns of a trained tensor, and which of its gradients are partial sums.

use std::ops::Range;

use super::{Plan, Shard, Slice};

/// A tensor of a module that training changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TrainedTensor {
    /// The module's weight.
    Weight,
    /// `lora_A` of its adapter: (r, in features).
    LoraA,
    /// `lora_B` of its adapter: (out features, r).
    LoraB,
}

/// One rank's part of a trained tensor.
///
/// Backward through a rank's own half of a block leaves these kinds of gradient:
///
/// - Of what this rank alone holds: rows of a column-parallel weight and of its `lora_B`, columns of a
///   row-parallel weight and of its `lora_A`. It is complete.
/// - Of what every rank holds whole: `lora_A` of a column-parallel layer, `lora_B` of a row-parallel
///   one, norm weights. It is a partial sum, over all ranks.
/// - Of the final norm and of the embedding, which every rank holds whole, backward gives the same
///   complete gradient on all of them: the first rank alone adds it, and the others add nothing but
///   what their rows of a tied head give. It is a partial sum then like those before.
/// - Of the rows of a key/value head that several ranks hold, each for its own query heads. It is a
///   partial sum, over these ranks.
///
/// [`sum_gradients`](crate::sum_gradients) makes all of them complete, and copies of one parameter get
/// the same gradient to the last bit, so that they stay equal. One rank owns a parameter: it alone
/// counts it in a [`global_norm`](crate::global_norm), and saves it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrainedPart {
    shard: Shard,
    owned: Option<Shard>,
    shared: Vec<Range<i64>>,
    tp: usize,
}

impl TrainedPart {
    /// What the rank holds.
    pub fn shard(&self) -> &Shard {
        &self.shard
    }

    /// What of it the rank owns; the owned parts of all ranks are the whole, each number once.
    pub fn owned(&self) -> Option<&Shard> {
        self.owned.as_ref()
    }

    /// The owned part of a tensor of what the rank holds, as a view.
    pub fn owned_of(&self, local: &tch::Tensor) -> Option<tch::Tensor> {
        let narrow = |dim, owned: &Slice, held: &Slice| {
            let (owned, held) = (owned.range(), held.range());
            local.narrow(dim, owned.start - held.start, owned.end - owned.start)
        };
        Some(match (self.owned.as_ref()?, &self.shard) {
            (Shard::Rows(owned), Shard::Rows(held)) => narrow(0, owned, held),
            (Shard::Columns(owned), Shard::Columns(held)) => narrow(1, owned, held),
            _ => local.shallow_clone(),
        })
    }

    /// Whether the whole gradient is a partial sum over all ranks.
    pub fn is_replicated(&self) -> bool {
        self.shard == Shard::Replicated
    }

    /// Rows, counted in the whole tensor, that several ranks hold, and whose gradient is a partial
    /// sum over these; the same on all ranks. Ranges behind each other are not joined.
    pub fn shared(&self) -> &[Range<i64>] {
        &self.shared
    }

    /// The ranks of the plan.
    pub fn tp(&self) -> usize {
        self.tp
    }

    /// Those of the shared rows that this rank holds: where they are among all shared rows, and in
    /// what the rank holds.
    pub(crate) fn shared_here(&self) -> Vec<(Range<i64>, Range<i64>)> {
        let Shard::Rows(held) = &self.shard else { return Vec::new() };
        let held = held.range();
        let mut next = 0;
        let mut here = Vec::new();
        for rows in &self.shared {
            let among = next..next + (rows.end - rows.start);
            next = among.end;
            if held.start <= rows.start && rows.end <= held.end {
                here.push((among, rows.start - held.start..rows.end - held.start));
            }
        }
        here
    }
}

impl Plan {
    /// The ranks that hold a key/value head; the first of them owns it.
    pub fn kv_head_holders(&self, kv_head: usize) -> Range<usize> {
        let holds = |rank: &usize| self.rank(*rank).kv_heads().contains(&kv_head);
        let first = (0..self.tp()).find(holds).unwrap_or(0);
        first..(first..self.tp()).take_while(holds).last().map_or(first, |last| last + 1)
    }

    /// A rank's part of a tensor of the named module (`model.layers.0.self_attn.q_proj`), or of an
    /// adapter of it. Nothing for adapters of anything but linear layers.
    ///
    /// # Panics
    /// If `tp_rank` is not below [`Plan::tp`].
    pub fn trained_part(
        &self,
        tp_rank: usize,
        module: &str,
        tensor: TrainedTensor,
    ) -> Option<TrainedPart> {
        let rank = self.rank(tp_rank);
        let name = module.rsplit('.').next().unwrap_or(module);
        let shard = match (rank.shard(module), tensor) {
            (Shard::Replicated, TrainedTensor::Weight) => Shard::Replicated,
            (Shard::Replicated, _) => return None,
            (Shard::Rows(_), TrainedTensor::LoraA) | (Shard::Columns(_), TrainedTensor::LoraB) => {
                Shard::Replicated
            }
            (sliced, _) => sliced,
        };
        let shared = if is_of_kv_heads(name, &shard) { self.shared_kv_rows() } else { Vec::new() };
        let owned = self.owned_of(tp_rank, name, shard.clone());
        Some(TrainedPart { shard, owned, shared, tp: self.tp() })
    }

    /// What a rank owns of a stored tensor (`model.layers.0.self_attn.q_proj.weight`), and saves: the
    /// owned parts of all ranks are the whole, each number once. Nothing where all that the rank holds
    /// is another's.
    ///
    /// # Panics
    /// If `tp_rank` is not below [`Plan::tp`].
    pub fn owned(&self, tp_rank: usize, tensor: &str) -> Option<Shard> {
        let module = tensor.strip_suffix(".weight").unwrap_or(tensor);
        let name = module.rsplit('.').next().unwrap_or(module);
        self.owned_of(tp_rank, name, self.rank(tp_rank).shard(tensor))
    }

    /// The owned part of what a rank holds of a tensor of the named projection.
    fn owned_of(&self, tp_rank: usize, name: &str, held: Shard) -> Option<Shard> {
        if is_of_kv_heads(name, &held) {
            return self.owned_kv_rows(tp_rank);
        }
        (held != Shard::Replicated || tp_rank == 0).then_some(held)
    }

    /// Rows of `k_proj` that several ranks hold.
    fn shared_kv_rows(&self) -> Vec<Range<i64>> {
        let sizes = self.rank(0).sizes;
        (0..sizes.num_key_value_heads)
            .filter(|kv_head| self.kv_head_holders(*kv_head as usize).len() > 1)
            .map(|kv_head| kv_head * sizes.head_dim..(kv_head + 1) * sizes.head_dim)
            .collect()
    }

    /// Rows of `k_proj` that the rank is the first to hold.
    fn owned_kv_rows(&self, tp_rank: usize) -> Option<Shard> {
        let rank = self.rank(tp_rank);
        let held = rank.kv_heads();
        // Of the heads that a rank holds, an earlier rank can hold the first only.
        let foreign = self.kv_head_holders(held.start).start < tp_rank;
        let owned = held.start + usize::from(foreign)..held.end;
        (!owned.is_empty()).then(|| Shard::Rows(rank.heads(owned, rank.sizes.num_key_value_heads)))
    }
}

/// Whether the rows of a tensor belong to key/value heads, which several ranks may hold.
fn is_of_kv_heads(name: &str, held: &Shard) -> bool {
    matches!(held, Shard::Rows(_)) && matches!(name, "k_proj" | "v_proj")
}
