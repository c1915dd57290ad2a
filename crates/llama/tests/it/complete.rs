//! `llama complete`, as a user runs it.

use std::{
    fs,
    io::Read,
    path::Path,
    process::{Command, Output, Stdio},
};

use dromedary_llama::{Adapter, Checkpoint, LoraConfig, LoraPair};

use crate::{
    support::{data, mpirun, stories},
    tiny::noise,
};

const BEGINNING: &str = "Once upon a time";
const GREEDY: &str = ", there was a little girl named Lily. She loved to play outside in the park.";

fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_llama"));
    command.arg("complete").arg("--checkpoint").arg(stories()).args(["--threads", "1"]);
    command
}

fn run(args: &[&str]) -> Output {
    program().args(args).output().unwrap()
}

fn stdout(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output, code: i32) -> String {
    assert_eq!(output.status.code(), Some(code), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.stdout.is_empty());
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[test]
fn the_completion_alone_goes_to_stdout() {
    let text = stdout(&run(&["--prompt", BEGINNING, "--temperature", "0", "--max-gen-len", "60"]));
    assert!(text.starts_with(GREEDY), "{text}");
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("prompt.txt");
    fs::write(&file, BEGINNING).unwrap();
    // As the original types its flags.
    let again = run(&[
        "--tokenizer_path",
        stories().join("tokenizer.json").to_str().unwrap(),
        "--prompt_file",
        file.to_str().unwrap(),
        "--generate_max_len=60",
        "--temperature=0",
        "--dtype",
        "f32",
        "--device",
        "cpu",
    ]);
    assert_eq!(stdout(&again), text);
}

#[test]
fn stop_texts_end_it_and_are_kept() {
    let stop = ["--stop", "Lily. S", "--stop", "outside"];
    let args = [&["--prompt", BEGINNING, "--temperature", "0"][..], &stop].concat();
    assert_eq!(stdout(&run(&args)), ", there was a little girl named Lily. S");
}

#[test]
fn a_seed_decides_what_is_drawn() {
    let draw = |seed: &str| {
        let args =
            ["--prompt", BEGINNING, "--temperature", "1", "--top-p", "1", "--max-gen-len", "30"];
        stdout(&run(&[&args[..], &["--seed", seed]].concat()))
    };
    assert_eq!(draw("5"), draw("5"));
    assert_ne!(draw("5"), draw("6"));
}

#[test]
fn ranks_under_mpirun_print_what_one_process_does() {
    let args = ["--prompt", BEGINNING, "--temperature", "0", "--max-gen-len", "40"];
    let want = stdout(&run(&args));
    for ranks in [2, 3] {
        let program = program();
        let output = mpirun(ranks, program.get_program())
            .args(program.get_args())
            .args(args)
            .output()
            .unwrap();
        assert_eq!(stdout(&output), want);
    }
}

/// Fault 13.
#[test]
fn ranks_that_do_not_fit_are_refused_with_both_numbers() {
    for (ranks, tp, numbers) in [
        (9, None, ["tp = 9 ", "8 query heads"]),
        (3, Some("2"), ["--tp 2", "3 processes"]),
        (2, Some("0"), ["--tp 0", "2 processes"]),
    ] {
        let program = program();
        let output = mpirun(ranks, program.get_program())
            .args(program.get_args())
            .args(["--prompt", BEGINNING])
            .args(tp.map(|tp| ["--tp", tp]).into_iter().flatten())
            .output()
            .unwrap();
        assert_ne!(output.status.code(), Some(0));
        assert!(output.stdout.is_empty());
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(numbers.iter().all(|number| text.contains(number)), "{text}");
    }
}

#[test]
fn a_reader_that_leaves_is_no_failure() {
    let mut child = program()
        .args(["--prompt", BEGINNING, "--temperature", "0", "--max-gen-len", "400"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut first = [0; 8];
    child.stdout.take().unwrap().read_exact(&mut first).unwrap();
    assert_eq!(&first, &GREEDY.as_bytes()[..8]);
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn a_signal_ends_it_with_75() {
    // So small a model may have written all it has before the signal comes; then once more.
    let stopped = (0..20).map(|_| signalled()).find(|output| output.status.code() != Some(0));
    let output = stopped.expect("a signal that comes in time");
    assert_eq!(output.status.code(), Some(75));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("stopped after"), "{text}");
}

/// A completion that gets a signal when its first words are there.
fn signalled() -> Output {
    let mut child = program()
        .args(["--prompt", BEGINNING, "--temperature", "0", "--max-gen-len", "500"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut first = [0; 2];
    child.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
    let kill = Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
    assert!(kill.success());
    child.wait_with_output().unwrap()
}

#[test]
fn settings_come_from_a_file_and_are_shown() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("settings.toml");
    fs::write(&file, "[complete]\nprompt = \"Once\"\nmax_gen_len = 7\ntop_p = 0.5\n").unwrap();
    let config = ["--config", file.to_str().unwrap(), "--print-config"];
    let text = stdout(&run(&[&config[..], &["--top-p", "0.25"]].concat()));
    for line in ["[complete]", "prompt = \"Once\"", "max_gen_len = 7", "top_p = 0.25"] {
        assert!(text.contains(line), "{line} is not in:\n{text}");
    }
    fs::write(&file, "[complete]\nmax_new = 7\n").unwrap();
    let text = stderr(&run(&config), 2);
    assert!(text.contains("max_new") && text.contains("settings.toml"), "{text}");
}

#[test]
fn what_cannot_run_is_named() {
    let text = stderr(&run(&[]), 2);
    assert!(text.contains("prompt"), "{text}");
    let text = stderr(&run(&["--prompt", "a", "--prompt-file", "b"]), 2);
    assert!(text.contains("--prompt-file"), "{text}");
    let text = stderr(&run(&["--prompt-file", "missing.txt"]), 2);
    assert!(text.contains("missing.txt"), "{text}");
    let text = stderr(&run(&["--prompt", "a", "--temperature=-1"]), 2);
    assert!(text.contains("--temperature -1"), "{text}");
    let text = stderr(&run(&["--prompt", "a", "--logit-bias", "512=1"]), 1);
    assert!(text.contains("512"), "{text}");
    let text = stderr(&run(&["--prompt", "a", "--device", "cuda:77"]), 1);
    assert!(text.contains("cuda:77"), "{text}");
    let text = stderr(&run(&["--prompt", "a", "--tp", "2"]), 1);
    assert!(text.contains("--tp 2") && text.contains("1 process"), "{text}");
    let text = stderr(&run(&["--prompt", &"word ".repeat(800)]), 1);
    assert!(text.contains("context 512"), "{text}");
}

#[test]
fn a_tokenizer_of_another_model_is_an_error() {
    let output = Command::new(env!("CARGO_BIN_EXE_llama"))
        .arg("complete")
        .arg("--checkpoint")
        .arg(data("untied"))
        .arg("--tokenizer")
        .arg(stories())
        .args(["--prompt", "a"])
        .output()
        .unwrap();
    let text = stderr(&output, 1);
    assert!(text.contains("stories260k") && text.contains("512 tokens"), "{text}");
}

#[test]
fn without_words_a_story_begins_at_the_beginning() {
    let text = stdout(&run(&["--prompt", "", "--temperature", "0", "--max-gen-len", "9"]));
    assert!(text.trim_start().starts_with("Once upon"), "{text}");
}

#[test]
fn an_adapter_completes_as_its_merged_base_does() {
    let dir = tempfile::tempdir().unwrap();
    let [adapter, merged] = ["adapter", "merged"].map(|name| dir.path().join(name));
    let config = LoraConfig { r: 4, ..LoraConfig::default() };
    let checkpoint = Checkpoint::open(stories()).unwrap();
    let pair = |(module, [out, inner]): (String, [i64; 2])| {
        let seed = blake3::hash(module.as_bytes()).as_bytes()[0].into();
        let (a, b) = (noise(&[4, inner], seed) * 0.1, noise(&[out, 4], seed + 1) * 0.1);
        (module, LoraPair { lora_a: a, lora_b: b })
    };
    let tensors = config.modules(checkpoint.config()).unwrap().into_iter().map(pair).collect();
    Adapter { config, tensors }.save(&adapter).unwrap();
    let merge = Command::new(env!("CARGO_BIN_EXE_llama"))
        .arg("merge")
        .arg("--checkpoint")
        .arg(stories())
        .arg("--adapter")
        .arg(&adapter)
        .arg("--output")
        .arg(&merged)
        .output()
        .unwrap();
    assert!(stdout(&merge).starts_with("logits differ by "));
    let sampling = ["--prompt", BEGINNING, "--temperature", "0", "--max-gen-len", "40"];
    let complete = |mut command: Command, checkpoint: &Path| {
        command.arg("complete").args(sampling).arg("--checkpoint").arg(checkpoint);
        command
    };
    let llama = env!("CARGO_BIN_EXE_llama");
    let want = stdout(&complete(Command::new(llama), &merged).output().unwrap());
    let plain = stdout(&complete(Command::new(llama), &stories()).output().unwrap());
    assert_ne!(want, plain);
    for flag in ["--adapter", "--lora_weights"] {
        let mut command = complete(Command::new(llama), &stories());
        assert_eq!(stdout(&command.arg(flag).arg(&adapter).output().unwrap()), want);
    }
    let mut split = complete(mpirun(2, llama), &stories());
    assert_eq!(stdout(&split.arg("--adapter").arg(&adapter).output().unwrap()), want);
}
