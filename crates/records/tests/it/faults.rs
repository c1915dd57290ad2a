//! Damaged and hostile files, and disks that fail.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use dromedary_records::{Error, Prompt, Result, RowWriter, TrainingRow, read_prompts, read_rows};

fn file(name: &str, content: &[u8]) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    fs::write(&path, content).unwrap();
    (folder, path)
}

fn rows(name: &str, content: &[u8]) -> Vec<Result<Prompt>> {
    let (_folder, path) = file(name, content);
    read_prompts(&path).unwrap().collect()
}

fn good_and_bad(content: &[u8]) -> (usize, Vec<String>) {
    let (good, bad): (Vec<_>, Vec<_>) =
        rows("p.json", content).into_iter().partition(|row| row.is_ok());
    (good.len(), bad.into_iter().map(|row| row.unwrap_err().to_string()).collect())
}

#[test]
fn a_missing_file_is_named() {
    let error = read_prompts("/nowhere/prompts.json").unwrap_err().to_string();
    assert_eq!(error, "cannot read /nowhere/prompts.json");
}

/// Bad rows among good ones, as an array and as lines: each is reported by its number.
#[test]
fn bad_rows_are_counted_and_do_not_stop_the_others() {
    let deep = format!("{{\"instruction\": {}1{}}}", "[".repeat(100_000), "]".repeat(100_000));
    let bad = [
        r#"{"instruction": null}"#,
        r#"{"input": "no instruction"}"#,
        r#"{"instruction": "a", "instruction": "b"}"#,
        r#"{"instruction": "\ud83d"}"#,
        r#"{"instruction": NaN}"#,
        r#"{"instruction": "a" "input": "b"}"#,
        &deep,
    ];
    let good = r#"{"instruction": "good"}"#;
    for bad in bad {
        let lines = format!("{good}\n{bad}\n{good}\n");
        let (count, errors) = good_and_bad(lines.as_bytes());
        assert_eq!((count, errors.len()), (2, 1), "{errors:?}");
        assert!(errors[0].contains("p.json, line 2: "), "{errors:?}");

        let array = format!("[{good},\n{bad},\n{good}]");
        let (count, errors) = good_and_bad(array.as_bytes());
        assert_eq!((count, errors.len()), (2, 1), "{errors:?}");
        assert!(errors[0].contains("p.json, row 2: "), "{errors:?}");
    }
}

#[test]
fn depth_in_a_field_that_is_passed_over_does_no_harm() {
    let depth = 100_000;
    let text = format!(
        r#"[{{"instruction": "a", "tree": {}{}}}, {{"instruction": "b"}}]"#,
        "[".repeat(depth),
        "]".repeat(depth)
    );
    let found = rows("p.json", text.as_bytes());
    assert_eq!(found.len(), 2);
    assert_eq!(found[1].as_ref().unwrap().instruction, "b");
}

#[test]
fn cut_anywhere_a_file_is_never_taken_for_whole() {
    for name in ["r.json", "r.json.gz", "r.json.zst", "r.jsonl", "r.jsonl.gz", "r.jsonl.zst"] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        let mut writer = RowWriter::create(&path).unwrap();
        for id in 0..3 {
            writer.write(&serde_json::json!({"instruction": format!("number {id}")})).unwrap();
        }
        writer.finish().unwrap();
        let whole = fs::read(&path).unwrap();
        let is_plain_jsonl = name == "r.jsonl";
        // With less than its magic number a compressed file is not known for one.
        let shortest = if name.ends_with('z') || name.ends_with('t') { 4 } else { 1 };
        for len in shortest..whole.len() - 1 {
            fs::write(&path, &whole[..len]).unwrap();
            let found: Result<Vec<Prompt>> = read_prompts(&path).and_then(Iterator::collect);
            // Between two lines a cut cannot be seen.
            let between_lines = is_plain_jsonl && (whole[len - 1] == b'\n' || whole[len] == b'\n');
            assert_eq!(found.is_ok(), between_lines, "{name} cut at {len}: {found:?}");
            if let Err(error) = found {
                assert!(!error.is_bad_row(), "{name} cut at {len}: {error}");
                assert!(error.to_string().contains(name), "{error}");
            }
        }
    }
}

