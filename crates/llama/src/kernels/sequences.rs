//! Attention of rows to a shared prefix and to their own tokens.

// Shapes: T = new tokens of all rows, H = query heads, KV = K/V heads, G = query heads of a K/V head,
// D = head_dim, E = D in whole units, P = tokens of the prefix, L = capacity of a slot.

use std::{
    ops::Range,
    sync::{Mutex, PoisonError},
};

use dromedary_torch_ext::{F32Buffer, Rows};
use tch::Tensor;

use super::{
    Kernels,
    attend::{AttendKeys, HeadKeys, HeadLayout, Join, Partial, Scores, Seen},
    simd::even_parts,
    tasks,
};
use crate::{Result, heads::Heads};

/// Keys of the prefix that one task attends to: two blocks. The results of tasks are joined in the
/// order of the keys, so that they do not depend on the number of threads.
const SPLIT: usize = 640;

/// Tokens whose queries pass over the keys together.
const TOKENS: usize = 32;

/// Tokens whose results for the prefix are held at once; bounds their memory.
const WAVE: usize = 256;

/// Keys and values in one layer: of the rows' own tokens, or of a prefix, which is one slot.
#[derive(Debug)]
pub(crate) struct SlotKeys {
    keys: F32Buffer,   // (slots, KV, L / 16, D, 16)
    values: F32Buffer, // (slots, KV, L, E)
    layout: HeadLayout,
    capacity: usize,
    n_kv: usize,
}

impl SlotKeys {
    pub(crate) fn new(heads: &Heads, slots: usize, capacity: usize) -> Result<Self> {
        let (layout, n_kv) = (layout(heads), heads.n_local_kv_heads() as usize);
        let buffer = |len: usize| F32Buffer::zeros(&[slots as i64, n_kv as i64, len as i64]);
        Ok(Self {
            keys: buffer(layout.keys_len(capacity))?,
            values: buffer(layout.values_len(capacity))?,
            layout,
            capacity,
            n_kv,
        })
    }

    /// Slots, and tokens of each.
    pub(crate) fn size(&self) -> (i64, i64) {
        (self.keys.size()[0], self.capacity as i64)
    }

    /// The same rows in a cache of another size; the slots `0..` keep this many tokens each.
    pub(crate) fn resized(&self, slots: usize, capacity: usize, lengths: &[i64]) -> Result<Self> {
        let size = |len: usize| [slots as i64, self.n_kv as i64, len as i64];
        let mut new = Self {
            keys: F32Buffer::zeros(&size(self.layout.keys_len(capacity)))?,
            values: F32Buffer::zeros(&size(self.layout.values_len(capacity)))?,
            capacity,
            ..*self
        };
        for (slot, &length) in lengths.iter().enumerate().filter(|(_, length)| **length > 0) {
            new.copy_slot((self, slot), slot, length as usize);
        }
        Ok(new)
    }

    /// Puts the first `length` tokens of a prefix into a slot.
    pub(crate) fn copy_row(&mut self, prefix: &Self, slot: usize, length: usize) {
        self.copy_slot((prefix, 0), slot, length);
    }

    /// Copies `length` tokens of a slot of another cache of the same heads.
    fn copy_slot(&mut self, (from, from_slot): (&Self, usize), slot: usize, length: usize) {
        for kv in 0..self.n_kv {
            let own = from.stored().head(from_slot, kv, length);
            let [keys, values] = self.stored().ranges(slot, kv, length);
            self.keys.values_mut()[keys].copy_from_slice(own.keys);
            self.values.values_mut()[values].copy_from_slice(own.values);
        }
    }

    /// Puts the row of one slot, which holds `length` tokens, into another slot.
    pub(crate) fn move_row(&mut self, from: usize, to: usize, length: usize) {
        for kv in 0..self.n_kv {
            let [keys, values] = self.stored().ranges(from, kv, length);
            let [to_keys, to_values] = self.stored().ranges(to, kv, length);
            self.keys.values_mut().copy_within(keys, to_keys.start);
            self.values.values_mut().copy_within(values, to_values.start);
        }
    }

