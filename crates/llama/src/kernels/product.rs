//! Products of dense matrices that change from step to step: what training multiplies.
//!
//! The right factor is packed into panels for the moment, which takes a hundredth of the product's time
//! where there are as many rows as in a training batch, and no lasting memory.

// Shapes: M x K is the left factor, K x N the right one.

use std::{fmt, ops::Range};

use super::simd::{
    Columns, Kernel, Level, MAX_ROWS, MAX_UNITS, Product, Simd, UNIT, Units, even_parts,
};
use super::tasks;
use crate::Result;

/// Depth of a block: four units of it and six rows stay in the first-level cache.
const DEPTH: usize = 192;

/// Rows that pass over the right factor together: their part of a block stays in the second-level cache.
const SLAB: usize = 240;

/// Values of the right factor that are packed at a time: some of what the caches share.
const PACKED: usize = 4 << 20;

/// Rows of the right factor that are packed at a time.
const PACKED_DEPTH: usize = 4096;

/// Columns of a group: what a tile has at most.
const GROUP: usize = MAX_UNITS * UNIT;

/// A matrix as it lies in memory, or the transpose of one.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    values: &'a [f32],
    rows: usize,
    columns: usize,
    /// From a row to the next, and from a column to the next; one of them is 1.
    row: usize,
    column: usize,
}

impl<'a> Matrix<'a> {
    /// Row-major, rows `row` apart.
    pub(crate) fn new(values: &'a [f32], [rows, columns]: [usize; 2], row: usize) -> Self {
        assert!(columns <= row || rows <= 1);
        assert!(rows * columns == 0 || (rows - 1) * row + columns <= values.len());
        Self { values, rows, columns, row, column: 1 }
    }

    /// Number of rows.
    pub(crate) fn rows_len(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub(crate) fn columns_len(&self) -> usize {
        self.columns
    }

    /// A contiguous matrix of the same size.
    pub(crate) fn like<'b>(&self, values: &'b [f32]) -> Matrix<'b> {
        Matrix::new(values, [self.rows, self.columns], self.columns)
    }

    /// All values of a matrix that lies row by row without gaps.
    pub(crate) fn contiguous(&self) -> &'a [f32] {
        assert!(self.column == 1 && self.row == self.columns);
        &self.values[..self.rows * self.columns]
    }

    /// The transpose.
    pub(crate) fn t(self) -> Self {
        let Self { values, rows, columns, row, column } = self;
        Self { values, rows: columns, columns: rows, row: column, column: row }
    }

    /// Some of the columns.
    pub(crate) fn columns(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.columns);
        let skipped = (range.start * self.column).min(self.values.len());
        Self { values: &self.values[skipped..], columns: range.end - range.start, ..self }
    }

    /// Some of the rows.
    pub(crate) fn rows(self, range: Range<usize>) -> Self {
        self.t().columns(range).t()
    }

    fn from(&self, row: usize, column: usize) -> &'a [f32] {
        &self.values[row * self.row + column * self.column..]
    }
}

/// Where a product goes: some columns of a row-major matrix.
pub(crate) struct Target<'a> {
    pub(crate) values: &'a mut [f32],
    /// From a row to the next.
    pub(crate) row: usize,
    pub(crate) columns: Range<usize>,
    /// Add to what is there.
    pub(crate) accumulate: bool,
}

impl<'a> Target<'a> {
    /// All columns of a matrix whose rows are `row` long; what was there is lost.
    pub(crate) fn new(values: &'a mut [f32], row: usize) -> Self {
        Self { values, row, columns: 0..row, accumulate: false }
    }

    /// Some of the columns.
    pub(crate) fn columns(self, columns: Range<usize>) -> Self {
        Self { columns, ..self }
    }

    /// Adds to what is there.
    pub(crate) fn accumulate(self) -> Self {
        Self { accumulate: true, ..self }
    }
}

/// The right factor in panels `(N / 16, K, 16)`, times a number; kept to be filled again.
#[derive(Default)]
pub(crate) struct Panels {
    values: Vec<f32>,
}

impl fmt::Debug for Panels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Panels({})", self.values.len())
    }
}

/// `target (+)= alpha a b`.
pub(crate) fn multiply(
    level: Level,
    (a, b, alpha): (Matrix<'_>, Matrix<'_>, f32),
    target: Target<'_>,
    panels: &mut Panels,
) -> Result<()> {
    assert!(a.columns == b.rows && target.columns.len() == b.columns && b.rows > 0);
    if a.rows * b.columns == 0 {
        return Ok(());
    }
    let Target { values, row, columns, accumulate } = target;
    for depths in even_parts(b.rows, PACKED_DEPTH) {
        let most = (PACKED / depths.len()).next_multiple_of(GROUP);
        for part in even_parts(b.columns.div_ceil(GROUP), most / GROUP) {
            let part = part.start * GROUP..(part.end * GROUP).min(b.columns);
            let target = Target {
                values: &mut *values,
                row,
                columns: columns.start + part.start..columns.start + part.end,
                accumulate: accumulate || depths.start > 0,
            };
            let factors = (a.columns(depths.clone()), b.columns(part).rows(depths.clone()), alpha);
            multiply_packed(level, factors, target, panels)?;
        }
    }
    Ok(())
}

