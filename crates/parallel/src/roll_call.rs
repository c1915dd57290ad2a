//! The last collective of every rank of a node, readable by its neighbours.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::OFlags;

use crate::{Communicator, Result};

/// A file that the ranks of a node share: one entry a rank. Memory that MPI shares would end with
/// the state of MPI, which is what is in doubt when somebody asks.
///
/// It has no name any more once all have opened it, so a killed job leaves nothing behind.
#[derive(Debug)]
pub(crate) struct RollCall {
    file: File,
    rank: usize,
    world_size: usize,
}

/// Number of the collective from 1, then its name filled up with zeros.
const ENTRY: usize = 32;

impl RollCall {
    /// `None` where no file can be made: the job does without. Every rank must call this.
    pub(crate) fn open(world: &dyn Communicator) -> Result<Option<Self>> {
        let (rank, world_size) = (world.rank(), world.world_size());
        let mut name = file_name().into_bytes();
        world.broadcast_bytes(&mut name, 0)?;
        let path = folder().join(String::from_utf8_lossy(&name).as_ref());
        let file = open(&path);
        if let Err(error) = &file {
            tracing::warn!(path = %path.display(), %error, "stalled ranks will not be named");
        }
        world.barrier()?;
        // The first rank of the node removes it; the others find it gone.
        if let Err(error) = fs::remove_file(&path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %path.display(), %error, "cannot remove");
        }
        Ok(file.ok().map(|file| Self { file, rank, world_size }))
    }

    /// This rank enters a collective.
    pub(crate) fn enter(&self, number: u64, operation: &str) {
        let mut entry = [0; ENTRY];
        entry[..8].copy_from_slice(&number.to_le_bytes());
        for (place, byte) in entry[8..].iter_mut().zip(operation.bytes()) {
            *place = byte;
        }
        // A report that misses an entry is no reason to stop working.
        let _ = self.file.write_all_at(&entry, (self.rank * ENTRY) as u64);
    }

    /// `rank 0: 17 (barrier), ...` of the ranks on this node.
    pub(crate) fn report(&self) -> String {
        let entries = (0..self.world_size).filter_map(|rank| {
            let mut entry = [0; ENTRY];
            let read = self.file.read_at(&mut entry, (rank * ENTRY) as u64).ok()?;
            let number = u64::from_le_bytes(*entry.first_chunk()?);
            let name = String::from_utf8_lossy(&entry[8..]);
            let name = name.trim_end_matches('\0');
            (read == ENTRY && number > 0).then(|| format!("rank {rank}: {number} ({name})"))
        });
        entries.collect::<Vec<_>>().join(", ")
    }
}

fn file_name() -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    format!("dromedary-{}-{}", process::id(), since.as_nanos())
}

/// Memory, where the system has it as a folder: an entry is then written in less than a microsecond.
fn folder() -> PathBuf {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        // The folder is anybody's: a link with this name must not lead us elsewhere.
        .custom_flags(OFlags::NOFOLLOW.bits() as i32)
        .open(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{SingleProcess, threads};

    #[test]
    fn ranks_see_each_others_last_collective() {
        let ranks = threads(2).into_iter().map(|rank| {
            std::thread::spawn(move || {
                let roll_call = RollCall::open(&rank).unwrap().unwrap();
                roll_call.enter(7 + rank.rank() as u64, "barrier");
                rank.barrier().unwrap();
                roll_call.report()
            })
        });
        for report in ranks.collect::<Vec<_>>() {
            assert_eq!(report.join().unwrap(), "rank 0: 7 (barrier), rank 1: 8 (barrier)");
        }
    }

    #[test]
    fn a_rank_without_a_collective_is_not_named() {
        let roll_call = RollCall::open(&SingleProcess).unwrap().unwrap();
        assert_eq!(roll_call.report(), "");
    }
}
