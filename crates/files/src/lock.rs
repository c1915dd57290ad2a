use std::env;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime};

use rustix::fs::{Timespec, Timestamps, UTIME_NOW, futimens};
use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;

use crate::durable::{TEMP_SUFFIX, existing_parent, resolved, temp_prefix};
use crate::{Error, Result};

mod liveness;

use liveness::{Process, Verdict, slurm_has_no_job, verdict};

/// How often a holder shows that it lives.
const TOUCH_EVERY: Duration = Duration::from_secs(10);

/// Takeovers that a third process interrupts are tried again this often.
const ATTEMPTS: usize = 8;

/// One job's claim on an output: the file `<output>.lock`.
///
/// It is a plain file that a rename creates, without `flock`, which network file systems may lack.
/// A thread touches it every ten seconds; dropping the lock removes it. What a killed job leaves
/// is taken over:
///
/// - on the same host, when its process is dead;
/// - by a later start of the same Slurm job (a higher restart count);
/// - from another host, when it was not touched for five minutes and `squeue` does not know its
///   job.
#[derive(Debug)]
pub struct Lock {
    path: PathBuf,
    holder: Holder,
    lost: Arc<OnceLock<String>>,
    /// Dropping it ends the thread.
    end: Option<Sender<()>>,
    toucher: Option<JoinHandle<()>>,
}

/// Who asks for a [`Lock`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LockOptions {
    /// The batch system's number of this job.
    pub job_id: Option<String>,
    /// How often the batch system has started this job again.
    pub restart_count: u32,
    /// Takes the lock whoever holds it: only when that job is dead for certain.
    pub break_lock: bool,
}

impl LockOptions {
    /// Job and restart count from `SLURM_JOB_ID` and `SLURM_RESTART_COUNT`, absent outside of
    /// Slurm.
    pub fn from_env(break_lock: bool) -> LockOptions {
        let restarts = env::var("SLURM_RESTART_COUNT").ok().and_then(|text| text.parse().ok());
        LockOptions {
            job_id: env::var("SLURM_JOB_ID").ok(),
            restart_count: restarts.unwrap_or(0),
            break_lock,
        }
    }
}

/// Who holds a [`Lock`]: the content of the lock file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// The host's name.
    pub host: String,
    /// The process on that host.
    pub pid: i32,
    /// When that process was started, in the kernel's ticks, to tell it from a later process of
    /// the same number.
    pub started: Option<u64>,
    /// The batch system's number of the job.
    pub job_id: Option<String>,
    /// How often the batch system had started the job again.
    pub restart_count: u32,
    /// Tells this claim from every other.
    pub token: String,
}

impl Holder {
    fn this_process(options: &LockOptions, token: String) -> Holder {
        let process = Process::current();
        Holder {
            host: Process::host(),
            pid: process.pid,
            started: process.started,
            job_id: options.job_id.clone(),
            restart_count: options.restart_count,
            token,
        }
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, text: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(text, "host {}, pid {}", self.host, self.pid)?;
        match &self.job_id {
            Some(job) => write!(text, ", job {job}, restart {}", self.restart_count),
            None => Ok(()),
        }
    }
}

impl Lock {
    /// Claims an output, or takes a dead job's claim over.
    ///
    /// # Errors
    /// [`Error::Locked`], naming the holder, where another job has it; [`Error::BadLock`] where
    /// the lock file is unreadable; [`Error::Write`] where none can be created.
    pub fn acquire(output: impl AsRef<Path>, options: &LockOptions) -> Result<Lock> {
        let claim = Claim::prepare(&resolved(output.as_ref())?, options)?;
        claim.acquire(options.break_lock)?.touched_every(TOUCH_EVERY)
    }

