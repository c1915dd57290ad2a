//! Causal attention within whole sequences, forward and backward.
//!
//! Scores exist for a few queries at a time; backward computes them again from the logarithm of their
//! sums, as FlashAttention does (Dao et al., arXiv 2205.14135).

// Shapes: S = tokens of a sequence, D = head_dim, E = D rounded up to whole units, G = query heads of
// the K/V head, H = query heads and KV = K/V heads of this rank, Q = queries of a block.

use std::ops::Range;

use super::simd::{Columns, Kernel, MAX_ROWS, MAX_UNITS, Product, Simd, UNIT, Units, even_parts};

/// Queries of a block in backward, whose keys' gradients are summed before they are stored.
const BLOCK: usize = 16 * MAX_ROWS;

/// One K/V head and its query heads in one sequence.
#[derive(Clone)]
pub(crate) struct CausalHead<'a> {
    /// Rotated queries and keys, and values: from the sequence's first row on.
    pub(crate) qkv: &'a [f32], // (S, H + 2 KV, D)
    pub(crate) tokens: usize,
    pub(crate) head_dim: usize,
    /// Query heads that read the K/V head.
    pub(crate) queries: Range<usize>,
    /// Where key and value are among the heads of a row.
    pub(crate) key: usize,
    pub(crate) value: usize,
    /// Heads of a row.
    pub(crate) heads: usize,
}

impl<'a> CausalHead<'a> {
    fn width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// A head of the row of a token.
    fn head(&self, token: usize, head: usize) -> &'a [f32] {
        &self.qkv[token * self.width() + head * self.head_dim..][..self.head_dim]
    }

    /// What scores are multiplied by.
    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    fn padded_dim(&self) -> usize {
        self.head_dim.next_multiple_of(UNIT)
    }

    fn padded_tokens(&self) -> usize {
        self.tokens.next_multiple_of(UNIT)
    }

    /// A head of all tokens, feature by feature: `(S / 16, D, 16)`.
    fn panels(&self, head: usize, panels: &mut Vec<f32>) {
        panels.clear();
        panels.resize(self.padded_tokens() * self.head_dim, 0.0);
        for token in 0..self.tokens {
            let at = token / UNIT * UNIT * self.head_dim + token % UNIT;
            let places = panels[at..].iter_mut().step_by(UNIT);
            for (place, &value) in places.zip(self.head(token, head)) {
                *place = value;
            }
        }
    }

    /// A head of all tokens, in rows of whole units: `(S, E)`.
    fn rows(&self, head: usize, rows: &mut Vec<f32>) {
        rows.clear();
        rows.resize(self.tokens * self.padded_dim(), 0.0);
        for (token, row) in rows.chunks_exact_mut(self.padded_dim()).enumerate() {
            row[..self.head_dim].copy_from_slice(self.head(token, head));
        }
    }

    /// `out = rows of a times the panels`, for the keys that the last of the queries sees.
    #[inline(always)]
    fn score<S: Simd>(
        &self,
        simd: S,
        (a, a_row): (&[f32], usize),
        panels: &[f32],
        out: &mut Columns<'_>,
        (rows, seen): (Range<usize>, usize),
    ) {
        let panel = UNIT * self.head_dim;
        let units = seen.div_ceil(UNIT);
        for unit in (0..units).step_by(MAX_UNITS) {
            Product {
                a: &a[rows.start * a_row..],
                a_row,
                a_step: 1,
                b: Units { values: &panels[unit * panel..], row: UNIT, unit: panel },
                depth: self.head_dim,
                accumulate: false,
                fetch: None,
            }
            .run(simd, out, (rows.clone(), MAX_UNITS.min(units - unit)), unit * UNIT);
        }
    }
}

/// `out (+)= a b` for rows of whole units, `(S, E)` or `(Q, E)`.
#[inline(always)]
fn mix<S: Simd>(
    simd: S,
    (a, a_row, a_step): (&[f32], usize, usize),
    (b, width): (&[f32], usize),
    out: &mut Columns<'_>,
    (rows, depth, accumulate): (Range<usize>, usize, bool),
) {
    let units = width / UNIT;
    for unit in (0..units).step_by(MAX_UNITS) {
        Product {
            a: &a[rows.start * a_row..],
            a_row,
            a_step,
            b: Units { values: &b[unit * UNIT..], row: width, unit: UNIT },
            depth,
            accumulate,
            fetch: None,
        }
        .run(simd, out, (rows.clone(), MAX_UNITS.min(units - unit)), unit * UNIT);
    }
}

/// Memory of one thread.
#[derive(Default)]
pub(crate) struct Scratch {
    key_panels: Vec<f32>,   // (S / 16, D, 16)
    value_panels: Vec<f32>, // (S / 16, D, 16)
    rows: Vec<f32>,         // (S, E)
    scores: Vec<f32>,       // (Q, S)
    gradients: Vec<f32>,    // (Q, S)
    queries: Vec<f32>,      // (Q, E)
    outputs: Vec<f32>,      // (Q, E)
    block: Vec<f32>,        // (Q, E)
    keys: Vec<f32>,         // (S, E)
    values: Vec<f32>,       // (S, E)
}

