//! Tensors whose bytes are read from files, and how their memory is allocated.

use tch::{Device, Kind, Tensor};

use crate::error::Result;

/// A new tensor on the CPU and its bytes, which `fill` writes.
///
/// Files are read straight into it: a copy through a buffer would double the work of loading.
pub(super) fn filled(
    shape: &[i64],
    kind: Kind,
    fill: impl FnOnce(&mut [u8]) -> Result<()>,
) -> Result<Tensor> {
    let tensor = Tensor::f_empty(shape, (kind, Device::Cpu))?;
    let len = tensor.numel() * kind.elt_size_in_bytes();
    if len == 0 {
        fill(&mut [])?;
        return Ok(tensor);
    }
    // SAFETY: the tensor is new, contiguous, on the CPU and known to nobody else, so its storage
    // is `len` bytes that nothing else reads or writes while the slice lives; they are initialised
    // before the slice is made. (Not by libtorch, which would wake all its threads for it.)
    let bytes = unsafe {
        let start = tensor.data_ptr().cast::<u8>();
        start.write_bytes(0, len);
        std::slice::from_raw_parts_mut(start, len)
    };
    fill(bytes)?;
    Ok(tensor)
}

/// Calls `look` with the bytes of a contiguous CPU tensor.
pub(super) fn with_bytes<R>(tensor: &Tensor, look: impl FnOnce(&[u8]) -> R) -> Result<R> {
    let tensor = tensor.f_detach()?.f_to(Device::Cpu)?.f_contiguous()?;
    let len = tensor.numel() * tensor.f_kind()?.elt_size_in_bytes();
    if len == 0 {
        return Ok(look(&[]));
    }
    // SAFETY: the tensor is contiguous and on the CPU, so its elements are `len` initialised bytes
    // from `data_ptr` on; it lives until the end of this function, and `look` gets no tensor to
    // write with.
    let bytes = unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast::<u8>(), len) };
    Ok(look(bytes))
}

/// Lets the process return blocks of more than a megabyte to the system as soon as they are freed.
///
/// glibc's allocator moves its border between such blocks and its heap up to 32 MB as it sees them freed.
/// The blocks of a streaming tool then lie in the heap, which their different sizes and the small things
/// between them tear into pieces: it grew by 40 MB for each GB of a checkpoint that passed.
pub(crate) fn return_large_blocks() {
    #[cfg(target_env = "gnu")]
    // SAFETY: `mallopt` takes two numbers and locks the allocator itself; a number that it does not
    // know changes nothing.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 20);
    }
}
