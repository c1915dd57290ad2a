//! A tensor that lies in several files, as one.

use std::ops::Range;

use tch::Tensor;

use super::file::TensorFile;
use crate::{attention::one_or_cat, error::Result};

/// Where the pieces of a tensor are, in their order.
#[derive(Debug, Clone)]
pub(crate) struct Pieces {
    pub(crate) split: Split,
    pub(crate) parts: Vec<Piece>,
}

/// Along which dimension a tensor is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Split {
    /// Each file has all of it.
    Replicated,
    Rows,
    Columns,
}

/// A range of rows or columns of a stored tensor.
#[derive(Debug, Clone)]
pub(crate) struct Piece {
    /// Number of the file.
    pub(crate) file: usize,
    /// The stored tensor's name.
    pub(crate) name: String,
    /// What of it belongs to the whole.
    pub(crate) range: Range<i64>,
}

impl Pieces {
    /// Some rows, and of them some columns; for a vector, `columns` is not looked at. `file` gives the
    /// file of a number.
    pub(crate) fn read<'a>(
        &self,
        file: &dyn Fn(usize) -> Result<&'a TensorFile>,
        rows: Range<i64>,
        columns: Range<i64>,
    ) -> Result<Tensor> {
        let wanted = match self.split {
            Split::Replicated => {
                let piece = &self.parts[0];
                return read_of(file(piece.file)?, &piece.name, rows, columns);
            }
            Split::Rows => &rows,
            Split::Columns => &columns,
        };
        let mut read = Vec::new();
        let mut next = 0;
        for piece in &self.parts {
            let here = next..next + (piece.range.end - piece.range.start);
            next = here.end;
            let both = here.start.max(wanted.start)..here.end.min(wanted.end);
            if both.is_empty() {
                continue;
            }
            let shift = piece.range.start - here.start;
            let stored = both.start + shift..both.end + shift;
            let file = file(piece.file)?;
            read.push(match self.split {
                Split::Columns => file.read_block(&piece.name, rows.clone(), stored)?,
                _ => file.read_block(&piece.name, stored, columns.clone())?,
            });
        }
        one_or_cat(read, if self.split == Split::Columns { 1 } else { 0 })
    }
}

fn read_of(file: &TensorFile, name: &str, rows: Range<i64>, columns: Range<i64>) -> Result<Tensor> {
    if file.entry(name)?.shape.len() == 1 {
        return file.read_rows(name, rows);
    }
    file.read_block(name, rows, columns)
}
