//! Rows without finite logits fail alone: the others get what they would get without them.

use std::fs;

use dromedary_llama::{
    Error, LoadOptions,
    generation::{EngineConfig, Request, Sampling, ScoreRequest},
};
use dromedary_parallel::{Communicator, SingleProcess};
use tch::{Kind, Tensor};
use tempfile::TempDir;

use crate::support::{Loaded, Output, on_ranks, request, run, stories};

/// Behind this token the model gives no finite logits.
const UNFIT: u32 = 470;
/// Finite in f32 and in bf16, and no longer so when multiplied by a few.
const LARGE: f64 = 3e38;

/// A model all of whose weights are finite: one feature is of [`UNFIT`] alone, and the first layer's
/// values leave f32 with it.
fn model() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in ["config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"] {
        fs::copy(stories().join(name), folder.path().join(name)).unwrap();
    }
    let tensors = Tensor::read_safetensors(stories().join("model.safetensors")).unwrap();
    let find = |name: &str| &tensors.iter().find(|tensor| tensor.0 == name).unwrap().1;
    let norm = find("model.layers.0.input_layernorm.weight");
    let feature = i64::try_from(norm.abs().argmax(0, false)).unwrap();
    let embedding = find("model.embed_tokens.weight");
    let _ = embedding.select(1, feature).zero_();
    let _ = embedding.get(i64::from(UNFIT)).zero_();
    let _ = embedding.get(i64::from(UNFIT)).get(feature).fill_(0.1);
    let _ = find("model.layers.0.self_attn.v_proj.weight").select(1, feature).fill_(LARGE);
    Tensor::write_safetensors(&tensors, folder.path().join("model.safetensors")).unwrap();
    folder
}

/// By this project's kernels, and by libtorch's operations in two kinds.
fn paths() -> [LoadOptions; 3] {
    [(true, Kind::Float), (false, Kind::Float), (true, Kind::BFloat16)]
        .map(|(pack, kind)| LoadOptions { pack, kind, ..LoadOptions::default() })
}

fn config(deterministic: bool, sampling: Sampling) -> EngineConfig {
    EngineConfig {
        max_batch_size: 3,
        max_seq_len: 100,
        max_gen_len: 20,
        deterministic,
        sampling,
        ..EngineConfig::default()
    }
}

/// Prompts of 4 to 60 tokens, so that short rows stand beside long ones.
fn fit_rows() -> Vec<Request> {
    (0..9)
        .map(|row| {
            let length = [60, 4, 9][row % 3] + row as u32;
            let tokens = (0..length).map(|at| 260 + (at * 37 + row as u32 * 11) % 200).collect();
            request(format!("fit {row}"), tokens)
        })
        .collect()
}

/// The same with unfit ones before, between and behind them.
fn all_rows() -> Vec<Request> {
    let mut rows = fit_rows();
    for (place, length) in [(0, 50), (4, 1), (5, 40), (11, 30)] {
        let mut tokens = vec![301; length];
        tokens[length / 2] = UNFIT;
        rows.insert(place, request(format!("unfit {place}"), tokens));
    }
    rows
}

fn check(comm: &dyn Communicator, dir: &TempDir, options: LoadOptions, deterministic: bool) {
    let loaded = Loaded::with(dir.path(), comm, options);
    let config = config(deterministic, Sampling::default());
    let want = run(&mut loaded.engine(comm, config.clone()), fit_rows());
    let mut engine = loaded.engine(comm, config);
    // The second run finds the slots as the first one left them.
    for _ in 0..2 {
        let got = run(&mut engine, all_rows());
        let mut failed = got.failed.clone();
        failed.sort();
        let names = ["unfit 0", "unfit 11", "unfit 4", "unfit 5"];
        assert_eq!(failed, names.map(|id| (id.to_owned(), 0)));
        assert_eq!(got.statistics.failed, 4);
        check_rows(&got, &want);
    }
}

fn check_rows(got: &Output, want: &Output) {
    assert_eq!(got.finished.len(), want.finished.len(), "failed: {:?}", got.failed);
    for row in &want.finished {
        assert_eq!(got.row(&row.id).tokens, row.tokens, "{}", row.id);
    }
    let tokens: u64 = got.finished.iter().map(|row| row.tokens.len() as u64).sum();
    assert_eq!(got.statistics.output_tokens, tokens);
    assert_eq!(got.statistics.decode_tokens, tokens - got.finished.len() as u64);
}

#[test]
fn rows_beside_those_that_fail_are_as_without_them() {
    let dir = model();
    for options in paths() {
        for deterministic in [false, true] {
            check(&SingleProcess, &dir, options, deterministic);
        }
    }
}

#[test]
fn ranks_fail_the_same_rows() {
    let dir = model();
    for tp in [2, 3] {
        for options in paths() {
            on_ranks(tp, |comm| check(comm, &dir, options, tp == 3));
        }
    }
}

/// The model comes to the token itself, behind some others.
#[test]
fn a_row_may_fail_behind_its_first_tokens() {
    let dir = model();
    let sampling = Sampling { logit_bias: [(UNFIT, 8.0)].into(), ..Sampling::nucleus(1.0, 1.0) };
    for options in paths() {
        for deterministic in [false, true] {
            let loaded = Loaded::with(dir.path(), &SingleProcess, options);
            let config = config(deterministic, sampling.clone());
            let got = run(&mut loaded.engine(&SingleProcess, config.clone()), fit_rows());
            assert!(!got.finished.is_empty() && !got.failed.is_empty(), "{:?}", got.failed);
            assert!(got.failed.iter().all(|(_, position)| *position > 0), "{:?}", got.failed);
            let fit = |row: &Request| got.failed.iter().all(|(id, _)| *id != row.id);
            let alone = fit_rows().into_iter().filter(fit).collect();
            let want = run(&mut loaded.engine(&SingleProcess, config), alone);
            check_rows(&got, &want);
        }
    }
}

#[test]
fn rows_behind_a_score_that_fails_are_as_without_it() {
    let dir = model();
    for options in paths() {
        let loaded = Loaded::with(dir.path(), &SingleProcess, options);
        let config = config(true, Sampling::default());
        let want = run(&mut loaded.engine(&SingleProcess, config.clone()), fit_rows());
        let mut engine = loaded.engine(&SingleProcess, config);
        let of = |last: u32| ScoreRequest { prompt: vec![301; 40], target: vec![302, last, 303] };
        let error = engine.score(&[of(304), of(UNFIT)]).unwrap_err();
        assert!(matches!(&error, Error::NonFiniteLogits { id, .. } if id == "score 1"), "{error}");
        check_rows(&run(&mut engine, fit_rows()), &want);
        assert!(engine.score(&[of(304)]).unwrap()[0].is_finite());
    }
}
