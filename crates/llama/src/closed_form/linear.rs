//! Linear layers with their adapters, forward and backward.
//!
//! Where a micro-batch has tokens enough, adapters are added to the weight for the moment: one thin
//! product a layer stands in place of two thin products over all tokens.

// Shapes: T = tokens, I = in and O = out features, r = LoRA rank, R = sum of the ranks of all parts.

use std::time::Instant;

use dromedary_torch_ext::{F32Buffer, Rows};
use tch::{Kind, Tensor, no_grad};

use super::{
    ClosedForm,
    factors::{Factors, PartFactors},
};
use crate::{
    Linear, Result, Weight,
    kernels::{Buffer, Kernels, Matrix, Panels, Target},
};

/// Sides of the matrices whose product tells the speed of this machine, and how often it is taken.
const PROBE: usize = 1024;
const PROBES: usize = 8;

/// What passes back through a linear layer.
pub(super) struct Through<'a> {
    pub(super) input: &'a [f32],    // (T, I)
    pub(super) low: Option<Buffer>, // (T, R)
    pub(super) grad: &'a [f32],     // (T, O)
}

/// What the input is multiplied by.
enum Effective {
    /// The weight as it is kept; adapters are apart.
    Kept(Tensor),
    /// A copy for the moment, `(O, I)`: converted to f32, or with what the adapters add to it, or both.
    Made { values: Buffer, sizes: [usize; 2], adapted: bool },
}

impl Effective {
    fn matrix(&self) -> Result<Matrix<'_>> {
        match self {
            Self::Kept(weight) => matrix(weight),
            Self::Made { values, sizes: [columns, depth], .. } => {
                Ok(Matrix::new(&values[..columns * depth], [*columns, *depth], *depth))
            }
        }
    }

    /// Whether the adapters are in it.
    fn is_adapted(&self) -> bool {
        matches!(self, Self::Made { adapted: true, .. })
    }
}

impl ClosedForm {
    /// Floating-point operations a second of a large product on this process's threads, measured for a
    /// moment.
    ///
    /// # Errors
    /// No memory.
    pub fn measured_speed() -> Result<f64> {
        let (kernels, mut panels) = (Kernels::detect(), Panels::default());
        let values = vec![1.0f32; PROBE * PROBE];
        let mut out = vec![0.0f32; PROBE * PROBE];
        let factor = Matrix::new(&values, [PROBE, PROBE], PROBE);
        let mut best = f64::INFINITY;
        for _ in 0..PROBES {
            let start = Instant::now();
            kernels.multiply((factor, factor, 1.0), Target::new(&mut out, PROBE), &mut panels)?;
            best = best.min(start.elapsed().as_secs_f64());
        }
        Ok(2.0 * (PROBE as f64).powi(3) / best)
    }

    /// `out = x W^T`, plus the adapter of each part; gives the low-rank values of the adapters, where it
    /// computed them.
    pub(super) fn linear(
        &self,
        linear: &Linear,
        x: &[f32],
        out: &mut [f32],
    ) -> Result<Option<Buffer>> {
        let [columns, depth] = sizes(linear);
        let x = Matrix::new(x, [x.len() / depth, depth], depth);
        let factors = Factors::of(linear)?;
        let weight = self.effective(linear, &factors, x.rows_len())?;
        self.multiply((x, weight.matrix()?.t(), 1.0), Target::new(out, columns))?;
        if factors.width == 0 || weight.is_adapted() {
            return Ok(None);
        }
        let low = self.low(&factors, x)?;
        for of in &factors.parts {
            let of_part = (factors.low(&low).columns(of.low.clone()), of.b()?.t(), 1.0);
            let target = Target::new(out, columns).columns(of.rows.clone());
            self.multiply(of_part, target.accumulate())?;
        }
        Ok(Some(low))
    }

