//! Whether the holder of a lock still lives.

use std::fs;
use std::process::Command;
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{Pid, getpid, test_kill_process};
use rustix::system::uname;

use super::Holder;

/// Thirty missed touches: longer than a network file system's caches and a paused host.
const STALE_AFTER: Duration = Duration::from_secs(300);

/// What becomes of a lock.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It may be taken over.
    Dead,
    /// It stays; why.
    Alive(String),
}

/// Decides about the lock of `holder`, which was `untouched` for so long, when `asking` wants it.
///
/// `job_is_gone` asks the batch system about a job and says no where it cannot know.
pub(super) fn verdict(
    holder: &Holder,
    asking: &Holder,
    untouched: Duration,
    job_is_gone: impl FnOnce(&str) -> bool,
) -> Verdict {
    if holder.host == asking.host {
        let process = Process { pid: holder.pid, started: holder.started };
        return if process.is_alive() {
            Verdict::Alive("that process runs on this host".to_owned())
        } else {
            Verdict::Dead
        };
    }
    let is_same_job = holder.job_id.is_some() && holder.job_id == asking.job_id;
    if is_same_job && asking.restart_count > holder.restart_count {
        return Verdict::Dead;
    }
    if untouched < STALE_AFTER {
        let seconds = untouched.as_secs();
        return Verdict::Alive(format!("it was touched {seconds} s ago on another host"));
    }
    match &holder.job_id {
        Some(job) if !job_is_gone(job) => {
            Verdict::Alive(format!("squeue knows job {job}, or could not be asked"))
        }
        _ => Verdict::Dead,
    }
}

/// A process of this host.
pub(super) struct Process {
    pub(super) pid: i32,
    pub(super) started: Option<u64>,
}

impl Process {
    pub(super) fn current() -> Process {
        let pid = getpid().as_raw_pid();
        Process { pid, started: start_ticks(pid) }
    }

    pub(super) fn host() -> String {
        uname().nodename().to_string_lossy().into_owned()
    }

    fn is_alive(&self) -> bool {
        let Some(pid) = Pid::from_raw(self.pid).filter(|_| self.pid > 0) else {
            return false;
        };
        if test_kill_process(pid) == Err(Errno::SRCH) {
            return false;
        }
        match (self.started, start_ticks(self.pid)) {
            // After a reboot the number may be another process's.
            (Some(then), Some(now)) => then == now,
            // Without start time: a zombie, which writes no more, or a host without /proc.
            (Some(_), None) => false,
            (None, _) => true,
        }
    }
}

/// When a process that is no zombie was started: field 22 of `/proc/PID/stat`.
fn start_ticks(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may hold spaces and parentheses of its own.
    let (_, fields) = stat.rsplit_once(") ")?;
    let mut fields = fields.split(' ');
    let state = fields.next()?;
    let started = fields.nth(18)?.parse().ok()?;
    (!matches!(state, "Z" | "X")).then_some(started)
}

/// Whether Slurm answers, and does not know the job.
pub(super) fn slurm_has_no_job(job: &str) -> bool {
    let Ok(output) = Command::new("squeue").args(["--noheader", &format!("--jobs={job}")]).output()
    else {
        return false;
    };
    if output.status.success() {
        return output.stdout.iter().all(u8::is_ascii_whitespace);
    }
    String::from_utf8_lossy(&output.stderr).contains("Invalid job id")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Stdio};

    fn holder(host: &str, job_id: Option<&str>) -> Holder {
        Holder {
            host: host.to_owned(),
            pid: 1,
            started: None,
            job_id: job_id.map(str::to_owned),
            restart_count: 1,
            token: String::new(),
        }
    }

    fn is_dead(holder: &Holder, asking: &Holder, seconds: u64, job_is_gone: bool) -> bool {
        let untouched = Duration::from_secs(seconds);
        verdict(holder, asking, untouched, |_| job_is_gone) == Verdict::Dead
    }

    #[test]
    fn another_host_needs_five_minutes_and_a_finished_job() {
        let (here, there) = (holder("here", None), holder("there", Some("7")));
        assert!(!is_dead(&there, &here, 299, true));
        assert!(is_dead(&there, &here, 300, true));
        assert!(!is_dead(&there, &here, 100_000, false));
        assert!(is_dead(&holder("there", None), &here, 300, false));
    }

    #[test]
    fn only_a_later_start_of_the_same_job_takes_over() {
        let there = holder("there", Some("7"));
        for (restart_count, dead) in [(0, false), (1, false), (2, true)] {
            let here = Holder { restart_count, ..holder("here", Some("7")) };
            assert_eq!(is_dead(&there, &here, 0, false), dead);
        }
        let without_job = Holder { restart_count: 9, ..holder("here", None) };
        assert!(!is_dead(&holder("there", None), &without_job, 0, false));
    }

    #[test]
    fn on_the_same_host_the_process_alone_decides() {
        let asking = Holder { restart_count: 9, ..holder("here", Some("7")) };
        let Process { pid, started } = Process::current();
        let running = Holder { pid, started, ..holder("here", Some("7")) };
        assert!(!is_dead(&running, &asking, 100_000, true));
        let reused = Holder { started: started.map(|ticks| ticks + 1), ..running.clone() };
        assert!(is_dead(&reused, &asking, 0, false));
        for pid in [0, -1, i32::MAX - 1] {
            assert!(is_dead(&Holder { pid, ..running.clone() }, &asking, 0, false), "{pid}");
        }
    }

    #[test]
    fn a_killed_process_is_dead_even_as_a_zombie() {
        let mut child: Child =
            Command::new("sleep").arg("60").stdout(Stdio::null()).spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let process = Process { pid, started: start_ticks(pid) };
        assert!(process.is_alive());
        child.kill().unwrap();
        // Not waited for, it stays in the table of processes.
        while start_ticks(pid).is_some() {
            std::thread::yield_now();
        }
        assert!(!process.is_alive());
        child.wait().unwrap();
        assert!(!process.is_alive());
    }
}
