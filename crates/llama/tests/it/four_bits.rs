//! Generation from weights that stay in NF4, as `llama quantize` has stored them.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use dromedary_llama::{
    Checkpoint, Footprint, LoadOptions, Plan, Weight,
    generation::{EngineConfig, PrefixCache, Sampling},
};
use dromedary_parallel::{Communicator, SingleProcess};
use dromedary_tokenizer::Tokenizer;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    hostile::{memory_kb, peak_rss_kb},
    quantize,
    support::{self, Loaded, load, mpirun, on_ranks, request, stories},
    tiny::{self, Tiny},
};

/// A folder with the model in four bits, and its path.
fn four_bits(model: &Path) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("nf4");
    quantize::run(model, &to).unwrap();
    (dir, to)
}

/// Rows of several lengths behind one prefix, more than there are slots.
fn rows(dir: &Path, comm: &dyn Communicator, nf4: bool, sampling: &Sampling) -> Vec<String> {
    let loaded = Loaded::with(dir, comm, LoadOptions { nf4, ..LoadOptions::default() });
    assert_eq!(loaded.model.keeps_nf4(), nf4);
    let config = EngineConfig {
        max_batch_size: 3,
        max_seq_len: 96,
        max_gen_len: 40,
        sampling: sampling.clone(),
        ..EngineConfig::default()
    };
    let tokenizer = Tokenizer::open(dir).unwrap();
    let prefix = tokenizer.encode_with_bos("Once upon a time there was");
    let mut engine = loaded.engine(comm, config);
    engine.pin_prefix(&prefix).unwrap();
    let endings = [" a cat", " an old man who had", " Tim", " a big red", " the sun", " no one"];
    let requests = endings.iter().map(|ending| {
        let text = tokenizer.encode_with_bos(&format!("Once upon a time there was{ending}"));
        request(*ending, text)
    });
    let output = support::run(&mut engine, requests.collect());
    endings.iter().map(|ending| output.row(ending).text.clone()).collect()
}

/// The kernels multiply the same numbers in the same order, wherever they take them from.
#[test]
fn rows_are_those_of_the_dequantised_model() {
    let (_dir, nf4) = four_bits(&stories());
    let drawn = Sampling::nucleus(1.0, 0.95);
    for sampling in [Sampling::default(), drawn] {
        let want = rows(&nf4, &SingleProcess, false, &sampling);
        assert_eq!(rows(&nf4, &SingleProcess, true, &sampling), want);
        assert_ne!(rows(&stories(), &SingleProcess, false, &sampling), want);
        for tp in [2, 3] {
            for texts in on_ranks(tp, |comm| rows(&nf4, comm, true, &sampling)) {
                assert_eq!(texts, want, "tp {tp}");
            }
        }
    }
}

#[test]
fn a_kept_prefix_is_not_taken_for_that_of_weights_in_another_form() {
    let (dir, nf4) = four_bits(&stories());
    let cache = PrefixCache { dir: dir.path().join("prefixes"), model: "stories260k".into() };
    let taken = |keep: bool| {
        let options = LoadOptions { nf4: keep, ..LoadOptions::default() };
        let loaded = Loaded::with(&nf4, &SingleProcess, options);
        let mut engine = loaded.engine(&SingleProcess, EngineConfig::default());
        engine.pin_prefix_cached(&[1, 403, 407, 261], &cache).unwrap()
    };
    assert_eq!([true, true, false, false].map(taken), [false, true, false, true]);
}

fn complete(mut command: Command, checkpoint: &Path, more: &[&str]) -> Output {
    command.args(["complete", "--threads", "1", "--prompt", "Once upon a time"]);
    command.args(["--temperature", "0", "--max-gen-len", "40", "--checkpoint"]);
    command.arg(checkpoint).args(more).output().unwrap()
}

#[track_caller]
fn stdout(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn llama() -> &'static OsStr {
    env!("CARGO_BIN_EXE_llama").as_ref()
}

#[test]
fn a_checkpoint_in_four_bits_completes_as_it_is_stored() {
    let (_dir, nf4) = four_bits(&stories());
    let one = |more: &[&str]| complete(Command::new(llama()), &nf4, more);
    let kept = one(&[]);
    let said = String::from_utf8_lossy(&kept.stderr).into_owned();
    assert!(said.contains("nf4=true"), "{said}");
    let want = stdout(&kept);
    assert!(want.len() > 60, "{want}");
    let dequantised = one(&["--bits", "16"]);
    let said = String::from_utf8_lossy(&dequantised.stderr).into_owned();
    assert!(said.contains("nf4=false"), "{said}");
    assert_eq!(stdout(&dequantised), want);
    assert_eq!(stdout(&one(&["--bits", "4"])), want);
    // What is not packed is in 16 bits then; the numbers in four bits are the same.
    assert_eq!(stdout(&one(&["--dtype", "bf16"])), want);
    for ranks in [2, 3] {
        assert_eq!(stdout(&complete(mpirun(ranks, llama()), &nf4, &[])), want, "{ranks} ranks");
    }
}

#[test]
fn four_bits_of_what_is_not_stored_so_are_refused() {
    for (checkpoint, bits, part) in
        [(stories(), "4", "llama quantize"), (stories(), "8", "4 or 16")]
    {
        let output = complete(Command::new(llama()), &checkpoint, &["--bits", bits]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(&format!("--bits {bits}")) && said.contains(part), "{said}");
    }
}

