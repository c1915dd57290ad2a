//! `llama plan`, as a user runs it, and the numbers behind it.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use dromedary_llama::{Footprint, LlamaConfig, LoadOptions, Plan, Slowest, Weight};
use serde_json::Value;
use tch::{Device, Kind};

use crate::support::{data, load, stories};

fn plan(checkpoint: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_llama"));
    command.arg("plan").arg("--checkpoint").arg(checkpoint).args(args).output().unwrap()
}

fn stdout(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn json(checkpoint: &Path, args: &[&str]) -> Value {
    let args = [args, &["--json"]].concat();
    serde_json::from_str(&stdout(&plan(checkpoint, &args))).unwrap()
}

/// Published sizes that no checkpoint of the tests has.
fn configuration(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/llama").join(name)
}

#[test]
fn the_large_models_are_planned_from_their_configuration() {
    // The bytes of the published 16-bit checkpoints.
    for (name, bytes) in [
        ("llama2-7b", 13_476_831_232_u64),
        ("llama2-13b", 26_031_728_640),
        ("llama2-70b", 137_953_296_384),
    ] {
        let file = configuration(name).join("config.json");
        let report = json(&file, &["--device", "cuda"]);
        assert_eq!(report["total"]["weight_bytes"], bytes, "{name}");
        assert_eq!(report["dtype"], "F16");
        assert_eq!(report["slowest"]["work_over_mean"], 1.0);
    }
    let file = configuration("llama2-70b").join("config.json");
    let report = json(&file, &["--device", "cuda", "--tp", "8", "--prefix-tokens", "2500"]);
    // 500 units of 64 vocabulary rows do not divide by 8, all else does.
    assert!(report["slowest"]["work_over_mean"].as_f64().unwrap() < 1.001);
    for rank in 0..8 {
        let of = &report["ranks"][rank];
        assert_eq!(of["q_heads"]["start"], 8 * rank);
        assert_eq!(of["groups"].as_array().unwrap().len(), 1);
        assert_eq!(of["kv_bytes_per_token"], 80 * 2 * 128 * 2);
        assert_eq!(of["prefix_bytes"], 80 * 2 * 128 * 2 * 2500);
        // Of the row-parallel tensors everything is read.
        let others = 80 * (8192 * 8192 + 8192 * 28672) / 8 * 7;
        let [own, read] = ["parameters", "parameters_read"].map(|key| of[key].as_u64().unwrap());
        assert_eq!(read - own, others);
    }
}

#[test]
fn an_uneven_split_names_its_slowest_rank() {
    let report = json(&configuration("llama2-70b"), &["--device", "cuda", "--tp", "12"]);
    let work: Vec<f64> = report["ranks"]
        .as_array()
        .unwrap()
        .iter()
        .map(|rank| rank["work_per_token"].as_f64().unwrap())
        .collect();
    let (most, mean) = (work.iter().copied().fold(0.0, f64::max), work.iter().sum::<f64>() / 12.0);
    let slowest = &report["slowest"];
    assert_eq!(work[slowest["rank"].as_u64().unwrap() as usize], most);
    assert!((slowest["work_over_mean"].as_f64().unwrap() - most / mean).abs() < 1e-9);
    assert!(most / mean > 1.005 && most / mean < 1.2, "{}", most / mean);
    // 64 heads on 12 ranks: 6 on the first 4, 5 on the others; a K/V head of 8 query heads lies on
    // two ranks or three.
    let heads = &report["ranks"][1]["groups"];
    assert_eq!(heads[0]["kv_head"], 0);
    assert_eq!(
        (&heads[0]["q_heads"]["start"], &heads[0]["q_heads"]["end"]),
        (&6.into(), &8.into())
    );
    assert_eq!(heads[1]["q_heads"]["end"], 12);
}

#[test]
fn the_table_shows_ranges_and_bytes() {
    let text =
        stdout(&plan(&stories(), &["--tp", "3", "--prefix-tokens", "100", "--dtype", "f32"]));
    let lines: Vec<Vec<&str>> =
        text.lines().map(|line| line.split_whitespace().collect()).collect();
    let rank = |number: &str| {
        let row = lines.iter().find(|line| line.first() == Some(&number));
        row.unwrap_or_else(|| panic!("{text}"))[1..6].to_vec()
    };
    // 8 query heads over 4 key/value heads; 172 columns and 512 rows are 3 and 8 units of 64.
    assert_eq!(rank("0"), ["0..3", "0..2", "2,", "1", "0..64"]);
    assert_eq!(rank("1"), ["3..6", "1..3", "1,", "2", "64..128"]);
    assert_eq!(rank("2"), ["6..8", "3..4", "2", "128..172", "320..512"]);
    for part in [
        "5 layers, 8 query and 4 key/value heads",
        "F32 on cpu",
        "prefix of 100 tokens, 8 rows of 412",
    ] {
        assert!(text.contains(part), "{part} is not in:\n{text}");
    }
    assert!(text.contains("slowest    rank 1 with 1."), "{text}");
    assert!(lines.iter().any(|line| line.first() == Some(&"all")), "{text}");
}

/// Fault 13.
#[test]
fn a_split_that_cannot_be_names_both_numbers() {
    for tp in ["0", "9", "1000"] {
        let output = plan(&stories(), &["--tp", tp]);
        assert_eq!(output.status.code(), Some(1));
        assert!(output.stdout.is_empty());
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(text.contains(&format!("tp = {tp} ")) && text.contains("8 query heads"), "{text}");
    }
    let output = plan(&stories(), &["--tp", "18446744073709551615"]);
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(1) && text.contains("8 query heads"), "{text}");
    let output = plan(&stories(), &["--max-batch-size", "18446744073709551615"]);
    assert_eq!(output.status.code(), Some(2));
    let output = plan(&stories(), &["--prefix-tokens", "100", "--max-seq-len", "413"]);
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("--max-seq-len 413") && text.contains("context of 512"), "{text}");
    let output = plan(&stories(), &["--prefix-tokens", "512"]);
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("--prefix-tokens 512") && text.contains("context of 512"), "{text}");
}