    fn stored(&self) -> Stored<'_> {
        Stored {
            keys: self.keys.values(),
            values: self.values.values(),
            layout: self.layout,
            capacity: self.capacity,
            n_kv: self.n_kv,
        }
    }
}

/// What [`SlotKeys`] hold, as threads read it.
#[derive(Debug, Clone, Copy)]
struct Stored<'a> {
    keys: &'a [f32],
    values: &'a [f32],
    layout: HeadLayout,
    capacity: usize,
    n_kv: usize,
}

impl<'a> Stored<'a> {
    /// The first `length` tokens of a head of a slot.
    fn head(&self, slot: usize, kv: usize, length: usize) -> HeadKeys<'a> {
        let [keys, values] = self.ranges(slot, kv, length);
        HeadKeys { keys: &self.keys[keys], values: &self.values[values] }
    }

    /// Where the first `length` tokens of a head of a slot are.
    fn ranges(&self, slot: usize, kv: usize, length: usize) -> [Range<usize>; 2] {
        let index = slot * self.n_kv + kv;
        let keys = index * self.layout.keys_len(self.capacity);
        let values = index * self.layout.values_len(self.capacity);
        [keys..keys + self.layout.keys_len(length), values..values + self.layout.values_len(length)]
    }
}

fn layout(heads: &Heads) -> HeadLayout {
    HeadLayout { head_dim: heads.head_dim as usize }
}

/// What one row brings to a step.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sequence {
    /// Its slot.
    pub(crate) slot: usize,
    /// Its new tokens.
    pub(crate) new: usize,
    /// Its own tokens with the new ones.
    pub(crate) total: usize,
    /// Tokens of the prefix that it sees.
    pub(crate) prefix: usize,
}

impl Sequence {
    /// A row alone, all of whose tokens are new.
    pub(crate) fn whole(tokens: usize) -> Self {
        Self { slot: 0, new: tokens, total: tokens, prefix: 0 }
    }
}

/// New tokens of some rows, which lie one behind the other.
#[derive(Debug)]
pub(crate) struct FusedStep {
    kernels: Kernels,
    sequences: Vec<Sequence>,
    /// Tokens of a row that are computed together: index of the row, and which of its new tokens.
    pieces: Vec<Piece>,
    /// For each new token the prefix tokens that it sees.
    seen: Vec<usize>,
    queries: Vec<f32>,  // (KV, T of a wave, G, D), scaled
    partials: Vec<f32>, // for the prefix
}

#[derive(Debug, Clone)]
struct Piece {
    sequence: usize,
    /// Among the row's new tokens.
    tokens: Range<usize>,
    /// The first of them among all new tokens.
    first: usize,
}

/// One K/V head and its query heads.
#[derive(Debug, Clone, Copy)]
struct Group {
    kv: usize,
    q: usize,
    size: usize,
    /// Where its queries begin in a wave of one token.
    start: usize,
}

/// What a thread needs for itself.
struct Scratch {
    scores: Scores,
    partial: Vec<f32>,
    limits: Vec<usize>,
    weights: Vec<f32>,
}

impl Scratch {
    fn new() -> Self {
        Self { scores: Scores::new(), partial: Vec::new(), limits: Vec::new(), weights: Vec::new() }
    }
}

impl FusedStep {
    pub(crate) fn new(kernels: Kernels, sequences: Vec<Sequence>) -> Self {
        let mut pieces = Vec::new();
        let mut seen = Vec::new();
        for (index, sequence) in sequences.iter().enumerate() {
            let first = seen.len();
            pieces.extend(even_parts(sequence.new, TOKENS).map(|tokens| Piece {
                sequence: index,
                first: first + tokens.start,
                tokens,
            }));
            seen.extend(std::iter::repeat_n(sequence.prefix, sequence.new));
        }
        Self { kernels, sequences, pieces, seen, queries: Vec::new(), partials: Vec::new() }
    }

