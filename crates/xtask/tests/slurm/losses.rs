use rustix::process::{Signal, kill_process};

use crate::cluster::Cluster;
use crate::processes;
use crate::work::Work;

/// Slurm looks every 30 s whose time is nearly over, and counts in minutes. Until it has sent its
/// signal the task is kept from working, so that it does not finish before.
#[test]
#[ignore = "needs Slurm: cargo xtask test --slurm"]
fn a_job_whose_time_is_nearly_over_goes_back_into_the_queue_and_finishes() {
    let (cluster, work) = (Cluster::start(), Work::slow(100));
    let job = work.submit(&cluster, &["--time=00:01:00", "--signal=USR1@50"], &[]);
    work.until_in_the_middle(&cluster);
    let own = format!("SLURM_JOB_ID={}", job.id);
    let tasks = processes::find(|process| {
        process.runs("step2-self-align")
            && process.has_variable(&own)
            && process.uses(cluster.folder())
    });
    let [task] = tasks[..] else { panic!("{tasks:?}") };
    kill_process(task, Signal::STOP).unwrap();
    let before = work.rows().len();
    cluster.wait_until("Slurm has sent its signal", || {
        // Slurm may let the task go on itself.
        if processes::is_pending(task, Signal::USR1) {
            kill_process(task, Signal::CONT).unwrap();
        }
        job.log().contains("SIGUSR1")
    });
    let states = job.complete();
    assert_ne!(states[0]["Restarts"], "0", "{}", job.log());
    assert!(job.log().contains(" of 100 rows are there"), "{}", job.log());
    assert!(before < 100, "{before}");
    work.assert_whole(&cluster);
}

/// A job that may start once only ends as it was stopped, and says so.
#[test]
#[ignore = "needs Slurm: cargo xtask test --slurm"]
fn a_job_that_was_put_back_often_enough_stays_stopped() {
    let (cluster, work) = (Cluster::start(), Work::slow(400));
    let job = work.submit(&cluster, &[], &[("MAX_RESTARTS", "0")]);
    work.until_in_the_middle(&cluster);
    cluster.run("scancel", &["--signal=USR1", &job.id]);
    let states = job.until(&["FAILED", "COMPLETED"]);
    assert_eq!((states[0]["JobState"].as_str(), states[0]["Restarts"].as_str()), ("FAILED", "0"));
    assert_eq!(states[0]["ExitCode"], "75:0");
    assert!(job.log().contains("not put back into the queue: MAX_RESTARTS=0"), "{}", job.log());
}

#[test]
#[ignore = "needs Slurm: cargo xtask test --slurm"]
fn a_cancelled_job_is_continued_by_the_same_line() {
    let (cluster, work) = (Cluster::start(), Work::slow(60));
    let job = work.submit(&cluster, &["--nodes=2"], &[]);
    work.until_in_the_middle(&cluster);
    cluster.run("scancel", &[&job.id]);
    // Its tasks save what they have; until they are gone, another job would be refused.
    cluster.wait_until("the first job is gone", || {
        cluster.run("squeue", &["--noheader", "--jobs", &job.id]).trim().is_empty()
    });
    assert_eq!(job.states()[0]["JobState"], "CANCELLED");
    work.submit(&cluster, &["--nodes=2"], &[]).complete();
    work.assert_whole_of_two(&cluster);
}

/// Elements of an array on one node each: the other one does not notice, and Slurm starts the lost one
/// anew where there is room.
#[test]
#[ignore = "needs Slurm: cargo xtask test --slurm"]
fn a_lost_node_costs_one_group_which_is_started_anew() {
    let (cluster, work) = (Cluster::start(), Work::slow(300));
    let job = work.submit(&cluster, &["--array=0-1", "--exclusive"], &[]);
    work.until_in_the_middle(&cluster);
    job.until(&["RUNNING"]);
    cluster.kill_node("n2");
    let states = job.complete();
    let mut restarts: Vec<&str> = states.iter().map(|state| state["Restarts"].as_str()).collect();
    restarts.sort_unstable();
    assert_eq!(restarts, ["0", "1"]);
    assert!(states.iter().all(|state| state["NodeList"] == "n1"), "{states:#?}");
    work.assert_whole(&cluster);
}

/// A model that is on both nodes cannot go on without one; its job must not wait for ever, and the
/// same line finishes once the node is back.
#[test]
#[ignore = "needs Slurm: cargo xtask test --slurm"]
fn a_lost_node_ends_the_job_of_a_model_on_two() {
    let (cluster, work) = (Cluster::start(), Work::slow(60));
    let job = work.submit(&cluster, &["--nodes=2"], &[]);
    work.until_in_the_middle(&cluster);
    cluster.kill_node("n2");
    // Either Slurm notices first, and starts the job anew, or the script sees its step fail.
    job.until(&["FAILED", "NODE_FAIL", "PENDING"]);
    cluster.start_node("n2");
    let states = job.until(&["COMPLETED", "FAILED", "NODE_FAIL"]);
    if states[0]["JobState"] != "COMPLETED" {
        work.submit(&cluster, &["--nodes=2"], &[]).complete();
    }
    work.assert_whole_of_two(&cluster);
}

/// A daemon that dies alone leaves its job computing, and Slurm starts it anew on the other node.
/// Both nodes have this machine's name, so the second start sees that the first one lives.
#[test]
#[ignore = "needs Slurm: cargo xtask test --slurm"]
fn a_job_that_slurm_has_lost_sight_of_is_not_done_twice() {
    let (cluster, work) = (Cluster::start(), Work::slow(300));
    let job = work.submit(&cluster, &["--nodelist=n1"], &[]);
    work.until_in_the_middle(&cluster);
    cluster.kill_daemon_of("n1");
    // What Slurm does by itself half a minute later.
    cluster.run("scontrol", &["update", "NodeName=n1", "State=DOWN", "Reason=lost"]);
    // It was to be on that node, which does not come back: any other will do.
    job.until(&["PENDING"]);
    cluster.run("scontrol", &["update", &format!("JobId={}", job.id), "ReqNodeList="]);
    job.until(&["FAILED"]);
    assert!(job.log().contains("aligned.jsonl is in use"), "{}", job.log());
    cluster.wait_until("the first start ends", || !work.finished().is_empty());
    work.assert_whole(&cluster);
}
