//! The steps of a cache by libtorch's operations: on any device, and the reference for the kernels.

// Shapes: B = rows, T = tokens of all rows, H = query heads, KV = K/V heads of a run, G = query heads
// per K/V head, D = head_dim, P = tokens of the prefix, L = capacity of a slot, S = keys in use.

use tch::{Device, Kind, Tensor};

use super::{LayerStep, SharedPrefix, SlotCache, SlotRun, StepRow};
use crate::{
    Result,
    attention::{Partial, causal_attention},
    heads::{HeadRun, Heads},
};

/// Queries that attend at once while prompts are read; bounds the memory of the scores.
const QUERY_BLOCK: i64 = 256;

/// Prompts that are read at once: their own tokens lie one behind the other.
#[derive(Debug)]
pub(crate) struct PrefillStep {
    slots: Vec<i64>,
    lengths: Vec<i64>,
    prefix: PrefixSeen,
    causal: Vec<Tensor>, // per run: (block x G, block), true above the diagonal
}

/// How queries see the prefix.
#[derive(Debug)]
enum PrefixSeen {
    /// None of them sees any of it.
    None,
    /// All of them see all of it.
    All,
    /// What each must not see, per run of heads: `(queries x G, P)`.
    Parts(Vec<Tensor>),
}

impl PrefixSeen {
    /// `seen`: for each query how many tokens of the prefix it sees.
    fn new(heads: &Heads, device: Device, seen: &[i64], prefix: Option<&SharedPrefix>) -> Self {
        let length = prefix.map_or(0, |prefix| prefix.len() as i64);
        if seen.iter().all(|&seen| seen == 0) {
            return Self::None;
        }
        if seen.iter().all(|&seen| seen == length) {
            return Self::All;
        }
        let seen = Tensor::from_slice(seen).to_device(device).unsqueeze(-1);
        let hidden = Tensor::arange(length, (Kind::Int64, device)).ge_tensor(&seen); // (queries, P)
        let per_run = |run: &HeadRun| hidden.repeat_interleave_self_int(run.group(), 0, None);
        Self::Parts(heads.runs.iter().map(per_run).collect())
    }

    /// The part of the queries' attention that goes to the prefix; `None` where there is none.
    ///
    /// q: `(KV, M, D)` scaled, M = queries x G from `start` on; the result has N = KV.
    fn attend(
        &self,
        prefix: Option<&SharedPrefix>,
        (layer, run): (usize, usize),
        q: &Tensor,
        start: i64,
    ) -> Result<Option<Partial>> {
        let Some(prefix) = prefix else { return Ok(None) };
        let hidden = match self {
            Self::None => return Ok(None),
            Self::All => None,
            Self::Parts(hidden) => Some(hidden[run].narrow(0, start, q.size()[1])),
        };
        prefix.attend((layer, run), q, hidden.as_ref())
    }
}

impl PrefillStep {
    pub(crate) fn new(
        heads: &Heads,
        device: Device,
        rows: &[StepRow],
        prefix: Option<&SharedPrefix>,
    ) -> Self {
        let per_token = |row: &StepRow| std::iter::repeat_n(row.prefix, row.length as usize);
        let seen: Vec<i64> = rows.iter().flat_map(per_token).collect();
        let longest = rows.iter().map(|row| row.length).max().unwrap_or(0).min(QUERY_BLOCK);
        let causal = Tensor::ones([longest, longest], (Kind::Bool, device)).triu(1);
        let per_run = |run: &HeadRun| causal.repeat_interleave_self_int(run.group(), 0, None);
        Self {
            slots: rows.iter().map(|row| row.slot).collect(),
            lengths: rows.iter().map(|row| row.length).collect(),
            prefix: PrefixSeen::new(heads, device, &seen, prefix),
            causal: heads.runs.iter().map(per_run).collect(),
        }
    }