    /// Attends to the prefix and to the rows' own tokens, which have been stored.
    ///
    /// # Shapes
    /// q: `(T, H, D)`, result: `(T, H, D)`.
    pub(crate) fn attend(
        &mut self,
        heads: &Heads,
        slots: &SlotKeys,
        prefix: Option<&SlotKeys>,
        q: &Tensor,
    ) -> Result<Tensor> {
        let mut out = F32Buffer::unfilled(&q.size())?;
        let q = Rows::of(q)?;
        let groups = groups(heads);
        let mut pieces = &self.pieces[..];
        let (mut queries, mut partials) =
            (std::mem::take(&mut self.queries), std::mem::take(&mut self.partials));
        while let Some(first) = pieces.first() {
            let first = first.first;
            let count = pieces.partition_point(|piece| piece.first < first + WAVE);
            let (wave, rest) = pieces.split_at(count);
            pieces = rest;
            let end = rest.first().map_or(self.seen.len(), |piece| piece.first);
            let mut of_wave = Wave {
                step: self,
                layout: slots.layout,
                groups: &groups,
                prefix: prefix.map(SlotKeys::stored),
                tokens: first..end,
                chunks: chunks(wave, first),
                queries: &mut queries,
                partials: &mut partials,
            };
            of_wave.gather(&q);
            of_wave.attend_prefix()?;
            let out = &mut out.values_mut()[first * q.width()..end * q.width()];
            of_wave.attend_own(slots.stored(), wave, out)?;
        }
        (self.queries, self.partials) = (queries, partials);
        Ok(out.into_tensor())
    }

    /// Stores the keys and values of the new tokens.
    ///
    /// # Shapes
    /// k and v: `(T, KV, D)`.
    pub(crate) fn store(&self, slots: &mut SlotKeys, [k, v]: [&Tensor; 2]) -> Result<()> {
        let (k, v) = (Rows::of(k)?, Rows::of(v)?);
        let (layout, n_kv) = (slots.layout, slots.n_kv);
        let keys = slots.keys.values_mut().chunks_mut(layout.keys_len(slots.capacity).max(1));
        let values = slots.values.values_mut().chunks_mut(layout.values_len(slots.capacity).max(1));
        let mut places: Vec<_> = keys.zip(values).map(Some).collect();
        let mut tasks = Vec::with_capacity(self.sequences.len() * n_kv);
        let mut first = 0;
        for sequence in &self.sequences {
            for kv in (0..n_kv).filter(|_| sequence.new > 0) {
                let place = places[sequence.slot * n_kv + kv].take();
                tasks.extend(place.map(|place| (sequence, kv, first, place)));
            }
            first += sequence.new;
        }
        tasks::run(
            tasks,
            || (),
            |(), (sequence, kv, first, (keys, values))| {
                for token in 0..sequence.new {
                    let row = |rows: &Rows<'_>| {
                        let at = (first + token) * rows.stride() + kv * layout.head_dim;
                        at..at + layout.head_dim
                    };
                    let new = [&k.values()[row(&k)], &v.values()[row(&v)]];
                    layout.put(
                        sequence.total - sequence.new + token,
                        new,
                        [&mut *keys, &mut *values],
                    );
                }
            },
        )
    }
}

fn groups(heads: &Heads) -> Vec<Group> {
    let mut groups = Vec::new();
    let mut start = 0;
    for run in &heads.runs {
        for kv in run.kv.clone() {
            let size = run.group() as usize;
            let q = (run.q.start + (kv - run.kv.start) * run.group()) as usize;
            groups.push(Group { kv: kv as usize, q, size, start });
            start += size * heads.head_dim as usize;
        }
    }
    groups
}

