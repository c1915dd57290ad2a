use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use dromedary_self_align::Done;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rustix::process::{Pid, Signal, kill_process};

use crate::faults::flags;
use crate::generate::STORIES;
use crate::job;
use crate::{given::soak, support::folder_of};

/// Where a run writes something, in the order in which it comes there.
const WRITE_POINTS: [&str; 13] = [
    "locked0",
    "run-written0",
    "rows-opened0",
    "settings-begun0",
    "settings-written0",
    "unmarked0",
    "row-begun3",
    "row-written1",
    "row-written4",
    "row-measured3",
    "rows-synced0",
    "metrics-synced0",
    "marked0",
];

/// Group `rank` of `size`, in a process of its own.
fn group(folder: &Path, rank: usize, size: usize) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_step2-self-align"));
    command.args(flags(folder));
    command.args(["--group-rank", &rank.to_string(), "--group-size", &size.to_string()]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

fn finish(child: Child) {
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// All groups of that number, one after the other.
fn run_groups(folder: &Path, size: usize) {
    for rank in 0..size {
        finish(group(folder, rank, size).spawn().unwrap());
    }
}

/// The files of rows, by name.
fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<PathBuf> = entries
        .filter(|path| {
            let name = path.file_name().unwrap().to_str().unwrap();
            name.starts_with("aligned") && name.ends_with(".jsonl")
        })
        .collect();
    files.sort();
    files
}

/// The whole lines of all files of rows, sorted; a kill may have left half a line at a file's end.
pub(crate) fn rows(folder: &Path) -> Vec<String> {
    let mut rows = Vec::new();
    for path in files(folder) {
        let text = fs::read_to_string(&path).unwrap();
        for line in text.split_inclusive('\n') {
            let whole = serde_json::from_str::<serde_json::Value>(line).is_ok();
            assert!(whole || !line.ends_with('\n'), "{}: {line}", path.display());
            if whole {
                rows.push(line.trim_end().to_owned());
            }
        }
    }
    rows.sort();
    rows
}

/// Waits until a row is there.
pub(crate) fn until_rows(folder: &Path) {
    let begun = Instant::now();
    while rows(folder).is_empty() {
        assert!(begun.elapsed() < Duration::from_secs(120), "no row was written");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// So many prompts, all different.
pub(crate) fn numbered(count: usize) -> Vec<String> {
    (0..count).map(|n| format!("{} {n}", STORIES[n % STORIES.len()])).collect()
}

/// The rows of a run that nobody disturbs.
fn undisturbed(prompts: &[&str]) -> Vec<String> {
    let folder = folder_of(prompts);
    run_groups(folder.path(), 1);
    let rows = rows(folder.path());
    assert_eq!(rows.len(), prompts.len());
    rows
}

/// Everything is there once, and the files of the last run say so.
pub(crate) fn assert_whole(folder: &Path, size: usize, whole: &[String], what: &str) {
    assert_eq!(rows(folder), whole, "{what}");
    let shard = |path: &PathBuf| {
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        (size == 1 && name == "aligned.jsonl") || name.contains(&format!("_{size}shards_"))
    };
    let last: Vec<PathBuf> = files(folder).into_iter().filter(shard).collect();
    assert_eq!(last.len(), size, "{what}");
    let prompts: u64 = last.iter().map(|path| Done::check(path).unwrap().prompts).sum();
    assert_eq!(prompts, whole.len() as u64, "{what}");
}

#[test]
fn a_run_killed_at_each_write_point_is_continued_by_another_number_of_groups() {
    let whole = undisturbed(&STORIES);
    for (index, point) in WRITE_POINTS.iter().enumerate() {
        let folder = folder_of(&STORIES);
        let folder = folder.path();
        let fault = format!("rank=0,point={point},how=kill");
        let killed = group(folder, 0, 1).env("DROMEDARY_FAULT", fault).output().unwrap();
        let said = String::from_utf8_lossy(&killed.stderr);
        assert_eq!(killed.status.code(), None, "{point}: {said}");
        assert!(said.contains("fault on purpose"), "{point}: {said}");
        assert!(folder.join("aligned.jsonl.lock").exists(), "{point}");
        if *point == "row-begun3" {
            // The kill came while the row was written.
            let own = fs::read_to_string(folder.join("aligned.jsonl")).unwrap();
            let next = whole.iter().find(|row| !own.contains(row.as_str())).unwrap();
            fs::write(folder.join("aligned.jsonl"), own + &next[..next.len() / 2]).unwrap();
        }
        let size = 2 + index % 2;
        run_groups(folder, size);
        assert_whole(folder, size, &whole, point);
        // The number of groups that was killed goes on as well.
        run_groups(folder, 1);
        assert_whole(folder, 1, &whole, point);
    }
}

/// Groups of one world: `n` ranks, each `tp` of which hold the model together.
pub(crate) fn world(flags: &[String], n: usize, tp: usize) -> Command {
    let mut command = job::mpirun();
    command.args(["-n", &n.to_string(), env!("CARGO_BIN_EXE_step2-self-align")]);
    command.args(flags).args(["--tp", &tp.to_string()]);
    command
}

#[test]
fn groups_of_one_world_that_lose_a_rank_are_continued_by_another_number() {
    // So many that rank 0 has not done them all before rank 1 begins.
    let prompts = numbered(120);
    let prompts: Vec<&str> = prompts.iter().map(String::as_str).collect();
    let whole = undisturbed(&prompts);
    for (point, ranks) in [("rank=1,point=row-written1", 2), ("rank=0,point=row-measured3", 2)] {
        let folder = folder_of(&prompts);
        let folder = folder.path();
        let fault = format!("{point},how=kill");
        let mut job = job::start(world(&flags(folder), ranks, 1), &[("DROMEDARY_FAULT", &fault)]);
        job.until_said("fault on purpose", 1);
        let end = job.end(Duration::from_secs(30));
        assert!(end.status.is_some_and(|status| !status.success()), "{}", end.said);
        end.assert_nothing_left(ranks);
        assert!((1..prompts.len()).contains(&rows(folder).len()));
        job::start(world(&flags(folder), 3, 1), &[]).finish().assert_success();
        assert_whole(folder, 3, &whole, point);
        run_groups(folder, 1);
        assert_whole(folder, 1, &whole, point);
    }
}

#[test]
fn a_run_of_another_number_of_groups_waits_for_the_end_of_the_first() {
    let folder = folder_of(&STORIES);
    let folder = folder.path();
    let stopped = "rank=0,point=row-written1,how=stop";
    let mut first = group(folder, 0, 1).env("DROMEDARY_FAULT", stopped).spawn().unwrap();
    until_rows(folder);
    let second = group(folder, 0, 2).output().unwrap();
    let said = String::from_utf8_lossy(&second.stderr);
    assert_eq!(second.status.code(), Some(1), "{said}");
    let expected = ["shared among 1 groups", "this one shares them among 2", "aligned.jsonl: "];
    assert!(expected.iter().all(|text| said.contains(text)), "{said}");
    assert!(said.contains(&format!("pid {}", first.id())), "{said}");
    // The same command a second time is told who has the file.
    let twin = group(folder, 0, 1).output().unwrap();
    let said = String::from_utf8_lossy(&twin.stderr);
    assert_eq!(twin.status.code(), Some(1), "{said}");
    assert!(said.contains("aligned.jsonl is in use") && said.contains("host "), "{said}");
    assert!(said.contains(&format!("pid {}", first.id())), "{said}");
    first.kill().unwrap();
    first.wait().unwrap();
    // The lock that it left is taken over.
    run_groups(folder, 2);
    assert_whole(folder, 2, &undisturbed(&STORIES), "after the first");
}

#[test]
fn a_signal_stops_all_groups_at_a_row_and_the_next_run_goes_on() {
    let prompts = numbered(400);
    let prompts: Vec<&str> = prompts.iter().map(String::as_str).collect();
    let folder = folder_of(&prompts);
    let folder = folder.path();
    let job = job::start(world(&flags(folder), 2, 1), &[]);
    until_rows(folder);
    // What Slurm sends before the time is over, and what mpirun passes on.
    kill_process(job.launcher(), Signal::USR1).unwrap();
    let end = job.end(Duration::from_secs(30));
    assert_eq!(end.status.and_then(|status| status.code()), Some(75), "{}", end.said);
    assert!(end.said.contains("of 400 rows are there"), "{}", end.said);
    let before = rows(folder).len();
    assert!((1..400).contains(&before), "{before}");
    assert!(!folder.join("aligned_2shards_0.jsonl.done").exists());
    job::start(world(&flags(folder), 2, 1), &[]).finish().assert_success();
    assert_whole(folder, 2, &undisturbed(&prompts), "after the signal");
}

#[test]
fn a_task_of_srun_that_is_stopped_ends_well_and_leaves_word_to_requeue() {
    let prompts = numbered(400);
    let prompts: Vec<&str> = prompts.iter().map(String::as_str).collect();
    let folder = folder_of(&prompts);
    let folder = folder.path();
    let mut child = group(folder, 0, 1)
        .envs([("SLURM_JOB_ID", "77"), ("SLURM_STEP_ID", "0"), ("SLURM_STEP_NUM_TASKS", "1")])
        .spawn()
        .unwrap();
    until_rows(folder);
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    assert!(child.wait().unwrap().success());
    assert!((1..400).contains(&rows(folder).len()));
    let word = fs::read_to_string(folder.join("requeue-77.json")).unwrap();
    assert!(word.contains("\"77\""), "{word}");
}

/// Kills at moments that nobody has chosen: chains of runs with numbers of groups that change.
#[test]
fn runs_killed_at_random_moments_end_with_each_row_once() {
    let (wanted, kills) = if soak() { (200, 5) } else { (6, 3) };
    let prompts = numbered(24);
    let prompts: Vec<&str> = prompts.iter().map(String::as_str).collect();
    let begun = Instant::now();
    let whole = undisturbed(&prompts);
    let alone = begun.elapsed().as_secs_f64();
    let mut random = ChaCha8Rng::seed_from_u64(7);
    // A moment counts where something was still at work: the last ones of a chain may be too late.
    let mut interrupted = 0;
    let mut chain = 0;
    while interrupted < wanted {
        assert!(chain < wanted, "{interrupted} runs were interrupted");
        chain += 1;
        let folder = folder_of(&prompts);
        let folder = folder.path();
        let mut last = 0;
        for _ in 0..kills {
            let size = 1 + (last + random.random_range(0..3)) % 4;
            last = size;
            let groups: Vec<Child> =
                (0..size).map(|rank| group(folder, rank, size).spawn().unwrap()).collect();
            std::thread::sleep(Duration::from_secs_f64(random.random_range(0.0..alone)));
            let mut killed = 0;
            for mut child in groups {
                child.kill().unwrap();
                killed += usize::from(!child.wait().unwrap().success());
            }
            interrupted += killed.min(1);
        }
        let size = 1 + last % 4;
        run_groups(folder, size);
        assert_whole(folder, size, &whole, &format!("chain {chain}"));
    }
}
