//! The seam: what ranks can do together.

use std::fmt;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use tch::{Device, Tensor};

use crate::{Error, Result};

/// What one rank tells another; see [`Communicator::send`].
pub type Message = [u64; 2];

/// A group of ranks that work as one.
///
/// What is said to be a collective must be called by **every rank of the group, in the same
/// order**, with tensors of the same kind and shape where nothing else is said. Tensors may live on
/// any device and have any layout; those that are not dense host tensors are staged through host
/// memory, except where [`for_device`](Self::for_device) found NCCL. What is not is [`rank`](Self::rank), [`world_size`](Self::world_size), messages from one
/// rank to another, the clock, and the two that abort.
///
/// Tensors that are changed must not be results of a recorded graph ([`Error::Recorded`]).
pub trait Communicator: Send {
    /// This rank's number in the group, from 0.
    fn rank(&self) -> usize;

    /// Number of ranks in the group.
    fn world_size(&self) -> usize;

    /// Replaces the tensor by the sum over all ranks, equal to the last bit on all of them.
    /// f32, f64 and i64 are summed as they are, f16 and bf16 in f32.
    ///
    /// # Errors
    /// Another kind, ranks that do not match, a rank that is gone.
    fn all_reduce_sum(&self, tensor: &mut Tensor) -> Result<()>;

    /// Replaces the tensor by the element-wise maximum over all ranks; kinds as in
    /// [`all_reduce_sum`](Self::all_reduce_sum). MPI may lose a NaN here, so a flag is reduced
    /// where a NaN must be seen.
    ///
    /// # Errors
    /// As [`all_reduce_sum`](Self::all_reduce_sum).
    fn all_reduce_max(&self, tensor: &mut Tensor) -> Result<()>;

    /// Replaces the tensor, of any kind, by the one of `root`.
    ///
    /// # Errors
    /// `root` is no rank, ranks that do not match, a rank that is gone.
    fn broadcast(&self, tensor: &mut Tensor, root: usize) -> Result<()>;

    /// The tensors of all ranks behind each other along dimension 0, in rank order, the same on all
    /// of them. Dimension 0 may differ between ranks, the others not; a scalar counts as one row.
    ///
    /// # Errors
    /// Ranks that do not match, a rank that is gone.
    fn all_gather(&self, tensor: &Tensor) -> Result<Tensor>;

    /// Replaces the bytes by those of `root`; the length need not be known elsewhere.
    ///
    /// # Errors
    /// `root` is no rank, a rank that is gone.
    fn broadcast_bytes(&self, bytes: &mut Vec<u8>, root: usize) -> Result<()>;

    /// The bytes of every rank, in rank order, the same on all of them.
    ///
    /// # Errors
    /// A rank that is gone.
    fn all_gather_bytes(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>>;

    /// Returns when every rank has called it.
    ///
    /// # Errors
    /// A rank that is gone.
    fn barrier(&self) -> Result<()>;

    /// Returns when every rank has called it, however long the last one takes: the wait at the end
    /// of a job whose groups end at different times. It sleeps between looks, so that the others
    /// have the cores, and has no deadline. A collective.
    ///
    /// # Errors
    /// A rank that is gone.
    fn wait_for_all(&self) -> Result<()>;

    /// The group of the ranks that gave the same `color`, numbered by `key`, ties by rank here.
    ///
    /// # Errors
    /// A rank that is gone.
    fn split(&self, color: usize, key: usize) -> Result<Box<dyn Communicator>>;

    /// The same ranks for tensors on `device`. Where that is a GPU on every rank and NCCL can be
    /// loaded, such tensors go from GPU to GPU; where it cannot, they go through host memory, and a
    /// warning says so once. A collective.
    ///
    /// # Errors
    /// A rank that is gone; NCCL that is there and does not connect the ranks.
    fn for_device(&self, device: Device) -> Result<Box<dyn Communicator>> {
        let _ = device;
        self.split(0, self.rank())
    }

    /// Sends a message to another rank, and does not wait until that rank asks for it. Messages
    /// between two ranks arrive in the order in which they were sent, beside all collectives.
    ///
    /// # Errors
    /// `to` is no other rank of the group.
    fn send(&self, to: usize, message: Message) -> Result<()>;

    /// The next message of another rank, if one has arrived; does not wait.
    ///
    /// # Errors
    /// `from` is no other rank of the group, or it is gone.
    fn try_receive(&self, from: usize) -> Result<Option<Message>>;

    /// The next message of another rank; waits for it.
    ///
    /// # Errors
    /// `from` is no other rank of the group, or it is gone.
    fn receive(&self, from: usize) -> Result<Message> {
        loop {
            match self.try_receive(from)? {
                Some(message) => return Ok(message),
                // Whoever is waited for may need this core.
                None => thread::sleep(Duration::from_micros(200)),
            }
        }
    }

    /// Seconds that this process has spent in collectives so far, in those of all groups, where
    /// somebody counts: in what [`launch`](crate::launch) gives, and in [`Guarded`](crate::Guarded).
    fn collective_seconds(&self) -> f64 {
        0.0
    }

    /// A way to end all ranks from any thread.
    fn abort_handle(&self) -> AbortHandle;

    /// Ends all ranks, those of other groups too, with this exit code; the message and this rank's
    /// number go to stderr. It returns only where ranks are threads, with the error that all of
    /// them get in their next collective.
    fn abort(&self, code: i32, message: &str) -> Error {
        self.abort_handle().abort(code, message);
        Error::Aborted { message: message.to_owned() }
    }
}

/// Ends all ranks of a job; see [`Communicator::abort`].
#[derive(Clone)]
pub struct AbortHandle {
    end: Arc<End>,
}

type End = dyn Fn(i32, &str) + Send + Sync;

impl AbortHandle {
    pub(crate) fn new(end: impl Fn(i32, &str) + Send + Sync + 'static) -> Self {
        Self { end: Arc::new(end) }
    }

