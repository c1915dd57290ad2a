use std::fs::Permissions;
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use crate::durable::{TEMP_SUFFIX, existing_parent, resolved, sync_dir, temp_prefix};
use crate::{Error, Result};

/// Checkpoints and parquet rows arrive in large pieces, JSON in small ones.
const BUFFER_BYTES: usize = 1 << 18;

/// A file that appears under its name whole, or not at all.
///
/// What is written goes to a hidden sibling; [`commit`](AtomicFile::commit) makes it durable and
/// renames it. Dropped before that, the sibling is removed and an older file stays as it was.
///
/// ```
/// use std::io::Write;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let folder = tempfile::tempdir()?;
/// let path = folder.path().join("rows.json");
/// let mut file = dromedary_files::AtomicFile::create(&path)?;
/// writeln!(file, "[]")?;
/// assert!(!path.exists());
/// file.commit()?;
/// assert!(path.exists());
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct AtomicFile {
    path: PathBuf,
    folder: PathBuf,
    writer: BufWriter<NamedTempFile>,
}

impl AtomicFile {
    /// Begins a file at `path`, in a folder that is created where it does not exist.
    ///
    /// A symbolic link is followed; the file behind it is replaced.
    ///
    /// # Errors
    /// [`Error::Write`] where the folder cannot be written to, [`Error::WrongKind`] where `path`
    /// is a folder or a device.
    pub fn create(path: impl AsRef<Path>) -> Result<AtomicFile> {
        let path = resolved(path.as_ref())?;
        if path.exists() && !path.is_file() {
            return Err(Error::WrongKind { path, expected: "file" });
        }
        let prefix = temp_prefix(&path)?;
        let folder = existing_parent(&path)?;
        let file = tempfile::Builder::new()
            .prefix(&prefix)
            .suffix(TEMP_SUFFIX)
            // As an ordinary new file: the umask takes its part, others may read results.
            .permissions(Permissions::from_mode(0o666))
            .tempfile_in(&folder)
            .map_err(Error::write(&path))?;
        Ok(AtomicFile { path, folder, writer: BufWriter::with_capacity(BUFFER_BYTES, file) })
    }

    /// Where the file will appear.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Flushes, syncs and renames; only then the path names the new content.
    ///
    /// # Errors
    /// [`Error::Write`]; the temporary file is removed and an older file stays as it was.
    pub fn commit(self) -> Result<()> {
        let AtomicFile { path, folder, writer } = self;
        let publish = || {
            let file = writer.into_inner().map_err(io::IntoInnerError::into_error)?;
            file.as_file().sync_all()?;
            file.persist(&path).map_err(|error| error.error)?;
            sync_dir(&folder)
        };
        publish().map_err(Error::write(&path))
    }
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.writer.write(bytes).map_err(|source| Error::write(&self.path)(source).into_io())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.writer.flush().map_err(|source| Error::write(&self.path)(source).into_io())
    }
}

/// Writes a whole file: afterwards `path` holds `bytes`, or what it held before.
///
/// # Errors
/// As [`AtomicFile::create`] and [`AtomicFile::commit`].
pub fn write_atomic(path: impl AsRef<Path>, bytes: &[u8]) -> Result<()> {
    let mut file = AtomicFile::create(path)?;
    file.writer.write_all(bytes).map_err(Error::write(&file.path))?;
    file.commit()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::fs;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn nothing_appears_before_commit_and_nothing_stays_without() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        write_atomic(&path, b"old").unwrap();
        let mut file = AtomicFile::create(&path).unwrap();
        file.write_all(b"new").unwrap();
        file.flush().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names(folder.path()).len(), 2);
        drop(file);
        assert_eq!(names(folder.path()), ["a.json"]);
        assert_eq!(fs::read(&path).unwrap(), b"old");
    }

    #[test]
    fn two_writers_of_one_path_do_not_mix() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        let mut one = AtomicFile::create(&path).unwrap();
        let mut two = AtomicFile::create(&path).unwrap();
        one.write_all(b"one").unwrap();
        two.write_all(b"two").unwrap();
        two.commit().unwrap();
        one.commit().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"one");
        assert_eq!(names(folder.path()), ["a"]);
    }

    #[test]
    fn missing_folders_are_made() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("runs/1/a");
        write_atomic(&path, b"x").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"x");
    }

    #[test]
    fn a_link_stays_a_link() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("target");
        let link = folder.path().join("link");
        write_atomic(&target, b"old").unwrap();
        std::os::unix::fs::symlink(&target, &link).unwrap();
        write_atomic(&link, b"new").unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"new");
        assert!(link.is_symlink());
    }

    #[test]
    fn devices_and_folders_are_refused() {
        for path in ["/dev/null", "/"] {
            let error = write_atomic(path, b"x").unwrap_err();
            assert!(matches!(error, Error::WrongKind { .. }), "{error}");
            assert!(error.to_string().contains(path), "{error}");
        }
    }

    #[test]
    fn a_result_may_be_read_by_others() {
        let folder = tempfile::tempdir().unwrap();
        let (ours, plain) = (folder.path().join("ours"), folder.path().join("plain"));
        write_atomic(&ours, b"").unwrap();
        fs::write(&plain, b"").unwrap();
        let mode = |path| fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode(&ours), mode(&plain));
    }

    #[test]
    fn errors_of_the_writer_name_the_path() {
        let source = io::Error::from(io::ErrorKind::StorageFull);
        let error = Error::write("/x/rows.json")(source).into_io();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        assert!(error.to_string().contains("/x/rows.json"));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn what_is_written_in_pieces_is_read_whole(
            pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..100_000), 0..5)
        ) {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("x");
            let mut file = AtomicFile::create(&path).unwrap();
            for piece in &pieces {
                file.write_all(piece).unwrap();
            }
            file.commit().unwrap();
            prop_assert_eq!(fs::read(&path).unwrap(), pieces.concat());
        }
    }
}
