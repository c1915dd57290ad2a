//! Frozen weights in the layout that oneDNN multiplies fastest.

// Shapes: out = out features, in = in features, ... = any leading dimensions.

use std::sync::OnceLock;

use tch::{Device, Kind, Tensor};

use crate::{Result, ffi};

/// A frozen weight `(out, in)`, packed once for the CPU's matrix units.
///
/// It is a copy: the dense weight may be dropped, and a later change of it is not seen.
#[derive(Debug)]
pub struct PackedWeight {
    tensor: Tensor,
}

impl PackedWeight {
    /// Packs a dense f32 CPU weight `(out, in)`.
    ///
    /// # Errors
    /// Another kind, device or number of dimensions; a weight that requires a gradient while
    /// gradients are recorded; a libtorch without oneDNN (see [`packing_supported`]).
    pub fn pack(weight: &Tensor) -> Result<Self> {
        Ok(Self { tensor: ffi::pack_weight(weight)? })
    }

    /// `(out, in)`.
    pub fn size(&self) -> (i64, i64) {
        let size = self.tensor.size();
        (size[0], size[1])
    }

    /// The dense weight `(out, in)`, newly allocated.
    ///
    /// # Errors
    /// No memory.
    pub fn unpack(&self) -> Result<Tensor> {
        ffi::unpack_weight(&self.tensor)
    }

    /// `y = x W^T` for inference.
    ///
    /// # Shapes
    /// x: `(..., in)`, result: `(..., out)`.
    ///
    /// # Errors
    /// `x` requires a gradient while gradients are recorded, which the operation would lose without a
    /// word; or `x` is not f32, not on the CPU, or its last dimension is not `in`.
    pub fn linear(&self, x: &Tensor) -> Result<Tensor> {
        ffi::packed_linear(x, &self.tensor)
    }
}

/// Whether [`PackedWeight::pack`] works in this process: libtorch has oneDNN and it runs here.
/// Where it does not, a dense `x.matmul(&w.tr())` gives the same numbers.
pub fn packing_supported() -> bool {
    static SUPPORTED: OnceLock<bool> = OnceLock::new();
    *SUPPORTED.get_or_init(|| {
        tch::no_grad(|| {
            let weight = Tensor::eye(8, (Kind::Float, Device::Cpu));
            PackedWeight::pack(&weight)
                .and_then(|packed| packed.linear(&weight))
                .is_ok_and(|product| product == weight)
        })
    })
}
