//! `cargo xtask setup`: what the system lacks, and a libtorch that plain cargo finds.

pub mod libtorch;
pub mod system;

use anyhow::Result;

use crate::{cache::Cache, packages::Registries, workspace::Workspace};

/// What a machine is made ready for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// To build the programs and run them.
    Build,
    /// To run their tests as well.
    Tests,
    /// To run those tests too that bring up a Slurm.
    Slurm,
}

impl Purpose {
    /// Tests, with those that bring up a Slurm or without.
    pub(crate) fn of_tests(slurm: bool) -> Self {
        if slurm { Self::Slurm } else { Self::Tests }
    }
}

/// Makes the machine and the checkout ready; does nothing where they are.
pub(crate) fn run(workspace: &Workspace, cache: &Cache, purpose: Purpose, yes: bool) -> Result<()> {
    system::provide(purpose, yes)?;
    libtorch::provide(workspace, cache, &Registries)
}
