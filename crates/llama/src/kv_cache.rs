//! Keys and values of a forward pass: one shared prefix for all rows, and a slot for each row.

// Shapes: B = rows, T = tokens of all rows, H = query heads, KV = K/V heads of a run, G = query heads
// per K/V head, D = head_dim, P = tokens of the prefix, L = capacity of a slot, S = keys in use.

mod portable;

use tch::{Device, Kind, Tensor};

use crate::{
    Result,
    attention::{Partial, causal_attention, one_or_cat},
    heads::{HeadRun, Heads},
    kernels::{FusedStep, Kernels, Sequence, SlotKeys},
};

pub(crate) use portable::{DecodeStep, PrefillStep};

/// Where and in which kind keys and values are kept.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Storage {
    pub(crate) device: Device,
    pub(crate) kind: Kind,
    pub(crate) num_hidden_layers: usize,
    /// What attends; libtorch's operations where there are none.
    pub(crate) kernels: Option<Kernels>,
}

/// Keys and values of a token prefix, one copy for all rows.
///
/// Each row may see a part of it from the start: its own tokens then begin behind that part.
#[derive(Debug)]
pub struct SharedPrefix {
    tokens: Vec<u32>,
    layers: Vec<PrefixLayer>,
}

/// One layer of a prefix.
#[derive(Debug)]
enum PrefixLayer {
    /// By run of heads, for libtorch's operations.
    Runs(Vec<PrefixRun>),
    /// For this crate's kernels.
    Fused(SlotKeys),
}

/// One run of heads of one layer of a prefix.
#[derive(Debug)]
struct PrefixRun {
    k: Tensor, // (KV, P, D)
    v: Tensor, // (KV, P, D)
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
        if let Some(kernels) = storage.kernels {
            self.layers.push(PrefixLayer::Fused(kernels.prefix(heads, [k, v])?));
            return Ok(());
        }
        let by_head = |t: &Tensor, run: &HeadRun| {
            t.narrow(1, run.kv.start, run.n_kv()).transpose(0, 1).contiguous() // (KV, P, D)
        };
        let run = |run: &HeadRun| PrefixRun { k: by_head(k, run), v: by_head(v, run) };
        self.layers.push(PrefixLayer::Runs(heads.runs.iter().map(run).collect()));
        Ok(())
    }

    /// The attention among the prefix's own tokens in the layer that was added last.
    ///
    /// # Shapes
    /// q: `(P, H, D)`, k and v: as they were added, result: `(P, H, D)`.
    pub(crate) fn attend_within(
        &self,
        heads: &Heads,
        storage: &Storage,
        [q, k, v]: [&Tensor; 3],
    ) -> Result<Tensor> {
        match (storage.kernels, self.layers.last()) {
            (Some(kernels), Some(PrefixLayer::Fused(keys))) => {
                kernels.attend_within(heads, keys, q)
            }
            _ => causal_attention(heads, q, k, v, &[self.len() as i64]),
        }
    }

    fn fused(&self, layer: usize) -> Option<&SlotKeys> {
        match &self.layers[layer] {
            PrefixLayer::Fused(keys) => Some(keys),
            PrefixLayer::Runs(_) => None,
        }
    }

    /// q: `(KV, M, D)` scaled, hidden: `(M, P)`; the result has N = KV.
    fn attend(
        &self,
        (layer, run): (usize, usize),
        q: &Tensor,
        hidden: Option<&Tensor>,
    ) -> Result<Option<Partial>> {
        match &self.layers[layer] {
            PrefixLayer::Runs(runs) => {
                Partial::new(q, &runs[run].k, &runs[run].v, hidden).map(Some)
            }
            PrefixLayer::Fused(_) => Ok(None),
        }
    }
}

/// Keys and values of the rows' own tokens: one slot of fixed capacity for each row.
#[derive(Debug)]
pub struct SlotCache {
    layers: Vec<SlotLayer>,
    kernels: Option<Kernels>,
}

