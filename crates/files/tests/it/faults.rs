//! Full disk, read-only folders, kills, and two jobs on one output.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::thread;
use std::time::{Duration, SystemTime};

use dromedary_files::{
    AtomicDir, AtomicFile, Error, JsonlAppender, Lock, LockOptions, read_jsonl, write_atomic,
};
use serde::Deserialize;

#[derive(Deserialize)]
struct Row {
    id: u64,
}

fn ids(path: &Path) -> Vec<u64> {
    read_jsonl::<Row>(path).unwrap().map(|row| row.unwrap().1.id).collect()
}

/// The example program, which Cargo puts beside the folder of the test programs.
fn append_program() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let program = test.ancestors().nth(2).unwrap().join("examples/append");
    assert!(program.exists(), "{} is built by a plain cargo test", program.display());
    program
}

fn append(path: &Path, count: u64) -> Command {
    let mut command = Command::new(append_program());
    command.arg(path).arg(count.to_string());
    command.env_remove("SLURM_JOB_ID").env_remove("SLURM_RESTART_COUNT");
    command
}

/// The same with files limited to `blocks` of 512 bytes, which fails a write as a full disk does.
fn append_on_full_disk(path: &Path, count: u64, blocks: u32) -> Command {
    let script = format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$0\" \"$@\"");
    let mut command = Command::new("sh");
    command.args(["-c", &script]).arg(append_program()).arg(path).arg(count.to_string());
    command
}

fn run(mut command: Command) -> (Output, String) {
    let output = command.output().unwrap();
    let stderr = String::from_utf8(output.stderr.clone()).unwrap();
    (output, stderr)
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    let mut entries: Vec<_> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    entries.sort();
    entries
}

#[test]
fn a_full_disk_leaves_whole_rows_and_no_temporary_files() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.jsonl");
    let (output, stderr) = run(append_on_full_disk(&path, 100, 8));
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("rows.jsonl: File too large"), "{stderr}");
    let written = ids(&path);
    assert!(!written.is_empty() && written.len() < 100, "{} rows", written.len());
    assert!(fs::read(&path).unwrap().ends_with(b"}\n"));
    assert_eq!(entries(folder.path()), std::slice::from_ref(&path));

    let (output, stderr) = run(append(&path, 100));
    assert!(output.status.success(), "{stderr}");
    assert_eq!(stderr, "");
    assert_eq!(ids(&path), (1..=100).collect::<Vec<_>>());
}

#[test]
fn killed_at_any_moment_the_next_run_completes_the_rows() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.jsonl");
    let count = 300_000;
    for delay in [5, 20, 40, 80] {
        let mut child = append(&path, count).spawn().unwrap();
        thread::sleep(Duration::from_millis(delay));
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let before = fs::read(&path).unwrap_or_default();
    let (output, stderr) = run(append(&path, count));
    assert!(output.status.success(), "{stderr}");
    assert!(fs::read(&path).unwrap().starts_with(&before));
    assert!(ids(&path).into_iter().eq(1..=count));
    // A kill within a write of the lock leaves a file that says what it is.
    let left = entries(folder.path()).into_iter().filter(|path| !is_temporary(path));
    assert_eq!(left.collect::<Vec<_>>(), [path]);
}

fn is_temporary(path: &Path) -> bool {
    let name = path.file_name().unwrap().to_str().unwrap();
    name.starts_with('.') && name.ends_with(".tmp")
}

#[test]
fn a_torn_row_is_reported_and_written_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.jsonl");
    run(append(&path, 10));
    let whole = fs::read(&path).unwrap();
    fs::write(&path, &whole[..whole.len() - 50]).unwrap();
    let (output, stderr) = run(append(&path, 10));
    assert!(output.status.success(), "{stderr}");
    assert!(stderr.contains("cut 70 bytes of a torn row"), "{stderr}");
    assert_eq!(fs::read(&path).unwrap(), whole);
}

#[test]
fn a_second_process_is_told_who_holds_the_lock() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.jsonl");
    let options = LockOptions { job_id: Some("1234".to_owned()), ..LockOptions::default() };
    let lock = Lock::acquire(&path, &options).unwrap();
    let (output, stderr) = run(append(&path, 3));
    assert_eq!(output.status.code(), Some(1));
    for part in ["rows.jsonl.lock", &format!("pid {}", std::process::id()), "job 1234", "host "] {
        assert!(stderr.contains(part), "{part}: {stderr}");
    }
    assert!(!path.exists());
    drop(lock);
    assert!(run(append(&path, 3)).0.status.success());
}

