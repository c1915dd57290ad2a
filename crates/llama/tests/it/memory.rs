//! The memory of a generating process, measured in a process of its own, against the plan's.

use std::{ops::ControlFlow, path::Path, process::Command};

use dromedary_llama::{
    Checkpoint, Footprint, Llama, LoadOptions, Outline, Plan, Workload,
    generation::{Engine, EngineConfig, Sampling},
};
use dromedary_parallel::SingleProcess;
use dromedary_tokenizer::Tokenizer;
use serde_json::json;
use tch::{Device, Kind, Tensor};

use crate::{
    given::smollm2,
    hostile::{memory_kb, peak_rss_kb},
    quantize,
    support::{request, stories},
    tiny::{self, Tiny},
};

const MODEL: &str = "MEMORY_MODEL";
const WORKLOAD: &str = "MEMORY_WORKLOAD";

/// Runs a child of this program, and gives the numbers behind `said` in what it prints.
fn child(test: &str, model: &Path, workload: &Workload, said: &str) -> Vec<u64> {
    let Workload { prefix_tokens, max_batch_size, max_seq_len, .. } = *workload;
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "--nocapture", test])
        .env(MODEL, model)
        .env(WORKLOAD, format!("{prefix_tokens} {max_batch_size} {max_seq_len}"))
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    let line =
        text.lines().find_map(|line| line.split_once(said)).unwrap_or_else(|| panic!("{text}"));
    line.1.split_whitespace().map(|number| number.parse().unwrap()).collect()
}

/// What a child is to run; nothing where somebody asks for all ignored tests.
fn work() -> Option<(std::path::PathBuf, Workload)> {
    let model = std::env::var_os(MODEL)?.into();
    let numbers = std::env::var(WORKLOAD).unwrap();
    let numbers: Vec<u64> = numbers.split(' ').map(|number| number.parse().unwrap()).collect();
    let [prefix_tokens, max_batch_size, max_seq_len] = numbers[..] else { panic!("{numbers:?}") };
    Some((model, Workload { prefix_tokens, max_batch_size, max_seq_len, ..Workload::default() }))
}

