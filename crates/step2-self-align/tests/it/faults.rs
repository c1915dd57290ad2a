use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::generate::STORIES;
use crate::job::{self, End, Job};
use crate::support::{copy_model, folder_of, stories260k};

/// Against hanging: a job ends within a few seconds once a rank has failed.
const SOON: Duration = Duration::from_secs(60);

/// Longer than a job that ends by itself takes for it.
const WAITED: Duration = Duration::from_secs(10);

/// Flags of `step2-self-align generate`: two rows at once, drawn at random, the same in every run.
pub(crate) fn flags(folder: &Path) -> Vec<String> {
    let path = |name: &str| folder.join(name).display().to_string();
    let mut flags = vec!["generate".to_owned()];
    for (flag, value) in [
        ("--checkpoint", stories260k().display().to_string()),
        ("--input-file", path("prompts.json")),
        ("--output-file", path("aligned.jsonl")),
        ("--meta-prompt-file", path("prompt.txt")),
        ("--max-seq-len", "200".to_owned()),
        ("--max-gen-len", "24".to_owned()),
        ("--max-batch-size", "2".to_owned()),
        ("--temperature", "1".to_owned()),
        ("--top-p", "1".to_owned()),
        ("--deterministic", "true".to_owned()),
        ("--device", "cpu".to_owned()),
        ("--threads", "1".to_owned()),
    ] {
        flags.extend([flag.to_owned(), value]);
    }
    flags
}

/// The flags with another value of one of them.
pub(crate) fn with(flags: &[String], flag: &str, value: &str) -> Vec<String> {
    let mut other = flags.to_vec();
    let place = other.iter().position(|other| other == flag).unwrap() + 1;
    other[place] = value.to_owned();
    other
}

/// Two ranks that hold one model together, each with its own flags.
fn two_ranks(flags: [&[String]; 2], variables: &[(&str, &str)]) -> Job {
    let program = env!("CARGO_BIN_EXE_step2-self-align");
    let mut command = job::mpirun();
    command.args(["-n", "1", program]).args(flags[0]);
    command.args([":", "-n", "1", program]).args(flags[1]);
    job::start(command, variables)
}

/// Two ranks of one command, one of which comes to a fault.
fn with_fault(folder: &Path, fault: &str, variables: &[(&str, &str)]) -> Job {
    let flags = flags(folder);
    let variables = [variables, &[("DROMEDARY_FAULT", fault)]].concat();
    let mut job = two_ranks([&flags, &flags], &variables);
    job.until_said("fault on purpose", 1);
    job
}

fn sorted_lines(folder: &Path) -> Vec<String> {
    let text = fs::read_to_string(folder.join("aligned.jsonl")).unwrap();
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    lines.sort_unstable();
    lines
}

#[test]
fn a_run_whose_rank_was_killed_is_continued_to_the_same_rows() {
    let (whole, broken) = (folder_of(&STORIES), folder_of(&STORIES));
    let flags_of = [flags(whole.path()), flags(broken.path())];
    let end = two_ranks([&flags_of[0], &flags_of[0]], &[]).finish();
    end.assert_success();
    assert!(end.said.contains("MKL_CBWR=AVX2"), "{}", end.said);
    let whole = sorted_lines(whole.path());
    assert_eq!(whole.len(), STORIES.len());

    let broken = broken.path();
    // In the second of three batches.
    let end = with_fault(broken, "rank=1,point=step30,how=kill", &[]).end(SOON);
    assert!(end.status.is_some_and(|status| !status.success()), "{}", end.said);
    end.assert_nothing_left(2);
    let rows = sorted_lines(broken).len();
    assert!((1..STORIES.len()).contains(&rows), "{rows} rows were there");
    assert!(!broken.join("aligned.jsonl.done").exists());

    two_ranks([&flags_of[1], &flags_of[1]], &[]).finish().assert_success();
    assert_eq!(sorted_lines(broken), whole);
    assert!(broken.join("aligned.jsonl.done").exists());
}

#[test]
fn a_panic_or_an_error_on_one_rank_ends_all_and_is_named() {
    for (how, code, cause) in
        [("panic", 101, "rank 1: panicked at"), ("error", 1, "rank 1: fault on purpose at layer3")]
    {
        let folder = folder_of(&STORIES);
        let fault = format!("rank=1,point=layer3,how={how}");
        let end = with_fault(folder.path(), &fault, &[]).end(SOON);
        end.assert_code(code).assert_said(cause).assert_nothing_left(2);
        end.assert_said("fault on purpose at layer3");
    }
}

