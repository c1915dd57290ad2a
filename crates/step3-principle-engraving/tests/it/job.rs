//! A run as a user starts it, in a folder of its own.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    thread,
    time::Duration,
};

use serde_json::{Value, json};

use crate::support::stories260k;

pub(crate) const BINARY: &str = env!("CARGO_BIN_EXE_step3-principle-engraving");

pub(crate) struct Job {
    pub(crate) dir: tempfile::TempDir,
}

impl Job {
    pub(crate) fn new(num_rows: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let rows: Vec<Value> = (1..=num_rows)
            .map(|id| {
                json!({
                    "example_id": id,
                    "instruction": format!("Tell a story about {id} cats."),
                    "input": "",
                    "output": format!("Once upon a time there were {id} cats. They were happy."),
                })
            })
            .collect();
        let job = Self { dir };
        fs::write(job.path("sft.json"), serde_json::to_vec(&rows).unwrap()).unwrap();
        fs::write(job.path("dromedary_a_prompt_distill.txt"), "# Dromedary\n\n### User\n").unwrap();
        job
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn train(&self, output_dir: &str, flags: &[&str]) -> Output {
        self.command(output_dir, flags).output().unwrap()
    }

    /// A run on another base than stories260k.
    pub(crate) fn train_on(&self, base: &str, output_dir: &str, flags: &[&str]) -> Output {
        self.command_on(Path::new(base), output_dir, flags).output().unwrap()
    }

    pub(crate) fn command(&self, output_dir: &str, flags: &[&str]) -> Command {
        self.command_on(&stories260k(), output_dir, flags)
    }

    fn command_on(&self, base: &Path, output_dir: &str, flags: &[&str]) -> Command {
        let of_flags = flags.contains(&"--learning-rate");
        let rate: &[&str] = if of_flags { &[] } else { &["--learning-rate", "1e-2"] };
        let mut command = Command::new(BINARY);
        command
            .args(["train", "--threads", "1", "--lora-r", "4"])
            .args(rate)
            .args(["--gradient-accumulation-steps", "2"])
            .arg("--model-name-or-path")
            .arg(base)
            .arg("--dataset")
            .arg(self.path("sft.json"))
            .arg("--meta-prompt-pattern")
            .arg(self.path("dromedary_*prompt_distill.txt"))
            .arg("--output-dir")
            .arg(self.path(output_dir))
            .args(flags);
        command
    }

    /// Sorted names of what is in the folder.
    pub(crate) fn names(&self, output_dir: &str) -> Vec<String> {
        let entries = fs::read_dir(self.path(output_dir)).unwrap();
        let name = |entry: std::io::Result<fs::DirEntry>| entry.unwrap().file_name();
        let mut names: Vec<_> = entries.map(|entry| name(entry).into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// Waits until a run has made a few steps; two minutes at most.
    pub(crate) fn wait_for_metrics(&self, output_dir: &str) {
        let metrics = self.path(output_dir).join("metrics.jsonl");
        for _ in 0..12_000 {
            if fs::read(&metrics).is_ok_and(|text| text.len() > 500) {
                return;
            }
            thread::sleep(Duration::from_millis(10));
        }
        panic!("no step in two minutes");
    }

    pub(crate) fn metrics(&self, output_dir: &str) -> Vec<Value> {
        let text = fs::read_to_string(self.path(output_dir).join("metrics.jsonl")).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[track_caller]
pub(crate) fn succeeded(output: Output) {
    assert!(output.status.success(), "{}", stderr(&output));
}

/// What a step computed, without how long it took.
pub(crate) fn computed(step: &Value) -> (u64, f64, f64, f64) {
    let number = |key: &str| step[key].as_f64().unwrap();
    (step["step"].as_u64().unwrap(), number("loss"), number("grad_norm"), number("learning_rate"))
}

pub(crate) fn file(dir: &Path, name: &str) -> Vec<u8> {
    fs::read(dir.join(name)).unwrap()
}