/// Random rows that fill all slots to their ends; `each_step` is called once in each step.
fn fill(model: &Path, of: &Workload, max_gen_len: usize, each_step: impl FnMut()) {
    let mut each_step = each_step;
    let own = model.join("tokenizer.json").exists().then(|| model.to_owned());
    let tokenizer = Tokenizer::open(own.or_else(smollm2).unwrap()).unwrap();
    let checkpoint = Checkpoint::open(model).unwrap();
    let options = LoadOptions { nf4: checkpoint.stores_nf4(), ..LoadOptions::default() };
    let model = Llama::load(&checkpoint, &options).unwrap();
    let config = EngineConfig {
        max_batch_size: of.max_batch_size as usize,
        max_seq_len: of.max_seq_len as usize,
        max_gen_len,
        sampling: Sampling::nucleus(1.0, 0.95),
        ..EngineConfig::default()
    };
    let mut engine = Engine::new(&model, &tokenizer, &SingleProcess, config).unwrap();
    let vocab = model.config().vocab_size as u32;
    let random = |count: u64, seed: u32| -> Vec<u32> {
        (0..count as u32).map(|at| (at * 7919 + seed * 104_729) % (vocab - 3) + 3).collect()
    };
    let prefix = random(of.prefix_tokens, 1);
    engine.pin_prefix(&prefix).unwrap();
    engine.on_step(move || {
        each_step();
        Ok(())
    });
    let suffix = of.max_seq_len - max_gen_len as u64;
    let mut rows = (0..of.max_batch_size as u32)
        .map(|row| request(row.to_string(), [&prefix[..], &random(suffix, row + 2)].concat()));
    let statistics = engine.run(&mut || rows.next(), &mut |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(statistics.finished, of.max_batch_size);
}

/// Three shapes: a real model; wide and shallow, with all heads its own keys and a head of its own, also
/// with its linear layers in four bits; narrow and deep, with a large vocabulary that is its head too.
#[test]
fn planned_memory_is_what_a_run_takes() {
    // The random models read its tokenizer.
    let Some(smollm2) = smollm2() else { return };
    let of = |sizes: [i64; 7], tied: bool| {
        let [hidden, ffn, layers, heads, kv_heads, head_dim, vocab] = sizes;
        let mut config = tiny::config();
        for (key, value) in [
            ("hidden_size", hidden),
            ("intermediate_size", ffn),
            ("num_hidden_layers", layers),
            ("num_attention_heads", heads),
            ("num_key_value_heads", kv_heads),
            ("head_dim", head_dim),
            ("vocab_size", vocab),
            ("max_position_embeddings", 4096),
        ] {
            config[key] = json!(value);
        }
        config["tie_word_embeddings"] = json!(tied);
        Tiny::of(config, 5).single()
    };
    let wide = of([768, 3072, 4, 12, 12, 64, 50_000], false);
    let deep = of([320, 640, 24, 8, 2, 64, 64_000], true);
    let workload = |prefix_tokens, max_batch_size, max_seq_len| Workload {
        prefix_tokens,
        max_batch_size,
        max_seq_len,
        ..Workload::default()
    };
    let four_bits = wide.path().join("nf4");
    quantize::run(wide.path(), &four_bits).unwrap();
    let models = [
        (wide.path(), workload(100, 24, 300)),
        (&four_bits, workload(100, 24, 300)),
        (deep.path(), workload(1500, 40, 150)),
        (&smollm2, workload(500, 16, 200)),
    ];
    let mut worst = 0f64;
    for (dir, workload) in models {
        let Outline { config, nf4, .. } = Checkpoint::outline(dir).unwrap();
        let plan = Plan::new(&config, 1).unwrap();
        let options = LoadOptions { nf4, ..LoadOptions::default() };
        let footprint = Footprint::new(&config, &plan, &options);
        let planned = footprint.memory(&workload).peak_bytes / 1000;
        let took = child("memory::generate_and_measure", dir, &workload, "peak of ")[0];
        let off = took as f64 / planned as f64 - 1.0;
        println!("{workload:?}: planned {planned} kB, took {took} kB: {off:+.3}");
        worst = worst.max(off.abs());
    }
    assert!(worst < 0.1, "see above");
}

#[test]
#[ignore = "a child of planned_memory_is_what_a_run_takes"]
fn generate_and_measure() {
    let Some((model, workload)) = work() else { return };
    tch::set_num_threads(1);
    let product = Tensor::ones([64, 64], (Kind::Float, Device::Cpu));
    assert_eq!(f64::try_from(product.matmul(&product).max()).unwrap(), 64.0);
    let before = memory_kb("VmRSS");
    fill(&model, &workload, 12, || ());
    // The kernel's kB are of 1024 bytes.
    println!("peak of {}", (peak_rss_kb() - before) * 1024 / 1000);
}

#[test]
fn memory_does_not_grow_with_the_steps() {
    let workload =
        Workload { prefix_tokens: 64, max_batch_size: 4, max_seq_len: 440, ..Workload::default() };
    let child_test = "memory::generate_and_watch";
    let took = child(child_test, &stories(), &workload, "after steps ");
    let [early, late] = took[..] else { panic!("{took:?}") };
    // 300 steps; the smallest thing that could be kept of each, a row's logits, is 2 kB.
    assert!(late < early + 300, "{early} kB after 100 steps, {late} kB after 400");
}

#[test]
#[ignore = "a child of memory_does_not_grow_with_the_steps"]
fn generate_and_watch() {
    let Some((model, workload)) = work() else { return };
    tch::set_num_threads(1);
    let mut seen = Vec::new();
    fill(&model, &workload, 430, || seen.push(memory_kb("VmRSS")));
    println!("after steps {} {}", seen[100], seen[400]);
}
