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
    let run = metrics.last().unwrap();
    assert_eq!((&run["run"], &run["rows"]), (&"finished".into(), &6.into()));
    let of_rows: Vec<_> = metrics.iter().filter(|line| line["id"].is_string()).collect();
    assert_eq!(of_rows.len(), 6);
    assert!(of_rows.iter().all(|line| line["slot"].as_u64().unwrap() < 2), "{of_rows:?}");
    assert!(of_rows.iter().all(|line| line["group_rank"] == 0 && line["group_size"] == 1));
    let sum = |name: &str, lines: &mut dyn Iterator<Item = &serde_json::Value>| -> u64 {
        lines.map(|line| line[name].as_u64().unwrap()).sum()
    };
    let beats = || metrics.iter().filter(|line| line["beat"].is_number());
    assert_eq!(sum("rows", &mut beats()), 6);
    assert_eq!(sum("tokens", &mut beats()), sum("output_tokens", &mut of_rows.iter().copied()));
    assert!(beats().all(|line| line["slots_in_use"].as_f64().unwrap() <= 2.0));
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
    let cjk = "\u{4f60}".repeat(350_000);
    let same = "Once upon a time";
    let folder = folder_of(&[
        "",
        " \n\t ",
        &long_line,
        &many_words,
        &cjk,
        same,
        same,
        "Be good.",
        "User:",
        "\u{0}",
        "</s>",
    ]);
    let folder = folder.path();
    let report = run(args(folder)).unwrap();
    assert_eq!((report.answered, report.rejected), (6, 5));
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
    assert!(reason(&cjk).contains("max_seq_len 200"));
    let twins: Vec<AlignedResponse> =
        rows(&path).into_iter().filter(|row| row.instruction == same).collect();
    assert_eq!(twins.len(), 2);
    assert_ne!(twins[0].id, twins[1].id);
    assert!(twins.iter().all(|row| row.finish_reason != FinishReason::Rejected));
    assert_eq!(Done::check(&path).unwrap().rejected, 5);
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
fn groups_of_one_world_share_the_rows_and_each_has_a_file() {
    let (alone, together) = (folder_of(&STORIES), folder_of(&STORIES));
    run(args(alone.path())).unwrap();
    let shared = GenerateArgs { tp: Some(1), ..args(together.path()) };
    let config = GenerateConfig::try_from(shared).unwrap();
    let stop = StopFlag::default();
    std::thread::scope(|scope| {
        for comm in dromedary_parallel::threads(3) {
            let (config, stop) = (&config, &stop);
            scope.spawn(move || {
                let report = generate(config, &comm, 0, stop, false).unwrap();
                assert_eq!((report.groups, report.prompts, report.answered), (3, 6, 6));
                assert!(!report.stopped);
            });
        }
    });
    let paths: Vec<_> = (0..3)
        .map(|group| together.path().join(format!("aligned_3shards_{group}.jsonl")))
        .collect();
    let mut all: Vec<AlignedResponse> = paths.iter().flat_map(|path| rows(path)).collect();
    all.sort_by(|one, other| one.id.cmp(&other.id));
    assert_eq!(all, rows(&alone.path().join("aligned.jsonl")));
    let prompts: Vec<u64> = paths.iter().map(|path| Done::check(path).unwrap().prompts).collect();
    assert_eq!(prompts, [6, 0, 0]);
}

#[test]
fn a_stop_reaches_all_groups_and_they_end_with_the_same_report() {
    let folder = folder_of(&STORIES);
    let shared = GenerateArgs { tp: Some(1), ..args(folder.path()) };
    let config = GenerateConfig::try_from(shared).unwrap();
    std::thread::scope(|scope| {
        for comm in dromedary_parallel::threads(2) {
            let config = &config;
            scope.spawn(move || {
                // Rank 0 alone is told, and gives out nothing more.
                let stop = StopFlag::default();
                if dromedary_parallel::Communicator::rank(&comm) == 0 {
                    stop.set();
                }
                let report = generate(config, &comm, 0, &stop, false).unwrap();
                assert!(report.stopped && report.answered < 6, "{report:?}");
            });
        }
    });
    let report = run(args(folder.path())).unwrap();
    assert_eq!(report.done_before + report.answered, 6);
}

