use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use polars::prelude::{Column, DataFrame, ParquetWriter};

use crate::support::{Folder, small_tokenizer};

/// Questions in several row groups: enough work that the threads can be seen at it.
fn parquet(folder: &Folder) -> PathBuf {
    let rows = 60_000;
    let ids: Vec<String> = (0..rows).map(|n| format!("flan.{n}")).collect();
    let question = |n| format!("What is the number {n}? ").repeat(12);
    let questions: Vec<String> = (0..rows).map(question).collect();
    let columns = vec![Column::new("id".into(), &ids), Column::new("question".into(), &questions)];
    let path = folder.path("questions.parquet");
    ParquetWriter::new(File::create(&path).unwrap())
        .with_row_group_size(Some(20_000))
        .finish(&mut DataFrame::new(rows, columns).unwrap())
        .unwrap();
    path
}

/// Runs the binary; how many threads worked or waited for others.
fn threads_of(args: &[&str], files: &[(&str, &Path)]) -> usize {
    let mut command = Command::new(env!("CARGO_BIN_EXE_step1-prompt-cleaning"));
    command.args(args);
    for (flag, file) in files {
        command.arg(flag).arg(file);
    }
    let mut child = command.spawn().unwrap();
    let tasks = PathBuf::from(format!("/proc/{}/task", child.id()));
    // A thread begins under the name of the one that starts it.
    let mut last_names = BTreeMap::new();
    while child.try_wait().unwrap().is_none() {
        for task in fs::read_dir(&tasks).into_iter().flatten().flatten() {
            // A thread may end while it is looked at.
            if let Ok(name) = fs::read_to_string(task.path().join("comm")) {
                last_names.insert(task.file_name(), name);
            }
        }
    }
    assert!(child.wait().unwrap().success());
    // What waits for signals does no work.
    last_names.into_values().filter(|name| name != "signals\n").count()
}

#[test]
fn threads_limits_decoding_too() {
    let folder = Folder::new();
    let (questions, tokenizer) = (parquet(&folder), small_tokenizer());
    let sample = |threads: &str, output: &str| {
        let output = folder.path(output);
        let args = ["subsample-openorca", "--quiet", "--threads", threads];
        let files = [
            ("--train-data-path", &*questions),
            ("--output-path", &output),
            ("--tokenizer", &tokenizer),
        ];
        threads_of(&args, &files)
    };
    // The main thread waits for those that work.
    assert_eq!((sample("1", "1.json"), sample("3", "3.json")), (2, 4));
    let prompts = folder.path("1.json");
    let exported = folder.path("exported.parquet");
    let files = [("--prompts", &*prompts), ("--output-file", &exported)];
    assert_eq!(threads_of(&["export-parquet", "--quiet"], &files), 1);
}
