use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::Arc;

use signal_hook::consts::signal::SIGXFSZ;

use crate::Error;

/// `EX_TEMPFAIL` of sysexits.h: not done, but a later run will continue.
const STOPPED: u8 = 75;
const USAGE: u8 = 2;
const FAILURE: u8 = 1;

/// The body of `main`: runs the program, prints its error once to stderr, chooses the exit code.
pub fn run(program: impl FnOnce() -> anyhow::Result<()>) -> ExitCode {
    let program = || file_size_limit_is_an_error().and_then(|()| program());
    let Err(error) = program() else {
        return ExitCode::SUCCESS;
    };
    let code = exit_code(&error);
    let word = if code == STOPPED { "" } else { "error: " };
    crate::logging::around_progress(|| {
        // Nobody is left to be told when stderr is closed.
        let _ = writeln!(io::stderr(), "{word}{}", said_once(&error));
    });
    ExitCode::from(code)
}

/// An error with its causes, as `{:#}` has them, but for those that an error above has in its own message.
fn said_once(error: &anyhow::Error) -> String {
    error.chain().map(ToString::to_string).fold(String::new(), |said, cause| match said {
        said if said.is_empty() => cause,
        said if said.ends_with(&cause) => said,
        said => format!("{said}: {cause}"),
    })
}

/// Where `ulimit -f` binds, a write is to fail as on a full disk; unhandled, the signal would end
/// the process without a message and leave its temporary files.
fn file_size_limit_is_an_error() -> anyhow::Result<()> {
    signal_hook::flag::register(SIGXFSZ, Arc::default())
        .map(drop)
        .map_err(|source| Error::Signals { source }.into())
}

/// The exit code of an error: 2 for usage, 75 for a clean stop, else 1; contexts around it do not
/// matter.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    error
        .chain()
        .find_map(|cause| match cause.downcast_ref::<Error>()? {
            Error::Usage { .. } | Error::Config { .. } | Error::ReadConfig { .. } => Some(USAGE),
            Error::Stopped { .. } => Some(STOPPED),
            Error::PrintConfig { .. }
            | Error::Signals { .. }
            | Error::Requeue { .. }
            | Error::Restart { .. }
            | Error::Page { .. } => None,
        })
        .unwrap_or(FAILURE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::{Context, anyhow};

    #[test]
    fn a_cause_is_said_once() {
        let io = || io::Error::other("no such file");
        let told = Error::ReadConfig { path: "x.toml".into(), source: io() };
        let error = anyhow::Error::from(told).context("training");
        assert_eq!(said_once(&error).matches("no such file").count(), 1, "{error:#}");
        assert!(said_once(&error).starts_with("training: "));
        assert_eq!(
            said_once(&anyhow!(io()).context("x.toml: no such file")),
            "x.toml: no such file"
        );
        assert_eq!(said_once(&anyhow!(io()).context("x.toml")), "x.toml: no such file");
    }

    #[test]
    fn the_chain_decides_the_code() {
        let usage = Err::<(), _>(Error::usage("no")).context("reading flags").unwrap_err();
        assert_eq!(exit_code(&usage), 2);
        let stopped = Err::<(), _>(Error::stopped("row 3")).context("training").unwrap_err();
        assert_eq!(exit_code(&stopped), 75);
        let config = Error::Config { path: "x".into(), message: "y".into() };
        assert_eq!(exit_code(&config.into()), 2);
        assert_eq!(exit_code(&anyhow!("disk full")), 1);
        let print = Error::PrintConfig { message: String::new() };
        assert_eq!(exit_code(&print.into()), 1);
    }
}
