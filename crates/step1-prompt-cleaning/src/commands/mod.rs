//! The three commands; each file has the flags, the settings and the work of one.

mod aggregate;
mod merge;
mod settings;
mod subsample;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use dromedary_command::{Progress, StopFlag};
use dromedary_records::RowWriter;
use rayon::prelude::*;
use serde::Serialize;

pub use aggregate::{AggregateArgs, AggregateConfig, aggregate_sharegpt};
pub use merge::{MergeArgs, MergeConfig, clean_and_merge};
pub use settings::{JudgeArgs, JudgeConfig, SharedArgs, SharedConfig};
pub use subsample::{SubsampleArgs, SubsampleConfig, subsample_openorca};

use crate::report::{InputFile, Report, SourceCounts};
use crate::sources::{BadRows, Row};
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
    /// as `None`.
    fn read<T: Send, J: Send>(
        &mut self,
        path: &Path,
        mut rows: impl Iterator<Item = Result<Row<T>>>,
        judge: impl Fn(T) -> J + Sync,
        mut admit: impl FnMut(Option<J>) -> Result<()>,
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
            let contents: Vec<Option<T>> =
                batch.into_iter().map(|row| bad_rows.accept(row)).collect();
            let judged: Vec<Option<J>> =
                contents.into_par_iter().map(|content| content.map(&judge)).collect();
            judged.into_iter().try_for_each(&mut admit)?;
        }
    }

    /// The report of the command, where at least one row is left.
    fn report(
        self,
        command: &str,
        settings: &impl Serialize,
        output: &Path,
        sources: BTreeMap<String, SourceCounts>,
    ) -> Result<Report> {
        self.progress.finish();
        let rows_out = sources.values().map(|counts| counts.kept).sum();
        let report = Report {
            command: command.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            settings: serde_json::to_value(settings)
                .map_err(|source| Error::EncodeReport { source })?,
            inputs: self.inputs,
            output: output.to_owned(),
            rows_out,
            sources,
        };
        if rows_out > 0 { Ok(report) } else { Err(report.none_left()) }
    }
}

/// Lets the rows and the report appear.
fn publish(report: Report, writer: RowWriter, folder: Option<&Path>) -> Result<Report> {
    writer.finish()?;
    if let Some(folder) = folder {
        report.write(folder)?;
    }
    report.log();
    Ok(report)
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
