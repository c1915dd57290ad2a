//! What every binary does alike: configuration, logging, exit codes, signals, progress, reports.
//!
//! # Brief overview
//!
//! [`parse`] reads the command line with clap, after [`normalize_args`] has turned the original's
//! `--snake_case` flags into `--kebab-case`. [`layered`] puts the flags of a subcommand over the
//! table of the same name in a TOML file; the result goes to the stage's own
//! `Config::try_from(args)`, which validates it. [`run`] is the body of `main`: it prints an error
//! once and chooses the exit code. [`StopFlag`] turns signals into a flag, [`init_logging`] and
//! [`Progress`] write to stderr without disturbing each other. A [`ReportPage`] is a report that
//! people read in a browser.
//!
//! | exit code | when |
//! |---|---|
//! | 0 | done |
//! | 1 | failure |
//! | 2 | usage: wrong flag, wrong or missing setting, wrong configuration file |
//! | 75 | stopped cleanly by a signal; the next run continues (under srun 0, see [`stop_or_requeue`]) |
//!
//! ```
//! use dromedary_command::{Common, boolean, layered, required};
//!
//! #[derive(Default, clap::Args, serde::Serialize, serde::Deserialize)]
//! #[serde(default, deny_unknown_fields)]
//! struct GreetArgs {
//!     /// Whom to greet.
//!     #[arg(long)]
//!     name: Option<String>,
//!     /// Greet loudly [default: false].
//!     #[arg(long, num_args = 0..=1, default_missing_value = "true", value_parser = boolean)]
//!     loud: Option<bool>,
//! }
//!
//! # fn main() -> dromedary_command::Result<()> {
//! let flags = GreetArgs { name: Some("Ada".into()), ..GreetArgs::default() };
//! let args = layered("greet", &["greet", "part"], flags, &Common::default())?;
//! assert_eq!(required(args.name, "name")?, "Ada");
//! # Ok(())
//! # }
//! ```

mod args;
mod byte_size;
mod config;
mod error;
mod logging;
mod page;
mod progress;
#[cfg(doctest)]
mod readme;
mod requeue;
mod restart;
mod run;
mod stop;

pub use args::{Common, boolean, normalize_args, parse};
pub use byte_size::ByteSize;
pub use config::{ignored_flags, layered, print_config, required};
pub use error::{Error, Result};
pub use logging::init_logging;
pub use page::{Bars, Cell, Excerpt, Excerpts, Lines, Ranking, ReportPage, Table, grouped};
pub use progress::Progress;
pub use requeue::stop_or_requeue;
pub use restart::with_environment;
pub use run::{exit_code, run};
pub use stop::{CriticalSection, StopFlag};
