use std::env;
use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::cluster::{Cluster, LIMIT};
use crate::processes;
use crate::work::Work;

/// Slurm looks every 30 s whose time is nearly over, and counts in minutes. Until it has sent its
/// signal, not before 70 s, the task is stopped, so that it does not finish before.
#[test]
#[ignore = "needs Slurm: cargo xtask test --slurm"]
fn a_job_whose_time_is_nearly_over_goes_back_into_the_queue_and_finishes() {
    let cluster = Cluster::start();
    let work = Work::new(&cluster, 60);
    let job = work.submit_to_stop_in_the_middle(&["--time=00:02:00", "--signal=USR1@50"]);
    let task = job.stopped(1);
    let step = cluster.run("scontrol", &["show", "step", &format!("{}.0", job.id)]);
    assert!(step.contains("CPUs=8 "), "the script's --cpus-per-task: {step}");
    cluster.go_on_when_told(&task, Signal::USR1);
    let states = job.complete();
    assert_ne!(states[0]["Restarts"], "0", "{}", job.log());
    let log = job.log();
    assert!(log.contains("stopped: ") && log.contains(" of 60 rows are there"), "{log}");
    work.assert_whole();
}

/// One element of an array has the number of the array, by which Slurm takes all of them.
#[test]
#[ignore = "needs Slurm: cargo xtask test --slurm"]
fn an_element_that_goes_back_into_the_queue_goes_alone() {
    let cluster = Cluster::start();
    let work = Work::new(&cluster, 36);
    let job = work.submit_to_stop_in_the_middle(&["--array=0-2"]);
    let tasks = job.stopped(3);
    let states = job.states();
    let own = states.iter().find(|state| state["JobId"] == job.id).expect("the array's number");
    let element = format!("{}_{}", job.id, own["ArrayTaskId"]);
    cluster.run("scancel", &["--signal=USR1", &element]);
    cluster.go_on_when_told(&tasks, Signal::USR1);
    for state in job.complete() {
        let expected = if state["JobId"] == job.id { "1" } else { "0" };
        assert_eq!(state["Restarts"], expected, "{state:#?}\n{}", cluster.said());
    }
    work.assert_whole();
}

/// Put back once, as it may be, it ends the second time as it was stopped, and says so. The fault stops
/// each start before its first row.
#[test]
#[ignore = "needs Slurm: cargo xtask test --slurm"]
fn a_job_that_was_put_back_often_enough_stays_stopped() {
    let cluster = Cluster::start();
    let work = Work::new(&cluster, 60);
    let fault = "rank=0,point=locked0,how=stop";
    let job = work.submit(&[], &[("MAX_RESTARTS", "1"), ("DROMEDARY_FAULT", fault)]);
    for restarts in ["0", "1"] {
        let states = job.until(&["RUNNING"]);
        assert_eq!(states[0]["Restarts"], restarts);
        let task = job.stopped(1);
        cluster.run("scancel", &["--signal=USR1", &job.id]);
        cluster.go_on_when_told(&task, Signal::USR1);
        job.until(&["PENDING", "FAILED"]);
    }
    let states = job.until(&["FAILED"]);
    assert_eq!((states[0]["Restarts"].as_str(), states[0]["ExitCode"].as_str()), ("1", "75:0"));
    assert!(job.log().contains("not put back into the queue: MAX_RESTARTS=1"), "{}", job.log());
    work.submit(&[], &[]).complete();
    work.assert_whole();
}

#[test]
#[ignore = "needs Slurm: cargo xtask test --slurm"]
fn a_cancelled_job_is_continued_by_the_same_line() {
    let cluster = Cluster::start();
    let work = Work::new(&cluster, 40);
    let job = work.submit_to_stop_in_the_middle(&["--nodes=2"]);
    let first = job.stopped(1);
    cluster.run("scancel", &[&job.id]);
    cluster.go_on_when_told(&first, Signal::TERM);
    // Its tasks save what they have; until they are gone, another job would be refused.
    cluster.wait_until("the first job is gone", || {
        cluster.run("squeue", &["--noheader", "--jobs", &job.id]).trim().is_empty()
    });
    assert_eq!(job.states()[0]["JobState"], "CANCELLED");
    work.assert_begun();
    work.submit(&["--nodes=2"], &[]).complete();
    work.assert_whole();
}

