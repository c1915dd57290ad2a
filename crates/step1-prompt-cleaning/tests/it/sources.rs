use std::fs::File;
use std::path::Path;

use dromedary_prompt_cleaning::Lists;
use dromedary_prompt_cleaning::sources::{self, Offer, Offers, OpenOrcaQuestion, Row, Stratum};
use dromedary_prompt_cleaning::{DropReason, Error, Result};
use polars::prelude::*;
use serde_json::json;

use crate::support::{Folder, real_sample};

/// The contents of all rows; a fault as its text.
fn all<T>(rows: impl Iterator<Item = Result<Row<T>>>) -> Vec<std::result::Result<T, String>> {
    let mut contents = Vec::new();
    for (index, row) in rows.enumerate() {
        let row = row.unwrap();
        assert_eq!(row.number, index as u64 + 1);
        contents.push(row.content.map_err(|fault| fault.0));
    }
    contents
}

fn openorca(path: &Path) -> Vec<std::result::Result<OpenOrcaQuestion, String>> {
    all(OpenOrcaQuestion::open(path).unwrap())
}

/// The text of a prompt, or why there is none; a fault as its text.
type Offered = std::result::Result<std::result::Result<String, DropReason>, String>;

fn offered(offers: Result<Offers>) -> Vec<Offered> {
    let text = |offer| match offer {
        Offer::Draft(draft) => Ok(draft.instruction),
        Offer::Unfit { reason, .. } => Err(reason),
    };
    all(offers.unwrap()).into_iter().map(|row| row.map(text)).collect()
}

fn prompt(text: &str) -> Offered {
    Ok(Ok(text.to_owned()))
}

fn unfit(reason: DropReason) -> Offered {
    Ok(Err(reason))
}

fn sharegpt(path: &Path) -> Vec<Offered> {
    offered(sources::sharegpt(path))
}

fn oasst(path: &Path) -> Vec<Offered> {
    offered(sources::oasst(path))
}

fn write_parquet(path: &Path, row_group_size: usize, columns: Vec<Column>) {
    let height = columns[0].len();
    let mut frame = DataFrame::new(height, columns).unwrap();
    ParquetWriter::new(File::create(path).unwrap())
        .with_row_group_size(Some(row_group_size))
        .finish(&mut frame)
        .unwrap();
}

#[test]
fn openorca_reads_the_same_from_parquet_and_json() {
    let folder = Folder::new();
    let ids: Vec<String> = (0..1000).map(|n| format!("{}.{n}", ["niv", "t0"][n % 2])).collect();
    let questions: Vec<String> = (0..1000).map(|n| format!("question {n}\n\u{1f42a}")).collect();
    let rows: Vec<_> =
        ids.iter().zip(&questions).map(|(id, q)| json!({"id": id, "question": q})).collect();
    let lines = folder.lines("o.jsonl", &rows);
    let array = folder.write("o.json", json!(rows).to_string());
    let expected = openorca(&lines);
    assert_eq!(expected.len(), 1000);
    let first =
        OpenOrcaQuestion { stratum: Stratum::T0, question: "question 1\n\u{1f42a}".to_owned() };
    assert_eq!(expected[1], Ok(first));
    assert_eq!(openorca(&array), expected);
    for row_group_size in [1000, 300, 7] {
        let path = folder.path("o.parquet");
        write_parquet(
            &path,
            row_group_size,
            vec![
                Column::new("system_prompt".into(), vec!["x"; 1000]),
                Column::new("question".into(), &questions),
                Column::new("response".into(), vec![1_i64; 1000]),
                Column::new("id".into(), &ids),
            ],
        );
        assert_eq!(openorca(&path), expected, "row groups of {row_group_size}");
    }
}

#[test]
fn a_row_group_larger_than_a_slice_is_read_in_order() {
    let folder = Folder::new();
    let path = folder.path("o.parquet");
    let ids: Vec<String> = (0..40_000).map(|n| format!("flan.{n}")).collect();
    let columns = vec![Column::new("id".into(), &ids), Column::new("question".into(), &ids)];
    write_parquet(&path, 40_000, columns);
    let read: Vec<String> =
        openorca(&path).into_iter().map(|question| question.unwrap().question).collect();
    assert_eq!(read, ids);
}

#[test]
fn openorca_faults_name_the_field() {
    let folder = Folder::new();
    let path = folder.lines(
        "o.jsonl",
        &[
            json!({"id": "other.1", "question": "q"}),
            json!({"id": "flan.1"}),
            json!({"id": "flan.1", "question": null}),
            json!({"id": 7, "question": "q"}),
            json!([1, 2]),
            json!({"id": "cot.1", "question": ""}),
        ],
    );
    let rows = openorca(&path);
    let fault = |row: usize| rows[row].clone().unwrap_err();
    assert!(fault(0).contains("unknown stratum: its id \"other.1\""), "{}", fault(0));
    assert_eq!(fault(1), "has no `question`");
    assert_eq!(fault(2), "`question` is null, not a text");
    assert_eq!(fault(3), "`id` is a number, not a text");
    assert_eq!(fault(4), "is a list, not an object with `id`");
    assert!(rows[5].is_ok());
}

