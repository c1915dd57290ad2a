//! `llama complete` over several ranks that fail.

use std::{process::Command, time::Duration};

use crate::{job, support::stories};

/// Against hanging: a job ends within a second or two once a rank has failed.
const SOON: Duration = Duration::from_secs(60);

const GREEDY: [&str; 4] = ["--temperature", "0", "--prompt", "Once"];

fn program() -> Vec<String> {
    let mut words = vec![env!("CARGO_BIN_EXE_llama").to_owned(), "complete".to_owned()];
    words.extend(["--checkpoint".to_owned(), stories().display().to_string()]);
    words.extend(["--threads", "1", "--device", "cpu"].map(str::to_owned));
    words.extend(GREEDY.map(str::to_owned));
    words
}

/// Two ranks, the second with more flags.
fn two_ranks(more: &[&str]) -> Command {
    let mut command = job::mpirun();
    command.args(["-n", "1"]).args(program());
    command.args([":", "-n", "1"]).args(program()).args(more);
    command
}

#[test]
fn a_panic_on_one_rank_ends_all_and_is_named() {
    let fault = [("DROMEDARY_FAULT", "rank=1,point=layer3")];
    let mut job = job::start(two_ranks(&[]), &fault);
    job.until_said("fault on purpose", 1);
    let end = job.end(SOON);
    end.assert_code(101).assert_said("rank 1: panicked at").assert_nothing_left(2);
    end.assert_said("fault on purpose at layer3");
}

#[test]
fn ranks_with_other_settings_are_told_both_values() {
    let fault = [("DROMEDARY_FAULT", "rank=0,point=layer0")];
    let end = job::start(two_ranks(&["--seed", "9"]), &fault).finish();
    end.assert_code(1).assert_nothing_left(2);
    end.assert_said("ranks disagree on seed: rank 0 has 0, rank 1 has 9");
    assert!(!end.said.contains("fault on purpose"), "a layer was computed:\n{}", end.said);
}

/// The model has 8 query heads.
#[test]
fn more_ranks_than_heads_are_refused_with_both_numbers() {
    let mut command = job::mpirun();
    command.args(["-n", "9"]).args(program());
    let fault = [("DROMEDARY_FAULT", "rank=0,point=layer0")];
    let end = job::start(command, &fault).finish();
    end.assert_code(1).assert_said("tp = 9 is not in 1..=8").assert_nothing_left(9);
    assert!(!end.said.contains("fault on purpose"), "a layer was computed:\n{}", end.said);
}

#[test]
fn tasks_that_do_not_see_each_other_are_refused() {
    let words = program();
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]);
    let by_srun = [("SLURM_STEP_NUM_TASKS", "2"), ("SLURM_NTASKS", "2"), ("SLURM_PROCID", "1")];
    let end = job::start(command, &by_srun).finish();
    end.assert_code(1).assert_said("started as 2 tasks, but MPI sees 1");
    end.assert_said("srun --mpi=pmix");
}