/// The control: a rank that tells nobody leaves the others waiting for as long as they are let.
#[test]
fn a_rank_that_stops_without_a_word_is_waited_for() {
    let folder = folder_of(&STORIES);
    let end = with_fault(folder.path(), "rank=1,point=layer3,how=hang", &[]).end(WAITED);
    assert!(end.status.is_none(), "ended by itself:\n{}", end.said);
    end.assert_nothing_left(2);
}

#[test]
fn a_stalled_rank_is_found_by_its_last_collective() {
    let folder = folder_of(&STORIES);
    // Ten times what the collectives of the start take, which it holds for as well.
    let limit = [("DROMEDARY_COLLECTIVE_TIMEOUT", "10")];
    let job = with_fault(folder.path(), "rank=1,point=step5,how=stop", &limit);
    let begin = Instant::now();
    let end = job.end(SOON);
    assert!(begin.elapsed() >= Duration::from_secs(1), "before its deadline:\n{}", end.said);
    end.assert_code(124).assert_nothing_left(2);
    end.assert_said("rank 0: no answer in collective ").assert_said("rank 0: ");
    // Rank 1 has been through the collective before the one in which rank 0 waits.
    let number = |rank: &str| -> u64 {
        let report = end.said.split("last collective by rank: ").nth(1).unwrap();
        let entry = report.split(rank).nth(1).unwrap();
        entry.split_whitespace().next().unwrap().parse().unwrap()
    };
    assert_eq!(number("rank 0: "), number("rank 1: ") + 1, "{}", end.said);
}

/// Fails if anything is computed: the first layer of rank 0 is a fault.
fn refused(flags: [&[String]; 2]) -> End {
    let end = two_ranks(flags, &[("DROMEDARY_FAULT", "rank=0,point=layer0")]).finish();
    end.assert_code(1).assert_nothing_left(2);
    assert!(!end.said.contains("fault on purpose"), "a layer was computed:\n{}", end.said);
    end
}

#[test]
fn ranks_that_disagree_are_told_both_values_before_anything_is_computed() {
    let folder = folder_of(&STORIES);
    let folder = folder.path();
    let own = flags(folder);
    let with = |flag: &str, value: &str| with(&own, flag, value);
    refused([&own, &with("--max-gen-len", "30")])
        .assert_said("ranks disagree on max_gen_len: rank 0 has 24, rank 1 has 30");

    let input = folder.join("others.json");
    fs::copy(folder.join("prompts.json"), &input).unwrap();
    refused([&own, &with("--input-file", input.to_str().unwrap())])
        .assert_said("ranks disagree on input_file: rank 0 has ")
        .assert_said("prompts.json")
        .assert_said("others.json");

    // One bit of one weight, behind the header and within what a fingerprint reads of a tensor.
    let checkpoint = folder.join("model");
    copy_model(&checkpoint);
    let weights = checkpoint.join("model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let header = u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
    bytes[8 + header] ^= 1;
    fs::write(&weights, bytes).unwrap();
    let end = refused([&own, &with("--checkpoint", checkpoint.to_str().unwrap())]);
    end.assert_said("ranks disagree on checkpoint: rank 0 has ").assert_said(", rank 1 has ");
    assert!(!folder.join("aligned.jsonl").exists());

    // Where each rank has its files is its own affair, if they are the same.
    fs::copy(stories260k().join("model.safetensors"), &weights).unwrap();
    let same = with("--checkpoint", checkpoint.to_str().unwrap());
    two_ranks([&own, &same], &[]).finish().assert_success();
}

/// As srun without PMIx starts them: each task would do all of the work.
#[test]
fn tasks_that_do_not_see_each_other_are_refused() {
    let folder = folder_of(&STORIES);
    let mut command = Command::new(env!("CARGO_BIN_EXE_step2-self-align"));
    command.args(flags(folder.path()));
    let by_srun = [("SLURM_STEP_NUM_TASKS", "2"), ("SLURM_NTASKS", "2"), ("SLURM_PROCID", "0")];
    let end = job::start(command, &by_srun).finish();
    end.assert_code(1).assert_said("started as 2 tasks, but MPI sees 1");
    end.assert_said("srun --mpi=pmix");
    assert!(!folder.path().join("aligned.jsonl").exists());
}