    /// Who has claimed an output and may still live; nothing is changed. The age of another host's
    /// claim is told by this host's clock.
    ///
    /// # Errors
    /// [`Error::BadLock`] where the lock file is unreadable, [`Error::Read`].
    pub fn live_holder(output: impl AsRef<Path>, options: &LockOptions) -> Result<Option<Holder>> {
        let path = lock_path(output.as_ref());
        let Some(holder) = read_holder(&path)? else { return Ok(None) };
        let touched = match fs::metadata(&path).and_then(|metadata| metadata.modified()) {
            Ok(touched) => touched,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::read(&path)(error)),
        };
        let asking = Holder::this_process(options, String::new());
        let untouched = touched.elapsed().unwrap_or_default();
        let lives = verdict(&holder, &asking, untouched, slurm_has_no_job) != Verdict::Dead;
        Ok(lives.then_some(holder))
    }

    /// The lock file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether this job may still write: a process that was stopped for minutes may have lost its
    /// lock.
    ///
    /// # Errors
    /// [`Error::LockLost`].
    pub fn check(&self) -> Result<()> {
        match self.lost.get() {
            Some(holder) => {
                Err(Error::LockLost { path: self.path.clone(), new_holder: holder.clone() })
            }
            None => Ok(()),
        }
    }

    fn touched_every(mut self, interval: Duration) -> Result<Lock> {
        let (end, ended) = mpsc::channel();
        let (path, token) = (self.path.clone(), self.holder.token.clone());
        let lost = Arc::clone(&self.lost);
        let toucher = thread::Builder::new()
            .name("lock".to_owned())
            .spawn(move || {
                while ended.recv_timeout(interval) == Err(RecvTimeoutError::Timeout) {
                    if let Some(holder) = touch(&path, &token) {
                        // Set once, here alone.
                        let _ = lost.set(holder);
                        return;
                    }
                }
            })
            .map_err(Error::write(&self.path))?;
        self.end = Some(end);
        self.toucher = Some(toucher);
        Ok(self)
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(toucher) = self.toucher.take() {
            // A panic there was already printed.
            let _ = toucher.join();
        }
        if read_holder(&self.path).is_ok_and(|holder| holder.as_ref() == Some(&self.holder)) {
            // Left behind, it is a dead process's lock, which the next job takes over.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// A lock file under a temporary name.
struct Claim {
    output: PathBuf,
    lock: PathBuf,
    holder: Holder,
    file: NamedTempFile,
}

impl Claim {
    fn prepare(output: &Path, options: &LockOptions) -> Result<Claim> {
        let lock = lock_path(output);
        let folder = existing_parent(&lock)?;
        let mut file = tempfile::Builder::new()
            .prefix(&temp_prefix(&lock)?)
            .suffix(TEMP_SUFFIX)
            .rand_bytes(16)
            .tempfile_in(folder)
            .map_err(Error::write(&lock))?;
        let token = file.path().file_name().map(|name| name.to_string_lossy().into_owned());
        let holder = Holder::this_process(options, token.unwrap_or_default());
        let bytes = serde_json::to_vec(&holder)
            .map_err(|source| Error::Encode { path: lock.clone(), source })?;
        file.write_all(&bytes).map_err(Error::write(&lock))?;
        file.as_file().sync_all().map_err(Error::write(&lock))?;
        Ok(Claim { output: output.to_owned(), lock, holder, file })
    }

    fn acquire(mut self, break_lock: bool) -> Result<Lock> {
        for _ in 0..ATTEMPTS {
            match self.file.persist_noclobber(&self.lock) {
                Ok(_) => {
                    let (path, holder) = (self.lock, self.holder);
                    return Ok(Lock {
                        path,
                        holder,
                        lost: Arc::default(),
                        end: None,
                        toucher: None,
                    });
                }
                Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => {
                    self.file = error.file;
                }
                Err(error) => return Err(Error::write(&self.lock)(error.error)),
            }
            self.remove_if_dead(break_lock)?;
        }
        Err(Error::BadLock { path: self.lock, message: "it keeps changing hands".to_owned() })
    }

    /// Removes the present lock, or says why not.
    fn remove_if_dead(&self, break_lock: bool) -> Result<()> {
        let holder = match read_holder(&self.lock) {
            Ok(Some(holder)) => Some(holder),
            Ok(None) => return Ok(()),
            Err(Error::BadLock { .. }) if break_lock => None,
            Err(error) => return Err(error),
        };
        if let Some(holder) = holder.as_ref().filter(|_| !break_lock) {
            let untouched = self.untouched().map_err(Error::read(&self.lock))?;
            if let Verdict::Alive(reason) =
                verdict(holder, &self.holder, untouched, slurm_has_no_job)
            {
                let (output, lock) = (self.output.clone(), self.lock.clone());
                return Err(Error::Locked {
                    output,
                    lock,
                    holder: Box::new(holder.clone()),
                    reason,
                });
            }
        }
        self.displace(holder.as_ref()).map_err(Error::write(&self.lock))
    }

    /// How long ago the present lock was touched, by the file server's clock: both files are its.
    fn untouched(&self) -> io::Result<Duration> {
        let now = {
            set_touched(self.file.as_file())?;
            self.file.as_file().metadata()?.modified()?
        };
        let touched = match fs::metadata(&self.lock) {
            Ok(metadata) => metadata.modified()?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => SystemTime::UNIX_EPOCH,
            Err(error) => return Err(error),
        };
        Ok(now.duration_since(touched).unwrap_or_default())
    }

    /// Moves the lock of `expected` away; another's, that came in between, is put back.
    fn displace(&self, expected: Option<&Holder>) -> io::Result<()> {
        let aside = self.lock.with_file_name(format!("{}.stale", self.holder.token));
        match fs::rename(&self.lock, &aside) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            result => result?,
        }
        let moved = read_holder(&aside).ok().flatten();
        if moved.as_ref() != expected {
            // Fails where a third job has taken the place; the one displaced then finds its lock
            // lost.
            let _ = fs::hard_link(&aside, &self.lock);
        }
        fs::remove_file(&aside)
    }
}

fn lock_path(output: &Path) -> PathBuf {
    let mut path = output.as_os_str().to_owned();
    path.push(".lock");
    path.into()
}

/// Who holds a lock; nobody where there is no file.
fn read_holder(path: &Path) -> Result<Option<Holder>> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(Error::Read { path: path.to_owned(), source }),
    };
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|error| Error::BadLock { path: path.to_owned(), message: error.to_string() })
}

