//! `step1-prompt-cleaning`: collects, cleans and subsamples prompts.

use std::io::{self, Write};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use dromedary_command::{Common, StopFlag, init_logging, layered, parse, print_config, run};
use dromedary_prompt_cleaning::{
    AggregateArgs, AggregateConfig, ExportArgs, ExportConfig, MergeArgs, MergeConfig, SUBCOMMANDS,
    Session, SubsampleArgs, SubsampleConfig, aggregate_sharegpt, clean_and_merge, export_parquet,
    subsample_openorca,
};
use dromedary_prompt_cleaning::{Report, Result};
use mimalloc::MiMalloc;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Rows are made on one thread and dropped on another, which the system's allocator locks for.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

/// Step 1: collect, clean and subsample the prompts that the model is to answer.
#[derive(Parser)]
#[command(
    name = "step1-prompt-cleaning",
    version,
    after_help = "All flags may be written in \
    snake_case, as the original writes them. Nothing is downloaded: every input is a file."
)]
struct Cli {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Draw a sample of OpenOrca's questions: as many of each of its four collections.
    SubsampleOpenorca(SubsampleArgs),
    /// Collect the first question of every ShareGPT conversation, each once.
    AggregateSharegpt(AggregateArgs),
    /// Clean the prompts of ShareGPT, OpenOrca, Dolly and oasst1 and shuffle them into one file.
    CleanAndMerge(MergeArgs),
    /// Write files of prompts as one parquet file for other tools.
    ExportParquet(ExportArgs),
}

fn main() -> ExitCode {
    run(|| {
        let Cli { common, command } = parse::<Cli>();
        init_logging(0, 1, common.verbosity());
        match command {
            Command::SubsampleOpenorca(args) => {
                execute::<_, SubsampleConfig>(SUBCOMMANDS[0], args, &common, subsample_openorca)
            }
            Command::AggregateSharegpt(args) => {
                execute::<_, AggregateConfig>(SUBCOMMANDS[1], args, &common, aggregate_sharegpt)
            }
            Command::CleanAndMerge(args) => {
                execute::<_, MergeConfig>(SUBCOMMANDS[2], args, &common, clean_and_merge)
            }
            Command::ExportParquet(args) => {
                execute::<_, ExportConfig>(SUBCOMMANDS[3], args, &common, |config, session| {
                    export_parquet(config, session).map(|_| Report::default())
                })
            }
        }
    })
}

/// Resolves the settings of a subcommand, then prints them or does the work.
fn execute<A, C>(
    subcommand: &str,
    args: A,
    common: &Common,
    work: fn(&C, &Session) -> Result<Report>,
) -> anyhow::Result<()>
where
    A: clap::Args + Serialize + DeserializeOwned,
    C: TryFrom<A, Error = dromedary_command::Error> + Serialize,
{
    let config = C::try_from(layered(subcommand, &SUBCOMMANDS, args, common)?)?;
    if common.print_config {
        return Ok(print_config(subcommand, &config)?);
    }
    let session = Session { stop: StopFlag::install()?, show_progress: !common.quiet };
    if let Some(explanation) = work(&config, &session)?.explanation {
        io::stdout().write_all(explanation.to_string().as_bytes())?;
    }
    Ok(())
}