    /// Ends the job with this exit code and reason.
    pub fn abort(&self, code: i32, message: &str) {
        (self.end)(code, message);
    }
}

impl fmt::Debug for AbortHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AbortHandle").finish_non_exhaustive()
    }
}

/// Checks that all ranks hold the same value, such as a hash of the settings or of a file, before
/// they rely on it.
///
/// Every rank of the group must call this.
///
/// # Errors
/// [`Error::Disagreement`] on every rank, with both values.
pub fn check_agreement(group: &dyn Communicator, what: &str, value: &str) -> Result<()> {
    let values = group.all_gather_bytes(value.as_bytes())?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    match values.iter().position(|other| *other != values[0]) {
        None => Ok(()),
        Some(rank) => Err(Error::Disagreement {
            what: what.to_owned(),
            expected: text(&values[0]),
            rank,
            got: text(&values[rank]),
        }),
    }
}

/// Checks that all ranks hold the same values, such as their settings one by one.
///
/// Every rank of the group must call this with the same names in the same order.
///
/// # Errors
/// [`Error::Disagreement`] on every rank, with both values of the first that differs.
pub fn check_agreements(group: &dyn Communicator, values: &[(String, String)]) -> Result<()> {
    let lengths = values.iter().flat_map(|(_, value)| (value.len() as u64).to_le_bytes());
    let mut own: Vec<u8> = lengths.collect();
    own.extend(values.iter().flat_map(|(_, value)| value.bytes()));
    let all = group.all_gather_bytes(&own)?;
    let Some(rank) = all.iter().position(|other| *other != all[0]) else { return Ok(()) };
    let [first, other] = [&all[0], &all[rank]].map(|bytes| split_values(bytes, values.len()));
    let differing = first.iter().zip(&other).zip(values).find(|((first, other), _)| first != other);
    match differing {
        Some(((first, other), (what, _))) => Err(Error::Disagreement {
            what: what.clone(),
            expected: first.clone(),
            rank,
            got: other.clone(),
        }),
        None => Ok(()),
    }
}

/// What `check_agreements` has put together.
fn split_values(bytes: &[u8], count: usize) -> Vec<String> {
    let (lengths, mut rest) = bytes.split_at((count * size_of::<u64>()).min(bytes.len()));
    let (lengths, _) = lengths.as_chunks();
    let mut next = |length: &[u8; 8]| {
        let length = usize::try_from(u64::from_le_bytes(*length)).unwrap_or(usize::MAX);
        let (value, tail) = rest.split_at(length.min(rest.len()));
        rest = tail;
        String::from_utf8_lossy(value).into_owned()
    };
    lengths.iter().map(&mut next).collect()
}

/// Messages go to another rank of the group.
pub(crate) fn check_peer(
    operation: &'static str,
    own: usize,
    peer: usize,
    world_size: usize,
) -> Result<()> {
    if peer < world_size && peer != own {
        return Ok(());
    }
    Err(Error::Peer { operation, peer, rank: own, world_size })
}

pub(crate) fn check_root(operation: &'static str, root: usize, world_size: usize) -> Result<()> {
    if root < world_size { Ok(()) } else { Err(Error::Root { operation, root, world_size }) }
}
