//! Ranks as threads of one process, for tests of what ranks do together.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use tch::Tensor;

use crate::communicator::{Message, check_peer, check_root};
use crate::{AbortHandle, Communicator, Error, Result, host};

/// `n` ranks of one job; each is moved to a thread of its own.
///
/// Where processes would hang, threads get an error: ranks that meet in different collectives or
/// with different shapes, and a rank that was dropped while others wait for it.
pub fn threads(n: usize) -> Vec<ThreadCommunicator> {
    let job = Arc::new(Job::default());
    job.state().groups.push(Group::default());
    (0..n)
        .map(|rank| ThreadCommunicator {
            job: Arc::clone(&job),
            group: 0,
            rank,
            world_size: n,
            round: Cell::new(0),
        })
        .collect()
}

/// One of the ranks that [`threads`] makes.
#[derive(Debug)]
pub struct ThreadCommunicator {
    job: Arc<Job>,
    group: usize,
    rank: usize,
    world_size: usize,
    /// Number of collectives of this group that this rank has entered.
    round: Cell<u64>,
}

/// One lock for all groups: a rank that aborts wakes whoever waits anywhere.
#[derive(Debug, Default)]
struct Job {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    groups: Vec<Group>,
    /// Group made by (parent, round of the split, color).
    children: BTreeMap<(usize, u64, usize), usize>,
    aborted: Option<String>,
}

#[derive(Debug, Default)]
struct Group {
    /// Collectives that some ranks have not entered yet.
    open: BTreeMap<u64, BTreeMap<usize, Deposit>>,
    /// Finished ones, with the number of ranks that have not looked yet.
    finished: BTreeMap<u64, (Arc<Vec<Deposit>>, usize)>,
    gone: BTreeSet<usize>,
    /// Messages that nobody has asked for yet, by receiver and sender.
    mail: BTreeMap<(usize, usize), VecDeque<Message>>,
}

/// What a rank brings to a collective.
#[derive(Debug)]
struct Deposit {
    call: String,
    bytes: Vec<u8>,
}

impl Job {
    fn state(&self) -> MutexGuard<'_, State> {
        // No code runs under the lock that could leave it half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Group {
    fn deposit(&mut self, round: u64, rank: usize, world_size: usize, deposit: Deposit) {
        let arrived = self.open.entry(round).or_default();
        arrived.insert(rank, deposit);
        if arrived.len() == world_size
            && let Some(all) = self.open.remove(&round)
        {
            let all = Arc::new(all.into_values().collect());
            self.finished.insert(round, (all, world_size));
        }
    }

    fn take(&mut self, round: u64) -> Option<Arc<Vec<Deposit>>> {
        let (all, readers) = self.finished.get_mut(&round)?;
        let all = Arc::clone(all);
        *readers -= 1;
        if *readers == 0 {
            self.finished.remove(&round);
        }
        Some(all)
    }

    /// A rank that has left before it came to this round.
    fn missing(&self, round: u64) -> Option<usize> {
        let arrived = self.open.get(&round)?;
        self.gone.iter().copied().find(|rank| !arrived.contains_key(rank))
    }
}

impl ThreadCommunicator {
    /// Brings bytes, waits for all ranks, and returns what they brought, in rank order.
    fn exchange(&self, call: String, bytes: Vec<u8>) -> Result<Arc<Vec<Deposit>>> {
        let round = self.round.replace(self.round.get() + 1);
        let mut state = self.job.state();
        if let Some(message) = &state.aborted {
            return Err(Error::Aborted { message: message.clone() });
        }
        let deposit = Deposit { call: call.clone(), bytes };
        state.groups[self.group].deposit(round, self.rank, self.world_size, deposit);
        self.job.changed.notify_all();
        let all = loop {
            if let Some(all) = state.groups[self.group].take(round) {
                break all;
            }
            if let Some(message) = &state.aborted {
                return Err(Error::Aborted { message: message.clone() });
            }
            if let Some(rank) = state.groups[self.group].missing(round) {
                return Err(Error::RankGone { operation: call, rank });
            }
            state = self.job.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        };
        drop(state);
        self.check_match(call, &all)?;
        Ok(all)
    }