#[test]
fn stored_weights_decide_over_the_configuration() {
    let auto = json(&data("bf16"), &["--device", "cuda"]);
    assert_eq!((&auto["dtype"], &auto["kv_dtype"]), (&"BF16".into(), &"BF16".into()));
    let on_cpu = json(&data("bf16"), &["--device", "cpu", "--dtype", "bf16"]);
    assert_eq!((&on_cpu["dtype"], &on_cpu["kv_dtype"]), (&"BF16".into(), &"F32".into()));
    let dir = tempfile::tempdir().unwrap();
    let settings = dir.path().join("settings.toml");
    fs::write(&settings, "[plan]\ntp = 2\njson = true\n").unwrap();
    let report = stdout(&plan(&stories(), &["--config", settings.to_str().unwrap()]));
    let report: Value = serde_json::from_str(&report).unwrap();
    assert_eq!(report["ranks"].as_array().unwrap().len(), 2);
}

/// What is planned is what a loaded rank holds.
#[test]
fn planned_bytes_are_those_of_loaded_weights() {
    for (folder, kind, tp) in [
        ("stories260k", Kind::Float, 1),
        ("stories260k", Kind::Float, 3),
        ("untied", Kind::Float, 2),
        ("untied", Kind::BFloat16, 5),
        ("bf16", Kind::BFloat16, 2),
    ] {
        for tp_rank in 0..tp {
            let options =
                LoadOptions { device: Device::Cpu, kind, pack: false, nf4: false, tp_rank, tp };
            let model = load(&data(folder), &options);
            let mut bytes = 0;
            let mut add = |tensor: &tch::Tensor| {
                bytes += (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64;
            };
            let linears = model.layers().iter().flat_map(|layer| {
                [&layer.qkv_proj, &layer.o_proj, &layer.gate_up_proj, &layer.down_proj]
            });
            let tied = model.config().tie_word_embeddings;
            for linear in linears.chain((!tied).then_some(model.lm_head())) {
                let Weight::Dense(weight) = &linear.weight else { panic!("packed") };
                add(weight);
            }
            for layer in model.layers() {
                add(&layer.input_layernorm.weight);
                add(&layer.post_attention_layernorm.weight);
            }
            let width = model.config().hidden_size;
            let norm = width as u64 * 4;
            let embedding =
                (model.config().vocab_size * width) as u64 * kind.elt_size_in_bytes() as u64;
            let planned = Footprint::new(model.config(), model.plan(), &options);
            assert_eq!(planned.weight_bytes, bytes + norm + embedding, "{folder} rank {tp_rank}");
            if tied {
                let packed = Footprint::new(
                    model.config(),
                    model.plan(),
                    &LoadOptions { pack: true, ..options },
                );
                // One rank reads embeddings from its packed head.
                let rows = if tp == 1 { 0 } else { model.lm_head().weight.size().0 };
                assert_eq!(packed.weight_bytes - planned.weight_bytes, (rows * width * 4) as u64);
            }
        }
    }
}

#[test]
fn work_counts_what_a_token_multiplies() {
    let config = LlamaConfig::open(stories()).unwrap();
    let plan = Plan::new(&config, 1).unwrap();
    let whole = Footprint::new(&config, &plan, &LoadOptions::default());
    // Five layers of 64 wide, four key/value heads of eight, 172 columns; the head of 512 rows.
    let layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 172;
    assert_eq!(whole.linear_work, 5 * layer + 512 * 64);
    assert_eq!(whole.attention_work, 5 * 2 * 64);
    assert_eq!(whole.work(10), whole.linear_work + 10 * whole.attention_work);
    assert_eq!(whole.kv_bytes(3), 3 * 5 * 2 * 32 * 4);
    assert_eq!(Slowest::of(&[whole, whole], 0).unwrap().rank, 0);
    assert_eq!(Slowest::of(&[whole, whole], 0).unwrap().work_over_mean, 1.0);
    assert_eq!(Slowest::of(&[], 0), None);
}
