use std::fs;

use dromedary_records::{AlignedResponse, FinishReason};
use dromedary_self_align::{Compat, Filter, Kept, MetaPrompt, Verdict};
use serde::Deserialize;

use crate::support::row;

/// A row of `tests/data/make_goldens.py`.
#[derive(Deserialize)]
struct Case {
    instruction: String,
    input: String,
    output: String,
    kept: Option<GoldenRow>,
}

#[derive(Deserialize)]
struct GoldenRow {
    instruction: String,
    input: String,
    output: String,
}

fn cases() -> Vec<Case> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/compat_golden.json");
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

/// What our generator writes where the original's writes `case.output`: the space before the first
/// word stays, and the text ends behind the mark of the user's turn.
fn as_generated(case: &Case) -> AlignedResponse {
    let mut output = format!(" {}", case.output);
    let mark = "\n\nUser:";
    let end = output.find(mark);
    if let Some(at) = end {
        output.truncate(at + mark.len());
    }
    AlignedResponse {
        instruction: case.instruction.clone(),
        input: case.input.clone(),
        output,
        finish_reason: if end.is_some() { FinishReason::Stop } else { FinishReason::Length },
        ..row("", "")
    }
}

fn filter() -> Filter {
    Filter::new(Some(Compat::Dromedary), &MetaPrompt::open(None).unwrap())
}

fn assert_golden(case: &Case, verdict: Verdict) {
    let kept = match verdict {
        Verdict::Kept(kept) => Some(kept),
        Verdict::Dropped(_) => None,
    };
    let golden = case.kept.as_ref().map(|row| Kept {
        instruction: row.instruction.clone(),
        input: row.input.clone(),
        output: row.output.clone(),
    });
    assert_eq!(kept, golden, "{:?}", case.output);
}

#[test]
fn compat_keeps_the_rows_that_the_original_keeps() {
    let (filter, cases) = (filter(), cases());
    for case in &cases {
        assert_golden(case, filter.judge(&as_generated(case)));
    }
    let kept = cases.iter().filter(|case| case.kept.is_some()).count();
    assert!(kept > 100 && cases.len() - kept > 100, "{kept} of {}", cases.len());
}

#[test]
fn compat_reads_text_of_the_originals_generator_as_well() {
    let filter = filter();
    for case in cases().iter().filter(|case| !case.output.starts_with(' ')) {
        let row = AlignedResponse {
            output: case.output.clone(),
            finish_reason: FinishReason::Length,
            ..as_generated(case)
        };
        assert_golden(case, filter.judge(&row));
    }
}

#[test]
fn compat_takes_a_stop_without_its_mark_as_a_complete_answer() {
    let mut row = row("Tell me about kettles.", &"kettle ".repeat(30));
    row.output = row.output.replace("\n\nUser:", "");
    let Verdict::Kept(kept) = filter().judge(&row) else { panic!() };
    assert!(kept.output.ends_with("\n\n### User\n"), "{}", kept.output);
}
