//! The values of f32 tensors as slices, and work on libtorch's threads: what kernels in Rust need.

// Shapes: N = rows (the first dimension), the rest of a tensor is one row.

use std::ops::Range;

use tch::{Device, Kind, Tensor, no_grad};

use crate::{Error, Result, ffi};

/// The rows of an f32 CPU tensor: each is contiguous, and they are equally far apart.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    values: &'a [f32],
    len: usize,
    width: usize,
    stride: usize,
}

impl<'a> Rows<'a> {
    /// The rows of a tensor of at least one dimension; a narrowed one is taken as it lies.
    ///
    /// # Errors
    /// Another kind or device; a row that is not contiguous.
    pub fn of(tensor: &'a Tensor) -> Result<Self> {
        let refuse = |what: &str| {
            let message = format!("{what}, got {tensor:?} with strides {:?}", tensor.stride());
            Err(Error::Torch { operation: "rows of a tensor", message })
        };
        if tensor.kind() != Kind::Float || tensor.device() != Device::Cpu || tensor.dim() == 0 {
            return refuse("want f32 rows on the CPU");
        }
        let (size, strides) = (tensor.size(), tensor.stride());
        let mut width = 1;
        for (&size, &stride) in size.iter().zip(&strides).skip(1).rev() {
            if stride != width && size > 1 {
                return refuse("want contiguous rows");
            }
            width *= size;
        }
        let (len, width) = (size[0] as usize, width as usize);
        let stride = if len > 1 { strides[0] as usize } else { width };
        let span = if len * width == 0 { 0 } else { (len - 1) * stride + width };
        Ok(Self { values: ffi::f32_values(tensor, span), len, width, stride })
    }

    /// N.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Values of a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// From a row to the next.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// All values from the first row's first to the last row's last, gaps included.
    pub fn values(&self) -> &'a [f32] {
        self.values
    }

    /// One row.
    pub fn row(&self, index: usize) -> &'a [f32] {
        &self.values[index * self.stride..][..self.width]
    }
}

/// f32 values on a cache line's border, as libtorch allocates them.
#[derive(Debug)]
pub struct F32Buffer {
    tensor: Tensor,
    len: usize,
}

impl F32Buffer {
    /// Zeros.
    ///
    /// # Errors
    /// No memory.
    pub fn zeros(size: &[i64]) -> Result<Self> {
        Self::of(Tensor::f_zeros(size, (Kind::Float, Device::Cpu)))
    }

    /// Values that hold anything, for what is written in whole: zeroing results costs a pass over
    /// each, on one thread.
    ///
    /// # Errors
    /// No memory.
    pub fn unfilled(size: &[i64]) -> Result<Self> {
        Self::of(Tensor::f_empty(size, (Kind::Float, Device::Cpu)))
    }

    fn of(tensor: std::result::Result<Tensor, tch::TchError>) -> Result<Self> {
        let tensor = tensor.map_err(|error| failed("buffer", &error))?;
        let len = tensor.numel();
        Ok(Self { tensor, len })
    }

    /// Takes over the values of a tensor of any kind on the CPU, row by row, into the first of these.
    ///
    /// # Errors
    /// `source` has more values.
    pub fn convert_from(&mut self, source: &Tensor) -> Result<()> {
        let convert = || {
            let first = self.tensor.f_view([-1])?.f_narrow(0, 0, source.numel() as i64)?;
            first.f_view(&source.size()[..])?.f_copy_(source)
        };
        no_grad(convert).map_err(|error| failed("conversion to f32", &error))
    }

    /// Its dimensions.
    pub fn size(&self) -> Vec<i64> {
        self.tensor.size()
    }

    /// The values.
    pub fn values(&self) -> &[f32] {
        ffi::f32_values(&self.tensor, self.len)
    }

    /// The values, to be written.
    pub fn values_mut(&mut self) -> &mut [f32] {
        ffi::f32_values_mut(&mut self.tensor, self.len)
    }

    /// The tensor of these values.
    pub fn into_tensor(self) -> Tensor {
        self.tensor
    }
}

/// What libtorch said in its first line; the rest is its stack.
fn failed(operation: &'static str, error: &tch::TchError) -> Error {
    let message = error.to_string().lines().next().unwrap_or_default().to_owned();
    Error::Torch { operation, message }
}

/// Calls `body` with ranges that together make `0..count`, on the threads that libtorch's operations
/// run on in this thread (`tch::set_num_threads`), each with one range.
///
/// # Errors
/// libtorch could not start its threads. A panic in `body` ends the process.
pub fn parallel_for(count: usize, body: impl Fn(Range<usize>) + Sync) -> Result<()> {
    ffi::parallel_for(count, &body)
}

/// Gives memory back to the system that the allocator keeps between what is in use. Worth its
/// milliseconds after work that leaves many holes, such as laying weights out anew one by one.
pub fn release_free_memory() {
    ffi::release_free_memory();
}

/// The threads that [`parallel_for`] has at most.
pub fn num_threads() -> usize {
    ffi::num_threads()
}