    fn effective(&self, linear: &Linear, factors: &Factors, tokens: usize) -> Result<Effective> {
        let [columns, depth] = sizes(linear);
        let adapted = factors.merge_pays(depth, tokens);
        let numbers = columns * depth;
        let mut values = match &linear.weight {
            Weight::Nf4(weight) => {
                let mut values = self.weights.take(1, self.largest_converted)?;
                weight.dequantise_into(&mut values[..numbers])?;
                values
            }
            weight => {
                let weight = weight.dense()?;
                let is_f32 = weight.f_kind()? == Kind::Float;
                // A head may be larger than every layer; its copy does not outlive the moment.
                if !adapted && (is_f32 || numbers > self.largest_converted) {
                    return Ok(Effective::Kept(f32_rows(&weight)?));
                }
                let room = if is_f32 { numbers } else { numbers.max(self.largest_converted) };
                let mut values = self.weights.take(1, room)?;
                values.convert_from(&weight)?;
                values
            }
        };
        for of in factors.parts.iter().filter(|_| adapted) {
            let rows = &mut values[of.rows.start * depth..of.rows.end * depth];
            let target = Target::new(rows, depth).accumulate();
            self.multiply((of.b()?, of.a()?, of.scaling), target)?;
        }
        Ok(Effective::Made { values, sizes: [columns, depth], adapted })
    }

    /// `scaling dropout(x) A^T` of each adapter: `(T, R)`.
    fn low(&self, factors: &Factors, x: Matrix<'_>) -> Result<Buffer> {
        let mut low = self.workspace.take(x.rows_len(), factors.width)?;
        for of in &factors.parts {
            let target = Target::new(&mut low, factors.width).columns(of.low.clone());
            let dropped = self.dropped(of, x)?;
            let x = dropped.as_deref().map_or(x, |dropped| x.like(dropped));
            self.multiply((x, of.a()?.t(), of.scaling), target)?;
        }
        Ok(low)
    }

    /// The input of an adapter, where dropout changes it.
    fn dropped(&self, of: &PartFactors, x: Matrix<'_>) -> Result<Option<Buffer>> {
        let Some(mask) = of.mask else { return Ok(None) };
        let mut dropped = self.workspace.take(x.rows_len(), x.columns_len())?;
        dropped.copy_from_slice(x.contiguous());
        self.kernels.apply_mask(mask, x.columns_len(), &mut dropped)?;
        Ok(Some(dropped))
    }

    /// The gradient of the input, `(T, I)`, and those of what the layer trains.
    pub(super) fn linear_backward(
        &self,
        linear: &Linear,
        through: Through<'_>,
        grad_x: &mut [f32],
        trained: &mut Vec<Tensor>,
    ) -> Result<()> {
        let [columns, depth] = sizes(linear);
        let tokens = through.grad.len() / columns;
        let x = Matrix::new(through.input, [tokens, depth], depth);
        let grad = Matrix::new(through.grad, [tokens, columns], columns);
        let factors = Factors::of(linear)?;
        let weight = self.effective(linear, &factors, tokens)?;
        self.multiply((grad, weight.matrix()?, 1.0), Target::new(grad_x, depth))?;
        let merged = weight.is_adapted();
        drop(weight);
        if self.trains_weights {
            trained.push(self.product(grad.t(), x)?);
            return Ok(());
        }
        if factors.width == 0 {
            return Ok(());
        }
        let low = through.low.map_or_else(|| self.low(&factors, x), Ok)?;
        let grad_low = self.grad_low(&factors, grad)?;
        let grad_low = factors.low(&grad_low);
        let of_a = if factors.drops() {
            self.masked_gradients(&factors, (x, grad_low), grad_x)?
        } else {
            if !merged {
                let stacked = factors.stacked_a()?;
                let stacked = Matrix::new(&stacked, [factors.width, depth], depth);
                self.multiply((grad_low, stacked, 1.0), Target::new(grad_x, depth).accumulate())?;
            }
            // As (I, R), which is read along the long side; each A is a transposed part of it.
            let of_a = self.product(x.t(), grad_low)?;
            let part = |of: &PartFactors| {
                Ok(of_a.f_narrow(1, of.low.start as i64, of.low.len() as i64)?.tr())
            };
            factors.parts.iter().map(part).collect::<Result<_>>()?
        };
        for (of, of_a) in factors.parts.iter().zip(of_a) {
            let low = factors.low(&low).columns(of.low.clone());
            let of_b = self.product(grad.columns(of.rows.clone()).t(), low)?;
            trained.extend([of_a, of_b]);
        }
        Ok(())
    }

