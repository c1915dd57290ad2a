//! `step3-principle-engraving`: fine-tune the base model on aligned answers.

use std::{
    io::{IsTerminal, Write, stdout},
    process::ExitCode,
    thread,
};

use anyhow::Context;
use clap::{Parser, Subcommand};
use dromedary_command::{
    Common, StopFlag, ignored_flags, init_logging, layered, parse, print_config, run,
    stop_or_requeue,
};
use dromedary_files::LockOptions;
use dromedary_parallel::launch;
use dromedary_principle_engraving::{
    DataConfig, Dataset, Error, Inspection, PlanArgs, PlanReport, Summary, TrainArgs, TrainConfig,
    train,
};
use dromedary_tokenizer::Tokenizer;

/// Step 3: engrave the principles into the base model by supervised fine-tuning.
#[derive(Parser)]
#[command(version, about)]
struct Cli {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    #[command(alias = "finetune-qlora", alias = "finetune_qlora")]
    Train(Box<TrainArgs>),
    /// Show what `train` would read, with the same flags, and compute nothing.
    ///
    /// Prints how many rows and tokens there are, what is truncated, how many targets end in a stop mark, a
    /// histogram of lengths, and three rows as the model reads them, with the learned tokens in green. Fails as
    /// `train` would where rows have no target. Reads the table [train] of --config.
    Inspect(Box<TrainArgs>),
    Plan(Box<PlanArgs>),
}

/// Tables that the file of --config may have: one file serves all subcommands.
const TABLES: [&str; 2] = ["train", "plan"];

fn main() -> ExitCode {
    run(|| {
        let Cli { common, command } = parse::<Cli>();
        match command {
            Command::Train(args) => run_train(&common, *args),
            Command::Inspect(args) => inspect(&common, *args),
            Command::Plan(args) => run_plan(&common, *args),
        }
    })
}

fn inspect(common: &Common, args: TrainArgs) -> anyhow::Result<()> {
    let args = resolved(common, args)?;
    if common.print_config {
        return Ok(print_config("train", &args)?);
    }
    init_logging(0, 1, common.verbosity());
    let config = DataConfig::try_from(&args)?;
    let tokenizer = Tokenizer::open(&config.tokenizer)?;
    let dataset = Dataset::read(&config.dataset, config.max_train_samples, &config, &tokenizer)?;
    let mut out = stdout().lock();
    let color = out.is_terminal() && std::env::var_os("NO_COLOR").is_none();
    write!(out, "{}", Inspection::new(&dataset, &tokenizer, color)).context("standard output")?;
    Ok(dataset.check(config.drop_empty)?)
}

fn resolved(common: &Common, args: TrainArgs) -> anyhow::Result<TrainArgs> {
    Ok(layered("train", &TABLES, args, common)?.with_defaults())
}

fn run_plan(common: &Common, args: PlanArgs) -> anyhow::Result<()> {
    init_logging(0, 1, common.verbosity());
    let run: TrainArgs = layered("train", &TABLES, TrainArgs::default(), common)?;
    let args: PlanArgs = layered("plan", &TABLES, args, common)?;
    let args = args.over_run(&run)?;
    if common.print_config {
        return Ok(print_config("plan", &args)?);
    }
    let threads = thread::available_parallelism().map_or(1, |threads| threads.get() as i32);
    tch::set_num_threads(threads);
    let args = args.with_counted_rows(&run)?;
    let report = PlanReport::new(&args)?;
    let text = match args.json {
        Some(true) => serde_json::to_string_pretty(&report)? + "\n",
        _ => report.table(),
    };
    Ok(stdout().write_all(text.as_bytes())?)
}

/// A job that Slurm has put back into the queue goes on, also where its flags say that it starts anew.
fn of_this_start(config: TrainConfig) -> TrainConfig {
    let count = LockOptions::from_env(false).restart_count;
    let resume = config.resume.clone().after_restarts(count);
    if resume != config.resume {
        tracing::info!(
            "SLURM_RESTART_COUNT is {count}: this job goes on from its newest checkpoint, and not as \
             --resume says"
        );
    }
    TrainConfig { resume, ..config }
}

fn run_train(common: &Common, args: TrainArgs) -> anyhow::Result<()> {
    let args = resolved(common, args)?;
    if common.print_config {
        return Ok(print_config("train", &args)?);
    }
    // What is wrong with the settings is said before ranks are joined, which would make it a failure of the
    // job; nobody hears warnings yet.
    TrainConfig::try_from(args.clone())?;
    // Before any other call of libtorch: oneDNN asks for the number once.
    let threads = args.threads.or_else(|| thread::available_parallelism().ok().map(Into::into));
    tch::set_num_threads(threads.and_then(|threads| threads.try_into().ok()).unwrap_or(1));
    let stop = StopFlag::install()?;
    let (ended, folder, rank) = launch()?.run(|launch| -> anyhow::Result<_> {
        let world = launch.world();
        init_logging(world.rank(), world.world_size(), common.verbosity());
        ignored_flags(&args.ignored)?;
        let config = of_this_start(TrainConfig::try_from(args)?);
        let ended = match train(&config, world, launch.local_rank(), &stop) {
            // No failure: all ranks have stopped, and leave the job together.
            Err(error @ Error::Stopped { .. }) => Err(error.to_string()),
            result => Ok(result.context("training")?),
        };
        Ok((ended, config.output_dir, world.rank()))
    })?;
    let Summary { output, steps, rows, .. } = match ended {
        Err(message) => return Ok(stop_or_requeue(&folder, rank, message)?),
        Ok(summary) => summary,
    };
    if rank == 0 {
        tracing::info!("{steps} steps on {rows} rows; result in {}", output.display());
    }
    Ok(())
}
