use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// Time for mpirun to start, which on a busy machine is most of a job's.
const START: Duration = Duration::from_secs(120);

/// Two jobs at once on two cores would measure each other.
static ONE_JOB: Mutex<()> = Mutex::new(());

/// A job under mpirun, or a process alone.
pub(crate) struct Job {
    child: Child,
    lines: Receiver<String>,
    /// What the ranks have said so far.
    pub(crate) said: Vec<String>,
    /// The launcher's children that have been seen.
    ranks: BTreeSet<i32>,
    /// Shared memory of the ranks, which stays behind where they are killed.
    _memory: TempDir,
    _alone: MutexGuard<'static, ()>,
}

/// How a job ended.
pub(crate) struct End {
    /// None where it had to be killed at its deadline.
    pub(crate) status: Option<ExitStatus>,
    pub(crate) said: String,
    pids: Vec<Pid>,
}

/// The variables of a launcher around the tests would make mpirun believe that it is a rank.
fn without_launcher(command: &mut Command) {
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if ["OMPI_", "PMIX_", "PMI_", "SLURM_"].iter().any(|prefix| text.starts_with(prefix)) {
            command.env_remove(name);
        }
    }
}

/// `mpirun`, to be given its programs.
pub(crate) fn mpirun() -> Command {
    let mut command = Command::new("mpirun");
    command.args(["--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]);
    command
}

/// Starts a launcher, or a program by itself.
pub(crate) fn start(mut command: Command, variables: &[(&str, &str)]) -> Job {
    let alone = ONE_JOB.lock().unwrap_or_else(PoisonError::into_inner);
    without_launcher(&mut command);
    command.envs(variables.iter().copied());
    let memory = tempfile::tempdir().unwrap();
    command.env("OMPI_MCA_btl_vader_backing_directory", memory.path());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let (send, lines) = mpsc::channel();
    let streams: [Box<dyn Read + Send>; 2] =
        [Box::new(child.stdout.take().unwrap()), Box::new(child.stderr.take().unwrap())];
    for stream in streams {
        let send = send.clone();
        thread::spawn(move || {
            for line in BufReader::new(stream).lines().map_while(Result::ok) {
                let _ = send.send(line);
            }
        });
    }
    let (said, ranks) = (Vec::new(), BTreeSet::new());
    Job { child, lines, said, ranks, _memory: memory, _alone: alone }
}

impl Job {
    /// Reads on until `count` lines contain `text`.
    pub(crate) fn until_said(&mut self, text: &str, count: usize) {
        let deadline = Instant::now() + START;
        while self.said.iter().filter(|line| line.contains(text)).count() < count {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => {
                    self.said.push(line);
                    self.look();
                }
                Err(error) => {
                    self.kill();
                    panic!("{error} before `{text}` was said {count} times: {:#?}", self.said);
                }
            }
        }
    }

    /// The processes of the ranks that have been seen, which are started in their order.
    pub(crate) fn pids(&self) -> Vec<Pid> {
        self.ranks.iter().filter_map(|number| Pid::from_raw(*number)).collect()
    }

    /// Sees who runs now.
    fn look(&mut self) {
        let launcher = self.launcher().as_raw_nonzero().to_string();
        let path = Path::new("/proc").join(&launcher).join("task").join(&launcher).join("children");
        let children = std::fs::read_to_string(path).unwrap_or_default();
        self.ranks.extend(children.split_whitespace().filter_map(|pid| pid.parse::<i32>().ok()));
    }

    /// The process that was started: mpirun, or the program alone.
    pub(crate) fn launcher(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Waits for the end, at most this long, and kills what is left then.
    pub(crate) fn end(mut self, limit: Duration) -> End {
        let deadline = Instant::now() + limit;
        let mut status = None;
        while status.is_none() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(20));
            self.look();
            status = self.child.try_wait().unwrap();
        }
        if status.is_none() {
            self.kill();
        }
        self.drain();
        End { status, said: self.said.join("\n"), pids: self.pids() }
    }

    pub(crate) fn finish(self) -> End {
        self.end(START)
    }

    /// What is still in the pipes; they close with the last process that holds them.
    fn drain(&mut self) {
        loop {
            match self.lines.recv_timeout(Duration::from_secs(10)) {
                Ok(line) => self.said.push(line),
                Err(RecvTimeoutError::Disconnected | RecvTimeoutError::Timeout) => return,
            }
        }
    }

    /// The ranks first: without mpirun nobody would know them.
    fn kill(&mut self) {
        self.said.extend(self.lines.try_iter());
        for pid in self.pids() {
            let _ = kill_process(pid, Signal::KILL);
        }
        thread::sleep(Duration::from_millis(500));
        let _ = self.child.kill();
        self.child.wait().unwrap();
    }
}

impl End {
    #[track_caller]
    pub(crate) fn assert_success(&self) -> &Self {
        let success = self.status.is_some_and(|status| status.success());
        assert!(success, "ended with {:?}:\n{}", self.status, self.said);
        self
    }

    #[track_caller]
    pub(crate) fn assert_code(&self, code: i32) -> &Self {
        let got = self.status.and_then(|status| status.code());
        assert_eq!(got, Some(code), "said:\n{}", self.said);
        self
    }

    #[track_caller]
    pub(crate) fn assert_said(&self, text: &str) -> &Self {
        assert!(self.said.contains(text), "`{text}` was not said:\n{}", self.said);
        self
    }

    /// No rank outlives its launcher by more than a few seconds.
    #[track_caller]
    pub(crate) fn assert_nothing_left(&self, ranks: usize) -> &Self {
        assert_eq!(self.pids.len(), ranks, "every rank was seen:\n{}", self.said);
        let deadline = Instant::now() + Duration::from_secs(10);
        let left = || self.pids.iter().filter(|pid| is_running(**pid)).collect::<Vec<_>>();
        while !left().is_empty() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(50));
        }
        assert!(left().is_empty(), "still running: {:?}\n{}", left(), self.said);
        self
    }
}

/// Whether the process exists and has not ended; a zombie waits for its parent alone.
fn is_running(pid: Pid) -> bool {
    let folder = Path::new("/proc").join(pid.as_raw_nonzero().to_string());
    std::fs::read_to_string(folder.join("stat"))
        .is_ok_and(|stat| !stat.rsplit(')').next().is_some_and(|rest| rest.starts_with(" Z")))
}
