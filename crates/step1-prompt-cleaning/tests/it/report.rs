use std::collections::BTreeSet;
use std::fs;

use dromedary_prompt_cleaning::{
    DropReason, Edit, JudgeArgs, MergeArgs, MergeConfig, OptionalArgs, Report, SharedArgs,
    SubsampleArgs, SubsampleConfig, clean_and_merge, subsample_openorca,
};
use serde_json::json;

use crate::support::{Folder, array, assert_sums, dummy_data, quiet, small_tokenizer, step1};

/// Everything that may happen to a row of the sample data, in one merge.
fn report(folder: &Folder) -> Report {
    let path = |name: &str| Some(folder.path(name));
    let sharegpt = [
        "aggregate-sharegpt",
        "--data-files",
        dummy_data("sharegpt.json").to_str().unwrap(),
        "--output-file",
        folder.path("sharegpt.json").to_str().unwrap(),
    ]
    .map(str::to_owned);
    assert!(step1(&sharegpt.iter().map(String::as_str).collect::<Vec<_>>()).status.success());
    let args = MergeArgs {
        dolly: vec![dummy_data("dolly.jsonl")],
        oasst: vec![dummy_data("oasst1.jsonl")],
        sharegpt_prompt_path: vec![folder.path("sharegpt.json")],
        output_file: path("prompts.json"),
        judge: JudgeArgs {
            tokenizer: Some(small_tokenizer()),
            max_prompt_len: Some(200),
            ..JudgeArgs::default()
        },
        min_prompt_len: Some(4),
        optional: OptionalArgs {
            near_duplicates: Some(0.6),
            languages: vec!["en".to_owned()],
            decontaminate: vec![folder.write("b.txt", "What is the largest ocean on Earth?\n")],
            sample: Some(0.9),
            max_per_source: vec!["sharegpt=20".parse().unwrap()],
            mix: ["dolly=1", "oasst1=1", "sharegpt=1"].map(|entry| entry.parse().unwrap()).into(),
        },
        shared: SharedArgs { report: path("report"), ..SharedArgs::default() },
        ..MergeArgs::default()
    };
    clean_and_merge(&MergeConfig::try_from(args).unwrap(), &quiet()).unwrap()
}

#[test]
fn every_row_is_accounted_for() {
    let folder = Folder::new();
    let report = report(&folder);
    assert_sums(&report);
    assert_eq!(report.rows_out as usize, array(&folder.path("prompts.json")).len());
    let written: Report =
        serde_json::from_slice(&fs::read(folder.path("report/report.json")).unwrap()).unwrap();
    assert_sums(&written);
    assert_eq!(written, report);
    for reason in [
        DropReason::Duplicate,
        DropReason::OtherLanguage,
        DropReason::Contaminated,
        DropReason::OverMix,
        DropReason::NotSampled,
        DropReason::TooShort,
    ] {
        let name = reason.name();
        let met = report.sources.values().any(|counts| counts.dropped.contains_key(name));
        assert!(met, "{name}: {:?}", report.sources);
    }
}

#[test]
fn every_reason_has_samples() {
    let report = report(&Folder::new());
    for (source, counts) in &report.sources {
        for (reason, &rows) in &counts.dropped {
            let samples: Vec<_> = report
                .samples
                .iter()
                .filter(|s| s.source == *source && s.drop.as_ref() == Some(reason))
                .collect();
            assert_eq!(samples.len() as u64, rows.min(3), "{source}: {reason}");
            assert!(samples.iter().all(|s| s.after.is_none() && s.row.starts_with(source)));
            let has_text = samples.iter().all(|s| !s.before.is_empty());
            assert!(has_text || reason == "empty", "{source}: {reason}: {samples:?}");
        }
        for (reason, &rows) in &counts.edits {
            let of = report.samples.iter().filter(|s| s.source == *source);
            let samples: Vec<_> = of.filter(|s| s.edit.as_ref() == Some(reason)).collect();
            assert_eq!(samples.len() as u64, rows.min(3), "{source}: {reason}");
            assert!(samples.iter().all(|s| s.after.as_ref().unwrap() != &s.before));
        }
    }
    let edits: BTreeSet<_> = report.samples.iter().filter_map(|s| s.edit.as_deref()).collect();
    assert_eq!(edits.len(), Edit::ALL.len(), "{edits:?}");
}

#[test]
fn lengths_are_those_of_the_rows_written() {
    let folder = Folder::new();
    let report = report(&folder);
    let lengths = &report.token_lengths;
    for (source, counts) in &report.sources {
        assert_eq!(lengths.sources[source].iter().sum::<u64>(), counts.kept, "{source}");
    }
    let tokenizer = dromedary_tokenizer::Tokenizer::open(small_tokenizer()).unwrap();
    let mut expected = vec![0; lengths.sources["dolly"].len()];
    for row in array(&folder.path("prompts.json")).iter().filter(|row| row["source"] == "dolly") {
        let len = tokenizer.len_with_bos(row["instruction"].as_str().unwrap());
        expected[len / lengths.width as usize] += 1;
    }
    assert_eq!(lengths.sources["dolly"], expected);
}

#[test]
fn files_are_named_with_their_hashes() {
    let folder = Folder::new();
    let report = report(&folder);
    let hash = |path| dromedary_files::hash_file(path).unwrap();
    assert_eq!(report.inputs.len(), 3);
    for input in &report.inputs {
        assert_eq!(input.blake3, Some(hash(input.path.clone())));
    }
    let [tokenizer, benchmark] = &report.references[..] else { panic!("{:?}", report.references) };
    assert_eq!(tokenizer.blake3, Some(hash(small_tokenizer())));
    assert_eq!(benchmark.blake3, Some(hash(folder.path("b.txt"))));
}

