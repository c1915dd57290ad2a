//! The commands; each file has the flags, the settings and the work of one.

mod aggregate;
mod export;
mod merge;
mod merger;
mod notes;
mod optional;
mod sampler;
mod settings;
mod subsample;

use std::fs;
use std::path::{Path, PathBuf};

use dromedary_command::{Progress, StopFlag};
use dromedary_records::RowWriter;
use rayon::prelude::*;

pub use aggregate::{AggregateArgs, AggregateConfig, aggregate_sharegpt};
pub use export::{ExportArgs, ExportConfig, export_parquet};
pub use merge::{MergeArgs, MergeConfig, clean_and_merge};
pub use optional::{OptionalArgs, OptionalConfig};
pub use settings::{JudgeArgs, JudgeConfig, SharedArgs, SharedConfig};
pub use subsample::{SubsampleArgs, SubsampleConfig, subsample_openorca};

use self::notes::Notes;
use crate::report::{HashedFile, InputFile, Report};
use crate::sources::{BadRows, Fault, RawRow, RawRows, Row, SourceRows};
use crate::{Error, Result};

/// The subcommands, which are also the tables that a configuration file may have.
pub const SUBCOMMANDS: [&str; 4] =
    ["subsample-openorca", "aggregate-sharegpt", "clean-and-merge", "export-parquet"];

/// So many rows are read, then judged by all threads, then admitted in order.
const BATCH: usize = 4096;

/// A batch ends with the row that reaches so many bytes.
const BATCH_BYTES: usize = 8 << 20;

/// How a command is run, apart from what it does.
#[derive(Clone, Debug, Default)]
pub struct Session {
    /// Ends the work without an output when it is set.
    pub stop: StopFlag,
    /// Whether progress is shown.
    pub show_progress: bool,
}

impl Session {
    fn check_stop(&self) -> Result<()> {
        self.stop
            .check(|| "run the command again".to_owned())
            .map_err(|source| Error::Interrupted { source })
    }
}

/// What the commands that judge rows do around their own work.
struct Run<'s> {
    session: &'s Session,
    progress: Progress,
    max_bad_rows: f64,
    inputs: Vec<InputFile>,
    rows_done: u64,
    bytes_done: u64,
    bytes_total: u64,
}

impl<'s> Run<'s> {
    /// A run that will read these files.
    fn new<'f>(
        session: &'s Session,
        max_bad_rows: f64,
        files: impl IntoIterator<Item = &'f PathBuf>,
    ) -> Run<'s> {
        Run {
            session,
            progress: Progress::new(None, "rows", session.show_progress),
            max_bad_rows,
            inputs: Vec::new(),
            rows_done: 0,
            bytes_done: 0,
            bytes_total: files.into_iter().map(|file| bytes_of(file)).sum(),
        }
    }

    /// Judges the rows of a file on all threads, while the next ones are read and the last ones
    /// admitted, in their order; a bad row is admitted with its fault.
    fn read<T: Send + 'static, J: Send>(
        &mut self,
        path: &Path,
        rows: SourceRows<T>,
        judge: impl Fn(T) -> J + Sync,
        mut admit: impl FnMut(std::result::Result<J, Fault>) -> Result<()> + Send,
    ) -> Result<()> {
        let mut bad_rows = BadRows::of(path, self.max_bad_rows);
        let (mut raw, read) = rows.into_parts();
        let judge = |row: RawRow| read(row).map(&judge);
        let mut batch = next_batch(&mut raw)?;
        let mut judged: Vec<Row<J>> = Vec::new();
        while !(batch.is_empty() && judged.is_empty()) {
            self.session.check_stop()?;
            let rows = batch.len() as u64;
            let (admitted, (next, now_judged)) = rayon::join(
                || judged.into_iter().try_for_each(|row| admit(bad_rows.accept(row))),
                || {
                    rayon::join(
                        || next_batch(&mut raw),
                        || batch.into_par_iter().map(&judge).collect(),
                    )
                },
            );
            admitted?;
            self.show(rows, path, raw.share());
            (batch, judged) = (next?, now_judged);
        }
        self.inputs.push(bad_rows.finish()?);
        self.bytes_done += bytes_of(path);
        Ok(())
    }

    /// Shows that `rows` more are done, and how many there may be in all: what is left of the files
    /// is taken to be like what was read.
    fn show(&mut self, rows: u64, path: &Path, share: f64) {
        self.rows_done += rows;
        self.progress.inc(rows);
        let bytes = self.bytes_done as f64 + share * bytes_of(path) as f64;
        if bytes > 0.0 {
            let total = self.rows_done as f64 * (self.bytes_total as f64 / bytes).max(1.0);
            self.progress.set_total(total as u64);
        }
    }

    /// Everything is read, and so many prompts wait to be written.
    fn begin_writing(&mut self, prompts: u64) {
        self.progress.finish();
        self.progress = Progress::new(Some(prompts), "prompts", self.session.show_progress);
    }

    /// So many more that waited are written or left out.
    fn wrote(&self, prompts: usize) -> Result<()> {
        self.progress.inc(prompts as u64);
        self.session.check_stop()
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
        report.enter(outcome.notes.ledger.finish());
        report.explanation = outcome.notes.search.finish()?;
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

/// So many rows that all threads have work, and so few that their texts take little memory.
fn next_batch(rows: &mut RawRows) -> Result<Vec<RawRow>> {
    let mut bytes = 0;
    let mut batch = Vec::new();
    while batch.len() < BATCH && bytes < BATCH_BYTES {
        let Some(row) = rows.next().transpose()? else { break };
        bytes += row.bytes();
        batch.push(row);
    }
    Ok(batch)
}

/// 0 for a pipe.
fn bytes_of(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |metadata| metadata.len())
}

/// What a command has at its end.
struct Outcome<'c> {
    command: &'static str,
    settings: serde_json::Result<serde_json::Value>,
    shared: &'c SharedConfig,
    output: &'c Path,
    references: Vec<PathBuf>,
    notes: Notes,
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
