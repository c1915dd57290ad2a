//! What training computes on slices: products, norms, activations and attention, and their gradients.

// Shapes: T = tokens, C = features, F = columns of gate and of up, H = query heads and KV = K/V heads of
// this rank, D = head_dim.

use std::ops::Range;

use super::{
    Kernels,
    causal::{self, CausalHead, Scratch},
    elementwise,
    product::{self, Matrix, Panels, Target},
    simd::Columns,
    tasks,
};
use crate::{Result, dropout::Mask, heads::Heads};

/// Rotated queries and keys, and values, of sequences that lie one behind the other.
#[derive(Clone, Copy)]
pub(crate) struct QkvRows<'a> {
    pub(crate) heads: &'a Heads,
    pub(crate) values: &'a [f32], // (T, H + 2 KV, D)
    /// Tokens of each sequence; they sum to T.
    pub(crate) lengths: &'a [i64],
}

impl Kernels {
    /// `target (+)= alpha a b`.
    pub(crate) fn multiply(
        self,
        factors: (Matrix<'_>, Matrix<'_>, f32),
        target: Target<'_>,
        panels: &mut Panels,
    ) -> Result<()> {
        product::multiply(self.level, factors, target, panels)
    }

    /// As [`Kernels::norm`], x and out: `(T, C)`.
    pub(crate) fn norm_rows(
        self,
        x: &[f32],
        (weight, eps): (&[f32], f64),
        out: &mut [f32],
    ) -> Result<()> {
        let width = weight.len();
        self.by_rows(width, out, |rows, out| {
            let x = &x[rows.start * width..rows.end * width];
            self.level.run(elementwise::Norm { x, weight, eps: eps as f32, out });
        })
    }

    /// Turns the gradient of a norm's output, `(T, C)`, into that of its input `x`.
    pub(crate) fn norm_backward(
        self,
        x: &[f32],
        (weight, eps): (&[f32], f64),
        grad: &mut [f32],
    ) -> Result<()> {
        let width = weight.len();
        self.by_rows(width, grad, |rows, grad| {
            let x = &x[rows.start * width..rows.end * width];
            self.level.run(elementwise::NormBackward { x, weight, eps: eps as f32, grad });
        })
    }

    /// As [`Kernels::silu_mul`], gate_up: `(T, 2 F)`, out: `(T, F)`.
    pub(crate) fn silu_mul_rows(
        self,
        gate_up: &[f32],
        width: usize,
        out: &mut [f32],
    ) -> Result<()> {
        self.by_rows(width, out, |rows, out| {
            let gate_up = &gate_up[rows.start * 2 * width..rows.end * 2 * width];
            self.level.run(elementwise::SiluMul { gate_up, out, width });
        })
    }

    /// Turns `gate_up`, `(T, 2 F)`, into its gradient from `grad`, `(T, F)`, that of the activation.
    pub(crate) fn silu_mul_backward(
        self,
        grad: &[f32],
        width: usize,
        gate_up: &mut [f32],
    ) -> Result<()> {
        self.by_rows(2 * width, gate_up, |rows, gate_up| {
            let grad = &grad[rows.start * width..rows.end * width];
            self.level.run(elementwise::SiluMulBackward { grad, gate_up, width });
        })
    }

    /// Multiplies the rows of `x`, `width` long, by a mask.
    pub(crate) fn apply_mask(self, mask: Mask, width: usize, x: &mut [f32]) -> Result<()> {
        self.by_rows(width, x, |rows, x| {
            for (token, row) in rows.zip(x.chunks_exact_mut(width)) {
                self.level.run(elementwise::ApplyMask { mask, token, row });
            }
        })
    }

    /// Rotates queries and keys of `qkv`, `(T, H + 2 KV, D)`, in place, or turns their gradients back;
    /// cos and sin: `(T, D/2)`.
    pub(crate) fn rotate_rows(
        self,
        heads: &Heads,
        (cos, sin): (&[f32], &[f32]),
        qkv: &mut [f32],
        back: bool,
    ) -> Result<()> {
        let [rotated, width] = widths(heads);
        let half = heads.head_dim as usize / 2;
        self.by_rows(width, qkv, |rows, qkv| {
            for (token, row) in rows.zip(qkv.chunks_exact_mut(width)) {
                let [cos, sin] = [cos, sin].map(|turns| &turns[token * half..][..half]);
                let heads = &mut row[..rotated];
                self.level.run(elementwise::Rotate { cos, sin, heads, back });
            }
        })
    }

    /// Causal attention within each sequence: out is `(T, H, D)`, and `sums`, `(T, H)`, is what
    /// [`Kernels::attend_backward`] needs.
    pub(crate) fn attend(self, of: QkvRows<'_>, out: &mut [f32], sums: &mut [f32]) -> Result<()> {
        let [query_ranges, ..] = of.columns();
        let heads = of.heads.n_local_heads() as usize;
        let out = of.by_head(out, heads * of.head_dim(), &query_ranges);
        let sum_ranges: Vec<_> = of.queries().collect();
        let sums = of.by_head(sums, heads, &sum_ranges);
        let tasks: Vec<_> = of.tasks().zip(out.into_iter().zip(sums)).collect();
        tasks::run(tasks, Scratch::default, |scratch, (head, (out, sums))| {
            self.level.run(causal::Attend { head, out, sums, scratch });
        })
    }

