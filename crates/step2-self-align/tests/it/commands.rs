use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use dromedary_files::{Lock, LockOptions};
use dromedary_self_align::MetaPrompt;

use crate::support::{SHORT_PROMPT, lines, root, row, run, run_to, stories260k, write_rows};

/// A folder with the files that the original's commands name.
fn folder_of(prompts: usize) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let prompts: Vec<_> = (0..prompts)
        .map(|index| serde_json::json!({"instruction": format!("Story {index}"), "input": ""}))
        .collect();
    let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
    write("merged_prompts.json", &serde_json::to_string(&prompts).unwrap());
    write("prompt.txt", SHORT_PROMPT);
    write(
        "vicuna_dummy_data.json",
        r#"[{"conversations": [{"from": "human", "value": "Who are you?"},
            {"from": "gpt", "value": "I am Vicuna."}]}]"#,
    );
    folder
}

fn generate(flags: &str) -> String {
    let model = stories260k().display().to_string();
    format!(
        "generate --ckpt_dir {model} --tokenizer_path {model} --input_file merged_prompts.json \
         --output_file aligned.jsonl --meta_prompt_file prompt.txt --threads 1 {flags}"
    )
}

#[test]
fn the_originals_commands_run_as_they_are_typed() {
    let folder = folder_of(3);
    let folder = folder.path();
    let model = stories260k().display().to_string();
    run_to(
        0,
        folder,
        &format!(
            "generate --ckpt_dir {model} --tokenizer_path {model} --generate_max_len 512 \
             --max_seq_len 768 --max_shared_seq_len 2816 --max_batch_size 64 --group_rank 0 \
             --group_size 1 --input_file merged_prompts.json --output_file self_align.json \
             --meta_prompt_file prompt.txt --temperature 0.7 --top_p 0.95"
        ),
    );
    assert_eq!(lines(&folder.join("self_align_1shards_0.jsonl")).len(), 3);

    let merge = "merge_and_fileter_self_align_with_dummy --data_file_pattern \
                 self_align_*shards_*.jsonl --dummy_data_file vicuna_dummy_data.json --output_file \
                 merged.json";
    // A model of stories knows no form: the files are found, and no row is left.
    let message = run_to(1, folder, merge);
    assert!(message.contains("kept 0 of 3 rows"), "{message}");
    let path = folder.join("self_align_1shards_0.jsonl");
    write_rows(&path, &[row("Why?", "Because."), row("How?", "So.")]);
    let message = run_to(1, folder, merge);
    assert!(message.contains("has changed since"), "{message}");
    let names = ["merge_and_filter_self_align_with_dummy", "merge-and-filter"];
    for name in names.into_iter().chain([merge.split(' ').next().unwrap()]) {
        let command = merge.replacen("merge_and_fileter_self_align_with_dummy", name, 1);
        run_to(0, folder, &format!("{command} --allow-unfinished True"));
        let text = fs::read_to_string(folder.join("merged.json")).unwrap();
        let rows: Vec<serde_json::Value> = serde_json::from_str(&text).unwrap();
        assert_eq!(rows.len(), 3);
        assert!(rows.iter().all(|row| row["example_id"].is_u64()), "{text}");
        assert!(text.contains("I am Dromedary."), "{text}");
    }
}

#[test]
fn render_prints_the_prompt_and_nothing_else() {
    let output = run(&root(), "render --meta-prompt-file prompts/self_align_principles.toml");
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(text, MetaPrompt::open(None).unwrap().text + "\n");
    let built_in = run(&root(), "render");
    assert_eq!(String::from_utf8(built_in.stdout).unwrap(), text);
}

#[test]
fn a_signal_stops_with_75_and_the_same_command_goes_on() {
    let folder = folder_of(200);
    let folder = folder.path();
    let command = generate("--max_batch_size 4 --max_seq_len 400 --max_gen_len 300");
    let mut child = Command::new(env!("CARGO_BIN_EXE_step2-self-align"))
        .args(command.split_whitespace())
        .current_dir(folder)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let output = folder.join("aligned.jsonl");
    let started = Instant::now();
    while !fs::read_to_string(&output).is_ok_and(|text| text.contains('\n')) {
        assert!(started.elapsed() < Duration::from_secs(120), "no row was written");
        std::thread::sleep(Duration::from_millis(5));
    }
    let killed = Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
    assert!(killed.success());
    assert_eq!(child.wait().unwrap().code(), Some(75));
    let before = lines(&output).len();
    assert!((1..200).contains(&before), "{before}");
    assert!(!folder.join("aligned.jsonl.lock").exists());
    assert!(!folder.join("aligned.jsonl.done").exists());
    let message = run_to(0, folder, &generate("--max_seq_len 400 --max_gen_len 300 --limit 20"));
    assert!(message.contains(" done before, of 20 prompts"), "{message}");
    let mut ids: Vec<String> =
        lines(&output).iter().map(|row| row["id"].as_str().unwrap().to_owned()).collect();
    let count = ids.len();
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), count);
}

