//! Weights in four bits, by the numbers and in the tensors of bitsandbytes: NF4 with double quantisation.
//!
//! A weight is taken as one row of numbers. Each block of 64 has a scale, its largest magnitude, and
//! each number becomes the index of the nearest of 16 levels. The scales of a weight, less their mean
//! (the offset), become indices of 256 levels in blocks of 256, with a scale of the second level each:
//! 4 + 8/64 + 32/(64 x 256) = 4.127 bits a parameter.

use std::{ops::Range, sync::LazyLock};

use dromedary_torch_ext::Rows;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::{
    dtype::Dtype, file::TensorFile, output::TensorSpec, tensor_memory::filled, tensors::blocks,
};
use crate::{
    attention::one_or_cat,
    error::{Error, Result},
    quantised::{CodePacker, Codes, Nf4Slice},
};

/// Bytes that are dequantised at once.
const CHUNK: usize = 4 << 20;

/// Numbers that share a scale.
pub(crate) const BLOCK_SIZE: usize = 64;
/// Scales that share a scale of the second level.
pub(crate) const NESTED_BLOCK_SIZE: usize = 256;

/// The levels of NF4: quantiles of the normal distribution, scaled to -1..1 (QLoRA, arXiv 2305.14314,
/// appendix E).
pub(crate) const LEVELS: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// Scales below this count as this, so that a block of zeros can be divided by it.
const LEAST_SCALE: f32 = 1e-38;

/// Bytes of the description of a weight; JSON padded with blanks.
const STATE_BYTES: u64 = 256;
const STATE: &str = "quant_state.bitsandbytes__nf4";

/// Names of the tensors that stand beside a weight's codes.
const BESIDE: [&str; 5] = ["absmax", STATE, "nested_absmax", "nested_quant_map", "quant_map"];

/// The name of the tensor that says that a weight is stored in NF4.
pub(super) fn state_name(weight: &str) -> String {
    format!("{weight}.{STATE}")
}

/// Names of all tensors that stand beside a weight's codes.
pub(super) fn beside(weight: &str) -> impl Iterator<Item = String> + '_ {
    BESIDE.iter().map(move |name| format!("{weight}.{name}"))
}

/// What a weight's description says, by bitsandbytes' names.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct State {
    quant_type: String,
    blocksize: usize,
    dtype: String,
    shape: Vec<i64>,
    nested_blocksize: usize,
    nested_dtype: String,
    nested_offset: f64,
}

/// A weight in NF4 inside of a file.
#[derive(Debug, Clone)]
pub(crate) struct Nf4Weight {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<i64>,
    name: String,
    offset: f32,
}

impl Nf4Weight {
    /// Reads a weight's description and compares the tensors beside it.
    pub(super) fn open(file: &TensorFile, name: &str) -> Result<Self> {
        let wrong =
            |message: String| Error::Nf4 { path: file.path().into(), name: name.into(), message };
        let bytes = file.read_bytes(&state_name(name), 0..u64::MAX)?;
        let state: State = serde_json::from_slice(&bytes).map_err(|e| wrong(e.to_string()))?;
        let dtype = Dtype::of_torch_name(&state.dtype)
            .ok_or_else(|| wrong(format!("it was made of {}", state.dtype)))?;
        let got = (state.quant_type.as_str(), state.blocksize, state.nested_blocksize);
        if got != ("nf4", BLOCK_SIZE, NESTED_BLOCK_SIZE) || state.nested_dtype != "float32" {
            return Err(wrong(format!(
                "it has the settings {got:?} and scales of {}, not nf4, {BLOCK_SIZE}, \
                 {NESTED_BLOCK_SIZE} and float32",
                state.nested_dtype
            )));
        }
        let count = match state.shape[..] {
            [rows, columns] if rows > 0 && columns > 0 => rows.checked_mul(columns),
            _ => None,
        };
        let count = count.ok_or_else(|| wrong(format!("its shape is {:?}", state.shape)))? as usize;
        for (name, dtype, elements) in parts(name, count) {
            let entry = file.entry(&name)?;
            let got = entry.shape.iter().product::<i64>() as usize;
            if entry.dtype != dtype || got != elements {
                return Err(wrong(format!(
                    "{name} has {got} {}, expected {elements} {dtype}",
                    entry.dtype
                )));
            }
        }
        for (map, levels) in
            [("quant_map", &LEVELS[..]), ("nested_quant_map", &nested_levels()[..])]
        {
            if file.read_f32(&format!("{name}.{map}"), 0..levels.len())? != levels {
                return Err(wrong(format!("its {map} has other levels than bitsandbytes'")));
            }
        }
        let offset = state.nested_offset as f32;
        Ok(Self { dtype, shape: state.shape, name: name.into(), offset })
    }