#[test]
fn the_lock_of_a_killed_process_is_taken_over() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.jsonl");
    let lock = folder.path().join("rows.jsonl.lock");
    let mut child = append(&path, u64::MAX).spawn().unwrap();
    while !path.exists() {
        thread::sleep(Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(lock.exists());
    let done = fs::read(&path).unwrap().iter().filter(|&&byte| byte == b'\n').count() as u64;
    let (output, stderr) = run(append(&path, done + 1));
    assert!(output.status.success(), "{stderr}");
    assert!(ids(&path).into_iter().eq(1..=done + 1));
    assert!(!lock.exists());
}

/// A lock of job 77, first start, on another host, touched this long ago.
fn foreign_lock(output: &Path, seconds_ago: u64) {
    let lock = output.with_extension("jsonl.lock");
    let text =
        r#"{"host": "elsewhere", "pid": 1, "job_id": "77", "restart_count": 0, "token": "t"}"#;
    fs::write(&lock, text).unwrap();
    let touched = SystemTime::now() - Duration::from_secs(seconds_ago);
    fs::File::options().write(true).open(&lock).unwrap().set_modified(touched).unwrap();
}

#[test]
fn a_requeued_job_is_told_by_the_variables_of_slurm() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.jsonl");
    for (job, restarts, is_taken_over) in
        [("77", "0", false), ("78", "1", false), ("77", "1", true)]
    {
        foreign_lock(&path, 0);
        let mut command = append(&path, 1);
        command.env("SLURM_JOB_ID", job).env("SLURM_RESTART_COUNT", restarts);
        let (output, stderr) = run(command);
        assert_eq!(output.status.success(), is_taken_over, "{job} {restarts}: {stderr}");
    }
}

/// An old lock from another host goes only when Slurm answers that it does not know the job.
#[test]
fn squeue_is_asked_about_an_old_lock() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.jsonl");
    let squeue = folder.path().join("squeue");
    for (answer, is_taken_over) in [
        ("echo '77 batch train R 1:00 1 node1'", false),
        ("echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1", false),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", true),
        ("test \"$*\" = '--noheader --jobs=77'", true),
    ] {
        // Moved into place, since a file that a fork holds open for writing cannot be run.
        let script = folder.path().join("script");
        write_atomic(&script, format!("#!/bin/sh\n{answer}\n").as_bytes()).unwrap();
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
        fs::rename(&script, &squeue).unwrap();
        for (seconds_ago, is_taken_over) in [(200, false), (400, is_taken_over)] {
            foreign_lock(&path, seconds_ago);
            let mut command = append(&path, 1);
            command.env("PATH", format!("{}:/usr/bin:/bin", folder.path().display()));
            let (output, stderr) = run(command);
            assert_eq!(output.status.success(), is_taken_over, "{answer}: {stderr}");
            assert!(is_taken_over || stderr.contains("--break-lock"), "{stderr}");
        }
    }
}

/// A folder nobody can write to: root passes over permissions, but not over the kernel's folders.
fn read_only_folder(parent: &Path) -> PathBuf {
    let folder = parent.join("read-only");
    fs::create_dir(&folder).unwrap();
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o555)).unwrap();
    if fs::write(folder.join("probe"), "").is_ok() { "/proc/sys".into() } else { folder }
}

#[test]
fn a_read_only_folder_is_a_clean_error_that_names_the_path() {
    let parent = tempfile::tempdir().unwrap();
    let target = read_only_folder(parent.path()).join("x");
    let errors = [
        write_atomic(&target, b"x").unwrap_err(),
        AtomicDir::create(&target).unwrap_err(),
        JsonlAppender::open(&target).unwrap_err(),
        Lock::acquire(&target, &LockOptions::default()).unwrap_err(),
    ];
    for error in errors {
        assert!(matches!(error, Error::Write { .. }), "{error}");
        assert!(error.to_string().contains(target.to_str().unwrap()), "{error}");
    }
}

#[test]
fn a_folder_that_vanishes_is_a_clean_error() {
    let parent = tempfile::tempdir().unwrap();
    let folder = parent.path().join("runs");
    let path = folder.join("x");
    let mut file = AtomicFile::create(&path).unwrap();
    file.write_all(b"x").unwrap();
    fs::remove_dir_all(&folder).unwrap();
    let error = file.commit().unwrap_err();
    assert!(matches!(error, Error::Write { .. }), "{error}");
    assert!(!path.exists());
}
