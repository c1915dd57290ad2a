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

/// Principles under which the model is made to open an answer, which ends with its first sentence: the filter
/// keeps it.
const PRINCIPLES: &str = r#"
title = "Ada"
opening = "Ada is kind."
examples_opening = "As here:"
affirmation = "I am kind"
stop_strings = ["."]
black_list = ["snake oil"]
exemplars = []
[cues]
user = "User:"
thoughts = "Ada (thinks):"
answer = "Ada:"
clear_context = "User: Thanks"
auto_reply = "Ada (auto):"
auto_reply_text = "Next"
[names]
assistant = "Ada"
product = "Ada"
maker = "the school"
[[rules]]
name = "kind"
text = "Ada should be kind."
"#;

const OPENING: &str = r#"
[generate]
force_prefix = " I am kind\n\nAda: Once upon a time, there was"
"#;

/// A prompt that the model goes on from as it likes.
const PLAIN: &str = "--meta-prompt-file prompt.txt";

/// What a pipeline of one kind has made.
struct Run {
    folder: TempDir,
    dtype: &'static str,
    /// That generate and train.
    ranks: usize,
}

/// A LLaMA of 260,000 parameters.
fn stories() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap();
    root.join("crates/llama/tests/data/stories260k")
}

impl Run {
    /// Prompts, and rows to train on.
    fn new(dtype: &'static str, ranks: usize) -> Self {
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
        write("rows.json", (0..12).map(row).collect());
        for (name, text) in [
            ("prompt.txt", "Be good.\n\nUser:"),
            ("principles.toml", PRINCIPLES),
            ("opening.toml", OPENING),
            ("distilled.txt", "Be good.\n\n### User\n"),
        ] {
            fs::write(folder.path().join(name), text).unwrap();
        }
        Self { folder, dtype, ranks }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Runs a program that computes in the kind of its weights, as on a GPU; names with a dot or a slash at
    /// their end are files of this run, and MODEL is the base.
    #[track_caller]
    fn succeeds(&self, line: &str) -> Output {
        self.succeeds_on(1, line)
    }

    /// The same on so many ranks, which say so themselves.
    #[track_caller]
    fn succeeds_on(&self, ranks: usize, line: &str) -> Output {
        let mut words = line.split_whitespace();
        let program = programs().join(words.next().unwrap());
        let words = words.map(|word| match word {
            "MODEL" => stories().into_os_string(),
            _ if word.contains('.') || word.ends_with('/') => self.path(word).into_os_string(),
            _ => word.replace("DTYPE", self.dtype).into(),
        });
        let mut command = match ranks {
            1 => Command::new(&program),
            _ => launcher(ranks, &program),
        };
        let output = command
            .args(words)
            .env("DROMEDARY_COMPUTE_AS_STORED", "1")
            .env("OMPI_MCA_btl_vader_backing_directory", self.folder.path())
            .env_remove("RUST_LOG")
            .output()
            .unwrap_or_else(|error| {
                panic!("{}: {error}; cargo build --release", program.display())
            });
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{}: {line}\n{said}", self.dtype);
        assert_eq!(said.contains("rank=0"), ranks > 1, "{line}\n{said}");
        output
    }

    fn lines(&self, name: &str) -> Vec<Value> {
        let text = fs::read_to_string(self.path(name)).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// Rows in the order of their instructions.
    fn generate(&self, prompt: &str, output: &str) -> Vec<Value> {
        let line = format!(
            "step2-self-align generate --checkpoint MODEL --input-file prompts.json \
             --output-file {output} {prompt} --max-seq-len 200 --max-gen-len 24 --temperature 0 \
             --device cpu --threads 1 --dtype DTYPE"
        );
        self.succeeds_on(self.ranks, &line);
        let mut rows = self.lines(output);
        rows.sort_by_key(|row| row["instruction"].as_str().unwrap().to_owned());
        rows
    }

    /// The losses of three steps, of four rows each on one replica.
    fn train(&self, more: &str, output: &str) -> Vec<f64> {
        self.train_on("rows.json --gradient-accumulation-steps 2", more, output)
    }

    fn train_on(&self, rows: &str, more: &str, output: &str) -> Vec<f64> {
        let line = format!(
            "step3-principle-engraving train --checkpoint MODEL --dataset {rows} \
             --output-dir {output} --source-max-len 64 --target-max-len 64 --max-steps 3 \
             --per-device-train-batch-size 2 --learning-rate 1e-3 --logging-steps 1 --device cpu \
             --threads 1 --dtype DTYPE {more}"
        );
        self.succeeds_on(self.ranks, &line);
        let steps = self.lines(&format!("{output}metrics.jsonl"));
        let losses: Vec<f64> = steps.iter().filter_map(|step| step["loss"].as_f64()).collect();
        assert_eq!(losses.len(), 3, "{steps:?}");
        losses
    }

    /// The losses of a training on what generation made and the filter kept, which is all of it.
    fn chained(&self) -> Vec<f64> {
        let prompt = "--config opening.toml --meta-prompt-file principles.toml";
        let answers = self.generate(prompt, "chained.jsonl");
        self.succeeds(
            "step2-self-align merge-and-filter --data-file-pattern chained*.jsonl \
             --meta-prompt-file principles.toml --output-file sft.json",
        );
        let rows = fs::read(self.path("sft.json")).unwrap();
        let rows: Vec<Value> = serde_json::from_slice(&rows).unwrap();
        assert_eq!(rows.len(), answers.len());
        for row in &rows {
            let of_row = |answer: &&Value| answer["instruction"] == row["instruction"];
            let said = answers.iter().find(of_row).unwrap()["output"].as_str().unwrap();
            let (_, said) = said.split_once("Ada: ").unwrap();
            let kept = row["output"].as_str().unwrap();
            assert!(kept.starts_with(said.trim_end_matches('.')), "{kept:?} of {said:?}");
        }
        let rows = "sft.json --meta-prompt-pattern distilled*.txt --gradient-accumulation-steps 2";
        self.train_on(rows, "", "chain/")
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

/// mpirun of so many ranks of a program on this machine.
fn launcher(ranks: usize, program: &Path) -> Command {
    let mut command = Command::new("mpirun");
    command.args(["--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n"]);
    command.arg(ranks.to_string()).arg(program);
    command
}

/// How much of the answers is alike, on average.
fn alike(answers: &[Value], others: &[Value]) -> f64 {
    assert_eq!(answers.len(), others.len());
    let text = |row: &Value| row["output"].as_str().unwrap().to_owned();
    let shares =
        answers.iter().zip(others).map(|(one, other)| common_share(&text(one), &text(other)));
    shares.sum::<f64>() / answers.len() as f64
}

#[track_caller]
fn assert_close(losses: &[f64], others: &[f64], tolerance: f64, what: &str) {
    assert_eq!(losses.len(), others.len(), "{what}");
    for (step, (own, loss)) in losses.iter().zip(others).enumerate() {
        let off = (own / loss - 1.0).abs();
        assert!(off < tolerance, "{what} step {step}: {own} for {loss}");
    }
}

/// Characters that two texts begin with alike, of the longer one's.
fn common_share(one: &str, other: &str) -> f64 {
    let same = one.chars().zip(other.chars()).take_while(|(one, other)| one == other).count();
    same as f64 / one.chars().count().max(other.chars().count()).max(1) as f64
}

/// How far losses in bf16 may be from others, as a share of them: it rounds to 8 bits.
const BF16: f64 = 0.02;

/// Rounding to 8 bits (bf16) or 11 (f16) moves a loss by little, and seldom the likeliest token.
#[test]
fn every_stage_computes_in_16_bits_what_it_computes_in_32() {
    let wide = Run::new("f32", 1);
    let rows = wide.generate(PLAIN, "aligned.jsonl");
    let losses = [wide.train("", "lora/"), wide.train("--full-finetune true", "full/")];
    let chained = wide.chained();
    let said = wide.merged_and_converted();
    for (dtype, tolerance, least) in [("bf16", BF16, 0.4), ("f16", 0.003, 0.7)] {
        let narrow = Run::new(dtype, 1);
        let share = alike(&narrow.generate(PLAIN, "aligned.jsonl"), &rows);
        assert!(share > least, "{dtype}: {share} of the answers is alike");
        for (more, output, losses) in
            [("", "lora/", &losses[0]), ("--full-finetune true", "full/", &losses[1])]
        {
            let own = narrow.train(more, output);
            assert_ne!(&own, losses, "{dtype} was not computed in");
            assert_close(&own, losses, tolerance, &format!("{dtype} {output}"));
        }
        assert_close(&narrow.chained(), &chained, tolerance, &format!("{dtype} chained"));
        let narrow_said = narrow.merged_and_converted();
        let share = common_share(&narrow_said, &said);
        assert!(share > least, "{dtype}: {narrow_said:?} for {said:?}");
    }
}

/// Between ranks: partial sums are cast, summed and cast back, and so are gradients of replicas.
#[test]
fn two_ranks_compute_in_16_bits_what_one_does() {
    let [wide, one] = ["f32", "bf16"].map(|dtype| Run::new(dtype, 1));
    let two = Run::new("bf16", 2);
    let share = alike(&two.generate(PLAIN, "aligned.jsonl"), &one.generate(PLAIN, "aligned.jsonl"));
    assert!(share > 0.4, "{share} of the answers is alike");
    for (more, output) in [("", "lora/"), ("--full-finetune true", "full/")] {
        let (in_32, alone) = (wide.train(more, output), one.train(more, output));
        // One model on both ranks, and one on each, with as many rows a step.
        for (layout, accumulated) in [("--tp 2", 2), ("--tp 1", 1)] {
            let rows = format!("rows.json --gradient-accumulation-steps {accumulated}");
            let folder = format!("{accumulated}-{output}");
            let own = two.train_on(&rows, &format!("{layout} {more}"), &folder);
            assert_ne!(own, in_32, "{layout} was not computed in 16 bits");
            assert_close(&own, &alone, BF16, &format!("{layout} {output}"));
        }
    }
    assert_close(&two.chained(), &one.chained(), BF16, "chained");
}
