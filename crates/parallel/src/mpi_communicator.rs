//! Ranks as processes that MPI connects.

use std::process;
use std::thread;
use std::time::Duration;

use tch::{Device, Tensor};

use crate::communicator::{Message, check_peer, check_root};
use crate::mpi_buffers::{self, Group, Reduction};
use crate::stderr::say;
use crate::{AbortHandle, Communicator, Error, NcclLibraries, Result, host, nccl};

/// A group of MPI processes; [`launch`](crate::launch) makes the one of all ranks.
///
/// Ranks that do not match in [`all_gather`](Communicator::all_gather) and in collectives on bytes
/// get an error; in the others they get MPI's error or wait for each other, until the deadline of
/// [`Guarded`](crate::Guarded) ends the job.
#[derive(Debug)]
pub struct Mpi {
    group: Group,
    rank: usize,
    world_size: usize,
}

/// MPI looks at the network only while somebody asks, and answers from what it saw the time before:
/// a message that has arrived over TCP is found by the second or third look.
const LOOKS: usize = 8;

/// How ranks that gather rows tell each other what they bring: their number of rows, then the
/// description of a row, filled up with spaces.
const HEADER: usize = 64;

impl Mpi {
    /// All ranks of a job whose MPI is up.
    pub(crate) fn world() -> Result<Self> {
        Self::of(Group::world())
    }

    fn of(group: Group) -> Result<Self> {
        Ok(Self { group, rank: group.rank()?, world_size: group.size()? })
    }

    fn all_reduce(
        &self,
        operation: &'static str,
        tensor: &mut Tensor,
        reduction: Reduction,
    ) -> Result<()> {
        host::reduce(operation, tensor, |host| self.group.all_reduce(operation, host, reduction))
    }

    /// What every rank calls and how many items it brings.
    fn meet(&self, operation: &'static str, call: &str, count: usize) -> Result<Vec<usize>> {
        let mut header = [b' '; HEADER];
        header[..8].copy_from_slice(&(count as u64).to_le_bytes());
        for (place, byte) in header[8..].iter_mut().zip(call.bytes()) {
            *place = byte;
        }
        let all = self.group.all_gather(operation, &header, self.world_size)?;
        if let Some(rank) = all.iter().position(|other| other[8..] != header[8..]) {
            return Err(Error::Mismatch {
                here_rank: self.rank,
                here: call.to_owned(),
                rank,
                there: String::from_utf8_lossy(&all[rank][8..]).trim_end().to_owned(),
            });
        }
        Ok(all
            .iter()
            .filter_map(|other| other.first_chunk())
            .map(|count| u64::from_le_bytes(*count) as usize)
            .collect())
    }
}

impl Communicator for Mpi {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.world_size
    }

    fn all_reduce_sum(&self, tensor: &mut Tensor) -> Result<()> {
        self.all_reduce("all_reduce_sum", tensor, Reduction::Sum)
    }

    fn all_reduce_max(&self, tensor: &mut Tensor) -> Result<()> {
        self.all_reduce("all_reduce_max", tensor, Reduction::Max)
    }

    fn broadcast(&self, tensor: &mut Tensor, root: usize) -> Result<()> {
        const OPERATION: &str = "broadcast";
        check_root(OPERATION, root, self.world_size)?;
        host::update(OPERATION, tensor, |host| {
            self.group.broadcast(OPERATION, mpi_buffers::bytes_mut(host), root)
        })
    }

    fn all_gather(&self, tensor: &Tensor) -> Result<Tensor> {
        const OPERATION: &str = "all_gather";
        host::gathered(OPERATION, tensor, |rows| {
            let mut size = rows.size();
            let call = host::describe_rows(OPERATION, rows)?;
            let counts = self.meet(OPERATION, &call, size[0] as usize)?;
            let row_bytes = host::row_bytes(rows);
            let lengths: Vec<usize> = counts.iter().map(|count| count * row_bytes).collect();
            size[0] = counts.iter().sum::<usize>() as i64;
            let mut all = Tensor::f_zeros(&size[..], (rows.kind(), rows.device()))
                .map_err(Error::torch(OPERATION))?;
            let (own, place) = (mpi_buffers::bytes(rows), mpi_buffers::bytes_mut(&mut all));
            self.group.all_gather_varying(OPERATION, own, &lengths, place)?;
            Ok(all)
        })
    }

    fn broadcast_bytes(&self, bytes: &mut Vec<u8>, root: usize) -> Result<()> {
        const OPERATION: &str = "broadcast_bytes";
        check_root(OPERATION, root, self.world_size)?;
        let mut length = (bytes.len() as u64).to_le_bytes();
        self.group.broadcast(OPERATION, &mut length, root)?;
        bytes.resize(u64::from_le_bytes(length) as usize, 0);
        self.group.broadcast(OPERATION, bytes, root)
    }

    fn all_gather_bytes(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        const OPERATION: &str = "all_gather_bytes";
        let lengths = self.meet(OPERATION, OPERATION, bytes.len())?;
        let mut all = vec![0; lengths.iter().sum()];
        self.group.all_gather_varying(OPERATION, bytes, &lengths, &mut all)?;
        let mut rest = all.as_slice();
        let mut next = |length: &usize| {
            let (part, tail) = rest.split_at(*length);
            rest = tail;
            part.to_vec()
        };
        Ok(lengths.iter().map(&mut next).collect())
    }

    fn barrier(&self) -> Result<()> {
        self.group.barrier()
    }

    fn wait_for_all(&self) -> Result<()> {
        self.group.patient_barrier()
    }

    fn send(&self, to: usize, message: Message) -> Result<()> {
        check_peer("send", self.rank, to, self.world_size)?;
        self.group.send("send", to, message)
    }

    fn try_receive(&self, from: usize) -> Result<Option<Message>> {
        const OPERATION: &str = "receive";
        check_peer(OPERATION, self.rank, from, self.world_size)?;
        for _ in 0..LOOKS {
            if self.group.has_message(OPERATION, from)? {
                return self.group.receive(OPERATION, from).map(Some);
            }
        }
        Ok(None)
    }

    fn split(&self, color: usize, key: usize) -> Result<Box<dyn Communicator>> {
        let number = |value| i32::try_from(value).map_err(|_| Error::SplitNumber { value });

        let group = self.group.split(number(color)?, number(key)?)?;
        Ok(Box::new(Self::of(group)?))
    }

    fn for_device(&self, device: Device) -> Result<Box<dyn Communicator>> {
        nccl::or_host(self.split(0, self.rank)?, device, &NcclLibraries::default())
    }

    fn abort_handle(&self) -> AbortHandle {
        // Ranks are named as the user started them, not by their number in a group.
        let rank = Group::world().rank().unwrap_or(self.rank);
        AbortHandle::new(move |code, message| end_job(rank, code, message))
    }
}

/// Prints the reason and ends all ranks; does not return.
pub(crate) fn end_job(rank: usize, code: i32, message: &str) -> ! {
    say(&format!("rank {rank}: {message}; ending all ranks"));
    // MPI_Abort from one thread may wait for a lock that another one holds in a collective.
    // Where it does, the launcher sees this process die, and ends the others.
    thread::spawn(|| {
        thread::sleep(Duration::from_secs(5));
        process::abort();
    });
    mpi_buffers::abort(code);
    process::exit(code)
}
