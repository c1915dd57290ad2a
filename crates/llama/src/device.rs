//! Where and in which kind a model computes, from what users write.

use tch::{Cuda, Device, Kind};

use crate::{Dtype, Error, Result};

/// The device of `auto`, `cpu`, `cuda` or `cuda:N`.
///
/// `auto` is a GPU where libtorch sees one, else the CPU. Without a number the GPUs of a node are
/// dealt out by `local_rank`; a launcher that shows each task one GPU leaves only that one.
///
/// # Errors
/// Another word, or a GPU that libtorch does not see; the message says how many it sees.
pub fn select_device(name: &str, local_rank: usize) -> Result<Device> {
    let visible = usize::try_from(Cuda::device_count()).unwrap_or(0);
    choose_device(name, local_rank, visible)
        .ok_or_else(|| Error::Device { name: name.to_owned(), visible })
}

fn choose_device(name: &str, local_rank: usize, visible: usize) -> Option<Device> {
    let number = match name {
        "cpu" => return Some(Device::Cpu),
        "auto" if visible == 0 => return Some(Device::Cpu),
        "auto" | "cuda" => local_rank.checked_rem(visible)?,
        _ => name.strip_prefix("cuda:")?.parse().ok()?,
    };
    (number < visible).then_some(Device::Cuda(number))
}

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
    fn devices_are_dealt_out_by_local_rank() {
        assert_eq!(choose_device("auto", 5, 4), Some(Device::Cuda(1)));
        assert_eq!(choose_device("cuda", 3, 1), Some(Device::Cuda(0)));
        assert_eq!(choose_device("cuda:2", 0, 4), Some(Device::Cuda(2)));
        assert_eq!(choose_device("cpu", 0, 4), Some(Device::Cpu));
    }

    #[test]
    fn a_device_that_is_not_there_is_no_other_device() {
        assert_eq!(choose_device("auto", 0, 0), Some(Device::Cpu));
        for name in ["cuda", "cuda:0", "cuda:x", "gpu", ""] {
            assert_eq!(choose_device(name, 0, 0), None, "{name}");
        }
        assert_eq!(choose_device("cuda:4", 0, 4), None);
    }

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
