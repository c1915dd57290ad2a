use std::fs;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Duration;

use dromedary_llama::{DEFAULT_MAX_SHARD_SIZE, QuantizeOptions, quantize};
use dromedary_self_align::Done;
use rustix::process::{Signal, kill_process};

use crate::faults::{flags, with};
use crate::job;
use crate::kills::{assert_whole, numbered, rows, until_rows, world};
use crate::support::{folder_of, run_to, stories260k};

/// So many prompts that one group has not done them all before the other begins.
const PROMPTS: usize = 240;
/// So many that they last until a signal comes.
const MANY: usize = 400;

fn prompts() -> tempfile::TempDir {
    folder_of_numbered(PROMPTS)
}

fn folder_of_numbered(count: usize) -> tempfile::TempDir {
    let prompts = numbered(count);
    folder_of(&prompts.iter().map(String::as_str).collect::<Vec<_>>())
}

/// The rows of one group of two ranks, alone in its world.
fn of_one_group(prompts: usize) -> Vec<String> {
    let folder = folder_of_numbered(prompts);
    job::start(world(&flags(folder.path()), 2, 2), &[]).finish().assert_success();
    let rows = rows(folder.path());
    assert_eq!(rows.len(), prompts);
    rows
}

fn rows_of_group(folder: &Path, group: usize) -> usize {
    let path = folder.join(format!("aligned_2shards_{group}.jsonl"));
    fs::read_to_string(path).map_or(0, |text| text.lines().count())
}

#[test]
fn two_groups_of_two_ranks_write_each_row_once_and_as_one_process_does() {
    let (alone, together) = (prompts(), prompts());
    let greedy = |folder: &Path, n: usize, tp: usize| {
        let flags = with(&flags(folder), "--temperature", "0");
        job::start(world(&flags, n, tp), &[]).finish().assert_success();
        rows(folder)
    };
    let one = greedy(alone.path(), 1, 1);
    let folder = together.path();
    let four = greedy(folder, 4, 2);
    assert_eq!((one.len(), four.len()), (PROMPTS, PROMPTS));
    assert_eq!(four, one);
    // The work was shared, and only the first rank of each group wrote.
    for group in 0..2 {
        assert!(rows_of_group(folder, group) > 0, "group {group}");
        let path = folder.join(format!("aligned_2shards_{group}.jsonl"));
        assert_eq!(Done::check(&path).unwrap().rows, rows_of_group(folder, group) as u64);
    }
    assert!(!folder.join("aligned_4shards_0.jsonl").exists());
}

#[test]
fn two_groups_of_two_ranks_that_lose_one_are_continued_by_one_group() {
    let whole = of_one_group(PROMPTS);
    let folder = prompts();
    let folder = folder.path();
    // The second rank of the second group, which writes nothing itself.
    let fault = [("DROMEDARY_FAULT", "rank=3,point=step30,how=kill")];
    let mut job = job::start(world(&flags(folder), 4, 2), &fault);
    job.until_said("fault on purpose", 1);
    let end = job.end(Duration::from_secs(30));
    assert!(end.status.is_some_and(|status| !status.success()), "{}", end.said);
    end.assert_nothing_left(4);
    assert!((1..PROMPTS).contains(&rows(folder).len()), "{}", rows(folder).len());
    job::start(world(&flags(folder), 2, 2), &[]).finish().assert_success();
    // Drawn tokens too are the same bytes, whatever the number of groups was.
    assert_eq!(rows(folder), whole);
}

#[test]
fn a_signal_stops_groups_of_several_ranks_at_a_row() {
    let folder = folder_of_numbered(MANY);
    let folder = folder.path();
    let job = job::start(world(&flags(folder), 4, 2), &[]);
    until_rows(folder);
    // mpirun hands it on; a SIGTERM would end mpirun itself.
    kill_process(job.launcher(), Signal::USR1).unwrap();
    let end = job.end(Duration::from_secs(60));
    assert_eq!(end.status.and_then(|status| status.code()), Some(75), "{}", end.said);
    end.assert_said("of 400 rows are there");
    // Rank 0 has shown the rows of both groups.
    for part in ["/400 rows, ", " rows/s, ", " left, ", " tokens/s in 2 groups, ", " of 2 slots"] {
        end.assert_said(part);
    }
    let before = rows(folder);
    assert!((1..MANY).contains(&before.len()), "{}", before.len());
    for group in 0..2 {
        assert!(!folder.join(format!("aligned_2shards_{group}.jsonl.done")).exists());
    }
    job::start(world(&flags(folder), 4, 2), &[]).finish().assert_success();
    let after = rows(folder);
    assert!(before.iter().all(|row| after.contains(row)));
    assert_whole(folder, 2, &of_one_group(MANY), "after the signal");
}

/// A model that `llama quantize` has written, on one rank and on two, with a kept prefix.
#[test]
fn rows_from_four_bits_are_those_of_the_dequantised_model() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("nf4");
    let options = QuantizeOptions {
        checkpoint: stories260k(),
        output: model.clone(),
        max_shard_size: DEFAULT_MAX_SHARD_SIZE,
        verify: false,
    };
    quantize(&options, &mut |_| ControlFlow::Continue(())).unwrap();
    let prompts = numbered(12);
    let prompts: Vec<&str> = prompts.iter().map(String::as_str).collect();
    let answered = |ranks: usize, more: &[&str]| {
        let own = folder_of(&prompts);
        let flags = with(&flags(own.path()), "--checkpoint", model.to_str().unwrap());
        let mut flags = with(&flags, "--temperature", "0");
        flags.extend(more.iter().map(|flag| (*flag).to_owned()));
        let end = job::start(world(&flags, ranks, ranks), &[]).finish();
        end.assert_success();
        (rows(own.path()), end.said.contains("linear layers stay in four bits"))
    };
    let (want, kept) = answered(1, &["--bits", "16"]);
    assert!(want.len() == prompts.len() && !kept);
    let cache = folder.path().join("prefixes");
    let cached = ["--prefix-cache", cache.to_str().unwrap()];
    for (ranks, more) in [(1, &[][..]), (1, &cached[..]), (1, &cached[..]), (2, &["--bits", "4"])] {
        assert_eq!(answered(ranks, more), (want.clone(), true), "{ranks} ranks, {more:?}");
    }
    // The plan knows it, and what is not stored so is refused.
    let own = folder_of(&prompts);
    let planned = |checkpoint: &Path, more: &str| {
        let checkpoint = checkpoint.display();
        let command = format!(
            "plan --checkpoint {checkpoint} --input-file prompts.json --meta-prompt-file prompt.txt \
             --max-seq-len 200 --max-gen-len 24 --device cpu {more}"
        );
        let output = crate::support::run(own.path(), &command);
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(planned(&model, ""), planned(&stories260k(), "--bits 4"));
    assert_eq!(planned(&model, "--bits 16"), planned(&stories260k(), ""));
    let command = format!(
        "generate --checkpoint {} --input-file prompts.json --output-file rows.jsonl --bits 4 \
         --meta-prompt-file prompt.txt --max-seq-len 200 --max-gen-len 24",
        stories260k().display()
    );
    let said = run_to(1, own.path(), &command);
    assert!(said.contains("--bits 4") && said.contains("llama quantize"), "{said}");
}
