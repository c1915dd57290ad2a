//! `step2-self-align`: answer prompts behind the principles, filter and merge the answers.

mod commands;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use dromedary_command::Common;
use dromedary_self_align::{CheckArgs, GenerateArgs, MergeArgs, PlanArgs, RenderArgs, StatusArgs};

/// Step 2: a model answers prompts behind principles; fit answers become training rows.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Generate(Box<GenerateArgs>),
    #[command(
        alias = "merge_and_filter_self_align_with_dummy",
        alias = "merge_and_fileter_self_align_with_dummy"
    )]
    MergeAndFilter(MergeArgs),
    Render(RenderArgs),
    Check(CheckArgs),
    Plan(Box<PlanArgs>),
    Status(StatusArgs),
}

fn main() -> ExitCode {
    let Cli { common, command } = dromedary_command::parse();
    dromedary_command::run(|| match command {
        Command::Generate(args) => commands::generate(*args, &common),
        Command::MergeAndFilter(args) => commands::merge_and_filter(args, &common),
        Command::Render(args) => commands::render(args, &common),
        Command::Check(args) => commands::check(args, &common),
        Command::Plan(args) => commands::plan(*args, &common),
        Command::Status(args) => commands::status(args, &common),
    })
}