#[test]
fn a_full_disk_is_an_error_that_names_the_file_and_the_next_run_goes_on() {
    let folder = folder_of(40);
    let folder = folder.path();
    let command = generate("--max_gen_len 40");
    let limited = Command::new("sh")
        .arg("-c")
        .arg(format!("ulimit -f 8; exec {} {command}", env!("CARGO_BIN_EXE_step2-self-align")))
        .current_dir(folder)
        .output()
        .unwrap();
    let message = String::from_utf8_lossy(&limited.stderr).into_owned();
    assert_eq!(limited.status.code(), Some(1), "{message}");
    assert!(message.contains(".jsonl"), "{message}");
    assert!(!folder.join("aligned.jsonl.done").exists());
    let before = lines(&folder.join("aligned.jsonl")).len();
    assert!(before < 40);
    run_to(0, folder, &command);
    assert_eq!(lines(&folder.join("aligned.jsonl")).len(), 40);
}

#[test]
fn a_second_process_on_one_output_sees_who_holds_it() {
    let folder = folder_of(1);
    let folder = folder.path();
    let lock = Lock::acquire(folder.join("aligned.jsonl"), &LockOptions::default()).unwrap();
    let message = run_to(1, folder, &generate("--max_gen_len 4"));
    assert!(message.contains(&format!("pid {}", std::process::id())), "{message}");
    drop(lock);
    run_to(0, folder, &generate("--max_gen_len 4"));
}

#[test]
fn usage_errors_name_the_flag_and_end_with_2() {
    let folder = folder_of(1);
    for (command, expected) in [
        ("generate".to_owned(), "--checkpoint is required"),
        (generate("--group_rank 2 --group_size 2"), "--group-rank 2 is not below --group-size 2"),
        (generate("--max_gen_len 768"), "--max-gen-len 768 leaves no room"),
        (generate("--top_p 0"), "--top-p 0"),
        (generate("--temperature=-1"), "--temperature -1 must be at least 0"),
        (generate("--max_batch_size 0"), "--max-batch-size is 0"),
        (generate("--no_such_flag 1"), "--no-such-flag"),
        ("merge-and-filter --output_file x.json".to_owned(), "--data-file-pattern is required"),
        ("merge-and-filter --max-identity-rows many".to_owned(), "survivors"),
    ] {
        let message = run_to(2, folder.path(), &command);
        assert!(message.contains(expected), "{command}\n{message}");
    }
}

#[test]
fn missing_files_are_named() {
    let folder = folder_of(1);
    let folder = folder.path();
    for (from, to) in [
        ("merged_prompts.json", "absent_prompts.json"),
        ("prompt.txt", "absent.toml"),
        (&*stories260k().display().to_string(), "absent_model"),
    ] {
        let message = run_to(1, folder, &generate("").replace(from, to));
        assert!(message.contains(to), "{message}");
    }
}

#[test]
fn a_folder_that_cannot_be_written_is_named_before_anything_is_computed() {
    let folder = folder_of(1);
    let command = generate("").replace("aligned.jsonl", "/proc/self/aligned.jsonl");
    let message = run_to(1, folder.path(), &command);
    assert!(message.contains("cannot write") && message.contains("aligned.jsonl"), "{message}");
    assert!(!message.contains("prompts to answer"), "{message}");
}

fn configs() -> Vec<String> {
    let entries = fs::read_dir(root().join("configs")).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with("step2_")).collect()
}

#[test]
fn every_settings_file_loads_and_what_is_printed_loads_again() {
    let folder = tempfile::tempdir().unwrap();
    let names = configs();
    assert!(names.len() >= 3, "{names:?}");
    for name in names {
        for flags in [
            "generate --checkpoint m --input-file i --output-file o",
            "merge-and-filter --data-file-pattern p --output-file o",
        ] {
            let output = run(&root(), &format!("{flags} --config configs/{name} --print-config"));
            let message = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(output.status.success(), "{name}: {message}");
            let path = folder.path().join("printed.toml");
            fs::write(&path, &output.stdout).unwrap();
            let subcommand = flags.split(' ').next().unwrap();
            let again =
                run(&root(), &format!("{subcommand} --print-config --config {}", path.display()));
            assert_eq!(
                String::from_utf8_lossy(&again.stdout),
                String::from_utf8_lossy(&output.stdout),
                "{}",
                String::from_utf8_lossy(&again.stderr)
            );
        }
        check_paths(&name);
    }
}

/// Files of the checkout that a settings file names are there.
fn check_paths(name: &str) {
    let text = fs::read_to_string(root().join("configs").join(name)).unwrap();
    for word in text
        .split('"')
        .filter(|word| word.starts_with("prompts/") || word.starts_with("dummy_data/"))
    {
        assert!(root().join(Path::new(word)).exists(), "{name}: {word}");
    }
}

#[test]
fn flags_win_over_the_settings_file() {
    let command = "generate --checkpoint m --input-file i --output-file o --config \
                   configs/step2_demo.toml --temperature 0.25 --print-config";
    let text = String::from_utf8(run(&root(), command).stdout).unwrap();
    assert!(text.contains("temperature = 0.25") && text.contains("max_gen_len = 256"), "{text}");
}
