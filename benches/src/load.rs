//! From the start of the processes to a model that is ready, its files in the page cache.

use std::{
    fs::File,
    io::{self, BufRead, BufReader},
    process::Stdio,
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use clap::Args;
use dromedary_llama::{Checkpoint, Llama, LoadOptions};
use dromedary_parallel::launch;

use crate::{ModelArgs, machine::on_ranks};

/// What the first rank prints when all ranks are ready.
const READY: &str = "ready";

/// Arguments of the bench.
#[derive(Args)]
pub(crate) struct LoadArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Processes that the model is split over, under mpirun if there are several; several values are
    /// measured one after the other.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 2])]
    tp: Vec<usize>,
    /// Starts of each; all are printed.
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// Load, say so, and end: what the bench starts.
    #[arg(long, hide = true)]
    one: bool,
}

pub(crate) fn run(args: &LoadArgs) -> Result<()> {
    if args.one {
        return load(args);
    }
    let checkpoint = Checkpoint::open(&args.model.checkpoint)?;
    let bytes = checkpoint.bytes_stored();
    for &tp in &args.tp {
        for path in checkpoint.files() {
            // Into the page cache.
            io::copy(&mut File::open(path)?, &mut io::sink())?;
        }
        for _ in 0..args.runs {
            let (seconds, rest) = start(args, tp)?;
            println!(
                "| load, tp {tp} | {seconds:.2} s from start to ready | {:.0} MB stored | {rest} |",
                bytes as f64 / 1e6
            );
        }
    }
    Ok(())
}

/// Starts the processes, and waits until they are ready and gone.
fn start(args: &LoadArgs, tp: usize) -> Result<(f64, String)> {
    let mut command = on_ranks(tp)?;
    command.args(["load", "--one", "--checkpoint"]).arg(&args.model.checkpoint);
    // The cores are shared out, as `llama complete` does it.
    let threads = (args.model.threads / i32::try_from(tp)?).max(1);
    command.arg("--threads").arg(threads.to_string());
    let begin = Instant::now();
    let mut child = command.stdout(Stdio::piped()).spawn().context("mpirun")?;
    let mut lines = BufReader::new(child.stdout.take().context("no output")?).lines();
    let ready = lines.find_map(|line| Some(line.ok()?.strip_prefix(READY)?.trim().to_owned()));
    let seconds = begin.elapsed().as_secs_f64();
    ensure!(child.wait()?.success(), "a rank failed");
    Ok((seconds, ready.context("no rank was ready")?))
}

fn load(args: &LoadArgs) -> Result<()> {
    launch()?.run(|launch| {
        tch::set_num_threads(args.model.threads);
        let world = launch.world();
        let begin = Instant::now();
        let checkpoint = Checkpoint::open(&args.model.checkpoint)?;
        let (tp_rank, tp) = (world.rank(), world.world_size());
        let model =
            Llama::load(&checkpoint, &LoadOptions { tp_rank, tp, ..LoadOptions::default() })?;
        world.barrier()?;
        if tp_rank == 0 {
            let counters = checkpoint.counters();
            println!(
                "{READY} {:.2} s of it in loading {} layers; the first rank read {:.0} MB and \
                 copied {:.0} MB",
                begin.elapsed().as_secs_f64(),
                model.layers().len(),
                counters.bytes_read as f64 / 1e6,
                counters.bytes_copied as f64 / 1e6
            );
        }
        Ok(())
    })
}
