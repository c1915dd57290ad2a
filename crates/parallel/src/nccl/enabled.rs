//! Ranks whose GPUs NCCL connects.

use std::sync::Arc;
use std::thread;

use tch::{Device, Kind, Tensor};

use super::NcclLibraries;
use super::library::{self, Ranks};
use crate::communicator::{Message, check_root};
use crate::cuda_driver::{Context, Driver};
use crate::mpi_buffers::Reduction;
use crate::{AbortHandle, Communicator, Error, Result, host};

/// NCCL and the driver of this process.
pub(super) struct Loaded {
    nccl: Arc<library::Nccl>,
    driver: Driver,
}

impl Loaded {
    pub(super) fn load(libraries: &NcclLibraries) -> Result<Self> {
        let failed = failed("load");
        let nccl = library::Nccl::load(&libraries.nccl).map_err(&failed)?;
        let driver = Driver::load(&libraries.driver).map_err(&failed)?;
        Ok(Self { nccl: Arc::new(nccl), driver })
    }

    /// Every rank of the group must call this.
    pub(super) fn join(
        self,
        inner: Box<dyn Communicator>,
        device: Device,
    ) -> Result<Box<dyn Communicator>> {
        Nccl::join(inner, device, self.nccl, Arc::new(self.driver))
    }
}

/// A group whose tensors on one device go from GPU to GPU, and everything else through the group that
/// it was made of.
struct Nccl {
    inner: Box<dyn Communicator>,
    ranks: Ranks,
    device: Device,
    context: Context,
    nccl: Arc<library::Nccl>,
    driver: Arc<Driver>,
}

impl Nccl {
    fn join(
        inner: Box<dyn Communicator>,
        device: Device,
        nccl: Arc<library::Nccl>,
        driver: Arc<Driver>,
    ) -> Result<Box<dyn Communicator>> {
        if inner.world_size() == 1 {
            return Ok(inner);
        }
        let failed = failed("join");
        let ordinal = match device {
            Device::Cuda(ordinal) => ordinal,
            _ => 0,
        };
        let context = driver.context(ordinal).map_err(&failed)?;
        driver.make_current(context).map_err(&failed)?;
        let mut id = Vec::new();
        if inner.rank() == 0 {
            id = nccl.unique_id().map_err(&failed)?;
        }
        inner.broadcast_bytes(&mut id, 0)?;
        let (rank, world_size) = (inner.rank(), inner.world_size());
        let ranks = Ranks::meet(Arc::clone(&nccl), &id, rank, world_size).map_err(&failed)?;
        Ok(Box::new(Self { inner, ranks, device, context, nccl, driver }))
    }

    /// Whether NCCL moves this tensor.
    fn moves(&self, tensor: &Tensor) -> bool {
        tensor.defined() && tensor.device() == self.device && !tensor.is_sparse()
    }

    /// Enqueues a collective and waits until the GPU has done it, or an error turns up, which ends this
    /// group for good. Only then a rank that does not come is seen inside of the collective it is
    /// missed in.
    fn run(
        &self,
        operation: &'static str,
        enqueue: impl FnOnce() -> std::result::Result<(), String>,
    ) -> Result<()> {
        let wait = || {
            self.driver.make_current(self.context)?;
            enqueue()?;
            loop {
                self.ranks.check()?;
                if self.driver.is_idle()? {
                    return self.ranks.check();
                }
                thread::yield_now();
            }
        };
        wait().map_err(|message| {
            self.ranks.abort();
            Error::Nccl { operation, message }
        })
    }

    fn all_reduce(
        &self,
        operation: &'static str,
        tensor: &mut Tensor,
        kind: Kind,
        reduction: Reduction,
    ) -> Result<()> {
        let code = library::datatype(kind).ok_or(Error::UnsupportedKind { operation, kind })?;
        host::staged(operation, tensor, self.device, kind, |tensor| {
            if tensor.numel() == 0 {
                return Ok(());
            }
            self.run(operation, || self.ranks.all_reduce(tensor, code, reduction))
        })
    }

    /// What every rank calls, and how many rows it brings.
    fn meet(&self, call: &str, rows: i64) -> Result<Vec<usize>> {
        let own = format!("{rows} {call}");
        let all = self.inner.all_gather_bytes(own.as_bytes())?;
        let split = |text: &[u8]| {
            let text = String::from_utf8_lossy(text).into_owned();
            let (rows, call) = text.split_once(' ').unwrap_or_default();
            (rows.parse().unwrap_or(0), call.to_owned())
        };
        let all: Vec<(usize, String)> = all.iter().map(|text| split(text)).collect();
        if let Some((rank, (_, there))) =
            all.iter().enumerate().find(|(_, (_, other))| other != call)
        {
            let (here_rank, here) = (self.rank(), call.to_owned());
            return Err(Error::Mismatch { here_rank, here, rank, there: there.clone() });
        }
        Ok(all.into_iter().map(|(rows, _)| rows).collect())
    }

