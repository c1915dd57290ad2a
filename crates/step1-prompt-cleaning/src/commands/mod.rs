//! The three commands; each file has the flags, the settings and the work of one.

mod aggregate;
mod merge;
mod merger;
mod optional;
mod settings;
mod subsample;

use std::fs;
use std::path::{Path, PathBuf};

use dromedary_command::{Progress, StopFlag};
use dromedary_records::RowWriter;
use rayon::prelude::*;

pub use aggregate::{AggregateArgs, AggregateConfig, aggregate_sharegpt};
pub use merge::{MergeArgs, MergeConfig, clean_and_merge};
pub use optional::{OptionalArgs, OptionalConfig};
pub use settings::{JudgeArgs, JudgeConfig, SharedArgs, SharedConfig};
pub use subsample::{SubsampleArgs, SubsampleConfig, subsample_openorca};

use crate::explain::Search;
use crate::report::{HashedFile, InputFile, Ledger, Report};
use crate::sources::{BadRows, Fault, Row};
use crate::{Error, Result};

/// The subcommands, which are also the tables that a configuration file may have.
pub const SUBCOMMANDS: [&str; 3] = ["subsample-openorca", "aggregate-sharegpt", "clean-and-merge"];

/// So many rows are read, then judged by all threads, then admitted in order.
const BATCH: usize = 4096;

/// How a command is run, apart from what it does.
#[derive(Clone, Debug, Default)]
pub struct Session {
    /// Ends the work without an output when it is set.
    pub stop: StopFlag,
    /// Whether progress is shown.
    pub show_progress: bool,
}

/// What all commands do around their own work.
struct Run<'s> {
    session: &'s Session,
    progress: Progress,
    max_bad_rows: f64,
    inputs: Vec<InputFile>,
}

impl<'s> Run<'s> {
    fn new(session: &'s Session, max_bad_rows: f64) -> Run<'s> {
        let progress = Progress::new(None, "rows", session.show_progress);
        Run { session, progress, max_bad_rows, inputs: Vec::new() }
    }

    /// Judges the rows of a file on all threads and admits them in its order; a bad row is admitted
    /// with its fault.
    fn read<T: Send, J: Send>(
        &mut self,
        path: &Path,
        mut rows: impl Iterator<Item = Result<Row<T>>>,
        judge: impl Fn(T) -> J + Sync,
        mut admit: impl FnMut(std::result::Result<J, Fault>) -> Result<()>,
    ) -> Result<()> {
        let mut bad_rows = BadRows::of(path, self.max_bad_rows);
        loop {
            self.session
                .stop
                .check(|| "run the command again".to_owned())
                .map_err(|source| Error::Interrupted { source })?;
            let batch: Vec<Row<T>> = rows.by_ref().take(BATCH).collect::<Result<_>>()?;
            if batch.is_empty() {
                self.inputs.push(bad_rows.finish()?);
                return Ok(());
            }
            self.progress.inc(batch.len() as u64);
            let contents: Vec<std::result::Result<T, Fault>> =
                batch.into_iter().map(|row| bad_rows.accept(row)).collect();
            let judged: Vec<std::result::Result<J, Fault>> =
                contents.into_par_iter().map(|content| content.map(&judge)).collect();
            judged.into_iter().try_for_each(&mut admit)?;
        }
    }

    /// Lets the rows and the report appear; where a row is to be explained, neither.
    fn publish(self, outcome: Outcome<'_>) -> Result<Report> {
        self.progress.finish();
        let Outcome { command, settings, shared, output, references, .. } = outcome;
        let mut report = Report {
            command: command.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            settings: settings.map_err(|source| Error::EncodeReport { source })?,
            inputs: self.inputs,
            references: references.into_iter().map(HashedFile::of).collect(),
            output: output.to_owned(),
            ..Report::default()
        };
        report.enter(outcome.ledger.finish());
        report.explanation = outcome.search.finish()?;
        if report.explanation.is_some() {
            return Ok(report);
        }
        if report.rows_out == 0 {
            return Err(report.none_left());
        }
        if shared.report.is_some() {
            report.hash_files()?;
        }
        outcome.writer.finish()?;
        if let Some(folder) = &shared.report {
            report.write(folder)?;
        }
        report.log();
        Ok(report)
    }
}

/// What a command has at its end.
struct Outcome<'c> {
    command: &'static str,
    settings: serde_json::Result<serde_json::Value>,
    shared: &'c SharedConfig,
    output: &'c Path,
    references: Vec<PathBuf>,
    ledger: Ledger,
    search: Search,
    writer: RowWriter,
}

/// Makes the folder of the report before the work, so that a wrong path costs no time.
fn make_report_folder(folder: Option<&Path>) -> Result<()> {
    match folder {
        None => Ok(()),
        Some(folder) => fs::create_dir_all(folder)
            .map_err(|source| Error::CreateFolder { path: folder.to_owned(), source }),
    }
}

/// Runs the work on so many threads; 0 is one a core.
fn on_threads<T: Send>(threads: usize, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .map_err(|error| Error::Threads { threads, message: error.to_string() })?
        .install(work)
}
