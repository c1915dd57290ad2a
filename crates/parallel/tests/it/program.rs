use std::process::Command;

use crate::job::{self, Job};

const PROGRAM: &str = env!("CARGO_BIN_EXE_parallel-ranks");

/// `mpirun -n RANKS parallel-ranks WORD`.
pub(crate) fn mpirun(ranks: usize, word: &str, variables: &[(&str, &str)]) -> Job {
    mpirun_with(&[], ranks, word, variables)
}

/// The same with more flags of mpirun.
pub(crate) fn mpirun_with(
    flags: &[&str],
    ranks: usize,
    word: &str,
    variables: &[(&str, &str)],
) -> Job {
    let mut command = job::mpirun();
    command.args(flags).arg("-n").arg(ranks.to_string()).arg(PROGRAM).arg(word);
    job::start(command, variables)
}

/// The program by itself.
pub(crate) fn alone(word: &str, variables: &[(&str, &str)]) -> Job {
    let mut command = Command::new(PROGRAM);
    command.arg(word);
    job::start(command, variables)
}
