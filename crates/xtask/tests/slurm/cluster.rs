use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Signal, geteuid};

use crate::guardian::Guardian;
use crate::processes::{self, Stopped};

/// The nodes.
pub(crate) const NODES: [&str; 2] = ["n1", "n2"];

/// Deadline of whatever should take seconds, or a minute where Slurm counts in minutes: against
/// hanging only.
pub(crate) const LIMIT: Duration = Duration::from_secs(600);

/// Time between two looks.
const LOOK: Duration = Duration::from_millis(100);

/// States that a job does not leave.
const ENDS: [&str; 6] =
    ["COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"];

/// One cluster at a time: its jobs have two cores.
static ONE_CLUSTER: Mutex<()> = Mutex::new(());

/// A Slurm of two nodes on this machine, all of it in a temporary folder. When it is dropped, or
/// this process dies, every process of it is killed, those of its jobs too, and the folder removed.
pub(crate) struct Cluster {
    /// Dropped before the daemons are reaped.
    guardian: Option<Guardian>,
    folder: PathBuf,
    /// munged, slurmctld and two slurmd.
    daemons: Mutex<Vec<Child>>,
    _alone: MutexGuard<'static, ()>,
}

/// Fields of one line of `scontrol show job`.
pub(crate) type State = BTreeMap<String, String>;

impl Cluster {
    /// Brings it up; returns when both nodes are idle.
    pub(crate) fn start() -> Self {
        let alone = ONE_CLUSTER.lock().unwrap_or_else(PoisonError::into_inner);
        let folder = tempfile::Builder::new().prefix("slurm-").tempdir().unwrap();
        let guardian = Some(Guardian::of(folder.path()));
        // From here on it is the guardian's to remove.
        let folder = folder.keep();
        let cluster = Self { guardian, folder, daemons: Mutex::default(), _alone: alone };
        cluster.start_munge();
        cluster.configure();
        cluster.daemon("slurmctld", &["-D"]);
        for node in NODES {
            cluster.start_node(node);
        }
        cluster.wait_until("both nodes are idle", || {
            let asked = ["--noheader", "--Node", "--format=%T"];
            // It fails while nobody listens yet.
            let output = cluster.command("sinfo").args(asked).output().unwrap();
            let states = String::from_utf8_lossy(&output.stdout).into_owned();
            states.lines().count() == NODES.len() && states.lines().all(|state| state == "idle")
        });
        cluster
    }

    fn start_munge(&self) {
        let path = |name: &str| self.folder().join(name).display().to_string();
        let key = path("munge.key");
        self.run("mungekey", &["--create", &format!("--keyfile={key}")]);
        let (socket, pid) = (path("munge.socket"), path("munged.pid"));
        let (log, seed) = (path("munged.log"), path("munged.seed"));
        // --force: a folder that only its owner can enter, and a user who may be root.
        self.daemon(
            "munged",
            &[
                "--foreground",
                "--force",
                &format!("--key-file={key}"),
                &format!("--socket={socket}"),
                &format!("--pid-file={pid}"),
                &format!("--log-file={log}"),
                &format!("--seed-file={seed}"),
            ],
        );
        self.wait_until("munged answers", || Path::new(&socket).exists());
    }