/// Elements of an array on one node each: the other one does not notice, and Slurm starts the lost one
/// anew where there is room.
#[test]
#[ignore = "needs Slurm: cargo xtask test --slurm"]
fn a_lost_node_costs_one_group_which_is_started_anew() {
    let cluster = Cluster::start();
    let work = Work::new(&cluster, 24);
    let job = work.submit_to_stop_in_the_middle(&["--array=0-1", "--exclusive"]);
    let tasks = job.stopped(2);
    cluster.kill_node("n2");
    tasks.go_on();
    let states = job.complete();
    let mut restarts: Vec<&str> = states.iter().map(|state| state["Restarts"].as_str()).collect();
    restarts.sort_unstable();
    assert_eq!(restarts, ["0", "1"]);
    assert!(states.iter().all(|state| state["NodeList"] == "n1"), "{states:#?}");
    work.assert_whole();
}

/// A model that is on both nodes cannot go on without one; its job must not wait for ever, and the
/// same line finishes once the node is back.
#[test]
#[ignore = "needs Slurm: cargo xtask test --slurm"]
fn a_lost_node_ends_the_job_of_a_model_on_two() {
    let cluster = Cluster::start();
    let work = Work::new(&cluster, 24);
    let job = work.submit_to_stop_in_the_middle(&["--nodes=2"]);
    let first = job.stopped(1);
    cluster.kill_node("n2");
    first.go_on();
    // Either Slurm notices first, and starts the job anew, or the script sees its step fail.
    job.until(&["FAILED", "NODE_FAIL", "PENDING"]);
    work.assert_begun();
    cluster.start_node("n2");
    let states = job.until(&["COMPLETED", "FAILED", "NODE_FAIL"]);
    if states[0]["JobState"] != "COMPLETED" {
        work.submit(&["--nodes=2"], &[]).complete();
    }
    work.assert_whole();
}

/// A daemon that dies alone leaves its job computing, and Slurm starts it anew on the other node.
/// Both nodes have this machine's name, so the second start sees that the first one lives.
#[test]
#[ignore = "needs Slurm: cargo xtask test --slurm"]
fn a_job_that_slurm_has_lost_sight_of_is_not_done_twice() {
    let cluster = Cluster::start();
    let work = Work::new(&cluster, 24);
    let job = work.submit_to_stop_in_the_middle(&["--nodelist=n1"]);
    let task = job.stopped(1);
    cluster.kill_daemon_of("n1");
    // What Slurm does by itself half a minute later.
    cluster.run("scontrol", &["update", "NodeName=n1", "State=DOWN", "Reason=lost"]);
    // It was to be on that node, which does not come back: any other will do.
    job.until(&["PENDING"]);
    cluster.run("scontrol", &["update", &format!("JobId={}", job.id), "ReqNodeList="]);
    job.until(&["FAILED"]);
    assert!(job.log().contains("aligned.jsonl is in use"), "{}", job.log());
    task.go_on();
    cluster.wait_until("the first start ends", || !work.finished().is_empty());
    work.assert_whole();
}

/// Makes the test below bring up a cluster and end in this way.
const END: &str = "SLURM_TESTS_END";

/// Tests that fail, and tests that are killed, leave no process and no file.
#[test]
#[ignore = "needs Slurm: cargo xtask test --slurm"]
fn nothing_is_left_of_tests_however_they_end() {
    if let Some(end) = env::var_os(END) {
        let cluster = Cluster::start();
        let work = Work::new(&cluster, 24);
        let _task = work.submit_to_stop_in_the_middle(&[]).stopped(1);
        fs::write(env::temp_dir().join("begun"), "").unwrap();
        assert!(end != "panic", "on purpose");
        loop {
            thread::park();
        }
    }
    for (end, signal) in
        [("panic", None), ("signal", Some(Signal::TERM)), ("signal", Some(Signal::KILL))]
    {
        let folder = tempfile::tempdir().unwrap();
        let mut tests = Command::new(env::current_exe().unwrap());
        tests.args(["--ignored", "--exact", "losses::nothing_is_left_of_tests_however_they_end"]);
        tests.env(END, end).env("TMPDIR", folder.path()).stdout(Stdio::null());
        let mut tests = tests.stderr(Stdio::null()).spawn().unwrap();
        let begun = folder.path().join("begun");
        until("they have a job", || begun.exists());
        if let Some(signal) = signal {
            kill_process(Pid::from_child(&tests), signal).unwrap();
        }
        let status = tests.wait().unwrap();
        assert_eq!(status.signal(), signal.map(Signal::as_raw));
        fs::remove_file(begun).unwrap();
        until("the folder is empty", || fs::read_dir(&folder).unwrap().next().is_none());
        let left = processes::find(|process| process.uses(folder.path()));
        assert!(left.is_empty(), "{end} {signal:?}: {left:?}");
    }
}

fn until(what: &str, condition: impl Fn() -> bool) {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < LIMIT, "{what}");
        thread::sleep(Duration::from_millis(50));
    }
}
