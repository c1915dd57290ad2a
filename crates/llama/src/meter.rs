use std::{
    cell::{Cell, RefCell},
    ops::ControlFlow,
};

use tch::Tensor;

use crate::{
    checkpoint::return_large_blocks,
    error::{Error, Result},
};

/// Counts what a tool writes, and asks its caller whether to go on.
pub(crate) struct Meter<'a> {
    progress: RefCell<&'a mut dyn FnMut(u64) -> ControlFlow<()>>,
    bytes: Cell<u64>,
}

impl<'a> Meter<'a> {
    /// Begins a tool's work, for the whole of which memory is to stay as small as its blocks.
    pub(crate) fn new(progress: &'a mut dyn FnMut(u64) -> ControlFlow<()>) -> Self {
        return_large_blocks();
        Self { progress: RefCell::new(progress), bytes: Cell::new(0) }
    }

    /// Counts a block that was written.
    ///
    /// # Errors
    /// [`Error::Interrupted`].
    pub(crate) fn written(&self, block: &Tensor) -> Result<()> {
        self.count((block.numel() * block.f_kind()?.elt_size_in_bytes()) as u64)
    }

    /// Counts a block that was not written.
    ///
    /// # Errors
    /// [`Error::Interrupted`].
    pub(crate) fn looked_at(&self) -> Result<()> {
        self.count(0)
    }

    /// Bytes of all blocks that were written.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.get()
    }

    fn count(&self, bytes: u64) -> Result<()> {
        self.bytes.set(self.bytes.get() + bytes);
        let mut progress = self.progress.borrow_mut();
        if progress(bytes).is_break() { Err(Error::Interrupted) } else { Ok(()) }
    }
}
