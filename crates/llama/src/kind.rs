//! In which kind a model computes, from what users write.

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
}
