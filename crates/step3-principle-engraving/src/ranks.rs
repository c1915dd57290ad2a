//! The ranks of a run: replicas of the model, each of which a tensor-parallel group holds together.

use std::{fmt, rc::Rc};

use dromedary_parallel::{Communicator, ParallelDims, SingleProcess};
use tch::Tensor;

use crate::error::Result;

/// This process among the `dp x tp` ranks of a run; clones share the groups.
#[derive(Clone)]
pub struct Ranks<'a> {
    world: &'a dyn Communicator,
    dims: ParallelDims,
    /// Where neither group is all ranks.
    groups: Option<[Rc<dyn Communicator>; 2]>,
}

impl Ranks<'static> {
    /// One process alone.
    pub fn single() -> Self {
        Self { world: &SingleProcess, dims: ParallelDims { dp: 1, tp: 1 }, groups: None }
    }
}

impl<'a> Ranks<'a> {
    /// Lays the ranks of `world` out in groups of `tp`. Every rank of `world` must call this.
    ///
    /// # Errors
    /// `tp` is 0 or does not divide the number of ranks, or a rank is gone.
    pub fn new(world: &'a dyn Communicator, tp: usize) -> Result<Self> {
        let dims = ParallelDims::new(world.world_size(), tp)?;
        let groups = match dims {
            ParallelDims { dp: 1, .. } | ParallelDims { tp: 1, .. } => None,
            _ => Some([Rc::from(dims.tp_group(world)?), Rc::from(dims.dp_group(world)?)]),
        };
        Ok(Self { world, dims, groups })
    }

    /// All ranks.
    pub fn world(&self) -> &dyn Communicator {
        self.world
    }

    /// How they are laid out.
    pub fn dims(&self) -> ParallelDims {
        self.dims
    }

    /// The ranks that hold this rank's replica of the model with it.
    pub fn tp(&self) -> &dyn Communicator {
        match &self.groups {
            Some([tp, _]) => tp.as_ref(),
            None if self.dims.dp == 1 => self.world,
            None => &SingleProcess,
        }
    }

    /// The ranks that hold the same share of the other replicas.
    pub fn dp(&self) -> &dyn Communicator {
        match &self.groups {
            Some([_, dp]) => dp.as_ref(),
            None if self.dims.tp == 1 => self.world,
            None => &SingleProcess,
        }
    }

    /// Whether this rank writes what is written once.
    pub fn is_first(&self) -> bool {
        self.world.rank() == 0
    }

    /// Whether this rank is of the first replica.
    pub fn is_of_first_replica(&self) -> bool {
        self.dims.dp_rank(self.world.rank()) == 0
    }

    /// Whether the flag of any rank is set. Every rank must call this; all get the same.
    ///
    /// # Errors
    /// If a rank is gone.
    pub fn any(&self, flag: bool) -> Result<bool> {
        if self.world.world_size() == 1 {
            return Ok(flag);
        }
        let mut flags = Tensor::from_slice(&[i64::from(flag)]);
        self.world.all_reduce_max(&mut flags)?;
        Ok(flags.f_int64_value(&[0])? > 0)
    }
}

impl fmt::Debug for Ranks<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rank = self.world.rank();
        f.debug_struct("Ranks").field("rank", &rank).field("dims", &self.dims).finish()
    }
}
