//! Keys and values of a forward pass: one shared prefix for all rows, and a slot for each row.

// Shapes: B = rows, T = tokens of all rows, H = query heads, KV = K/V heads of a run, G = query heads
// per K/V head, D = head_dim, P = tokens of the prefix, L = capacity of a slot, S = keys in use.

use dromedary_torch_ext::PackedWeight;
use tch::{Device, Kind, Tensor};

use crate::{
    Result,
    attention::{Partial, causal_attention, one_or_cat},
    heads::{HeadRun, Heads},
};

/// Queries that attend at once while prompts are read; bounds the memory of the scores.
const QUERY_BLOCK: i64 = 256;

/// Where and in which kind keys and values are kept.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Storage {
    pub(crate) device: Device,
    pub(crate) kind: Kind,
    pub(crate) num_hidden_layers: usize,
    /// Keep a prefix as packed weights, see [`PrefixRun::Packed`].
    pub(crate) pack: bool,
}

/// Keys and values of a token prefix, one copy for all rows.
///
/// Each row may see a part of it from the start: its own tokens then begin behind that part.
#[derive(Debug)]
pub struct SharedPrefix {
    tokens: Vec<u32>,
    layers: Vec<Vec<PrefixRun>>, // [layer][run of heads]
}

/// One run of heads of one layer of a prefix.
#[derive(Debug)]
enum PrefixRun {
    Plain {
        k: Tensor, // (KV, P, D)
        v: Tensor, // (KV, P, D)
    },
    /// Per K/V head. The prefix does not change while the process lives, so its keys and values
    /// serve as the frozen weights of two linear layers: scores `= q K^T`, result `= p (V^T)^T`.
    Packed {
        k: Vec<PackedWeight>,   // (P, D)
        v_t: Vec<PackedWeight>, // (D, P)
    },
}

impl SharedPrefix {
    /// An empty prefix, to be filled layer by layer.
    pub(crate) fn new(tokens: Vec<u32>) -> Self {
        Self { tokens, layers: Vec::new() }
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether it has no tokens.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// How many of its first tokens a row may use: those it shares, but never all of the row, because
    /// the row's last token must be computed to give logits.
    pub fn shared_with(&self, tokens: &[u32]) -> usize {
        let same = self.tokens.iter().zip(tokens).take_while(|(own, other)| own == other).count();
        same.min(tokens.len().saturating_sub(1))
    }

    /// Adds the keys and values of the next layer.
    ///
    /// # Shapes
    /// k and v: `(P, KV of all runs, D)`.
    pub(crate) fn push_layer(
        &mut self,
        heads: &Heads,
        storage: &Storage,
        k: &Tensor,
        v: &Tensor,
    ) -> Result<()> {
        let by_head = |t: &Tensor, run: &HeadRun| {
            t.narrow(1, run.kv.start, run.n_kv()).transpose(0, 1).contiguous() // (KV, P, D)
        };
        let mut runs = Vec::with_capacity(heads.runs.len());
        for run in &heads.runs {
            let (k, v) = (by_head(k, run), by_head(v, run));
            runs.push(if storage.pack {
                PrefixRun::pack(&k, &v)?
            } else {
                PrefixRun::Plain { k, v }
            });
        }
        self.layers.push(runs);
        Ok(())
    }
}

impl PrefixRun {
    fn pack(k: &Tensor, v: &Tensor) -> Result<Self> {
        let heads = 0..k.size()[0];
        let k =
            heads.clone().map(|head| PackedWeight::pack(&k.get(head))).collect::<Result<_, _>>()?;
        let v_t = heads
            .map(|head| PackedWeight::pack(&v.get(head).tr().contiguous()))
            .collect::<Result<_, _>>()?;
        Ok(Self::Packed { k, v_t })
    }