fn planned(checkpoint: &Path, more: &[&str]) -> Value {
    let mut command = Command::new(llama());
    command.args(["plan", "--json", "--device", "cpu", "--checkpoint"]).arg(checkpoint).args(more);
    serde_json::from_str(&stdout(&command.output().unwrap())).unwrap()
}

#[test]
fn plan_counts_four_bits_where_they_stay() {
    let (dir, nf4) = four_bits(&stories());
    let loaded = load(&nf4, &LoadOptions { nf4: true, ..LoadOptions::default() });
    let wide = planned(&stories(), &[]);
    let weights = |report: &Value| report["total"]["weight_bytes"].as_u64().unwrap();
    let numbers: i64 = loaded
        .layers()
        .iter()
        .flat_map(|layer| layer.linears())
        .map(|linear| {
            let Weight::Nf4(weight) = &linear.weight else { panic!("not in four bits") };
            weight.size().0 * weight.size().1
        })
        .sum();
    let kept = planned(&nf4, &[]);
    assert_eq!(weights(&wide) - weights(&kept), 4 * numbers as u64 - loaded.nf4_bytes());
    assert_eq!((&kept["nf4"], &wide["nf4"]), (&json!(true), &json!(false)));
    assert_eq!(weights(&planned(&nf4, &["--bits", "16"])), weights(&wide));
    assert_eq!(weights(&planned(&stories(), &["--bits", "4"])), weights(&kept));
    // A configuration alone says so too.
    let config = dir.path().join("config.json");
    std::fs::copy(nf4.join("config.json"), &config).unwrap();
    assert_eq!(weights(&planned(&config, &[])), weights(&kept));
    let mut table = Command::new(llama());
    table.args(["plan", "--device", "cpu", "--checkpoint"]).arg(&nf4);
    assert!(stdout(&table.output().unwrap()).contains("linear layers in NF4"));
}

const MODEL: &str = "FOUR_BITS_MODEL";
const SMALL: &str = "FOUR_BITS_SMALL";

/// Hidden size, feed-forward columns, layers, width of keys and values.
const SIZES: [i64; 4] = [1024, 2816, 12, 128];

/// From loading to the last token no linear layer is there in another form than its codes.
#[test]
fn linear_layers_take_four_bits_at_the_peak_of_a_generation() {
    let [hidden, ffn, layers, kv] = SIZES;
    let mut config = tiny::config();
    for (key, value) in [
        ("hidden_size", hidden),
        ("intermediate_size", ffn),
        ("num_hidden_layers", layers),
        ("num_attention_heads", 16),
        ("num_key_value_heads", kv / 64),
        ("head_dim", 64),
        ("vocab_size", 512),
    ] {
        config[key] = json!(value);
    }
    config["tie_word_embeddings"] = json!(true);
    let base = Tiny::of(config, 53).single();
    let (_dir, nf4) = four_bits(base.path());
    let (_small_dir, small) = four_bits(&stories());
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "--nocapture", "four_bits::generate_and_measure"])
        .env(MODEL, &nf4)
        .env(SMALL, &small)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    let bits = said.lines().find_map(|line| line.split_once("bits of a number: "));
    let bits: f64 = bits.unwrap_or_else(|| panic!("{said}")).1.parse().unwrap();
    eprintln!("{bits:.3} bits");
    assert!((bits / 4.13 - 1.0).abs() < 0.1, "{bits} bits");
}

/// Two rows behind a prefix.
fn generate(dir: &Path) -> Loaded {
    let options = LoadOptions { nf4: true, ..LoadOptions::default() };
    let tokenizer = Tokenizer::open(stories()).unwrap();
    let loaded = Loaded { model: load(dir, &options), tokenizer };
    let config = EngineConfig {
        max_batch_size: 2,
        max_seq_len: 24,
        max_gen_len: 16,
        ..EngineConfig::default()
    };
    let mut engine = loaded.engine(&SingleProcess, config);
    let prefix: Vec<u32> = (3..11).collect();
    engine.pin_prefix(&prefix).unwrap();
    let rows = [20, 30].map(|token| request(token.to_string(), [&prefix[..], &[token]].concat()));
    assert_eq!(support::run(&mut engine, rows.to_vec()).finished.len(), 2);
    drop(engine);
    loaded
}

#[test]
#[ignore = "a child of linear_layers_take_four_bits_at_the_peak_of_a_generation"]
fn generate_and_measure() {
    let [Some(model), Some(small)] = [MODEL, SMALL].map(std::env::var_os) else {
        return;
    };
    tch::set_num_threads(2);
    // Code that is called for the first time, threads and their stacks.
    drop(generate(small.as_ref()));
    let before = memory_kb("VmRSS");
    let loaded = generate(model.as_ref());
    let [hidden, ffn, layers, kv] = SIZES;
    let frozen = layers * (2 * hidden * hidden + 2 * kv * hidden + 3 * ffn * hidden);
    let config = loaded.model.config();
    let options = LoadOptions { nf4: true, ..LoadOptions::default() };
    let cost = Footprint::new(config, &Plan::new(config, 1).unwrap(), &options);
    let others = cost.weight_bytes - loaded.model.nf4_bytes();
    let taken = (peak_rss_kb() - before) * 1024 - others - cost.kv_bytes(8 + 2 * 24);
    println!("bits of a number: {}", 8.0 * taken as f64 / frozen as f64);
    assert!(Checkpoint::open(model).unwrap().stores_nf4());
}
