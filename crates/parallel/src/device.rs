//! Which device a rank computes on.

use std::collections::BTreeMap;

use tch::{Cuda, Device};

use crate::cuda_driver::{self, Driver};
use crate::{Communicator, Error, Result, host};

/// The device of `auto`, `cpu`, `cuda` or `cuda:N`.
///
/// `auto` is a GPU where libtorch sees one, else the CPU. Without a number the GPUs of a node are
/// dealt out by `local_rank`, this rank's number on its node; a launcher that shows each rank one
/// GPU leaves only that one. Two ranks never get the same GPU: GPUs are compared by the UUIDs that
/// the driver gives them, because each rank may count from 0.
///
/// Every rank of `world` must call this.
///
/// # Errors
/// Another word, or a GPU that libtorch does not see; two ranks on one GPU, with both numbers; a
/// driver that cannot name its GPUs; a rank that is gone.
pub fn select_device(name: &str, local_rank: usize, world: &dyn Communicator) -> Result<Device> {
    select(name, local_rank, world, &host::name(), &System)
}

/// The device that such a name means in a plan: a GPU that is named need not be here; `auto` is one
/// where there is one here.
///
/// # Errors
/// Another word.
pub fn planned_device(name: &str) -> Result<Device> {
    planned(name, &System)
}

fn planned(name: &str, gpus: &dyn Gpus) -> Result<Device> {
    let visible = if name == "auto" { gpus.visible() } else { usize::MAX };
    choose(name, 0, visible).ok_or_else(|| Error::Device {
        name: name.to_owned(),
        visible: gpus.visible(),
        reason: gpus.reason(),
    })
}

/// What a process can know about GPUs; tests have made-up ones.
trait Gpus {
    /// Number of GPUs that can be computed on.
    fn visible(&self) -> usize;

    /// Why that number may be smaller than the user thinks.
    fn reason(&self) -> String;

    /// What names the GPU on its machine, whatever its number is here.
    fn uuid(&self, ordinal: usize) -> std::result::Result<[u8; 16], String>;
}

/// The GPUs of libtorch and of the NVIDIA driver.
struct System;

impl Gpus for System {
    fn visible(&self) -> usize {
        usize::try_from(Cuda::device_count()).unwrap_or(0)
    }

    fn reason(&self) -> String {
        match Driver::load(cuda_driver::LIBRARY).and_then(|driver| driver.count()) {
            Err(message) => format!("; there is no NVIDIA driver: {message}"),
            Ok(count) if count > 0 && !tch::utils::has_cuda() => {
                format!("; the driver has {count}, but this libtorch is built without CUDA")
            }
            Ok(_) => String::new(),
        }
    }

    fn uuid(&self, ordinal: usize) -> std::result::Result<[u8; 16], String> {
        Driver::load(cuda_driver::LIBRARY)?.uuid(ordinal)
    }
}

fn select(
    name: &str,
    local_rank: usize,
    world: &dyn Communicator,
    host: &str,
    gpus: &dyn Gpus,
) -> Result<Device> {
    let visible = gpus.visible();
    let device = choose(name, local_rank, visible).ok_or_else(|| Error::Device {
        name: name.to_owned(),
        visible,
        reason: gpus.reason(),
    })?;
    if world.world_size() > 1 {
        let gpu = match device {
            Device::Cuda(ordinal) => {
                Some(gpus.uuid(ordinal).map_err(|message| Error::Driver { ordinal, message })?)
            }
            _ => None,
        };
        check_not_shared(world, host, gpu)?;
    }
    Ok(device)
}

fn choose(name: &str, local_rank: usize, visible: usize) -> Option<Device> {
    let number = match name {
        "cpu" => return Some(Device::Cpu),
        "auto" if visible == 0 => return Some(Device::Cpu),
        "auto" | "cuda" => local_rank.checked_rem(visible)?,
        _ => name.strip_prefix("cuda:")?.parse().ok()?,
    };
    (number < visible).then_some(Device::Cuda(number))
}

/// Every rank must call this; the error is the same on all of them.
fn check_not_shared(world: &dyn Communicator, host: &str, gpu: Option<[u8; 16]>) -> Result<()> {
    let own = gpu.map(|uuid| [&uuid[..], host.as_bytes()].concat()).unwrap_or_default();
    let mut owners = BTreeMap::new();
    for (second, gpu) in world.all_gather_bytes(&own)?.into_iter().enumerate() {
        let Some((uuid, host)) = gpu.split_first_chunk::<16>() else { continue };
        let (uuid, host) = (text(uuid), String::from_utf8_lossy(host).into_owned());
        if let Some(first) = owners.insert(gpu, second) {
            return Err(Error::SharedDevice { first, second, uuid, host });
        }
    }
    Ok(())
}

