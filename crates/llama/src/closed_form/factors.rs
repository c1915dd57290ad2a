//! The adapters of one linear layer.

use std::ops::Range;

use tch::Tensor;

use super::linear::{f32_rows, matrix};
use crate::{Linear, LoraDropout, Result, dropout::Mask, kernels::Matrix};

/// The adapters of a layer's parts.
pub(super) struct Factors {
    pub(super) parts: Vec<PartFactors>,
    /// R.
    pub(super) width: usize,
}

/// The adapter of one part.
pub(super) struct PartFactors {
    /// Rows of the layer's weight.
    pub(super) rows: Range<usize>,
    /// Columns of the low-rank values.
    pub(super) low: Range<usize>,
    a: Tensor, // (r, I)
    b: Tensor, // (O of the part, r)
    pub(super) scaling: f32,
    pub(super) mask: Option<Mask>,
}

impl PartFactors {
    /// `(r, I)`.
    pub(super) fn a(&self) -> Result<Matrix<'_>> {
        matrix(&self.a)
    }

    /// `(O of the part, r)`.
    pub(super) fn b(&self) -> Result<Matrix<'_>> {
        matrix(&self.b)
    }
}

impl Factors {
    pub(super) fn of(linear: &Linear) -> Result<Self> {
        let (mut parts, mut width) = (Vec::new(), 0);
        for part in &linear.parts {
            let Some(lora) = &part.lora else { continue };
            let low = width..width + lora.a.size2()?.0 as usize;
            width = low.end;
            parts.push(PartFactors {
                rows: part.rows.start as usize..part.rows.end as usize,
                low,
                a: f32_rows(&lora.a)?,
                b: f32_rows(&lora.b)?,
                scaling: lora.scaling as f32,
                mask: lora.dropout.as_ref().and_then(LoraDropout::mask),
            });
        }
        Ok(Self { parts, width })
    }

    /// The low-rank values of all parts, `(T, R)`.
    pub(super) fn low<'a>(&self, values: &'a [f32]) -> Matrix<'a> {
        Matrix::new(values, [values.len() / self.width, self.width], self.width)
    }

    /// Whether an adapter has an input of its own.
    pub(super) fn drops(&self) -> bool {
        self.parts.iter().any(|of| of.mask.is_some())
    }

    /// Whether it takes less work to add the adapters to the weight, in forward and in backward, than to
    /// pass so many tokens through B in forward and through A in backward.
    pub(super) fn merge_pays(&self, depth: usize, tokens: usize) -> bool {
        let [mut merged, mut apart] = [0; 2];
        for of in &self.parts {
            let (columns, r) = (of.rows.len(), of.low.len());
            merged += 2 * columns * depth * r;
            apart += tokens * (columns + depth) * r;
        }
        !self.drops() && merged < apart
    }

    /// All A, one below the other: `(R, I)`.
    pub(super) fn stacked_a(&self) -> Result<Vec<f32>> {
        let mut stacked = Vec::new();
        for of in &self.parts {
            stacked.extend_from_slice(of.a()?.contiguous());
        }
        Ok(stacked)
    }
}
