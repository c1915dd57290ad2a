use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;
use tempfile::TempDir;

use crate::durable::{TEMP_SUFFIX, existing_parent, resolved, sync_dir, temp_prefix};
use crate::manifest::MANIFEST_NAME;
use crate::{Error, Manifest, Result, write_atomic};

/// A folder that appears under its name whole, or not at all.
///
/// Files are written below [`path`](AtomicDir::path), a hidden sibling; [`commit`](AtomicDir::commit)
/// writes the manifest last, makes all durable and renames the folder. Dropped before that, the
/// sibling is removed. A folder that exists under its name is complete.
///
/// ```
/// use dromedary_files::{AtomicDir, Manifest};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let folder = tempfile::tempdir()?;
/// # let target = folder.path().join("adapter");
/// let adapter = AtomicDir::create(&target)?;
/// std::fs::write(adapter.path().join("weights.bin"), [0; 16])?;
/// let manifest = Manifest::of_dir(adapter.path())?;
/// adapter.commit(&manifest)?;
///
/// Manifest::read(&target)?.verify(&target)?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct AtomicDir {
    target: PathBuf,
    parent: PathBuf,
    temp: TempDir,
    replace: bool,
}

/// An [`AtomicDir`] with its manifest: a rename away from its target. Dropped, it is removed.
#[derive(Debug)]
#[must_use = "dropped, the folder is removed"]
pub struct SealedDir {
    dir: AtomicDir,
}

impl SealedDir {
    /// The second half of [`AtomicDir::commit`]: the folder appears under its name.
    ///
    /// # Errors
    /// [`Error::Exists`] where another process was faster, [`Error::Write`]; the temporary folder
    /// is removed and an older target stays as it was.
    pub fn publish(self) -> Result<()> {
        let Self { dir } = self;
        if dir.replace {
            dir.publish_over_old().map_err(Error::write(&dir.target))?;
        } else {
            dir.publish_new()?;
        }
        sync_dir(&dir.parent).map_err(Error::write(&dir.target))
    }
}

impl AtomicDir {
    /// Begins a folder at `path`; missing folders above it are created.
    ///
    /// # Errors
    /// [`Error::Exists`] where the target exists and is not empty, [`Error::WrongKind`] where it
    /// is no folder, [`Error::Write`] where the folder above cannot be written to.
    pub fn create(path: impl AsRef<Path>) -> Result<AtomicDir> {
        AtomicDir::begin(path.as_ref(), false)
    }

    /// As [`create`](AtomicDir::create), and an older folder is replaced by `commit`.
    ///
    /// # Errors
    /// As [`create`](AtomicDir::create), except [`Error::Exists`].
    pub fn replace_existing(path: impl AsRef<Path>) -> Result<AtomicDir> {
        AtomicDir::begin(path.as_ref(), true)
    }