#[test]
fn a_flipped_byte_in_a_compressed_file_is_an_error_and_not_a_crash() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("r.json.gz");
    let mut writer = RowWriter::create(&path).unwrap();
    for id in 0..200 {
        writer.write(&serde_json::json!({"instruction": format!("number {id}")})).unwrap();
    }
    writer.finish().unwrap();
    let whole = fs::read(&path).unwrap();
    // Behind the header, whose time and name are not checked.
    for index in 10..whole.len() {
        let mut flipped = whole.clone();
        flipped[index] ^= 1;
        fs::write(&path, &flipped).unwrap();
        let found: Result<Vec<Prompt>> = read_prompts(&path).and_then(Iterator::collect);
        assert!(found.is_err(), "byte {index}");
    }
}

fn entries(folder: &Path) -> usize {
    fs::read_dir(folder).unwrap().count()
}

#[test]
fn dropped_unfinished_nothing_appears_and_the_old_file_stays() {
    for name in ["r.json", "r.json.gz", "r.jsonl.zst"] {
        let (folder, path) = file(name, b"old");
        let mut writer = RowWriter::create(&path).unwrap();
        writer.write(&serde_json::json!({"instruction": "a"})).unwrap();
        drop(writer);
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(entries(folder.path()), 1);
    }
}

/// The example program, which Cargo puts beside the folder of the test programs.
fn convert_program() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let program = test.ancestors().nth(2).unwrap().join("examples/convert");
    assert!(program.exists(), "{} is built by a plain cargo test", program.display());
    program
}

/// Copies rows with files limited to `blocks` of 512 bytes, which fails a write as a full disk
/// does.
fn convert_on_disk_of(blocks: &str, input: &Path, output: &Path) -> (bool, String) {
    let script = format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$0\" \"$@\"");
    let result = Command::new("sh")
        .args(["-c", &script])
        .args([&convert_program(), input, output])
        .output()
        .unwrap();
    (result.status.success(), String::from_utf8(result.stderr).unwrap())
}

#[test]
fn a_full_disk_leaves_the_old_file_and_no_temporary_one() {
    let rows: String = (0..50_000)
        .map(|id| format!("{{\"id\": \"{}\"}}\n", blake3::hash(&[id as u8, (id >> 8) as u8])))
        .collect();
    let (_input_folder, input) = file("rows.jsonl", rows.as_bytes());
    for name in ["r.json", "r.json.gz", "r.jsonl.zst"] {
        let (folder, output) = file(name, b"[]");
        let (is_success, stderr) = convert_on_disk_of("16", &input, &output);
        assert!(!is_success);
        let expected = format!("error: cannot write {}: File too large", output.display());
        assert!(stderr.starts_with(&expected), "{stderr}");
        assert_eq!(fs::read(&output).unwrap(), b"[]");
        assert_eq!(entries(folder.path()), 1);

        let (is_success, stderr) = convert_on_disk_of("unlimited", &input, &output);
        assert!(is_success, "{stderr}");
        assert_eq!(stderr, "50000 rows written, 0 bad rows left out\n");
    }
}

#[test]
fn errors_of_the_disk_name_the_path_once() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("runs/r.json.gz");
    let mut writer = RowWriter::create(&path).unwrap();
    writer.write(&serde_json::json!({"instruction": "a"})).unwrap();
    fs::remove_dir_all(folder.path().join("runs")).unwrap();
    let error = writer.finish().unwrap_err();
    assert!(matches!(error, Error::File(_)), "{error}");
    assert_eq!(error.to_string(), format!("cannot write {}", path.display()));
}

#[test]
fn a_row_of_another_kind_says_which_field_is_missing() {
    let (_folder, path) = file("p.jsonl", b"{\"instruction\": \"i\", \"output\": \"o\"}\n");
    let error = read_rows::<TrainingRow>(&path).unwrap().next().unwrap().unwrap_err().to_string();
    assert!(error.contains("line 1: missing field `example_id`"), "{error}");
}
