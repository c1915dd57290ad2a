//! Products with a weight whose numbers are made when they are needed, a part of them at a time.

// Shapes: T = tokens, I = in features, O = out features.

use std::ops::Range;

use dromedary_torch_ext::{F32Buffer, Rows};
use tch::Tensor;

use super::{
    Kernels,
    panels::{DEPTH, Multiply, SLAB},
    simd::{Columns, Kernel, MAX_ROWS, MAX_UNITS, Product, Simd, UNIT, Units, even_parts},
    tasks,
};
use crate::{Error, Result};

/// Numbers that a thread makes at a time for the rows of several slabs: some of what the caches share.
const MADE: usize = 512 << 10;

/// Units of a weight `(O, I)` whose numbers a thread has at once. Where rows of a later slab need them again
/// there are many: each pass over the input is then worth more, and none of them is made twice.
fn most_units(tokens: usize, depth: usize) -> usize {
    if tokens > SLAB { (MADE / (depth * UNIT)).max(MAX_UNITS) } else { MAX_UNITS }
}

/// The most numbers that all threads together make at a time of a weight with so many in features.
pub(crate) fn numbers_at_once(depth: usize) -> usize {
    tasks::threads() * MADE.max(MAX_UNITS * UNIT * depth)
}

/// A weight `(O, I)` that is kept in another form than its numbers.
pub(crate) trait MakesPanels: Sync {
    /// Writes some columns of at most 16 rows, the first of which is a multiple of 16: column `k` of them
    /// to `panel[16 k..]`, lane by lane. What stands in the lanes of missing rows is not looked at.
    fn make<S: Simd>(&self, simd: S, rows: Range<usize>, columns: Range<usize>, panel: &mut [f32]);
}

impl Kernels {
    /// `x W^T`: to the last bit what a [`PackedWeight`](super::PackedWeight) of the same numbers gives. A
    /// thread makes a block of 64 rows and 144 columns at a time, which stays in its first-level cache;
    /// where there are more tokens than pass over a weight together, as many rows as make up [`MADE`].
    ///
    /// # Shapes
    /// x: `(T, I)`, weight: `sizes`, `[O, I]`, result: `(T, O)`.
    pub(crate) fn multiply_made(
        self,
        x: &Tensor,
        weight: &impl MakesPanels,
        [out_features, depth]: [usize; 2],
    ) -> Result<Tensor> {
        let x = x.f_contiguous()?;
        let (tokens, columns) = x.size2()?;
        if columns as usize != depth {
            return Err(Error::Torch(tch::TchError::Torch(format!(
                "the input is [{tokens}, {columns}], the weight [{out_features}, {depth}]"
            ))));
        }
        let width = out_features.next_multiple_of(UNIT);
        let size = [tokens, width as i64];
        // A product over no features writes nothing.
        let mut out =
            if depth > 0 { F32Buffer::unfilled(&size)? } else { F32Buffer::zeros(&size)? };
        let x = Rows::of(&x)?;
        if x.len() * width * depth > 0 {
            let units = width / UNIT;
            let parts = units.div_ceil(most_units(x.len(), depth));
            let most = units.div_ceil(parts.next_multiple_of(tasks::threads()));
            let groups: Vec<_> =
                even_parts(units, most).map(|units| units.start * UNIT..units.end * UNIT).collect();
            let columns = Columns::of(out.values_mut(), width).cut(&groups);
            let columns_made = if x.len() > SLAB { depth } else { DEPTH };
            let x = x.values();
            tasks::run(
                groups.into_iter().zip(columns).collect(),
                || vec![0.0; most * UNIT * columns_made],
                |panels, (group, out)| {
                    let rows = group.start..group.end.min(out_features);
                    self.level.run(Made { x, depth, weight, rows, panels, out });
                },
            )?;
        }
        let out = out.into_tensor();
        let whole = width == out_features;
        Ok(if whole { out } else { out.f_narrow(1, 0, out_features as i64)?.f_contiguous()? })
    }
}

/// `y = x W^T` for some rows of W.
struct Made<'a, 'o, W> {
    x: &'a [f32], // (T, I)
    depth: usize,
    weight: &'a W,
    rows: Range<usize>,
    panels: &'a mut [f32],
    out: Columns<'o>, // (T, rows, to whole units)
}

impl<W: MakesPanels> Kernel for Made<'_, '_, W> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let units = self.rows.len().div_ceil(UNIT);
        if self.out.rows() > SLAB {
            self.make(simd, 0..self.depth);
            let Self { x, depth, panels, out, .. } = self;
            Multiply { x, panels, depth, units: 0..units, out }.run(simd);
            return;
        }
        for block in even_parts(self.depth, DEPTH) {
            self.make(simd, block.clone());
            for rows in even_parts(self.out.rows(), MAX_ROWS) {
                Product {
                    a: &self.x[rows.start * self.depth + block.start..],
                    a_row: self.depth,
                    a_step: 1,
                    b: Units { values: self.panels, row: UNIT, unit: block.len() * UNIT },
                    depth: block.len(),
                    accumulate: block.start > 0,
                    fetch: None,
                }
                .run(simd, &mut self.out, (rows, units), 0);
            }
        }
    }
}

impl<W: MakesPanels> Made<'_, '_, W> {
    /// Some columns of all its rows.
    #[inline(always)]
    fn make<S: Simd>(&mut self, simd: S, columns: Range<usize>) {
        let panels = self.panels.chunks_exact_mut(columns.len() * UNIT);
        for (start, panel) in self.rows.clone().step_by(UNIT).zip(panels) {
            let rows = start..(start + UNIT).min(self.rows.end);
            self.weight.make(simd, rows, columns.clone(), panel);
        }
    }
}
