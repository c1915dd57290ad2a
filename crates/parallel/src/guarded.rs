//! A deadline and a number for every collective.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use tch::{Device, Tensor};

use crate::communicator::Message;
use crate::roll_call::RollCall;
use crate::stderr::say;
use crate::{AbortHandle, Communicator, Error, Result};

/// Exit code of a job that its watchdog ended.
pub(crate) const EXIT_DEADLINE: i32 = 124;

/// Time that other ranks get to say where they wait before the first one ends the job.
const GRACE: Duration = Duration::from_secs(1);

/// A communicator whose collectives are numbered and end within a limit: where one does not, each
/// waiting rank prints its number and the last ones of the ranks on its node, and the job ends.
///
/// Groups that are split off share the limit and the numbers. Time in which this process itself is
/// stopped does not count.
pub struct Guarded {
    watchdog: Arc<Watchdog>,
    inner: Box<dyn Communicator>,
}

impl Guarded {
    /// Watches all collectives of `inner`. Every rank must call this.
    ///
    /// # Errors
    /// No thread could be started, or a rank is gone.
    pub fn new(inner: Box<dyn Communicator>, limit: Duration) -> Result<Self> {
        let roll_call = RollCall::open(inner.as_ref())?;
        let name = format!("rank {}", inner.rank());
        let watchdog = Watchdog::start(name, limit, roll_call, inner.abort_handle())
            .map_err(|source| Error::Watchdog { source })?;
        Ok(Self { watchdog: Arc::new(watchdog), inner })
    }

    fn watched<T>(
        &self,
        operation: &'static str,
        collective: impl FnOnce(&dyn Communicator) -> Result<T>,
    ) -> Result<T> {
        self.watchdog.arm(operation);
        let begin = Instant::now();
        let result = collective(self.inner.as_ref());
        self.watchdog.disarm(begin.elapsed());
        result
    }
}

impl fmt::Debug for Guarded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guarded")
            .field("rank", &self.rank())
            .field("world_size", &self.world_size())
            .finish_non_exhaustive()
    }
}

impl Communicator for Guarded {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn world_size(&self) -> usize {
        self.inner.world_size()
    }

    fn all_reduce_sum(&self, tensor: &mut Tensor) -> Result<()> {
        self.watched("all_reduce_sum", |inner| inner.all_reduce_sum(tensor))
    }

    fn all_reduce_max(&self, tensor: &mut Tensor) -> Result<()> {
        self.watched("all_reduce_max", |inner| inner.all_reduce_max(tensor))
    }

    fn broadcast(&self, tensor: &mut Tensor, root: usize) -> Result<()> {
        self.watched("broadcast", |inner| inner.broadcast(tensor, root))
    }

    fn all_gather(&self, tensor: &Tensor) -> Result<Tensor> {
        self.watched("all_gather", |inner| inner.all_gather(tensor))
    }

    fn broadcast_bytes(&self, bytes: &mut Vec<u8>, root: usize) -> Result<()> {
        self.watched("broadcast_bytes", |inner| inner.broadcast_bytes(bytes, root))
    }

    fn all_gather_bytes(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.watched("all_gather_bytes", |inner| inner.all_gather_bytes(bytes))
    }

    fn barrier(&self) -> Result<()> {
        self.watched("barrier", |inner| inner.barrier())
    }

    /// Not watched: groups end when they have no more work, hours after each other perhaps.
    fn wait_for_all(&self) -> Result<()> {
        self.inner.wait_for_all()
    }

    fn send(&self, to: usize, message: Message) -> Result<()> {
        self.inner.send(to, message)
    }

    fn try_receive(&self, from: usize) -> Result<Option<Message>> {
        self.inner.try_receive(from)
    }

    fn receive(&self, from: usize) -> Result<Message> {
        self.watched("receive", |inner| inner.receive(from))
    }

    fn collective_seconds(&self) -> f64 {
        Duration::from_nanos(self.watchdog.shared.nanoseconds.load(Ordering::Relaxed)).as_secs_f64()
    }

    fn split(&self, color: usize, key: usize) -> Result<Box<dyn Communicator>> {
        let inner = self.watched("split", |inner| inner.split(color, key))?;
        Ok(Box::new(Guarded { watchdog: Arc::clone(&self.watchdog), inner }))
    }

    fn for_device(&self, device: Device) -> Result<Box<dyn Communicator>> {
        let inner = self.watched("for_device", |inner| inner.for_device(device))?;
        Ok(Box::new(Guarded { watchdog: Arc::clone(&self.watchdog), inner }))
    }

    fn abort_handle(&self) -> AbortHandle {
        self.inner.abort_handle()
    }
}

/// A thread that looks now and then whether its rank is still in the same collective.
#[derive(Debug)]
struct Watchdog {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    name: String,
    limit: Duration,
    roll_call: Option<RollCall>,
    state: Mutex<State>,
    closed: Condvar,
    /// Time in collectives so far.
    nanoseconds: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    /// Collectives entered so far.
    number: u64,
    /// Name of the one this rank is in.
    inside: Option<&'static str>,
    closed: bool,
}