    /// Stores the keys and values of a layer, and attends: `(T, H, D)`.
    pub(crate) fn attend(&self, cache: &mut SlotCache, of: LayerStep<'_>) -> Result<Tensor> {
        let LayerStep { layer, heads, prefix, q, k, v } = of;
        self.store(cache.runs(layer), heads, k, v)?;
        if matches!(self.prefix, PrefixSeen::None) {
            return causal_attention(heads, q, k, v, &self.lengths);
        }
        of.by_run(|index, run, q| {
            let q = by_kv_head(q, run); // (KV, T x G, D)
            let [k, v] = [k, v].map(|t| t.narrow(1, run.kv.start, run.n_kv()).transpose(0, 1)); // (KV, T, D)
            let own = self.own_tokens(index, run.group(), [&q, &k, &v])?;
            let mut blocks = Vec::new();
            for (start, length) in blocks_of(q.size()[1], QUERY_BLOCK * run.group()) {
                let q = q.narrow(1, start, length);
                blocks.extend(self.prefix.attend(prefix, (layer, index), &q, start)?);
            }
            let out = Partial::cat(&blocks, 1)?.join(&own); // (KV, T x G, D)
            Ok(by_token(&out, run).to_kind(v.kind())) // (T, KV x G, D)
        })
    }

    /// q: `(KV, T x G, D)`, k and v: `(KV, T, D)`; the result has M = T x G.
    fn own_tokens(&self, run: usize, group: i64, [q, k, v]: [&Tensor; 3]) -> Result<Partial> {
        let mut blocks = Vec::new();
        let mut first = 0;
        for &length in &self.lengths {
            let [k, v] = [k, v].map(|t| t.narrow(1, first, length));
            for (start, size) in blocks_of(length, QUERY_BLOCK) {
                let q = q.narrow(1, (first + start) * group, size * group); // (KV, size x G, D)
                let hidden = self.causal[run].narrow(0, 0, size * group).narrow(1, 0, size);
                let [near_k, near_v] = [&k, &v].map(|t| t.narrow(1, start, size));
                let near = Partial::new(&q, &near_k, &near_v, Some(&hidden))?;
                blocks.push(if start == 0 {
                    near
                } else {
                    let [k, v] = [&k, &v].map(|t| t.narrow(1, 0, start));
                    near.merge(&Partial::new(&q, &k, &v, None)?)
                });
            }
            first += length;
        }
        Partial::cat(&blocks, 1)
    }

    fn store(&self, layer: &[SlotRun], heads: &Heads, k: &Tensor, v: &Tensor) -> Result<()> {
        for (run, store) in heads.runs.iter().zip(layer) {
            for (store, new) in [(&store.k, k), (&store.v, v)] {
                let new = new.narrow(1, run.kv.start, run.n_kv()).transpose(0, 1); // (KV, T, D)
                let mut first = 0;
                for (&slot, &length) in self.slots.iter().zip(&self.lengths) {
                    let mut row = store.get(slot).narrow(1, 0, length); // (KV, length, D)
                    row.f_copy_(&new.narrow(1, first, length))?;
                    first += length;
                }
            }
        }
        Ok(())
    }
}

/// One new token for each of the rows in the slots `0..B`.
#[derive(Debug)]
pub(crate) struct DecodeStep {
    rows: Tensor,      // (B): 0..B
    positions: Tensor, // (B): where in its slot each row's token goes
    longest: i64,
    prefix: PrefixSeen,
    hidden: Vec<Option<Tensor>>, // per run: (B x KV, 1, S), true behind a row's last token
}

impl DecodeStep {
    /// `rows` are in the order of their slots, which are `0..B`. They read `keys` of their slots'
    /// keys at least, whatever their lengths.
    pub(crate) fn new(
        heads: &Heads,
        device: Device,
        rows: &[StepRow],
        prefix: Option<&SharedPrefix>,
        keys: i64,
    ) -> Self {
        let count = rows.len() as i64;
        let lengths: Vec<i64> = rows.iter().map(|row| row.length).collect();
        let longest = lengths.iter().copied().max().unwrap_or(0).max(keys);
        let seen: Vec<i64> = rows.iter().map(|row| row.prefix).collect();
        let ragged = lengths.iter().any(|&length| length != longest);
        let lengths = Tensor::from_slice(&lengths).to_device(device); // (B)
        let keys = Tensor::arange(longest, (Kind::Int64, device)); // (S)
        let hidden = keys.ge_tensor(&lengths.view([-1, 1, 1, 1])); // (B, 1, 1, S)
        let per_run = |run: &HeadRun| {
            ragged.then(|| {
                hidden.expand([-1, run.n_kv(), -1, -1], false).reshape([-1, 1, longest]) // (B x KV, 1, S)
            })
        };
        Self {
            rows: Tensor::arange(count, (Kind::Int64, device)),
            positions: lengths - 1,
            longest,
            prefix: PrefixSeen::new(heads, device, &seen, prefix),
            hidden: heads.runs.iter().map(per_run).collect(),
        }
    }

