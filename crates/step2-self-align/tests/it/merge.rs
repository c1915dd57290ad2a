use std::fs;
use std::path::Path;

use dromedary_records::{AlignedResponse, FinishReason, TrainingRow, read_rows};
use dromedary_self_align::{
    Error, IdentityLimit, IdentityWord, MergeArgs, MergeConfig, Report, Result, merge_and_filter,
};

use crate::support::{lines, row, write_rows};

const IDENTITY: &str = r#"[
    {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "{product}."}]},
    {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "{maker}."}]},
    {"conversations": [{"from": "human", "value": "How?"}, {"from": "gpt", "value": "Well."}]}
]"#;

fn config(folder: &Path) -> MergeConfig {
    fs::write(folder.join("identity.json"), IDENTITY).unwrap();
    MergeConfig::try_from(MergeArgs {
        data_file_pattern: Some(folder.join("aligned*.jsonl").display().to_string()),
        dummy_data_file: Some(folder.join("identity.json")),
        output_file: Some(folder.join("sft.json")),
        allow_unfinished: Some(true),
        ..MergeArgs::default()
    })
    .unwrap()
}

fn merge(folder: &Path) -> Result<Report> {
    merge_and_filter(&config(folder))
}

fn training_rows(folder: &Path) -> Vec<TrainingRow> {
    read_rows(folder.join("sft.json")).unwrap().map(std::result::Result::unwrap).collect()
}

fn answers(count: usize) -> Vec<AlignedResponse> {
    (0..count).map(|index| row(&format!("Question {index}?"), "Yes, that is so.")).collect()
}

#[test]
fn rows_are_numbered_by_file_and_line_and_shuffled_by_the_seed() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let all = answers(40);
    write_rows(&folder.join("aligned_2shards_1.jsonl"), &all[20..]);
    write_rows(&folder.join("aligned_2shards_0.jsonl"), &all[..20]);
    let report = merge(folder).unwrap();
    assert_eq!((report.rows, report.kept, report.identity), (40, 40, 3));
    let rows = training_rows(folder);
    let order: Vec<u64> = rows.iter().map(|row| row.example_id).collect();
    assert!(!order.is_sorted());
    for row in &rows {
        if let Some(number) = row.instruction.strip_prefix("Question ") {
            let index: u64 = number.trim_end_matches('?').parse().unwrap();
            assert_eq!(row.example_id, index + 1);
        } else {
            assert!(row.example_id > 40);
        }
    }
    merge(folder).unwrap();
    assert_eq!(training_rows(folder), rows);
    merge_and_filter(&with(config(folder), |config| config.seed = 2)).unwrap();
    assert_ne!(training_rows(folder), rows);
}

fn with(mut config: MergeConfig, change: impl FnOnce(&mut MergeConfig)) -> MergeConfig {
    change(&mut config);
    config
}

#[test]
fn identity_rows_can_be_limited() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    write_rows(&folder.join("aligned.jsonl"), &answers(2));
    for (limit, expected) in [
        (IdentityLimit::Word(IdentityWord::All), 3),
        (IdentityLimit::Word(IdentityWord::Survivors), 2),
        (IdentityLimit::Rows(1), 1),
        (IdentityLimit::Rows(0), 0),
    ] {
        let config = with(config(folder), |config| config.max_identity_rows = limit);
        assert_eq!(merge_and_filter(&config).unwrap().identity, expected);
        assert_eq!(training_rows(folder).len() as u64, 2 + expected);
    }
}

#[test]
fn dropped_rows_are_written_with_their_rule() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let mut rows = answers(2);
    rows.push(rows[0].clone());
    let mut rejected = row("", "");
    rejected.finish_reason = FinishReason::Rejected;
    rejected.output.clear();
    rows.push(rejected);
    write_rows(&folder.join("aligned.jsonl"), &rows);
    let text = fs::read_to_string(folder.join("aligned.jsonl")).unwrap();
    let last = text.trim_end().strip_suffix('}').unwrap();
    fs::write(folder.join("aligned.jsonl"), format!("{last},\"reason\":\"it is empty\"}}\n"))
        .unwrap();
    let report = merge(folder).unwrap();
    assert_eq!((report.rows, report.kept), (4, 2));
    let dropped = lines(&folder.join("dropped.jsonl"));
    assert_eq!(dropped[0]["rule"], "same_id");
    assert_eq!(dropped[0]["instruction"], "Question 0?");
    assert_eq!(dropped[1]["rule"], "not_generated");
    assert_eq!(dropped[1]["reason"], "it is empty");
    let report_file = fs::read_to_string(folder.join("merge_report.json")).unwrap();
    assert_eq!(serde_json::from_str::<Report>(&report_file).unwrap(), report);
    assert_eq!(report.sources["test"].kept, 2);
}

#[test]
fn no_file_is_an_error_that_names_the_pattern() {
    let folder = tempfile::tempdir().unwrap();
    let error = merge(folder.path()).unwrap_err();
    assert!(matches!(error, Error::NoShards { .. }));
    assert!(error.to_string().contains("aligned*.jsonl"), "{error}");
    assert!(!folder.path().join("sft.json").exists());
}

#[test]
fn no_row_left_is_an_error_with_the_counts() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let mut rows = answers(3);
    rows.iter_mut().for_each(|row| row.output = "No.".to_owned());
    write_rows(&folder.join("aligned.jsonl"), &rows);
    let error = merge(folder).unwrap_err();
    assert!(matches!(error, Error::NothingLeft { .. }));
    let message = error.to_string();
    assert!(message.contains("kept 0 of 3 rows; dropped no_affirmation 3"), "{message}");
    assert!(!folder.join("sft.json").exists());
    assert_eq!(lines(&folder.join("dropped.jsonl")).len(), 3);
}

#[test]
fn unfinished_files_are_refused_unless_told() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    write_rows(&folder.join("aligned.jsonl"), &answers(1));
    let strict = with(config(folder), |config| config.allow_unfinished = false);
    let message = merge_and_filter(&strict).unwrap_err().to_string();
    assert!(
        message.contains("aligned.jsonl") && message.contains("--allow-unfinished"),
        "{message}"
    );
    let blake3 = dromedary_files::hash_file(folder.join("aligned.jsonl")).unwrap();
    let done = format!("{{\"rows\": 1, \"rejected\": 0, \"blake3\": \"{blake3}\"}}");
    fs::write(folder.join("aligned.jsonl.done"), done).unwrap();
    merge_and_filter(&strict).unwrap();

    fs::rename(folder.join("aligned.jsonl"), folder.join("aligned_2shards_0.jsonl")).unwrap();
    fs::rename(folder.join("aligned.jsonl.done"), folder.join("aligned_2shards_0.jsonl.done"))
        .unwrap();
    let message = merge_and_filter(&strict).unwrap_err().to_string();
    assert!(message.contains("aligned_2shards_1.jsonl is missing"), "{message}");
}

#[test]
fn a_row_that_cannot_be_read_is_named_by_file_and_line() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let path = folder.join("aligned.jsonl");
    write_rows(&path, &answers(2));
    let text = fs::read_to_string(&path).unwrap();
    fs::write(
        &path,
        text.replacen("\"output\":\"", "\"output\":{\"text\":\"", 1)
            .replacen("User:\"", "User:\"}", 1),
    )
    .unwrap();
    let message = format!("{:#}", anyhow::Error::from(merge(folder).unwrap_err()));
    assert!(message.contains("aligned.jsonl") && message.contains('1'), "{message}");
    assert!(!folder.join("sft.json").exists() && !folder.join("dropped.jsonl").exists());
}
