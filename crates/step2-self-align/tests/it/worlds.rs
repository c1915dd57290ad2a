use std::fs;
use std::path::Path;
use std::time::Duration;

use dromedary_self_align::Done;
use rustix::process::{Signal, kill_process};

use crate::faults::{flags, with};
use crate::job;
use crate::kills::{assert_whole, numbered, rows, until_rows, world};
use crate::support::folder_of;

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
