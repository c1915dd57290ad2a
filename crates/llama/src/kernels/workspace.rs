//! Memory that is used again from layer to layer: fresh pages cost as much as a pass over them.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    ops::{Deref, DerefMut},
    rc::Rc,
};

use dromedary_torch_ext::F32Buffer;
use tch::Tensor;

use crate::Result;

/// Buffers by the values of a row, all with room for the largest micro-batch so far.
#[derive(Debug, Clone, Default)]
pub(crate) struct Workspace {
    shelf: Rc<RefCell<Shelf>>,
}

#[derive(Debug, Default)]
struct Shelf {
    rows: usize,
    free: BTreeMap<usize, Vec<F32Buffer>>,
}

impl Workspace {
    /// Memory for `rows` rows of `width` values, which hold anything.
    pub(crate) fn take(&self, rows: usize, width: usize) -> Result<Buffer> {
        let mut shelf = self.shelf.borrow_mut();
        if rows > shelf.rows {
            shelf.free.clear();
            shelf.rows = rows;
        }
        let room = shelf.rows;
        let memory = match shelf.free.get_mut(&width).and_then(Vec::pop) {
            Some(memory) => memory,
            None => F32Buffer::zeros(&[room as i64, width as i64])?,
        };
        Ok(Buffer {
            memory: Some(memory),
            length: rows * width,
            width,
            room,
            shelf: self.shelf.clone(),
        })
    }
}

/// Memory of a [`Workspace`], which goes back there.
#[derive(Debug)]
pub(crate) struct Buffer {
    memory: Option<F32Buffer>,
    length: usize,
    width: usize,
    room: usize,
    shelf: Rc<RefCell<Shelf>>,
}

impl Buffer {
    /// Values of a row.
    pub(crate) fn width(&self) -> usize {
        self.width
    }

    /// Takes over the values of a tensor of any kind on the CPU into the first ones.
    ///
    /// # Errors
    /// The tensor has more values.
    pub(crate) fn convert_from(&mut self, tensor: &Tensor) -> Result<()> {
        Ok(self.memory.as_mut().map_or(Ok(()), |memory| memory.convert_from(tensor))?)
    }
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        self.memory.as_ref().map_or(&[], |memory| &memory.values()[..self.length])
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        let length = self.length;
        self.memory.as_mut().map_or(&mut [], |memory| &mut memory.values_mut()[..length])
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut shelf = self.shelf.borrow_mut();
        // Smaller ones than are asked for by now are of no use.
        if let Some(memory) = self.memory.take().filter(|_| self.room == shelf.rows) {
            shelf.free.entry(self.width).or_default().push(memory);
        }
    }
}