    /// The nodes have 2 GPUs each, so that scripts which ask for some are not changed; they are
    /// devices of another kind, and libtorch sees none.
    fn configure(&self) {
        let folder = self.folder();
        for name in ["state", "tmp"].into_iter().chain(NODES) {
            fs::create_dir(folder.join(name)).unwrap();
        }
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let (user, ports) = (geteuid().as_raw(), free_ports());
        let mut text = include_str!("slurm.conf")
            .replace("{folder}", &folder.display().to_string())
            .replace("{host}", &host)
            .replace("{user}", &user.to_string())
            .replace("{port}", &ports[0].to_string());
        let mut gpus = String::new();
        for (node, port) in NODES.iter().zip(&ports[1..]) {
            fs::create_dir(folder.join(node).join("tmp")).unwrap();
            text += &format!(
                "NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=32 \
                 RealMemory=64000 Gres=gpu:2\n"
            );
            gpus += &format!("NodeName={node} Name=gpu File=/dev/null\n");
            gpus += &format!("NodeName={node} Name=gpu File=/dev/zero\n");
        }
        fs::write(folder.join("slurm.conf"), text).unwrap();
        let prolog = folder.join("prolog");
        fs::write(
            &prolog,
            include_str!("prolog").replace("{folder}", &folder.display().to_string()),
        )
        .unwrap();
        fs::set_permissions(&prolog, fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(folder.join("gres.conf"), gpus).unwrap();
    }

    /// Starts a node's daemon, for the first time or again.
    pub(crate) fn start_node(&self, node: &str) {
        self.daemon("slurmd", &["-D", "-N", node]);
    }

    /// Kills the daemon of a node and nothing else: its jobs go on, and nobody hears of them.
    pub(crate) fn kill_daemon_of(&self, node: &str) {
        let mut daemons = self.daemons.lock().unwrap();
        let is_its = |child: &&mut Child| {
            let line = fs::read(format!("/proc/{}/cmdline", child.id())).unwrap_or_default();
            line.ends_with(format!("-N\0{node}\0").as_bytes())
        };
        let child = daemons.iter_mut().find(is_its).expect("a running daemon");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Kills everything that runs on a node.
    pub(crate) fn kill_node(&self, node: &str) {
        let (all, own) = (self.folder(), self.folder().join(node));
        let runs_there = format!("SLURMD_NODENAME={node}");
        let left = processes::kill(|process| {
            process.uses(&own) || process.uses(all) && process.has_variable(&runs_there)
        });
        assert!(left.is_empty(), "still on {node}: {left:?}");
        self.reap();
        // It comes back without what Slurm and PMIx left there.
        fs::remove_dir_all(&own).unwrap();
        fs::create_dir_all(own.join("tmp")).unwrap();
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// A program as a user of the cluster starts it, in the checkout, with ours on the PATH.
    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.current_dir(root()).stdin(Stdio::null());
        for (name, _) in env::vars_os() {
            let text = name.to_string_lossy();
            let launcher = ["OMPI_", "PMIX_", "PMI_", "SLURM_", "SBATCH_", "DROMEDARY_"];
            if launcher.iter().any(|prefix| text.starts_with(prefix)) {
                command.env_remove(name);
            }
        }
        let path = env::var_os("PATH").unwrap_or_default();
        let folders = [programs()].into_iter().chain(env::split_paths(&path));
        let folders = folders.chain(["/usr/sbin", "/sbin"].map(PathBuf::from));
        command.env("PATH", env::join_paths(folders).unwrap());
        command.env("SLURM_CONF", self.folder().join("slurm.conf"));
        let temporary = self.folder().join("tmp");
        command.env("TMPDIR", &temporary);
        // Open MPI 4's shared memory now and then crashes tasks while they start where many processes
        // share few cores (https://github.com/open-mpi/ompi/issues/7642): two nodes here are one machine.
        command.env("OMPI_MCA_btl", "^vader");
        // Ranks that wait would keep each other, and whatever else runs here, from two cores.
        command.env("OMPI_MCA_mpi_yield_when_idle", "1");
        command
    }

    /// What a program that succeeds prints.
    pub(crate) fn run(&self, program: &str, arguments: &[&str]) -> String {
        succeeded(self.command(program).args(arguments).output(), program)
    }

    fn daemon(&self, program: &str, arguments: &[&str]) {
        let mut command = self.command(program);
        // A Ctrl-C is for the tests, whose end is the daemons' end.
        command.args(arguments).process_group(0);
        let log = fs::File::create(self.folder().join(format!("{program}.out"))).unwrap();
        command.stdout(log.try_clone().unwrap()).stderr(log);
        let child = command.spawn().unwrap_or_else(|error| panic!("{program}: {error}"));
        self.daemons.lock().unwrap().push(child);
    }

    /// Takes notice of daemons that have ended.
    fn reap(&self) {
        let mut daemons = self.daemons.lock().unwrap_or_else(PoisonError::into_inner);
        daemons.retain_mut(|child| !matches!(child.try_wait(), Ok(Some(_))));
    }

    /// Submits a script of `slurm/` with more flags and with these settings.
    pub(crate) fn submit(
        &self,
        script: &str,
        flags: &[&str],
        settings: &[(&str, &Path)],
    ) -> Job<'_> {
        let mut command = self.command("sbatch");
        let mut export = "--export=ALL".to_owned();
        for (name, value) in settings {
            match value.to_str().unwrap() {
                // A comma would end the value.
                value if value.contains(',') => _ = command.env(name, value),
                value => export += &format!(",{name}={value}"),
            }
        }
        let log = self.folder().join("%x-%j.log");
        command.args(["--parsable", &export, &format!("--output={}", log.display())]);
        command.args(flags).arg(Path::new("slurm").join(script));
        self.job(&succeeded(command.output(), script))
    }

    /// A job by the number that sbatch has given it.
    pub(crate) fn job(&self, id: &str) -> Job<'_> {
        Job { cluster: self, id: id.trim().to_owned() }
    }

    /// Lets stopped tasks go on as soon as Slurm has sent one of them a signal, which may do it as well.
    pub(crate) fn go_on_when_told(&self, tasks: &Stopped, signal: Signal) {
        self.wait_until(&format!("Slurm has sent {signal:?}"), || {
            tasks.waited_for_by(signal) > 0 || !tasks.are_stopped()
        });
        tasks.go_on();
    }

