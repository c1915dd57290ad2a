//! The CPU's own path: products with packed weights, attention over the caches, and what stands
//! between them, in f32.
//!
//! libtorch's operations are the reference, and the path on every other device. Here a pass is made
//! for decoding: the weights and the shared prefix stream through the cores once for all rows, and
//! nothing but them is read from memory. A row's result is the same to the last bit whatever the
//! other rows of its batch are and however many threads compute: no sum depends on either.

mod attend;
mod causal;
mod elementwise;
mod made;
mod packed;
mod panels;
mod product;
mod sequences;
mod simd;
pub(crate) mod tasks;
#[cfg(test)]
mod tests;
mod training;
mod workspace;

use std::fmt;

use dromedary_torch_ext::{F32Buffer, Rows};
use tch::Tensor;

pub(crate) use made::{MakesPanels, numbers_at_once};
pub use packed::PackedWeight;
pub(crate) use product::{Matrix, Panels, Target};
pub(crate) use sequences::{FusedStep, Sequence, SlotKeys};
pub(crate) use training::QkvRows;
pub(crate) use workspace::{Buffer, Workspace};

use crate::{Result, heads::Heads};
use simd::Level;
pub(crate) use simd::{Simd, UNIT, shift_of};

/// Values of an element-wise pass that are worth a thread.
const PASS: usize = 16 * 1024;

/// The kernels at the level of this CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Kernels {
    level: Level,
}

impl fmt::Display for Kernels {
    /// The instructions that they use.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.level.fmt(f)
    }
}

impl Kernels {
    /// The best that this CPU has.
    pub(crate) fn detect() -> Self {
        Self { level: Level::supported()[0] }
    }

    /// At every level that this CPU has.
    #[cfg(test)]
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        Level::supported().into_iter().map(|level| Self { level })
    }

    /// `weight * x / sqrt(mean(x^2) + eps)`.
    ///
    /// # Shapes
    /// x: `(T, C)`, weight: `(C)`, result: `(T, C)`.
    pub(crate) fn norm(self, x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
        let x = x.contiguous();
        let mut out = F32Buffer::unfilled(&x.size())?;
        let (x, weight) = (Rows::of(&x)?, Rows::of(weight)?);
        self.norm_rows(x.values(), (weight.values(), eps), out.values_mut())?;
        Ok(out.into_tensor())
    }

    /// The largest of some logits, and the sum of `e^((logit - largest) / temperature)`, which is NaN
    /// if any of them is. Where all are below `floor` that stands for the largest in the sum.
    pub(crate) fn weigh(self, logits: &[f32], temperature: f64, floor: f32) -> (f32, f64) {
        let temperature = temperature as f32;
        self.level.run(elementwise::Weigh { values: logits, temperature, floor })
    }

    /// Rotates the heads of each token.
    ///
    /// # Shapes
    /// x: `(T, N, D)`, cos and sin: `(T, 1, D/2)`, result: `(T, N, D)`.
    pub(crate) fn rotate(self, x: &Tensor, [cos, sin]: [&Tensor; 2]) -> Result<Tensor> {
        let mut out = F32Buffer::unfilled(&x.size())?;
        let (x, cos, sin) = (Rows::of(x)?, Rows::of(cos)?, Rows::of(sin)?);
        let width = x.width();
        self.by_rows(width, out.values_mut(), |rows, out| {
            for (token, heads) in rows.zip(out.chunks_exact_mut(width)) {
                heads.copy_from_slice(x.row(token));
                let (cos, sin) = (cos.row(token), sin.row(token));
                self.level.run(elementwise::Rotate { cos, sin, heads, back: false });
            }
        })?;
        Ok(out.into_tensor())
    }

    /// `silu(gate) * up`.
    ///
    /// # Shapes
    /// gate_up: `(T, 2 F)`, result: `(T, F)`.
    pub(crate) fn silu_mul(self, gate_up: &Tensor) -> Result<Tensor> {
        let (tokens, both) = gate_up.size2()?;
        let mut out = F32Buffer::unfilled(&[tokens, both / 2])?;
        let gate_up = Rows::of(gate_up)?;
        self.silu_mul_rows(gate_up.values(), gate_up.width() / 2, out.values_mut())?;
        Ok(out.into_tensor())
    }

    /// Keys and values as the prefix of any rows.
    ///
    /// # Shapes
    /// k and v: `(P, KV, D)`.
    pub(crate) fn prefix(self, heads: &Heads, [k, v]: [&Tensor; 2]) -> Result<SlotKeys> {
        let length = k.size()[0] as usize;
        let mut keys = SlotKeys::new(heads, 1, length)?;
        FusedStep::new(self, vec![Sequence::whole(length)]).store(&mut keys, [k, v])?;
        Ok(keys)
    }

    /// Causal attention among the tokens of a prefix.
    ///
    /// # Shapes
    /// q: `(P, H, D)`, result: `(P, H, D)`.
    pub(crate) fn attend_within(
        self,
        heads: &Heads,
        keys: &SlotKeys,
        q: &Tensor,
    ) -> Result<Tensor> {
        let length = q.size()[0] as usize;
        FusedStep::new(self, vec![Sequence::whole(length)]).attend(heads, keys, None, q)
    }

    /// Calls `pass` for ranges of rows with their rows of `out`, on several threads where there is
    /// enough to do.
    fn by_rows(
        self,
        width: usize,
        out: &mut [f32],
        pass: impl Fn(std::ops::Range<usize>, &mut [f32]) + Sync,
    ) -> Result<()> {
        if width == 0 || out.len() <= PASS {
            pass(0..out.len().checked_div(width).unwrap_or(0), out);
            return Ok(());
        }
        let per_task = (PASS / width).max(1);
        let tasks = out.chunks_mut(per_task * width).enumerate().collect();
        tasks::run(
            tasks,
            || (),
            |(), (index, out): (usize, &mut [f32])| {
                let start = index * per_task;
                pass(start..start + out.len() / width, out);
            },
        )
    }
}
