//! The grid of processes.

use crate::{Communicator, Error, Result};

/// How the ranks of a job are laid out: `dp` groups of `tp` ranks each. The tensor-parallel axis
/// is the fastest: the ranks of a group are neighbours, so that they share a node where they can.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParallelDims {
    /// Number of replicas of the model.
    pub dp: usize,
    /// Ranks that hold one replica together.
    pub tp: usize,
}

impl ParallelDims {
    /// Lays out `world_size` ranks in groups of `tp`.
    ///
    /// # Errors
    /// `tp` is 0 or does not divide `world_size`.
    pub fn new(world_size: usize, tp: usize) -> Result<Self> {
        if tp == 0 || world_size == 0 || !world_size.is_multiple_of(tp) {
            return Err(Error::ParallelDims { tp, world_size });
        }
        Ok(Self { dp: world_size / tp, tp })
    }

    /// Number of ranks.
    pub fn world_size(&self) -> usize {
        self.dp * self.tp
    }

    /// Number of `rank` within its tensor-parallel group.
    pub fn tp_rank(&self, rank: usize) -> usize {
        rank % self.tp
    }

    /// Number of the replica that `rank` belongs to.
    pub fn dp_rank(&self, rank: usize) -> usize {
        rank / self.tp
    }

    /// The ranks that hold this rank's replica with it. Every rank of `world` must call this.
    ///
    /// # Errors
    /// `world` has another number of ranks, or a rank is gone.
    pub fn tp_group(&self, world: &dyn Communicator) -> Result<Box<dyn Communicator>> {
        self.check(world)?;
        world.split(self.dp_rank(world.rank()), self.tp_rank(world.rank()))
    }

    /// The ranks that hold the same share of the other replicas. Every rank of `world` must call
    /// this.
    ///
    /// # Errors
    /// `world` has another number of ranks, or a rank is gone.
    pub fn dp_group(&self, world: &dyn Communicator) -> Result<Box<dyn Communicator>> {
        self.check(world)?;
        world.split(self.tp_rank(world.rank()), self.dp_rank(world.rank()))
    }

    fn check(&self, world: &dyn Communicator) -> Result<()> {
        if world.world_size() == self.world_size() {
            return Ok(());
        }
        Err(Error::ParallelDims { tp: self.tp, world_size: world.world_size() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensor_parallel_ranks_are_neighbours() {
        let dims = ParallelDims::new(6, 3).unwrap();
        assert_eq!((dims.dp, dims.tp, dims.world_size()), (2, 3, 6));
        let grid: Vec<_> = (0..6).map(|rank| (dims.dp_rank(rank), dims.tp_rank(rank))).collect();
        assert_eq!(grid, [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]);
    }

    #[test]
    fn a_size_that_does_not_divide_names_both_numbers() {
        let message = ParallelDims::new(6, 4).unwrap_err().to_string();
        assert_eq!(message, "tp = 4 does not divide the 6 ranks");
        assert!(ParallelDims::new(6, 0).is_err());
        assert!(ParallelDims::new(2, 4).is_err());
    }
}
