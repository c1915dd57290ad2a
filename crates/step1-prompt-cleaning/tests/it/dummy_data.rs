use std::collections::BTreeSet;

use dromedary_prompt_cleaning::{
    AggregateArgs, AggregateConfig, Compat, DropReason, Edit, JudgeArgs, MergeArgs, MergeConfig,
    Report, SubsampleArgs, SubsampleConfig, aggregate_sharegpt, clean_and_merge,
    subsample_openorca,
};

use crate::support::{
    Folder, assert_sums, dummy_data, following, instruction_set, quiet, small_tokenizer,
};

/// The goldens count with the vocabulary of 512 pieces, so texts have more tokens than in LLaMA's.
const MAX_PROMPT_LEN: usize = 400;
const GOLDENS: &str = include_str!("../data/dummy_data_goldens.json");

/// The three commands in turn, with `tweak` on the settings of the last and a cap on the first.
fn pipeline(folder: &Folder, compat: Option<Compat>, cap: usize, min_len: usize) -> [Report; 3] {
    let judge = JudgeArgs {
        tokenizer: Some(small_tokenizer()),
        max_prompt_len: Some(MAX_PROMPT_LEN),
        ..JudgeArgs::default()
    };
    let subsample = SubsampleArgs {
        train_data_path: vec![dummy_data("openorca.parquet")],
        output_path: Some(folder.path("openorca.json")),
        max_samples_per_dataset: Some(cap),
        judge: judge.clone(),
        shared: following(compat),
    };
    let aggregate = AggregateArgs {
        data_files: vec![dummy_data("sharegpt.json")],
        output_file: Some(folder.path("sharegpt.json")),
        shared: following(compat),
    };
    let merge = MergeArgs {
        sharegpt_prompt_path: vec![folder.path("sharegpt.json")],
        openorca_prompt_path: vec![folder.path("openorca.json")],
        dolly: vec![dummy_data("dolly.jsonl")],
        oasst: vec![dummy_data("oasst1.jsonl")],
        output_file: Some(folder.path("prompts.json")),
        min_prompt_len: Some(min_len),
        judge,
        shared: following(compat),
        ..MergeArgs::default()
    };
    let session = quiet();
    let reports = [
        subsample_openorca(&SubsampleConfig::try_from(subsample).unwrap(), &session).unwrap(),
        aggregate_sharegpt(&AggregateConfig::try_from(aggregate).unwrap(), &session).unwrap(),
        clean_and_merge(&MergeConfig::try_from(merge).unwrap(), &session).unwrap(),
    ];
    reports.iter().for_each(assert_sums);
    reports
}

fn reasons(reports: &[Report]) -> (BTreeSet<String>, BTreeSet<String>) {
    let sources = || reports.iter().flat_map(|report| report.sources.values());
    let drops = sources().flat_map(|counts| counts.dropped.keys().cloned()).collect();
    let edits = sources().flat_map(|counts| counts.edits.keys().cloned()).collect();
    (drops, edits)
}

#[test]
fn every_source_has_forty_rows_and_no_bad_one() {
    let reports = pipeline(&Folder::new(), None, 10_000, 2);
    let [openorca, sharegpt, merged] = &reports;
    for input in [&openorca.inputs[..], &sharegpt.inputs, &merged.inputs[..2]].concat() {
        assert!(input.rows >= 40 && input.bad_rows == 0, "{input:?}");
    }
    for (source, counts) in &merged.sources {
        assert!(counts.kept >= 30, "{source}: {counts:?}");
    }
}

/// Rows that cannot be read would be refused in so small a file; the others are of rules that a
/// flag switches on.
const NOT_MET: [DropReason; 6] = [
    DropReason::BadRow,
    DropReason::NearDuplicate,
    DropReason::OtherLanguage,
    DropReason::Contaminated,
    DropReason::OverMix,
    DropReason::NotSampled,
];

#[test]
fn every_rule_is_met() {
    for compat in [None, Some(Compat::Dromedary)] {
        // A small cap and a higher least length bind as the defaults do on real data.
        let mut reports = pipeline(&Folder::new(), compat, 10_000, 2).to_vec();
        reports.extend(pipeline(&Folder::new(), compat, 5, 4));
        let (drops, edits) = reasons(&reports);
        for reason in DropReason::ALL {
            // Dromedary has no rule for empty questions of OpenOrca, but drops what cleaning leaves
            // empty.
            let met = drops.contains(reason.name());
            assert_eq!(met, !NOT_MET.contains(&reason), "{compat:?}: {}", reason.name());
        }
        for edit in Edit::ALL {
            assert!(edits.contains(edit.name()), "{compat:?}: {}", edit.name());
        }
    }
}

#[test]
fn ordinary_text_survives_the_corrected_rules_alone() {
    let folder = Folder::new();
    pipeline(&folder, None, 10_000, 2);
    let corrected = instruction_set(&folder.path("prompts.json"));
    let dromedary = Folder::new();
    pipeline(&dromedary, Some(Compat::Dromedary), 10_000, 2);
    let dromedary = instruction_set(&dromedary.path("prompts.json"));
    for text in
        ["24/7 support: write a friendly banner", "Simplify 6/8", "What does the mark 1 / 1 under"]
    {
        assert!(corrected.iter().any(|prompt| prompt.starts_with(text)), "{text}");
        assert!(!dromedary.iter().any(|prompt| prompt.starts_with(text)), "{text}");
    }
    for prompts in [&corrected, &dromedary] {
        assert!(prompts.iter().any(|prompt| prompt == "Why is the sea salty? Keep it short."));
    }
}

/// The set that an independent program in Python gives for the same files and limits.
#[test]
fn dromedarys_rows_are_those_of_the_python_restatement() {
    let folder = Folder::new();
    pipeline(&folder, Some(Compat::Dromedary), 10_000, 2);
    let goldens: serde_json::Value = serde_json::from_str(GOLDENS).unwrap();
    assert_eq!(goldens["max_prompt_len"], MAX_PROMPT_LEN);
    for name in ["openorca", "sharegpt", "prompts"] {
        let expected: Vec<String> = serde_json::from_value(goldens[name].clone()).unwrap();
        assert!(expected.len() > 30);
        let mut sorted = expected.clone();
        sorted.sort();
        assert_eq!(instruction_set(&folder.path(&format!("{name}.json"))), sorted, "{name}");
    }
}
