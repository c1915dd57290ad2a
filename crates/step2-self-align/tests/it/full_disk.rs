use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::faults::{flags, with};
use crate::kills::numbered;
use crate::support::{folder_of, lines, row, write_rows};

/// Runs a script in the folder, beside a file system `disk` of 32 kB that nobody else sees and that
/// ends with the script; false where nobody may mount one.
fn beside_a_small_disk(folder: &Path, script: &str, arguments: &[String]) -> bool {
    let mount = "mkdir -p disk && mount -t tmpfs -o size=32k tmpfs disk";
    let unshare = |flags: &[&str], script: &str| {
        let mut command = Command::new("unshare");
        command.args(flags).args(["sh", "-c", script, env!("CARGO_BIN_EXE_step2-self-align")]);
        command.args(arguments).current_dir(folder).env_remove("RUST_LOG").stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    };
    let ways: [&[&str]; 2] = [&["--mount"], &["--map-root-user", "--mount"]];
    let Some(way) = ways.into_iter().find(|way| unshare(way, mount)) else {
        eprintln!("skipped: no file system can be mounted here; a limit on files stands for it");
        return false;
    };
    assert!(unshare(way, &format!("{mount}\n{script}")), "{script}");
    true
}

/// Exit code and message of a step of the script.
fn ended(folder: &Path, step: &str) -> (String, String) {
    let text = |part: &str| fs::read_to_string(folder.join(format!("{step}.{part}"))).unwrap();
    (text("code").trim().to_owned(), text("said"))
}

/// Ended with a message that names a file of the disk.
fn assert_full(folder: &Path, step: &str) {
    let (code, said) = ended(folder, step);
    assert_eq!(code, "1", "{step}: {said}");
    let named = said.contains("cannot write ") && said.contains("disk/");
    assert!(named && said.contains("No space left on device"), "{step}: {said}");
}

const GENERATE: &str = r#"
step() { "$0" "$@" > $name.said 2>&1; echo $? > $name.code; cp -r disk $name; }
name=first; step "$@"
name=still_full; step "$@"
mount -o remount,size=8m disk
name=emptied; step "$@"
"#;

#[test]
fn rows_survive_a_disk_that_fills_and_the_next_runs_go_on() {
    let prompts = numbered(60);
    let prompts: Vec<&str> = prompts.iter().map(String::as_str).collect();
    let folder = folder_of(&prompts);
    let folder = folder.path();
    let flags = with(&flags(folder), "--output-file", "disk/aligned.jsonl");
    if !beside_a_small_disk(folder, GENERATE, &flags) {
        return;
    }
    let rows = |step: &str| fs::read_to_string(folder.join(step).join("aligned.jsonl")).unwrap();
    for step in ["first", "still_full"] {
        assert_full(folder, step);
        let count = lines(&folder.join(step).join("aligned.jsonl")).len();
        assert!((1..60).contains(&count) && rows(step).ends_with('\n'), "{step}: {count} rows");
        assert!(!folder.join(step).join("aligned.jsonl.done").exists(), "{step}");
    }
    let (code, said) = ended(folder, "emptied");
    assert_eq!(code, "0", "{said}");
    // What was written stands where it stood, and the rest behind it, each once.
    assert!(rows("still_full").starts_with(&rows("first")));
    assert!(rows("emptied").starts_with(&rows("still_full")));
    let all = lines(&folder.join("emptied/aligned.jsonl"));
    let mut ids: Vec<&str> = all.iter().map(|row| row["id"].as_str().unwrap()).collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!((all.len(), ids.len()), (60, 60));
    assert!(folder.join("emptied/aligned.jsonl.done").exists());
    let files = fs::read_dir(folder.join("emptied")).unwrap();
    let names = files.map(|file| file.unwrap().file_name().into_string().unwrap());
    let left: Vec<String> = names.filter(|name| name.ends_with(".tmp")).collect();
    assert_eq!(left, [""; 0]);
}

const MERGE: &str = r#"
step() { "$0" "$@" > $name.said 2>&1; echo $? > $name.code; cp disk/sft.json $name.json; }
name=first; step "$@" --seed 1
cat /dev/zero > disk/other 2> /dev/null
name=full; step "$@" --seed 2
rm disk/other
name=emptied; step "$@" --seed 2
"#;

#[test]
fn training_rows_on_a_full_disk_are_the_old_ones() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let rows: Vec<_> =
        (0..20).map(|n| row(&format!("Question {n}?"), "Yes, that is so.")).collect();
    write_rows(&folder.join("aligned.jsonl"), &rows);
    let command = "merge-and-filter --data-file-pattern aligned.jsonl --allow-unfinished --output-file \
         disk/sft.json --dropped-file dropped.jsonl --report-file report.json --page-file \
         report.html --max-identity-rows 0";
    let arguments: Vec<String> = command.split_whitespace().map(str::to_owned).collect();
    if !beside_a_small_disk(folder, MERGE, &arguments) {
        return;
    }
    let json = |step: &str| fs::read_to_string(folder.join(format!("{step}.json"))).unwrap();
    assert_eq!(ended(folder, "first").0, "0", "{}", ended(folder, "first").1);
    assert_full(folder, "full");
    assert_eq!(json("full"), json("first"));
    assert_eq!(ended(folder, "emptied").0, "0", "{}", ended(folder, "emptied").1);
    assert_eq!(json("emptied").len(), json("first").len());
    assert_ne!(json("emptied"), json("first"));
}
