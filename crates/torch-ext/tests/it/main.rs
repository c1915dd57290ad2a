//! What the C++ side promises, against plain libtorch operations.

#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

use tch::{Device, Kind, Tensor};

/// Backward passes from given gradients.
mod backward;
/// The optimizer step.
mod optimizer;
/// Packed weights.
mod packed;
/// Values in and out of tensors.
mod values;

const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);

/// Equal up to `tolerance` times the largest element of `want`.
#[track_caller]
fn assert_close(got: &Tensor, want: &Tensor, tolerance: f64) {
    assert_eq!(got.size(), want.size());
    let difference = (got - want).abs().max().double_value(&[]);
    let largest = want.abs().max().double_value(&[]);
    assert!(difference <= tolerance * largest, "off by {difference:e} of {largest:e}");
}

#[track_caller]
fn message<T: std::fmt::Debug>(result: dromedary_torch_ext::Result<T>) -> String {
    let message = result.unwrap_err().to_string();
    assert!(!message.contains('\n'), "more than one line: {message}");
    message
}
