//! `cargo xtask`.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    match xtask::run(xtask::Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            let users = error.chain().any(|cause| cause.is::<xtask::NeedsUser>());
            ExitCode::from(if users { 2 } else { 1 })
        }
    }
}
