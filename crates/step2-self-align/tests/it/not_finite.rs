use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use dromedary_command::StopFlag;
use dromedary_llama::cli::SamplingArgs;
use dromedary_self_align::{Done, GenerateArgs, GenerateReport};
use dromedary_tokenizer::Tokenizer;
use serde_json::Value;

use crate::faults::{flags, with};
use crate::generate::STORIES;
use crate::job;
use crate::support::{copy_model, folder_of, generate_args, generate_with, lines, stories260k};

/// A token of its own that no story has.
const UNFIT: &str = "~";
/// The numbers of the model: columns of a weight.
const HIDDEN_SIZE: usize = 64;
/// Finite in f32 and in bf16, and no longer so when multiplied by a few.
const LARGE: f32 = 3e38;
/// Added to the token's logit, some rows come to it and others do not.
const LIKELY: f64 = 9.0;

/// Deterministic or not, and what is computed in: in bf16 by libtorch's operations, in f32 by this
/// project's kernels.
const SETTINGS: [(bool, &str); 4] =
    [(false, "f32"), (true, "f32"), (false, "bf16"), (true, "bf16")];

/// The id of [`UNFIT`].
fn unfit_id() -> usize {
    *Tokenizer::open(stories260k()).unwrap().encode(UNFIT).last().unwrap() as usize
}

/// A model in form, all of whose weights are finite, which gives no finite logits behind [`UNFIT`]: in
/// one column that token alone has a number, and the first layer's values have one there with which it
/// leaves f32.
fn model(folder: &Path) -> PathBuf {
    let folder = folder.join("model");
    copy_model(&folder);
    let mut weights = Weights::read(&folder);
    let column = weights.largest("model.layers.0.input_layernorm.weight");
    let embedding = "model.embed_tokens.weight";
    for row in 0..weights.len(embedding) / HIDDEN_SIZE {
        weights.set(embedding, row * HIDDEN_SIZE + column, 0.0);
    }
    for other in 0..HIDDEN_SIZE {
        let number = if other == column { 0.1 } else { 0.0 };
        weights.set(embedding, unfit_id() * HIDDEN_SIZE + other, number);
    }
    let values = "model.layers.0.self_attn.v_proj.weight";
    for row in 0..weights.len(values) / HIDDEN_SIZE {
        weights.set(values, row * HIDDEN_SIZE + column, LARGE);
    }
    fs::write(Weights::path(&folder), weights.bytes).unwrap();
    folder
}

/// A file of f32 tensors that is changed in place.
struct Weights {
    bytes: Vec<u8>,
    header: serde_json::Value,
    begin: usize,
}

impl Weights {
    fn path(folder: &Path) -> PathBuf {
        folder.join("model.safetensors")
    }

    fn read(folder: &Path) -> Self {
        let bytes = fs::read(Self::path(folder)).unwrap();
        let begin = 8 + u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
        let header = serde_json::from_slice(&bytes[8..begin]).unwrap();
        Self { bytes, header, begin }
    }

    fn range(&self, name: &str) -> Range<usize> {
        let at = |end: usize| self.header[name]["data_offsets"][end].as_u64().unwrap() as usize;
        self.begin + at(0)..self.begin + at(1)
    }

    fn len(&self, name: &str) -> usize {
        self.range(name).len() / 4
    }

    fn set(&mut self, name: &str, place: usize, number: f32) {
        let at = self.range(name).start + 4 * place;
        self.bytes[at..at + 4].copy_from_slice(&number.to_le_bytes());
    }

    /// The place of the largest number.
    fn largest(&self, name: &str) -> usize {
        let numbers = self.bytes[self.range(name)].as_chunks::<4>().0;
        let numbers = numbers.iter().map(|bytes| f32::from_le_bytes(*bytes).abs());
        numbers.enumerate().max_by(|one, other| one.1.total_cmp(&other.1)).unwrap().0
    }
}

