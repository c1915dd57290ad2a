//! Where a file really goes, and how its name becomes durable.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// The path behind symbolic links: a rename would replace the link and not its target.
pub(crate) fn resolved(path: &Path) -> Result<PathBuf> {
    match fs::canonicalize(path) {
        Ok(resolved) => Ok(resolved),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(path.to_owned()),
        Err(source) => Err(Error::Write { path: path.to_owned(), source }),
    }
}

/// The folder of a path, created where it does not exist.
pub(crate) fn existing_parent(path: &Path) -> Result<PathBuf> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    fs::create_dir_all(&parent).map_err(Error::write(&parent))?;
    Ok(parent)
}

/// A temporary sibling's name: hidden, tells its target, and says what it is when a killed
/// process leaves it behind.
pub(crate) fn temp_prefix(path: &Path) -> Result<String> {
    let name = path.file_name().ok_or_else(|| Error::Write {
        path: path.to_owned(),
        source: io::Error::new(io::ErrorKind::InvalidInput, "the path has no file name"),
    })?;
    Ok(format!(".{}.", name.to_string_lossy()))
}

pub(crate) const TEMP_SUFFIX: &str = ".tmp";

/// Makes renames within a folder survive a power cut.
pub(crate) fn sync_dir(folder: &Path) -> io::Result<()> {
    match File::open(folder)?.sync_all() {
        // Some network file systems cannot, and need not, sync a folder.
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()),
        result => result,
    }
}