    fn check_match(&self, here: String, all: &[Deposit]) -> Result<()> {
        match all.iter().position(|deposit| deposit.call != here) {
            None => Ok(()),
            Some(rank) => Err(Error::Mismatch {
                here_rank: self.rank,
                here,
                rank,
                there: all[rank].call.clone(),
            }),
        }
    }

    /// Each rank combines all tensors in rank order, so that all get the same bits.
    fn all_reduce(
        &self,
        operation: &'static str,
        tensor: &mut Tensor,
        combine: impl Fn(&Tensor, &Tensor) -> std::result::Result<Tensor, tch::TchError>,
    ) -> Result<()> {
        let call = host::describe(operation, tensor)?;
        host::reduce(operation, tensor, |host| {
            let all = self.exchange(call, bytes_of(operation, host)?)?;
            let (size, kind) = (host.size(), host.kind());
            let combined = tch::no_grad(|| {
                let mut parts =
                    all.iter().map(|part| Tensor::f_from_data_size(&part.bytes, &size, kind));
                let first = parts.next().unwrap_or_else(|| Ok(host.shallow_clone()))?;
                parts.try_fold(first, |sum, part| combine(&sum, &part?))
            });
            tch::no_grad(|| host.f_copy_(&combined?)).map_err(Error::torch(operation))
        })
    }
}

fn bytes_of(operation: &'static str, host: &Tensor) -> Result<Vec<u8>> {
    let mut bytes = vec![0; host.numel() * host.kind().elt_size_in_bytes()];
    host.f_copy_data_u8(&mut bytes, host.numel()).map_err(Error::torch(operation))?;
    Ok(bytes)
}

