//! The border to `csrc/torch_ext.cpp`: the crate's only `unsafe` code.

use std::ffi::{CStr, c_char, c_void};
use std::ops::Range;
use std::ptr::{NonNull, null_mut};

use tch::Tensor;
use torch_sys::C_tensor;

use crate::{AdamW, AdamWState, Error, Result};

unsafe extern "C" {
    fn te_pack_weight(weight: *const C_tensor, out: *mut *mut C_tensor) -> *mut c_char;
    fn te_unpack_weight(packed: *const C_tensor, out: *mut *mut C_tensor) -> *mut c_char;
    fn te_packed_linear(
        x: *const C_tensor,
        packed: *const C_tensor,
        out: *mut *mut C_tensor,
    ) -> *mut c_char;
    fn te_run_backward(
        outputs: *const *const C_tensor,
        grad_outputs: *const *const C_tensor,
        n_outputs: usize,
        inputs: *const *const C_tensor,
        n_inputs: usize,
        keep_graph: bool,
        grads: *mut *mut C_tensor,
    ) -> *mut c_char;
    fn te_fused_adamw(
        parameter: *mut C_tensor,
        grad: *const C_tensor,
        exp_avg: *mut C_tensor,
        exp_avg_sq: *mut C_tensor,
        step: f64,
        lr: f64,
        beta1: f64,
        beta2: f64,
        eps: f64,
        weight_decay: f64,
    ) -> *mut c_char;
    fn te_parallel_for(
        count: usize,
        body: extern "C" fn(*mut c_void, usize, usize),
        context: *mut c_void,
    ) -> *mut c_char;
    safe fn te_num_threads() -> usize;
}

/// The message of a failed call as an error; it is freed here.
fn check(operation: &'static str, message: *mut c_char) -> Result<()> {
    let Some(message) = NonNull::new(message) else { return Ok(()) };
    // SAFETY: a message that is not null is a NUL-terminated string that the C++ side allocated
    // with malloc and handed over.
    let text = unsafe { CStr::from_ptr(message.as_ptr()) }.to_string_lossy().into_owned();
    // SAFETY: as above; nothing else holds the pointer, and `text` is a copy.
    unsafe { libc::free(message.as_ptr().cast()) };
    Err(Error::Torch { operation, message: text })
}

/// Takes over a tensor that the C++ side made with `new`.
fn owned(operation: &'static str, tensor: *mut C_tensor) -> Result<Tensor> {
    if tensor.is_null() {
        return Err(Error::Torch { operation, message: "no tensor was returned".to_owned() });
    }
    // SAFETY: every pointer that reaches this function was written by a call that succeeded, and
    // is owned by nobody else.
    Ok(unsafe { Tensor::from_ptr(tensor) })
}

fn pointers(tensors: &[&Tensor]) -> Vec<*const C_tensor> {
    tensors.iter().map(|tensor| tensor.as_ptr()).collect()
}

pub(crate) fn pack_weight(weight: &Tensor) -> Result<Tensor> {
    let mut out = null_mut();
    // SAFETY: `weight` is a live tensor, `out` a place for one pointer; both outlive the call.
    let message = unsafe { te_pack_weight(weight.as_ptr(), &mut out) };
    check("pack weight", message)?;
    owned("pack weight", out)
}

pub(crate) fn unpack_weight(packed: &Tensor) -> Result<Tensor> {
    let mut out = null_mut();
    // SAFETY: as in `pack_weight`.
    let message = unsafe { te_unpack_weight(packed.as_ptr(), &mut out) };
    check("unpack weight", message)?;
    owned("unpack weight", out)
}

pub(crate) fn packed_linear(x: &Tensor, packed: &Tensor) -> Result<Tensor> {
    let mut out = null_mut();
    // SAFETY: as in `pack_weight`.
    let message = unsafe { te_packed_linear(x.as_ptr(), packed.as_ptr(), &mut out) };
    check("packed linear", message)?;
    owned("packed linear", out)
}