    /// Bytes of the codes and of all that stands beside them, but for the description.
    pub(crate) fn bytes(&self) -> u64 {
        let count = self.shape.iter().product::<i64>() as usize;
        let bytes =
            |(_, dtype, elements): (_, safetensors::Dtype, usize)| elements * dtype.bitsize() / 8;
        parts(&self.name, count).map(bytes).iter().sum::<usize>() as u64
    }

    /// Some columns of some rows of the weight as it is computed with, in the data type that it was made
    /// of.
    pub(super) fn read_block(
        &self,
        file: &TensorFile,
        rows: Range<i64>,
        columns: Range<i64>,
    ) -> Result<Tensor> {
        let parts = blocks(rows.end - rows.start, self.shape[1] as u64 * 4, 1, CHUNK)
            .map(|part| {
                let part = self.read_rows(file, rows.start + part.start..rows.start + part.end)?;
                Ok(part.f_narrow(1, columns.start, columns.end - columns.start)?)
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(one_or_cat(parts, 0)?.f_contiguous()?)
    }

    /// Some columns of some rows of the weight as they are stored: in four bits a number.
    pub(super) fn read_slice(
        &self,
        file: &TensorFile,
        rows: Range<i64>,
        columns: Range<i64>,
    ) -> Result<Nf4Slice> {
        let pitch = self.shape[1] as usize;
        let width = (columns.end - columns.start) as usize;
        let (first_row, count) = (rows.start as usize, (rows.end - rows.start) as usize);
        // Blocks that a row can have a part of.
        let stride = match [pitch, columns.start as usize, width].map(|n| n % BLOCK_SIZE) {
            _ if width == pitch => None,
            [0, 0, _] => Some(width.div_ceil(BLOCK_SIZE)),
            _ => Some(width.div_ceil(BLOCK_SIZE) + 1),
        };
        let mut slice = Nf4Slice {
            rows: count,
            columns: width,
            codes: Codes::Rows(Vec::new()),
            scales: Vec::new(),
            stride,
            nested: Vec::new(),
            offset: self.offset,
            first: first_row * pitch + columns.start as usize,
            pitch,
            kind: self.dtype.kind(),
        };
        let mut codes = CodePacker::with_capacity(count * width);
        for part in blocks(count as i64, pitch as u64, 1, CHUNK) {
            let part = part.start as usize..part.end as usize;
            let start = (first_row + part.start) * pitch;
            let end = (first_row + part.end) * pitch;
            let bytes = file.read_bytes(&self.name, start as u64 / 2..end.div_ceil(2) as u64)?;
            let first = start % 2;
            match stride {
                None => codes.extend(&bytes, first, end - start),
                Some(_) => (0..part.len()).for_each(|row| {
                    codes.extend(&bytes, first + row * pitch + columns.start as usize, width);
                }),
            }
        }
        slice.codes = Codes::Rows(codes.finish());
        self.read_scale_codes(file, &mut slice)?;
        match slice.bad_scale() {
            None => Ok(slice),
            Some(scale) => Err(self.bad_scale(file, scale)),
        }
    }

    /// Reads what the scales of a slice's blocks are stored in.
    fn read_scale_codes(&self, file: &TensorFile, slice: &mut Nf4Slice) -> Result<()> {
        let all = (self.shape[0] * self.shape[1]) as usize;
        let first = slice.first_block(0);
        // Up to the end of the slice's last row, where the whole has so many.
        let last_row = slice.first_block(slice.rows - 1);
        let end = (last_row + slice.columns / BLOCK_SIZE + 2).min(all.div_ceil(BLOCK_SIZE));
        let codes = file.read_bytes(&format!("{}.absmax", self.name), first as u64..end as u64)?;
        slice.scales = match slice.stride {
            None => codes,
            Some(stride) => (0..slice.rows)
                .flat_map(|row| {
                    let start = slice.first_block(row) - first;
                    let codes = &codes;
                    // The last row's blocks can be fewer than the stride.
                    (start..start + stride).map(move |at| codes.get(at).copied().unwrap_or(0))
                })
                .collect(),
        };
        let nested = first / NESTED_BLOCK_SIZE..end.div_ceil(NESTED_BLOCK_SIZE);
        slice.nested = file.read_f32(&format!("{}.nested_absmax", self.name), nested)?;
        Ok(())
    }

    fn bad_scale(&self, file: &TensorFile, scale: f32) -> Error {
        Error::Nf4 {
            path: file.path().into(),
            name: self.name.clone(),
            message: format!("one of its scales is {scale}"),
        }
    }

    /// Rows of the weight.
    fn read_rows(&self, file: &TensorFile, rows: Range<i64>) -> Result<Tensor> {
        let columns = self.shape[1] as usize;
        let (start, end) = (rows.start as usize * columns, rows.end as usize * columns);
        let codes_at = start / 2;
        let codes = file.read_bytes(&self.name, codes_at as u64..end.div_ceil(2) as u64)?;
        let first_block = start / BLOCK_SIZE;
        let scales = self.read_scales(file, first_block..end.div_ceil(BLOCK_SIZE))?;
        let shape = [rows.end - rows.start, self.shape[1]];
        let weight = filled(&shape, Kind::Float, |bytes| {
            let (values, _) = bytes.as_chunks_mut::<4>();
            for (value, at) in values.iter_mut().zip(start..) {
                let byte = codes[at / 2 - codes_at];
                let code = if at % 2 == 0 { byte >> 4 } else { byte & 15 };
                let scale = scales[at / BLOCK_SIZE - first_block];
                *value = (LEVELS[usize::from(code)] * scale).to_le_bytes();
            }
            Ok(())
        })?;
        Ok(weight.f_to_kind(self.dtype.kind())?)
    }

    /// The scales of some blocks.
    fn read_scales(&self, file: &TensorFile, blocks: Range<usize>) -> Result<Vec<f32>> {
        let codes = file
            .read_bytes(&format!("{}.absmax", self.name), blocks.start as u64..blocks.end as u64)?;
        let first = blocks.start / NESTED_BLOCK_SIZE;
        let nested = first..blocks.end.div_ceil(NESTED_BLOCK_SIZE);
        let nested = file.read_f32(&format!("{}.nested_absmax", self.name), nested)?;
        let levels = nested_levels();
        let scale = |(code, block): (&u8, usize)| {
            levels[usize::from(*code)] * nested[block / NESTED_BLOCK_SIZE - first] + self.offset
        };
        let scales: Vec<f32> = codes.iter().zip(blocks).map(scale).collect();
        // What a damaged file makes of it must not spread from here.
        match scales.iter().find(|scale| !scale.is_finite()) {
            None => Ok(scales),
            Some(scale) => Err(self.bad_scale(file, *scale)),
        }
    }
}

/// The tensors of a weight of so many numbers, but for its description: name, type, elements.
fn parts(weight: &str, count: usize) -> [(String, safetensors::Dtype, usize); 5] {
    use safetensors::Dtype::{F32, U8};
    let blocks = count.div_ceil(BLOCK_SIZE);
    [
        (weight.to_owned(), U8, count.div_ceil(2)),
        (format!("{weight}.absmax"), U8, blocks),
        (format!("{weight}.nested_absmax"), F32, blocks.div_ceil(NESTED_BLOCK_SIZE)),
        (format!("{weight}.nested_quant_map"), F32, 256),
        (format!("{weight}.quant_map"), F32, 16),
    ]
}

/// The 256 levels of scales, as bitsandbytes makes them: seven decades, each cut into twice as many
/// steps as the one below, with both signs; 0 and 1.
pub(crate) fn nested_levels() -> &'static [f32; 256] {
    static LEVELS: LazyLock<[f32; 256]> = LazyLock::new(make_nested_levels);
    &LEVELS
}

fn make_nested_levels() -> [f32; 256] {
    let mut levels = vec![0.0, 1.0];
    for exponent in 0..7 {
        let steps = 1 << exponent;
        let border = |step: usize| linspace(0.1, 1.0, steps + 1, step);
        let decade = 10_f64.powi(exponent - 6) as f32;
        for step in 0..steps {
            let level = decade * ((border(step) + border(step + 1)) / 2.0);
            levels.extend([level, -level]);
        }
    }
    levels.sort_by(f32::total_cmp);
    let mut all = [0.0; 256];
    all.copy_from_slice(&levels);
    all
}

/// A value of PyTorch's `linspace` in f32, which counts from the nearer end.
fn linspace(start: f32, end: f32, count: usize, index: usize) -> f32 {
    let step = (end - start) / (count - 1) as f32;
    if index < count / 2 {
        step.mul_add(index as f32, start)
    } else {
        (-step).mul_add((count - 1 - index) as f32, end)
    }
}

/// Makes the codes of a weight block of rows by block of rows, then those of its scales.
#[derive(Debug)]
pub(crate) struct Quantiser {
    spec: TensorSpec,
    /// Largest magnitudes of the blocks so far.
    scales: Vec<f32>,
    borders: [f32; 15],
}

impl Quantiser {
    pub(crate) fn new(spec: TensorSpec) -> Self {
        let mut borders = [0.0; 15];
        for (border, pair) in borders.iter_mut().zip(LEVELS.windows(2)) {
            *border = (pair[0] + pair[1]) / 2.0;
        }
        Self { spec, scales: Vec::new(), borders }
    }