impl Watchdog {
    fn start(
        name: String,
        limit: Duration,
        roll_call: Option<RollCall>,
        end: AbortHandle,
    ) -> io::Result<Self> {
        let (state, closed) = (Mutex::default(), Condvar::new());
        let nanoseconds = AtomicU64::default();
        let shared = Arc::new(Shared { name, limit, roll_call, state, closed, nanoseconds });
        let watched = Arc::clone(&shared);
        thread::Builder::new()
            .name("watchdog".to_owned())
            .spawn(move || watched.watch(&end))
            .map(|_| Self { shared })
    }

    fn arm(&self, operation: &'static str) {
        let mut state = self.shared.state();
        state.number += 1;
        state.inside = Some(operation);
        let number = state.number;
        drop(state);
        if let Some(roll_call) = &self.shared.roll_call {
            roll_call.enter(number, operation);
        }
    }

    fn disarm(&self, passed: Duration) {
        self.shared.state().inside = None;
        let passed = u64::try_from(passed.as_nanos()).unwrap_or(u64::MAX);
        self.shared.nanoseconds.fetch_add(passed, Ordering::Relaxed);
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.shared.state().closed = true;
        self.shared.closed.notify_all();
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn watch(&self, end: &AbortHandle) {
        let tick = (self.limit / 8).clamp(Duration::from_millis(1), Duration::from_secs(1));
        let (mut seen, mut waited) = (0, Duration::ZERO);
        loop {
            let before = Instant::now();
            let Some((number, operation)) = self.look(tick) else { return };
            // A tick that took longer than it should is time in which the process was stopped.
            let passed = before.elapsed().min(tick * 2);
            let still = operation.is_some() && number == seen;
            waited = if still { waited + passed } else { Duration::ZERO };
            seen = number;
            if let Some(operation) = operation
                && waited >= self.limit
                && self.is_stuck(number, operation)
            {
                let seconds = self.limit.as_secs_f64();
                let what = format!("no answer in collective {number} ({operation})");
                end.abort(EXIT_DEADLINE, &format!("{what} for {seconds} s"));
                return;
            }
        }
    }

    /// After one tick: the number of the last collective, and its name while this rank is in it.
    fn look(&self, tick: Duration) -> Option<(u64, Option<&'static str>)> {
        let (state, _) = self
            .closed
            .wait_timeout_while(self.state(), tick, |state| !state.closed)
            .unwrap_or_else(PoisonError::into_inner);
        (!state.closed).then_some((state.number, state.inside))
    }

    /// Says where this rank waits, and whether it still does after the others had time to say so.
    fn is_stuck(&self, number: u64, operation: &str) -> bool {
        let others = self.roll_call.as_ref().map(RollCall::report).unwrap_or_default();
        say(&format!(
            "{}: no answer in collective {number} ({operation}); last collective by rank: {others}",
            self.name
        ));
        thread::sleep(GRACE);
        let state = self.state();
        state.number == number && state.inside.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::threads;

    fn guarded(n: usize, limit: Duration) -> Vec<thread::JoinHandle<Guarded>> {
        let guard = |rank| thread::spawn(move || Guarded::new(Box::new(rank), limit).unwrap());
        threads(n).into_iter().map(guard).collect()
    }

    #[test]
    fn a_rank_that_never_comes_ends_the_job() {
        let limit = Duration::from_millis(100);
        let [first, _absent]: [_; 2] = guarded(2, limit)
            .into_iter()
            .map(|rank| rank.join().unwrap())
            .collect::<Vec<_>>()
            .try_into()
            .unwrap();
        let message = first.barrier().unwrap_err().to_string();
        assert!(message.contains("no answer in collective 1 (barrier) for 0.1 s"), "{message}");
    }

    #[test]
    fn work_between_collectives_takes_as_long_as_it_takes() {
        let limit = Duration::from_millis(20);
        let ranks = guarded(2, limit).into_iter().map(|rank| {
            thread::spawn(move || {
                let rank = rank.join().unwrap();
                rank.barrier().unwrap();
                thread::sleep(limit * 10);
                rank.barrier()
            })
        });
        for rank in ranks.collect::<Vec<_>>() {
            assert!(rank.join().unwrap().is_ok());
        }
    }

    #[test]
    fn a_late_rank_within_the_grace_ends_nothing() {
        let limit = Duration::from_millis(100);
        let ranks = guarded(2, limit).into_iter().map(|rank| {
            thread::spawn(move || {
                let rank = rank.join().unwrap();
                if rank.rank() == 1 {
                    thread::sleep(limit * 3);
                }
                rank.barrier()
            })
        });
        for rank in ranks.collect::<Vec<_>>() {
            assert!(rank.join().unwrap().is_ok());
        }
    }

    #[test]
    fn groups_share_the_numbers() {
        let ranks = guarded(2, Duration::from_secs(60)).into_iter().map(|rank| {
            thread::spawn(move || {
                let rank = rank.join().unwrap();
                let group = rank.split(0, 0).unwrap();
                group.barrier().unwrap();
                rank.barrier().unwrap();
                rank.watchdog.shared.state().number
            })
        });
        for rank in ranks.collect::<Vec<_>>() {
            assert_eq!(rank.join().unwrap(), 3);
        }
    }
}
