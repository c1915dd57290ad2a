//! Every format is read as it was written, and as others write it.

use std::fs;
use std::path::{Path, PathBuf};

use dromedary_records::{
    AlignedResponse, Error, FinishReason, Prompt, Result, RowWriter, TrainingRow, read_prompts,
    read_rows, row_id,
};
use proptest::prelude::*;

const NAMES: [&str; 6] =
    ["r.json", "r.json.gz", "r.json.zst", "r.jsonl", "r.jsonl.gz", "r.jsonl.zst"];

fn file(content: &[u8]) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.json");
    fs::write(&path, content).unwrap();
    (folder, path)
}

fn prompts(content: &str) -> Vec<Result<Prompt>> {
    let (_folder, path) = file(content.as_bytes());
    read_prompts(&path).unwrap().collect()
}

fn training_rows(path: &Path) -> Vec<TrainingRow> {
    read_rows(path).unwrap().collect::<Result<_>>().unwrap()
}

#[test]
fn an_array_is_written_as_the_original_writes_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("sft.json");
    let mut writer = RowWriter::json_array(&path).unwrap();
    for example_id in 1..=2 {
        let (instruction, input) = ("a\nb".to_owned(), String::new());
        writer
            .write(&TrainingRow {
                example_id,
                instruction,
                input,
                output: "é".to_owned(),
                meta_prompt: None,
            })
            .unwrap();
    }
    assert!(!path.exists());
    assert_eq!(writer.finish().unwrap(), 2);
    let row = |id| {
        format!(
            "  {{\n    \"example_id\": {id},\n    \"instruction\": \"a\\nb\",\n    \"input\": \"\",\n    \
             \"output\": \"é\"\n  }}"
        )
    };
    assert_eq!(fs::read_to_string(&path).unwrap(), format!("[\n{},\n{}\n]\n", row(1), row(2)));
}

#[test]
fn no_rows_are_an_empty_array_or_an_empty_file() {
    let folder = tempfile::tempdir().unwrap();
    for name in NAMES {
        let path = folder.path().join(name);
        assert_eq!(RowWriter::create(&path).unwrap().finish().unwrap(), 0);
        assert!(training_rows(&path).is_empty(), "{name}");
    }
    assert_eq!(fs::read(folder.path().join("r.json")).unwrap(), b"[]\n");
    assert_eq!(fs::read(folder.path().join("r.jsonl")).unwrap(), b"");
    let (_folder, path) = file(b"");
    assert!(training_rows(&path).is_empty());
}

#[test]
fn the_content_tells_the_format_whatever_the_name() {
    for text in [
        "{\"instruction\": \"a\"}\n{\"instruction\": \"b\"}\n",
        "\u{feff}\r\n{\"instruction\": \"a\"}\r\n\r\n{\"instruction\": \"b\"}",
        "[{\"instruction\": \"a\"}, {\"instruction\": \"b\"}]",
        "\u{feff} \r\n[\r\n{\"instruction\": \"a\"},{\"instruction\": \"b\"}\r\n]\r\n",
    ] {
        let found: Vec<_> = prompts(text).into_iter().map(|row| row.unwrap().instruction).collect();
        assert_eq!(found, ["a", "b"], "{text}");
    }
}

#[test]
fn compressed_files_are_told_by_their_content() {
    let folder = tempfile::tempdir().unwrap();
    let (packed, renamed) = (folder.path().join("r.json.zst"), folder.path().join("r.json"));
    let mut writer = RowWriter::create(&packed).unwrap();
    writer.write(&serde_json::json!({"instruction": "a"})).unwrap();
    writer.finish().unwrap();
    assert!(fs::read(&packed).unwrap().starts_with(b"\x28\xb5\x2f\xfd"));
    fs::rename(&packed, &renamed).unwrap();
    assert_eq!(read_prompts(&renamed).unwrap().count(), 1);
}

#[test]
fn prompts_of_the_original_get_id_and_source() {
    let row = r#"{"instruction": "i", "input": "", "output": ""}"#;
    let found: Vec<Prompt> =
        prompts(&format!("[{row}, {row}]")).into_iter().map(Result::unwrap).collect();
    assert_eq!(found[0].source, "unknown");
    assert_eq!(found[0].id, row_id("unknown", "i", "", 0));
    assert_eq!(found[1].id, row_id("unknown", "i", "", 1));
}

#[test]
fn prompts_keep_their_own_ids_which_are_unique() {
    let text = r#"[{"id": "x", "source": "s", "instruction": "i"},
                   {"instruction": "j"},
                   {"id": "x", "instruction": "k"}]"#;
    let found = prompts(text);
    let first = found[0].as_ref().unwrap();
    assert_eq!((first.id.as_str(), first.source.as_str(), first.input.as_str()), ("x", "s", ""));
    let error = found[2].as_ref().unwrap_err();
    assert!(matches!(error, Error::SameId { first: 1, second: 3, .. }), "{error}");
    assert!(!error.is_bad_row());
}

fn response(text: String, seed: u64) -> AlignedResponse {
    AlignedResponse {
        id: row_id("s", &text, "", 0),
        source: "s".to_owned(),
        instruction: text.clone(),
        input: String::new(),
        output: text,
        finish_reason: FinishReason::Stop,
        prompt_tokens: 1,
        output_tokens: u32::MAX,
        seed,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn rows_survive_every_format(
        texts in prop::collection::vec((any::<String>(), any::<u64>()), 0..8)
    ) {
        let rows: Vec<_> =
            texts.into_iter().map(|(text, seed)| response(text, seed)).collect();
        let folder = tempfile::tempdir().unwrap();
        for name in NAMES {
            let path = folder.path().join(name);
            let mut writer = RowWriter::create(&path).unwrap();
            for row in &rows {
                writer.write(row).unwrap();
            }
            prop_assert_eq!(writer.finish().unwrap(), rows.len() as u64);
            let read: Vec<AlignedResponse> =
                read_rows(&path).unwrap().collect::<Result<_>>().unwrap();
            prop_assert_eq!(&read, &rows);
        }
    }
}