    /// q: `(KV, M, D)` scaled, hidden: `(M, P)`; the result has N = KV.
    fn attend(&self, q: &Tensor, hidden: Option<&Tensor>) -> Result<Partial> {
        match self {
            Self::Plain { k, v } => Partial::new(q, k, v, hidden),
            Self::Packed { k, v_t } => {
                let mut heads = Vec::with_capacity(k.len());
                for ((k, v_t), head) in k.iter().zip(v_t).zip(0..) {
                    let scores = k.linear(&q.narrow(0, head, 1))?; // (1, M, P)
                    heads.push(Partial::from_scores(scores, hidden, |p| Ok(v_t.linear(p)?))?);
                }
                Partial::cat(&heads, 0)
            }
        }
    }
}

/// Keys and values of the rows' own tokens: one slot of fixed capacity for each row.
#[derive(Debug)]
pub struct SlotCache {
    layers: Vec<Vec<SlotRun>>, // [layer][run of heads]
}

#[derive(Debug)]
struct SlotRun {
    k: Tensor, // (slots, KV, L, D)
    v: Tensor, // (slots, KV, L, D)
}

impl SlotCache {
    /// Room for `slots` rows of `capacity` tokens each.
    ///
    /// # Errors
    /// Not enough memory.
    pub(crate) fn new(heads: &Heads, storage: &Storage, slots: i64, capacity: i64) -> Result<Self> {
        // Zeros, because what no row has written yet is multiplied by a probability of 0.
        let zeros = |run: &HeadRun| {
            let size = [slots, run.n_kv(), capacity, heads.head_dim];
            Tensor::f_zeros(size, (storage.kind, storage.device))
        };
        let layer = || {
            heads.runs.iter().map(|run| Ok(SlotRun { k: zeros(run)?, v: zeros(run)? })).collect()
        };
        Ok(Self { layers: (0..storage.num_hidden_layers).map(|_| layer()).collect::<Result<_>>()? })
    }

    /// Slots, and tokens of each.
    pub(crate) fn size(&self) -> (i64, i64) {
        self.layers.iter().flatten().next().map_or((0, 0), |run| {
            let size = run.k.size();
            (size[0], size[2])
        })
    }

    /// Gives the cache another size, layer by layer; the rows in the slots `0..` keep this many
    /// tokens each. A row that is not there yet has none.
    ///
    /// # Errors
    /// Not enough memory.
    pub(crate) fn resize(&mut self, slots: i64, capacity: i64, lengths: &[i64]) -> Result<()> {
        for run in self.layers.iter_mut().flatten() {
            for store in [&mut run.k, &mut run.v] {
                let size = store.size(); // [slots, KV, L, D]
                let new = store.f_new_zeros(
                    [slots, size[1], capacity, size[3]],
                    (store.kind(), store.device()),
                )?;
                for (slot, &length) in (0..).zip(lengths).filter(|(_, length)| **length > 0) {
                    let row = |store: &Tensor| store.get(slot).narrow(1, 0, length); // (KV, length, D)
                    row(&new).f_copy_(&row(store))?;
                }
                *store = new;
            }
        }
        Ok(())
    }

    /// Puts the row of one slot, which holds `length` tokens, into another slot.
    pub(crate) fn move_row(&mut self, from: usize, to: usize, length: i64) -> Result<()> {
        for run in self.layers.iter().flatten() {
            for store in [&run.k, &run.v] {
                let row = |slot: usize| store.get(slot as i64).narrow(1, 0, length); // (KV, length, D)
                row(to).f_copy_(&row(from))?;
            }
        }
        Ok(())
    }
}

/// Prompts that are read at once: their own tokens lie one behind the other.
#[derive(Debug)]
pub(crate) struct PrefillStep {
    slots: Vec<i64>,
    lengths: Vec<i64>,
    prefix: PrefixUse,
    causal: Vec<Tensor>, // per run: (block x G, block), true above the diagonal
}

/// What one row brings to a step.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StepRow {
    /// Its slot.
    pub(crate) slot: i64,
    /// Prefill: its own new tokens. Decode: its own tokens with the new one.
    pub(crate) length: i64,
    /// Tokens of the prefix that it sees.
    pub(crate) prefix: i64,
}

