use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use serde_json::Value;
use tempfile::TempDir;
use xtask::readme::blocks;

use crate::cluster::{Cluster, programs, root};
use crate::work::{folder_in, model};

/// What the README's lines mean by their paths.
const PATHS: [&str; 4] = ["$PWD/target/release", "/models/llama-2-7b", "/data/run1", "/data/raw"];

/// Principles under which the model is made to open an answer, which ends with its first sentence.
const PRINCIPLES: &str = r#"
title = "Vita"
opening = "Vita is good."
examples_opening = "Like this:"
affirmation = "I am good"
stop_strings = ["."]
black_list = ["snake oil"]
exemplars = []
[cues]
user = "User:"
thoughts = "Vita (thinks):"
answer = "Vita:"
clear_context = "User: Thank you"
auto_reply = "Vita (auto):"
auto_reply_text = "Next"
[names]
assistant = "Vita"
product = "Vita"
maker = "the clinic"
[[rules]]
name = "good"
text = "Vita should be good."
"#;

const STEP2: &str = r#"
[generate]
force_prefix = " I am good\n\nVita: Once upon a time, there was"
max_shared_seq_len = 512
max_seq_len = 4096
max_gen_len = 64
max_batch_size = 8
temperature = 1.0
device = "cpu"
threads = 1
[merge-and-filter]
max_identity_rows = 20
"#;

const STEP3: &str = r#"
[train]
meta_prompt_pattern = "prompts/dromedary_*prompt_distill.txt"
source_max_len = 512
target_max_len = 128
max_steps = 2
per_device_train_batch_size = 2
gradient_accumulation_steps = 1
lora_r = 4
device = "cpu"
threads = 1
"#;

/// What a clone has that the lines name, with a model, settings and principles of its own.
fn clone_in(cluster: &Cluster) -> TempDir {
    let folder = folder_in(cluster);
    for name in ["configs", "dummy_data", "prompts", "slurm"] {
        symlink(root().join(name), folder.path().join(name)).unwrap();
    }
    let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
    write("step2.toml", STEP2);
    write("step3.toml", STEP3);
    write("vita.toml", PRINCIPLES);
    // Room for prompts in many tokens.
    let base = folder.path().join("base");
    fs::create_dir(&base).unwrap();
    for file in fs::read_dir(model()).unwrap().flatten() {
        fs::copy(file.path(), base.join(file.file_name())).unwrap();
    }
    let config = fs::read_to_string(base.join("config.json")).unwrap();
    let [short, long] = [512, 16384].map(|n| format!("\"max_position_embeddings\": {n}"));
    assert!(config.contains(&short));
    write("base/config.json", &config.replace(&short, &long));
    folder
}

/// The lines behind those that have brought the programs here: clone, modules, libtorch, build.
fn lines(block: &str) -> &str {
    let at = block.find("export PATH=").expect("the line that names paths");
    let before: Vec<&str> = block[..at].lines().collect();
    let known =
        ["git clone ", "module load ", "export LIBTORCH=", "cargo xtask setup && cargo build"];
    assert_eq!(before.len(), known.len(), "{before:?}");
    for (line, begin) in before.iter().zip(known) {
        assert!(line.starts_with(begin), "{line}");
    }
    &block[at..]
}

fn said_by(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// From raw sources to a model that has learned who it is, in the words of principles of one's own.
#[test]
#[ignore = "needs Slurm: cargo xtask test --slurm"]
fn the_lines_of_the_readme_lead_to_a_model() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let found = blocks(&readme, "sh slurm").unwrap();
    let [submit, look] = &found[..] else { panic!("{found:?}") };
    let cluster = Cluster::start();
    let clone = clone_in(&cluster);
    let path = |name: &str| clone.path().join(name);
    let places = [programs(), path("base"), path("run"), root().join("dummy_data")];
    let mut text = format!("{}\necho one $one two $two\n", lines(&submit.text));
    for (name, place) in PATHS.iter().zip(&places) {
        assert!(text.contains(name), "{name}");
        text = text.replace(name, &place.display().to_string());
    }
    let bash = |text: &str| {
        let mut command = cluster.command("bash");
        command.args(["-euo", "pipefail", "-c", text]).current_dir(clone.path());
        let settings = [
            ("STEP2_CONFIG", "step2.toml"),
            ("STEP3_CONFIG", "step3.toml"),
            ("PROMPT", "vita.toml"),
        ];
        said_by(command.envs(settings).env("OUT", path("run")))
    };
    let said = bash(&text);
    let after = |word: &str| {
        let rest = said.split_once(word).unwrap_or_else(|| panic!("{said}")).1;
        rest.split_whitespace().next().unwrap().to_owned()
    };
    for id in [after("one "), after("two "), after("Submitted batch job ")] {
        let logs = || -> String {
            let files = fs::read_dir(clone.path()).unwrap().flatten().map(|file| file.path());
            let logs = files.filter(|path| path.extension().is_some_and(|end| end == "log"));
            logs.map(|path| fs::read_to_string(path).unwrap()).collect()
        };
        let states = cluster.job(&id).ended();
        assert!(states.iter().all(|state| state["JobState"] == "COMPLETED"), "{}", logs());
    }
    let status = bash(&look.text);
    assert!(status.contains("aligned"), "{status}");
    let rows: Vec<Value> = read(&path("run/sft.json"));
    let says = |row: &&Value, words: &str| row["output"].as_str().unwrap().contains(words);
    let [answers, identity] =
        ["there was", "Vita"].map(|words| rows.iter().filter(|row| says(row, words)).count());
    assert!(answers >= 20 && identity > 0, "{answers} answers, {identity} of who it is");
    let merged = path("run/model").display().to_string();
    cluster.run("llama", &["inspect", "--verify", "--checkpoint", &merged]);
}

fn read(path: &Path) -> Vec<Value> {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}
