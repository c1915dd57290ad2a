use std::fmt;

use tch::Kind;

/// A data type that weights are stored in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Dtype {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of a single-precision number.
    Bf16,
    /// Bytes: codes of quantised weights, never weights themselves.
    U8,
}

impl Dtype {
    /// Bytes per element.
    pub fn size(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::Bf16 => 2,
            Dtype::U8 => 1,
        }
    }

    /// The type as libtorch names it.
    pub fn kind(self) -> Kind {
        match self {
            Dtype::F32 => Kind::Float,
            Dtype::F16 => Kind::Half,
            Dtype::Bf16 => Kind::BFloat16,
            Dtype::U8 => Kind::Uint8,
        }
    }

    /// The data type of tensors of this kind, if weights can be stored in it.
    pub fn of_kind(kind: Kind) -> Option<Self> {
        match kind {
            Kind::Float => Some(Dtype::F32),
            Kind::Half => Some(Dtype::F16),
            Kind::BFloat16 => Some(Dtype::Bf16),
            _ => None,
        }
    }

    /// PyTorch's name of the type.
    pub(crate) fn torch_name(self) -> &'static str {
        match self {
            Dtype::F32 => "float32",
            Dtype::F16 => "float16",
            Dtype::Bf16 => "bfloat16",
            Dtype::U8 => "uint8",
        }
    }

    /// The type of weights that PyTorch calls so.
    pub(crate) fn of_torch_name(name: &str) -> Option<Self> {
        [Dtype::F32, Dtype::F16, Dtype::Bf16].into_iter().find(|dtype| dtype.torch_name() == name)
    }

    pub(crate) fn of_safetensors(dtype: safetensors::Dtype) -> Option<Self> {
        match dtype {
            safetensors::Dtype::F32 => Some(Dtype::F32),
            safetensors::Dtype::F16 => Some(Dtype::F16),
            safetensors::Dtype::BF16 => Some(Dtype::Bf16),
            _ => None,
        }
    }

    pub(crate) fn to_safetensors(self) -> safetensors::Dtype {
        match self {
            Dtype::F32 => safetensors::Dtype::F32,
            Dtype::F16 => safetensors::Dtype::F16,
            Dtype::Bf16 => safetensors::Dtype::BF16,
            Dtype::U8 => safetensors::Dtype::U8,
        }
    }

    /// The first element of `bytes` that is NaN or infinite, with its value.
    ///
    /// Looks at whole blocks first, without a branch per element, so that the compiler can use
    /// vector instructions: the check costs little beside reading.
    pub(crate) fn first_non_finite(self, bytes: &[u8]) -> Option<(usize, f64)> {
        match self {
            Dtype::U8 => None,
            Dtype::F32 => {
                scan(bytes, |b: [u8; 4]| u32::from_le_bytes(b) & 0x7f80_0000 == 0x7f80_0000)
                    .map(|(at, b)| (at, f64::from(f32::from_le_bytes(b))))
            }
            Dtype::F16 => scan(bytes, |b: [u8; 2]| u16::from_le_bytes(b) & 0x7c00 == 0x7c00)
                .map(|(at, b)| (at, half::f16::from_le_bytes(b).to_f64())),
            Dtype::Bf16 => scan(bytes, |b: [u8; 2]| u16::from_le_bytes(b) & 0x7f80 == 0x7f80)
                .map(|(at, b)| (at, half::bf16::from_le_bytes(b).to_f64())),
        }
    }
}

/// As safetensors files name it.
impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Dtype::F32 => "F32",
            Dtype::F16 => "F16",
            Dtype::Bf16 => "BF16",
            Dtype::U8 => "U8",
        })
    }
}

fn scan<const N: usize>(bytes: &[u8], bad: impl Fn([u8; N]) -> bool) -> Option<(usize, [u8; N])> {
    const BLOCK: usize = 1 << 14;
    let (elements, _) = bytes.as_chunks::<N>();
    for (number, block) in elements.chunks(BLOCK).enumerate() {
        if block.iter().fold(false, |any, element| any | bad(*element)) {
            let at = block.iter().position(|element| bad(*element))?;
            return Some((number * BLOCK + at, block[at]));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn non_finite_elements_are_found_in_every_type() {
        let mut f32s: Vec<u8> = (0..40_000).flat_map(|i| (i as f32 * 1e30).to_le_bytes()).collect();
        assert_eq!(Dtype::F32.first_non_finite(&f32s), None);
        f32s[4 * 33_333..4 * 33_334].copy_from_slice(&f32::NEG_INFINITY.to_le_bytes());
        assert_eq!(Dtype::F32.first_non_finite(&f32s), Some((33_333, f64::NEG_INFINITY)));

        let bf16s: Vec<u8> = [1.0, f32::MAX / 2.0]
            .iter()
            .flat_map(|x| half::bf16::from_f32(*x).to_le_bytes())
            .collect();
        assert_eq!(Dtype::Bf16.first_non_finite(&bf16s), None);
        let f16s: Vec<u8> = [65504.0, f32::NAN]
            .iter()
            .flat_map(|x| half::f16::from_f32(*x).to_le_bytes())
            .collect();
        let (at, value) = Dtype::F16.first_non_finite(&f16s).unwrap();
        assert!(at == 1 && value.is_nan());
    }
}