    /// Stores the keys and values of a layer, T = B, and attends: `(B, H, D)`.
    pub(crate) fn attend(&self, cache: &mut SlotCache, of: LayerStep<'_>) -> Result<Tensor> {
        let LayerStep { layer, heads, prefix, q, k, v } = of;
        let count = q.size()[0];
        of.by_run(|index, run, q| {
            let store = &mut cache.runs(layer)[index];
            self.store(store, run, k, v)?;
            let (n_kv, group) = (run.n_kv(), run.group());
            let own_q =
                q.narrow(1, run.q.start, run.n_q()).reshape([count * n_kv, group, heads.head_dim]); // (B x KV, G, D)
            let [own_k, own_v] = [&store.k, &store.v].map(|t| {
                let in_use = t.narrow(0, 0, count).narrow(2, 0, self.longest); // (B, KV, S, D)
                in_use.view([count * n_kv, self.longest, heads.head_dim]) // (B x KV, S, D)
            });
            let own = Partial::new(&own_q, &own_k, &own_v, self.hidden[index].as_ref())?;
            let shared = self.prefix.attend(prefix, (layer, index), &by_kv_head(q, run), 0)?;
            let out = match shared {
                None => own.finish(), // (B x KV, G, D)
                Some(shared) => {
                    let by_row = |t: &Tensor| {
                        let t = t.view([n_kv, count, group, -1]); // (KV, B, G, D)
                        t.transpose(0, 1).reshape([count * n_kv, group, -1]) // (B x KV, G, D)
                    };
                    own.join(&shared.map(by_row))
                }
            };
            Ok(out.view([count, n_kv * group, -1]).to_kind(v.kind())) // (B, KV x G, D)
        })
    }

    fn store(&self, store: &mut SlotRun, run: &HeadRun, k: &Tensor, v: &Tensor) -> Result<()> {
        let at = [Some(&self.rows), None, Some(&self.positions)];
        for (store, new) in [(&mut store.k, k), (&mut store.v, v)] {
            let new = new.narrow(1, run.kv.start, run.n_kv()); // (B, KV, D)
            let _ = store.f_index_put_(&at, &new, false)?;
        }
        Ok(())
    }
}

/// `(T, H, D)` to `(KV, T x G, D)`: all queries of a K/V head in one product.
fn by_kv_head(q: &Tensor, run: &HeadRun) -> Tensor {
    let (tokens, _, head_dim) = (q.size()[0], q.size()[1], q.size()[2]);
    q.narrow(1, run.q.start, run.n_q())
        .reshape([tokens, run.n_kv(), run.group(), head_dim]) // (T, KV, G, D)
        .transpose(0, 1)
        .reshape([run.n_kv(), tokens * run.group(), head_dim]) // (KV, T x G, D)
}

/// `(KV, T x G, D)` to `(T, KV x G, D)`.
fn by_token(out: &Tensor, run: &HeadRun) -> Tensor {
    let head_dim = out.size()[2];
    out.reshape([run.n_kv(), -1, run.group(), head_dim]) // (KV, T, G, D)
        .transpose(0, 1)
        .reshape([-1, run.n_q(), head_dim]) // (T, KV x G, D)
}

/// `(start, length)` of consecutive blocks.
fn blocks_of(length: i64, block: i64) -> impl Iterator<Item = (i64, i64)> {
    (0..length).step_by(block as usize).map(move |start| (start, block.min(length - start)))
}
