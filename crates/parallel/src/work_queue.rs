//! A queue of rows that groups of ranks share.

use std::collections::VecDeque;
use std::ops::Range;
use std::thread;
use std::time::Duration;

use crate::{Communicator, Error, Message, ParallelDims, Result};

/// First word of what a group tells rank 0: it asks for as many rows as the second word says.
const ASK: u64 = 0;
/// It will not ask again, although it was not told that there are no more rows.
const LEAVE: u64 = 1;

/// Pause between two looks of a rank 0 that has nothing else to do.
const LOOK: Duration = Duration::from_millis(1);

/// Rows `0..rows`, each given to exactly one group of a job.
///
/// Rank 0 of the job keeps the count and answers the first ranks of the groups, one message each
/// way; a group's other ranks are told by their first one. Rank 0 answers while it works, whenever
/// it calls [`poll`](Self::poll): a group that asks waits for one step of rank 0 at most. It seldom
/// does, because it asks ahead: before what it has in hand runs out.
///
/// A counter that MPI keeps in rank 0's memory would need no answer, but over TCP it stands still
/// for as long as rank 0 computes.
///
/// Blocks become shorter towards the end, so that groups end together.
pub struct WorkQueue<'a> {
    world: &'a dyn Communicator,
    group: &'a dyn Communicator,
    role: Role,
}

enum Role {
    /// Rank 0 of the job.
    Server(Server),
    /// The first rank of another group.
    Leader(Leader),
    /// Any other rank.
    Member,
}

struct Server {
    left: Range<usize>,
    groups: usize,
    /// First ranks of the groups that do not know yet that there are no more rows.
    asking: Vec<usize>,
}

#[derive(Default)]
struct Leader {
    in_hand: VecDeque<Range<usize>>,
    /// An answer is on its way.
    asked: bool,
    drained: bool,
}

impl<'a> WorkQueue<'a> {
    /// Every rank of `world` must call this with the same number of rows and its own group, the
    /// one that [`ParallelDims::tp_group`] gives.
    ///
    /// # Errors
    /// A group whose size does not divide the number of ranks.
    pub fn new(
        world: &'a dyn Communicator,
        group: &'a dyn Communicator,
        rows: usize,
    ) -> Result<Self> {
        let dims = ParallelDims::new(world.world_size(), group.world_size())?;
        let role = match (world.rank(), dims.tp_rank(world.rank())) {
            (0, _) => {
                let asking = (1..dims.dp).map(|group| group * dims.tp).collect();
                Role::Server(Server { left: 0..rows, groups: dims.dp, asking })
            }
            (_, 0) => Role::Leader(Leader::default()),
            _ => Role::Member,
        };
        Ok(Self { world, group, role })
    }

    /// The next rows of this group, `most` of them at most; none where all have been given out.
    ///
    /// Every rank of the group must call this, and all get the same.
    ///
    /// # Errors
    /// A rank is gone.
    pub fn take(&mut self, most: usize) -> Result<Range<usize>> {
        let most = most.max(1);
        let rows = match &mut self.role {
            Role::Server(server) => {
                server.answer(self.world)?;
                server.cut(most)
            }
            Role::Leader(leader) => leader.take(self.world, most)?,
            Role::Member => 0..0,
        };
        if self.group.world_size() == 1 {
            return Ok(rows);
        }
        let mut message = [rows.start.to_le_bytes(), rows.end.to_le_bytes()].concat();
        self.group.broadcast_bytes(&mut message, 0)?;
        let (words, _) = message.as_chunks();
        match words {
            [start, end] => Ok(usize::from_le_bytes(*start)..usize::from_le_bytes(*end)),
            _ => Err(Error::Range { bytes: message.len() }),
        }
    }

    /// To be called once in each step of the work, by every rank: rank 0 answers those who have
    /// asked, the first ranks of the others see whether their answer is there. Does not wait.
    ///
    /// # Errors
    /// A rank is gone.
    pub fn poll(&mut self) -> Result<()> {
        match &mut self.role {
            Role::Server(server) => server.answer(self.world).map(drop),
            Role::Leader(leader) => leader.look(self.world),
            Role::Member => Ok(()),
        }
    }

    /// Gives out no more rows, where this rank is the one that does: the job is to stop, and groups
    /// that have not heard of it are to come to an end.
    pub fn close(&mut self) {
        if let Role::Server(server) = &mut self.role {
            server.left = 0..0;
        }
    }

    /// To be called by every rank when its group takes no more rows. Rank 0 goes on answering until
    /// every group knows that nothing is left; the others do not wait for anybody but rank 0.
    /// Rows that a group has asked for ahead and not taken are lost to this queue.
    ///
    /// # Errors
    /// A rank is gone.
    pub fn finish(self) -> Result<()> {
        match self.role {
            Role::Server(mut server) => server.answer_all(self.world),
            Role::Leader(leader) => leader.leave(self.world),
            Role::Member => Ok(()),
        }
    }
}

