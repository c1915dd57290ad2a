use std::env;
use std::os::unix::process::CommandExt;
use std::process::Command;

use crate::{Error, Result};

/// Returns where all of these environment variables have a value, the caller's or these: libraries
/// read them once, some of them before `main`, so the program starts anew in its own place (the same process,
/// arguments and open files) where one is missing. Call it before anything that must not be done twice.
///
/// # Errors
/// [`Error::Restart`] if the program cannot be started again.
pub fn with_environment(variables: &[(&str, &str)]) -> Result<()> {
    let missing: Vec<_> =
        variables.iter().copied().filter(|(name, _)| env::var_os(name).is_none()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let program = env::current_exe().map_err(|source| Error::Restart { source })?;
    let mut args = env::args_os();
    let mut command = Command::new(&program);
    command.arg0(args.next().unwrap_or_else(|| program.into())).args(args).envs(missing);
    Err(Error::Restart { source: command.exec() })
}
