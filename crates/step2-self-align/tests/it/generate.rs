use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use dromedary_command::StopFlag;
use dromedary_records::{AlignedResponse, FinishReason, read_rows};
use dromedary_self_align::{
    Done, Error, GenerateArgs, GenerateConfig, GenerateReport, Result, generate,
};

use crate::support::{folder_of, generate_args, generate_with, lines, stories260k};

pub(crate) const STORIES: [&str; 6] =
    ["Once upon a time", "Tim had a dog", "Lily saw a cat", "The sun was", "A bird", "Mom said"];

fn args(folder: &Path) -> GenerateArgs {
    GenerateArgs { max_seq_len: Some(200), max_batch_size: Some(2), ..generate_args(folder) }
}

fn run(args: GenerateArgs) -> Result<GenerateReport> {
    generate_with(args, &StopFlag::default())
}

/// Rows by instruction: the order in which they finish says nothing.
fn rows(path: &Path) -> Vec<AlignedResponse> {
    let mut rows: Vec<AlignedResponse> =
        read_rows(path).unwrap().map(std::result::Result::unwrap).collect();
    rows.sort_by(|one, other| one.id.cmp(&other.id));
    rows
}

#[test]
fn every_prompt_gets_a_row_and_the_file_its_mark() {
    let folder = folder_of(&STORIES);
    let folder = folder.path();
    let report = run(args(folder)).unwrap();
    assert_eq!((report.prompts, report.answered, report.rejected), (6, 6, 0));
    assert!(!report.stopped);
    let path = folder.join("aligned.jsonl");
    let rows = rows(&path);
    assert_eq!(rows.len(), 6);
    for row in &rows {
        assert_eq!(row.source, "unknown");
        assert!(row.output_tokens > 0 && row.output_tokens <= 24, "{row:?}");
        assert!(row.prompt_tokens > 10 && !row.output.is_empty(), "{row:?}");
    }
    assert_eq!(Done::check(&path).unwrap().rows, 6);
    let metrics = lines(&folder.join("metrics.jsonl"));
    assert_eq!(metrics.len(), 7);
    assert_eq!(metrics[6]["run"], "finished");
    assert_eq!(metrics[6]["rows"], 6);
    assert!(!folder.join("aligned.jsonl.lock").exists());
}

#[test]
fn a_run_that_was_cut_anywhere_ends_with_the_same_rows() {
    let folder = folder_of(&STORIES);
    let folder = folder.path();
    run(args(folder)).unwrap();
    let path = folder.join("aligned.jsonl");
    let whole = rows(&path);
    let bytes = fs::read(&path).unwrap();
    let first_line = bytes.iter().position(|&byte| byte == b'\n').unwrap() + 1;
    for kept in [0, 5, first_line - 1, first_line, first_line + 20, bytes.len() - 1] {
        fs::write(&path, &bytes[..kept]).unwrap();
        fs::remove_file(folder.join("aligned.jsonl.done")).unwrap();
        let report = run(args(folder)).unwrap();
        assert_eq!(report.done_before + report.answered, 6, "cut at {kept}");
        assert_eq!(rows(&path), whole, "cut at {kept}");
    }
}

#[test]
fn nothing_is_done_twice() {
    let folder = folder_of(&STORIES[..2]);
    let folder = folder.path();
    run(args(folder)).unwrap();
    let before = fs::read(folder.join("aligned.jsonl")).unwrap();
    let report = run(args(folder)).unwrap();
    assert_eq!((report.done_before, report.answered), (2, 0));
    assert!(report.statistics.is_none());
    assert_eq!(fs::read(folder.join("aligned.jsonl")).unwrap(), before);
}

#[test]
fn a_stop_leaves_whole_rows_and_the_next_run_continues() {
    let folder = folder_of(&STORIES);
    let folder = folder.path();
    let stop = StopFlag::default();
    stop.set();
    let report = generate_with(args(folder), &stop).unwrap();
    assert!(report.stopped && report.answered < 6, "{report:?}");
    assert!(!folder.join("aligned.jsonl.done").exists());
    assert_eq!(lines(&folder.join("aligned.jsonl")).len(), report.answered);
    let report = run(args(folder)).unwrap();
    assert!(!report.stopped);
    assert_eq!(report.done_before + report.answered, 6);
    assert_eq!(rows(&folder.join("aligned.jsonl")).len(), 6);
}

#[test]
fn prompts_at_the_edge_are_rejected_with_a_reason_and_the_others_go_on() {
    let (long_line, many_words) = ("a".repeat(1_000_000), "word ".repeat(400));
    let same = "Once upon a time";
    let folder = folder_of(&[
        "",
        " \n\t ",
        &long_line,
        &many_words,
        same,
        same,
        "Be good.",
        "User:",
        "\u{0}",
    ]);
    let folder = folder.path();
    let report = run(args(folder)).unwrap();
    assert_eq!((report.answered, report.rejected), (5, 4));
    let path = folder.join("aligned.jsonl");
    let reason = |instruction: &str| {
        let row = lines(&path).into_iter().find(|row| row["instruction"] == instruction).unwrap();
        assert_eq!(row["finish_reason"], "rejected");
        row["reason"].as_str().unwrap().to_owned()
    };
    assert_eq!(reason(""), "the prompt is empty");
    assert_eq!(reason(" \n\t "), "the prompt is empty");
    assert!(reason(&long_line).contains("max_seq_len 200"));
    assert!(reason(&many_words).contains("max_seq_len 200"));
    let twins: Vec<AlignedResponse> =
        rows(&path).into_iter().filter(|row| row.instruction == same).collect();
    assert_eq!(twins.len(), 2);
    assert_ne!(twins[0].id, twins[1].id);
    assert!(twins.iter().all(|row| row.finish_reason != FinishReason::Rejected));
    assert_eq!(Done::check(&path).unwrap().rejected, 4);
}

