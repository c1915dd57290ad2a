//! The seam: what ranks can do together.

use std::fmt;
use std::sync::Arc;

use tch::Tensor;

use crate::{Error, Result};

/// A group of ranks that work as one.
///
/// Every method but [`rank`](Self::rank), [`world_size`](Self::world_size) and the two that abort
/// is a collective: **every rank of the group must call it, in the same order**, with tensors of
/// the same kind and shape where nothing else is said. Tensors may live on any device and have any
/// layout; those that are not dense host tensors are staged through host memory.
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

    /// The group of the ranks that gave the same `color`, numbered by `key`, ties by rank here.
    ///
    /// # Errors
    /// A rank that is gone.
    fn split(&self, color: usize, key: usize) -> Result<Box<dyn Communicator>>;

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

pub(crate) fn check_root(operation: &'static str, root: usize, world_size: usize) -> Result<()> {
    if root < world_size { Ok(()) } else { Err(Error::Root { operation, root, world_size }) }
}
