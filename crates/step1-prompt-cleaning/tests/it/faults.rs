use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicUsize, Ordering};

use polars::prelude::{Column, DataFrame, ParquetCompression, ParquetWriter};
use serde_json::Value;

use crate::support::{Folder, array, instruction_set, stderr};

/// Address space of the child in kilobytes: a damaged length must not take more.
const CHILD_KILOBYTES: u32 = 3_000_000;
const ROWS: usize = 3000;

/// A file of several row groups, plain and dictionary pages.
fn parquet(folder: &Folder) -> Vec<u8> {
    let path = folder.path("good.parquet");
    let ids: Vec<String> = (0..ROWS).map(|n| format!("flan.{n}")).collect();
    let questions: Vec<String> = (0..ROWS).map(|n| format!("What is the number {n}?")).collect();
    let systems: Vec<&str> = (0..ROWS).map(|n| ["short", "long"][n % 2]).collect();
    let columns = vec![
        Column::new("id".into(), &ids),
        Column::new("system_prompt".into(), &systems),
        Column::new("question".into(), &questions),
    ];
    let mut frame = DataFrame::new(ROWS, columns).unwrap();
    ParquetWriter::new(File::create(&path).unwrap())
        .with_compression(ParquetCompression::Snappy)
        .with_row_group_size(Some(1000))
        .finish(&mut frame)
        .unwrap();
    fs::read(path).unwrap()
}

/// The sampling of a file in a process with little memory.
fn limited(input: &Path, output: &Path) -> Command {
    let limited = format!("ulimit -v {CHILD_KILOBYTES}; exec \"$0\" \"$@\"");
    let mut child = Command::new("sh");
    child
        .args(["-c", &limited, env!("CARGO_BIN_EXE_step1-prompt-cleaning")])
        .args(["subsample-openorca", "--threads", "1", "--train-data-path"])
        .arg(input)
        .arg("--output-path")
        .arg(output);
    child
}

/// Runs the sampling of `NAME.parquet` in a process with little memory.
pub(crate) fn sample(folder: &Folder, name: &str) -> Output {
    let path = |ending: &str| folder.path(&format!("{name}{ending}"));
    limited(&path(".parquet"), &path(".json"))
        .arg("--quiet")
        .arg("--report")
        .arg(path(""))
        .output()
        .unwrap()
}

/// A generator as good as needed, the same for every run.
fn numbers(seed: u64) -> impl Iterator<Item = usize> {
    let mut state = seed;
    std::iter::repeat_with(move || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize
    })
}

/// Whether the child did it, after a look at what it leaves behind.
fn check(folder: &Folder, name: &str, output: &Output) -> bool {
    let written = folder.path(&format!("{name}.json"));
    if !output.status.success() {
        assert!(!written.exists(), "{name}: a failed run leaves rows");
        assert!(!output.stderr.is_empty(), "{name}: a failed run says nothing");
        return false;
    }
    let report = fs::read(folder.path(name).join("report.json")).unwrap();
    let report: Value = serde_json::from_slice(&report).unwrap();
    assert_eq!(report["inputs"][0]["rows"], ROWS, "{name}: rows are missing");
    let sources = report["sources"].as_object().unwrap().values();
    let accounted: u64 = sources
        .map(|counts| {
            let dropped = counts["dropped"].as_object().unwrap().values();
            counts["kept"].as_u64().unwrap() + dropped.map(|n| n.as_u64().unwrap()).sum::<u64>()
        })
        .sum();
    assert_eq!(accounted, ROWS as u64, "{name}");
    assert_eq!(report["rows_out"], array(&written).len(), "{name}");
    true
}

#[test]
fn flipped_bytes_of_parquet_never_lose_rows_silently() {
    let soak = std::env::var_os("DROMEDARY_SOAK").is_some_and(|value| value == "1");
    let files = if soak { 1000 } else { 200 };
    let folder = Folder::new();
    let good = parquet(&folder);
    assert!(check(&folder, "good", &sample(&folder, "good")), "the file itself is good");
    let (next, whole) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let work = || {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= files {
                return;
            }
            let mut numbers = numbers(number as u64);
            let mut bytes = good.clone();
            // Half of them in the footer, where the numbers are.
            let first = if number % 2 == 0 { 0 } else { good.len() - 1500 };
            let at = first + numbers.next().unwrap() % (good.len() - first);
            bytes[at] ^= 1 << (numbers.next().unwrap() % 8);
            let name = format!("flipped-{number}");
            let path = folder.write(&format!("{name}.parquet"), bytes);
            if check(&folder, &name, &sample(&folder, &name)) {
                whole.fetch_add(1, Ordering::Relaxed);
            }
            fs::remove_file(path).unwrap();
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(work);
        scope.spawn(work);
    });
    let whole = whole.into_inner();
    // Bits of texts and of what is not read do no harm; others must.
    assert!(whole > files / 10 && whole < files, "{whole} of {files} were read");
}

#[test]
fn cut_parquet_files_are_clean_errors() {
    let folder = Folder::new();
    let good = parquet(&folder);
    for (number, end) in
        [0, 3, 4, 8, good.len() / 2, good.len() - 9, good.len() - 1].iter().enumerate()
    {
        let name = format!("cut-{number}");
        folder.write(&format!("{name}.parquet"), &good[..*end]);
        let output = sample(&folder, &name);
        assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
        assert!(stderr(&output).contains(&format!("{name}.parquet")), "{}", stderr(&output));
    }
}

/// The file has only the ends of the row: what is between them is a hole.
#[test]
fn a_row_of_more_than_four_gibibytes_is_one_bad_row() {
    let folder = Folder::new();
    let row =
        |number: u8| format!(r#"{{"id": "flan.{number}", "question": "Question {number}?"}}"#);
    for (name, start, between, end) in [("o.jsonl", "", "\n", "\n"), ("o.json", "[", ",", "]")] {
        let (input, output) = (folder.path(name), folder.path("out.json"));
        let mut file = File::create(&input).unwrap();
        write!(file, r#"{start}{}{between}{{"id": "flan.2", "question": ""#, row(1)).unwrap();
        file.seek(SeekFrom::Current((4 << 30) + 1)).unwrap();
        write!(file, r#""}}{between}{}{end}"#, row(3)).unwrap();
        drop(file);
        let child = limited(&input, &output).args(["--max-bad-rows", "0.5"]).output().unwrap();
        let said = stderr(&child);
        assert!(child.status.success(), "{name}: {said}");
        assert!(
            said.contains(&format!("{name}: row 2 ")) && said.contains("longer than"),
            "{said}"
        );
        assert_eq!(instruction_set(&output), ["Question 1?", "Question 3?"]);
        fs::remove_file(input).unwrap();
    }
}