#[test]
fn groups_share_the_prompts_and_the_limit_counts_before_them() {
    let folder = folder_of(&STORIES);
    let folder = folder.path();
    let mut seen = BTreeSet::new();
    for rank in 0..2 {
        let report = run(GenerateArgs {
            group_rank: Some(rank),
            group_size: Some(2),
            limit: Some(5),
            ..args(folder)
        })
        .unwrap();
        let name = format!("aligned_2shards_{rank}.jsonl");
        assert_eq!(report.output_file, folder.join(&name));
        assert!(folder.join(format!("metrics_2shards_{rank}.jsonl")).exists());
        for row in rows(&report.output_file) {
            assert!(seen.insert(row.instruction.clone()));
            let place = STORIES.iter().position(|&story| story == row.instruction).unwrap();
            assert_eq!(place % 2, rank);
        }
    }
    assert_eq!(seen, STORIES[..5].iter().map(|&story| story.to_owned()).collect());
}

#[test]
fn a_row_does_not_depend_on_the_rows_beside_it() {
    let (one, other) = (folder_of(&STORIES), folder_of(&STORIES));
    run(args(one.path())).unwrap();
    run(GenerateArgs { max_batch_size: Some(6), ..args(other.path()) }).unwrap();
    assert_eq!(rows(&one.path().join("aligned.jsonl")), rows(&other.path().join("aligned.jsonl")));
}

#[test]
fn ranks_that_hold_one_model_together_give_the_same_rows() {
    let (alone, together) = (folder_of(&STORIES), folder_of(&STORIES));
    run(args(alone.path())).unwrap();
    let config = GenerateConfig::try_from(args(together.path())).unwrap();
    let stop = StopFlag::default();
    std::thread::scope(|scope| {
        for comm in dromedary_parallel::threads(2) {
            let (config, stop) = (&config, &stop);
            scope.spawn(move || {
                let report = generate(config, &comm, 0, stop, false).unwrap();
                assert_eq!(report.answered, 6);
            });
        }
    });
    let [alone, together] = [alone, together].map(|folder| {
        let rows = rows(&folder.path().join("aligned.jsonl"));
        rows.into_iter().map(|row| (row.id, row.output)).collect::<Vec<_>>()
    });
    assert_eq!(together, alone);
}

#[test]
fn rows_of_other_settings_are_not_mixed() {
    let folder = folder_of(&STORIES[..2]);
    let folder = folder.path();
    run(args(folder)).unwrap();
    let error = run(GenerateArgs { seed: Some(9), ..args(folder) }).unwrap_err();
    assert!(matches!(error, Error::OtherSettings { .. }));
    let message = error.to_string();
    assert!(message.contains("aligned.jsonl") && message.contains("seed: 1 -> 9"), "{message}");
    // What changes no text may change.
    run(GenerateArgs { max_batch_size: Some(1), ..args(folder) }).unwrap();
}

#[test]
fn a_prefix_that_is_too_long_is_an_error_with_both_numbers() {
    let folder = folder_of(&STORIES[..1]);
    let error =
        run(GenerateArgs { max_shared_seq_len: Some(3), ..args(folder.path()) }).unwrap_err();
    assert!(matches!(error, Error::PrefixTooLong { limit: 3, .. }), "{error}");
    assert!(!folder.path().join("aligned.jsonl").exists());
}

#[test]
fn an_empty_prompt_file_is_an_error() {
    let folder = folder_of(&[]);
    let message = run(args(folder.path())).unwrap_err().to_string();
    assert!(message.contains("prompts.json: holds no prompt"), "{message}");
    assert!(!folder.path().join("aligned.jsonl").exists());
    let folder = folder_of(&STORIES[..1]);
    let second = GenerateArgs { group_rank: Some(1), group_size: Some(2), ..args(folder.path()) };
    assert!(matches!(run(second).unwrap_err(), Error::NoPrompts { .. }));
}

#[test]
fn a_sentencepiece_model_gives_the_rows_of_the_tokenizer_json_made_of_it() {
    let [json, model] = ["tokenizer.json", "tokenizer.model"].map(|name| {
        let folder = folder_of(&STORIES);
        let tokenizer = Some(stories260k().join(name));
        run(GenerateArgs { tokenizer, ..args(folder.path()) }).unwrap();
        rows(&folder.path().join("aligned.jsonl"))
    });
    assert!(json.len() == 6 && json == model);
}

#[test]
fn a_tokenizer_of_another_model_is_refused() {
    let folder = folder_of(&STORIES[..1]);
    let text = fs::read_to_string(stories260k().join("tokenizer.json")).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let vocabulary = json["model"]["vocab"].as_object_mut().unwrap();
    for extra in 0..100 {
        vocabulary.insert(format!("extra{extra}"), (512 + extra).into());
    }
    let path = folder.path().join("tokenizer.json");
    fs::write(&path, json.to_string()).unwrap();
    let error = run(GenerateArgs { tokenizer: Some(path), ..args(folder.path()) }).unwrap_err();
    assert!(matches!(error, Error::Llama(_)), "{error}");
    assert!(!folder.path().join("aligned.jsonl").exists());
}