#[test]
fn rows_that_are_no_prompts_are_recorded_and_the_others_go_on() {
    let folder = folder_of(&STORIES[..1]);
    let folder = folder.path();
    let text = r#"[{"instruction": 5, "input": ""}, {"instruction": "Once", "id": "x"},
        {"instruction": "Tim", "input": ""}, {"instruction": "The sun", "id": "x"}]"#;
    fs::write(folder.join("prompts.json"), text).unwrap();
    let report = run(args(folder)).unwrap();
    assert_eq!((report.answered, report.rejected), (2, 2));
    let rows = lines(&folder.join("aligned.jsonl"));
    let reasons: Vec<&str> = rows.iter().filter_map(|row| row["reason"].as_str()).collect();
    assert!(reasons[0].starts_with("no prompt: row 1: invalid type: integer `5`"), "{reasons:?}");
    assert_eq!(reasons[1], "no prompt: rows 2 and 4 have the same id \"x\"");
    let first = rows.iter().find(|row| row["reason"].is_string()).unwrap();
    assert_eq!(first["instruction"], r#"{"instruction": 5, "input": ""}"#);
    // They are done, and not tried again.
    assert_eq!(run(args(folder)).unwrap().done_before, 4);

    let strict = GenerateArgs {
        max_bad_rows: Some(0.4),
        output_file: Some(folder.join("strict.jsonl")),
        ..args(folder)
    };
    let error = run(strict).unwrap_err();
    assert!(matches!(error, Error::BadRows { bad: 2, rows: 4, .. }), "{error}");
    assert!(error.to_string().contains("the first is no prompt: row 1: invalid type"), "{error}");
}

#[test]
fn blank_lines_and_doubled_rows_do_no_harm() {
    let folder = folder_of(&STORIES);
    let folder = folder.path();
    run(args(folder)).unwrap();
    let path = folder.join("aligned.jsonl");
    let whole = rows(&path);
    let text = fs::read_to_string(&path).unwrap();
    let first = text.lines().next().unwrap();
    let last = text.lines().last().unwrap();
    let rest = text.replace(&format!("{last}\n"), "");
    fs::write(&path, format!("\n{rest}\n\n{first}\n{}", &last[..last.len() / 2])).unwrap();
    let report = run(args(folder)).unwrap();
    assert_eq!((report.done_before, report.answered), (5, 1));
    let mut again = rows(&path);
    assert_eq!(again.len(), 7);
    again.dedup();
    assert_eq!(again, whole);
    assert_eq!(Done::check(&path).unwrap().prompts, 6);
}

#[test]
fn rows_of_any_number_of_groups_are_not_done_again() {
    let folder = folder_of(&STORIES);
    let folder = folder.path();
    let group = |rank, size| GenerateArgs {
        group_rank: Some(rank),
        group_size: Some(size),
        ..args(folder)
    };
    // Prompts 1 and 4.
    assert_eq!(run(group(1, 3)).unwrap().answered, 2);
    // Of 0, 2, 4 the last one is there.
    let report = run(group(0, 2)).unwrap();
    assert_eq!((report.prompts, report.done_before, report.answered), (3, 1, 2));
    let report = run(args(folder)).unwrap();
    assert_eq!((report.prompts, report.done_before, report.answered), (6, 4, 2));
    // Other settings are seen in whatever file they are.
    let error = run(GenerateArgs { seed: Some(9), ..group(1, 2) }).unwrap_err();
    assert!(matches!(error, Error::OtherSettings { .. }), "{error}");
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
    // Weights that are rounded otherwise make other texts.
    let dtype = Some("bf16".to_owned());
    let message = run(GenerateArgs { dtype, ..args(folder) }).unwrap_err().to_string();
    assert!(message.contains("dtype: \"F32\" -> \"BF16\""), "{message}");
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
