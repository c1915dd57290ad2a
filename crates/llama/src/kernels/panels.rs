//! A frozen weight cut into panels, and the product with it.

// Shapes: T = rows of the input, I = in features, O = out features.

use std::ops::Range;

use super::simd::{Columns, Kernel, MAX_ROWS, MAX_UNITS, Product, Simd, UNIT, Units, even_parts};

/// Depth of a block: four units of it stay in the first-level cache while the rows pass over them.
pub(super) const DEPTH: usize = 144;

/// Rows that pass over the weight together: their part of the input stays in the second-level cache.
pub(super) const SLAB: usize = 240;

/// `y = x W^T` for some units of W.
pub(crate) struct Multiply<'a, 'o> {
    pub(crate) x: &'a [f32],      // (T, I)
    pub(crate) panels: &'a [f32], // (O / 16, I, 16)
    pub(crate) depth: usize,      // I
    /// The units of W that belong to the columns of `out`.
    pub(crate) units: Range<usize>,
    pub(crate) out: Columns<'o>, // (T, 16 x units)
}

impl Kernel for Multiply<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        for slab in even_parts(self.out.rows(), SLAB) {
            for unit in self.units.clone().step_by(MAX_UNITS) {
                for block in even_parts(self.depth, DEPTH) {
                    self.block(simd, slab.clone(), unit, block);
                }
            }
        }
    }
}

impl Multiply<'_, '_> {
    #[inline(always)]
    fn block<S: Simd>(&mut self, simd: S, slab: Range<usize>, unit: usize, block: Range<usize>) {
        let panel = self.depth * UNIT;
        let units = MAX_UNITS.min(self.units.end - unit);
        let rows = slab.end - slab.start;
        let tiles = rows.div_ceil(MAX_ROWS);
        // The block after this one: further down the same units, or at the top of the next ones.
        let next = if block.end < self.depth {
            unit * panel + block.end * UNIT
        } else {
            (unit + units) * panel
        };
        // Tiles that are evenly apart fetch a share of the units each: memory is asked for steadily.
        let lines = match tiles {
            1 => 4,
            2 | 3 => 2,
            _ => 1,
        };
        let count = units.div_ceil(lines);
        let shares = (0..count).map(|share| share * tiles / count);
        for (tile, part) in even_parts(rows, MAX_ROWS).enumerate() {
            let rows = slab.start + part.start..slab.start + part.end;
            let fetch = shares
                .clone()
                .position(|at| at == tile)
                .and_then(|share| self.panels.get(next + share * lines * panel..));
            Product {
                a: &self.x[rows.start * self.depth + block.start..],
                a_row: self.depth,
                a_step: 1,
                b: Units {
                    values: &self.panels[unit * panel + block.start * UNIT..],
                    row: UNIT,
                    unit: panel,
                },
                depth: block.end - block.start,
                accumulate: block.start > 0,
                fetch: fetch.map(|values| (Units { values, row: UNIT, unit: panel }, lines)),
            }
            .run(simd, &mut self.out, (rows, units), (unit - self.units.start) * UNIT);
        }
    }
}

/// Lays a weight `(O, I)` out in panels `(O / 16, I, 16)`; rows that are missing at the end are 0.
pub(crate) fn pack(weight: &[f32], depth: usize, panels: &mut [f32]) {
    for (rows, panel) in weight.chunks(depth * UNIT).zip(panels.chunks_exact_mut(depth * UNIT)) {
        for (lane, row) in rows.chunks_exact(depth).enumerate() {
            for (place, &value) in panel[lane..].iter_mut().step_by(UNIT).zip(row) {
                *place = value;
            }
        }
    }
}

/// The weight `(O, I)` again.
pub(crate) fn unpack(panels: &[f32], depth: usize, weight: &mut [f32]) {
    for (row, values) in weight.chunks_exact_mut(depth).enumerate() {
        unpack_row(panels, depth, row, values);
    }
}

/// One row of the weight, `(I)`.
pub(crate) fn unpack_row(panels: &[f32], depth: usize, row: usize, values: &mut [f32]) {
    let panel = &panels[row / UNIT * UNIT * depth..][..UNIT * depth];
    for (value, &place) in values.iter_mut().zip(panel[row % UNIT..].iter().step_by(UNIT)) {
        *value = place;
    }
}