#[test]
fn the_page_has_the_numbers_and_no_text_of_a_row_is_a_part_of_it() {
    let folder = Folder::new();
    let report = report(&folder);
    let page = fs::read_to_string(folder.path("report/report.html")).unwrap();
    for (source, counts) in &report.sources {
        let row = [counts.rows, counts.edited, counts.dropped_rows(), counts.kept]
            .map(|n| format!("<td class=\"number\">{n}</td>"))
            .concat();
        assert!(page.contains(&format!("<td>{source}</td>{row}")), "{source}: {row}");
    }
    for part in [
        "<svg",
        "<td>duplicate</td><td>the prompt was seen before</td>",
        "Samples of edits",
        "before",
        "<del>1 &#x2f; 1",
        "0.1.0",
    ] {
        assert!(page.contains(part), "{part}");
    }
    let evil = "<script>alert(1)</script> & \"quotes\"";
    let rows = [evil, evil].map(|text| json!({"id": "flan.1", "question": text}));
    let args = SubsampleArgs {
        train_data_path: vec![folder.lines("o.jsonl", &rows)],
        output_path: Some(folder.path("o.json")),
        shared: SharedArgs { report: Some(folder.path("evil")), ..SharedArgs::default() },
        ..SubsampleArgs::default()
    };
    let report = subsample_openorca(&SubsampleConfig::try_from(args).unwrap(), &quiet()).unwrap();
    assert_eq!(report.samples[0].before, evil);
    let page = fs::read_to_string(folder.path("evil/report.html")).unwrap();
    assert!(!page.contains("<script") && page.contains("&lt;script&gt;alert(1)"));
}

fn explained(args: &[&str]) -> String {
    let output = step1(args);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_way_of_a_row_can_be_followed() {
    let folder = Folder::new();
    let rows = [
        json!({"instruction": "1 / 1\n\nWhy is the sea salty?\nShare Prompt"}),
        json!({"instruction": "why is the SEA salty?"}),
        json!({"instruction": "Why is the seas salty?"}),
        json!({"instruction": "x ".repeat(600)}),
    ];
    let prompts = folder.lines("s.jsonl", &rows);
    let output = folder.path("p.json");
    let merge = |id: &str| {
        explained(&[
            "clean-and-merge",
            "--sharegpt-prompt-path",
            prompts.to_str().unwrap(),
            "--output-file",
            output.to_str().unwrap(),
            "--near-duplicates",
            "0.5",
            "--max-per-source",
            "sharegpt=3",
            "--explain",
            id,
        ])
    };
    let first = merge("sharegpt:1");
    for part in [
        "sharegpt:1: \"1 / 1",
        "edits (leading_counter, button): \"Why is the sea salty?\"",
        "near-duplicates  passes",
        "cap and mix      passes",
        "\nkept\n",
    ] {
        assert!(first.contains(part), "{part}: {first}");
    }
    for (id, part) in [
        ("sharegpt:2", "leaves out: duplicate: of sharegpt:1"),
        ("sharegpt:3", "like sharegpt:1"),
        ("sharegpt:4", "leaves out: too_long: more than 256 tokens"),
    ] {
        let text = merge(id);
        assert!(text.contains(part) && text.contains("\nleft out: "), "{id}: {text}");
    }
    assert!(!output.exists(), "nothing is written");
    let draft = dromedary_prompt_cleaning::Draft::new(
        dromedary_prompt_cleaning::Source::ShareGpt,
        "Why is the sea salty?",
    );
    assert_eq!(merge(&draft.id()), first, "the id in the output names the row too");
    let missing = step1(&[
        "clean-and-merge",
        "--sharegpt-prompt-path",
        prompts.to_str().unwrap(),
        "--output-file",
        output.to_str().unwrap(),
        "--explain",
        "sharegpt:9",
    ]);
    assert_eq!(missing.status.code(), Some(1));
}

#[test]
fn the_other_commands_explain_too() {
    let folder = Folder::new();
    let output = folder.path("out.json");
    let rows = [
        json!({"id": "flan.1", "question": " Name a camel. "}),
        json!({"id": "niv.1", "question": "name a camel."}),
        json!({"id": "flan.2", "question": "Premise: camels spit."}),
    ];
    let questions = folder.lines("o.jsonl", &rows);
    let subsample = |id: &str| {
        explained(&[
            "subsample-openorca",
            "--train-data-path",
            questions.to_str().unwrap(),
            "--output-path",
            output.to_str().unwrap(),
            "--explain",
            id,
        ])
    };
    let first = subsample("openorca:1");
    assert!(first.contains("edits (whitespace): \"Name a camel.\""), "{first}");
    assert!(first.contains("duplicate: of openorca:2"), "a better stratum wins: {first}");
    assert!(subsample("openorca:2").ends_with("\nkept\n"));
    assert!(subsample("openorca:3").contains("nli_task: has \"Premise\""));
    let conversations = folder.write(
        "s.json",
        json!([{"conversations": [{"from": "human", "value": "Who?"}]}]).to_string(),
    );
    let text = explained(&[
        "aggregate-sharegpt",
        "--data-files",
        conversations.to_str().unwrap(),
        "--output-file",
        output.to_str().unwrap(),
        "--explain",
        "sharegpt:1",
    ]);
    assert!(text.contains("\"Who?\"") && text.contains("single_turn"), "{text}");
    assert!(!output.exists());
}