#[test]
fn parquet_columns_that_are_missing_or_of_another_type() {
    let folder = Folder::new();
    let path = folder.path("o.parquet");
    write_parquet(&path, 10, vec![Column::new("id".into(), vec!["flan.1"])]);
    let Err(Error::MissingColumn { column, found, .. }) = OpenOrcaQuestion::open(&path).map(drop)
    else {
        panic!("a column is missing");
    };
    assert_eq!((column.as_str(), found), ("question", vec!["id".to_owned()]));
    let columns = vec![
        Column::new("id".into(), vec!["flan.1", "flan.2"]),
        Column::new("question".into(), vec![Some(1.5), None]),
    ];
    write_parquet(&path, 10, columns);
    let rows = openorca(&path);
    assert!(rows[0].clone().unwrap_err().starts_with("`question` is a number"), "{rows:?}");
    assert_eq!(rows[1], Err("`question` is null, not a text".to_owned()));
}

#[test]
fn sharegpt_turns_under_value_and_markdown() {
    let folder = Folder::new();
    let turn = |from: &str, field: &str, text: &str| json!({"from": from, field: text});
    let answer = || turn("gpt", "value", "a");
    let path = folder.write(
        "s.json",
        json!([
            {"id": "1", "conversations": [turn("human", "value", " q "), answer(), answer()]},
            {"conversations": [turn("human", "markdown", "m"), answer()]},
            {"conversations": [turn("human", "value", "alone")]},
            {"conversations": []},
            {"conversations": [answer(), turn("human", "value", "q")]},
            {"conversations": null},
            {"conversations": [{"value": "no from"}, answer()]},
            {"conversations": [{"from": "human", "value": 3}, answer()]},
            {"conversations": [{"from": "human"}, answer()]},
            {"conversations": "x"},
            "x",
        ])
        .to_string(),
    );
    let fault = |text: &str| Err(text.to_owned());
    assert_eq!(
        sharegpt(&path),
        [
            prompt(" q "),
            prompt("m"),
            unfit(DropReason::SingleTurn),
            unfit(DropReason::SingleTurn),
            unfit(DropReason::NotHumanFirst),
            fault("`conversations` is null, not a list"),
            fault("the first turn has no `from`"),
            fault("the first turn `value` is a number, not a text"),
            fault("the first turn has neither a `value` nor a `markdown` text"),
            fault("`conversations` is a text, not a list"),
            fault("has no `conversations`, and is a text, not an object with `text`"),
        ]
    );
}

#[test]
fn sharegpt_from_nested_parquet() {
    let folder = Folder::new();
    let path = folder.path("s.parquet");
    let conversation = |froms: &[&str], texts: &[&str]| -> Series {
        let fields = [
            Series::new("from".into(), froms),
            Series::new("markdown".into(), texts),
            Series::new("text".into(), texts),
        ];
        StructChunked::from_series("".into(), froms.len(), fields.iter()).unwrap().into_series()
    };
    let lists = Series::new(
        "conversations".into(),
        [
            conversation(&["human", "gpt"], &["**one**", "a"]),
            conversation(&["gpt", "human"], &["b", "two"]),
            conversation(&["human"], &["three"]),
        ],
    );
    let columns = vec![Column::new("id".into(), vec!["1", "2", "3"]), lists.into_column()];
    write_parquet(&path, 2, columns);
    assert_eq!(
        sharegpt(&path),
        [prompt("**one**"), unfit(DropReason::NotHumanFirst), unfit(DropReason::SingleTurn),]
    );
}

#[test]
fn sharegpt_between_the_marks_of_a_text() {
    let folder = Folder::new();
    let texts =
        ["<human>: one \u{1c}<bot>: a <human>: two", "<human>: no answer", "<bot>: hello", "plain"];
    let rows = texts.map(|text| json!({"text": text}));
    let path = folder.lines("s.jsonl", &rows);
    assert_eq!(
        sharegpt(&path),
        [
            prompt("one"),
            unfit(DropReason::SingleTurn),
            unfit(DropReason::NotHumanFirst),
            unfit(DropReason::NotHumanFirst),
        ]
    );
}

#[test]
fn dolly_categories_and_contexts() {
    let folder = Folder::new();
    let row = |category: &str, context: &str| json!({"instruction": category, "context": context, "response": "r", "category": category});
    let path = folder.lines(
        "d.jsonl",
        &[
            row("creative_writing", ""),
            row("classification", "some"),
            row("closed_qa", "some"),
            json!({"instruction": "i", "category": "open_qa"}),
            json!({"instruction": "i"}),
        ],
    );
    assert_eq!(
        offered(sources::dolly(&path, Lists::built_in())),
        [
            prompt("creative_writing"),
            unfit(DropReason::HasContext),
            unfit(DropReason::OtherCategory),
            prompt("i"),
            Err("has no `category`".to_owned()),
        ]
    );
}