/// Unfit prompts before, between and behind the stories.
fn prompts() -> Vec<String> {
    let tokenizer = Tokenizer::open(stories260k()).unwrap();
    let has_unfit = |text: &str| tokenizer.encode(text).contains(&(unfit_id() as u32));
    assert!(STORIES.iter().all(|story| !has_unfit(story)) && has_unfit("a ~ b"));
    let mut prompts: Vec<String> = STORIES.iter().map(|&story| story.to_owned()).collect();
    for (place, unfit) in [(0, "~"), (3, "Tim had a ~ dog"), (8, "The end ~")] {
        prompts.insert(place, unfit.to_owned());
    }
    prompts
}

fn folder(prompts: &[String]) -> tempfile::TempDir {
    folder_of(&prompts.iter().map(String::as_str).collect::<Vec<_>>())
}

/// The rows of a folder by their prompts, and how many were rejected for their logits.
fn rows(folder: &Path) -> (BTreeMap<String, String>, usize) {
    let (mut answers, mut rejected) = (BTreeMap::new(), 0);
    for row in lines(&folder.join("aligned.jsonl")) {
        let prompt = row["instruction"].as_str().unwrap().to_owned();
        if row["finish_reason"] == "rejected" {
            let reason = "the logits of its output token 0 are not finite";
            assert_eq!((prompt.contains(UNFIT), row["reason"].as_str()), (true, Some(reason)));
            rejected += 1;
        } else {
            assert!(!prompt.contains(UNFIT), "{row}");
            assert_eq!(answers.insert(prompt, row.to_string()), None);
        }
    }
    (answers, rejected)
}

/// What the model answers where nothing is unfit.
fn stories(args: impl Fn(&Path) -> GenerateArgs) -> BTreeMap<String, String> {
    let folder = folder(&STORIES.map(str::to_owned));
    generate_with(args(folder.path()), &StopFlag::default()).unwrap();
    rows(folder.path()).0
}

#[test]
fn rows_without_finite_logits_are_recorded_and_the_others_are_as_without_them() {
    for (deterministic, dtype) in SETTINGS {
        let args = |folder: &Path| GenerateArgs {
            checkpoint: Some(model(folder)),
            max_seq_len: Some(200),
            max_batch_size: Some(2),
            deterministic: Some(deterministic),
            dtype: Some(dtype.to_owned()),
            ..generate_args(folder)
        };
        let folder = folder(&prompts());
        let folder = folder.path();
        let args_of_run = args(folder);
        let report = generate_with(args_of_run.clone(), &StopFlag::default()).unwrap();
        assert_eq!((report.answered, report.rejected), (6, 3));
        let (answers, rejected) = rows(folder);
        assert_eq!((answers.len(), rejected), (6, 3));
        assert_eq!(answers, stories(args), "{deterministic} {dtype}");
        assert_eq!(Done::check(&folder.join("aligned.jsonl")).unwrap().rejected, 3);
        // They are done, and not tried again.
        let report = generate_with(args_of_run, &StopFlag::default()).unwrap();
        assert_eq!((report.done_before, report.answered, report.rejected), (9, 0, 0));
    }
}

#[test]
fn ranks_that_hold_one_model_reject_the_same_rows() {
    let mut of_ranks = Vec::new();
    for ranks in [1, 2] {
        let folder = folder(&prompts());
        let folder = folder.path();
        let checkpoint = model(folder);
        let flags = with(&flags(folder), "--checkpoint", checkpoint.to_str().unwrap());
        let mut command = job::mpirun();
        command.args(["-n", &ranks.to_string(), env!("CARGO_BIN_EXE_step2-self-align")]);
        command.args(with(&flags, "--temperature", "0"));
        let end = job::start(command, &[]).finish();
        end.assert_success().assert_said("is rejected: the logits of its output token 0");
        let (answers, rejected) = rows(folder);
        assert_eq!((answers.len(), rejected), (6, 3));
        of_ranks.push(answers);
    }
    assert_eq!(of_ranks[0], of_ranks[1]);
}

