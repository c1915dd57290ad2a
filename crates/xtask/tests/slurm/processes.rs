use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, getpid, kill_process};

/// Time for killed processes to be gone.
const GONE: Duration = Duration::from_secs(20);

/// A process of this machine as /proc shows it; what cannot be read is empty.
pub(crate) struct Process {
    pid: Pid,
    is_stopped: bool,
    environment: Vec<u8>,
    /// Working folder and open files.
    files: Vec<PathBuf>,
}

impl Process {
    fn read(folder: &Path) -> Option<Self> {
        let pid = Pid::from_raw(folder.file_name()?.to_str()?.parse().ok()?)?;
        let entries = fs::read_dir(folder.join("fd")).into_iter().flatten().flatten();
        let links = entries.map(|entry| entry.path()).chain([folder.join("cwd")]);
        Some(Self {
            pid,
            is_stopped: is_stopped(&folder.join("stat")),
            environment: fs::read(folder.join("environ")).unwrap_or_default(),
            files: links.filter_map(|link| fs::read_link(link).ok()).collect(),
        })
    }

    /// Whether a variable of its environment is this one.
    pub(crate) fn has_variable(&self, variable: &str) -> bool {
        self.environment.split(|byte| *byte == 0).any(|other| other == variable.as_bytes())
    }

    /// Whether a signal has stopped it.
    pub(crate) fn is_stopped(&self) -> bool {
        self.is_stopped
    }

    /// Whether it works in the folder, or knows it, or has something open in it.
    pub(crate) fn uses(&self, folder: &Path) -> bool {
        let name = folder.as_os_str().as_bytes();
        self.files.iter().any(|file| file.starts_with(folder))
            || self.environment.windows(name.len()).any(|part| part == name)
    }
}

/// Whether the state behind the name, which may hold anything, is T.
fn is_stopped(stat: &Path) -> bool {
    let text = fs::read_to_string(stat).unwrap_or_default();
    text.rsplit_once(") ").is_some_and(|(_, state)| state.starts_with('T'))
}

/// Processes that were stopped.
pub(crate) struct Stopped(pub(crate) Vec<Pid>);

impl Stopped {
    /// Lets those go on that still live.
    pub(crate) fn go_on(&self) {
        for pid in &self.0 {
            let _ = kill_process(*pid, Signal::CONT);
        }
    }

    /// Whether all are stopped.
    pub(crate) fn are_stopped(&self) -> bool {
        self.0.iter().all(|pid| is_stopped(&file_of(*pid, "stat")))
    }

    /// Those that a signal waits for, which they do not take while they are stopped.
    pub(crate) fn waited_for_by(&self, signal: Signal) -> usize {
        self.0.iter().filter(|pid| is_pending(**pid, signal)).count()
    }
}

fn file_of(pid: Pid, name: &str) -> PathBuf {
    format!("/proc/{}/{name}", pid.as_raw_nonzero()).into()
}

/// All other processes for which `wanted` holds.
pub(crate) fn find(wanted: impl Fn(&Process) -> bool) -> Vec<Pid> {
    fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|entry| Process::read(&entry.path()))
        .filter(|process| process.pid != getpid() && wanted(process))
        .map(|process| process.pid)
        .collect()
}

fn is_pending(pid: Pid, signal: Signal) -> bool {
    let status = fs::read_to_string(file_of(pid, "status")).unwrap_or_default();
    let masks = ["SigPnd:", "ShdPnd:"].iter().filter_map(|name| {
        let mask = status.lines().find_map(|line| line.strip_prefix(name))?;
        u64::from_str_radix(mask.trim(), 16).ok()
    });
    masks.fold(0, |all, mask| all | mask) >> (signal.as_raw() - 1) & 1 == 1
}

/// Kills all processes for which `wanted` holds, until there are none; those that are left are
/// returned.
pub(crate) fn kill(wanted: impl Fn(&Process) -> bool) -> Vec<Pid> {
    let begin = Instant::now();
    loop {
        let found = find(&wanted);
        if found.is_empty() || begin.elapsed() > GONE {
            return found;
        }
        for pid in found {
            // It may be gone by now.
            let _ = kill_process(pid, Signal::KILL);
        }
        thread::sleep(Duration::from_millis(20));
    }
}