/// The tokens of a step that are computed at once.
struct Wave<'a> {
    step: &'a FusedStep,
    layout: HeadLayout,
    groups: &'a [Group],
    prefix: Option<Stored<'a>>,
    tokens: Range<usize>,
    /// Tokens of the wave whose queries pass over the prefix together.
    chunks: Vec<Range<usize>>,
    queries: &'a mut Vec<f32>,
    partials: &'a mut Vec<f32>,
}

/// A part of the attention to the prefix: one head, some queries, some keys.
struct PrefixTask<'a> {
    group: Group,
    tokens: Range<usize>,
    keys: Range<usize>,
    partial: &'a mut [f32],
}

impl Wave<'_> {
    fn len(&self) -> usize {
        self.tokens.end - self.tokens.start
    }

    /// Queries of a head, from a token of the wave on.
    fn queries(&self, group: &Group, first: usize) -> &[f32] {
        let start = group.start * self.len() + first * group.size * self.layout.head_dim;
        &self.queries[start..(group.start + group.size * self.layout.head_dim) * self.len()]
    }

    /// Puts the queries of each head together, scaled.
    fn gather(&mut self, q: &Rows<'_>) {
        let head_dim = self.layout.head_dim;
        let scale = (head_dim as f32).sqrt();
        self.queries.clear();
        for group in self.groups {
            for token in self.tokens.clone() {
                let of_group = &q.row(token)[group.q * head_dim..][..group.size * head_dim];
                self.queries.extend(of_group.iter().map(|value| value / scale));
            }
        }
    }

    /// The largest number of prefix tokens that any token of the wave sees.
    fn longest(&self) -> usize {
        self.step.seen[self.tokens.clone()].iter().copied().max().unwrap_or(0)
    }

    /// Length of the results of a group for one part of the prefix.
    fn partial_len(&self, group: &Group) -> usize {
        Partial::len(self.len() * group.size, self.layout)
    }

    /// What the piece has seen in one part of the prefix, of which `memory` holds the results.
    fn seen_of<'m>(&self, memory: &'m [f32], group: &Group, first: usize) -> Seen<'m> {
        let chunk = &self.chunks[self.chunks.partition_point(|chunk| chunk.end <= first)];
        let at = |token: usize| Partial::len(token * group.size, self.layout);
        let queries = (chunk.end - chunk.start) * group.size;
        Seen::new(&memory[at(chunk.start)..at(chunk.end)], queries)
            .from((first - chunk.start) * group.size)
    }

    /// Attends to the prefix; the results are `(KV, parts of the prefix)`, each of all tokens.
    fn attend_prefix(&mut self) -> Result<()> {
        let Some(prefix) = self.prefix else { return Ok(()) };
        let parts: Vec<Range<usize>> = split(self.longest());
        let total =
            parts.len() * self.groups.iter().map(|group| self.partial_len(group)).sum::<usize>();
        let mut partials = std::mem::take(self.partials);
        partials.resize(total.max(partials.len()), 0.0);
        let mut memory = &mut partials[..total];
        let mut tasks = Vec::new();
        for &group in self.groups {
            for keys in &parts {
                for tokens in self.chunks.iter().cloned() {
                    let queries = (tokens.end - tokens.start) * group.size;
                    let (partial, rest) = memory.split_at_mut(Partial::len(queries, self.layout));
                    memory = rest;
                    tasks.push(PrefixTask { group, tokens, keys: keys.clone(), partial });
                }
            }
        }
        tasks::run(tasks, Scratch::new, |scratch, task: PrefixTask<'_>| {
            let group = task.group;
            let tokens = self.tokens.start + task.tokens.start..self.tokens.start + task.tokens.end;
            scratch.limits.clear();
            for &seen in &self.step.seen[tokens] {
                scratch.limits.extend(std::iter::repeat_n(seen, group.size));
            }
            self.step.kernels.level.run(AttendKeys {
                layout: self.layout,
                queries: self.queries(&group, task.tokens.start),
                head: prefix.head(0, group.kv, prefix.capacity),
                range: task.keys,
                limits: &scratch.limits,
                partial: &mut Partial::start(task.partial, scratch.limits.len()),
                scores: &mut scratch.scores,
            });
        })?;
        *self.partials = partials;
        Ok(())
    }

    /// Attends to the rows' own tokens, and joins with what was seen of the prefix.
    fn attend_own(&self, slots: Stored<'_>, pieces: &[Piece], out: &mut [f32]) -> Result<()> {
        let parts = if self.prefix.is_some() { split(self.longest()).len() } else { 0 };
        let width = out.len() / self.len();
        let mut tasks = Vec::with_capacity(pieces.len() * self.groups.len());
        let mut starts = 0;
        for group in self.groups {
            tasks.extend(pieces.iter().map(|piece| (group, piece, starts)));
            starts += parts * self.partial_len(group);
        }
        let out = Mutex::new(out);
        tasks::run(tasks, Scratch::new, |scratch, (group, piece, start)| {
            let result = self.attend_piece(slots, (group, piece), start, parts, scratch);
            let (first, head_dim) = (piece.first - self.tokens.start, self.layout.head_dim);
            let mut out = out.lock().unwrap_or_else(PoisonError::into_inner);
            let rows = out[first * width..].chunks_exact_mut(width);
            for (row, result) in rows.zip(result.chunks_exact(group.size * head_dim)) {
                row[group.q * head_dim..][..result.len()].copy_from_slice(result);
            }
        })
    }

    /// The attention of a piece, `(tokens, G, D)`.
    fn attend_piece(
        &self,
        slots: Stored<'_>,
        (group, piece): (&Group, &Piece),
        start: usize,
        parts: usize,
        scratch: &mut Scratch,
    ) -> Vec<f32> {
        let sequence = &self.step.sequences[piece.sequence];
        let before = sequence.total - sequence.new;
        scratch.limits.clear();
        for token in piece.tokens.clone() {
            scratch.limits.extend(std::iter::repeat_n(before + token + 1, group.size));
        }
        let queries = scratch.limits.len();
        let first = piece.first - self.tokens.start;
        scratch.partial.resize(Partial::len(queries, self.layout), 0.0);
        self.step.kernels.level.run(AttendKeys {
            layout: self.layout,
            queries: self.queries(group, first),
            head: slots.head(sequence.slot, group.kv, sequence.total),
            range: 0..sequence.total,
            limits: &scratch.limits,
            partial: &mut Partial::start(&mut scratch.partial, queries),
            scores: &mut scratch.scores,
        });
        let mut seen = Vec::with_capacity(parts + 1);
        let len = self.partial_len(group);
        for part in 0..parts {
            let memory = &self.partials[start + part * len..][..len];
            seen.push(self.seen_of(memory, group, first));
        }
        seen.push(Seen::new(&scratch.partial, queries));
        let mut out = vec![0.0; queries * self.layout.head_dim];
        let weights = &mut scratch.weights;
        self.step.kernels.level.run(Join {
            layout: self.layout,
            parts: &seen,
            out: &mut out,
            weights,
        });
        out
    }
}

/// The parts of a prefix that are attended to by one task each.
fn split(prefix: usize) -> Vec<Range<usize>> {
    (0..prefix).step_by(SPLIT).map(|start| start..prefix.min(start + SPLIT)).collect()
}

/// Neighbouring pieces together, up to so many tokens as pass over the prefix at once.
fn chunks(pieces: &[Piece], first: usize) -> Vec<Range<usize>> {
    let mut chunks: Vec<Range<usize>> = Vec::new();
    for piece in pieces {
        let start = piece.first - first;
        let end = start + piece.tokens.end - piece.tokens.start;
        match chunks.last_mut() {
            Some(last) if end - last.start <= TOKENS => last.end = end,
            _ => chunks.push(start..end),
        }
    }
    chunks
}
