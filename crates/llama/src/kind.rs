//! In which kind a model computes, and in how many bits it is kept, from what users write.

use tch::{Device, Kind};

use crate::{Dtype, Error, Result};

/// The kind of `auto`, `f32`, `bf16` or `f16`.
///
/// `auto` is f32 on a CPU, for want of fast 16-bit arithmetic, and the checkpoint's own type on a
/// GPU.
///
/// # Errors
/// Another word.
pub fn select_kind(name: &str, device: Device, stored: Dtype) -> Result<Kind> {
    match name {
        "auto" if device == Device::Cpu => Ok(Kind::Float),
        "auto" => Ok(stored.kind()),
        "f32" => Ok(Kind::Float),
        "bf16" => Ok(Kind::BFloat16),
        "f16" => Ok(Kind::Half),
        _ => Err(Error::KindName { name: name.to_owned() }),
    }
}

/// Whether linear layers that are stored in NF4 are kept in it, from what users write: 4 bits, 16 for the
/// kind of [`select_kind`], or nothing, which is 4 where they are stored so on a CPU.
///
/// # Errors
/// Another number, or 4 bits where they cannot be: on another device, of weights that are `stored`
/// otherwise.
pub fn select_nf4(bits: Option<u8>, device: Device, stored: bool) -> Result<bool> {
    let on_cpu = device == Device::Cpu;
    let message = match bits {
        None => return Ok(stored && on_cpu),
        Some(16) => return Ok(false),
        Some(4) if stored && on_cpu => return Ok(true),
        Some(4) if stored => "four bits are kept on a CPU alone",
        Some(4) => {
            "the checkpoint is not stored in four bits; `llama quantize --nf4` makes one that is"
        }
        Some(_) => "give 4 or 16",
    };
    Err(Error::Bits { bits: bits.unwrap_or_default(), message })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_have_the_names_of_the_flag() {
        let kind = |name| select_kind(name, Device::Cpu, Dtype::Bf16).ok();
        assert_eq!(kind("auto"), Some(Kind::Float));
        assert_eq!(kind("bf16"), Some(Kind::BFloat16));
        assert_eq!(kind("float16"), None);
        let on_gpu = select_kind("auto", Device::Cuda(0), Dtype::Bf16).ok();
        assert_eq!(on_gpu, Some(Kind::BFloat16));
    }

    #[test]
    fn four_bits_stay_where_they_are_stored_and_can_be_computed_with() {
        let gpu = Device::Cuda(0);
        for (bits, device, stored, want) in [
            (None, Device::Cpu, true, Some(true)),
            (None, Device::Cpu, false, Some(false)),
            (None, gpu, true, Some(false)),
            (Some(16), Device::Cpu, true, Some(false)),
            (Some(4), Device::Cpu, true, Some(true)),
            (Some(4), Device::Cpu, false, None),
            (Some(4), gpu, true, None),
            (Some(8), Device::Cpu, true, None),
        ] {
            let got = select_nf4(bits, device, stored).ok();
            assert_eq!(got, want, "{bits:?} on {device:?}, stored {stored}");
        }
    }
}
