use std::io;
use std::path::PathBuf;

/// What can go wrong in step 1.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file cannot be opened.
    #[error("cannot open {}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A parquet file is damaged or uses an encoding that is not known here.
    #[error("cannot read {}", path.display())]
    Parquet {
        /// The file.
        path: PathBuf,
        /// What the reader said.
        source: polars::error::PolarsError,
    },
    /// A parquet file cannot be written.
    #[error("cannot write {}", path.display())]
    WriteParquet {
        /// The file.
        path: PathBuf,
        /// What the writer said.
        source: polars::error::PolarsError,
    },
    /// A parquet file contradicts itself, or is made to break what reads it.
    #[error("{} is damaged: {message}", path.display())]
    DamagedParquet {
        /// The file.
        path: PathBuf,
        /// What cannot be.
        message: String,
    },
    /// A parquet file lacks a column.
    #[error("{}: there is no column `{column}`, only {}", path.display(), found.join(", "))]
    MissingColumn {
        /// The file.
        path: PathBuf,
        /// The column that is needed.
        column: String,
        /// The columns that exist.
        found: Vec<String>,
    },
    /// A file of lists cannot be used.
    #[error("{}: {message}", path.display())]
    Lists {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// A file has no rows.
    #[error("{}: the file has no rows", path.display())]
    NoRows {
        /// The file.
        path: PathBuf,
    },
    /// A file has too many rows that cannot be read.
    #[error(
        "{}: row {row} {fault} ({bad} of {rows} rows are bad, tolerated is a share of {max_share}: \
         --max-bad-rows)",
        path.display()
    )]
    BadRows {
        /// The file.
        path: PathBuf,
        /// The number of the first bad row, from 1.
        row: u64,
        /// What is wrong with it.
        fault: String,
        /// The number of bad rows.
        bad: u64,
        /// The number of all rows.
        rows: u64,
        /// The share of bad rows that would have been tolerated.
        max_share: f64,
    },
    /// No row survives the rules, so there is nothing to write.
    #[error("no row is left of {rows} ({dropped}); {} is not written", output.display())]
    NoneLeft {
        /// The number of rows read.
        rows: u64,
        /// How many were dropped for which reason.
        dropped: String,
        /// The file that was asked for.
        output: PathBuf,
    },
    /// Rows that do not fit into memory cannot be put aside on disk.
    #[error("cannot use a temporary file in {}", folder.display())]
    Spill {
        /// The folder of the temporary file.
        folder: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The folder of the report cannot be made.
    #[error("cannot create the folder {}", path.display())]
    CreateFolder {
        /// The folder.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The report cannot be written as JSON.
    #[error("cannot encode the report")]
    EncodeReport {
        /// What the writer said.
        source: serde_json::Error,
    },
    /// The report cannot be made into a page.
    #[error("cannot make the page of the report")]
    Page {
        /// Why not.
        source: dromedary_command::Error,
    },
    /// `--explain` names a row that is not there.
    #[error(
        "no row is {name:?}: --explain takes SOURCE:NUMBER, as in a report, or the id of a row"
    )]
    NoSuchRow {
        /// The name.
        name: String,
    },
    /// `--languages` names a language that the detector does not know.
    #[error("no language is {code:?}; known are {}", known.join(", "))]
    UnknownLanguage {
        /// The code.
        code: String,
        /// Those in the lists.
        known: Vec<String>,
    },
    /// A benchmark for `--decontaminate` is no JSON, though its name says so.
    #[error("cannot read {}", path.display())]
    BenchmarkJson {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// A file for `--decontaminate` has nothing to compare with.
    #[error("{}: no text of three words or more", path.display())]
    NoBenchmark {
        /// The file.
        path: PathBuf,
    },
    /// More prompts than near-duplicates can be found among.
    #[error("--near-duplicates takes up to {max} prompts")]
    TooManyPrompts {
        /// The most that it takes.
        max: usize,
    },
    /// The threads cannot be started.
    #[error("cannot start {threads} threads: {message}")]
    Threads {
        /// The number asked for; 0 is one a core.
        threads: usize,
        /// Why not.
        message: String,
    },
    /// A signal ended the work; nothing was written.
    #[error("the prompts are not written")]
    Interrupted {
        /// The clean stop.
        source: dromedary_command::Error,
    },
    /// A file of rows cannot be read or written.
    #[error(transparent)]
    Records(#[from] dromedary_records::Error),
    /// A file cannot be written.
    #[error(transparent)]
    Files(#[from] dromedary_files::Error),
    /// The tokenizer cannot be read.
    #[error(transparent)]
    Tokenizer(#[from] dromedary_tokenizer::Error),
}

/// The result of this crate's functions.
pub type Result<T> = std::result::Result<T, Error>;
