//! A frozen weight that stays in NF4 in memory, as it is stored, and is dequantised when it is used.

// Shapes: O = out, I = in features of this rank.

use std::ops::Range;

use dromedary_torch_ext::F32Buffer;
use tch::{Kind, Tensor};

use crate::{
    Result,
    checkpoint::{BLOCK_SIZE, LEVELS, NESTED_BLOCK_SIZE, nested_levels},
    kernels::{Kernels, MakesPanels, Simd, UNIT, shift_of, tasks},
};

/// The weight of a linear layer, `(O, I)`, in four bits a number and what scales take: the projections
/// that are fused lie one below the other, each quantised on its own, as a whole, before it was cut.
#[derive(Debug)]
pub struct QuantisedWeight {
    parts: Vec<Nf4Slice>,
    columns: usize,
    /// What multiplies without a copy of the weight in f32.
    kernels: Option<Kernels>,
}

impl QuantisedWeight {
    /// Parts of the same number of columns.
    pub(crate) fn new(mut parts: Vec<Nf4Slice>, kernels: Option<Kernels>) -> Self {
        let columns = parts.first().map_or(0, |part| part.columns);
        // The panels of a weight must not begin inside of those of a part.
        let whole_panels = parts.iter().rev().skip(1).all(|part| part.rows.is_multiple_of(UNIT));
        if kernels.is_some() && whole_panels {
            parts.iter_mut().for_each(Nf4Slice::lay_out);
        }
        Self { parts, columns, kernels }
    }

    /// `x W^T`. This crate's kernels dequantise some rows at a time; libtorch, and where a gradient must
    /// pass, all of them for the moment.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let fits = x.kind() == Kind::Float && !x.requires_grad();
        let Some(kernels) = self.kernels.filter(|_| fits) else {
            return Ok(x.f_matmul(&self.dequantise()?.f_to_kind(x.kind())?.tr())?);
        };
        let (rows, columns) = self.size();
        kernels.multiply_made(x, self, [rows, columns].map(|size| size as usize))
    }

    /// `(O, I)`.
    pub fn size(&self) -> (i64, i64) {
        let rows: usize = self.parts.iter().map(|part| part.rows).sum();
        (rows as i64, self.columns as i64)
    }

    /// Bytes of codes and scales.
    pub fn bytes(&self) -> u64 {
        self.parts.iter().map(Nf4Slice::bytes).sum()
    }

    /// The weight in f32, newly allocated: `(O, I)`.
    ///
    /// # Errors
    /// No memory.
    pub fn dequantise(&self) -> Result<Tensor> {
        let (rows, columns) = self.size();
        let mut values = F32Buffer::zeros(&[rows, columns])?;
        self.dequantise_into(values.values_mut())?;
        Ok(values.into_tensor())
    }

    /// The weight in f32, `(O, I)`, into memory that is there.
    pub(crate) fn dequantise_into(&self, out: &mut [f32]) -> Result<()> {
        let share = (self.size().0 as usize).div_ceil(tasks::threads()).max(1);
        let mut pieces = Vec::new();
        let mut rest = out;
        for part in &self.parts {
            let own;
            (own, rest) = rest.split_at_mut(part.rows * part.columns);
            for (index, piece) in own.chunks_mut(share * part.columns.max(1)).enumerate() {
                pieces.push((part, index * share, piece));
            }
        }
        tasks::run(pieces, || (), |(), (part, first, piece)| part.dequantise(first, piece))
    }
}

impl MakesPanels for QuantisedWeight {
    #[inline(always)]
    fn make<S: Simd>(&self, simd: S, rows: Range<usize>, columns: Range<usize>, panel: &mut [f32]) {
        let mut start = 0;
        for part in &self.parts {
            let end = start + part.rows;
            let own = rows.start.max(start)..rows.end.min(end);
            match &part.codes {
                _ if own.is_empty() => {}
                Codes::Panels(codes) => {
                    part.dequantise_panel(simd, codes, own.start - start, columns.clone(), panel);
                }
                Codes::Rows(_) => {
                    for row in own {
                        let lane = (row - rows.start, &mut *panel);
                        part.dequantise_row::<UNIT>(row - start, columns.clone(), lane);
                    }
                }
            }
            start = end;
        }
    }
}

/// Bytes of so many numbers in NF4: codes, and scales of both levels.
pub(crate) fn quantised_bytes(numbers: u64) -> u64 {
    let blocks = numbers.div_ceil(BLOCK_SIZE as u64);
    numbers.div_ceil(2)
        + blocks
        + blocks.div_ceil(NESTED_BLOCK_SIZE as u64) * size_of::<f32>() as u64
}

