use std::path::Path;
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;

use crate::job::Job;
use crate::program::mpirun;

const SOURCE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/stand_in/nccl.c");

/// A folder with the stand-in built in it.
struct StandIn {
    folder: TempDir,
}

impl StandIn {
    fn build() -> Self {
        let folder = tempfile::tempdir().unwrap();
        compile(&["-shared", "-fPIC", SOURCE], &folder.path().join("libnccl.so.2"));
        Self { folder }
    }

    /// A job whose ranks it joins.
    fn job(&self, ranks: usize, word: &str, more: &[(&str, &str)]) -> Job {
        let folder = self.folder.path().to_str().unwrap();
        let library = format!("{folder}/libnccl.so.2");
        let own = [("NCCL_STAND_IN", library.as_str()), ("NCCL_STAND_IN_FOLDER", folder)];
        mpirun(ranks, word, &[&own, more].concat())
    }
}

fn compile(arguments: &[&str], output: &Path) {
    let flags = ["-std=c11", "-D_GNU_SOURCE", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread"];
    let status = Command::new("cc").args(flags).args(arguments).arg("-o").arg(output).status();
    assert!(status.unwrap().success());
}

#[test]
fn ranks_that_nccl_joins_keep_the_contract() {
    let stand_in = StandIn::build();
    for ranks in [2, 3] {
        let end = stand_in.job(ranks, "nccl-contract", &[]).finish();
        end.assert_success().assert_nothing_left(ranks);
        for rank in 0..ranks {
            end.assert_said(&format!("rank {rank} kept the contract through NCCL"));
        }
    }
}

/// Collectives could as well go through the group that NCCL's was made of, and nobody would see it.
#[test]
fn every_kind_of_collective_goes_through_nccl() {
    let end = StandIn::build().job(2, "nccl-each", &[]).finish();
    end.assert_success().assert_nothing_left(2);
    // Four broadcasts, and one for a gather in which one of two ranks has rows.
    let counts = "NCCL was called for 2 sums, 3 maxima, 5 broadcasts, 5 gathers";
    assert_eq!(end.said.matches(counts).count(), 2, "{}", end.said);
}

const FAILING: [(&str, &str); 2] = [("NCCL_STAND_IN_FAILS", "0"), ("NCCL_STAND_IN_RANK", "1")];

/// NCCL frees a communicator that is aborted: neither a call nor the group's end may come to it again.
#[test]
fn a_group_that_an_error_has_ended_is_not_used_again() {
    let end = StandIn::build().job(2, "nccl-ended", &FAILING).end(Duration::from_secs(60));
    end.assert_success().assert_nothing_left(2);
    for rank in 0..2 {
        end.assert_said(&format!("rank {rank} got an error each time"));
    }
    assert_eq!(end.said.matches("NCCL was told to abort").count(), 2, "{}", end.said);
}

#[test]
fn an_error_that_turns_up_later_ends_the_job() {
    let stand_in = StandIn::build();
    let end = stand_in.job(2, "nccl", &FAILING).end(Duration::from_secs(60));
    end.assert_code(1);
    end.assert_said("all_reduce_sum: NCCL: a collective gives 6, a rank is gone");
    end.assert_said("NCCL was told to abort");
    end.assert_nothing_left(2);
}

#[test]
fn a_rank_that_does_not_come_is_found_by_the_deadline() {
    let stand_in = StandIn::build();
    let end =
        stand_in.job(2, "nccl-late", &[("NCCL_STAND_IN_LATE", "1")]).end(Duration::from_secs(60));
    end.assert_code(124);
    end.assert_said("no answer in collective 1 (all_reduce_sum)");
    end.assert_nothing_left(2);
}

#[test]
fn a_library_that_is_missing_is_named() {
    let stand_in = StandIn::build();
    let end = stand_in.job(2, "nccl", &[("NCCL_STAND_IN", "/nonexistent/libnccl.so.2")]).finish();
    end.assert_code(1);
    end.assert_said("/nonexistent/libnccl.so.2");
}

/// The stand-in itself: what breaks a rule of the header does not pass.
#[test]
fn the_stand_in_notices_misuse() {
    const BEGIN: &str = "unique_id id; void *comm; float x[4] = {0}; \
        ncclGetUniqueId(&id); cuCtxSetCurrent(&queue); ncclCommInitRank(&comm, 1, id, 0);";
    for (calls, said) in [
        (
            "ncclAllReduce(x, x, 4, 7, 0, comm, 0); while (cuStreamQuery(0)) {} ncclCommGetAsyncError(comm, &(int){0});",
            "",
        ),
        ("ncclAllReduce(x, x, 4, 7, 4, comm, 0);", "4 is no operation"),
        ("ncclAllReduce(x, x, FLOAT32, 4000, SUM, comm, 0);", "4000 is no type"),
        ("ncclAllReduce(x, x, 4, FLOAT32, SUM, comm, x);", "not the null stream"),
        ("ncclAllReduce(x, 0, 4, FLOAT32, SUM, comm, 0);", "a null pointer"),
        ("ncclAllReduce(x, x, 0, FLOAT32, SUM, comm, 0);", "no elements"),
        ("ncclAllReduce(x, x, 4, FLOAT32, SUM, x, 0);", "no communicator"),
        ("ncclBroadcast(x, x, 4, FLOAT32, 1, comm, 0);", "root 1"),
        ("ncclBroadcast(x, x, 4, 0, FLOAT32, comm, 0);", "root 7"),
        ("ncclCommInitRank(&comm, 2, id, 2);", "rank 2 of 2"),
        ("ncclGroupEnd();", "the end of a group that was never started"),
        ("ncclGroupStart(); ncclGroupStart();", "a group within a group"),
        ("ncclGroupStart();", "groups were never ended"),
        (
            "ncclAllGather(x, x, 1, FLOAT32, comm, 0); while (cuStreamQuery(0)) {}",
            "never asked for",
        ),
        ("id.bytes[127] = 0; ncclCommInitRank(&comm, 1, id, 0);", "byte 127 of an identity"),
        ("memset(id.bytes, 1, 128); ncclCommInitRank(&comm, 1, id, 0);", "not an identity"),
        ("ncclCommAbort(comm); ncclCommAbort(comm);", "ncclCommAbort: no communicator"),
        ("ncclCommAbort(comm); ncclAllReduce(x, x, 4, FLOAT32, SUM, comm, 0);", "no communicator"),
        ("cuCtxSetCurrent(0); ncclAllReduce(x, x, 4, FLOAT32, SUM, comm, 0);", "no GPU is current"),
    ] {
        assert_ends(&format!("{BEGIN} {calls}"), said);
    }
}

/// Two processes that do not call the same are both ended.
#[test]
fn the_stand_in_notices_ranks_that_disagree() {
    const BEGIN: &str = "unique_id id; void *comm; float x[4] = {0}; ncclGetUniqueId(&id); \
        int rank = fork() == 0; cuCtxSetCurrent(&queue); ncclCommInitRank(&comm, 2, id, rank);";
    const END: &str = "while (cuStreamQuery(0)) {} ncclCommGetAsyncError(comm, &(int){0});";
    for (calls, said) in [
        ("ncclAllReduce(x, x, 4, FLOAT32, SUM, comm, 0);", ""),
        ("ncclAllReduce(x, x, 1 + rank, FLOAT32, SUM, comm, 0);", "reduce of 2 x type 7"),
        ("ncclAllReduce(x, x, 2, rank ? FLOAT32 : INT64, SUM, comm, 0);", "reduce of 2 x type 4"),
        ("ncclAllReduce(x, x, 2, FLOAT32, rank ? SUM : MAX, comm, 0);", "reduce of 2 x type 7 (2)"),
        ("ncclBroadcast(x, x, 2, FLOAT32, rank, comm, 0);", "bcast of 2 x type 7 (1)"),
        (
            "rank ? ncclAllGather(x, x, 1, FLOAT32, comm, 0) : ncclBroadcast(x, x, 1, FLOAT32, 0, comm, 0);",
            "gather of 1",
        ),
    ] {
        assert_ends(&format!("{BEGIN} {calls} {END}"), said);
    }
}

/// Ends a program of these statements with this word of the stand-in, or well where it is empty.
#[track_caller]
fn assert_ends(statements: &str, said: &str) {
    let folder = tempfile::tempdir().unwrap();
    let (source, program) = (folder.path().join("calls.c"), folder.path().join("calls"));
    let text =
        format!("#include \"{SOURCE}\"\nint main(void) {{ {statements} (void)x; return 0; }}\n");
    std::fs::write(&source, text).unwrap();
    compile(&[source.to_str().unwrap()], &program);
    let mut command = Command::new(&program);
    let output = command.env("NCCL_STAND_IN_FOLDER", folder.path()).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    let code = if said.is_empty() { 0 } else { 66 };
    assert_eq!(output.status.code(), Some(code), "{statements}: {stderr}");
    assert!(stderr.contains(said), "{statements}: {stderr}");
}