fn zeroed(memory: &mut Vec<f32>, length: usize) {
    memory.clear();
    memory.resize(length, 0.0);
}

/// `softmax(q k^T / sqrt(D)) v`, each token seeing itself and those before it.
pub(crate) struct Attend<'a, 'o> {
    pub(crate) head: CausalHead<'a>,
    pub(crate) out: Columns<'o>,  // (S, G D)
    pub(crate) sums: Columns<'o>, // (S, G): logarithms of the sums of e^score
    pub(crate) scratch: &'a mut Scratch,
}

impl Kernel for Attend<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let head = self.head.clone();
        let (width, row) = (head.padded_dim(), head.padded_tokens());
        let Scratch { key_panels, rows: values, scores, block, .. } = &mut *self.scratch;
        head.panels(head.key, key_panels);
        head.rows(head.value, values);
        zeroed(scores, MAX_ROWS * row);
        zeroed(block, MAX_ROWS * width);
        for (index, query) in head.queries.clone().enumerate() {
            let queries = &head.qkv[query * head.head_dim..];
            for tokens in even_parts(head.tokens, MAX_ROWS) {
                let (count, seen) = (tokens.len(), tokens.end);
                let of_tile = (&queries[tokens.start * head.width()..], head.width());
                let mut tile = Columns::of(scores, row);
                head.score(simd, of_tile, key_panels, &mut tile, (0..count, seen));
                let mut totals = [0.0; MAX_ROWS];
                for (token, total) in tokens.clone().zip(&mut totals) {
                    let scores = &mut scores[(token - tokens.start) * row..][..seen];
                    let (max, sum) = softmax(simd, scores, token + 1, head.scale());
                    self.sums.row(token)[index] = max + sum.ln();
                    *total = sum;
                }
                let mut mixed = Columns::of(block, width);
                mix(simd, (scores, row, 1), (values, width), &mut mixed, (0..count, seen, false));
                for ((token, sum), mixed) in tokens.zip(totals).zip(block.chunks_exact(width)) {
                    let out = &mut self.out.row(token)[index * head.head_dim..][..head.head_dim];
                    for (out, mixed) in out.iter_mut().zip(mixed) {
                        *out = mixed / sum;
                    }
                }
            }
        }
    }
}

/// Scores to `e^(scale x score - max)`, 0 from `sees` on; gives the scaled maximum and the sum.
#[inline(always)]
fn softmax<S: Simd>(simd: S, scores: &mut [f32], sees: usize, scale: f32) -> (f32, f32) {
    scores[sees..].fill(f32::NEG_INFINITY);
    let (units, rest) = scores.as_chunks_mut::<UNIT>();
    let mut largest = simd.load_part(rest, f32::NEG_INFINITY);
    for unit in units.iter() {
        largest = simd.max(simd.load(unit), largest);
    }
    let max = scale * simd.largest(largest);
    let sum = exponentials(simd, scores, scale, max);
    scores[sees..].fill(0.0);
    (max, sum)
}

/// `e^(scale x value - shift)` in place, and the sum of all.
#[inline(always)]
fn exponentials<S: Simd>(simd: S, values: &mut [f32], scale: f32, shift: f32) -> f32 {
    let (scale, shift) = (simd.splat(scale), simd.splat(-shift));
    let (units, rest) = values.as_chunks_mut::<UNIT>();
    let mut total = simd.splat(0.0);
    for unit in units {
        let p = simd.exp(simd.mul_add(simd.load(unit), scale, shift));
        total = simd.add(total, p);
        simd.store(unit, p);
    }
    let last = simd.exp(simd.mul_add(simd.load_part(rest, f32::NEG_INFINITY), scale, shift));
    let lanes = simd.lanes(last);
    rest.copy_from_slice(&lanes[..rest.len()]);
    simd.sum(total) + rest.iter().sum::<f32>()
}

/// Gradients of queries, keys and values from that of the output.
pub(crate) struct AttendBackward<'a, 'o> {
    pub(crate) head: CausalHead<'a>,
    /// Of the query heads, from the sequence's first row on, and their gradient.
    pub(crate) out: &'a [f32], // (S, H, D)
    pub(crate) grad_out: &'a [f32], // (S, H, D)
    pub(crate) sums: &'a [f32],     // (S, H)
    /// Query heads of a row of these three.
    pub(crate) query_heads: usize,
    pub(crate) grad_queries: Columns<'o>, // (S, G D)
    pub(crate) grad_key: Columns<'o>,     // (S, D)
    pub(crate) grad_value: Columns<'o>,   // (S, D)
    pub(crate) scratch: &'a mut Scratch,
}

impl AttendBackward<'_, '_> {
    /// A head of the row of a token in `out` or its gradient.
    fn of_query<'b>(&self, values: &'b [f32], token: usize, query: usize) -> &'b [f32] {
        let head_dim = self.head.head_dim;
        &values[(token * self.query_heads + query) * head_dim..][..head_dim]
    }
}

