//! A whole program in the manner of the stages: flags over a file, a loop that can be stopped.

use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use anyhow::Context;
use dromedary_command::{
    Common, Error, Progress, StopFlag, init_logging, layered, parse, print_config, required, run,
    with_environment,
};
use serde::{Deserialize, Serialize};

#[derive(clap::Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    common: Common,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Greet somebody.
    Greet(GreetArgs),
}

#[derive(Default, clap::Args, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct GreetArgs {
    /// Whom to greet.
    #[arg(long)]
    user_name: Option<String>,
    /// How often [default: 1].
    #[arg(long)]
    num_times: Option<u64>,
    /// Pause behind each greeting, in milliseconds [default: 0].
    #[arg(long)]
    pause_ms: Option<u64>,
}

fn main() -> ExitCode {
    run(|| {
        let Cli { command: Command::Greet(flags), common } = parse::<Cli>();
        init_logging(0, 1, common.verbosity());
        let args = layered("greet", &["greet"], flags, &common)?;
        if common.print_config {
            return Ok(print_config("greet", &args)?);
        }
        let greeting = Greeting::try_from(args)?;
        with_environment(&[("GREETING", "hello")])?;
        greeting.run(&common).with_context(|| format!("greeting {}", greeting.name))
    })
}

/// The resolved settings: nothing is optional any more.
struct Greeting {
    name: String,
    times: u64,
    pause: Duration,
}

impl TryFrom<GreetArgs> for Greeting {
    type Error = Error;

    fn try_from(args: GreetArgs) -> Result<Greeting, Error> {
        Ok(Greeting {
            name: required(args.user_name, "user_name")?,
            times: args.num_times.unwrap_or(1),
            pause: Duration::from_millis(args.pause_ms.unwrap_or(0)),
        })
    }
}

impl Greeting {
    fn run(&self, common: &Common) -> anyhow::Result<()> {
        let stop = StopFlag::install()?;
        let word = std::env::var("GREETING")?;
        let progress = Progress::new(Some(self.times), "greetings", !common.quiet);
        for done in 0..self.times {
            stop.check(|| format!("{done} of {} greetings done", self.times))?;
            tracing::info!("{word} {}", self.name);
            thread::sleep(self.pause);
            progress.inc(1);
        }
        progress.finish();
        Ok(())
    }
}
