//! Backward from given gradients, and the optimizer step that goes with it.

use std::borrow::Borrow;

use tch::Tensor;

use crate::{Error, Result, ffi};

/// The gradients of `inputs` when the gradients of `outputs` are `grad_outputs`; `None` for an
/// input that no output depends on. Nothing is added to `.grad` of any tensor.
///
/// # Errors
/// Different numbers of outputs and gradients, a gradient of another shape than its output, an
/// output without a graph, a graph that was already run backward without `keep_graph`.
pub fn run_backward<O, G, I>(
    outputs: &[O],
    grad_outputs: &[G],
    inputs: &[I],
    keep_graph: bool,
) -> Result<Vec<Option<Tensor>>>
where
    O: Borrow<Tensor>,
    G: Borrow<Tensor>,
    I: Borrow<Tensor>,
{
    if outputs.len() != grad_outputs.len() {
        return Err(Error::GradOutputs {
            outputs: outputs.len(),
            grad_outputs: grad_outputs.len(),
        });
    }
    ffi::run_backward(&borrowed(outputs), &borrowed(grad_outputs), &borrowed(inputs), keep_graph)
}

fn borrowed<T: Borrow<Tensor>>(tensors: &[T]) -> Vec<&Tensor> {
    tensors.iter().map(Borrow::borrow).collect()
}

/// What AdamW needs besides the tensors.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Learning rate of this step.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay, multiplied by the learning rate.
    pub weight_decay: f64,
}

impl Default for AdamW {
    fn default() -> Self {
        Self { lr: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 }
    }
}

/// The tensors of one AdamW step, all of one shape and kind.
#[derive(Debug)]
pub struct AdamWState<'a> {
    /// The weights; changed.
    pub parameter: &'a mut Tensor,
    /// Their gradient.
    pub grad: &'a Tensor,
    /// Running mean of the gradient; changed.
    pub exp_avg: &'a mut Tensor,
    /// Running mean of its square; changed.
    pub exp_avg_sq: &'a mut Tensor,
}

/// One AdamW step in one pass over the memory; `step` counts from 1.
///
/// # Errors
/// `step` is 0, or the tensors differ in shape or kind.
pub fn fused_adamw(state: AdamWState<'_>, step: u64, config: &AdamW) -> Result<()> {
    if step == 0 {
        return Err(Error::StepZero);
    }
    ffi::fused_adamw(state, step, config)
}
