use std::collections::{BTreeMap, BTreeSet};

use dromedary_records::{AlignedResponse, TrainingRow, read_rows};
use dromedary_self_align::{Compat, Filter, MergeArgs, MergeConfig, MetaPrompt, Rule, Verdict};
use dromedary_self_align::{Report, merge_and_filter};

use crate::support::root;

fn aligned() -> Vec<AlignedResponse> {
    let rows = read_rows(root().join("dummy_data/aligned.jsonl")).unwrap();
    rows.collect::<Result<_, _>>().unwrap()
}

fn verdicts(compat: Option<Compat>) -> Vec<Verdict> {
    let filter = Filter::new(compat, &MetaPrompt::open(None).unwrap());
    aligned().iter().map(|row| filter.judge(row)).collect()
}

fn rules(verdicts: &[Verdict]) -> BTreeSet<Rule> {
    let rule = |verdict: &Verdict| match verdict {
        Verdict::Dropped(rule) => Some(*rule),
        Verdict::Kept(_) => None,
    };
    verdicts.iter().filter_map(rule).collect()
}

fn merged(output: &std::path::Path, compat: Option<Compat>) -> Report {
    let config = MergeConfig::try_from(MergeArgs {
        data_file_pattern: Some(root().join("dummy_data/aligned.jsonl").display().to_string()),
        dummy_data_file: Some(root().join("dummy_data/identity.json")),
        output_file: Some(output.to_owned()),
        allow_unfinished: Some(true),
        compat,
        ..MergeArgs::default()
    });
    merge_and_filter(&config.unwrap()).unwrap()
}

#[test]
fn the_rows_made_by_hand_hit_every_rule() {
    let corrected = rules(&verdicts(None));
    let expected = Rule::CORRECTED.iter().copied().chain([Rule::NotGenerated]);
    assert_eq!(corrected, expected.collect());
    let compat = rules(&verdicts(Some(Compat::Dromedary)));
    use Rule::{BlackList, Echo, Empty, NoAffirmation, NoAnswer, NotGenerated, Short};
    let expected = [BlackList, Echo, Empty, NoAffirmation, NoAnswer, NotGenerated, Short];
    assert_eq!(compat, BTreeSet::from(expected));
}

#[test]
fn both_rule_sets_keep_rows_that_the_other_drops() {
    let pairs: Vec<(Verdict, Verdict)> =
        verdicts(None).into_iter().zip(verdicts(Some(Compat::Dromedary))).collect();
    let kept = |verdict: &Verdict| matches!(verdict, Verdict::Kept(_));
    let count = |ours: bool, theirs: bool| {
        pairs.iter().filter(|(one, other)| kept(one) == ours && kept(other) == theirs).count()
    };
    for (ours, theirs) in [(true, true), (true, false), (false, true), (false, false)] {
        assert!(count(ours, theirs) > 0, "ours {ours}, theirs {theirs}");
    }
}

#[test]
fn they_merge_with_the_identity_rows_to_training_rows() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("sft.json");
    let report = merged(&output, None);
    assert_eq!(report.identity, 300);
    assert!(report.kept >= 10, "{report}");
    assert_eq!(report.rows, aligned().len() as u64);
    assert_eq!(report.dropped[&Rule::SameId], 1);
    let rows: Vec<TrainingRow> = read_rows(&output).unwrap().collect::<Result<_, _>>().unwrap();
    let ids: BTreeMap<u64, &TrainingRow> = rows.iter().map(|row| (row.example_id, row)).collect();
    assert_eq!(ids.len() as u64, report.kept + 300);
    assert_eq!(
        ids.keys().copied().collect::<Vec<_>>(),
        (1..=report.kept + 300).collect::<Vec<_>>()
    );
    for row in &rows {
        assert!(row.output.ends_with("\n\n### User\n"), "{:?}", row.output);
        let text = format!("{}{}", row.instruction, row.output);
        assert!(!text.contains('{') || text.contains("for (int i"), "{text}");
    }
    let identity = ids.range(report.kept + 1..);
    let named = identity.filter(|(_, row)| row.output.contains("Dromedary")).count();
    assert!(named >= 50, "{named}");
}

#[test]
fn identity_questions_are_all_different() {
    let text = std::fs::read_to_string(root().join("dummy_data/identity.json")).unwrap();
    let rows: Vec<serde_json::Value> = serde_json::from_str(&text).unwrap();
    let questions: BTreeSet<String> =
        rows.iter().map(|row| row["conversations"][0]["value"].to_string()).collect();
    assert_eq!(questions.len(), 300);
    assert!(text.contains("{product}") && text.contains("{maker}"));
    assert!(!text.contains("Dromedary") && !text.contains("Self-Align"));
}

#[test]
fn compat_gives_every_row_an_id_too() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("sft.json");
    let report = merged(&output, Some(Compat::Dromedary));
    let rows: Vec<TrainingRow> = read_rows(&output).unwrap().collect::<Result<_, _>>().unwrap();
    assert_eq!(rows.len() as u64, report.kept + 300);
}
