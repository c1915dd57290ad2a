//! Attention of many queries to the keys of one K/V head, in one pass over the keys.
//!
//! A query's result is made of the same numbers in the same order whatever other queries are
//! computed beside it, so a row's result does not depend on its batch.

// Shapes: M = queries, D = head_dim, E = D rounded up to whole units, S = keys.

use std::ops::Range;

use super::simd::{Columns, Kernel, MAX_ROWS, MAX_UNITS, Product, Simd, UNIT, Units, even_parts};

/// Keys that are scored before their values are mixed: with their values they stay in the cache
/// while all queries pass over them.
pub(crate) const BLOCK: usize = 320;

/// Tiles of queries that share the fetching of a block's keys, and of its values.
const FETCHING_TILES: usize = 4;

/// The largest score of a query that has seen no key: finite, so that no `inf - inf` arises.
const NO_KEY: f32 = -1e30;

/// How the keys and values of a head lie in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct HeadLayout {
    pub(crate) head_dim: usize,
}

impl HeadLayout {
    /// E: the length of a row of values.
    pub(crate) fn value_len(self) -> usize {
        self.head_dim.next_multiple_of(UNIT)
    }

    /// Length of the keys of `tokens` tokens.
    pub(crate) fn keys_len(self, tokens: usize) -> usize {
        tokens.next_multiple_of(UNIT) * self.head_dim
    }

    /// Length of the values of `tokens` tokens.
    pub(crate) fn values_len(self, tokens: usize) -> usize {
        tokens * self.value_len()
    }

    /// Where feature 0 of a token's key is; the next feature is 16 further.
    fn key(self, token: usize) -> usize {
        token / UNIT * UNIT * self.head_dim + token % UNIT
    }

    /// Puts the key and the value of a token in their places.
    pub(crate) fn put(self, token: usize, [k, v]: [&[f32]; 2], into: [&mut [f32]; 2]) {
        let [keys, values] = into;
        let places = keys[self.key(token)..].iter_mut().step_by(UNIT);
        for (place, &feature) in places.zip(k) {
            *place = feature;
        }
        values[token * self.value_len()..][..v.len()].copy_from_slice(v);
    }
}

/// Keys and values of one K/V head.
#[derive(Clone, Copy)]
pub(crate) struct HeadKeys<'a> {
    pub(crate) keys: &'a [f32],   // (S / 16, D, 16)
    pub(crate) values: &'a [f32], // (S, E)
}

/// The attention of M queries to the keys seen so far.
pub(crate) struct Partial<'a> {
    out: &'a mut [f32], // (M, E), not divided by the sum
    max: &'a mut [f32], // (M)
    sum: &'a mut [f32], // (M)
}

impl<'a> Partial<'a> {
    /// Length of the memory that M queries need.
    pub(crate) fn len(queries: usize, layout: HeadLayout) -> usize {
        queries * (layout.value_len() + 2)
    }

    /// No key seen yet.
    pub(crate) fn start(memory: &'a mut [f32], queries: usize) -> Self {
        let (out, rest) = memory.split_at_mut(memory.len() - 2 * queries);
        let (max, sum) = rest.split_at_mut(queries);
        out.fill(0.0);
        max.fill(NO_KEY);
        sum.fill(0.0);
        Self { out, max, sum }
    }
}

/// What [`Partial`] has left in its memory.
#[derive(Clone, Copy)]
pub(crate) struct Seen<'a> {
    out: &'a [f32],
    max: &'a [f32],
    sum: &'a [f32],
}

impl<'a> Seen<'a> {
    pub(crate) fn new(memory: &'a [f32], queries: usize) -> Self {
        let (out, rest) = memory.split_at(memory.len() - 2 * queries);
        let (max, sum) = rest.split_at(queries);
        Self { out, max, sum }
    }

    /// The part from the query `first` on.
    pub(crate) fn from(self, first: usize) -> Self {
        let value_len = self.out.len() / self.max.len();
        Self {
            out: &self.out[first * value_len..],
            max: &self.max[first..],
            sum: &self.sum[first..],
        }
    }
}

