use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use dromedary_command::StopFlag;
use dromedary_parallel::SingleProcess;
use dromedary_records::{AlignedResponse, FinishReason};
use dromedary_self_align::{GenerateArgs, GenerateConfig, GenerateReport, Result, generate};

/// The root of the checkout.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap().to_owned()
}

/// A LLaMA of 260,000 parameters with 512 tokens of vocabulary and of context.
pub(crate) fn stories260k() -> PathBuf {
    root().join("crates/llama/tests/data/stories260k")
}

/// Writes that model into a new folder, to be changed there.
pub(crate) fn copy_model(folder: &Path) {
    fs::create_dir(folder).unwrap();
    for file in fs::read_dir(stories260k()).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), folder.join(file.file_name())).unwrap();
    }
}

/// A meta prompt that leaves room in 512 tokens of context.
pub(crate) const SHORT_PROMPT: &str = "Be good.\n\nUser:";

/// A folder with prompts and a short meta prompt.
pub(crate) fn folder_of(prompts: &[&str]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let prompts: Vec<_> =
        prompts.iter().map(|text| serde_json::json!({"instruction": text, "input": ""})).collect();
    fs::write(folder.path().join("prompts.json"), serde_json::to_string(&prompts).unwrap())
        .unwrap();
    fs::write(folder.path().join("prompt.txt"), SHORT_PROMPT).unwrap();
    folder
}

/// Generation in such a folder: up to 24 tokens for each prompt.
pub(crate) fn generate_args(folder: &Path) -> GenerateArgs {
    GenerateArgs {
        checkpoint: Some(stories260k()),
        input_file: Some(folder.join("prompts.json")),
        output_file: Some(folder.join("aligned.jsonl")),
        meta_prompt_file: Some(folder.join("prompt.txt")),
        max_gen_len: Some(24),
        device: Some("cpu".to_owned()),
        ..GenerateArgs::default()
    }
}

/// Generates in this process, on one thread.
pub(crate) fn generate_with(args: GenerateArgs, stop: &StopFlag) -> Result<GenerateReport> {
    tch::set_num_threads(1);
    generate(&GenerateConfig::try_from(args).unwrap(), &SingleProcess, 0, stop, false)
}

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