    /// Looks until `condition` holds; panics with the daemons' last words where it never does.
    pub(crate) fn wait_until(&self, what: &str, mut condition: impl FnMut() -> bool) {
        let begin = Instant::now();
        while !condition() {
            assert!(begin.elapsed() < LIMIT, "not within {LIMIT:?}: {what}\n{}", self.said());
            thread::sleep(LOOK);
        }
    }

    /// The ends of everything that was logged.
    pub(crate) fn said(&self) -> String {
        let mut said = String::new();
        let own = NODES.map(|node| self.folder().join(node).join("slurmd.log"));
        let files = fs::read_dir(self.folder()).unwrap().flatten().map(|entry| entry.path());
        for path in files.chain(own) {
            if path.extension().is_some_and(|end| end == "log" || end == "out") {
                let text =
                    String::from_utf8_lossy(&fs::read(&path).unwrap_or_default()).into_owned();
                let lines: Vec<&str> = text.lines().collect();
                let last = lines[lines.len().saturating_sub(20)..].join("\n");
                said += &format!("---- {}\n{last}\n", path.display());
            }
        }
        said
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        drop(self.guardian.take());
        self.reap();
    }
}

/// A job, or the jobs of an array.
pub(crate) struct Job<'a> {
    cluster: &'a Cluster,
    pub(crate) id: String,
}

impl Job<'_> {
    /// What the controller knows of the job, of each where it is an array.
    pub(crate) fn states(&self) -> Vec<State> {
        let text = self.cluster.run("scontrol", &["show", "job", "--oneliner", &self.id]);
        let fields = |line: &str| {
            let pairs = line.split_whitespace().filter_map(|word| word.split_once('='));
            pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
        };
        text.lines().filter(|line| !line.trim().is_empty()).map(fields).collect()
    }

    /// Waits until all are in one of these states, and gives what is known of them then.
    pub(crate) fn until(&self, wanted: &[&str]) -> Vec<State> {
        let mut states = Vec::new();
        self.cluster.wait_until(&format!("job {} is {wanted:?}", self.id), || {
            states = self.states();
            states.iter().all(|state| wanted.contains(&state["JobState"].as_str()))
        });
        states
    }

    /// Waits until faults on purpose have stopped so many of its tasks.
    #[track_caller]
    pub(crate) fn stopped(&self, count: usize) -> Stopped {
        let own = ["SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID"].map(|name| format!("{name}={}", self.id));
        let mut stopped = Vec::new();
        self.cluster.wait_until(&format!("{count} tasks of job {} are stopped", self.id), || {
            stopped = processes::find(|process| {
                process.is_stopped()
                    && process.uses(self.cluster.folder())
                    && own.iter().any(|variable| process.has_variable(variable))
            });
            let goes_on = |state: &State| !ENDS.contains(&state["JobState"].as_str());
            assert!(self.states().iter().any(goes_on), "{}", self.log());
            stopped.len() == count
        });
        Stopped(stopped)
    }

    /// Waits for the end.
    pub(crate) fn ended(&self) -> Vec<State> {
        self.until(&ENDS)
    }

    /// Waits for the end, which must be a good one.
    #[track_caller]
    pub(crate) fn complete(&self) -> Vec<State> {
        let states = self.ended();
        let good = states.iter().all(|state| state["JobState"] == "COMPLETED");
        assert!(good, "{}\n{states:?}\n{}", self.log(), self.cluster.said());
        states
    }

    /// What its script and programs have said.
    pub(crate) fn log(&self) -> String {
        let ends = format!("-{}.log", self.id);
        let logs = fs::read_dir(self.cluster.folder()).unwrap().flatten().map(|file| file.path());
        let own = logs.filter(|path| path.to_string_lossy().ends_with(&ends));
        own.map(|path| fs::read_to_string(path).unwrap()).collect()
    }
}

fn succeeded(output: std::io::Result<Output>, what: &str) -> String {
    let output = output.unwrap_or_else(|error| panic!("{what}: {error}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{what}: {said}");
    String::from_utf8(output.stdout).unwrap()
}

/// Three ports that nobody uses, below those that Linux deals out to connections meanwhile.
fn free_ports() -> [u16; 3] {
    let begin = 20_000 + (std::process::id() % 1_000) as u16 * 10;
    let mut free = (begin..32_000).filter(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok());
    [(); 3].map(|()| free.next().expect("a free port"))
}

/// The root of the checkout that these tests were started in; several may share one build.
pub(crate) fn root() -> PathBuf {
    let package = env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    package.ancestors().nth(2).unwrap().to_owned()
}

/// The folder of the built programs, beside that of this test.
pub(crate) fn programs() -> PathBuf {
    env::current_exe().unwrap().ancestors().nth(2).unwrap().to_owned()
}