    /// The gradient of the low-rank values: `(T, R)`.
    fn grad_low(&self, factors: &Factors, grad: Matrix<'_>) -> Result<Buffer> {
        let mut grad_low = self.workspace.take(grad.rows_len(), factors.width)?;
        for of in &factors.parts {
            let target = Target::new(&mut grad_low, factors.width).columns(of.low.clone());
            self.multiply((grad.columns(of.rows.clone()), of.b()?, of.scaling), target)?;
        }
        Ok(grad_low)
    }

    /// The gradients of A under dropout, where each adapter has an input of its own; what passes back
    /// through the adapters is added to `grad_x`.
    fn masked_gradients(
        &self,
        factors: &Factors,
        (x, grad_low): (Matrix<'_>, Matrix<'_>),
        grad_x: &mut [f32],
    ) -> Result<Vec<Tensor>> {
        let (tokens, depth) = (x.rows_len(), x.columns_len());
        let mut of_a = Vec::with_capacity(factors.parts.len());
        for of in &factors.parts {
            let grad_low = grad_low.columns(of.low.clone());
            let dropped = self.dropped(of, x)?;
            let x = dropped.as_deref().map_or(x, |dropped| x.like(dropped));
            of_a.push(self.product(x.t(), grad_low)?.tr());

            let mut back = self.workspace.take(tokens, depth)?; // (T, I)
            self.multiply((grad_low, of.a()?, 1.0), Target::new(&mut back, depth))?;
            if let Some(mask) = of.mask {
                self.kernels.apply_mask(mask, depth, &mut back)?;
            }
            for (sum, back) in grad_x.iter_mut().zip(&*back) {
                *sum += back;
            }
        }
        Ok(of_a)
    }

    /// `a b` as a tensor of its own.
    pub(super) fn product(&self, a: Matrix<'_>, b: Matrix<'_>) -> Result<Tensor> {
        let columns = b.columns_len();
        let mut product = F32Buffer::zeros(&[a.rows_len() as i64, columns as i64])?;
        self.multiply((a, b, 1.0), Target::new(product.values_mut(), columns))?;
        Ok(product.into_tensor())
    }

    pub(super) fn multiply(
        &self,
        factors: (Matrix<'_>, Matrix<'_>, f32),
        target: Target<'_>,
    ) -> Result<()> {
        self.kernels.multiply(factors, target, &mut self.panels.borrow_mut())
    }
}

/// O and I.
fn sizes(linear: &Linear) -> [usize; 2] {
    let (columns, depth) = linear.weight.size();
    [columns as usize, depth as usize]
}

/// A weight in f32; one kept in another kind is converted for the moment.
pub(super) fn dense(weight: &Weight) -> Result<Tensor> {
    f32_rows(&weight.dense()?)
}

pub(super) fn f32_rows(tensor: &Tensor) -> Result<Tensor> {
    Ok(no_grad(|| tensor.detach().f_to_kind(Kind::Float)?.f_contiguous())?)
}

/// The rows of a contiguous tensor.
pub(super) fn matrix(tensor: &Tensor) -> Result<Matrix<'_>> {
    let rows = Rows::of(tensor)?;
    Ok(Matrix::new(rows.values(), [rows.len(), rows.width()], rows.width()))
}