    /// The tensors that become of the weight, in the order in which they are known. The sizes of what
    /// is stored in bytes sum up to a multiple of 8, so that every number of four bytes is aligned.
    pub(crate) fn specs(&self) -> Vec<TensorSpec> {
        let spec = |name: String, dtype, shape| TensorSpec { name, dtype, shape };
        let count = self.spec.shape.iter().product::<i64>() as usize;
        let [codes, absmax, nested_absmax, nested_map, map] = parts(&self.spec.name, count);
        let bytes = codes.2 + absmax.2;
        let state = STATE_BYTES as usize + bytes.next_multiple_of(8) - bytes;
        vec![
            spec(codes.0, Dtype::U8, vec![codes.2 as i64, 1]),
            spec(absmax.0, Dtype::U8, vec![absmax.2 as i64]),
            spec(state_name(&self.spec.name), Dtype::U8, vec![state as i64]),
            spec(nested_absmax.0, Dtype::F32, vec![nested_absmax.2 as i64]),
            spec(nested_map.0, Dtype::F32, vec![256]),
            spec(map.0, Dtype::F32, vec![16]),
        ]
    }

    /// How many rows must be given at once, the last time apart: those of whole blocks.
    pub(crate) fn unit(&self) -> i64 {
        let columns = self.spec.shape[1].max(1);
        let (mut a, mut b) = (BLOCK_SIZE as i64, columns);
        while b > 0 {
            (a, b) = (b, a % b);
        }
        BLOCK_SIZE as i64 / a
    }