/// The codes of a slice.
#[derive(Debug)]
pub(crate) enum Codes {
    /// Two in a byte, in the order of the slice.
    Rows(Vec<u8>),
    /// Those of 16 rows in a word, column by column, for kernels: `(rows / 16, columns)`.
    Panels(Vec<u64>),
}

/// One rank's slice of one weight in NF4.
///
/// Blocks of 64 numbers and the scales' own blocks are those of the whole weight, wherever it was cut.
#[derive(Debug)]
pub(crate) struct Nf4Slice {
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) codes: Codes,
    /// Codes of the scales of the blocks that the slice has a part of, row by row: `stride` for each row;
    /// one behind the other where the slice has whole rows.
    pub(crate) scales: Vec<u8>,
    pub(crate) stride: Option<usize>,
    /// Scales of the second level, from the one of the slice's first block on.
    pub(crate) nested: Vec<f32>,
    pub(crate) offset: f32,
    /// Where the slice's first number is in the whole weight, and the columns of that.
    pub(crate) first: usize,
    pub(crate) pitch: usize,
    /// The kind that the weight was made of, to whose numbers it is rounded.
    pub(crate) kind: Kind,
}

impl Nf4Slice {
    fn bytes(&self) -> u64 {
        let codes = match &self.codes {
            Codes::Rows(bytes) => bytes.len(),
            Codes::Panels(words) => words.len() * size_of::<u64>(),
        };
        (codes + self.scales.len() + self.nested.len() * size_of::<f32>()) as u64
    }

    fn code(&self, row: usize, column: usize) -> usize {
        match &self.codes {
            Codes::Rows(bytes) => {
                let at = row * self.columns + column;
                let byte = bytes[at / 2];
                usize::from(if at.is_multiple_of(2) { byte >> 4 } else { byte & 15 })
            }
            Codes::Panels(words) => {
                let word = words[row / UNIT * self.columns + column];
                (word >> shift_of(row % UNIT)) as usize & 15
            }
        }
    }

    /// Puts the codes in the order in which kernels want them, where blocks begin in the same columns of
    /// all rows.
    fn lay_out(&mut self) {
        if [self.first, self.pitch].iter().any(|n| !n.is_multiple_of(BLOCK_SIZE)) {
            return;
        }
        let mut words = vec![0; self.rows.div_ceil(UNIT) * self.columns];
        for row in 0..self.rows {
            let words = &mut words[row / UNIT * self.columns..][..self.columns];
            for (column, word) in words.iter_mut().enumerate() {
                *word |= (self.code(row, column) as u64) << shift_of(row % UNIT);
            }
        }
        self.codes = Codes::Panels(words);
    }

    /// The block, in the whole weight, of a row's first number.
    pub(crate) fn first_block(&self, row: usize) -> usize {
        (self.first + row * self.pitch) / BLOCK_SIZE
    }

    /// The scale of a row's block, of the whole weight.
    fn scale(&self, row: usize, block: usize) -> f32 {
        let at = match self.stride {
            Some(stride) => row * stride + block - self.first_block(row),
            None => block - self.first_block(0),
        };
        let nested = block / NESTED_BLOCK_SIZE - self.first_block(0) / NESTED_BLOCK_SIZE;
        nested_levels()[usize::from(self.scales[at])] * self.nested[nested] + self.offset
    }

    /// A scale that is not finite, if there is one: what a damaged file makes of it must not spread.
    pub(crate) fn bad_scale(&self) -> Option<f32> {
        let of_row = |row: usize| {
            let blocks = self.first_block(row)..=self.last_block(row);
            let mut scales = blocks.map(|block| self.scale(row, block));
            scales.find(|scale| !scale.is_finite())
        };
        (0..self.rows).find_map(of_row)
    }

    /// The block of a row's last number.
    fn last_block(&self, row: usize) -> usize {
        (self.first + row * self.pitch + self.columns - 1) / BLOCK_SIZE
    }

    /// Rows from `first_row` on into `out`, whose length says how many.
    fn dequantise(&self, first_row: usize, out: &mut [f32]) {
        for (row, out) in (first_row..).zip(out.chunks_mut(self.columns)) {
            self.dequantise_row::<1>(row, 0..self.columns, (0, out));
        }
    }

