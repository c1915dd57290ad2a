use std::io;
use std::path::PathBuf;

use crate::Holder;

/// What can go wrong with a file; every variant names its path.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or folder cannot be opened or read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file or folder cannot be created, written or renamed: full disk, quota, read-only folder.
    /// Nothing appeared under this path and what was there before is intact.
    #[error("cannot write {}", path.display())]
    Write {
        /// The file or folder that was to be written.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The target of an atomic write is something that a rename would destroy, such as a device
    /// or, for a file, a folder.
    #[error("cannot write {}: it is not a regular {expected}", path.display())]
    WrongKind {
        /// The target.
        path: PathBuf,
        /// What the target would have to be.
        expected: &'static str,
    },
    /// A folder is to be created where there already is one with content.
    #[error("{} already exists and is not empty", path.display())]
    Exists {
        /// The folder.
        path: PathBuf,
    },
    /// A value cannot be written as JSON.
    #[error("cannot write a row of {} as JSON", path.display())]
    Encode {
        /// The file that was to take the value.
        path: PathBuf,
        /// What the writer said.
        source: serde_json::Error,
    },
    /// A line is not valid JSON, or not a row of the expected kind; the lines behind it can still
    /// be read.
    #[error("{}, line {line}: {message}", path.display())]
    Row {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: u64,
        /// What is wrong with it.
        message: String,
    },
    /// The last line has no end and is not whole: its writer was killed.
    #[error("{}, line {line}: the last line is cut off", path.display())]
    TornTail {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: u64,
    },
    /// A file to append to holds something else than JSON objects, one a line.
    #[error("{} is not a JSONL file: {message}; nothing was changed", path.display())]
    NotJsonl {
        /// The file.
        path: PathBuf,
        /// What was found instead.
        message: String,
    },
    /// A file differs from its entry in the manifest, is missing, or the manifest itself is wrong.
    #[error("{} is damaged: {message}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Expected and found.
        message: String,
    },
    /// Another job works on this output.
    #[error(
        "{} is in use: {} holds {holder}; {reason}; if that job is dead for certain, give --break-lock",
        output.display(), lock.display()
    )]
    Locked {
        /// The output.
        output: PathBuf,
        /// The lock file.
        lock: PathBuf,
        /// Who holds it.
        holder: Box<Holder>,
        /// Why it was not taken over.
        reason: String,
    },
    /// A lock file exists and cannot be understood.
    #[error("the lock {} is unreadable ({message}); if no job uses it, give --break-lock",
        path.display())]
    BadLock {
        /// The lock file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// Another job took this lock over, so that this one must not write any more.
    #[error("the lock {} was taken over by {new_holder}", path.display())]
    LockLost {
        /// The lock file.
        path: PathBuf,
        /// Who has it now.
        new_holder: String,
    },
}

impl Error {
    pub(crate) fn read(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Error {
        let path = path.into();
        move |source| Error::Read { path, source }
    }

    pub(crate) fn write(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Error {
        let path = path.into();
        move |source| Error::Write { path, source }
    }

    /// For `io::Write`, whose callers would otherwise see "no space left" without a path.
    pub(crate) fn into_io(self) -> io::Error {
        let kind = match &self {
            Error::Read { source, .. } | Error::Write { source, .. } => source.kind(),
            _ => io::ErrorKind::Other,
        };
        io::Error::new(kind, self)
    }
}

/// The result of this crate's functions.
pub type Result<T> = std::result::Result<T, Error>;
