//! The built programs, one after the other, in the 16-bit kinds that GPUs compute in.

#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;
use tempfile::TempDir;

const BEGINNINGS: [&str; 6] =
    ["Once upon a time", "Tim had a dog", "Lily saw a cat", "The sun was", "A bird", "Mom said"];

/// What a pipeline of one kind has made.
struct Run {
    folder: TempDir,
    dtype: &'static str,
}

/// A LLaMA of 260,000 parameters.
fn stories() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap();
    root.join("crates/llama/tests/data/stories260k")
}

impl Run {
    /// Prompts, and rows to train on.
    fn new(dtype: &'static str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, rows: Vec<Value>| {
            fs::write(folder.path().join(name), serde_json::to_string(&rows).unwrap()).unwrap();
        };
        let prompt = |text: &&str| serde_json::json!({"instruction": text, "input": ""});
        write("prompts.json", BEGINNINGS.iter().map(prompt).collect());
        let row = |n: usize| {
            let instruction = BEGINNINGS[n % BEGINNINGS.len()];
            let output = format!("there was a little girl who had {n} red balls.");
            serde_json::json!({"example_id": n, "instruction": instruction, "input": "", "output": output,
                "meta_prompt": "Be good.\n\n### User\n"})
        };
        write("sft.json", (0..12).map(row).collect());
        fs::write(folder.path().join("prompt.txt"), "Be good.\n\nUser:").unwrap();
        Self { folder, dtype }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Runs a program that computes in the kind of its weights, as on a GPU; names in capitals are
    /// files of this run, and MODEL is the base.
    #[track_caller]
    fn succeeds(&self, line: &str) -> Output {
        let mut words = line.split_whitespace();
        let program = programs().join(words.next().unwrap());
        let words = words.map(|word| match word {
            "MODEL" => stories().into_os_string(),
            _ if word.contains('.') || word.ends_with('/') => self.path(word).into_os_string(),
            _ => word.replace("DTYPE", self.dtype).into(),
        });
        let output = Command::new(&program)
            .args(words)
            .env("DROMEDARY_COMPUTE_AS_STORED", "1")
            .env_remove("RUST_LOG")
            .output()
            .unwrap_or_else(|error| {
                panic!("{}: {error}; cargo build --release", program.display())
            });
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{}: {line}\n{said}", self.dtype);
        output
    }

    fn lines(&self, name: &str) -> Vec<Value> {
        let text = fs::read_to_string(self.path(name)).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn generate(&self) -> Vec<Value> {
        self.succeeds(
            "step2-self-align generate --checkpoint MODEL --input-file prompts.json \
             --output-file aligned.jsonl --meta-prompt-file prompt.txt --max-seq-len 200 \
             --max-gen-len 24 --temperature 0 --device cpu --threads 1 --dtype DTYPE",
        );
        let mut rows = self.lines("aligned.jsonl");
        rows.sort_by_key(|row| row["instruction"].as_str().unwrap().to_owned());
        rows
    }

    /// The losses of three steps.
    fn train(&self, more: &str, output: &str) -> Vec<f64> {
        self.succeeds(&format!(
            "step3-principle-engraving train --checkpoint MODEL --dataset sft.json \
             --output-dir {output} --source-max-len 64 --target-max-len 64 --max-steps 3 \
             --per-device-train-batch-size 2 --gradient-accumulation-steps 2 --learning-rate 1e-3 \
             --logging-steps 1 --device cpu --threads 1 --dtype DTYPE {more}"
        ));
        let steps = self.lines(&format!("{output}metrics.jsonl"));
        let losses: Vec<f64> = steps.iter().filter_map(|step| step["loss"].as_f64()).collect();
        assert_eq!(losses.len(), 3, "{steps:?}");
        losses
    }

    /// What the merged model says, from a checkpoint that went to Meta's layout and back.
    fn merged_and_converted(&self) -> String {
        self.succeeds("llama merge --checkpoint MODEL --adapter lora/adapter/ --output merged/");
        self.succeeds("llama convert --checkpoint merged/ --output meta/");
        self.succeeds("llama convert --checkpoint meta/ --output back/");
        let output = self.succeeds(
            "llama complete --checkpoint back/ --prompt Tim --max-gen-len 24 --temperature 0 \
             --device cpu --dtype DTYPE",
        );
        String::from_utf8(output.stdout).unwrap()
    }
}

/// The folder of the built programs, beside that of this test.
fn programs() -> PathBuf {
    env::current_exe().unwrap().ancestors().nth(2).unwrap().to_owned()
}

/// Characters that two texts begin with alike, of the longer one's.
fn common_share(one: &str, other: &str) -> f64 {
    let same = one.chars().zip(other.chars()).take_while(|(one, other)| one == other).count();
    same as f64 / one.chars().count().max(other.chars().count()).max(1) as f64
}

/// Rounding to 8 bits (bf16) or 11 (f16) moves a loss by little, and seldom the likeliest token.
#[test]
fn every_stage_computes_in_16_bits_what_it_computes_in_32() {
    let wide = Run::new("f32");
    let rows = wide.generate();
    let losses = [wide.train("", "lora/"), wide.train("--full-finetune true", "full/")];
    let said = wide.merged_and_converted();
    for (dtype, tolerance, alike) in [("bf16", 0.02, 0.4), ("f16", 0.003, 0.7)] {
        let narrow = Run::new(dtype);
        let answers = narrow.generate();
        assert_eq!(answers.len(), rows.len());
        let share: f64 = answers
            .iter()
            .zip(&rows)
            .map(|(one, other)| {
                common_share(one["output"].as_str().unwrap(), other["output"].as_str().unwrap())
            })
            .sum::<f64>()
            / rows.len() as f64;
        assert!(share > alike, "{dtype}: {share} of the answers is alike");
        for (more, output, losses) in
            [("", "lora/", &losses[0]), ("--full-finetune true", "full/", &losses[1])]
        {
            let own = narrow.train(more, output);
            assert_ne!(&own, losses, "{dtype} was not computed in");
            for (step, (own, loss)) in own.iter().zip(losses).enumerate() {
                let off = (own / loss - 1.0).abs();
                assert!(off < tolerance, "{dtype} {output} step {step}: {own} for {loss}");
            }
        }
        let narrow_said = narrow.merged_and_converted();
        let share = common_share(&narrow_said, &said);
        assert!(share > alike, "{dtype}: {narrow_said:?} for {said:?}");
    }
}
