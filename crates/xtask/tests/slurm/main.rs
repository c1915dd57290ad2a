//! The scripts of `slurm/`, submitted to a real Slurm of two nodes that is brought up for each test
//! and taken down behind it: `cargo xtask test --slurm`.

#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

/// A Slurm of two nodes on this machine.
mod cluster;
/// What ends a cluster, whatever ends the tests.
mod guardian;
/// Jobs that are left alone.
mod jobs;
/// Jobs that are stopped, cancelled, and whose node dies.
mod losses;
/// Processes by what they hold open.
mod processes;
/// The README's lines for a newcomer.
mod readme;
/// Jobs of step 3.
mod training;
/// What jobs of step 2 read and write.
mod work;
