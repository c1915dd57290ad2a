//! Speed of the product's own paths; `cargo xtask bench NAME` runs it.
//!
//! Each bench prints rows for the table in `README.md` of this folder.

#![allow(clippy::print_stdout, reason = "the printed rows are what a bench makes")]

mod decode;
mod end_to_end;
mod load;
mod machine;
mod model;
mod step1;
mod tensor_parallel;
mod train;

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};

/// Benches of the product's own paths.
#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Subcommand)]
enum Bench {
    /// Decode tokens/s behind a long shared prefix, and the prefix's prefill.
    Decode(decode::DecodeArgs),
    /// Seconds from the start of the processes to a model that is ready, from the page cache.
    Load(load::LoadArgs),
    /// Decode tokens/s of two ranks with one thread each, against one rank with two threads.
    Tp(tensor_parallel::TpArgs),
    /// One rank of `tp`.
    #[command(hide = true)]
    TpRank(tensor_parallel::RankArgs),
    /// A queue of prompts behind the principles, until the last row has ended.
    EndToEnd(end_to_end::EndToEndArgs),
    /// LoRA training tokens/s and memory on one fixed random batch.
    Train(train::TrainArgs),
    /// MB/s and memory of step 1's commands.
    Step1(step1::Step1Args),
}

/// What all benches take.
#[derive(Args)]
struct ModelArgs {
    /// Model folder.
    #[arg(long, env = "DROMEDARY_SMOLLM2", value_name = "DIR")]
    checkpoint: PathBuf,
    /// Threads of libtorch.
    #[arg(long, default_value_t = machine::cores(), value_name = "N")]
    threads: i32,
}

fn main() -> Result<()> {
    match Cli::parse().bench {
        Bench::Decode(args) => decode::run(&args),
        Bench::Load(args) => load::run(&args),
        Bench::Tp(args) => tensor_parallel::run(&args),
        Bench::TpRank(args) => tensor_parallel::run_rank(&args),
        Bench::EndToEnd(args) => end_to_end::run(&args),
        Bench::Train(args) => train::run(&args),
        Bench::Step1(args) => step1::run(&args),
    }
}