/// How queries see the prefix.
#[derive(Debug)]
enum PrefixUse {
    /// None of them sees any of it.
    None,
    /// All of them see all of it.
    All,
    /// What each must not see, per run of heads: `(queries x G, P)`.
    Parts(Vec<Tensor>),
}

impl PrefixUse {
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
        prefix.layers[layer][run].attend(q, hidden.as_ref()).map(Some)
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
            prefix: PrefixUse::new(heads, device, &seen, prefix),
            causal: heads.runs.iter().map(per_run).collect(),
        }
    }

    /// Stores the keys and values, and attends.
    ///
    /// # Shapes
    /// q: `(T, H, D)`, k and v: `(T, KV of all runs, D)`, result: `(T, H, D)`.
    pub(crate) fn attend(
        &self,
        cache: &mut SlotCache,
        prefix: Option<&SharedPrefix>,
        heads: &Heads,
        layer: usize,
        [q, k, v]: [&Tensor; 3],
    ) -> Result<Tensor> {
        self.store(&cache.layers[layer], heads, k, v)?;
        if matches!(self.prefix, PrefixUse::None) {
            return causal_attention(heads, q, k, v, &self.lengths);
        }
        let q = q / (heads.head_dim as f64).sqrt();
        let mut results = Vec::with_capacity(heads.runs.len());
        for (index, run) in heads.runs.iter().enumerate() {
            let q = by_kv_head(&q, run); // (KV, T x G, D)
            let [k, v] = [k, v].map(|t| t.narrow(1, run.kv.start, run.n_kv()).transpose(0, 1)); // (KV, T, D)
            let own = self.own_tokens(index, run.group(), [&q, &k, &v])?;
            let mut blocks = Vec::new();
            for (start, length) in blocks_of(q.size()[1], QUERY_BLOCK * run.group()) {
                let q = q.narrow(1, start, length);
                blocks.extend(self.prefix.attend(prefix, (layer, index), &q, start)?);
            }
            let out = Partial::cat(&blocks, 1)?.join(&own); // (KV, T x G, D)
            results.push(by_token(&out, run).to_kind(v.kind())); // (T, KV x G, D)
        }
        one_or_cat(results, 1)
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
    prefix: PrefixUse,
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
            prefix: PrefixUse::new(heads, device, &seen, prefix),
            hidden: heads.runs.iter().map(per_run).collect(),
        }
    }

    /// Stores the keys and values, and attends.
    ///
    /// # Shapes
    /// q: `(B, H, D)`, k and v: `(B, KV of all runs, D)`, result: `(B, H, D)`.
    pub(crate) fn attend(
        &self,
        cache: &mut SlotCache,
        prefix: Option<&SharedPrefix>,
        heads: &Heads,
        layer: usize,
        [q, k, v]: [&Tensor; 3],
    ) -> Result<Tensor> {
        let count = q.size()[0];
        let q = q / (heads.head_dim as f64).sqrt();
        let mut results = Vec::with_capacity(heads.runs.len());
        for (index, run) in heads.runs.iter().enumerate() {
            let store = &mut cache.layers[layer][index];
            self.store(store, run, k, v)?;
            let (n_kv, group) = (run.n_kv(), run.group());
            let own_q =
                q.narrow(1, run.q.start, run.n_q()).reshape([count * n_kv, group, heads.head_dim]); // (B x KV, G, D)
            let [own_k, own_v] = [&store.k, &store.v].map(|t| {
                let in_use = t.narrow(0, 0, count).narrow(2, 0, self.longest); // (B, KV, S, D)
                in_use.view([count * n_kv, self.longest, heads.head_dim]) // (B x KV, S, D)
            });
            let own = Partial::new(&own_q, &own_k, &own_v, self.hidden[index].as_ref())?;
            let shared = self.prefix.attend(prefix, (layer, index), &by_kv_head(&q, run), 0)?;
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
            results.push(out.view([count, n_kv * group, -1]).to_kind(v.kind())); // (B, KV x G, D)
        }
        one_or_cat(results, 1)
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
