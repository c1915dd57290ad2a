//! The reports in a browser: the numbers that they are about can be seen.

use std::{fs, path::Path, process::Command};

use serde_json::Value;
use xtask::browser;

/// The program of a stage, which is built beside this test.
fn program(name: &str) -> Command {
    let test = std::env::current_exe().unwrap();
    let folder = test.ancestors().nth(2).unwrap();
    assert!(folder.join(name).is_file(), "{name} is built with `cargo build --workspace`");
    Command::new(folder.join(name))
}

fn dummy_data(name: &str) -> String {
    format!("{}/../../dummy_data/{name}", env!("CARGO_MANIFEST_DIR"))
}

fn number(counts: &Value, name: &str) -> u64 {
    counts[name].as_u64().unwrap()
}

#[test]
fn the_report_of_step_1_shows_its_numbers() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let tokenizer = "../llama/tests/data/stories260k/tokenizer.json";
    let output = program("step1-prompt-cleaning")
        .args(["clean-and-merge", "--quiet", "--dolly", &dummy_data("dolly.jsonl")])
        .args(["--oasst", &dummy_data("oasst1.jsonl"), "--tokenizer"])
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join(tokenizer))
        .args(["--output-file".as_ref(), path("prompts.json").as_os_str()])
        .args(["--report".as_ref(), path("report").as_os_str()])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report = fs::read(path("report/report.json")).unwrap();
    let report: Value = serde_json::from_slice(&report).unwrap();
    let page = path("report/report.html");
    let Some(shown) = browser::shown(&page).unwrap() else {
        eprintln!("no Chromium on the PATH: the page is read as a text");
        let text = fs::read_to_string(&page).unwrap();
        assert!(text.contains(&format!("<b>{}</b><span>kept</span>", report["rows_out"])));
        return;
    };
    let sources = report["sources"].as_object().unwrap();
    assert_eq!(sources.len(), 2, "{report}");
    let mut kept_in_all = 0;
    for (source, counts) in sources {
        let dropped = counts["dropped"].as_object().unwrap();
        let left_out: u64 = dropped.values().map(|rows| rows.as_u64().unwrap()).sum();
        let kept = number(counts, "kept");
        kept_in_all += kept;
        let row = format!(
            "{source}\t{}\t{}\t{left_out}\t{kept}\t",
            number(counts, "rows"),
            number(counts, "edited")
        );
        assert!(
            shown.text.lines().any(|line| line.starts_with(&row)),
            "{row:?} is not in {}",
            shown.text
        );
        for (reason, rows) in dropped {
            let start = format!("{reason}\t");
            let line = shown.text.lines().find(|line| line.starts_with(&start)).unwrap();
            let rows = rows.to_string();
            assert!(line.split('\t').any(|cell| cell == rows), "{line:?} {rows}");
        }
    }
    assert_eq!(report["rows_out"], kept_in_all);
    let lengths = report["token_lengths"]["sources"].as_object().unwrap().values();
    let drawn = lengths.flat_map(|rows| rows.as_array().unwrap());
    let drawn = drawn.filter(|rows| rows.as_u64().unwrap() > 0).count();
    assert!(drawn > 0 && shown.bars >= drawn, "{} bars of {drawn}", shown.bars);
}