#[test]
fn oasst_roots_with_an_answer_in_both_exports() {
    let folder = Folder::new();
    let flat = folder.lines(
        "flat.jsonl",
        &[
            // The answer may precede the question.
            json!({"message_id": "b", "parent_id": "a", "text": "answer"}),
            json!({"message_id": "a", "parent_id": null, "text": "one"}),
            json!({"message_id": "c", "text": "two"}),
            json!({"message_id": "d", "parent_id": "b", "text": "thanks"}),
        ],
    );
    let one = || prompt("one");
    assert_eq!(
        oasst(&flat),
        [
            unfit(DropReason::NotARoot),
            one(),
            unfit(DropReason::NoReply),
            unfit(DropReason::NotARoot),
        ]
    );
    let tree = folder.lines(
        "tree.jsonl",
        &[
            json!({"prompt": {"text": "one", "replies": [{"text": "answer", "replies": []}]}}),
            json!({"prompt": {"text": "two", "replies": []}}),
            json!({"prompt": {"replies": []}}),
        ],
    );
    let fault = Err("the prompt has no `text`".to_owned());
    assert_eq!(oasst(&tree), [one(), unfit(DropReason::NoReply), fault]);
}

#[test]
fn hostile_json_is_one_bad_row_each() {
    let folder = Folder::new();
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    let bad = [
        format!(r#"{{"id": "flan.1", "question": {deep}}}"#),
        r#"{"id": "flan.1", "question": "\ud800"}"#.to_owned(),
        r#"{"id": "flan.1", "question": NaN}"#.to_owned(),
        r#"{"id": "flan.1", "#.to_owned() + "\"question\": }",
    ];
    let good = r#"{"id": "flan.1", "question": "old", "question": "new", "x": [[[]]]}"#;
    let text = format!("\u{feff}{good}\r\n\r\n{}\r\n{good}\n", bad.join("\n"));
    let rows = openorca(&folder.write("o.jsonl", text));
    assert_eq!(rows.len(), 2 + bad.len());
    for row in [&rows[0], &rows[5]] {
        assert_eq!(row.as_ref().unwrap().question, "new");
    }
    for row in &rows[1..5] {
        assert!(row.as_ref().unwrap_err().starts_with("is not valid JSON: line"), "{row:?}");
    }
    let array = folder.write("o.json", format!("[{good}, {}, {good}]", bad[..3].join(", ")));
    assert_eq!(openorca(&array).iter().filter(|row| row.is_err()).count(), 3);
}

#[test]
fn a_file_that_is_cut_is_an_error() {
    let folder = Folder::new();
    for (name, text) in [
        ("o.json", r#"[{"id": "flan.1", "question": "a"}, {"id": "fl"#),
        ("o.jsonl", "{\"id\": \"flan.1\", \"question\": \"a\"}\n{\"id\": \"fl"),
    ] {
        let rows: Vec<_> = OpenOrcaQuestion::open(&folder.write(name, text)).unwrap().collect();
        assert!(rows[0].is_ok());
        let error = rows[1].as_ref().unwrap_err().to_string();
        assert!(error.contains(name), "{error}");
    }
}

#[test]
fn damaged_parquet_is_a_clean_error() {
    let folder = Folder::new();
    for content in
        [&b""[..], b"PAR1", b"not parquet at all, but long enough to look", b"PAR1xxxxxxxxPAR1"]
    {
        let path = folder.write("o.parquet", content);
        let error = OpenOrcaQuestion::open(&path).map(drop).unwrap_err();
        assert!(error.to_string().contains("o.parquet"), "{error}");
    }
    let missing = OpenOrcaQuestion::open(&folder.path("none.parquet")).map(drop).unwrap_err();
    assert!(matches!(missing, Error::Open { .. }), "{missing}");
}

#[test]
fn real_samples_read_without_a_fault() {
    let Some(path) = real_sample("openorca/openorca_shaped_284.jsonl") else { return };
    let rows = openorca(&path);
    assert_eq!(rows.len(), 284);
    let of = |stratum| rows.iter().filter(|row| row.as_ref().unwrap().stratum == stratum).count();
    assert_eq!(Stratum::ALL.map(of), [19, 173, 88, 4]);
    let Some(path) = real_sample("sharegpt/sg_small_filtered.json") else { return };
    let rows = sharegpt(&path);
    assert_eq!(rows.len(), 284);
    assert!(rows.iter().all(|row| row.is_ok()));
    let Some(path) = real_sample("dolly/dolly_exact_45.jsonl") else { return };
    let rows = offered(sources::dolly(&path, Lists::built_in()));
    let prompts = rows.iter().filter(|row| matches!(row, Ok(Ok(_)))).count();
    assert_eq!((rows.len(), prompts), (45, 42));
    let Some(path) = real_sample("oasst1/en_100_tree.jsonl") else { return };
    assert!(oasst(&path).iter().all(|row| row.is_ok()));
    let Some(path) = real_sample("oasst1/en-validation-400.jsonl") else { return };
    let rows = oasst(&path);
    assert_eq!(rows.len(), 400);
    assert!(rows.iter().any(|row| matches!(row, Ok(Ok(_)))));
}
