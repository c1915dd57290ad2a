use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::process::{Command, Stdio};

use dromedary_prompt_cleaning::{AggregateArgs, MergeArgs, SubsampleArgs};
use serde::Serialize;
use serde_json::json;

use crate::support::{
    Folder, checkout, dummy_data, instruction_set, instructions, small_tokenizer, stderr, step1,
};

fn path(path: &std::path::Path) -> &str {
    path.to_str().unwrap()
}

/// The command lines of the original, with only program names and paths changed.
#[test]
fn the_originals_command_lines_work() {
    let folder = Folder::new();
    let [x, a, b, c] = [
        dummy_data("openorca.parquet"),
        dummy_data("sharegpt.json"),
        folder.write(
            "b.json",
            json!([{"conversations": [{"from": "human", "value": "b?"}, {}]}]).to_string(),
        ),
        folder.lines("c.jsonl", &[json!({"text": "<human>: c? <bot>: c."})]),
    ];
    let [openorca, sharegpt, merged] =
        ["openorca_prompts.json", "sharegpt_prompts.json", "merged_prompts.json"]
            .map(|name| folder.path(name));
    let data_files = format!("--data_files={},{},{}", path(&a), path(&b), path(&c));
    for args in [
        vec!["subsample-openorca", "--train_data_path", path(&x), "--output_path", path(&openorca)],
        vec!["aggregate-sharegpt", &data_files, "--output_path", path(&sharegpt)],
        vec![
            "clean-and-merge",
            "--sharegpt_prompt_path",
            path(&sharegpt),
            "--openorca_prompt_path",
            path(&openorca),
            "--output_file",
            path(&merged),
        ],
    ] {
        let output = step1(&args);
        assert!(output.status.success(), "{args:?}: {}", stderr(&output));
        assert!(output.stdout.is_empty());
    }
    let merged = instructions(&merged);
    assert!(merged.contains(&"b?".to_owned()) && merged.contains(&"c?".to_owned()));
    assert!(merged.len() > 60, "{}", merged.len());
}

#[test]
fn two_runs_give_identical_bytes_and_another_seed_another_order() {
    let folder = Folder::new();
    let run = |seed: &str, name: &str| {
        let output = folder.path(name);
        let tokenizer = small_tokenizer();
        let (dolly, oasst) = (dummy_data("dolly.jsonl"), dummy_data("oasst1.jsonl"));
        let result = step1(&[
            "clean-and-merge",
            "--dolly",
            path(&dolly),
            "--oasst",
            path(&oasst),
            "--seed",
            seed,
            "--tokenizer",
            path(&tokenizer),
            "--output-file",
            path(&output),
        ]);
        assert!(result.status.success(), "{}", stderr(&result));
        output
    };
    let (one, same, other) = (run("1", "1.json"), run("1", "2.json"), run("2", "3.json"));
    assert_eq!(fs::read(&one).unwrap(), fs::read(&same).unwrap());
    assert_ne!(instructions(&one), instructions(&other));
    assert_eq!(instruction_set(&one), instruction_set(&other));
}

#[test]
fn hub_names_are_refused_with_the_file_to_download() {
    for (args, file) in [
        (
            [
                "aggregate-sharegpt",
                "--data_files",
                "zetavg/ShareGPT-Processed",
                "--output_file",
                "x.json",
            ],
            ".parquet",
        ),
        (
            [
                "subsample-openorca",
                "--train_data_path",
                "Open-Orca/OpenOrca",
                "--output_path",
                "x.json",
            ],
            "1M-GPT4-Augmented.parquet",
        ),
        (
            [
                "clean-and-merge",
                "--dolly",
                "databricks/databricks-dolly-15k",
                "--output_file",
                "x.json",
            ],
            "databricks-dolly-15k.jsonl",
        ),
    ] {
        let output = step1(&args);
        assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
        let message = stderr(&output);
        assert!(message.contains(args[2]) && message.contains(file), "{message}");
        assert!(message.contains("nothing is downloaded here"), "{message}");
    }
}