    /// Removes what killed processes have left in `folder` of targets whose names begin with `name`, once
    /// nothing was written to it for `unused`, which must be far more than a living one pauses. Other
    /// processes may do the same at the same time.
    ///
    /// # Errors
    /// [`Error::Read`] where `folder` cannot be listed. What cannot be removed is left.
    pub fn remove_abandoned(folder: impl AsRef<Path>, name: &str, unused: Duration) -> Result<()> {
        let folder = folder.as_ref();
        let read = |source| Error::Read { path: folder.to_owned(), source };
        let hidden = format!(".{name}");
        for entry in fs::read_dir(folder).map_err(read)? {
            let entry = entry.map_err(read)?;
            let of_kind = entry
                .file_name()
                .to_str()
                .is_some_and(|name| name.starts_with(&hidden) && name.ends_with(TEMP_SUFFIX));
            let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
            // An error is a folder that its owner has just published or removed.
            if of_kind
                && is_dir
                && last_write(&entry.path())
                    .is_ok_and(|at| at.elapsed().is_ok_and(|age| age > unused))
            {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
        Ok(())
    }

    fn begin(path: &Path, replace: bool) -> Result<AtomicDir> {
        let target = resolved(path)?;
        let prefix = temp_prefix(&target)?;
        if target.exists() && !target.is_dir() {
            return Err(Error::WrongKind { path: target, expected: "folder" });
        }
        if !replace && !is_absent_or_empty(&target)? {
            return Err(Error::Exists { path: target });
        }
        let parent = existing_parent(&target)?;
        let temp = tempfile::Builder::new()
            .prefix(&prefix)
            .suffix(TEMP_SUFFIX)
            .permissions(Permissions::from_mode(0o777))
            .tempdir_in(&parent)
            .map_err(Error::write(&target))?;
        Ok(AtomicDir { target, parent, temp, replace })
    }

    /// The temporary folder to write to.
    pub fn path(&self) -> &Path {
        self.temp.path()
    }

    /// Where the folder will appear.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Writes the manifest, syncs every file and renames the folder to its target.
    ///
    /// # Errors
    /// [`Error::Damaged`] where the files are not those of the manifest, [`Error::Exists`] where
    /// another process was faster, [`Error::Write`]; the temporary folder is removed and an older
    /// target stays as it was.
    pub fn commit(self, manifest: &Manifest) -> Result<()> {
        self.seal(manifest)?.publish()
    }

    /// The first half of [`commit`](AtomicDir::commit): all is durable, and not yet at its target.
    ///
    /// # Errors
    /// As [`commit`](AtomicDir::commit).
    pub fn seal(self, manifest: &Manifest) -> Result<SealedDir> {
        manifest.verify_sizes(self.path())?;
        let mut bytes = serde_json::to_vec_pretty(manifest)
            .map_err(|source| Error::Encode { path: self.target.join(MANIFEST_NAME), source })?;
        bytes.push(b'\n');
        sync_tree(self.path()).map_err(Error::write(&self.target))?;
        write_atomic(self.path().join(MANIFEST_NAME), &bytes)?;
        Ok(SealedDir { dir: self })
    }

    fn publish_new(&self) -> Result<()> {
        // A plain rename takes the place of an empty folder and fails on any other.
        match fs::rename(self.path(), &self.target) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {
                Err(Error::Exists { path: self.target.clone() })
            }
            Err(source) => Err(Error::Write { path: self.target.clone(), source }),
        }
    }

    /// Old and new change places in one step, so that the target exists at every moment; the old
    /// one, now under the temporary name, goes when `self` is dropped.
    fn publish_over_old(&self) -> io::Result<()> {
        match renameat_with(CWD, self.path(), CWD, &self.target, RenameFlags::EXCHANGE) {
            Ok(()) => Ok(()),
            Err(Errno::NOENT) => fs::rename(self.path(), &self.target),
            // The file system (NFS, some Lustre) cannot exchange.
            Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => self.publish_in_two_steps(),
            Err(error) => Err(error.into()),
        }
    }

    fn publish_in_two_steps(&self) -> io::Result<()> {
        let mut trash = self.path().as_os_str().to_owned();
        trash.push(".trash");
        fs::rename(&self.target, &trash)?;
        if let Err(error) = fs::rename(self.path(), &self.target) {
            fs::rename(&trash, &self.target)?;
            return Err(error);
        }
        fs::remove_dir_all(&trash)
    }
}

/// When something in the folder was last written.
fn last_write(folder: &Path) -> io::Result<SystemTime> {
    let mut last = fs::symlink_metadata(folder)?.modified()?;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let at = if entry.file_type()?.is_dir() {
            last_write(&entry.path())?
        } else {
            entry.metadata()?.modified()?
        };
        last = last.max(at);
    }
    Ok(last)
}