/// As `nvidia-smi -L` writes it.
fn text(uuid: &[u8; 16]) -> String {
    let digits: String = uuid.iter().map(|byte| format!("{byte:02x}")).collect();
    let groups = [0..8, 8..12, 12..16, 16..20, 20..32].map(|group| digits[group].to_owned());
    format!("GPU-{}", groups.join("-"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{SingleProcess, threads};

    /// Machines of a test: the GPUs that a rank sees, by what tells them apart.
    #[derive(Clone)]
    struct Stand(Vec<u8>);

    impl Gpus for Stand {
        fn visible(&self) -> usize {
            self.0.len()
        }

        fn reason(&self) -> String {
            "; made up".to_owned()
        }

        fn uuid(&self, ordinal: usize) -> std::result::Result<[u8; 16], String> {
            Ok([self.0[ordinal]; 16])
        }
    }

    /// What each rank gets, of (host, local rank, GPUs that it sees).
    fn selected(
        name: &str,
        ranks: &[(&str, usize, &[u8])],
    ) -> Vec<std::result::Result<Device, String>> {
        std::thread::scope(|scope| {
            let started: Vec<_> = threads(ranks.len())
                .into_iter()
                .zip(ranks)
                .map(|(world, (host, local_rank, gpus))| {
                    let gpus = Stand(gpus.to_vec());
                    scope.spawn(move || {
                        select(name, *local_rank, &world, host, &gpus)
                            .map_err(|error| error.to_string())
                    })
                })
                .collect();
            started.into_iter().map(|rank| rank.join().unwrap()).collect()
        })
    }

    #[test]
    fn gpus_of_a_node_are_dealt_out_by_local_rank() {
        let got = selected("auto", &[("a", 0, &[1, 2]), ("a", 1, &[1, 2]), ("b", 0, &[1, 2])]);
        assert_eq!(got, [Ok(Device::Cuda(0)), Ok(Device::Cuda(1)), Ok(Device::Cuda(0))]);
    }

    #[test]
    fn a_gpu_that_is_planned_for_need_not_be_here() {
        let planned = |name, gpus: &[u8]| planned(name, &Stand(gpus.to_vec())).ok();
        assert_eq!(planned("auto", &[]), Some(Device::Cpu));
        assert_eq!(planned("auto", &[7]), Some(Device::Cuda(0)));
        assert_eq!(planned("cpu", &[7]), Some(Device::Cpu));
        assert_eq!(planned("cuda", &[]), Some(Device::Cuda(0)));
        assert_eq!(planned("cuda:3", &[]), Some(Device::Cuda(3)));
        assert_eq!((planned("cuda:", &[]), planned("gpu", &[])), (None, None));
    }

    #[test]
    fn the_one_gpu_that_a_task_is_shown_is_taken() {
        let got = selected("cuda", &[("a", 0, &[1]), ("a", 1, &[2]), ("a", 2, &[3])]);
        assert_eq!(got, vec![Ok(Device::Cuda(0)); 3]);
    }

    #[test]
    fn two_ranks_on_one_gpu_are_refused_with_both_numbers() {
        let uuid = "GPU-07070707-0707-0707-0707-070707070707";
        let want = Err(format!(
            "ranks 0 and 2 both compute on GPU {uuid} of a: start one rank for each GPU, or show \
             each rank its own"
        ));
        // Three ranks on two GPUs.
        let all: &[u8] = &[7, 8];
        let got = selected("auto", &[("a", 0, all), ("a", 1, all), ("a", 2, all)]);
        assert_eq!(got, vec![want.clone(); 3]);
        // Two numbers, one GPU.
        let got = selected("cuda:1", &[("a", 0, &[5, 7]), ("a", 1, &[5, 6]), ("a", 2, &[6, 7])]);
        assert_eq!(got, vec![want; 3]);
        // The same on two machines is no clash, and neither are CPUs.
        assert!(
            selected("cuda:0", &[("a", 0, all), ("b", 0, all)])
                .iter()
                .all(std::result::Result::is_ok)
        );
        assert!(
            selected("cpu", &[("a", 0, all), ("a", 1, all)]).iter().all(std::result::Result::is_ok)
        );
    }

    #[test]
    fn a_device_that_is_not_there_is_no_other_device() {
        let one = |name, gpus: &[u8]| {
            select(name, 0, &SingleProcess, "a", &Stand(gpus.to_vec()))
                .map_err(|error| error.to_string())
        };
        assert_eq!(one("auto", &[]), Ok(Device::Cpu));
        for name in ["cuda", "cuda:0", "cuda:x", "gpu", ""] {
            let message = one(name, &[]).unwrap_err();
            assert!(message.starts_with(&format!("--device {name}: ")), "{message}");
            assert!(message.ends_with("sees 0 GPUs here; made up"), "{message}");
        }
        assert!(one("cuda:4", &[0, 1, 2, 3]).is_err());
        assert_eq!(one("cuda:2", &[0, 1, 2, 3]), Ok(Device::Cuda(2)));
    }

    #[test]
    fn without_a_driver_the_message_says_so() {
        if Driver::load(cuda_driver::LIBRARY).is_ok() {
            eprintln!("skipped: this machine has a driver");
            return;
        }
        let message = select_device("cuda", 0, &SingleProcess).unwrap_err().to_string();
        assert!(message.contains("there is no NVIDIA driver: libcuda.so.1"), "{message}");
        assert_eq!(select_device("auto", 0, &SingleProcess).unwrap(), Device::Cpu);
    }
}
