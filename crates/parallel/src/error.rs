//! What can go wrong between ranks.

use tch::{Kind, TchError};

/// The result of this crate's functions.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// libtorch could not copy or make a tensor.
    #[error("{operation}: {message}")]
    Torch {
        /// The collective it was needed for.
        operation: &'static str,
        /// The first line of what libtorch said.
        message: String,
    },
    /// A sum or maximum of tensors of a kind that is not reduced.
    #[error("{operation}: tensors of kind {kind:?} cannot be reduced")]
    UnsupportedKind {
        /// The collective.
        operation: &'static str,
        /// The tensor's kind.
        kind: Kind,
    },
    /// A collective was asked to change a tensor that a recorded graph made; its gradient would
    /// know nothing of the other ranks.
    #[error("{operation}: the tensor is part of a recorded graph, detach it first")]
    Recorded {
        /// The collective.
        operation: &'static str,
    },
    /// Ranks met in different collectives, or with different shapes or kinds.
    #[error("rank {rank} is in {there} while rank {here_rank} is in {here}")]
    Mismatch {
        /// The rank that reports.
        here_rank: usize,
        /// What it called.
        here: String,
        /// The first rank that called something else.
        rank: usize,
        /// What that rank called.
        there: String,
    },
    /// A root outside the group.
    #[error("{operation}: root {root} is not one of {world_size} ranks")]
    Root {
        /// The collective.
        operation: &'static str,
        /// The root that was asked for.
        root: usize,
        /// The number of ranks.
        world_size: usize,
    },
    /// A message to or from a rank that is not there, or to oneself.
    #[error("{operation}: rank {peer} is no other one of {world_size} ranks for rank {rank}")]
    Peer {
        /// Sending or receiving.
        operation: &'static str,
        /// The rank that was named.
        peer: usize,
        /// This rank.
        rank: usize,
        /// The number of ranks.
        world_size: usize,
    },
    /// The first rank of a group told it something else than a range of rows.
    #[error(
        "rows of the shared queue: {bytes} bytes are no range, do all ranks of the group take?"
    )]
    Range {
        /// Bytes that came.
        bytes: usize,
    },
    /// A color or key of a split that MPI cannot hold.
    #[error("split: {value} is above 2^31 - 1")]
    SplitNumber {
        /// The number.
        value: usize,
    },
    /// A rank of a group of threads ended without taking part.
    #[error("{operation}: rank {rank} has left")]
    RankGone {
        /// The collective that waited for it.
        operation: String,
        /// The rank that is gone.
        rank: usize,
    },
    /// A rank ended the job.
    #[error("the job was ended: {message}")]
    Aborted {
        /// The rank and its reason.
        message: String,
    },
    /// MPI refused a call.
    #[error("{operation}: MPI says: {message}")]
    Mpi {
        /// The collective.
        operation: &'static str,
        /// MPI's message.
        message: String,
    },
    /// NCCL or the driver refused a call, or a rank's GPU is gone.
    #[error("{operation}: NCCL: {message}")]
    Nccl {
        /// The collective.
        operation: &'static str,
        /// What was called, and what came back.
        message: String,
    },
    /// A part of this crate that was left out when it was built.
    #[error("built without the feature `{feature}` of dromedary-parallel")]
    FeatureOff {
        /// Its name.
        feature: &'static str,
    },
    /// MPI was already set up by somebody else in this process.
    #[error("MPI was already initialised in this process")]
    MpiInitialised,
    /// MPI does not let a thread call it that did not begin it, as a build without threads.
    #[error(
        "this MPI allows no more than `{allowed}` threads, and `serialized` is needed: take one that \
         was built with threads"
    )]
    MpiThreads {
        /// What it allows.
        allowed: String,
    },
    /// The launcher started several tasks, but they do not see each other.
    #[error(
        "started as {expected} tasks, but MPI sees {got}: with Slurm, start with `srun --mpi=pmix`; \
         with mpirun, use the one of the MPI this program was built with"
    )]
    Singleton {
        /// Number of tasks that the launcher says.
        expected: usize,
        /// Number of ranks that MPI says; 1 where no way to reach the others was given.
        got: usize,
    },
    /// An environment variable holds no number.
    #[error("environment variable {name} is `{value}`, which is not a whole number above 0")]
    Environment {
        /// The variable.
        name: &'static str,
        /// Its value.
        value: String,
    },
    /// The variable that asks for a fault on purpose asks for none that there is.
    #[error(
        "environment variable DROMEDARY_FAULT is `{value}`: give rank=N,point=NAME[N] and, after \
         another comma, how=panic, error, kill, stop or hang"
    )]
    FaultSetting {
        /// Its value.
        value: String,
    },
    /// A fault on purpose, asked for by `DROMEDARY_FAULT`.
    #[error("fault on purpose at {point}")]
    Fault {
        /// Where.
        point: String,
    },
    /// A device was asked for that is none, or that is not there.
    #[error(
        "--device {name}: give auto, cpu, cuda or cuda:N; libtorch sees {visible} GPUs here{reason}"
    )]
    Device {
        /// What was asked for.
        name: String,
        /// GPUs that libtorch sees.
        visible: usize,
        /// What the driver says to it, with a separator; empty where it agrees.
        reason: String,
    },
    /// The NVIDIA driver could not say which GPU a number means.
    #[error("cannot identify GPU {ordinal}: {message}")]
    Driver {
        /// Number of the GPU among those that this process sees.
        ordinal: usize,
        /// What is missing, or the driver's own code.
        message: String,
    },
    /// Two ranks would compute on one GPU.
    #[error(
        "ranks {first} and {second} both compute on GPU {uuid} of {host}: start one rank for each \
         GPU, or show each rank its own"
    )]
    SharedDevice {
        /// One rank.
        first: usize,
        /// The other.
        second: usize,
        /// The GPU.
        uuid: String,
        /// Name of the machine.
        host: String,
    },
    /// The watchdog could not be started.
    #[error("cannot start the watchdog of collectives: {source}")]
    Watchdog {
        /// Why.
        source: std::io::Error,
    },
    /// A tensor-parallel size that does not fit the number of ranks.
    #[error("tp = {tp} does not divide the {world_size} ranks")]
    ParallelDims {
        /// Tensor-parallel size.
        tp: usize,
        /// Number of ranks.
        world_size: usize,
    },
    /// Ranks were started with different settings or files.
    #[error("ranks disagree on {what}: rank 0 has {expected}, rank {rank} has {got}")]
    Disagreement {
        /// What was compared.
        what: String,
        /// The value on rank 0.
        expected: String,
        /// The first rank with another value.
        rank: usize,
        /// The value there.
        got: String,
    },
}

impl Error {
    /// libtorch's messages carry a C++ trace below the first line.
    pub(crate) fn torch(operation: &'static str) -> impl Fn(TchError) -> Self {
        move |error| {
            let text = error.to_string();
            let message = text.lines().next().unwrap_or_default().to_owned();
            Self::Torch { operation, message }
        }
    }
}
