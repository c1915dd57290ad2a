//! What stands between the products: norm, rotation, activation, each in one pass.

// Shapes: T = tokens, C = features, N = heads, D = head_dim, F = columns of gate and of up.

use super::simd::{Kernel, Simd, UNIT};

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

/// Turns feature `i` of each head with feature `i + D/2`.
pub(crate) struct Rotate<'a> {
    pub(crate) x: &'a [f32],       // (N, D) of one token
    pub(crate) cos: &'a [f32],     // (D/2)
    pub(crate) sin: &'a [f32],     // (D/2)
    pub(crate) out: &'a mut [f32], // (N, D)
}

impl Kernel for Rotate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let half = self.cos.len();
        for (x, out) in self.x.chunks_exact(2 * half).zip(self.out.chunks_exact_mut(2 * half)) {
            let (first, second) = x.split_at(half);
            let (out_first, out_second) = out.split_at_mut(half);
            let turns = self.cos.iter().zip(self.sin);
            let pairs = first.iter().zip(second);
            let out = out_first.iter_mut().zip(out_second);
            for (((out_first, out_second), (&first, &second)), (&cos, &sin)) in
                out.zip(pairs).zip(turns)
            {
                *out_first = first * cos - second * sin;
                *out_second = second * cos + first * sin;
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