/// The model comes to the token itself, in the middle of an answer.
#[test]
fn a_row_may_lose_its_logits_at_any_token() {
    for (deterministic, dtype) in SETTINGS {
        let args = |folder: &Path| GenerateArgs {
            checkpoint: Some(model(folder)),
            max_seq_len: Some(200),
            max_batch_size: Some(4),
            deterministic: Some(deterministic),
            dtype: Some(dtype.to_owned()),
            sampling: SamplingArgs {
                temperature: Some(1.0),
                top_p: Some(1.0),
                logit_bias: vec![format!("{}={LIKELY}", unfit_id())],
                ..SamplingArgs::default()
            },
            ..generate_args(folder)
        };
        let prompts: Vec<String> = (0..24).map(|n| format!("{} {n}", STORIES[n % 6])).collect();
        let all = folder(&prompts);
        let report = generate_with(args(all.path()), &StopFlag::default()).unwrap();
        let answers = answers_of_late_failures(all.path(), &report);
        // Those that were answered, without the others beside them.
        let answered: Vec<String> = answers.keys().cloned().collect();
        let fit = folder(&answered);
        let report = generate_with(args(fit.path()), &StopFlag::default()).unwrap();
        assert_eq!((report.answered, report.rejected), (answers.len(), 0));
        assert_eq!(answers, rows(fit.path()).0, "{deterministic} {dtype}");
    }
}

/// The rows that were answered; the others came to their end behind some tokens, which count nowhere.
fn answers_of_late_failures(folder: &Path, report: &GenerateReport) -> BTreeMap<String, String> {
    assert_eq!(report.answered + report.rejected, 24);
    let rows = lines(&folder.join("aligned.jsonl"));
    let mut seen: Vec<&str> = rows.iter().map(|row| row["instruction"].as_str().unwrap()).collect();
    seen.sort_unstable();
    seen.dedup();
    assert_eq!((rows.len(), seen.len()), (24, 24));
    let position = |row: &serde_json::Value| -> Option<u64> {
        let reason = row["reason"].as_str()?.strip_prefix("the logits of its output token ")?;
        reason.strip_suffix(" are not finite")?.parse().ok()
    };
    let positions: Vec<u64> = rows.iter().filter_map(position).collect();
    assert_eq!(positions.len(), report.rejected);
    // Behind the first token at the earliest, and at several places.
    assert!(positions.iter().all(|&position| position > 0), "{positions:?}");
    assert!(positions.iter().max() > positions.iter().min(), "{positions:?}");
    assert!(report.answered > 0, "{positions:?}");
    let answered = rows.iter().filter(|row| row["finish_reason"] != "rejected");
    let answers: BTreeMap<String, String> = answered
        .map(|row| (row["instruction"].as_str().unwrap().to_owned(), row.to_string()))
        .collect();
    let written: u64 = rows.iter().map(|row| row["output_tokens"].as_u64().unwrap()).sum();
    let metrics = lines(&folder.join("metrics.jsonl"));
    let told = |kind: &str, key: &str| -> u64 {
        metrics
            .iter()
            .filter(|line| line[kind] != Value::Null)
            .map(|line| line[key].as_u64().unwrap())
            .sum()
    };
    assert_eq!((told("beat", "tokens"), told("run", "output_tokens")), (written, written));
    answers
}

/// Where no prompt gets finite logits, the prompts are not to blame: the run ends and names the rows.
#[test]
fn a_model_that_gives_no_finite_logits_at_all_ends_the_run() {
    let prompts: Vec<String> = (0..70).map(|n| format!("Story {n} ~")).collect();
    let folder = folder(&prompts);
    let folder = folder.path();
    let args = GenerateArgs {
        checkpoint: Some(model(folder)),
        max_seq_len: Some(200),
        ..generate_args(folder)
    };
    let error = generate_with(args, &StopFlag::default()).unwrap_err();
    let rows = lines(&folder.join("aligned.jsonl"));
    assert!((64..70).contains(&rows.len()), "{}", rows.len());
    let text = error.to_string();
    assert!(text.starts_with("the logits of 64 rows in a row are not finite"), "{text}");
    assert!(rows[..64].iter().all(|row| text.contains(row["id"].as_str().unwrap())), "{text}");
    assert!(!folder.join("aligned.jsonl.done").exists());
}
