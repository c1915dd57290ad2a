//! A whole program in the manner of the stages: flags over a file, a loop that can be stopped.

use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use anyhow::Context;
use dromedary_command::{
    Common, Progress, StopFlag, init_logging, layered, parse, print_config, required, run,
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
    /// How often, a tenth of a second apart [default: 1].
    #[arg(long)]
    num_times: Option<u64>,
}

fn main() -> ExitCode {
    run(|| {
        let Cli { command: Command::Greet(flags), common } = parse::<Cli>();
        init_logging(0, 1, common.verbosity());
        let args = layered("greet", &["greet"], flags, &common)?;
        if common.print_config {
            return Ok(print_config("greet", &args)?);
        }
        let name = required(args.user_name, "user_name")?;
        greet(&name, args.num_times.unwrap_or(1), &common)
            .with_context(|| format!("greeting {name}"))
    })
}

fn greet(name: &str, times: u64, common: &Common) -> anyhow::Result<()> {
    let stop = StopFlag::install()?;
    let progress = Progress::new(Some(times), "greetings", !common.quiet);
    tracing::info!("hello {name}");
    for done in 0..times {
        stop.check(|| format!("{done} of {times} done"))?;
        thread::sleep(Duration::from_millis(100));
        progress.inc(1);
    }
    progress.finish();
    Ok(())
}
