//! The per-user cache: what is downloaded or converted once and used by every checkout.
//!
//! A folder in the cache is published by a rename, so one that exists is complete. Whoever makes
//! one holds its lock; a second process waits and then finds it.

use std::{
    env, fs,
    fs::{File, TryLockError},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use tempfile::TempDir;

use crate::terminal::say;

/// The cache folder.
#[derive(Debug, Clone)]
pub struct Cache {
    root: PathBuf,
}

/// Held while something in the cache is made; it ends with the process at the latest.
#[derive(Debug)]
pub struct Lock<'a> {
    cache: &'a Cache,
    name: &'a str,
    _file: File,
}

impl Lock<'_> {
    /// The cache that the thing is made for.
    pub fn cache(&self) -> &Cache {
        self.cache
    }

    /// A new folder for making the thing, on the file system of its final place; removed when
    /// dropped, or by the next holder of the lock.
    pub fn stage(&self) -> Result<TempDir> {
        let stages = self.cache.folder("unfinished")?;
        tempfile::Builder::new()
            .prefix(&format!("{}-", self.name))
            .tempdir_in(&stages)
            .with_context(|| format!("cannot write in {}", stages.display()))
    }
}

impl Cache {
    /// `$DROMEDARY_CACHE`, else `dromedary` in the user's cache folder.
    pub fn of_user() -> Result<Self> {
        let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty());
        let root = set("DROMEDARY_CACHE")
            .map(PathBuf::from)
            .or_else(|| set("XDG_CACHE_HOME").map(|base| Path::new(&base).join("dromedary")))
            .or_else(|| set("HOME").map(|home| Path::new(&home).join(".cache/dromedary")))
            .context("neither HOME nor DROMEDARY_CACHE is set: where may the cache be?")?;
        let root = std::path::absolute(root)?;
        Ok(Self::at(root))
    }

    /// A cache in `root`, which is made when something is put there.
    pub fn at(root: PathBuf) -> Self {
        Self { root }
    }

    /// The path of `name` in the cache.
    pub fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// Waits for the lock `name`, and removes what interrupted processes left of its making.
    pub fn lock<'a>(&'a self, name: &'a str) -> Result<Lock<'a>> {
        let locks = self.folder("locks")?;
        let path = locks.join(format!("{name}.lock"));
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .with_context(|| format!("cannot write {}", path.display()))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                say!("another process makes {name}: waiting for it");
                file.lock().with_context(|| format!("cannot lock {}", path.display()))?;
            }
            // Some network file systems have no locks. Publishing by rename keeps even two makers
            // apart; they only do the work twice.
            Err(TryLockError::Error(error)) => {
                say!("no locks in {} ({error}): do not run two setups at once", locks.display());
                return Ok(Lock { cache: self, name, _file: file });
            }
        }
        self.remove_leftovers(name)?;
        Ok(Lock { cache: self, name, _file: file })
    }

    /// Moves a finished folder to its place in the cache, all of it on disk before its name is.
    pub fn publish(&self, stage: &Path, name: &str) -> Result<PathBuf> {
        let target = self.path(name);
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent)
                .with_context(|| format!("cannot make {}", parent.display()))?;
        }
        rustix::fs::syncfs(File::open(stage)?)
            .with_context(|| format!("cannot write {} to disk", stage.display()))?;
        // Only an incomplete folder can stand there: a complete one is never made again.
        if target.exists() {
            fs::remove_dir_all(&target)
                .with_context(|| format!("cannot remove the damaged {}", target.display()))?;
        }
        fs::rename(stage, &target)
            .with_context(|| format!("cannot move {} to {}", stage.display(), target.display()))?;
        Ok(target)
    }

    /// Fails early, by name, where `bytes` would not fit.
    pub fn need_space(&self, bytes: u64, what: &str) -> Result<()> {
        fs::create_dir_all(&self.root)
            .with_context(|| format!("cannot make the cache {}", self.root.display()))?;
        let system = rustix::fs::statvfs(&self.root)
            .with_context(|| format!("cannot read {}", self.root.display()))?;
        check_space(system.f_bavail.saturating_mul(system.f_frsize), bytes, what, &self.root)
    }

    /// The folder `name` in the cache, made if need be.
    pub fn folder(&self, name: &str) -> Result<PathBuf> {
        let folder = self.path(name);
        fs::create_dir_all(&folder).with_context(|| {
            format!("cannot make {} (set DROMEDARY_CACHE for another place)", folder.display())
        })?;
        ensure!(folder.is_dir(), "{} is no folder", folder.display());
        Ok(folder)
    }

    fn remove_leftovers(&self, name: &str) -> Result<()> {
        let stages = self.folder("unfinished")?;
        for entry in fs::read_dir(&stages)? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(&format!("{name}-")) {
                fs::remove_dir_all(entry.path()).with_context(|| {
                    format!("cannot remove the unfinished {}", entry.path().display())
                })?;
            }
        }
        Ok(())
    }
}

fn check_space(free: u64, needed: u64, what: &str, folder: &Path) -> Result<()> {
    const MIB: u64 = 1 << 20;
    if free < needed {
        bail!(
            "{what} needs {} MiB and {} has {} MiB free (set DROMEDARY_CACHE for another place)",
            needed / MIB,
            folder.display(),
            free / MIB
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, thread, time::Duration};

    use super::*;

    #[test]
    fn the_second_waits_for_the_first() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path().to_path_buf());
        let lock = cache.lock("thing").unwrap();
        let (sender, receiver) = mpsc::channel();
        let second = {
            let cache = cache.clone();
            thread::spawn(move || {
                let _lock = cache.lock("thing").unwrap();
                sender.send(()).unwrap();
            })
        };
        assert!(receiver.recv_timeout(Duration::from_millis(200)).is_err());
        drop(lock);
        receiver.recv_timeout(Duration::from_secs(20)).unwrap();
        second.join().unwrap();
    }

    #[test]
    fn leftovers_go_when_the_lock_is_taken_and_only_those_of_its_name() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path().to_path_buf());
        let interrupted = cache.lock("thing").unwrap().stage().unwrap().keep();
        let others = cache.lock("other").unwrap().stage().unwrap().keep();
        let _lock = cache.lock("thing").unwrap();
        assert!(!interrupted.exists());
        assert!(others.exists());
    }

    #[test]
    fn publishing_replaces_a_damaged_folder() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path().to_path_buf());
        fs::create_dir_all(cache.path("a/thing/old")).unwrap();
        let stage = cache.lock("thing").unwrap().stage().unwrap();
        fs::write(stage.path().join("new"), "x").unwrap();
        let published = cache.publish(stage.path(), "a/thing").unwrap();
        assert_eq!(published, cache.path("a/thing"));
        assert!(published.join("new").is_file() && !published.join("old").exists());
    }

    #[test]
    fn too_little_space_is_told_with_both_numbers() {
        let error = check_space(5 << 20, 7 << 20, "libtorch", Path::new("/c")).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("7 MiB") && text.contains("5 MiB") && text.contains("/c"), "{text}");
        check_space(7 << 20, 7 << 20, "libtorch", Path::new("/c")).unwrap();
    }
}