#[test]
fn exit_codes_and_messages() {
    let folder = Folder::new();
    let out = folder.path("out.json");
    let missing = folder.path("missing.parquet");
    let subsample = |more: &[&str]| {
        step1(&[&["subsample-openorca", "--output-path", path(&out)], more].concat())
    };
    let no_input = subsample(&[]);
    assert_eq!(no_input.status.code(), Some(2));
    assert!(stderr(&no_input).contains("--train-data-path is required"), "{}", stderr(&no_input));
    let no_file = subsample(&["--train-data-path", path(&missing)]);
    assert_eq!(no_file.status.code(), Some(1));
    assert!(stderr(&no_file).contains("missing.parquet"), "{}", stderr(&no_file));
    let parquet = dummy_data("openorca.parquet");
    let compat = subsample(&["--train-data-path", path(&parquet), "--compat", "dromedary"]);
    assert_eq!(compat.status.code(), Some(2));
    assert!(stderr(&compat).contains("--tokenizer"), "{}", stderr(&compat));
    let share = subsample(&["--train-data-path", path(&parquet), "--max-bad-rows", "5"]);
    assert_eq!(share.status.code(), Some(2));
    let no_tokenizer =
        subsample(&["--train-data-path", path(&parquet), "--tokenizer", path(&missing)]);
    assert_eq!(no_tokenizer.status.code(), Some(1));
    assert!(stderr(&no_tokenizer).contains("missing.parquet"), "{}", stderr(&no_tokenizer));
    let bad_row = folder.lines("bad.jsonl", &[json!({"id": "alien.1", "question": "q"})]);
    let unknown = subsample(&["--train-data-path", path(&bad_row)]);
    assert_eq!(unknown.status.code(), Some(1));
    let message = stderr(&unknown);
    assert!(message.contains("bad.jsonl: row 1 is of an unknown stratum"), "{message}");
    let itself = step1(&[
        "subsample-openorca",
        "--train-data-path",
        path(&bad_row),
        "--output-path",
        path(&bad_row),
    ]);
    assert_eq!(itself.status.code(), Some(2));
    assert!(!out.exists());
    assert_eq!(folder.names(), ["bad.jsonl"]);
}

#[test]
fn an_output_that_cannot_be_written_is_a_clean_error() {
    let folder = Folder::new();
    let file = folder.write("file", "");
    let output = file.join("out.json");
    let parquet = dummy_data("openorca.parquet");
    let result = step1(&[
        "subsample-openorca",
        "--train-data-path",
        path(&parquet),
        "--output-path",
        path(&output),
    ]);
    assert_eq!(result.status.code(), Some(1), "{}", stderr(&result));
    assert!(stderr(&result).contains("out.json"), "{}", stderr(&result));
}

#[test]
fn a_full_disk_leaves_the_older_output() {
    let folder = Folder::new();
    let output = folder.write("out.json", "older");
    let dolly = dummy_data("dolly.jsonl");
    // A limit of two kilobytes a file stands for the disk.
    let result = Command::new("sh")
        .args([
            "-c",
            "ulimit -f 4; exec \"$0\" \"$@\"",
            env!("CARGO_BIN_EXE_step1-prompt-cleaning"),
        ])
        .args(["clean-and-merge", "--dolly", path(&dolly), "--output-file", path(&output)])
        .output()
        .unwrap();
    assert_eq!(result.status.code(), Some(1), "{}", stderr(&result));
    assert!(stderr(&result).contains("out.json"), "{}", stderr(&result));
    assert_eq!(fs::read_to_string(&output).unwrap(), "older");
    assert_eq!(folder.names(), ["out.json"]);
}

/// A pipe as input makes sure that the signal comes while rows are read.
#[test]
fn a_signal_ends_the_work_without_an_output() {
    let folder = Folder::new();
    let pipe = folder.path("rows.jsonl");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let output = folder.path("out.json");
    let mut child = Command::new(env!("CARGO_BIN_EXE_step1-prompt-cleaning"))
        .args(["subsample-openorca", "--train-data-path", path(&pipe)])
        .args(["--output-path", path(&output)])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut rows = fs::File::options().write(true).open(&pipe).unwrap();
    let batch =
        |n: usize| format!("{{\"id\": \"flan.1\", \"question\": \"question {n}\"}}\n").repeat(5000);
    // More than a pipe holds, so the child is reading when this returns.
    rows.write_all(batch(0).as_bytes()).unwrap();
    let pid = child.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    let written = (1..2000).take_while(|&n| rows.write_all(batch(n).as_bytes()).is_ok()).count();
    drop(rows);
    let mut message = String::new();
    child.stderr.take().unwrap().read_to_string(&mut message).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(75), "after {written} batches: {message}");
    assert!(message.contains("the prompts are not written: stopped"), "{message}");
    assert_eq!(folder.names(), ["rows.jsonl"]);
}

#[test]
fn the_committed_settings_load_and_flags_win() {
    for (config, rules) in [
        ("step1_demo.toml", None),
        ("step1_llama2_7b.toml", None),
        ("step1_llama2_70b.toml", Some("dromedary")),
    ] {
        let config = checkout().join("configs").join(config);
        for args in [
            vec!["subsample-openorca", "--train-data-path", "x.parquet", "--output-path", "y.json"],
            vec!["aggregate-sharegpt", "--data-files", "a.json,b.json", "--output-file", "y.json"],
            vec!["clean-and-merge", "--dolly", "d.jsonl", "--output-file", "y.json"],
        ] {
            let mut args = [args, vec!["--config", path(&config), "--print-config"]].concat();
            if args[0] != "aggregate-sharegpt" {
                args.extend(["--tokenizer", "t.json", "--max-prompt-len", "99"]);
            }
            let output = step1(&args);
            assert!(output.status.success(), "{}", stderr(&output));
            let printed: toml::Table = String::from_utf8(output.stdout).unwrap().parse().unwrap();
            let settings = printed[args[0]].as_table().unwrap();
            assert_eq!(settings.get("compat").and_then(|compat| compat.as_str()), rules);
            if args[0] != "aggregate-sharegpt" {
                assert_eq!(settings["max_prompt_len"].as_integer(), Some(99));
                assert_eq!(settings["seed"].as_integer(), Some(42));
            }
        }
    }
}

