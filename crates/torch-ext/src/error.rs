//! What can go wrong at the border to libtorch.

/// The result of this crate's functions.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// libtorch refused an operation: a wrong shape or kind, no memory, a gradient that would be lost.
    #[error("{operation}: {message}")]
    Torch {
        /// What was asked of libtorch.
        operation: &'static str,
        /// The first line of what it said.
        message: String,
    },
    /// [`run_backward`](crate::run_backward) was given another number of gradients than of outputs.
    #[error("run backward: {outputs} outputs but {grad_outputs} gradients for them")]
    GradOutputs {
        /// Number of outputs.
        outputs: usize,
        /// Number of gradients.
        grad_outputs: usize,
    },
    /// The optimizer step is counted from one: its bias correction divides by zero at step 0.
    #[error("fused AdamW: steps are counted from 1, got 0")]
    StepZero,
}
