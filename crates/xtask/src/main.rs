//! `cargo xtask`.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    match xtask::run(xtask::Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            let ended = error.chain().find_map(|cause| cause.downcast_ref::<xtask::Ended>());
            ExitCode::from(match ended {
                Some(xtask::Ended::NeedsUser(_)) => 2,
                Some(xtask::Ended::Stopped(_)) => 75,
                None => 1,
            })
        }
    }
}
