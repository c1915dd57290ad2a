use std::env;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

/// The flags that every subcommand has.
#[derive(Clone, Debug, Default, PartialEq, Eq, clap::Args)]
pub struct Common {
    /// TOML file with one table per subcommand and the flags' names as keys; flags on the command
    /// line win, unknown keys are errors.
    #[arg(long, value_name = "FILE", global = true, help_heading = "Common options")]
    pub config: Option<PathBuf>,
    /// Print the resolved settings as TOML to stdout and exit.
    #[arg(long, global = true, help_heading = "Common options")]
    pub print_config: bool,
    /// Log more: -v for details, -vv for everything (RUST_LOG overrides).
    #[arg(short, long, action = clap::ArgAction::Count, global = true,
        help_heading = "Common options")]
    pub verbose: u8,
    /// Log warnings and errors only, and show no progress.
    #[arg(short, long, global = true, conflicts_with = "verbose", help_heading = "Common options")]
    pub quiet: bool,
}

impl Common {
    /// The level for [`init_logging`](crate::init_logging): -1 quiet, 0 normal, 1 and more verbose.
    pub fn verbosity(&self) -> i8 {
        if self.quiet { -1 } else { i8::try_from(self.verbose).unwrap_or(i8::MAX) }
    }
}

/// Parses the command line of this process; the original's `--snake_case` flags work too.
///
/// On a wrong flag it prints clap's message and exits with code 2, after `--help` and `--version`
/// with code 0.
pub fn parse<Cli: clap::Parser>() -> Cli {
    Cli::parse_from(normalize_args(env::args_os()))
}

/// Writes the names of long flags in kebab-case: `--foo_bar=a_b` becomes `--foo-bar=a_b`.
///
/// Values stay as they are, and so does everything behind a bare `--`. Dromedary's flags are
/// snake_case; one rule here spares an alias per flag.
pub fn normalize_args(args: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut only_values = false;
    args.into_iter()
        .map(|arg| {
            only_values |= arg == OsStr::new("--");
            if only_values { arg } else { normalize_arg(arg) }
        })
        .collect()
}

fn normalize_arg(arg: OsString) -> OsString {
    if !arg.as_bytes().starts_with(b"--") {
        return arg;
    }
    let mut bytes = arg.into_vec();
    let name_len = bytes.iter().position(|&byte| byte == b'=').unwrap_or(bytes.len());
    for byte in &mut bytes[..name_len] {
        if *byte == b'_' {
            *byte = b'-';
        }
    }
    OsString::from_vec(bytes)
}

/// A clap value parser for booleans as Python users type them: `True`, `false`, `1`, `no`, ...
///
/// With `num_args = 0..=1, default_missing_value = "true"` both `--bf16` and `--bf16 True` work.
///
/// # Errors
/// Any other word, with the list of those that are understood.
pub fn boolean(text: &str) -> Result<bool, String> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "1" | "yes" => Ok(true),
        "false" | "0" | "no" => Ok(false),
        _ => Err("expected true or false (also True, False, 1, 0, yes, no)".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn normalized(args: &[&str]) -> Vec<String> {
        normalize_args(args.iter().map(OsString::from))
            .into_iter()
            .map(|arg| arg.into_string().unwrap())
            .collect()
    }

    #[test]
    fn names_change_and_values_do_not() {
        assert_eq!(
            normalized(&["prog", "sub_command", "--data_files=a_b.json,c_d", "--max_len", "a_b"]),
            ["prog", "sub_command", "--data-files=a_b.json,c_d", "--max-len", "a_b"]
        );
    }

    #[test]
    fn nothing_changes_behind_the_double_dash() {
        assert_eq!(normalized(&["p", "--a_b", "--", "--a_b"]), ["p", "--a-b", "--", "--a_b"]);
    }

    #[test]
    fn bytes_that_are_not_utf8_survive() {
        let arg = OsString::from_vec(b"--out_file=\xff_\xfe".to_vec());
        let normalized = normalize_args([arg]);
        assert_eq!(normalized[0].as_bytes(), b"--out-file=\xff_\xfe");
    }

    #[test]
    fn booleans_of_python_and_of_shells() {
        for text in ["True", "true", "1", "yes", "YES"] {
            assert_eq!(boolean(text), Ok(true), "{text}");
        }
        for text in ["False", "false", "0", "no"] {
            assert_eq!(boolean(text), Ok(false), "{text}");
        }
        assert!(boolean("maybe").unwrap_err().contains("true or false"));
        assert!(boolean("").is_err());
    }

    proptest! {
        #[test]
        fn normalizing_twice_is_normalizing_once(
            args in prop::collection::vec("[-a-z_=]{0,12}", 0..6)
        ) {
            let once = normalize_args(args.iter().map(OsString::from));
            prop_assert_eq!(normalize_args(once.clone()), once);
        }

        #[test]
        fn arguments_that_are_no_flags_are_untouched(value in "[^-].*") {
            prop_assert_eq!(normalize_args([OsString::from(&value)]), vec![OsString::from(&value)]);
        }
    }
}
