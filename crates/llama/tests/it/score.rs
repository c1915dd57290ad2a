//! Log-probabilities of given texts against those of transformers in f64.

use std::{fs, path::Path};

use dromedary_llama::{
    Error,
    generation::{EngineConfig, ScoreRequest},
};
use dromedary_parallel::{Communicator, SingleProcess};
use serde_json::Value;

use crate::{
    given::smollm2,
    support::{Loaded, data, on_ranks, request, run, stories},
};

fn golden(name: &str) -> Vec<(ScoreRequest, f64)> {
    let text = fs::read_to_string(data(name).join("score.json")).unwrap();
    let rows: Vec<Value> = serde_json::from_str(&text).unwrap();
    let ids = |row: &Value, key: &str| -> Vec<u32> {
        row[key].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
    };
    rows.iter()
        .map(|row| {
            let request =
                ScoreRequest { prompt: ids(row, "prompt_ids"), target: ids(row, "target_ids") };
            (request, row["score"].as_f64().unwrap())
        })
        .collect()
}

fn check(golden: &[(ScoreRequest, f64)], scores: &[f64], what: &str) {
    assert_eq!(scores.len(), golden.len());
    for ((request, want), got) in golden.iter().zip(scores) {
        let off = (got - want).abs() / request.target.len() as f64;
        assert!(off < 1e-4, "{what}: {got} for {want}, {off:.1e} per token");
    }
}

const ALL: [(usize, bool); 3] = [(8, false), (2, false), (2, true)];

/// With these numbers of slots, deterministic or not.
fn scores(
    dir: &Path,
    comm: &dyn Communicator,
    rows: &[(ScoreRequest, f64)],
    settings: &[(usize, bool)],
) {
    let loaded = Loaded::new(dir, comm);
    let requests: Vec<ScoreRequest> = rows.iter().map(|(request, _)| request.clone()).collect();
    for &(max_batch_size, deterministic) in settings {
        let config = EngineConfig { max_batch_size, deterministic, ..EngineConfig::default() };
        let mut engine = loaded.engine(comm, config);
        check(rows, &engine.score(&requests).unwrap(), "plain");
        // A prefix that reaches into some prompts, ends in others, and is none of the last ones.
        engine.pin_prefix(&requests[0].prompt[..15]).unwrap();
        check(rows, &engine.score(&requests).unwrap(), "behind a prefix");
        engine.pin_prefix(&[&requests[0].prompt[..], &requests[0].target].concat()).unwrap();
        check(rows, &engine.score(&requests).unwrap(), "behind a prefix with a target");
        // Rows are generated as before.
        let output = run(&mut engine, vec![request("row", requests[0].prompt.clone())]);
        assert_eq!(output.finished.len(), 1);
        check(rows, &engine.score(&requests).unwrap(), "after a run");
    }
}

#[test]
fn scores_are_those_of_transformers() {
    scores(&stories(), &SingleProcess, &golden("stories260k"), &ALL);
    if let Some(dir) = smollm2() {
        scores(&dir, &SingleProcess, &golden("smollm2"), &ALL[..1]);
    }
}

#[test]
fn scores_are_the_same_on_all_ranks() {
    let rows = golden("stories260k");
    for tp in [2, 3] {
        on_ranks(tp, |comm| scores(&stories(), comm, &rows, &ALL[1..]));
    }
}

#[test]
fn texts_are_split_as_the_golden_ones() {
    let loaded = Loaded::new(&stories(), &SingleProcess);
    let text = fs::read_to_string(data("stories260k").join("score.json")).unwrap();
    let rows: Vec<Value> = serde_json::from_str(&text).unwrap();
    for (row, (request, _)) in rows.iter().zip(golden("stories260k")) {
        let (prompt, target) = (row["prompt"].as_str().unwrap(), row["target"].as_str().unwrap());
        assert_eq!(loaded.tokenizer.encode_with_bos(prompt), request.prompt);
        assert_eq!(loaded.tokenizer.encode_continuation(prompt, target), request.target);
    }
}

/// A scored row may be as long as a slot; a deterministic step then needs all slots nevertheless.
#[test]
fn rows_run_behind_a_score_that_fills_a_slot() {
    let loaded = Loaded::new(&stories(), &SingleProcess);
    let config = EngineConfig {
        max_batch_size: 3,
        max_seq_len: 30,
        max_gen_len: 4,
        deterministic: true,
        ..EngineConfig::default()
    };
    let mut engine = loaded.engine(&SingleProcess, config);
    engine.score(&[ScoreRequest { prompt: vec![403; 20], target: vec![407; 10] }]).unwrap();
    let output = run(&mut engine, vec![request("row", vec![1, 403])]);
    assert_eq!(output.finished[0].tokens.len(), 4);
}

#[test]
fn rows_that_cannot_be_scored_are_named() {
    let loaded = Loaded::new(&stories(), &SingleProcess);
    let config = EngineConfig { max_seq_len: 30, max_gen_len: 2, ..EngineConfig::default() };
    let mut engine = loaded.engine(&SingleProcess, config);
    let row = |prompt: usize, target: usize| ScoreRequest {
        prompt: vec![403; prompt],
        target: vec![407; target],
    };
    assert_eq!(engine.score(&[]).unwrap(), Vec::<f64>::new());
    let fits = engine.score(&[row(1, 0), row(20, 11)]).unwrap();
    assert!(fits[0] == 0.0 && fits[1] < 0.0);
    for (bad, words) in
        [(row(0, 1), "no tokens"), (row(20, 12), "32 tokens"), (row(20, 12), "room for 31 ")]
    {
        let error = engine.score(&[row(1, 1), bad]).unwrap_err();
        assert!(matches!(error, Error::CannotScore { row: 1, .. }), "{error}");
        assert!(error.to_string().contains(words), "{error}");
    }
    let unknown = ScoreRequest { prompt: vec![1], target: vec![512] };
    assert!(matches!(engine.score(&[unknown]).unwrap_err(), Error::TokenId { id: 512, .. }));
}
