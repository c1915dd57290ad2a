//! `cargo xtask setup | demo | test | parity | bench`: the project's own chores.
//!
//! # Brief overview
//!
//! Depends on no crate of ours and on nothing heavy, so that it builds in seconds on a machine
//! that has neither MPI nor libtorch yet, and runs the built programs as a user does. [`run`] is
//! the entry point; what is downloaded or converted goes through a [`cache::Cache`] that every
//! checkout of a user shares.

mod archive;
mod bench;
pub mod browser;
pub mod cache;
mod check;
mod demo;
mod models;
pub mod packages;
mod parity;
mod python;
pub mod readme;
pub mod setup;
mod terminal;
mod workspace;

use std::{ffi::OsString, fmt, path::PathBuf};

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::setup::Purpose;

/// The project's chores, from an empty machine to a trained model.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", version)]
pub struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Install what the system lacks and put a CPU libtorch into the cache.
    ///
    /// Does nothing where both are there. LIBTORCH or LIBTORCH_USE_PYTORCH name a libtorch of your
    /// own (2.13.0), an MPI on the PATH is taken. The cache is $DROMEDARY_CACHE, else `dromedary`
    /// in your cache folder.
    Setup {
        /// Install system packages through apt without asking (CI=true says so too).
        #[arg(long)]
        yes: bool,
        /// Install Slurm too, for `test --slurm`.
        #[arg(long)]
        slurm: bool,
    },
    /// Set up, build, and take prompts through all stages to a model that answers.
    ///
    /// Everything goes to runs/demo/, with a report.md. An interrupted demo goes on where it was;
    /// a finished one starts anew.
    Demo {
        /// Install system packages through apt without asking (CI=true says so too).
        #[arg(long)]
        yes: bool,
        /// Align 16 prompts in place of 64.
        #[arg(long)]
        quick: bool,
        /// Take the prompts from openorca/*.jsonl, sharegpt/*.json, dolly/*.jsonl and
        /// oasst1/*.jsonl in this folder in place of dummy_data/.
        #[arg(long, value_name = "DIR")]
        data: Option<PathBuf>,
    },
    /// Set up, check format, lints and documentation, run every test, example and README command.
    Test {
        /// Install system packages through apt without asking (CI=true says so too).
        #[arg(long)]
        yes: bool,
        /// Run the long tests too (up to 30 minutes).
        #[arg(long)]
        soak: bool,
        /// Run the batch scripts too, under a real Slurm of two nodes that is brought up on this
        /// machine, in a temporary folder, and taken down again.
        #[arg(long)]
        slurm: bool,
    },
    /// Check logits, adapters and checkpoints against Hugging Face's transformers and peft.
    Parity,
    /// Build and run a bench; see benches/README.md for the names.
    Bench {
        /// The bench.
        name: String,
        /// Arguments of the bench.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
}

/// Why a task ended early, where that is no failure; each has an exit code of its own.
#[derive(Debug)]
pub enum Ended {
    /// Only the user can do what comes next: exit code 2.
    NeedsUser(String),
    /// A program was stopped and left everything in order; the task goes on when it is run again:
    /// exit code 75.
    Stopped(String),
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::NeedsUser(text) | Self::Stopped(text)) = self;
        f.write_str(text)
    }
}

impl std::error::Error for Ended {}

/// Does the task.
///
/// # Errors
///
/// What went wrong, for the user; [`Ended`] in the chain where that is no failure.
pub fn run(cli: Cli) -> Result<()> {
    let workspace = workspace::Workspace::find()?;
    let cache = cache::Cache::of_user()?;
    match cli.task {
        Task::Setup { yes, slurm } => setup::run(&workspace, &cache, Purpose::of_tests(slurm), yes),
        Task::Demo { yes, quick, data } => {
            demo::run(&workspace, &cache, demo::Options { yes, quick, data })
        }
        Task::Test { yes, soak, slurm } => {
            check::run(&workspace, &cache, check::Options { yes, soak, slurm })
        }
        Task::Parity => parity::run(&workspace, &cache),
        Task::Bench { name, arguments } => bench::run(&workspace, &cache, &name, &arguments),
    }
}