/// Touches the lock with this token; where it is another's now, tells whose.
fn touch(path: &Path, token: &str) -> Option<String> {
    match read_holder(path) {
        Ok(Some(holder)) if holder.token == token => {
            // A server that does not answer now may do so in ten seconds; the claim stays good
            // for five minutes.
            let _ = File::options().write(true).open(path).and_then(|file| set_touched(&file));
            None
        }
        Ok(Some(holder)) => Some(holder.to_string()),
        Ok(None) => Some("nobody: the file was removed".to_owned()),
        Err(Error::BadLock { message, .. }) => Some(format!("somebody unknown: {message}")),
        Err(_) => None,
    }
}

/// The file server's own time, not this host's.
fn set_touched(file: &File) -> io::Result<()> {
    let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
    Ok(futimens(file, &Timestamps { last_access: now, last_modification: now })?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::write_atomic;

    fn folder_and_output() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let output = folder.path().join("rows.jsonl");
        (folder, output)
    }

    fn acquire(output: &Path) -> Result<Lock> {
        Lock::acquire(output, &LockOptions::default())
    }

    fn leave(output: &Path, holder: &Holder) {
        write_atomic(lock_path(output), &serde_json::to_vec(holder).unwrap()).unwrap();
    }

    fn foreign(job_id: Option<&str>) -> Holder {
        Holder {
            host: "another-host".to_owned(),
            pid: 1,
            started: Some(1),
            job_id: job_id.map(str::to_owned),
            restart_count: 0,
            token: "other".to_owned(),
        }
    }

    fn age(output: &Path, seconds: u64) {
        let file = File::options().write(true).open(lock_path(output)).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(seconds)).unwrap();
    }

    fn entries(folder: &Path) -> usize {
        fs::read_dir(folder).unwrap().count()
    }

    #[test]
    fn one_at_a_time() {
        let (folder, output) = folder_and_output();
        let lock = acquire(&output).unwrap();
        let error = acquire(&output).unwrap_err().to_string();
        assert!(error.contains(&format!("pid {}", std::process::id())), "{error}");
        assert!(error.contains("rows.jsonl is in use"), "{error}");
        assert!(error.contains("--break-lock"), "{error}");
        drop(lock);
        assert_eq!(entries(folder.path()), 0);
        drop(acquire(&output).unwrap());
    }

    #[test]
    fn of_many_at_once_one_gets_it() {
        let (folder, output) = folder_and_output();
        // All find a dead job's lock and race to take it over.
        let dead = Holder { host: Process::host(), pid: i32::MAX - 1, ..foreign(None) };
        leave(&output, &dead);
        let locks: Vec<_> = thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(|| acquire(&output))).collect();
            threads.into_iter().filter_map(|thread| thread.join().unwrap().ok()).collect()
        });
        assert_eq!(locks.len(), 1);
        assert_eq!(read_holder(locks[0].path()).unwrap().unwrap(), locks[0].holder);
        drop(locks);
        assert_eq!(entries(folder.path()), 0);
    }

    #[test]
    fn a_foreign_lock_goes_when_old() {
        let (_folder, output) = folder_and_output();
        leave(&output, &foreign(None));
        let error = acquire(&output).unwrap_err().to_string();
        assert!(error.contains("another-host"), "{error}");
        age(&output, 200);
        acquire(&output).unwrap_err();
        age(&output, 400);
        acquire(&output).unwrap();
    }

    #[test]
    fn who_holds_an_output_can_be_asked_without_taking_it() {
        let (folder, output) = folder_and_output();
        let ask = || Lock::live_holder(&output, &LockOptions::default()).unwrap();
        assert_eq!(ask(), None);
        let lock = acquire(&output).unwrap();
        assert_eq!(ask(), Some(lock.holder.clone()));
        drop(lock);
        leave(&output, &Holder { host: Process::host(), pid: i32::MAX - 1, ..foreign(None) });
        assert_eq!(ask(), None);
        leave(&output, &foreign(None));
        assert_eq!(ask(), Some(foreign(None)));
        age(&output, 400);
        assert_eq!(ask(), None);
        assert_eq!(entries(folder.path()), 1);
    }

    #[test]
    fn a_requeued_job_takes_its_own_lock_over() {
        let (_folder, output) = folder_and_output();
        leave(&output, &foreign(Some("77")));
        let options = |restart_count| LockOptions {
            job_id: Some("77".to_owned()),
            restart_count,
            break_lock: false,
        };
        Lock::acquire(&output, &options(0)).unwrap_err();
        Lock::acquire(&output, &options(1)).unwrap();
    }

    #[test]
    fn breaking_takes_any_lock() {
        let (folder, output) = folder_and_output();
        let options = LockOptions { break_lock: true, ..LockOptions::default() };
        let first = acquire(&output).unwrap();
        let second = Lock::acquire(&output, &options).unwrap();
        // The first must not remove what is the second's now.
        drop(first);
        assert!(second.path().exists());
        drop(second);
        fs::write(lock_path(&output), "{half").unwrap();
        let error = acquire(&output).unwrap_err();
        assert!(matches!(error, Error::BadLock { .. }), "{error}");
        drop(Lock::acquire(&output, &options).unwrap());
        assert_eq!(entries(folder.path()), 0);
    }

    #[test]
    fn a_holder_touches_its_lock_and_learns_of_its_loss() {
        let (_folder, output) = folder_and_output();
        let claim = Claim::prepare(&output, &LockOptions::default()).unwrap();
        let lock = claim.acquire(false).unwrap();
        age(&output, 400);
        let old = fs::metadata(lock.path()).unwrap().modified().unwrap();
        let lock = lock.touched_every(Duration::from_millis(5)).unwrap();
        wait_for(|| fs::metadata(lock.path()).unwrap().modified().unwrap() > old);
        lock.check().unwrap();
        leave(&output, &foreign(None));
        wait_for(|| lock.check().is_err());
        let error = lock.check().unwrap_err().to_string();
        assert!(error.contains("taken over by host another-host"), "{error}");
    }

    fn wait_for(condition: impl Fn() -> bool) {
        for _ in 0..2000 {
            if condition() {
                return;
            }
            thread::sleep(Duration::from_millis(5));
        }
        panic!("it did not happen within 10 s");
    }

    #[test]
    fn a_lock_that_came_in_between_is_put_back() {
        let (_folder, output) = folder_and_output();
        let claim = Claim::prepare(&output, &LockOptions::default()).unwrap();
        leave(&output, &foreign(None));
        let expected = Holder { token: "gone".to_owned(), ..foreign(None) };
        claim.displace(Some(&expected)).unwrap();
        assert_eq!(read_holder(&lock_path(&output)).unwrap(), Some(foreign(None)));
    }
}