/// [`multiply`] of what is packed at a time.
fn multiply_packed(
    level: Level,
    (a, b, alpha): (Matrix<'_>, Matrix<'_>, f32),
    target: Target<'_>,
    panels: &mut Panels,
) -> Result<()> {
    let (depth, columns) = (b.rows, target.columns.clone());
    let panel = depth * UNIT;
    let length = b.columns.div_ceil(UNIT) * panel;
    if panels.values.len() < length {
        panels.values.resize(length, 0.0);
    }
    let packed = &mut panels.values[..length];
    tasks::run(
        packed.chunks_mut(panel).enumerate().collect(),
        || (),
        |(), (unit, panel): (usize, &mut [f32])| pack(b, unit * UNIT, alpha, panel),
    )?;
    let packed = &*packed;
    let mut tasks = Vec::new();
    let mut rest = target.values;
    for rows in slabs(a.rows) {
        // The last row may be shorter than the others are apart.
        let length = (rows.len() * target.row).min(rest.len());
        let (out, behind) = std::mem::take(&mut rest).split_at_mut(length);
        rest = behind;
        tasks.push((rows, out));
    }
    tasks::run(
        tasks,
        || (),
        |(), (rows, out)| {
            let (columns, row, accumulate) = (columns.clone(), target.row, target.accumulate);
            level.run(Slab { a, rows, panels: packed, depth, columns, out, row, accumulate });
        },
    )
}

/// Rows for one thread at a time: whole tiles, and as many pieces as make all threads end together.
fn slabs(rows: usize) -> impl Iterator<Item = Range<usize>> {
    let threads = tasks::threads();
    let tiles = rows.div_ceil(MAX_ROWS);
    let pieces = rows.div_ceil(SLAB).next_multiple_of(threads).min(tiles);
    (0..pieces).map(move |piece| {
        let [start, end] = [piece, piece + 1].map(|piece| piece * tiles / pieces * MAX_ROWS);
        start..end.min(rows)
    })
}

/// Lays 16 columns of `b` out row by row.
fn pack(b: Matrix<'_>, start: usize, alpha: f32, panel: &mut [f32]) {
    let lanes = UNIT.min(b.columns - start);
    let (rows, _) = panel.as_chunks_mut::<UNIT>();
    if b.column == 1 {
        for (k, to) in rows.iter_mut().enumerate() {
            for (to, from) in to.iter_mut().zip(&b.from(k, start)[..lanes]) {
                *to = alpha * from;
            }
            to[lanes..].fill(0.0);
        }
        return;
    }
    // The transpose, sixteen values of a row at a time: a cache line of each.
    for (block, rows) in rows.chunks_mut(UNIT).enumerate() {
        for lane in 0..lanes {
            let from = b.from(block * UNIT, start + lane);
            for (to, from) in rows.iter_mut().zip(from) {
                to[lane] = alpha * from;
            }
        }
        for to in rows {
            to[lanes..].fill(0.0);
        }
    }
}

/// The rows of one thread.
struct Slab<'a, 'o> {
    a: Matrix<'a>,
    rows: Range<usize>,
    panels: &'a [f32],
    depth: usize,
    columns: Range<usize>,
    out: &'o mut [f32], // from the first row on
    row: usize,
    accumulate: bool,
}

impl Kernel for Slab<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let rows = self.rows.len();
        let width = self.columns.len();
        let panel = self.depth * UNIT;
        // The last row need not be as long as the others are apart.
        let whole = width / UNIT * UNIT;
        let mut tail = [0.0; SLAB_TAIL];
        let mut out =
            Columns::rows_of(std::mem::take(&mut self.out), rows, self.row, self.columns.clone());
        let groups = (0..whole).step_by(GROUP).map(|at| (at, GROUP.min(whole - at)));
        for (at, width) in groups {
            for block in even_parts(self.depth, DEPTH) {
                let accumulate = self.accumulate || block.start > 0;
                for tile in even_parts(rows, MAX_ROWS) {
                    self.product(tile.start, at / UNIT * panel, &block, accumulate).run(
                        simd,
                        &mut out,
                        (tile, width / UNIT),
                        at,
                    );
                }
            }
        }
        if whole == width {
            return;
        }
        // Columns that do not fill a unit.
        for tile in even_parts(rows, MAX_ROWS) {
            let mut lanes = Columns::of(&mut tail, UNIT);
            let count = tile.end - tile.start;
            let block = 0..self.depth;
            self.product(tile.start, whole / UNIT * panel, &block, false).run(
                simd,
                &mut lanes,
                (0..count, 1),
                0,
            );
            for (row, lanes) in tile.zip(tail.chunks_exact(UNIT)) {
                let accumulate = self.accumulate;
                for (to, &lane) in out.row(row)[whole..].iter_mut().zip(lanes) {
                    *to = if accumulate { *to + lane } else { lane };
                }
            }
        }
    }
}

/// A tile of one unit.
const SLAB_TAIL: usize = MAX_ROWS * UNIT;

impl<'a> Slab<'a, '_> {
    #[inline(always)]
    fn product(
        &self,
        row: usize,
        panel: usize,
        block: &Range<usize>,
        accumulate: bool,
    ) -> Product<'a> {
        Product {
            a: self.a.from(self.rows.start + row, block.start),
            a_row: self.a.row,
            a_step: self.a.column,
            b: Units {
                values: &self.panels[panel + block.start * UNIT..],
                row: UNIT,
                unit: self.depth * UNIT,
            },
            depth: block.end - block.start,
            accumulate,
            fetch: None,
        }
    }
}