/// `outputs` and `grad_outputs` are equally long.
pub(crate) fn run_backward(
    outputs: &[&Tensor],
    grad_outputs: &[&Tensor],
    inputs: &[&Tensor],
    keep_graph: bool,
) -> Result<Vec<Option<Tensor>>> {
    debug_assert_eq!(outputs.len(), grad_outputs.len());
    let (roots, seeds, leaves) = (pointers(outputs), pointers(grad_outputs), pointers(inputs));
    let mut grads = vec![null_mut(); leaves.len()];
    // SAFETY: the arrays hold pointers to live tensors and are as long as the counts say; `grads`
    // has one place an input.
    let message = unsafe {
        te_run_backward(
            roots.as_ptr(),
            seeds.as_ptr(),
            roots.len(),
            leaves.as_ptr(),
            leaves.len(),
            keep_graph,
            grads.as_mut_ptr(),
        )
    };
    check("run backward", message)?;
    grads
        .into_iter()
        .map(|grad| if grad.is_null() { Ok(None) } else { owned("run backward", grad).map(Some) })
        .collect()
}

pub(crate) fn fused_adamw(state: AdamWState<'_>, step: u64, config: &AdamW) -> Result<()> {
    // SAFETY: four live tensors, of which the changed ones are borrowed mutably.
    let message = unsafe {
        te_fused_adamw(
            state.parameter.as_mut_ptr(),
            state.grad.as_ptr(),
            state.exp_avg.as_mut_ptr(),
            state.exp_avg_sq.as_mut_ptr(),
            step as f64,
            config.lr,
            config.beta1,
            config.beta2,
            config.eps,
            config.weight_decay,
        )
    };
    check("fused AdamW", message)
}

pub(crate) fn num_threads() -> usize {
    te_num_threads()
}

/// `body` for ranges that together make `0..count`, on libtorch's threads.
pub(crate) fn parallel_for(count: usize, body: &(dyn Fn(Range<usize>) + Sync)) -> Result<()> {
    // A panic ends the process here: it may not pass through C++.
    extern "C" fn call(context: *mut c_void, begin: usize, end: usize) {
        // SAFETY: `context` points to `body` below, which outlives the call of `te_parallel_for`
        // and may be shared between threads.
        let body = unsafe { &*context.cast::<&(dyn Fn(Range<usize>) + Sync)>() };
        body(begin..end);
    }
    let context: *const &(dyn Fn(Range<usize>) + Sync) = &body;
    // SAFETY: `call` gets the context that it expects, and is not called any more when this
    // returns.
    let message = unsafe { te_parallel_for(count, call, context.cast_mut().cast()) };
    check("parallel for", message)
}

/// The values of a dense f32 CPU tensor, whose last `inner` dimensions lie without gaps.
///
/// The span is from the first to the last value, gaps between rows of the first dimension included.
pub(crate) fn f32_values(tensor: &Tensor, span: usize) -> &[f32] {
    if span == 0 {
        return &[];
    }
    // SAFETY: the callers in `values.rs` have checked kind, device and layout, so that `span`
    // values lie behind the pointer. Where libtorch has allocated them and nobody has written them yet,
    // they hold what its allocator, which the compiler cannot see into, left there: some f32, like
    // any 32 bits. Nothing writes to them while the tensor is borrowed,
    // unless someone holds another handle of it, as libtorch's own operations assume too.
    unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast_const().cast(), span) }
}

/// The values of a contiguous f32 CPU tensor that has no other handle.
pub(crate) fn f32_values_mut(tensor: &mut Tensor, length: usize) -> &mut [f32] {
    if length == 0 {
        return &mut [];
    }
    // SAFETY: as above; the callers made the tensor, and its only handle is borrowed mutably.
    unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast(), length) }
}

pub(crate) fn release_free_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: it may be called at any time; it looks at memory alone that nobody has allocated.
    unsafe {
        libc::malloc_trim(0);
    }
}