/// Adds a range of keys, not longer than [`BLOCK`] or starting at a multiple of it, to what queries
/// have seen.
pub(crate) struct AttendKeys<'a, 'm> {
    pub(crate) layout: HeadLayout,
    pub(crate) queries: &'a [f32], // (M, D), scaled
    pub(crate) head: HeadKeys<'a>,
    pub(crate) range: Range<usize>,
    /// For each query: the first key that it does not see.
    pub(crate) limits: &'a [usize],
    pub(crate) partial: &'a mut Partial<'m>,
    pub(crate) scores: &'a mut Scores,
}

/// Memory for the scores of one tile of queries.
pub(crate) struct Scores(Box<[f32; MAX_ROWS * BLOCK]>);

impl Scores {
    pub(crate) fn new() -> Self {
        Self(Box::new([0.0; MAX_ROWS * BLOCK]))
    }
}

impl Kernel for AttendKeys<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        for start in self.range.clone().step_by(BLOCK) {
            let end = self.range.end.min(start + BLOCK);
            for (tile, rows) in even_parts(self.limits.len(), MAX_ROWS).enumerate() {
                let sees = self.limits[rows.clone()].iter().copied().max().unwrap_or(0);
                if sees > start {
                    self.tile(simd, (tile, rows), start..end.min(sees));
                }
            }
        }
    }
}

impl<'a> AttendKeys<'a, '_> {
    /// The keys and values of the block behind the one that begins at `start`.
    #[inline(always)]
    fn next_block(&self, start: usize) -> Option<HeadKeys<'a>> {
        let start = start + BLOCK;
        if start >= self.range.end {
            return None;
        }
        let HeadKeys { keys, values } = self.head;
        Some(HeadKeys {
            keys: &keys[start * self.layout.head_dim..],
            values: &values[start * self.layout.value_len()..],
        })
    }

    #[inline(always)]
    fn tile<S: Simd>(&mut self, simd: S, (tile, rows): (usize, Range<usize>), keys: Range<usize>) {
        let (depth, value_len) = (self.layout.head_dim, self.layout.value_len());
        let (count, length) = (rows.end - rows.start, keys.end - keys.start);
        let panel = UNIT * depth;
        // Tiles that are evenly apart fetch a share of what comes next each, so that memory is asked for
        // steadily: keys while they score, values while they mix.
        let apart = (self.limits.len().div_ceil(MAX_ROWS) / FETCHING_TILES).max(1);
        let share = tile / apart;
        let fetches = tile % apart == 0 && share < FETCHING_TILES;
        let next = self.next_block(keys.start).filter(|_| fetches);
        let queries = &self.queries[rows.start * depth..];
        let mut scores = Columns::of(&mut self.scores.0[..], BLOCK);
        for unit in (0..length.div_ceil(UNIT)).step_by(MAX_UNITS) {
            let values = &self.head.keys[(keys.start / UNIT + unit) * panel..];
            let at = (share * (BLOCK / UNIT / MAX_UNITS) + unit / MAX_UNITS) * panel;
            let fetch = next.and_then(|next| next.keys.get(at..));
            Product {
                a: queries,
                a_row: depth,
                a_step: 1,
                b: Units { values, row: UNIT, unit: panel },
                depth,
                accumulate: false,
                fetch: fetch.map(|values| (Units { values, row: UNIT, unit: UNIT }, 1)),
            }
            .run(
                simd,
                &mut scores,
                (0..count, MAX_UNITS.min(length.div_ceil(UNIT) - unit)),
                unit * UNIT,
            );
        }
        for (row, scores) in rows.clone().zip(self.scores.0.chunks_exact_mut(BLOCK)) {
            let sees = self.limits[row].clamp(keys.start, keys.end) - keys.start;
            let out = &mut self.partial.out[row * value_len..][..value_len];
            softmax(
                simd,
                &mut scores[..length.next_multiple_of(UNIT)],
                sees,
                (&mut self.partial.max[row], &mut self.partial.sum[row], out),
            );
        }
        let mut out = Columns::of(self.partial.out, value_len);
        for unit in (0..value_len / UNIT).step_by(MAX_UNITS) {
            let at = (share + unit / MAX_UNITS * FETCHING_TILES) * BLOCK * UNIT;
            let fetch = next.and_then(|next| next.values.get(at..));
            Product {
                a: &self.scores.0[..],
                a_row: BLOCK,
                a_step: 1,
                b: Units {
                    values: &self.head.values[keys.start * value_len + unit * UNIT..],
                    row: value_len,
                    unit: UNIT,
                },
                depth: length,
                accumulate: true,
                fetch: fetch.map(|values| (Units { values, row: UNIT, unit: UNIT }, 1)),
            }
            .run(
                simd,
                &mut out,
                (rows.clone(), MAX_UNITS.min(value_len / UNIT - unit)),
                unit * UNIT,
            );
        }
    }
}

