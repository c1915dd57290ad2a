use std::io;
use std::path::PathBuf;

/// What can go wrong before a stage begins, and the clean stop.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A flag is wrong, missing or contradicts another one; exit code 2.
    #[error("{message}")]
    Usage {
        /// What is wrong, and what to write instead.
        message: String,
    },
    /// The configuration file cannot be read; exit code 2.
    #[error("cannot read the configuration file {}", path.display())]
    ReadConfig {
        /// The file given by `--config`.
        path: PathBuf,
        /// Why it cannot be read.
        source: io::Error,
    },
    /// The configuration file has a syntax error, an unknown table or key, or a wrong value; exit
    /// code 2.
    #[error("{}: {message}", path.display())]
    Config {
        /// The file given by `--config`.
        path: PathBuf,
        /// Every problem that was found, with the names of its table and key.
        message: String,
    },
    /// The resolved settings cannot be written as TOML.
    #[error("cannot print the configuration: {message}")]
    PrintConfig {
        /// What the writer said.
        message: String,
    },
    /// A signal asked the process to stop and it did so cleanly; exit code 75.
    #[error("stopped: {message}")]
    Stopped {
        /// What is done and how to continue.
        message: String,
    },
    /// The batch script cannot be told that the job is to go on later.
    #[error("cannot write {}", path.display())]
    Requeue {
        /// The file that it looks for.
        path: PathBuf,
        /// Why it cannot be written.
        source: io::Error,
    },
    /// The program cannot be started anew with other environment variables.
    #[error("cannot start this program again")]
    Restart {
        /// What the system said.
        source: io::Error,
    },
    /// A report cannot be made into a page.
    #[error("cannot make the page of {title}")]
    Page {
        /// The page's title.
        title: String,
        /// What the template engine said.
        source: minijinja::Error,
    },
    /// The handlers of the signals cannot be installed.
    #[error("cannot install the signal handlers")]
    Signals {
        /// What the system said.
        source: io::Error,
    },
}

impl Error {
    /// [`Error::Usage`] with this message.
    pub fn usage(message: impl Into<String>) -> Error {
        Error::Usage { message: message.into() }
    }

    /// [`Error::Stopped`] with this message.
    pub fn stopped(message: impl Into<String>) -> Error {
        Error::Stopped { message: message.into() }
    }
}

/// The result of this crate's functions.
pub type Result<T> = std::result::Result<T, Error>;
