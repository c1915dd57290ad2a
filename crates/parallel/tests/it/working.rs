use crate::program::{alone, mpirun};

#[track_caller]
fn keeps_the_contract(ranks: usize) {
    let end = mpirun(ranks, "contract", &[]).finish();
    end.assert_success().assert_nothing_left(ranks);
    for rank in 0..ranks {
        let line = format!("rank {rank} of {ranks} kept the contract, local rank {rank}, mpi true");
        end.assert_said(&line);
    }
}

#[test]
fn two_processes_keep_the_contract() {
    keeps_the_contract(2);
}

#[test]
fn three_processes_keep_the_contract() {
    keeps_the_contract(3);
}

#[test]
fn a_process_alone_keeps_the_contract_without_mpi() {
    let said = "rank 0 of 1 kept the contract, local rank 0, mpi false";
    alone("contract", &[]).finish().assert_success().assert_said(said);
    mpirun(1, "contract", &[]).finish().assert_success().assert_said(said);
}