    /// The codes of the next rows, two in a byte.
    ///
    /// # Shapes
    /// rows: `(R, I)`, result: `(R x I / 2, 1)`.
    pub(crate) fn codes(&mut self, rows: &Tensor) -> Result<Tensor> {
        let rows = rows.f_to_kind(Kind::Float)?.f_contiguous()?.f_view([1, -1])?;
        let rows = Rows::of(&rows)?;
        let mut packed = Vec::with_capacity(rows.width().div_ceil(2));
        for block in rows.values().chunks(BLOCK_SIZE) {
            self.block(block, &mut packed);
        }
        Ok(Tensor::f_from_slice(&packed)?.f_view([-1, 1])?)
    }

    fn block(&mut self, block: &[f32], packed: &mut Vec<u8>) {
        let largest = block.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
        let floor = largest.max(LEAST_SCALE);
        let mut codes = [7; BLOCK_SIZE]; // the code of 0
        // Whole blocks are multiplied by the inverse, a last short one is divided: the last bit differs.
        if block.len() == BLOCK_SIZE {
            self.scales.push(largest);
            let inverse = 1.0 / floor;
            for (code, value) in codes.iter_mut().zip(block) {
                *code = self.code(value * inverse);
            }
        } else {
            self.scales.push(floor);
            for (code, value) in codes.iter_mut().zip(block) {
                *code = self.code(value / floor);
            }
        }
        let (pairs, _) = codes.as_chunks::<2>();
        packed.extend(
            pairs.iter().take(block.len().div_ceil(2)).map(|[high, low]| (high << 4) | low),
        );
    }