/// One layer of the slots.
#[derive(Debug)]
enum SlotLayer {
    /// By run of heads, for libtorch's operations.
    Runs(Vec<SlotRun>),
    /// For this crate's kernels.
    Fused(SlotKeys),
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
        let layer = |_| {
            if storage.kernels.is_some() {
                return Ok(SlotLayer::Fused(SlotKeys::new(
                    heads,
                    slots as usize,
                    capacity as usize,
                )?));
            }
            let runs = heads.runs.iter().map(|run| Ok(SlotRun { k: zeros(run)?, v: zeros(run)? }));
            Ok(SlotLayer::Runs(runs.collect::<Result<_>>()?))
        };
        let layers = (0..storage.num_hidden_layers).map(layer).collect::<Result<_>>()?;
        Ok(Self { layers, kernels: storage.kernels })
    }

    /// Slots, and tokens of each.
    pub(crate) fn size(&self) -> (i64, i64) {
        self.layers.first().map_or((0, 0), |layer| match layer {
            SlotLayer::Fused(keys) => keys.size(),
            SlotLayer::Runs(runs) => runs.first().map_or((0, 0), |run| {
                let size = run.k.size();
                (size[0], size[2])
            }),
        })
    }

    /// Gives the cache another size, layer by layer; the rows in the slots `0..` keep this many
    /// tokens each. A row that is not there yet has none.
    ///
    /// # Errors
    /// Not enough memory.
    pub(crate) fn resize(&mut self, slots: i64, capacity: i64, lengths: &[i64]) -> Result<()> {
        for layer in &mut self.layers {
            match layer {
                SlotLayer::Fused(keys) => {
                    *keys = keys.resized(slots as usize, capacity as usize, lengths)?;
                }
                SlotLayer::Runs(runs) => {
                    for run in runs {
                        run.resize(slots, capacity, lengths)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Copies the first tokens of a prefix to the beginning of a slot; only this crate's kernels attend
    /// to a slot that has them.
    pub(crate) fn copy_prefix(&mut self, prefix: &SharedPrefix, slot: usize, tokens: usize) {
        for (layer, slots) in self.layers.iter_mut().enumerate() {
            if let (SlotLayer::Fused(slots), Some(prefix)) = (slots, prefix.fused(layer)) {
                slots.copy_row(prefix, slot, tokens);
            }
        }
    }

    /// Puts the row of one slot, which holds `length` tokens, into another slot.
    pub(crate) fn move_row(&mut self, from: usize, to: usize, length: i64) -> Result<()> {
        for layer in &mut self.layers {
            match layer {
                SlotLayer::Fused(keys) => keys.move_row(from, to, length as usize),
                SlotLayer::Runs(runs) => {
                    for store in runs.iter().flat_map(|run| [&run.k, &run.v]) {
                        let row = |slot: usize| store.get(slot as i64).narrow(1, 0, length); // (KV, length, D)
                        row(to).f_copy_(&row(from))?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Empties a slot in which numbers are not finite. libtorch's operations multiply what lies behind a
    /// row's last token by a probability of 0, which such numbers survive; this crate's kernels read no
    /// further than the row.
    pub(crate) fn clear(&mut self, slot: usize) -> Result<()> {
        for layer in &self.layers {
            let SlotLayer::Runs(runs) = layer else { continue };
            for store in runs.iter().flat_map(|run| [&run.k, &run.v]) {
                let _ = store.get(slot as i64).f_zero_()?; // (KV, L, D)
            }
        }
        Ok(())
    }

    fn runs(&mut self, layer: usize) -> &mut [SlotRun] {
        match &mut self.layers[layer] {
            SlotLayer::Runs(runs) => runs,
            SlotLayer::Fused(_) => &mut [],
        }
    }
}

impl SlotRun {
    fn resize(&mut self, slots: i64, capacity: i64, lengths: &[i64]) -> Result<()> {
        for store in [&mut self.k, &mut self.v] {
            let size = store.size(); // [slots, KV, L, D]
            let new = store
                .f_new_zeros([slots, size[1], capacity, size[3]], (store.kind(), store.device()))?;
            for (slot, &length) in (0..).zip(lengths).filter(|(_, length)| **length > 0) {
                let row = |store: &Tensor| store.get(slot).narrow(1, 0, length); // (KV, length, D)
                row(&new).f_copy_(&row(store))?;
            }
            *store = new;
        }
        Ok(())
    }
}

/// What one layer gives to the attention of a step.
///
/// # Shapes
/// q: `(T, H, D)`, k and v: `(T, KV of all runs, D)`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LayerStep<'a> {
    pub(crate) layer: usize,
    pub(crate) heads: &'a Heads,
    pub(crate) prefix: Option<&'a SharedPrefix>,
    pub(crate) q: &'a Tensor,
    pub(crate) k: &'a Tensor,
    pub(crate) v: &'a Tensor,
}

impl LayerStep<'_> {
    /// Attends run by run, with q scaled, and joins the results of the runs, `(T, H of the run, D)`.
    fn by_run(
        &self,
        mut attend: impl FnMut(usize, &HeadRun, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let q = self.q / (self.heads.head_dim as f64).sqrt();
        let runs = self.heads.runs.iter().enumerate();
        one_or_cat(runs.map(|(index, run)| attend(index, run, &q)).collect::<Result<_>>()?, 1)
    }
}

/// New tokens of some rows, on the path of the cache that they go to.
#[derive(Debug)]
pub(crate) enum Step {
    /// Prompts, by libtorch's operations.
    Prefill(PrefillStep),
    /// One token of each row, by libtorch's operations.
    Decode(DecodeStep),
    /// Either, by this crate's kernels.
    Fused(FusedStep),
}

impl Step {
    /// Prompts that are read at once.
    pub(crate) fn prefill(
        cache: &SlotCache,
        heads: &Heads,
        device: Device,
        rows: &[StepRow],
        prefix: Option<&SharedPrefix>,
    ) -> Self {
        match cache.kernels {
            Some(kernels) => {
                Self::Fused(FusedStep::new(kernels, rows.iter().map(Sequence::from).collect()))
            }
            None => Self::Prefill(PrefillStep::new(heads, device, rows, prefix)),
        }
    }

    /// One new token for each of the rows, which are in the order of their slots, `0..B`. With
    /// libtorch's operations they read `keys` of their slots' keys at least, whatever their lengths;
    /// the kernels' results do not depend on it.
    pub(crate) fn decode(
        cache: &SlotCache,
        heads: &Heads,
        device: Device,
        rows: &[StepRow],
        prefix: Option<&SharedPrefix>,
        keys: i64,
    ) -> Self {
        match cache.kernels {
            Some(kernels) => {
                Self::Fused(FusedStep::new(kernels, rows.iter().map(Sequence::from).collect()))
            }
            None => Self::Decode(DecodeStep::new(heads, device, rows, prefix, keys)),
        }
    }

    /// Stores the keys and values of a layer, and attends: `(T, H, D)`.
    pub(crate) fn attend(&mut self, cache: &mut SlotCache, of: LayerStep<'_>) -> Result<Tensor> {
        match (self, &mut cache.layers[of.layer]) {
            (Self::Fused(step), SlotLayer::Fused(slots)) => {
                let prefix = of.prefix.and_then(|prefix| prefix.fused(of.layer));
                step.store(slots, [of.k, of.v])?;
                step.attend(of.heads, slots, prefix, of.q)
            }
            (Self::Prefill(step), _) => step.attend(cache, of),
            (Self::Decode(step), _) => step.attend(cache, of),
            (Self::Fused(_), SlotLayer::Runs(_)) => unreachable!("a step is made for its cache"),
        }
    }
}

impl From<&StepRow> for Sequence {
    fn from(row: &StepRow) -> Self {
        Self {
            slot: row.slot as usize,
            new: row.new as usize,
            total: row.length as usize,
            prefix: row.prefix as usize,
        }
    }
}

/// What one row brings to a step.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StepRow {
    /// Its slot.
    pub(crate) slot: i64,
    /// Its new tokens: one, or those of its prompt.
    pub(crate) new: i64,
    /// Its own tokens with the new ones.
    pub(crate) length: i64,
    /// Tokens of the prefix that it sees.
    pub(crate) prefix: i64,
}
