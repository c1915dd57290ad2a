use std::env;
use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::processes;

/// Names the guardian's folder to it.
const FOLDER: &str = "DROMEDARY_GUARDED_FOLDER";

/// Time for a folder to be gone.
const GONE: Duration = Duration::from_secs(60);

/// A process that waits until it is left alone, because this is dropped or because the tests are
/// killed, by whatever signal; then it kills everything that uses a folder, and removes the folder.
pub(crate) struct Guardian(Child);

impl Guardian {
    pub(crate) fn of(folder: &Path) -> Self {
        let mut command = Command::new(env::current_exe().unwrap());
        command.args(["--exact", "guardian::a_guardian_that_is_left_alone_clears_its_folder"]);
        // The pipe's end is closed with this process. A Ctrl-C is for the tests, not for their guardian.
        command.env(FOLDER, folder).stdin(Stdio::piped()).stdout(Stdio::null()).process_group(0);
        Self(command.spawn().unwrap())
    }
}

impl Drop for Guardian {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let ended = self.0.wait();
        let good = ended.as_ref().is_ok_and(|status| status.success());
        assert!(good || thread::panicking(), "the guardian: {ended:?}");
    }
}

fn guard(folder: &Path) {
    io::copy(&mut io::stdin(), &mut io::sink()).unwrap();
    let begin = Instant::now();
    loop {
        let left = processes::kill(|process| process.uses(folder));
        match fs::remove_dir_all(folder) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                // Whoever was killed last may have been writing.
                assert!(begin.elapsed() < GONE, "{}: {error}, {left:?}", folder.display());
                thread::sleep(Duration::from_millis(50));
            }
            _ => return assert!(left.is_empty(), "still running: {left:?}"),
        }
    }
}

/// What this test starts once more is the guardian.
#[test]
fn a_guardian_that_is_left_alone_clears_its_folder() {
    if let Some(folder) = env::var_os(FOLDER) {
        return guard(Path::new(&folder));
    }
    let folder = tempfile::tempdir().unwrap();
    let guardian = Guardian::of(folder.path());
    fs::write(folder.path().join("file"), "x").unwrap();
    let mut inside = Command::new("sleep").arg("1000").current_dir(folder.path()).spawn().unwrap();
    let mut outside = Command::new("sleep").arg("1000").spawn().unwrap();
    drop(guardian);
    assert_eq!(inside.wait().unwrap().signal(), Some(9));
    assert!(!folder.path().exists());
    assert!(outside.try_wait().unwrap().is_none(), "a process that does not use the folder");
    outside.kill().unwrap();
    outside.wait().unwrap();
}
