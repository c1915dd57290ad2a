use std::{
    cell::Cell,
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use dromedary_parallel::{AbortHandle, Communicator, Message, Result};
use tch::{Device, Tensor};

/// Calls and bytes, by group and operation.
pub(crate) type Counts = BTreeMap<(&'static str, &'static str), [u64; 2]>;

/// Ranks that count what they are asked for, in the groups that are split off too: these are named `tp` and
/// `dp` in the order in which a run makes them.
pub(crate) struct Counted {
    inner: Box<dyn Communicator>,
    group: &'static str,
    splits: Cell<usize>,
    counts: Arc<Mutex<Counts>>,
}

impl Counted {
    pub(crate) fn new(comm: &dyn Communicator) -> Self {
        let inner = comm.split(0, comm.rank()).unwrap();
        Self { inner, group: "world", splits: Cell::new(0), counts: Arc::default() }
    }

    pub(crate) fn counts(&self) -> Counts {
        self.counts.lock().unwrap().clone()
    }

    fn child(&self, group: &'static str, inner: Box<dyn Communicator>) -> Box<dyn Communicator> {
        let counts = Arc::clone(&self.counts);
        Box::new(Self { inner, group, splits: Cell::new(0), counts })
    }

    fn count(&self, operation: &'static str, bytes: usize) {
        let mut counts = self.counts.lock().unwrap();
        let [calls, all] = counts.entry((self.group, operation)).or_default();
        *calls += 1;
        *all += bytes as u64;
    }

    fn count_tensor(&self, operation: &'static str, tensor: &Tensor) {
        self.count(operation, tensor.numel() * tensor.kind().elt_size_in_bytes());
    }
}

impl Communicator for Counted {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn world_size(&self) -> usize {
        self.inner.world_size()
    }

    fn all_reduce_sum(&self, tensor: &mut Tensor) -> Result<()> {
        self.count_tensor("all-reduce", tensor);
        self.inner.all_reduce_sum(tensor)
    }

    fn all_reduce_max(&self, tensor: &mut Tensor) -> Result<()> {
        self.count_tensor("all-reduce", tensor);
        self.inner.all_reduce_max(tensor)
    }

    fn broadcast(&self, tensor: &mut Tensor, root: usize) -> Result<()> {
        self.count_tensor("broadcast", tensor);
        self.inner.broadcast(tensor, root)
    }

    fn all_gather(&self, tensor: &Tensor) -> Result<Tensor> {
        self.count_tensor("all-gather", tensor);
        self.inner.all_gather(tensor)
    }

    fn broadcast_bytes(&self, bytes: &mut Vec<u8>, root: usize) -> Result<()> {
        self.count("broadcast-bytes", bytes.len());
        self.inner.broadcast_bytes(bytes, root)
    }

    fn all_gather_bytes(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.count("all-gather-bytes", bytes.len());
        self.inner.all_gather_bytes(bytes)
    }

    fn barrier(&self) -> Result<()> {
        self.count("barrier", 0);
        self.inner.barrier()
    }

    fn wait_for_all(&self) -> Result<()> {
        self.inner.wait_for_all()
    }

    fn split(&self, color: usize, key: usize) -> Result<Box<dyn Communicator>> {
        let group = ["tp", "dp"][self.splits.replace(self.splits.get() + 1)];
        Ok(self.child(group, self.inner.split(color, key)?))
    }

    fn for_device(&self, device: Device) -> Result<Box<dyn Communicator>> {
        Ok(self.child(self.group, self.inner.for_device(device)?))
    }

    fn send(&self, to: usize, message: Message) -> Result<()> {
        self.inner.send(to, message)
    }

    fn try_receive(&self, from: usize) -> Result<Option<Message>> {
        self.inner.try_receive(from)
    }

    fn abort_handle(&self) -> AbortHandle {
        self.inner.abort_handle()
    }
}
