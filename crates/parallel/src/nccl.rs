//! NCCL: collectives between GPUs that do not go through host memory.

use std::path::PathBuf;
use std::sync::Once;

use tch::Device;

use crate::{Communicator, Error, Result, cuda_driver};

#[cfg(any(not(feature = "nccl"), test))]
mod disabled;
#[cfg(feature = "nccl")]
mod enabled;
#[cfg(feature = "nccl")]
mod library;

#[cfg(not(feature = "nccl"))]
use disabled::Loaded;
#[cfg(feature = "nccl")]
use enabled::Loaded;

/// Where NCCL and the NVIDIA driver are looked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NcclLibraries {
    /// NCCL; by default `libnccl.so.2`, the name that libtorch loads, so that both use one.
    pub nccl: PathBuf,
    /// The driver; by default `libcuda.so.1`.
    pub driver: PathBuf,
}

impl Default for NcclLibraries {
    fn default() -> Self {
        Self { nccl: "libnccl.so.2".into(), driver: cuda_driver::LIBRARY.into() }
    }
}

/// The ranks of `group` for tensors on `device`, through NCCL; everything else goes through `group`.
///
/// It is what [`Communicator::for_device`] does, without its way out: an error where that would go
/// through host memory. Put it into [`Guarded`](crate::Guarded): a rank that does not come to a
/// collective is found by the deadline. Every rank of the group must call this.
///
/// # Errors
/// [`Error::FeatureOff`], [`Error::Nccl`] where a library is missing on any rank or refuses, a rank
/// that is gone.
pub fn join_nccl(
    group: Box<dyn Communicator>,
    device: Device,
    libraries: &NcclLibraries,
) -> Result<Box<dyn Communicator>> {
    const OPERATION: &str = "join_nccl";
    let loaded = Loaded::load(libraries);
    if let Err(error @ Error::FeatureOff { .. }) = loaded {
        return Err(error);
    }
    match agreed(group.as_ref(), loaded)? {
        Ok(loaded) => loaded.join(group, device),
        Err(message) => Err(Error::Nccl { operation: OPERATION, message }),
    }
}

/// NCCL where `device` is a GPU on every rank and it can be loaded, else `group` as it is.
pub(crate) fn or_host(
    group: Box<dyn Communicator>,
    device: Device,
    libraries: &NcclLibraries,
) -> Result<Box<dyn Communicator>> {
    if group.world_size() == 1 {
        return Ok(group);
    }
    let is_gpu = matches!(device, Device::Cuda(_));
    let loaded = if is_gpu {
        Loaded::load(libraries)
    } else {
        Err(Error::Nccl { operation: "for_device", message: "a rank computes on no GPU".into() })
    };
    match agreed(group.as_ref(), loaded)? {
        Ok(loaded) => loaded.join(group, device),
        Err(reason) => {
            if is_gpu {
                warn_once(&reason);
            }
            Ok(group)
        }
    }
}

/// What was loaded, or the reason of the first rank that has one against it.
fn agreed<T>(
    group: &dyn Communicator,
    loaded: Result<T>,
) -> Result<std::result::Result<T, String>> {
    let own = loaded.as_ref().err().map(ToString::to_string).unwrap_or_default();
    let reasons = group.all_gather_bytes(own.as_bytes())?;
    match (loaded, reasons.iter().find(|reason| !reason.is_empty())) {
        (Ok(loaded), None) => Ok(Ok(loaded)),
        (_, Some(reason)) => Ok(Err(String::from_utf8_lossy(reason).into_owned())),
        (Err(error), None) => Err(error),
    }
}

fn warn_once(reason: &str) {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        tracing::warn!(
            "tensors on GPUs are exchanged through host memory, which is slow: {reason}"
        );
    });
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;

    use tch::Tensor;
    use tracing::span;

    use super::*;
    use crate::threads;

    /// Counts warnings that speak of host memory.
    struct Warnings(Arc<AtomicUsize>);

    impl tracing::Subscriber for Warnings {
        fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
            true
        }

        fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
            span::Id::from_u64(1)
        }

        fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

        fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

        fn event(&self, event: &tracing::Event<'_>) {
            event.record(&mut |_: &tracing::field::Field, value: &dyn std::fmt::Debug| {
                if format!("{value:?}").contains("through host memory") {
                    self.0.fetch_add(1, Ordering::SeqCst);
                }
            });
        }

        fn enter(&self, _: &span::Id) {}

        fn exit(&self, _: &span::Id) {}
    }

    fn nowhere() -> NcclLibraries {
        NcclLibraries { nccl: "/nonexistent/libnccl.so.2".into(), ..NcclLibraries::default() }
    }

    /// Two ranks on these devices, which exchange something then; the number of warnings.
    fn exchanged(devices: [Device; 2]) -> usize {
        let warnings = Arc::new(AtomicUsize::new(0));
        thread::scope(|scope| {
            for (rank, device) in threads(2).into_iter().zip(devices) {
                let subscriber = Warnings(Arc::clone(&warnings));
                scope.spawn(move || {
                    tracing::subscriber::with_default(subscriber, || {
                        for _ in 0..2 {
                            let again = rank.split(0, rank.rank()).unwrap();
                            let group = or_host(again, device, &nowhere()).unwrap();
                            let mut tensor = Tensor::from(1.0_f32);
                            group.all_reduce_sum(&mut tensor).unwrap();
                            assert_eq!(tensor, Tensor::from(2.0_f32));
                        }
                    });
                });
            }
        });
        warnings.load(Ordering::SeqCst)
    }

    #[test]
    fn without_nccl_host_memory_is_the_way_and_one_warning_says_so() {
        assert_eq!(exchanged([Device::Cpu, Device::Cpu]), 0);
        assert_eq!(exchanged([Device::Cuda(0), Device::Cuda(1)]), 1);
        assert_eq!(exchanged([Device::Cuda(0), Device::Cpu]), 0, "a second time");
    }

    #[test]
    fn whoever_asks_for_nccl_is_told_what_is_missing() {
        let messages: Vec<String> = thread::scope(|scope| {
            let ranks: Vec<_> = threads(2)
                .into_iter()
                .map(|rank| {
                    let joined = || join_nccl(Box::new(rank), Device::Cuda(0), &nowhere());
                    scope.spawn(move || joined().err().unwrap().to_string())
                })
                .collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        });
        for message in messages {
            assert!(message.contains("/nonexistent/libnccl.so.2"), "{message}");
        }
    }

    #[test]
    fn a_build_without_it_names_the_feature() {
        let message = disabled::Loaded::load(&nowhere()).err().unwrap().to_string();
        assert_eq!(message, "built without the feature `nccl` of dromedary-parallel");
    }
}