/// Scores to probabilities, not divided by their sum; scores from `sees` on become 0. What the query
/// has seen before is scaled to the new largest score.
#[inline(always)]
fn softmax<S: Simd>(
    simd: S,
    scores: &mut [f32],
    sees: usize,
    (max, sum, out): (&mut f32, &mut f32, &mut [f32]),
) {
    if sees == 0 {
        scores.fill(0.0);
        return;
    }
    scores[sees..].fill(f32::NEG_INFINITY);
    let (units, _) = scores.as_chunks_mut::<UNIT>();
    let mut largest = simd.splat(*max);
    for unit in units.iter() {
        // A NaN leaves the maximum alone and reaches the sum below.
        largest = simd.max(simd.load(unit), largest);
    }
    let before = *max;
    *max = simd.largest(largest);
    let shift = simd.splat(*max);
    let mut total = simd.splat(0.0);
    for unit in units {
        let p = simd.exp(simd.sub(simd.load(unit), shift));
        total = simd.add(total, p);
        simd.store(unit, p);
    }
    scores[sees..].fill(0.0);
    let total = simd.sum(total);
    if before == *max || *sum == 0.0 {
        *sum += total;
        return;
    }
    let scale = simd.exp(simd.splat(before - *max));
    *sum = *sum * simd.lanes(scale)[0] + total;
    for unit in out.as_chunks_mut::<UNIT>().0 {
        let scaled = simd.mul(simd.load(unit), scale);
        simd.store(unit, scaled);
    }
}

/// Joins what queries have seen of disjoint keys, and divides: `out` is `(M, D)`.
pub(crate) struct Join<'a> {
    pub(crate) layout: HeadLayout,
    pub(crate) parts: &'a [Seen<'a>],
    pub(crate) out: &'a mut [f32],
    pub(crate) weights: &'a mut Vec<f32>, // one a part
}

impl Kernel for Join<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (head_dim, value_len) = (self.layout.head_dim, self.layout.value_len());
        let parts = self.parts;
        for (query, out) in self.out.chunks_exact_mut(head_dim).enumerate() {
            let max = parts.iter().map(|part| part.max[query]).fold(NO_KEY, f32::max);
            self.weights.clear();
            self.weights.extend(parts.iter().map(|part| part.max[query] - max));
            self.weights.resize(parts.len().next_multiple_of(UNIT), 0.0);
            for unit in self.weights.as_chunks_mut::<UNIT>().0 {
                let weights = simd.exp(simd.load(unit));
                simd.store(unit, weights);
            }
            let weighted = || parts.iter().zip(self.weights.iter());
            let sum: f32 = weighted().map(|(part, weight)| part.sum[query] * weight).sum();
            let sum = simd.splat(sum);
            for (unit, out) in out.chunks_mut(UNIT).enumerate() {
                let mut total = simd.splat(0.0);
                for (part, &weight) in weighted() {
                    let values = &part.out[query * value_len + unit * UNIT..][..UNIT];
                    let values = simd.load_part(values, 0.0);
                    total = simd.mul_add(values, simd.splat(weight), total);
                }
                out.copy_from_slice(&simd.lanes(simd.div(total, sum))[..out.len()]);
            }
        }
    }
}
