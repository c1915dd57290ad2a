//! The program `llama`: one module per subcommand, each with its flags and its settings.

mod complete;
mod convert;
mod inspect;
mod merge;
mod plan;
mod quantize;
mod sampling_args;
mod shard;
mod watched;

use std::process::ExitCode;

use dromedary_command::{Common, Error, init_logging, layered, print_config};
use serde::{Serialize, de::DeserializeOwned};

pub use sampling_args::{SamplingArgs, stop_strings};

/// Names of the tables that a `--config` file may have.
const SUBCOMMANDS: [&str; 7] =
    ["complete", "convert", "inspect", "merge", "plan", "quantize", "shard"];

/// LLaMA checkpoints: look at them, convert, quantise and cut them, plan their split over processes, merge
/// adapters into them, run them.
#[derive(Debug, clap::Parser)]
#[command(name = "llama", version)]
pub struct Cli {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    Complete(Box<complete::CompleteArgs>),
    Convert(convert::ConvertArgs),
    Inspect(inspect::InspectArgs),
    Merge(merge::MergeArgs),
    Plan(plan::PlanArgs),
    Quantize(quantize::QuantizeArgs),
    Shard(shard::ShardArgs),
}

/// The settings of a subcommand; `None` where they were to be printed, which is done then.
fn settings<A, C>(subcommand: &str, args: A, common: &Common) -> anyhow::Result<Option<C>>
where
    A: clap::Args + Serialize + DeserializeOwned,
    C: TryFrom<A, Error = Error> + Serialize,
{
    let config = C::try_from(layered(subcommand, &SUBCOMMANDS, args, common)?)?;
    if common.print_config {
        print_config(subcommand, &config)?;
        return Ok(None);
    }
    Ok(Some(config))
}

/// Runs the program with the arguments of this process.
pub fn main() -> ExitCode {
    let cli = dromedary_command::parse::<Cli>();
    dromedary_command::run(|| cli.run())
}

impl Cli {
    fn run(self) -> anyhow::Result<()> {
        let common = self.common;
        // `complete` may be one process of many, and sets up its log itself.
        if !matches!(self.command, Command::Complete(_)) {
            init_logging(0, 1, common.verbosity());
        }
        match self.command {
            Command::Complete(args) => complete::run(*args, &common),
            Command::Convert(args) => convert::run(args, &common),
            Command::Inspect(args) => inspect::run(args, &common),
            Command::Merge(args) => merge::run(args, &common),
            Command::Plan(args) => plan::run(args, &common),
            Command::Quantize(args) => quantize::run(args, &common),
            Command::Shard(args) => shard::run(args, &common),
        }
    }
}
