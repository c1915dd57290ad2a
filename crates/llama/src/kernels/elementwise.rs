//! What stands between the products: norm, rotation, activation, each in one pass.

// Shapes: T = tokens, C = features, N = heads, D = head_dim, F = columns of gate and of up.

use super::simd::{Kernel, Simd, UNIT};
use crate::dropout::Mask;

/// `y = weight * x / sqrt(mean(x^2) + eps)` for rows of `x`.
pub(crate) struct Norm<'a> {
    pub(crate) x: &'a [f32],      // (T, C)
    pub(crate) weight: &'a [f32], // (C)
    pub(crate) eps: f32,
    pub(crate) out: &'a mut [f32], // (T, C)
}

impl Kernel for Norm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let width = self.weight.len();
        for (x, out) in self.x.chunks_exact(width).zip(self.out.chunks_exact_mut(width)) {
            // Two sums, so that one addition need not wait for the other.
            let mut squares = [simd.splat(0.0); 2];
            let (units, rest) = x.as_chunks::<UNIT>();
            for (index, unit) in units.iter().enumerate() {
                let value = simd.load(unit);
                squares[index % 2] = simd.mul_add(value, value, squares[index % 2]);
            }
            let value = simd.load_part(rest, 0.0);
            let total = simd.mul_add(value, value, simd.add(squares[0], squares[1]));
            let scale = 1.0 / (simd.sum(total) / width as f32 + self.eps).sqrt();
            for ((out, &x), &weight) in out.iter_mut().zip(x).zip(self.weight) {
                *out = x * scale * weight;
            }
        }
    }
}

/// What a softmax over values needs: the largest, and the sum of `e^((value - largest) / temperature)`.
/// A NaN makes the sum NaN.
pub(crate) struct Weigh<'a> {
    pub(crate) values: &'a [f32],
    pub(crate) temperature: f32,
    /// Stands for a largest value below it, as when all are -inf.
    pub(crate) floor: f32,
}

/// Units that are summed in f32 before they are added in f64.
const EXACT_UNITS: usize = 32;

impl Kernel for Weigh<'_> {
    type Output = (f32, f64);

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> (f32, f64) {
        let (units, rest) = self.values.as_chunks::<UNIT>();
        let rest = simd.load_part(rest, f32::NEG_INFINITY);
        let mut largest = rest;
        for unit in units {
            // A NaN leaves the maximum alone and reaches the sum.
            largest = simd.max(simd.load(unit), largest);
        }
        let max = simd.largest(largest);
        let (shift, scale) = (simd.splat(max.max(self.floor)), simd.splat(1.0 / self.temperature));
        // The fill of the rest weighs almost nothing, and not nothing: it is taken out.
        let mut total = f64::from(
            simd.lanes(weight(simd, rest, [shift, scale]))[..self.values.len() % UNIT]
                .iter()
                .sum::<f32>(),
        );
        for units in units.chunks(EXACT_UNITS) {
            let mut sum = simd.splat(0.0);
            for unit in units {
                sum = simd.add(sum, weight(simd, simd.load(unit), [shift, scale]));
            }
            total += f64::from(simd.sum(sum));
        }
        (max, total)
    }
}

/// No closure: one is compiled on its own, without the instructions of the level that runs it.
#[inline(always)]
fn weight<S: Simd>(simd: S, values: S::Unit, [shift, scale]: [S::Unit; 2]) -> S::Unit {
    simd.exp(simd.mul(simd.sub(values, shift), scale))
}

/// The gradient of a norm's input from that of its output.
pub(crate) struct NormBackward<'a> {
    pub(crate) x: &'a [f32],      // (T, C)
    pub(crate) weight: &'a [f32], // (C)
    pub(crate) eps: f32,
    /// Of the output; the input's afterwards.
    pub(crate) grad: &'a mut [f32], // (T, C)
}

impl Kernel for NormBackward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let width = self.weight.len();
        for (x, grad) in self.x.chunks_exact(width).zip(self.grad.chunks_exact_mut(width)) {
            let [squares, products] = sums(simd, x, self.weight, grad);
            let scale = 1.0 / (squares / width as f32 + self.eps).sqrt();
            let along = products * scale * scale / width as f32;
            for ((grad, &x), &weight) in grad.iter_mut().zip(x).zip(self.weight) {
                *grad = scale * (weight * *grad - along * x);
            }
        }
    }
}

/// The sums of `x^2` and of `x * weight * grad`.
#[inline(always)]
fn sums<S: Simd>(simd: S, x: &[f32], weight: &[f32], grad: &[f32]) -> [f32; 2] {
    let (xs, x_rest) = x.as_chunks::<UNIT>();
    let (weights, weight_rest) = weight.as_chunks::<UNIT>();
    let (grads, grad_rest) = grad.as_chunks::<UNIT>();
    let [x, weight, grad] = [x_rest, weight_rest, grad_rest].map(|rest| simd.load_part(rest, 0.0));
    let mut squares = simd.mul(x, x);
    let mut products = simd.mul(simd.mul(weight, grad), x);
    for ((x, weight), grad) in xs.iter().zip(weights).zip(grads) {
        let x = simd.load(x);
        squares = simd.mul_add(x, x, squares);
        products = simd.mul_add(simd.mul(simd.load(weight), simd.load(grad)), x, products);
    }
    [simd.sum(squares), simd.sum(products)]
}

