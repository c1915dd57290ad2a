//! The reports in a browser: the numbers that they are about can be seen.

use std::{fs, path::Path, process::Command};

use serde_json::Value;
use xtask::browser::{self, Shown};

/// The program of a stage, which is built beside this test.
pub(crate) fn program(name: &str) -> Command {
    let test = std::env::current_exe().unwrap();
    let folder = test.ancestors().nth(2).unwrap();
    assert!(folder.join(name).is_file(), "{name} is built with `cargo build --workspace`");
    Command::new(folder.join(name))
}

fn dummy_data(name: &str) -> String {
    format!("{}/../../dummy_data/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// What a browser shows of a page; where there is none, the page must hold `text`, and there must be one
/// where nothing may be skipped.
fn shown(page: &Path, text: &str) -> Option<Shown> {
    let shown = browser::shown(page).unwrap();
    if shown.is_none() {
        let required =
            std::env::var_os("DROMEDARY_REQUIRE_TEST_DATA").is_some_and(|value| value == "1");
        assert!(!required, "no Chromium on the PATH: `cargo xtask setup` installs it");
        eprintln!("no Chromium on the PATH: the page is read as a text");
        assert!(fs::read_to_string(page).unwrap().contains(text), "{text}");
    }
    shown
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
    let kept = format!("<b>{}</b><span>kept</span>", report["rows_out"]);
    let Some(shown) = shown(&page, &kept) else { return };
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

/// Rows made by hand, with the metrics of a run that never was.
fn rows_and_metrics(folder: &Path) {
    fs::copy(dummy_data("aligned.jsonl"), folder.join("aligned.jsonl")).unwrap();
    let beat = |second: u64| {
        serde_json::json!({
            "beat": second, "seconds": 1.0, "rows": 1, "tokens": 200 + (second * 37) % 60,
            "slots_in_use": 32.0 - (second / 20) as f64, "slots": 32, "at": 1_800_000_000 + second,
        })
    };
    let lines: Vec<String> = (1..=240).map(|second| beat(second).to_string() + "\n").collect();
    fs::write(folder.join("metrics.jsonl"), lines.concat()).unwrap();
}

#[test]
fn the_report_of_step_2_shows_its_numbers() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    rows_and_metrics(folder.path());
    let output = program("step2-self-align")
        .args(["merge-and-filter", "--quiet", "--allow-unfinished", "--data-file-pattern"])
        .args([path("aligned.jsonl").as_os_str(), "--dummy-data-file".as_ref()])
        .arg(dummy_data("identity.json"))
        .args(["--output-file".as_ref(), path("sft.json").as_os_str()])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report = fs::read(path("merge_report.json")).unwrap();
    let report: Value = serde_json::from_slice(&report).unwrap();
    let page = path("report.html");
    let picture = Path::new(env!("CARGO_TARGET_TMPDIR")).join("step2_report.png");
    let rows = format!("<b>{}</b><span>rows</span>", report["rows"]);
    let Some(shown) = shown(&page, &rows) else { return };
    assert!(browser::screenshot(&page, &picture).unwrap());
    assert!(fs::metadata(&picture).unwrap().len() > 30_000, "{} is blank", picture.display());

    let sources = report["sources"].as_object().unwrap();
    let line = |name: &str, of: &dyn Fn(&Value) -> u64, all: &Value| {
        let cells: Vec<String> = sources.values().map(|source| of(source).to_string()).collect();
        format!("{name}\t{}\t{all}\t", cells.join("\t"))
    };
    let dropped = report["dropped"].as_object().unwrap();
    let mut expected = vec![line("kept", &|source| number(source, "kept"), &report["kept"])];
    for (rule, rows) in dropped {
        let of = |source: &Value| source["rules"][rule].as_u64().unwrap_or(0);
        expected.push(line(&format!("dropped: {rule}"), &of, rows));
    }
    for row in expected {
        assert!(
            shown.text.lines().any(|line| line.starts_with(&row)),
            "{row:?} is not in {}",
            shown.text
        );
    }
    for (place, rule) in report["citations"].as_array().unwrap().iter().enumerate() {
        let name = format!("{} ({})", place + 1, rule["name"].as_str().unwrap());
        let row = format!("{name}\t{}\t", rule["rows"]);
        let cited = shown.text.lines().find(|line| line.starts_with(&row));
        let cited = cited.unwrap_or_else(|| panic!("{row:?} is not in {}", shown.text));
        assert!(cited.contains(&format!("{} kept", rule["kept"])), "{cited}");
        let never = shown.text.lines().find(|line| line.contains("Never cited: ")).unwrap();
        assert_eq!(never.contains(&name), rule["rows"] == 0, "{name} in {never}");
    }
    for (reason, rows) in report["finish_reasons"].as_object().unwrap() {
        let text = match reason.as_str() {
            "eos" => "the model ended its text",
            "stop" => "a stop string appeared",
            "length" => "cut by length",
            _ => "rejected, nothing was generated",
        };
        assert!(shown.text.contains(&format!("{text}\t{rows}\t")), "{reason}: {rows}");
    }
    let words = &report["answer_words"];
    let counts = ["kept", "dropped"].map(|part| words[part].as_array().unwrap().clone());
    let classes = counts.iter().flatten().filter(|rows| rows.as_u64() > Some(0)).count();
    assert!(classes > 3 && shown.bars >= classes, "{} bars of {classes}", shown.bars);
    let tokens: u64 = (1..=240).map(|second| 200 + (second * 37) % 60).sum();
    assert!((1000..1_000_000).contains(&tokens));
    let grouped = format!("{},{:03}", tokens / 1000, tokens % 1000);
    let speed =
        format!("{grouped} tokens in 0.07 hours of groups: {:.1} tokens/s", tokens as f64 / 240.0);
    assert!(shown.text.contains(&speed), "{speed} is not in {}", shown.text);
    assert!(shown.text.contains("% of the slots had a row"), "{}", shown.text);
    for curve in ["Speed over time", "Slot use over time"] {
        assert!(shown.text.contains(curve), "{curve} is not in {}", shown.text);
    }
    assert_eq!(shown.curves, 2);
    for rule in dropped.keys().map(|rule| format!("dropped: {rule}")) {
        // Beside its row of the table.
        assert!(shown.text.matches(&rule).count() > 1, "no sample of {rule}");
    }
}