impl Kernel for AttendBackward<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let head = self.head.clone();
        let (width, row) = (head.padded_dim(), head.padded_tokens());
        let mut scratch = std::mem::take(self.scratch);
        head.panels(head.key, &mut scratch.key_panels);
        head.panels(head.value, &mut scratch.value_panels);
        head.rows(head.key, &mut scratch.rows);
        for memory in [&mut scratch.keys, &mut scratch.values] {
            zeroed(memory, head.tokens * width);
        }
        for memory in [&mut scratch.scores, &mut scratch.gradients] {
            zeroed(memory, BLOCK * row);
        }
        for memory in [&mut scratch.queries, &mut scratch.outputs, &mut scratch.block] {
            zeroed(memory, BLOCK * width);
        }
        for query in head.queries.clone() {
            for start in (0..head.tokens).step_by(BLOCK) {
                let tokens = start..head.tokens.min(start + BLOCK);
                self.block(simd, &mut scratch, query, tokens);
            }
        }
        for token in 0..head.tokens {
            for (to, from) in
                [(&mut self.grad_key, &scratch.keys), (&mut self.grad_value, &scratch.values)]
            {
                let from = &from[token * width..][..head.head_dim];
                to.row(token)[..head.head_dim].copy_from_slice(from);
            }
        }
        *self.scratch = scratch;
    }
}

impl AttendBackward<'_, '_> {
    /// Adds what a block of queries of one head gives to the gradients.
    #[inline(always)]
    fn block<S: Simd>(
        &mut self,
        simd: S,
        scratch: &mut Scratch,
        query: usize,
        tokens: Range<usize>,
    ) {
        let head = self.head.clone();
        let (width, row, head_dim) = (head.padded_dim(), head.padded_tokens(), head.head_dim);
        let Scratch {
            key_panels,
            value_panels,
            rows: key_rows,
            scores,
            gradients,
            queries,
            outputs,
            block,
            keys,
            values,
        } = scratch;
        for (index, token) in tokens.clone().enumerate() {
            queries[index * width..][..head_dim].copy_from_slice(head.head(token, query));
            let grad_out = self.of_query(self.grad_out, token, query);
            outputs[index * width..][..head_dim].copy_from_slice(grad_out);
        }
        for tile in even_parts(tokens.len(), MAX_ROWS) {
            let seen = tokens.start + tile.end;
            let place = (tile.clone(), seen);
            let mut p = Columns::of(scores, row);
            head.score(simd, (queries, width), key_panels, &mut p, place.clone());
            let mut ds = Columns::of(gradients, row);
            head.score(simd, (outputs, width), value_panels, &mut ds, place);
            for index in tile.clone() {
                let token = tokens.start + index;
                let sees = token + 1;
                let sum = self.sums[token * self.query_heads + query];
                let p = &mut scores[index * row..][..tokens.end];
                p[sees..].fill(0.0);
                exponentials(simd, &mut p[..sees], head.scale(), sum);
                let out = self.of_query(self.out, token, query);
                let grad_out = self.of_query(self.grad_out, token, query);
                let dot: f32 = out.iter().zip(grad_out).map(|(out, grad)| out * grad).sum();
                let ds = &mut gradients[index * row..][..tokens.end];
                ds[sees..].fill(0.0);
                through_softmax(simd, &mut ds[..sees], p, (dot, head.scale()));
            }
            let mut grad = Columns::of(block, width);
            let of = (tile, seen, false);
            mix(simd, (gradients, row, 1), (key_rows, width), &mut grad, of);
        }
        let first = (query - head.queries.start) * head_dim;
        for (token, block) in tokens.clone().zip(block.chunks_exact(width)) {
            let to = &mut self.grad_queries.row(token)[first..first + head_dim];
            to.copy_from_slice(&block[..head_dim]);
        }
        let count = tokens.len();
        for seen in even_parts(tokens.end, MAX_ROWS) {
            let mut grad = Columns::of(keys, width);
            let of = (seen.clone(), count, true);
            mix(simd, (gradients, 1, row), (queries, width), &mut grad, of);
            let mut grad = Columns::of(values, width);
            mix(simd, (scores, 1, row), (outputs, width), &mut grad, (seen, count, true));
        }
    }
}

/// `gradient = scale x p x (gradient - dot)` in place.
#[inline(always)]
fn through_softmax<S: Simd>(simd: S, gradient: &mut [f32], p: &[f32], (dot, scale): (f32, f32)) {
    let (units, rest) = gradient.as_chunks_mut::<UNIT>();
    let (ps, p_rest) = p.as_chunks::<UNIT>();
    let (dots, scales) = (simd.splat(dot), simd.splat(scale));
    for (unit, p) in units.iter_mut().zip(ps) {
        let through = simd.mul(simd.load(p), simd.sub(simd.load(unit), dots));
        simd.store(unit, simd.mul(through, scales));
    }
    // `p` may be longer: up to the last key that the block sees.
    let behind = ps.get(units.len()).map_or(p_rest, |unit| &unit[..]);
    for (gradient, p) in rest.iter_mut().zip(behind) {
        *gradient = scale * p * (*gradient - dot);
    }
}
