//! What the tests start as ranks: the contract, and every way to fail while others wait.

#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

use std::io::{self, Write as _};
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use dromedary_parallel::{Error, Launch, ParallelDims, launch};
use mpi::traits::{Communicator as _, CommunicatorCollectives as _};
use rustix::process::{Signal, getpid, kill_process};

#[path = "../contract/mod.rs"]
mod contract;
mod nccl;
mod queue;

fn main() -> ExitCode {
    let word = std::env::args().nth(1).unwrap_or_default();
    let result = match word.as_str() {
        "control" => return control(),
        "refused" => launch().map(drop),
        _ => joined(&word),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("error: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// In one write: ranks share a pipe.
fn say(line: &str) {
    io::stderr().write_all(format!("{line}\n").as_bytes()).expect("the tests read it");
}

fn joined(word: &str) -> Result<(), Error> {
    let launch = launch()?;
    tch::set_num_threads(1);
    if word == "drop" {
        return early_return(&launch);
    }
    launch.run(|launch| work(word, launch))
}

fn work(word: &str, launch: &Launch) -> Result<(), Error> {
    let world = launch.world();
    if word == "contract" {
        contract::check(world);
        say(&format!(
            "rank {} of {} kept the contract, local rank {}, mpi {}",
            world.rank(),
            world.world_size(),
            launch.local_rank(),
            mpi::is_initialized()
        ));
        return Ok(());
    }
    if word.starts_with("nccl") {
        return nccl::work(word, launch);
    }
    if word.starts_with("queue") {
        return queue::work(word, world);
    }
    if word == "groups-of-3" {
        return ParallelDims::new(world.world_size(), 3).map(drop);
    }
    if word == "late-end" {
        thread::sleep(Duration::from_secs(15) * world.rank() as u32);
        return Ok(());
    }
    world.barrier()?;
    if world.rank() == 1 {
        say("failing");
        fail(word, launch)?;
    }
    // The other ranks wait here.
    world.barrier()
}

fn fail(word: &str, launch: &Launch) -> Result<(), Error> {
    match word {
        "panic" => panic!("rank 1 falls"),
        "panic-in-thread" => {
            let _ = thread::spawn(|| panic!("rank 1 falls in a thread")).join();
            Ok(())
        }
        "error" => Err(Error::SplitNumber { value: 42 }),
        "code" => {
            launch.fail(7, &"chosen code");
            Ok(())
        }
        "abort" => Err(launch.world().abort(9, "asked to end")),
        "exit" => std::process::exit(3),
        "kill" => signal(Signal::KILL),
        "stop" => signal(Signal::STOP),
        "late" => {
            thread::sleep(Duration::from_secs(3600));
            Ok(())
        }
        "wait" => Ok(()),
        other => panic!("unknown word {other}"),
    }
}

fn signal(signal: Signal) -> Result<(), Error> {
    kill_process(getpid(), signal).expect("a process may signal itself");
    Ok(())
}

/// An error between `launch` and `run`: the job is dropped.
fn early_return(launch: &Launch) -> Result<(), Error> {
    launch.world().barrier()?;
    if launch.world().rank() == 1 {
        say("failing");
        return Err(Error::SplitNumber { value: 42 });
    }
    launch.world().barrier()
}

/// What a program without our launch does: it hangs.
fn control() -> ExitCode {
    let universe = mpi::initialize().expect("nobody else uses MPI here");
    let world = universe.world();
    world.barrier();
    if world.rank() == 1 {
        say("failing");
        panic!("rank 1 falls without a hook");
    }
    world.barrier();
    ExitCode::SUCCESS
}