impl Server {
    /// Half of a fair share at most, so that no group is left with a long block at the end.
    fn cut(&mut self, most: usize) -> Range<usize> {
        let fair = if self.groups == 1 { most } else { self.left.len().div_ceil(2 * self.groups) };
        let end = self.left.start + fair.min(most).min(self.left.len());
        let rows = self.left.start..end;
        self.left.start = end;
        rows
    }

    /// Answers whoever has asked; says whether somebody had.
    fn answer(&mut self, world: &dyn Communicator) -> Result<bool> {
        let mut answered = false;
        for leader in self.asking.clone() {
            while self.asking.contains(&leader)
                && let Some(message) = world.try_receive(leader)?
            {
                self.answer_one(world, leader, message)?;
                answered = true;
            }
        }
        Ok(answered)
    }

    fn answer_one(
        &mut self,
        world: &dyn Communicator,
        leader: usize,
        [word, most]: Message,
    ) -> Result<()> {
        let mut told = word == LEAVE;
        if !told {
            let rows = self.cut(usize::try_from(most).unwrap_or(usize::MAX));
            told = rows.is_empty();
            world.send(leader, [rows.start as u64, rows.end as u64])?;
        }
        if told {
            self.asking.retain(|other| *other != leader);
        }
        Ok(())
    }

    fn answer_all(&mut self, world: &dyn Communicator) -> Result<()> {
        while !self.asking.is_empty() {
            if !self.answer(world)? {
                thread::sleep(LOOK);
            }
        }
        Ok(())
    }
}

impl Leader {
    fn ask(&mut self, world: &dyn Communicator, most: usize) -> Result<()> {
        world.send(0, [ASK, most as u64])?;
        self.asked = true;
        Ok(())
    }

    fn store(&mut self, [start, end]: Message) {
        self.asked = false;
        match start as usize..end as usize {
            rows if rows.is_empty() => self.drained = true,
            rows => self.in_hand.push_back(rows),
        }
    }

    fn look(&mut self, world: &dyn Communicator) -> Result<()> {
        if self.asked
            && let Some(message) = world.try_receive(0)?
        {
            self.store(message);
        }
        Ok(())
    }

    fn take(&mut self, world: &dyn Communicator, most: usize) -> Result<Range<usize>> {
        self.look(world)?;
        if self.in_hand.is_empty() && !self.drained {
            if !self.asked {
                self.ask(world, most)?;
            }
            self.store(world.receive(0)?);
        }
        let rows = self.cut(most);
        let left: usize = self.in_hand.iter().map(Range::len).sum();
        if left < most && !self.asked && !self.drained {
            self.ask(world, most)?;
        }
        Ok(rows)
    }

    fn cut(&mut self, most: usize) -> Range<usize> {
        let Some(block) = self.in_hand.front_mut() else { return 0..0 };
        let end = block.start + most.min(block.len());
        let rows = block.start..end;
        block.start = end;
        if block.start == block.end {
            self.in_hand.pop_front();
        }
        rows
    }

    fn leave(mut self, world: &dyn Communicator) -> Result<()> {
        if self.asked {
            // No message may be left behind for whoever receives from rank 0 next.
            self.store(world.receive(0)?);
        }
        if self.drained { Ok(()) } else { world.send(0, [LEAVE, 0]) }
    }
}

impl std::fmt::Debug for WorkQueue<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let role = match self.role {
            Role::Server(_) => "server",
            Role::Leader(_) => "leader",
            Role::Member => "member",
        };
        f.debug_struct("WorkQueue").field("role", &role).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_shrink_towards_the_end_and_leave_nothing() {
        let mut server = Server { left: 0..100, groups: 3, asking: Vec::new() };
        let blocks: Vec<usize> = std::iter::repeat_with(|| server.cut(8).len()).take(60).collect();
        assert_eq!(blocks[0], 8);
        assert_eq!(blocks.iter().sum::<usize>(), 100);
        assert!(blocks.is_sorted_by(|one, next| one >= next), "{blocks:?}");
        let last = blocks.iter().rposition(|block| *block > 0).unwrap();
        assert_eq!(blocks[last], 1);
    }

    #[test]
    fn a_closed_queue_is_empty() {
        let mut queue = WorkQueue::new(&crate::SingleProcess, &crate::SingleProcess, 10).unwrap();
        assert_eq!(queue.take(4).unwrap(), 0..4);
        queue.close();
        assert!(queue.take(4).unwrap().is_empty());
        queue.finish().unwrap();
    }

    #[test]
    fn a_group_alone_gets_what_it_asks_for() {
        let mut server = Server { left: 0..10, groups: 1, asking: Vec::new() };
        assert_eq!([server.cut(8), server.cut(8), server.cut(8)], [0..8, 8..10, 10..10]);
    }
}