    fn gather(&self, operation: &'static str, rows: &Tensor) -> Result<Tensor> {
        // The other ranks may be gone: nobody is to wait for them in `meet`.
        self.ranks.check().map_err(failed(operation))?;
        let mut size = rows.size();
        let counts = self.meet(&host::describe_rows(operation, rows)?, size[0])?;
        size[0] = counts.iter().sum::<usize>() as i64;
        let mut all = Tensor::f_zeros(&size[..], (rows.kind(), self.device))
            .map_err(Error::torch(operation))?;
        if all.numel() == 0 {
            return Ok(all);
        }
        let row = rows.size().get(1..).unwrap_or_default().iter().product::<i64>() as usize;
        let counts: Vec<usize> = counts.iter().map(|count| count * row).collect();
        self.run(operation, || {
            if counts.iter().all(|count| *count == counts[0]) {
                self.ranks.all_gather(rows, &mut all)
            } else {
                self.ranks.all_gather_varying(rows, self.rank(), &counts, &mut all)
            }
        })?;
        Ok(all)
    }
}

impl Communicator for Nccl {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn world_size(&self) -> usize {
        self.inner.world_size()
    }

    fn all_reduce_sum(&self, tensor: &mut Tensor) -> Result<()> {
        const OPERATION: &str = "all_reduce_sum";
        if !self.moves(tensor) {
            return self.inner.all_reduce_sum(tensor);
        }
        // NCCL would round each partial sum of 16-bit kinds.
        let kind = host::reduction_kind(OPERATION, host::kind_of(OPERATION, tensor)?)?;
        self.all_reduce(OPERATION, tensor, kind, Reduction::Sum)
    }

    fn all_reduce_max(&self, tensor: &mut Tensor) -> Result<()> {
        const OPERATION: &str = "all_reduce_max";
        if !self.moves(tensor) {
            return self.inner.all_reduce_max(tensor);
        }
        let kind = host::kind_of(OPERATION, tensor)?;
        self.all_reduce(OPERATION, tensor, kind, Reduction::Max)
    }

    fn broadcast(&self, tensor: &mut Tensor, root: usize) -> Result<()> {
        const OPERATION: &str = "broadcast";
        if !self.moves(tensor) {
            return self.inner.broadcast(tensor, root);
        }
        check_root(OPERATION, root, self.world_size())?;
        let kind = host::kind_of(OPERATION, tensor)?;
        host::staged(OPERATION, tensor, self.device, kind, |tensor| {
            if tensor.numel() == 0 {
                return Ok(());
            }
            self.run(OPERATION, || self.ranks.broadcast(tensor, root))
        })
    }

    fn all_gather(&self, tensor: &Tensor) -> Result<Tensor> {
        const OPERATION: &str = "all_gather";
        if !self.moves(tensor) {
            return self.inner.all_gather(tensor);
        }
        host::gathered_on(self.device, OPERATION, tensor, |rows| self.gather(OPERATION, rows))
    }

    fn broadcast_bytes(&self, bytes: &mut Vec<u8>, root: usize) -> Result<()> {
        self.inner.broadcast_bytes(bytes, root)
    }

    fn all_gather_bytes(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.inner.all_gather_bytes(bytes)
    }

    fn barrier(&self) -> Result<()> {
        self.inner.barrier()
    }

    fn wait_for_all(&self) -> Result<()> {
        self.inner.wait_for_all()
    }

    fn split(&self, color: usize, key: usize) -> Result<Box<dyn Communicator>> {
        let inner = self.inner.split(color, key)?;
        Self::join(inner, self.device, Arc::clone(&self.nccl), Arc::clone(&self.driver))
    }

    fn send(&self, to: usize, message: Message) -> Result<()> {
        self.inner.send(to, message)
    }

    fn try_receive(&self, from: usize) -> Result<Option<Message>> {
        self.inner.try_receive(from)
    }

    fn receive(&self, from: usize) -> Result<Message> {
        self.inner.receive(from)
    }

    fn collective_seconds(&self) -> f64 {
        self.inner.collective_seconds()
    }

    fn abort_handle(&self) -> AbortHandle {
        self.inner.abort_handle()
    }
}

fn failed(operation: &'static str) -> impl Fn(String) -> Error {
    move |message| Error::Nccl { operation, message }
}
