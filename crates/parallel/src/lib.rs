//! Brief overview: processes that work as one and fail as one.
//!
//! The central trait is [`Communicator`], a group of ranks with its collectives. It has three
//! implementations, which pass the same test: [`SingleProcess`], [`threads`] (the ranks of a test,
//! in one process) and [`Mpi`]. [`launch`] finds out how the process was started and gives it the
//! right one, inside [`Guarded`], which ends a job that waits for ever. GPUs talk to each other through
//! NCCL, where [`Communicator::for_device`] finds it. [`ParallelDims`] lays the
//! ranks out as replicas of tensor-parallel groups, and [`WorkQueue`] deals rows out to them.
//!
//! One rank that fails ends all: a panic, an error that [`Launch::run`] sees, a rank that does not
//! come to a collective. Nothing is left behind.
//!
//! ```no_run
//! use dromedary_parallel::{Error, ParallelDims, launch};
//! use tch::Tensor;
//!
//! fn main() -> Result<(), Error> {
//!     launch()?.run(|launch| {
//!         let world = launch.world();
//!         let group = ParallelDims::new(world.world_size(), 2)?.tp_group(world)?;
//!         let mut partial = Tensor::from_slice(&[1.0_f32, 2.0]);
//!         group.all_reduce_sum(&mut partial)
//!     })
//! }
//! ```

mod communicator;
mod cuda_driver;
mod device;
mod dims;
mod environment;
mod error;
mod fault;
mod guarded;
mod host;
mod launch;
mod mpi_buffers;
mod mpi_communicator;
mod nccl;
mod roll_call;
mod single;
mod stderr;
mod threads;
mod work_queue;

pub use communicator::{AbortHandle, Communicator, Message, check_agreement, check_agreements};
pub use device::{planned_device, select_device};
pub use dims::ParallelDims;
pub use error::{Error, Result};
pub use fault::fault_point;
pub use guarded::Guarded;
pub use launch::{Launch, launch, ranks_of_machine};
pub use mpi_communicator::Mpi;
pub use nccl::{NcclLibraries, join_nccl};
pub use single::SingleProcess;
pub use threads::{ThreadCommunicator, threads};
pub use work_queue::WorkQueue;
