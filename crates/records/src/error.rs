use std::io;
use std::path::{Path, PathBuf};

/// What can go wrong with rows; every variant names its file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file cannot be opened, read, created or renamed, or a line of JSONL is bad.
    #[error(transparent)]
    File(#[from] dromedary_files::Error),
    /// A file ends in the middle of its compression, or is none of its kind.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the decoder said.
        source: io::Error,
    },
    /// A row cannot be written.
    #[error("cannot write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the encoder said.
        source: io::Error,
    },
    /// An element of a JSON array is not a row of the expected kind; those behind it can still be
    /// read.
    #[error("{}, row {row}: {message}", path.display())]
    Row {
        /// The file.
        path: PathBuf,
        /// The row, from 1.
        row: u64,
        /// What is wrong with it.
        message: String,
    },
    /// A file is no JSON array, or ends within one; nothing behind this place can be read.
    #[error("{}, behind row {rows}: {message}", path.display())]
    Array {
        /// The file.
        path: PathBuf,
        /// The rows before this place.
        rows: u64,
        /// What was expected.
        message: String,
    },
    /// Two rows have the same id, so that a result could not be told to be of one or the other.
    #[error("{}: rows {first} and {second} have the same id {id:?}", path.display())]
    SameId {
        /// The file.
        path: PathBuf,
        /// The id.
        id: String,
        /// The row that had it first, from 1.
        first: u64,
        /// The row that has it again.
        second: u64,
    },
}

impl Error {
    /// Whether one row is bad and the next one can be read, so that a caller may count it and go
    /// on.
    pub fn is_bad_row(&self) -> bool {
        matches!(self, Error::Row { .. } | Error::File(dromedary_files::Error::Row { .. }))
    }

    /// What is wrong with a bad row and which one it is, without the name of the file.
    pub fn bad_row(&self) -> String {
        match self {
            Error::Row { row, message, .. } => format!("row {row}: {message}"),
            Error::File(dromedary_files::Error::Row { line, message, .. }) => {
                format!("line {line}: {message}")
            }
            Error::SameId { id, first, second, .. } => {
                format!("rows {first} and {second} have the same id {id:?}")
            }
            error => error.to_string(),
        }
    }

    /// Writers of files give their own error through `io::Write`; it names the path already.
    pub(crate) fn write(path: &Path) -> impl FnOnce(io::Error) -> Error {
        move |error| match error.downcast::<dromedary_files::Error>() {
            Ok(error) => Error::File(error),
            Err(source) => Error::Write { path: path.to_owned(), source },
        }
    }
}

/// The result of this crate's functions.
pub type Result<T> = std::result::Result<T, Error>;
