//! What a person at the terminal (or reading CI's log) sees: lines, shown commands, stages.

use std::{
    ffi::OsStr,
    fmt,
    io::{self, Write},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

/// Prints one line to standard output.
macro_rules! say {
    ($($argument:tt)*) => { $crate::terminal::line(format_args!($($argument)*)) };
}
pub(crate) use say;

/// Prints one line to standard output.
#[allow(clippy::print_stdout, reason = "only println! is captured in tests")]
pub(crate) fn line(text: fmt::Arguments<'_>) {
    if cfg!(test) {
        println!("{text}");
    } else {
        // A closed pipe (`cargo xtask test | head`) is no reason to stop half-way.
        let _ = writeln!(io::stdout().lock(), "{text}");
    }
}

/// A command as a user would type it, its own variables before it.
pub(crate) fn shown(command: &Command) -> String {
    let variables = command
        .get_envs()
        .filter_map(|(name, value)| value.map(|value| (name, value)))
        // Set for every child alike, and told once where it matters.
        .filter(|(name, _)| *name != "PATH" && *name != "LD_LIBRARY_PATH")
        .map(|(name, value)| format!("{}={}", name.to_string_lossy(), quoted(value)));
    let words = std::iter::once(command.get_program()).chain(command.get_args()).map(quoted);
    variables.chain(words).collect::<Vec<_>>().join(" ")
}

/// One shell word.
pub(crate) fn quoted(word: &OsStr) -> String {
    let word = word.to_string_lossy();
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.into_owned();
    }
    if word.contains('\n') {
        let escaped = word.replace('\\', r"\\").replace('\'', r"\'").replace('\n', r"\n");
        return format!("$'{escaped}'");
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// Prints `command` and the folder it runs in (where that is not this one), runs it, and fails if
/// it fails.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    match command.get_current_dir() {
        Some(folder) => say!("$ (cd {}) {}", quoted(folder.as_os_str()), shown(command)),
        None => say!("$ {}", shown(command)),
    }
    run_silently(command)
}

/// As [`run`], without printing the command.
pub(crate) fn run_silently(command: &mut Command) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("cannot start {}", command.get_program().display()))?;
    if !status.success() {
        bail!("{status}: {}", shown(command));
    }
    Ok(())
}

/// A named part of the work; its duration is printed when it ends.
pub(crate) struct Stage {
    name: String,
    start: Instant,
}

impl Stage {
    /// Announces the stage.
    pub(crate) fn start(name: impl Into<String>) -> Self {
        let name = name.into();
        say!("\n== {name}");
        Self { name, start: Instant::now() }
    }

    /// Prints how long the stage took.
    pub(crate) fn end(self) {
        say!("== {}: done in {}", self.name, duration(self.start.elapsed()));
    }
}

/// `12.3 s`, `4 min 05 s`.
pub(crate) fn duration(time: Duration) -> String {
    let seconds = time.as_secs();
    if seconds < 60 {
        format!("{:.1} s", time.as_secs_f64())
    } else {
        format!("{} min {:02} s", seconds / 60, seconds % 60)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_shown_as_a_shell_takes_them() {
        let mut command = Command::new("llama");
        command.args(["complete", "--prompt", "it's a\nquestion", "--config=a b", ""]);
        command.env("RUSTDOCFLAGS", "-D warnings").env("PATH", "/hidden").env_remove("LIBTORCH");
        let text = shown(&command);
        assert_eq!(
            text,
            r"RUSTDOCFLAGS='-D warnings' llama complete --prompt $'it\'s a\nquestion' '--config=a b' ''"
        );
        let words = Command::new("bash")
            .arg("-c")
            .arg(format!("printf '%s|' {}", text.split_once("llama ").unwrap().1))
            .output()
            .unwrap();
        assert_eq!(
            String::from_utf8(words.stdout).unwrap(),
            "complete|--prompt|it's a\nquestion|--config=a b||"
        );
    }

    #[test]
    fn a_failing_command_is_named() {
        let error = run_silently(Command::new("sh").args(["-c", "exit 3"])).unwrap_err();
        assert_eq!(error.to_string(), "exit status: 3: sh -c 'exit 3'");
    }

    #[test]
    fn durations_are_readable() {
        assert_eq!(duration(Duration::from_millis(12_340)), "12.3 s");
        assert_eq!(duration(Duration::from_secs(245)), "4 min 05 s");
    }
}
