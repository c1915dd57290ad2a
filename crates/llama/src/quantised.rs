//! A frozen weight that stays in NF4 in memory, as it is stored, and is dequantised when it is used.

// Shapes: O = out, I = in features of this rank.

use dromedary_torch_ext::F32Buffer;
use tch::{Kind, Tensor};

use crate::{
    Result,
    checkpoint::{BLOCK_SIZE, LEVELS, NESTED_BLOCK_SIZE, nested_levels},
    kernels::tasks,
};

/// The weight of a linear layer, `(O, I)`, in four bits a number and what scales take: the projections
/// that are fused lie one below the other, each quantised on its own, as a whole, before it was cut.
#[derive(Debug)]
pub struct QuantisedWeight {
    parts: Vec<Nf4Slice>,
    columns: usize,
}

impl QuantisedWeight {
    /// Parts of the same number of columns.
    pub(crate) fn new(parts: Vec<Nf4Slice>) -> Self {
        let columns = parts.first().map_or(0, |part| part.columns);
        Self { parts, columns }
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
        let levels = nested_levels();
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
        tasks::run(pieces, || (), |(), (part, first, piece)| part.dequantise(&levels, first, piece))
    }
}

/// Bytes of so many numbers in NF4: codes, and scales of both levels.
pub(crate) fn quantised_bytes(numbers: u64) -> u64 {
    let blocks = numbers.div_ceil(BLOCK_SIZE as u64);
    numbers.div_ceil(2)
        + blocks
        + blocks.div_ceil(NESTED_BLOCK_SIZE as u64) * size_of::<f32>() as u64
}

/// One rank's slice of one weight in NF4.
///
/// Blocks of 64 numbers and the scales' own blocks are those of the whole weight, wherever it was cut.
#[derive(Debug)]
pub(crate) struct Nf4Slice {
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    /// Two in a byte, in the order of the slice.
    pub(crate) codes: Vec<u8>,
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
        (self.codes.len() + self.scales.len() + self.nested.len() * size_of::<f32>()) as u64
    }

    /// The block, in the whole weight, of a row's first number.
    pub(crate) fn first_block(&self, row: usize) -> usize {
        (self.first + row * self.pitch) / BLOCK_SIZE
    }

    /// The scale of a row's block, of the whole weight.
    fn scale(&self, levels: &[f32; 256], row: usize, block: usize) -> f32 {
        let at = match self.stride {
            Some(stride) => row * stride + block - self.first_block(row),
            None => block - self.first_block(0),
        };
        let nested = block / NESTED_BLOCK_SIZE - self.first_block(0) / NESTED_BLOCK_SIZE;
        levels[usize::from(self.scales[at])] * self.nested[nested] + self.offset
    }

    /// A scale that is not finite, if there is one: what a damaged file makes of it must not spread.
    pub(crate) fn bad_scale(&self) -> Option<f32> {
        let levels = nested_levels();
        let of_row = |row: usize| {
            let blocks = self.first_block(row)..=self.last_block(row);
            let mut scales = blocks.map(|block| self.scale(&levels, row, block));
            scales.find(|scale| !scale.is_finite())
        };
        (0..self.rows).find_map(of_row)
    }

    /// The block of a row's last number.
    fn last_block(&self, row: usize) -> usize {
        (self.first + row * self.pitch + self.columns - 1) / BLOCK_SIZE
    }

    /// Rows from `first_row` on into `out`, whose length says how many.
    fn dequantise(&self, levels: &[f32; 256], first_row: usize, out: &mut [f32]) {
        for (row, out) in (first_row..).zip(out.chunks_mut(self.columns)) {
            let start = self.first + row * self.pitch;
            let mut column = 0;
            while column < self.columns {
                let at = start + column;
                let end = (column + BLOCK_SIZE - at % BLOCK_SIZE).min(self.columns);
                let values = self.values(self.scale(levels, row, at / BLOCK_SIZE));
                self.look_up(row * self.columns + column, &values, &mut out[column..end]);
                column = end;
            }
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

    /// Values of the codes from number `first` of the slice on.
    fn look_up(&self, first: usize, values: &[f32; 16], out: &mut [f32]) {
        let code = |at: usize| {
            let byte = self.codes[at / 2];
            usize::from(if at.is_multiple_of(2) { byte >> 4 } else { byte & 15 })
        };
        let (head, out) = out.split_at_mut((first % 2).min(out.len()));
        for value in head {
            *value = values[code(first)];
        }
        let first = first.next_multiple_of(2);
        let (pairs, tail) = out.as_chunks_mut::<2>();
        let bytes = &self.codes[first / 2..][..pairs.len()];
        for (pair, byte) in pairs.iter_mut().zip(bytes) {
            *pair = [values[usize::from(byte >> 4)], values[usize::from(byte & 15)]];
        }
        for value in tail {
            *value = values[code(first + 2 * bytes.len())];
        }
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
