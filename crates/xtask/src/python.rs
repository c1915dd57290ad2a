//! Python for what only Python reads: private environments, the system's own left alone.

use std::{
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail, ensure};

use crate::terminal;

/// Fails, naming the package to install, where there is no Python or no pip.
pub(crate) fn need_pip() -> Result<()> {
    let answers = |arguments: &[&str]| {
        Command::new("python3")
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success())
    };
    if !answers(&["-c", ""]) {
        bail!("no python3 on the PATH: install the packages python3 and python3-pip");
    }
    if !answers(&["-m", "pip", "--version"]) {
        bail!("python3 has no pip: install the package python3-pip");
    }
    Ok(())
}

/// Installs `requirements` into the folder `target`, for use through PYTHONPATH.
pub(crate) fn install_into(target: &Path, requirements: &[&str]) -> Result<()> {
    need_pip()?;
    let mut command = Command::new("python3");
    command
        .args(["-m", "pip", "install", "--quiet", "--no-cache-dir", "--only-binary=:all:"])
        .arg("--root-user-action=ignore")
        // pip's temporary files beside the target: /tmp is small on many clusters.
        .env("TMPDIR", target.parent().unwrap_or(target))
        .arg("--target")
        .arg(target)
        .args(requirements)
        .stdin(Stdio::null());
    terminal::run(&mut command)
}

/// Makes a virtual environment without pip (Debian splits off what `venv` needs for that) and
/// returns the pip command that installs into it.
pub(crate) fn environment(folder: &Path) -> Result<()> {
    need_pip()?;
    let mut command = Command::new("python3");
    command.args(["-m", "venv", "--without-pip"]).arg(folder).stdin(Stdio::null());
    terminal::run(&mut command)
}

/// `pip install` into the virtual environment at `folder`.
pub(crate) fn pip_install(folder: &Path) -> Command {
    let mut command = Command::new("python3");
    command
        .args(["-m", "pip", "--python"])
        .arg(folder.join("bin/python"))
        .args(["install", "--quiet", "--no-cache-dir", "--only-binary=:all:"])
        .arg("--root-user-action=ignore")
        .env("TMPDIR", folder)
        .stdin(Stdio::null());
    command
}

/// The answer of a short Python program.
pub(crate) fn ask(interpreter: &str, program: &str) -> Result<String> {
    let output = Command::new(interpreter)
        .args(["-c", program])
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start {interpreter}"))?;
    ensure!(
        output.status.success(),
        "{interpreter}: {}",
        String::from_utf8_lossy(&output.stderr).trim().lines().last().unwrap_or_default()
    );
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}
