//! `step3-principle-engraving`: fine-tune the base model on aligned answers.

use std::{process::ExitCode, thread};

use anyhow::Context;
use clap::{Parser, Subcommand};
use dromedary_command::{
    Common, Error as CommandError, StopFlag, ignored_flags, init_logging, layered, parse,
    print_config, run,
};
use dromedary_principle_engraving::{Error, TrainArgs, TrainConfig, train};

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
}

fn main() -> ExitCode {
    run(|| {
        let Cli { common, command: Command::Train(args) } = parse::<Cli>();
        run_train(&common, *args)
    })
}

fn run_train(common: &Common, args: TrainArgs) -> anyhow::Result<()> {
    let args = layered("train", &["train"], args, common)?.with_defaults();
    if common.print_config {
        return Ok(print_config("train", &args)?);
    }
    let launch = dromedary_parallel::launch()?;
    init_logging(launch.world().rank(), launch.world().world_size(), common.verbosity());
    ignored_flags(&args.ignored)?;
    let config = TrainConfig::try_from(args)?;
    let world_size = launch.world().world_size();
    if world_size > 1 {
        return Err(CommandError::usage(format!(
            "started as {world_size} processes: training runs in one"
        ))
        .into());
    }
    let threads = config.threads.or_else(|| thread::available_parallelism().ok().map(Into::into));
    tch::set_num_threads(threads.and_then(|threads| threads.try_into().ok()).unwrap_or(1));
    let stop = StopFlag::install()?;
    let summary = match train(&config, launch.world(), &stop) {
        Err(error @ Error::Stopped { .. }) => {
            return Err(CommandError::stopped(error.to_string()).into());
        }
        result => result.context("training")?,
    };
    tracing::info!(
        "{} steps on {} rows; adapter in {}",
        summary.steps,
        summary.rows,
        summary.adapter.display()
    );
    Ok(())
}