fn is_absent_or_empty(path: &Path) -> Result<bool> {
    match fs::read_dir(path) {
        Ok(mut entries) => Ok(entries.next().is_none()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
        Err(source) => Err(Error::Read { path: path.to_owned(), source }),
    }
}

fn sync_tree(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            sync_tree(&path)?;
        } else {
            File::open(&path)?.sync_all()?;
        }
    }
    sync_dir(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(dir: &AtomicDir, name: &str, content: &str) {
        fs::write(dir.path().join(name), content).unwrap();
    }

    fn commit(dir: AtomicDir) -> Result<()> {
        let manifest = Manifest::of_dir(dir.path()).unwrap();
        dir.commit(&manifest)
    }

    fn entries(folder: &Path) -> usize {
        fs::read_dir(folder).unwrap().count()
    }

    #[test]
    fn what_killed_processes_left_goes_once_it_is_old() {
        let hours = |hours: u64| Duration::from_secs(hours * 3600);
        let folder = tempfile::tempdir().unwrap();
        // A folder and a file in it, as old as this.
        let left = |name: &str, [dir, file]: [u64; 2]| {
            let path = folder.path().join(name);
            fs::create_dir(&path).unwrap();
            fs::write(path.join("weights"), "1").unwrap();
            for (path, age) in [(path.join("weights"), file), (path.clone(), dir)] {
                File::open(path).unwrap().set_modified(SystemTime::now() - hours(age)).unwrap();
            }
        };
        left(".prefix-one.abc.tmp", [7, 7]);
        left(".prefix-two.abc.tmp", [7, 7]);
        let kept = [
            (".prefix-three.abc.tmp", [7, 0]), // is being written
            (".prefix-four.abc.tmp", [0, 7]),
            (".other.abc.tmp", [7, 7]),
            ("prefix-five", [7, 7]),
        ];
        kept.iter().for_each(|(name, ages)| left(name, *ages));
        fs::write(folder.path().join(".prefix-six.tmp"), "a file").unwrap();
        AtomicDir::remove_abandoned(folder.path(), "prefix-", hours(6)).unwrap();
        assert_eq!(entries(folder.path()), kept.len() + 1);
        assert!(kept.iter().all(|(name, _)| folder.path().join(name).join("weights").exists()));
    }

    #[test]
    fn appears_whole_with_its_manifest() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("runs/x");
        let dir = AtomicDir::create(&target).unwrap();
        write(&dir, "a", "1");
        assert!(!target.exists());
        commit(dir).unwrap();
        Manifest::read(&target).unwrap().verify(&target).unwrap();
        assert_eq!(entries(target.parent().unwrap()), 1);
    }

    #[test]
    fn dropped_it_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let dir = AtomicDir::create(folder.path().join("x")).unwrap();
        write(&dir, "a", "1");
        drop(dir);
        assert_eq!(entries(folder.path()), 0);
    }

    #[test]
    fn an_existing_folder_is_an_error_before_any_work() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("x");
        fs::create_dir(&target).unwrap();
        commit(AtomicDir::create(&target).unwrap()).unwrap();
        let error = AtomicDir::create(&target).unwrap_err();
        assert!(matches!(error, Error::Exists { .. }), "{error}");
    }

    #[test]
    fn the_slower_of_two_writers_gets_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("x");
        let (one, two) = (AtomicDir::create(&target).unwrap(), AtomicDir::create(&target).unwrap());
        write(&one, "a", "1");
        commit(one).unwrap();
        let error = commit(two).unwrap_err();
        assert!(matches!(error, Error::Exists { .. }), "{error}");
        assert_eq!(entries(folder.path()), 1);
        assert_eq!(fs::read_to_string(target.join("a")).unwrap(), "1");
    }

    #[test]
    fn replacing_leaves_the_new_one_alone() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("x");
        for (name, content) in [("a", "1"), ("b", "2")] {
            let dir = AtomicDir::replace_existing(&target).unwrap();
            write(&dir, name, content);
            commit(dir).unwrap();
        }
        assert!(!target.join("a").exists());
        assert_eq!(fs::read_to_string(target.join("b")).unwrap(), "2");
        assert_eq!(entries(folder.path()), 1);
    }

    #[test]
    fn two_steps_do_what_the_exchange_does() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("x");
        fs::create_dir(&target).unwrap();
        fs::write(target.join("a"), "old").unwrap();
        let dir = AtomicDir::replace_existing(&target).unwrap();
        write(&dir, "a", "new");
        dir.publish_in_two_steps().unwrap();
        drop(dir);
        assert_eq!(fs::read_to_string(target.join("a")).unwrap(), "new");
        assert_eq!(entries(folder.path()), 1);
    }

    #[test]
    fn a_manifest_of_other_files_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let dir = AtomicDir::create(folder.path().join("x")).unwrap();
        write(&dir, "a", "1");
        let manifest = Manifest::of_dir(dir.path()).unwrap();
        write(&dir, "a", "12");
        let error = dir.commit(&manifest).unwrap_err();
        assert!(error.to_string().contains("expected 1 bytes, got 2"), "{error}");
        assert_eq!(entries(folder.path()), 0);
    }

    #[test]
    fn a_file_in_the_way_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("x");
        fs::write(&target, "").unwrap();
        let error = AtomicDir::replace_existing(&target).unwrap_err();
        assert!(matches!(error, Error::WrongKind { .. }), "{error}");
    }
}
