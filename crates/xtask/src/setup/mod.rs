//! `cargo xtask setup`: what the system lacks, and a libtorch that plain cargo finds.

pub mod libtorch;
pub mod system;

use anyhow::Result;

use crate::{cache::Cache, packages::Registries, workspace::Workspace};

/// Makes the machine and the checkout ready; does nothing where they are.
pub(crate) fn run(workspace: &Workspace, cache: &Cache, yes: bool) -> Result<()> {
    system::provide(yes)?;
    libtorch::provide(workspace, cache, &Registries)
}