fn words(numbers: &[usize]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

fn read_words(bytes: &[u8]) -> Vec<usize> {
    let (words, _) = bytes.as_chunks();
    words.iter().map(|word| usize::from_le_bytes(*word)).collect()
}

impl Communicator for ThreadCommunicator {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.world_size
    }

    fn all_reduce_sum(&self, tensor: &mut Tensor) -> Result<()> {
        self.all_reduce("all_reduce_sum", tensor, Tensor::f_add)
    }

    fn all_reduce_max(&self, tensor: &mut Tensor) -> Result<()> {
        self.all_reduce("all_reduce_max", tensor, Tensor::f_maximum)
    }

    fn broadcast(&self, tensor: &mut Tensor, root: usize) -> Result<()> {
        const OPERATION: &str = "broadcast";
        check_root(OPERATION, root, self.world_size)?;
        let call = format!("{} from {root}", host::describe(OPERATION, tensor)?);
        host::update(OPERATION, tensor, |host| {
            let own = if self.rank == root { bytes_of(OPERATION, host)? } else { Vec::new() };
            let all = self.exchange(call, own)?;
            let sent = Tensor::f_from_data_size(&all[root].bytes, &host.size(), host.kind());
            tch::no_grad(|| host.f_copy_(&sent?)).map_err(Error::torch(OPERATION))
        })
    }

    fn all_gather(&self, tensor: &Tensor) -> Result<Tensor> {
        const OPERATION: &str = "all_gather";
        host::gathered(OPERATION, tensor, |rows| {
            let call = host::describe_rows(OPERATION, rows)?;
            let (count, data) = (rows.size()[0] as usize, bytes_of(OPERATION, rows)?);
            let all = self.exchange(call, [words(&[count]), data].concat())?;
            let parts = all.iter().map(|part| part.bytes.split_at(size_of::<usize>()));
            let counts = parts.clone().flat_map(|(count, _)| read_words(count));
            let bytes = parts.map(|(_, data)| data).collect::<Vec<_>>().concat();
            let mut size = rows.size();
            size[0] = counts.sum::<usize>() as i64;
            Tensor::f_from_data_size(&bytes, &size, rows.kind()).map_err(Error::torch(OPERATION))
        })
    }

    fn broadcast_bytes(&self, bytes: &mut Vec<u8>, root: usize) -> Result<()> {
        check_root("broadcast_bytes", root, self.world_size)?;
        let own = if self.rank == root { bytes.clone() } else { Vec::new() };
        let all = self.exchange(format!("broadcast_bytes from {root}"), own)?;
        bytes.clone_from(&all[root].bytes);
        Ok(())
    }

    fn all_gather_bytes(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        let all = self.exchange("all_gather_bytes".to_owned(), bytes.to_vec())?;
        Ok(all.iter().map(|part| part.bytes.clone()).collect())
    }

    fn barrier(&self) -> Result<()> {
        self.exchange("barrier".to_owned(), Vec::new()).map(drop)
    }

    fn wait_for_all(&self) -> Result<()> {
        self.exchange("wait_for_all".to_owned(), Vec::new()).map(drop)
    }

    fn send(&self, to: usize, message: Message) -> Result<()> {
        check_peer("send", self.rank, to, self.world_size)?;
        let group = &mut self.job.state().groups[self.group];
        group.mail.entry((to, self.rank)).or_default().push_back(message);
        Ok(())
    }

    fn try_receive(&self, from: usize) -> Result<Option<Message>> {
        const OPERATION: &str = "receive";
        check_peer(OPERATION, self.rank, from, self.world_size)?;
        let mut state = self.job.state();
        if let Some(message) = &state.aborted {
            return Err(Error::Aborted { message: message.clone() });
        }
        let group = &mut state.groups[self.group];
        let message = group.mail.get_mut(&(self.rank, from)).and_then(VecDeque::pop_front);
        if message.is_none() && group.gone.contains(&from) {
            return Err(Error::RankGone { operation: OPERATION.to_owned(), rank: from });
        }
        Ok(message)
    }

    fn split(&self, color: usize, key: usize) -> Result<Box<dyn Communicator>> {
        let round = self.round.get();
        let all = self.exchange("split".to_owned(), words(&[color, key]))?;
        let mut members: Vec<(usize, usize)> = all
            .iter()
            .enumerate()
            .map(|(rank, part)| (read_words(&part.bytes), rank))
            .filter(|(words, _)| words.first() == Some(&color))
            .map(|(words, rank)| (words[1], rank))
            .collect();
        members.sort_unstable();
        let rank = members.iter().position(|(_, rank)| *rank == self.rank).unwrap_or_default();
        let group = self.child_group(round, color);
        let (job, world_size) = (Arc::clone(&self.job), members.len());
        Ok(Box::new(Self { job, group, rank, world_size, round: Cell::new(0) }))
    }

    fn abort_handle(&self) -> AbortHandle {
        let (job, group, rank) = (Arc::clone(&self.job), self.group, self.rank);
        AbortHandle::new(move |_, message| {
            let mut state = job.state();
            let place = if group == 0 { String::new() } else { format!(" of group {group}") };
            state.aborted.get_or_insert_with(|| format!("rank {rank}{place}: {message}"));
            job.changed.notify_all();
        })
    }
}

impl ThreadCommunicator {
    fn child_group(&self, round: u64, color: usize) -> usize {
        let mut state = self.job.state();
        let next = state.groups.len();
        let group = *state.children.entry((self.group, round, color)).or_insert(next);
        if group == next {
            state.groups.push(Group::default());
        }
        group
    }
}

impl Drop for ThreadCommunicator {
    fn drop(&mut self) {
        self.job.state().groups[self.group].gone.insert(self.rank);
        self.job.changed.notify_all();
    }
}
