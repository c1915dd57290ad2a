//! Brief overview: what libtorch can do and tch does not bind, behind safe functions.
//!
//! Three things, each by itself: [`run_backward`] starts a backward pass from given gradients, which is
//! how a graph is cut into pieces, and [`fused_adamw`] is one optimizer step in one pass over the
//! memory. [`Rows`], [`F32Buffer`] and [`parallel_for`] are what kernels in Rust need of libtorch:
//! values and threads. [`PackedWeight`] is a weight that oneDNN has laid out once for inference, which
//! kernels of one's own are measured against.
//!
//! The crate holds one C++ file and all the `unsafe` code around it. C++ exceptions arrive as
//! [`Error`] with the first line of their message.
//!
//! ```no_run
//! use dromedary_torch_ext::run_backward;
//! use tch::{Device, Kind, Tensor};
//!
//! # fn main() -> dromedary_torch_ext::Result<()> {
//! let float = (Kind::Float, Device::Cpu);
//! let weight = Tensor::randn([3072, 576], float);
//! let x = Tensor::randn([32, 576], float).set_requires_grad(true);
//! let y = x.matmul(&weight.tr());
//! let grad_x = run_backward(&[&y], &[&y.ones_like()], &[&x], false)?;
//! # Ok(())
//! # }
//! ```

mod autograd;
mod error;
mod ffi;
mod packed;
mod values;

pub use autograd::{AdamW, AdamWState, fused_adamw, run_backward};
pub use error::{Error, Result};
pub use packed::{PackedWeight, packing_supported};
pub use values::{F32Buffer, Rows, num_threads, parallel_for, release_free_memory};