    /// Some columns of a row into lane `lane` of lines of `LANES` numbers.
    #[inline]
    fn dequantise_row<const LANES: usize>(
        &self,
        row: usize,
        columns: Range<usize>,
        (lane, lines): (usize, &mut [f32]),
    ) {
        let start = self.first + row * self.pitch;
        let mut column = columns.start;
        while column < columns.end {
            let at = start + column;
            let end = (column + BLOCK_SIZE - at % BLOCK_SIZE).min(columns.end);
            let values = self.values(self.scale(row, at / BLOCK_SIZE));
            let [from, to] = [column, end].map(|column| (column - columns.start) * LANES);
            let lines = &mut lines[from..to];
            match &self.codes {
                Codes::Rows(codes) => {
                    look_up::<LANES>((codes, row * self.columns + column), &values, (lane, lines));
                }
                Codes::Panels(_) => {
                    for (column, line) in (column..).zip(lines.as_chunks_mut::<LANES>().0) {
                        line[lane] = values[self.code(row, column)];
                    }
                }
            }
            column = end;
        }
    }

    /// Some columns of 16 rows from `first_row` on, of codes that are laid out for it.
    #[inline(always)]
    fn dequantise_panel<S: Simd>(
        &self,
        simd: S,
        codes: &[u64],
        first_row: usize,
        columns: Range<usize>,
        panel: &mut [f32],
    ) {
        let levels = simd.load(&LEVELS);
        let codes = &codes[first_row / UNIT * self.columns..][columns.clone()];
        let rows = first_row..(first_row + UNIT).min(self.rows);
        let (lines, _) = panel.as_chunks_mut::<UNIT>();
        let mut column = columns.start;
        while column < columns.end {
            let block = column / BLOCK_SIZE;
            let end = ((block + 1) * BLOCK_SIZE).min(columns.end);
            let mut scales = [0.0; UNIT];
            for (scale, row) in scales.iter_mut().zip(rows.clone()) {
                *scale = self.scale(row, self.first_block(row) + block);
            }
            let scales = simd.load(&scales);
            let own = column - columns.start..end - columns.start;
            for (line, &codes) in lines[own.clone()].iter_mut().zip(&codes[own]) {
                let values = simd.mul(simd.look_up(levels, codes), scales);
                let values = match self.kind {
                    Kind::BFloat16 => simd.round_to_bf16(values),
                    Kind::Half => simd.round_to_f16(values),
                    _ => values,
                };
                simd.store(line, values);
            }
            column = end;
        }
    }

    /// What the 16 codes stand for in a block of this scale.
    fn values(&self, scale: f32) -> [f32; 16] {
        LEVELS.map(|level| match self.kind {
            Kind::BFloat16 => half::bf16::from_f32(level * scale).to_f32(),
            Kind::Half => half::f16::from_f32(level * scale).to_f32(),
            _ => level * scale,
        })
    }
}

/// Values of the codes from number `first` on, into lane `lane` of the lines.
#[inline]
fn look_up<const LANES: usize>(
    (codes, first): (&[u8], usize),
    values: &[f32; 16],
    (lane, lines): (usize, &mut [f32]),
) {
    assert!(lane < LANES);
    let (head, lines) = lines.split_at_mut((first % 2 * LANES).min(lines.len()));
    for line in head.as_chunks_mut::<LANES>().0 {
        line[lane] = values[usize::from(codes[first / 2] & 15)];
    }
    let codes = &codes[first.div_ceil(2)..];
    let (pairs, tail) = lines.as_chunks_mut::<LANES>().0.as_chunks_mut::<2>();
    for ([left, right], byte) in pairs.iter_mut().zip(codes) {
        left[lane] = values[usize::from(byte >> 4)];
        right[lane] = values[usize::from(byte & 15)];
    }
    for (line, byte) in tail.iter_mut().zip(&codes[pairs.len()..]) {
        line[lane] = values[usize::from(byte >> 4)];
    }
}

/// Puts codes together, two in a byte.
#[derive(Debug)]
pub(crate) struct CodePacker {
    packed: Vec<u8>,
    len: usize,
}

impl CodePacker {
    /// Room for so many codes.
    pub(crate) fn with_capacity(codes: usize) -> Self {
        Self { packed: Vec::with_capacity(codes.div_ceil(2)), len: 0 }
    }

    /// Adds `count` codes of `bytes`, from code `first` on.
    pub(crate) fn extend(&mut self, bytes: &[u8], first: usize, count: usize) {
        if first.is_multiple_of(2) && self.len.is_multiple_of(2) {
            self.packed.extend_from_slice(&bytes[first / 2..(first + count).div_ceil(2)]);
            self.len += count;
            return;
        }
        for at in first..first + count {
            let code = if at.is_multiple_of(2) { bytes[at / 2] >> 4 } else { bytes[at / 2] & 15 };
            match (self.len % 2, self.packed.last_mut()) {
                (1, Some(last)) => *last = *last & 0xf0 | code,
                _ => self.packed.push(code << 4),
            }
            self.len += 1;
        }
    }

    pub(crate) fn finish(self) -> Vec<u8> {
        self.packed
    }
}
