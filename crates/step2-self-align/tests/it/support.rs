use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use dromedary_records::{AlignedResponse, FinishReason};

/// The root of the checkout.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap().to_owned()
}

/// A LLaMA of 260,000 parameters with 512 tokens of vocabulary and of context.
pub(crate) fn stories260k() -> PathBuf {
    root().join("crates/llama/tests/data/stories260k")
}

/// A meta prompt that leaves room in 512 tokens of context.
pub(crate) const SHORT_PROMPT: &str = "Be good.\n\nUser:";

/// A row in form, with this answer, complete.
pub(crate) fn row(instruction: &str, answer: &str) -> AlignedResponse {
    let thoughts = "I am a helpful, ethical, and reliable assistant. The user asks.";
    AlignedResponse {
        id: dromedary_records::row_id("test", instruction, answer, 0),
        source: "test".to_owned(),
        instruction: instruction.to_owned(),
        input: String::new(),
        output: format!(" {thoughts}\n\nWatson: {answer}\n\nUser:"),
        finish_reason: FinishReason::Stop,
        prompt_tokens: 10,
        output_tokens: 20,
        seed: 1,
    }
}

/// Writes rows as one JSONL file.
pub(crate) fn write_rows(path: &Path, rows: &[AlignedResponse]) {
    let lines: Vec<String> =
        rows.iter().map(|row| serde_json::to_string(row).unwrap() + "\n").collect();
    fs::write(path, lines.concat()).unwrap();
}

/// Lines of a JSONL file as JSON values.
pub(crate) fn lines(path: &Path) -> Vec<serde_json::Value> {
    let text = fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Runs the binary in a folder with a command line as it is typed in a shell without quotes.
pub(crate) fn run(folder: &Path, command: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_step2-self-align"))
        .args(command.split_whitespace())
        .current_dir(folder)
        .env_remove("RUST_LOG")
        .output()
        .unwrap()
}

/// Runs the binary and gives what it wrote to stderr; the exit code must be this one.
pub(crate) fn run_to(code: i32, folder: &Path, command: &str) -> String {
    let output = run(folder, command);
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{command}\n{stderr}");
    stderr
}