    /// The gradient of `qkv`, in its shape, from that of the attention and what forward gave.
    pub(crate) fn attend_backward(
        self,
        of: QkvRows<'_>,
        (out, sums): (&[f32], &[f32]),
        grad_out: &[f32],
        grad_qkv: &mut [f32],
    ) -> Result<()> {
        let query_heads = of.heads.n_local_heads() as usize;
        let row = query_heads * of.head_dim();
        let [_, width] = widths(of.heads);
        let columns = of.columns();
        let kv_heads = columns[0].len();
        let ranges = columns.concat();
        let grads = of.by_head(grad_qkv, width, &ranges);
        let mut grads = grads.into_iter();
        let mut tasks = Vec::new();
        let mut start = 0;
        let mut of_heads = of.tasks();
        for &length in of.lengths {
            let length = length as usize;
            let queries: Vec<_> = grads.by_ref().take(kv_heads).collect();
            let keys: Vec<_> = grads.by_ref().take(kv_heads).collect();
            let values: Vec<_> = grads.by_ref().take(kv_heads).collect();
            for ((grad_queries, grad_key), grad_value) in queries.into_iter().zip(keys).zip(values)
            {
                tasks.push((of_heads.next(), start, grad_queries, grad_key, grad_value));
            }
            start += length;
        }
        tasks::run(
            tasks,
            Scratch::default,
            |scratch, (head, start, grad_queries, grad_key, grad_value)| {
                let Some(head) = head else { return };
                self.level.run(causal::AttendBackward {
                    head,
                    out: &out[start * row..],
                    grad_out: &grad_out[start * row..],
                    sums: &sums[start * query_heads..],
                    query_heads,
                    grad_queries,
                    grad_key,
                    grad_value,
                    scratch,
                });
            },
        )
    }
}

/// Values of a row's queries and keys, and of the whole row.
fn widths(heads: &Heads) -> [usize; 2] {
    let (h, kv, d) = (heads.n_local_heads(), heads.n_local_kv_heads(), heads.head_dim);
    [(h + kv) * d, (h + 2 * kv) * d].map(|width| width as usize)
}

impl<'a> QkvRows<'a> {
    fn head_dim(&self) -> usize {
        self.heads.head_dim as usize
    }

    /// The query heads of each K/V head.
    fn queries(&self) -> impl Iterator<Item = Range<usize>> + use<'a> {
        self.heads.runs.iter().flat_map(|run| {
            (0..run.n_kv()).map(|kv| {
                let start = (run.q.start + kv * run.group()) as usize;
                start..start + run.group() as usize
            })
        })
    }

    /// Columns of queries, keys and values of each K/V head.
    fn columns(&self) -> [Vec<Range<usize>>; 3] {
        let d = self.head_dim();
        let queries: Vec<_> = self.queries().map(|heads| heads.start * d..heads.end * d).collect();
        let behind = |first: usize| {
            (0..queries.len()).map(|kv| (first + kv) * d..(first + kv + 1) * d).collect()
        };
        let h = self.heads.n_local_heads() as usize;
        let [keys, values] = [behind(h), behind(h + queries.len())];
        [queries, keys, values]
    }

    /// Every K/V head of every sequence.
    fn tasks(&self) -> impl Iterator<Item = CausalHead<'a>> + use<'a> {
        let (h, kv_heads) =
            (self.heads.n_local_heads() as usize, self.heads.n_local_kv_heads() as usize);
        let [_, width] = widths(self.heads);
        let of = *self;
        let mut start = 0;
        self.lengths.iter().flat_map(move |&length| {
            let tokens = length as usize;
            let qkv = &of.values[start * width..][..tokens * width];
            start += tokens;
            of.queries().enumerate().map(move |(kv, queries)| CausalHead {
                qkv,
                tokens,
                head_dim: of.head_dim(),
                queries,
                key: h + kv,
                value: h + kv_heads + kv,
                heads: h + 2 * kv_heads,
            })
        })
    }

    /// The rows of each sequence, `width` long, cut into columns.
    fn by_head<'o>(
        &self,
        values: &'o mut [f32],
        width: usize,
        ranges: &[Range<usize>],
    ) -> Vec<Columns<'o>> {
        let mut rest = values;
        let mut cut = Vec::with_capacity(self.lengths.len() * ranges.len());
        for &length in self.lengths {
            let (rows, behind) = std::mem::take(&mut rest).split_at_mut(length as usize * width);
            rest = behind;
            cut.extend(Columns::of(rows, width).cut(ranges));
        }
        cut
    }
}

#[cfg(test)]
mod tests;
