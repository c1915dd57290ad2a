//! From a started process to a rank that fails with the others.

use std::fmt::{self, Display};
use std::panic;
use std::time::Duration;

use mpi::Threading;
use mpi::environment::Universe;

use crate::environment::{self, Started};
use crate::mpi_communicator::end_job;
use crate::{Communicator, Error, Guarded, Mpi, Result, SingleProcess, fault, host};

/// Exit code of a job that a panic ended: the one of a Rust program alone.
const EXIT_PANIC: i32 = 101;

/// Exit code of a job that an error ended.
const EXIT_FAILURE: i32 = 1;

/// How long a collective may take before the job is ended, where
/// `DROMEDARY_COLLECTIVE_TIMEOUT` gives no other number of seconds. The longest wait is for a rank
/// that reads or writes a checkpoint.
const DEFAULT_LIMIT: Duration = Duration::from_secs(1800);

/// The variable that replaces [`DEFAULT_LIMIT`].
const LIMIT: &str = "DROMEDARY_COLLECTIVE_TIMEOUT";

/// This process as a rank of its job.
///
/// [`run`](Self::run) is the way to use it. Where ranks are processes, dropping it ends the
/// whole job as failed: an error that returns early must not leave the others waiting.
pub struct Launch {
    world: Box<dyn Communicator>,
    local_rank: usize,
    /// MPI, where the job has several ranks.
    universe: Option<Universe>,
}

/// Makes this process a rank: of one where it was started by itself, and then MPI is never
/// initialised; of all that mpirun or srun started together otherwise.
///
/// From then on a panic in any thread of a rank among several ends the job, also one that
/// somebody would catch: call it in `main`, not in a library.
///
/// # Errors
/// The tasks that were started do not see each other (srun without PMIx), a variable of the
/// launcher is no number, MPI is already in use.
pub fn launch() -> Result<Launch> {
    let variable = |name: &str| std::env::var(name).ok();
    match environment::started(variable)? {
        Started::Alone => {
            fault::arm(0, variable)?;
            Ok(Launch { world: Box::new(SingleProcess), local_rank: 0, universe: None })
        }
        Started::Together { tasks } => {
            let seconds = environment::number(LIMIT, variable)?;
            let limit =
                seconds.map_or(DEFAULT_LIMIT, |seconds| Duration::from_secs(seconds as u64));
            join(tasks, limit)
        }
    }
}

fn join(tasks: Option<usize>, limit: Duration) -> Result<Launch> {
    // A communicator may be moved to the thread that computes.
    let (universe, threading) =
        mpi::initialize_with_threading(Threading::Serialized).ok_or(Error::MpiInitialised)?;
    check_threading(threading)?;
    let world = Mpi::world()?;
    let (rank, got) = (world.rank(), world.world_size());
    if let Some(expected) = tasks.filter(|tasks| *tasks != got) {
        return Err(Error::Singleton { expected, got });
    }
    end_job_on_panic(rank);
    fault::arm(rank, |name| std::env::var(name).ok())?;
    let world = Guarded::new(Box::new(world), limit)?;
    let local_rank = local_rank(&world)?;
    tracing::debug!(rank, world_size = got, local_rank, "joined");
    Ok(Launch { world: Box::new(world), local_rank, universe: Some(universe) })
}

/// What MPI allows may be less than it was asked for, as in a build without threads.
fn check_threading(allowed: Threading) -> Result<()> {
    match allowed {
        Threading::Serialized | Threading::Multiple => Ok(()),
        Threading::Single | Threading::Funneled => {
            Err(Error::MpiThreads { allowed: format!("{allowed:?}").to_lowercase() })
        }
    }
}

/// Without it a panic would unwind, drop MPI, and wait there for the others, who wait for this rank.
fn end_job_on_panic(rank: usize) {
    let previous = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        previous(info);
        let place = info.location().map(|place| format!(" at {place}")).unwrap_or_default();
        end_job(rank, EXIT_PANIC, &format!("panicked{place}"));
    }));
}

/// Number of lower ranks on the same node.
fn local_rank(world: &dyn Communicator) -> Result<usize> {
    Ok(same_machine(world)?.into_iter().take(world.rank()).filter(|same| *same).count())
}

/// Number of ranks on this rank's machine, itself among them. Every rank must call this.
///
/// # Errors
/// A rank is gone.
pub fn ranks_of_machine(world: &dyn Communicator) -> Result<usize> {
    Ok(same_machine(world)?.into_iter().filter(|same| *same).count())
}

/// Of each rank, whether it is on this rank's machine.
fn same_machine(world: &dyn Communicator) -> Result<Vec<bool>> {
    let host = host::name();
    let hosts = world.all_gather_bytes(host.as_bytes())?;
    Ok(hosts.iter().map(|other| *other == *host.as_bytes()).collect())
}

impl Launch {
    /// The group of all ranks.
    pub fn world(&self) -> &dyn Communicator {
        self.world.as_ref()
    }

    /// Number of this rank among those of its node, for the choice of a device.
    pub fn local_rank(&self) -> usize {
        self.local_rank
    }

    /// Runs the program's work and leaves the job. Every rank must call this.
    ///
    /// An error on one rank of several is printed with the rank's number and ends all of them with
    /// exit code 1. What all ranks decide together, such as stopping on a signal, is therefore a
    /// value and no error.
    ///
    /// # Errors
    /// The error of `work` in a process alone, for its caller to report.
    pub fn run<T, E>(
        self,
        work: impl FnOnce(&Self) -> std::result::Result<T, E>,
    ) -> std::result::Result<T, E>
    where
        E: Display + From<Error>,
    {
        let result = work(&self);
        if let Err(error) = &result {
            self.fail(EXIT_FAILURE, error);
        }
        let value = result?;
        self.finish()?;
        Ok(value)
    }

    /// Ends all ranks with this exit code after printing the error with the rank's number. Returns
    /// in a process alone, for the caller to report the error.
    pub fn fail(&self, code: i32, error: &dyn Display) {
        if self.universe.is_some() {
            self.world.abort_handle().abort(code, &format!("{error:#}"));
        }
    }

    /// Leaves the job when all ranks have come to this point, however far apart they do. Every rank
    /// must call this.
    ///
    /// # Errors
    /// A rank is gone.
    pub fn finish(mut self) -> Result<()> {
        self.world.wait_for_all()?;
        // From here on dropping is no failure, and leaves MPI.
        drop(self.universe.take());
        Ok(())
    }
}

impl Drop for Launch {
    fn drop(&mut self) {
        if self.universe.is_some() {
            self.fail(EXIT_FAILURE, &"left before the end of the job");
        }
    }
}

impl fmt::Debug for Launch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Launch")
            .field("rank", &self.world.rank())
            .field("world_size", &self.world.world_size())
            .field("local_rank", &self.local_rank)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_mpi_without_threads_is_refused() {
        assert!(check_threading(Threading::Serialized).is_ok());
        assert!(check_threading(Threading::Multiple).is_ok());
        assert!(check_threading(Threading::Single).is_err());
        let message = check_threading(Threading::Funneled).unwrap_err().to_string();
        assert!(message.contains("no more than `funneled`"), "{message}");
    }
}
