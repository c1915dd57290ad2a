//! Flags of `generate` that go through to the engine.

use std::fs;
use std::path::Path;

use dromedary_command::StopFlag;
use dromedary_llama::cli::SamplingArgs;
use dromedary_self_align::{Error, GenerateArgs, GenerateReport, Result};

use crate::support::{folder_of, generate_args, generate_with, lines, run_to};

fn folder() -> tempfile::TempDir {
    folder_of(&[
        "Once upon a time",
        "Tim",
        "Lily saw a cat in the park",
        "The sun",
        "A",
        "Mom said",
    ])
}

fn args(folder: &Path) -> GenerateArgs {
    GenerateArgs { max_seq_len: Some(100), max_batch_size: Some(3), ..generate_args(folder) }
}

fn run(args: GenerateArgs) -> Result<GenerateReport> {
    generate_with(args, &StopFlag::default())
}

fn sorted_lines(paths: &[std::path::PathBuf]) -> Vec<String> {
    let text: String = paths.iter().map(|path| fs::read_to_string(path).unwrap()).collect();
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    lines.sort();
    lines
}

#[test]
fn deterministic_rows_are_the_same_bytes_after_a_kill_and_in_any_groups() {
    let folder = folder();
    let folder = folder.path();
    let args = || GenerateArgs { deterministic: Some(true), ..args(folder) };
    run(args()).unwrap();
    let path = folder.join("aligned.jsonl");
    let whole = sorted_lines(std::slice::from_ref(&path));
    assert_eq!(whole.len(), 6);
    let bytes = fs::read(&path).unwrap();
    for cut in [0, bytes.len() / 3, bytes.len() / 2, bytes.len() - 1] {
        fs::write(&path, &bytes[..cut]).unwrap();
        run(args()).unwrap();
        assert_eq!(sorted_lines(std::slice::from_ref(&path)), whole, "cut at {cut}");
    }
    for groups in [2, 4] {
        let files = (0..groups).map(|rank| {
            let group = GenerateArgs {
                group_rank: Some(rank),
                group_size: Some(groups),
                // Beside rows of the same name nothing would be left to do.
                output_file: Some(folder.join(format!("by{groups}.jsonl"))),
                ..args()
            };
            run(group).unwrap().output_file
        });
        assert_eq!(sorted_lines(&files.collect::<Vec<_>>()), whole, "{groups} groups");
    }
    // What the last bit depends on must stay.
    let error = run(GenerateArgs { max_batch_size: Some(2), ..args() }).unwrap_err().to_string();
    assert!(error.contains("deterministic") && error.contains("\"max_batch_size\":3"), "{error}");
}

#[test]
fn a_forced_prefix_opens_every_answer_and_is_counted() {
    let folder = folder();
    let folder = folder.path();
    let text = " I am a helpful, ethical, and reliable assistant.";
    let report = run(GenerateArgs { force_prefix: Some(text.into()), ..args(folder) }).unwrap();
    assert_eq!((report.answered, report.forced), (6, 6));
    let rows = lines(&folder.join("aligned.jsonl"));
    for row in &rows {
        let output = row["output"].as_str().unwrap();
        assert!(output.starts_with(text) && output.len() > text.len(), "{output}");
        // Tokens of the forced text belong to the prompt.
        assert!(row["output_tokens"].as_u64().unwrap() <= 24);
    }
    assert_eq!(lines(&folder.join("metrics.jsonl")).last().unwrap()["forced"], 6);
    let error = run(args(folder)).unwrap_err();
    assert!(
        matches!(&error, Error::OtherSettings { difference, .. }
        if difference.contains("force_prefix")),
        "{error}"
    );
}

#[test]
fn the_forced_prefix_has_a_default_text() {
    let folder = folder();
    let command = "generate --checkpoint x --input-file y --output-file z --print-config";
    let shown = |more: &str| {
        let output = crate::support::run(folder.path(), &format!("{command} {more}"));
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(!shown("").contains("force_prefix"));
    assert!(
        shown("--force_prefix")
            .contains("force_prefix = \" I am a helpful, ethical, and reliable assistant.\"")
    );
    assert!(shown("--force-prefix=Well").contains("force_prefix = \"Well\""));
    let all = shown("--unitoken_frequency_penalty 0.5 --top_k 40 --logit_bias 2=-100");
    for line in ["unitoken_frequency_penalty = 0.5", "top_k = 40", "logit_bias = [\"2=-100\"]"] {
        assert!(all.contains(line), "{line} in {all}");
    }
    let error = run_to(2, folder.path(), &format!("{command} --logit-bias 2"));
    assert!(error.contains("ID=BIAS"), "{error}");
}

#[test]
fn a_kept_prefix_gives_the_same_rows() {
    let folder = folder();
    let folder = folder.path();
    let args = || GenerateArgs { prefix_cache: Some(folder.join("prefixes")), ..args(folder) };
    run(args()).unwrap();
    let path = folder.join("aligned.jsonl");
    let rows = sorted_lines(std::slice::from_ref(&path));
    let entries = || fs::read_dir(folder.join("prefixes")).unwrap().count();
    assert_eq!(entries(), 1);
    fs::remove_file(&path).unwrap();
    run(args()).unwrap();
    assert_eq!((sorted_lines(&[path]), entries()), (rows, 1));
}

#[test]
fn sampling_flags_reach_the_engine() {
    let folder = folder();
    let folder = folder.path();
    // A bias that no other token can outweigh: every row is this token to its end.
    let sampling = SamplingArgs { logit_bias: vec!["426=1000".into()], ..SamplingArgs::default() };
    run(GenerateArgs { sampling, ..args(folder) }).unwrap();
    let rows = lines(&folder.join("aligned.jsonl"));
    let outputs: std::collections::BTreeSet<&str> =
        rows.iter().map(|row| row["output"].as_str().unwrap()).collect();
    assert_eq!((rows.len(), outputs.len()), (6, 1));
    // An id that the vocabulary does not have is an error before any row.
    let sampling = SamplingArgs { logit_bias: vec!["512=1".into()], ..SamplingArgs::default() };
    let output_file = Some(folder.join("other.jsonl"));
    let error = run(GenerateArgs { sampling, output_file, ..args(folder) }).unwrap_err();
    assert!(error.to_string().contains("512"), "{error}");
}

#[test]
fn rows_wait_for_keys_and_values() {
    let folder = folder();
    let folder = folder.path();
    let few = GenerateArgs {
        max_kv_tokens: Some(64),
        output_file: Some(folder.join("few.jsonl")),
        ..args(folder)
    };
    let report = run(few).unwrap();
    assert_eq!((report.answered, report.rejected), (6, 0));
    // One row at a time: each token but the rows' first ones is a step of its own.
    let statistics = report.statistics.unwrap();
    assert_eq!(statistics.decode_steps, statistics.decode_tokens);
    let report = run(args(folder)).unwrap();
    let statistics = report.statistics.unwrap();
    assert!(statistics.decode_steps < statistics.decode_tokens / 2);
    let rows = |name: &str| sorted_lines(&[folder.join(name)]);
    assert_eq!(rows("few.jsonl"), rows("aligned.jsonl"));
}
