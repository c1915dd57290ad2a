use std::time::{Duration, Instant};

use rustix::process::{Signal, kill_process};

use crate::job::Job;
use crate::program::{alone, mpirun};

/// Against hanging: a job ends within a second or two once a rank has failed.
const SOON: Duration = Duration::from_secs(60);

/// Longer than that, and the control still hangs.
const WAITED: Duration = Duration::from_secs(10);

/// A job whose rank 1 has just said that it fails.
fn failing(ranks: usize, word: &str, variables: &[(&str, &str)]) -> Job {
    let mut job = mpirun(ranks, word, variables);
    job.until_said("failing", 1);
    job
}

#[test]
fn without_the_launch_a_panic_hangs_the_job() {
    let end = failing(2, "control", &[]).end(WAITED);
    assert!(end.status.is_none(), "ended by itself:\n{}", end.said);
    end.assert_said("rank 1 falls without a hook").assert_nothing_left(2);
}

#[test]
fn a_panic_on_one_rank_ends_the_job() {
    for ranks in [2, 3] {
        let end = failing(ranks, "panic", &[]).end(SOON);
        end.assert_code(101).assert_nothing_left(ranks);
        end.assert_said("rank 1 falls").assert_said("rank 1: panicked at");
    }
}

#[test]
fn a_panic_in_a_thread_that_nobody_asks_about_ends_the_job() {
    let end = failing(2, "panic-in-thread", &[]).end(SOON);
    end.assert_code(101).assert_said("rank 1: panicked at").assert_nothing_left(2);
}

#[test]
fn an_error_on_one_rank_ends_the_job() {
    let end = failing(3, "error", &[]).end(SOON);
    end.assert_code(1).assert_nothing_left(3);
    end.assert_said("rank 1: split: 42 is above 2^31 - 1; ending all ranks");
}

#[test]
fn groups_that_do_not_divide_the_ranks_are_refused_with_both_numbers() {
    let end = mpirun(4, "groups-of-3", &[]).finish();
    end.assert_code(1).assert_said("tp = 3 does not divide the 4 ranks").assert_nothing_left(4);
    mpirun(3, "groups-of-3", &[]).finish().assert_success();
}

#[test]
fn an_error_that_drops_the_launch_ends_the_job() {
    let end = failing(2, "drop", &[]).end(SOON);
    end.assert_code(1).assert_said("rank 1: left before the end of the job");
    end.assert_nothing_left(2);
}

#[test]
fn a_job_ends_with_the_code_of_the_rank_that_ends_it() {
    let end = failing(2, "code", &[]).end(SOON);
    end.assert_code(7).assert_said("rank 1: chosen code").assert_nothing_left(2);
    let end = failing(2, "abort", &[]).end(SOON);
    end.assert_code(9).assert_said("rank 1: asked to end").assert_nothing_left(2);
}

#[test]
fn a_rank_that_exits_ends_the_job() {
    let end = failing(2, "exit", &[]).end(SOON);
    end.assert_code(3).assert_nothing_left(2);
}

#[test]
fn a_killed_rank_ends_the_job() {
    let end = failing(3, "kill", &[]).end(SOON);
    end.assert_code(128 + 9).assert_nothing_left(3);
}

#[test]
fn ranks_do_not_outlive_their_launcher() {
    let job = failing(2, "late", &[]);
    kill_process(job.launcher(), Signal::KILL).unwrap();
    job.end(SOON).assert_nothing_left(2);
}

#[test]
fn a_termination_of_the_launcher_ends_the_ranks() {
    let job = failing(2, "late", &[]);
    kill_process(job.launcher(), Signal::TERM).unwrap();
    let end = job.end(SOON);
    assert!(end.status.is_some_and(|status| !status.success()), "said:\n{}", end.said);
    end.assert_nothing_left(2);
}

/// A stalled rank is found by its deadline, and whoever waits says where it stands: the first one to, and
/// others if they come to it before that one has ended the job.
#[test]
fn a_stopped_rank_ends_the_job_at_the_deadline() {
    let job = failing(3, "stop", &[("DROMEDARY_COLLECTIVE_TIMEOUT", "10")]);
    let begin = Instant::now();
    let end = job.end(SOON);
    assert!(begin.elapsed() >= Duration::from_secs(1), "before its deadline:\n{}", end.said);
    end.assert_code(124).assert_nothing_left(3);
    let found = |rank: usize| {
        end.said.contains(&format!(
            "rank {rank}: no answer in collective 3 (barrier); last collective by rank: \
             rank 0: 3 (barrier), rank 1: 2 (barrier), rank 2: 3 (barrier)"
        ))
    };
    assert!(found(0) || found(2), "{}", end.said);
}

#[test]
fn a_rank_that_does_not_come_is_found_by_the_deadline() {
    let end = failing(2, "late", &[("DROMEDARY_COLLECTIVE_TIMEOUT", "5")]).end(SOON);
    end.assert_code(124).assert_said("for 5 s; ending all ranks").assert_nothing_left(2);
}

#[test]
fn tasks_that_do_not_see_each_other_are_refused() {
    let by_srun = [("SLURM_STEP_NUM_TASKS", "2"), ("SLURM_NTASKS", "2"), ("SLURM_PROCID", "0")];
    let end = alone("refused", &by_srun).finish();
    end.assert_code(1).assert_said("started as 2 tasks, but MPI sees 1");
    end.assert_said("srun --mpi=pmix");
    // As under the mpirun of another MPI.
    let end = alone("refused", &[("PMI_SIZE", "4")]).finish();
    end.assert_code(1).assert_said("started as 4 tasks, but MPI sees 1");
}

#[test]
fn a_deadline_that_is_no_number_is_refused() {
    let end = mpirun(2, "refused", &[("DROMEDARY_COLLECTIVE_TIMEOUT", "soon")]).finish();
    assert!(end.status.is_some_and(|status| !status.success()), "said:\n{}", end.said);
    end.assert_said("environment variable DROMEDARY_COLLECTIVE_TIMEOUT is `soon`");
}
