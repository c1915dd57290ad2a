use std::path::{Path, PathBuf};

use super::{Fault, Row};
use crate::Error;
use crate::report::InputFile;

/// So many bad rows of a file are logged one by one.
const LOGGED: u64 = 5;

/// Counts the bad rows of a file and refuses it if there are too many.
pub(crate) struct BadRows {
    path: PathBuf,
    max_share: f64,
    rows: u64,
    bad: u64,
    first: Option<(u64, String)>,
}

impl BadRows {
    pub(crate) fn of(path: &Path, max_share: f64) -> BadRows {
        BadRows { path: path.to_owned(), max_share, rows: 0, bad: 0, first: None }
    }

    /// Counts a row; gives its content.
    pub(crate) fn accept<T>(&mut self, row: Row<T>) -> Result<T, Fault> {
        self.rows += 1;
        if let Err(fault) = &row.content {
            self.bad += 1;
            if self.bad <= LOGGED {
                tracing::warn!("{}: row {} {}", self.path.display(), row.number, fault.0);
            }
            self.first.get_or_insert_with(|| (row.number, fault.0.clone()));
        }
        row.content
    }

    /// What was read, at the end of the file.
    pub(crate) fn finish(self) -> crate::Result<InputFile> {
        let BadRows { path, max_share, rows, bad, first } = self;
        if rows == 0 {
            return Err(Error::NoRows { path });
        }
        match first {
            Some((row, fault)) if bad as f64 > max_share * rows as f64 => {
                Err(Error::BadRows { path, row, fault, bad, rows, max_share })
            }
            _ => Ok(InputFile { path, rows, bad_rows: bad, blake3: None }),
        }
    }
}