/// The settings file, with what it has in comments.
fn all_settings() -> String {
    let text = fs::read_to_string(checkout().join("configs/step1_llama2_7b.toml")).unwrap();
    text.lines()
        .map(|line| line.strip_prefix("# ").filter(|rest| rest.contains(" = ")).unwrap_or(line))
        .map(|line| format!("{line}\n"))
        .collect()
}

#[test]
fn the_settings_file_has_every_setting_but_paths_of_rows() {
    fn names(args: impl Serialize, paths: &[&str]) -> BTreeSet<String> {
        let args = serde_json::to_value(args).unwrap();
        let names = args.as_object().unwrap().keys().cloned();
        names.filter(|name| name != "explain" && !paths.contains(&name.as_str())).collect()
    }
    let merged = ["sharegpt_prompt_path", "openorca_prompt_path", "dolly", "oasst", "output_file"];
    let settings: toml::Table = all_settings().parse().unwrap();
    for (command, names) in [
        (
            "subsample-openorca",
            names(SubsampleArgs::default(), &["train_data_path", "output_path"]),
        ),
        ("aggregate-sharegpt", names(AggregateArgs::default(), &["data_files", "output_file"])),
        ("clean-and-merge", names(MergeArgs::default(), &merged)),
    ] {
        let given: BTreeSet<String> =
            settings[command].as_table().unwrap().keys().cloned().collect();
        assert_eq!(given, names, "{command}");
    }
}

#[test]
fn what_the_settings_offer_in_comments_is_valid() {
    let folder = Folder::new();
    let on = all_settings();
    assert!(on.contains("\nnear_duplicates = 0.8\n"), "{on}");
    let config = folder.write("on.toml", &on);
    let mut args = vec!["clean-and-merge", "--output-file", "y.json", "--print-config"];
    args.extend(["--dolly", "d", "--oasst", "o", "--sharegpt-prompt-path", "s"]);
    args.extend(["--openorca-prompt-path", "p", "--config", path(&config)]);
    let lists = checkout().join("configs/step1_lists.toml");
    let tokenizer = small_tokenizer();
    args.extend(["--lists", path(&lists), "--tokenizer", path(&tokenizer)]);
    let output = step1(&args);
    assert!(output.status.success(), "{}", stderr(&output));
    // And what is printed of them can be read again.
    let printed = folder.write("printed.toml", &output.stdout);
    let again = step1(&["clean-and-merge", "--config", path(&printed), "--print-config"]);
    assert_eq!(again.stdout, output.stdout, "{}", stderr(&again));
}

#[test]
fn what_is_printed_can_be_read_again_and_unknown_keys_are_refused() {
    let folder = Folder::new();
    let args = ["clean-and-merge", "--dolly", "d.jsonl", "--output-file", "y.json", "--seed", "7"];
    let printed = step1(&[&args[..], &["--print-config"]].concat()).stdout;
    let config = folder.write("run.toml", &printed);
    let again = step1(&["clean-and-merge", "--config", path(&config), "--print-config"]);
    assert_eq!(again.stdout, printed, "{}", stderr(&again));
    let config = folder.write("run.toml", "[clean-and-merge]\nsede = 7\n");
    let output = step1(&["clean-and-merge", "--config", path(&config)]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("sede"), "{}", stderr(&output));
}

#[test]
fn help_names_every_flag_of_the_original() {
    for (subcommand, flags) in [
        (
            "subsample-openorca",
            &[
                "--train-data-path",
                "--output-path",
                "--max-samples-per-dataset",
                "--max-prompt-len",
            ][..],
        ),
        ("aggregate-sharegpt", &["--data-files", "--output-file"]),
        ("clean-and-merge", &["--sharegpt-prompt-path", "--openorca-prompt-path", "--output-file"]),
    ] {
        let output = step1(&[subcommand, "--help"]);
        let text = String::from_utf8(output.stdout).unwrap();
        for flag in flags {
            assert!(text.contains(flag), "{subcommand}: {flag}");
        }
    }
    // The original's name of the tokenizer's flag is an alias.
    let args = ["subsample-openorca", "--train-data-path", "x.json", "--output-path", "y.json"];
    let output = step1(&[&args[..], &["--tokenizer_name", "t.json", "--print-config"]].concat());
    assert!(String::from_utf8(output.stdout).unwrap().contains("tokenizer = \"t.json\""));
}
