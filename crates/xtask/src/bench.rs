//! `cargo xtask bench NAME`.

use std::ffi::OsString;

use anyhow::Result;

use crate::{
    cache::Cache,
    models,
    packages::Registries,
    setup,
    terminal::{self, say},
    workspace::Workspace,
};

/// Builds the benches and runs the one of that name; further arguments go to it.
pub(crate) fn run(
    workspace: &Workspace,
    cache: &Cache,
    name: &str,
    arguments: &[OsString],
) -> Result<()> {
    setup::run(workspace, cache, setup::Purpose::Build, false)?;
    let model = models::smollm2(workspace, cache, &Registries)?;
    // The whole workspace, not the one package: features would be resolved differently, and tch
    // and others built a second time.
    terminal::run(&mut workspace.cargo(["build", "--release", "--workspace"]))?;
    let mut bench = workspace.command(workspace.programs()?.join("dromedary-benches"));
    bench.arg(name).args(arguments).current_dir(workspace.root());
    bench.env("DROMEDARY_SMOLLM2", &model);
    say!("");
    terminal::run(&mut bench)
}
