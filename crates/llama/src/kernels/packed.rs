//! The weight of a linear layer, packed for these kernels.

// Shapes: T = tokens, I = in features, O = out features.

use std::fmt;

use dromedary_torch_ext::{F32Buffer, Rows};
use tch::Tensor;

use super::{
    Kernels, panels,
    simd::{Columns, UNIT},
    tasks,
};
use crate::{Error, Result};

/// A frozen weight `(O, I)`, laid out so that a product reads it once and in order.
///
/// It is a copy: the dense weight may be dropped.
pub struct PackedWeight {
    kernels: Kernels,
    panels: F32Buffer, // (O / 16, I, 16)
    out: usize,
    depth: usize,
}

impl fmt::Debug for PackedWeight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PackedWeight({}, {})", self.out, self.depth)
    }
}

impl PackedWeight {
    /// Packs a dense f32 CPU weight.
    pub(crate) fn pack(kernels: Kernels, weight: &Tensor) -> Result<Self> {
        let weight = weight.f_contiguous()?;
        let (out, depth) = weight.size2()?;
        let units = (out as usize).div_ceil(UNIT) as i64;
        let mut packed = F32Buffer::zeros(&[units, depth, UNIT as i64])?;
        let (rows, len) = (Rows::of(&weight)?, depth as usize * UNIT);
        if len > 0 {
            let of_panels = rows.values().chunks(len);
            let tasks = of_panels.zip(packed.values_mut().chunks_mut(len)).collect();
            tasks::run(
                tasks,
                || (),
                |(), (weight, panel): (&[f32], &mut [f32])| {
                    panels::pack(weight, depth as usize, panel);
                },
            )?;
        }
        Ok(Self { kernels, panels: packed, out: out as usize, depth: depth as usize })
    }

    /// `(O, I)`.
    pub fn size(&self) -> (i64, i64) {
        (self.out as i64, self.depth as i64)
    }

    /// The dense weight `(O, I)`, newly allocated.
    ///
    /// # Errors
    /// No memory.
    pub fn unpack(&self) -> Result<Tensor> {
        let mut weight = F32Buffer::unfilled(&[self.out as i64, self.depth as i64])?;
        if self.depth > 0 {
            panels::unpack(self.panels.values(), self.depth, weight.values_mut());
        }
        Ok(weight.into_tensor())
    }

    /// Some rows of the weight: the embeddings of tokens where it is the head of a model that has
    /// only one matrix for both.
    ///
    /// # Shapes
    /// result: `(T, I)`.
    ///
    /// # Panics
    /// If a row is not below O.
    pub(crate) fn rows(&self, rows: &[u32]) -> Result<Tensor> {
        let mut out = F32Buffer::unfilled(&[rows.len() as i64, self.depth as i64])?;
        if self.depth > 0 {
            let panels = self.panels.values();
            for (&row, out) in rows.iter().zip(out.values_mut().chunks_exact_mut(self.depth)) {
                panels::unpack_row(panels, self.depth, row as usize, out);
            }
        }
        Ok(out.into_tensor())
    }

    /// `x W^T`. Where a gradient must pass, the weight is unpacked for the moment: backward needs it
    /// the other way round, and a second copy would double the memory of a model.
    ///
    /// # Shapes
    /// x: `(T, I)`, result: `(T, O)`.
    ///
    /// # Errors
    /// `x` is not f32 on the CPU or has another number of columns, no memory.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if x.requires_grad() {
            return Ok(x.f_matmul(&self.unpack()?.tr())?);
        }
        let x = x.f_contiguous()?;
        let (tokens, columns) = x.size2()?;
        if columns as usize != self.depth {
            return Err(Error::Torch(tch::TchError::Torch(format!(
                "packed linear: the input is [{tokens}, {columns}], the weight [{}, {}]",
                self.out, self.depth
            ))));
        }
        let units = self.out.div_ceil(UNIT);
        let size = [tokens, (units * UNIT) as i64];
        // A product over no features writes nothing.
        let mut out =
            if self.depth > 0 { F32Buffer::unfilled(&size)? } else { F32Buffer::zeros(&size)? };
        let x = Rows::of(&x)?;
        let shares = tasks::shares(units);
        let columns: Vec<_> =
            shares.iter().map(|units| units.start * UNIT..units.end * UNIT).collect();
        if tokens > 0 {
            let out = Columns::of(out.values_mut(), units * UNIT).cut(&columns);
            let tasks = shares.into_iter().zip(out).collect();
            let (x, panels) = (x.values(), self.panels.values());
            let (depth, level) = (self.depth, self.kernels.level);
            tasks::run(
                tasks,
                || (),
                |(), (units, out)| {
                    level.run(panels::Multiply { x, panels, depth, units, out });
                },
            )?;
        }
        let out = out.into_tensor();
        let whole = units * UNIT == self.out;
        Ok(if whole { out } else { out.f_narrow(1, 0, self.out as i64)?.f_contiguous()? })
    }
}