    /// The index of the nearest level; of the lower one half-way.
    fn code(&self, value: f32) -> u8 {
        self.borders.iter().map(|border| u8::from(value > *border)).sum()
    }

    /// What stands beside the codes, in the order of [`Quantiser::specs`].
    pub(crate) fn finish(self) -> Result<Vec<(String, Tensor)>> {
        let specs = self.specs();
        let scales = Tensor::f_from_slice(&self.scales)?;
        let offset = scales.f_mean(Kind::Float)?.f_double_value(&[])?;
        let (codes, nested) = quantise_scales(&self.scales, offset as f32);
        let state = State {
            quant_type: "nf4".into(),
            blocksize: BLOCK_SIZE,
            dtype: self.spec.dtype.torch_name().into(),
            shape: self.spec.shape,
            nested_blocksize: NESTED_BLOCK_SIZE,
            nested_dtype: "float32".into(),
            nested_offset: offset,
        };
        let mut state = serde_json::to_vec(&state)
            .map_err(|source| Error::Json { path: self.spec.name.into(), source })?;
        state.resize(specs[2].shape[0] as usize, b' ');
        let tensors = [
            Tensor::f_from_slice(&codes)?,
            Tensor::f_from_slice(&state)?,
            Tensor::f_from_slice(&nested)?,
            Tensor::f_from_slice(nested_levels())?,
            Tensor::f_from_slice(&LEVELS)?,
        ];
        Ok(specs.into_iter().skip(1).map(|spec| spec.name).zip(tensors).collect())
    }
}

/// Codes of scales, and the scales of the second level. The nearest level is found as bitsandbytes'
/// library for CPUs finds it, over 65,536 steps from -1 to 1: what lies within half a step (1.5e-5) of
/// the middle of two levels may go to the other one. Its CUDA kernels compare the numbers themselves.
fn quantise_scales(scales: &[f32], offset: f32) -> (Vec<u8>, Vec<f32>) {
    let levels = nested_levels();
    let table = nearest_by_step(levels);
    let mut nested = Vec::with_capacity(scales.len().div_ceil(NESTED_BLOCK_SIZE));
    let mut codes = Vec::with_capacity(scales.len());
    for block in scales.chunks(NESTED_BLOCK_SIZE) {
        let block: Vec<f32> = block.iter().map(|scale| scale - offset).collect();
        let largest = block.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
        nested.push(largest);
        if largest == 0.0 {
            // Any code stands for 0 times the level; bitsandbytes writes this one.
            codes.resize(codes.len() + block.len(), 0);
            continue;
        }
        let inverse = 1.0 / largest;
        codes.extend(block.iter().map(|value| {
            let value = (value * inverse).clamp(-1.0, 1.0);
            table[((value + 1.0) * HALF_STEPS + 0.5) as usize]
        }));
    }
    (codes, nested)
}

/// Half of the steps from -1 to 1.
const HALF_STEPS: f32 = 32_767.5;

/// The nearest level of each step; of the lower one half-way.
fn nearest_by_step(levels: &[f32; 256]) -> Vec<u8> {
    let nearest = |step: usize| {
        let value = step as f32 / HALF_STEPS - 1.0;
        let right = levels.partition_point(|level| *level < value);
        if right == 0 || right == levels.len() {
            return right.min(levels.len() - 1) as u8;
        }
        let nearer_right = levels[right] - value < value - levels[right - 1];
        (right - usize::from(!nearer_right)) as u8
    };
    (0..65_536).map(nearest).collect()
}