/// Turns feature `i` of each head with feature `i + D/2`, in place.
pub(crate) struct Rotate<'a> {
    pub(crate) cos: &'a [f32],       // (D/2)
    pub(crate) sin: &'a [f32],       // (D/2)
    pub(crate) heads: &'a mut [f32], // (N, D) of one token
    /// Turn back, which is the gradient's way through a rotation.
    pub(crate) back: bool,
}

impl Kernel for Rotate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let half = self.cos.len();
        let sign = if self.back { -1.0 } else { 1.0 };
        for head in self.heads.chunks_exact_mut(2 * half) {
            let (first, second) = head.split_at_mut(half);
            let turns = self.cos.iter().zip(self.sin);
            for ((first, second), (&cos, &sin)) in first.iter_mut().zip(second).zip(turns) {
                let sin = sign * sin;
                (*first, *second) = (*first * cos - *second * sin, *second * cos + *first * sin);
            }
        }
    }
}

/// `silu(gate) * up`, where a row is `[gate | up]`.
pub(crate) struct SiluMul<'a> {
    pub(crate) gate_up: &'a [f32], // (T, 2 F)
    pub(crate) out: &'a mut [f32], // (T, F)
    pub(crate) width: usize,       // F
}

impl Kernel for SiluMul<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let rows = self.gate_up.chunks_exact(2 * self.width);
        for (row, out) in rows.zip(self.out.chunks_exact_mut(self.width)) {
            let (gate, up) = row.split_at(self.width);
            let (gates, gate_rest) = gate.as_chunks::<UNIT>();
            let (ups, up_rest) = up.as_chunks::<UNIT>();
            let (outs, out_rest) = out.as_chunks_mut::<UNIT>();
            for ((gate, up), out) in gates.iter().zip(ups).zip(outs) {
                simd.store(out, silu_mul(simd, simd.load(gate), simd.load(up)));
            }
            let [gate, up] = [gate_rest, up_rest].map(|rest| simd.load_part(rest, 0.0));
            let lanes = simd.lanes(silu_mul(simd, gate, up));
            out_rest.copy_from_slice(&lanes[..out_rest.len()]);
        }
    }
}

#[inline(always)]
fn silu_mul<S: Simd>(simd: S, gate: S::Unit, up: S::Unit) -> S::Unit {
    let inverse = simd.exp(simd.sub(simd.splat(0.0), gate));
    simd.mul(simd.div(gate, simd.add(simd.splat(1.0), inverse)), up)
}

/// The gradients of gate and up from that of `silu(gate) * up`.
pub(crate) struct SiluMulBackward<'a> {
    pub(crate) grad: &'a [f32], // (T, F)
    /// Gate and up; their gradients afterwards.
    pub(crate) gate_up: &'a mut [f32], // (T, 2 F)
    pub(crate) width: usize,    // F
}

impl Kernel for SiluMulBackward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let rows = self.gate_up.chunks_exact_mut(2 * self.width);
        for (row, grad) in rows.zip(self.grad.chunks_exact(self.width)) {
            let (gate, up) = row.split_at_mut(self.width);
            let (gates, gate_rest) = gate.as_chunks_mut::<UNIT>();
            let (ups, up_rest) = up.as_chunks_mut::<UNIT>();
            let (grads, grad_rest) = grad.as_chunks::<UNIT>();
            for ((gate, up), grad) in gates.iter_mut().zip(ups).zip(grads) {
                let values = [simd.load(gate), simd.load(up), simd.load(grad)];
                let [grad_gate, grad_up] = silu_mul_backward(simd, values);
                simd.store(gate, grad_gate);
                simd.store(up, grad_up);
            }
            let values = [&*gate_rest, &*up_rest, grad_rest].map(|rest| simd.load_part(rest, 0.0));
            let [grad_gate, grad_up] = silu_mul_backward(simd, values).map(|unit| simd.lanes(unit));
            gate_rest.copy_from_slice(&grad_gate[..gate_rest.len()]);
            up_rest.copy_from_slice(&grad_up[..up_rest.len()]);
        }
    }
}

/// With `s = 1 / (1 + e^-gate)`: `grad up s (1 + gate (1 - s))` and `grad gate s`.
#[inline(always)]
fn silu_mul_backward<S: Simd>(simd: S, [gate, up, grad]: [S::Unit; 3]) -> [S::Unit; 2] {
    let one = simd.splat(1.0);
    let inverse = simd.exp(simd.sub(simd.splat(0.0), gate));
    let s = simd.div(one, simd.add(one, inverse));
    let slope = simd.mul(s, simd.mul_add(gate, simd.sub(one, s), one));
    [simd.mul(simd.mul(grad, up), slope), simd.mul(grad, simd.mul(gate, s))]
}

/// A row times the mask of its token.
pub(crate) struct ApplyMask<'a> {
    pub(crate) mask: Mask,
    pub(crate) token: usize,
    pub(crate) row: &'a mut [f32], // (I)
}

impl Kernel for ApplyMask<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        self.mask.apply(self.token, self.row);
    }
}
