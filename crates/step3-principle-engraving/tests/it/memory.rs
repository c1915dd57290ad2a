use std::{fs, path::Path, process::Command};

use dromedary_llama::{Checkpoint, Llama, LlamaConfig, LoadOptions, LoraConfig};
use dromedary_principle_engraving::{
    ActivationsMode, AdamWConfig, Error, Example, MemoryPlan, PlanInput, PlannedRank,
    PlannedTraining, Trained,
};
use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use crate::{
    job::{Job, stderr, succeeded},
    support,
};

const CASE: &str = "DROMEDARY_TEST_MEMORY_CASE";
const ROWS: usize = 4;

/// A model, what is trained of it, tokens of a row, layers that are kept.
struct Case {
    config: Value,
    training: PlannedTraining,
    row_tokens: usize,
    kept_layers: usize,
}

pub(crate) fn config(sizes: [i64; 6], tied: bool) -> Value {
    let [hidden, ffn, layers, heads, kv_heads, vocab] = sizes;
    json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu",
        "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": tied,
        "torch_dtype": "float32", "eos_token_id": 2
    })
}

/// Wide and deep, with and without groups, with a small and a large vocabulary.
fn case(number: usize) -> Case {
    let adapters = |r| PlannedTraining::Adapters(LoraConfig { r, ..LoraConfig::default() });
    match number {
        0 => Case {
            config: config([512, 1408, 8, 8, 8, 8192], true),
            training: adapters(32),
            row_tokens: 320,
            kept_layers: 8,
        },
        1 => Case {
            config: config([768, 2048, 6, 12, 4, 32_000], false),
            training: adapters(64),
            row_tokens: 256,
            kept_layers: 0,
        },
        _ => Case {
            config: config([320, 896, 20, 5, 1, 12_000], true),
            training: PlannedTraining::Weights,
            row_tokens: 192,
            kept_layers: 10,
        },
    }
}

fn planned(case: &Case, config: &LlamaConfig) -> u64 {
    let tokens = (ROWS * case.row_tokens) as u64;
    let input = PlanInput {
        config,
        kind: Kind::Float,
        training: case.training.clone(),
        tokens,
        targets: tokens / 2,
        kept_layers: case.kept_layers,
        rank: PlannedRank::default(),
    };
    MemoryPlan::new(&input).unwrap().total()
}

/// Names and shapes of a model's tensors.
pub(crate) fn shapes(config: &Value) -> Vec<(String, Vec<i64>)> {
    let size = |key: &str| config[key].as_i64().unwrap();
    let (hidden, ffn, vocab) = (size("hidden_size"), size("intermediate_size"), size("vocab_size"));
    let kv = hidden / size("num_attention_heads") * size("num_key_value_heads");
    let mut shapes = vec![
        ("model.embed_tokens".to_owned(), vec![vocab, hidden]),
        ("model.norm".to_owned(), vec![hidden]),
    ];
    if config["tie_word_embeddings"] != json!(true) {
        shapes.push(("lm_head".to_owned(), vec![vocab, hidden]));
    }
    for layer in 0..size("num_hidden_layers") {
        for (path, shape) in [
            ("input_layernorm", vec![hidden]),
            ("self_attn.q_proj", vec![hidden, hidden]),
            ("self_attn.k_proj", vec![kv, hidden]),
            ("self_attn.v_proj", vec![kv, hidden]),
            ("self_attn.o_proj", vec![hidden, hidden]),
            ("post_attention_layernorm", vec![hidden]),
            ("mlp.gate_proj", vec![ffn, hidden]),
            ("mlp.up_proj", vec![ffn, hidden]),
            ("mlp.down_proj", vec![hidden, ffn]),
        ] {
            shapes.push((format!("model.layers.{layer}.{path}"), shape));
        }
    }
    shapes.into_iter().map(|(module, shape)| (format!("{module}.weight"), shape)).collect()
}

/// A checkpoint of random numbers.
pub(crate) fn write_model(dir: &Path, config: &Value) {
    let buffers: Vec<_> = shapes(config)
        .into_iter()
        .map(|(name, shape)| {
            let tensor = Tensor::randn(&shape[..], (Kind::Float, Device::Cpu)) * 0.02;
            let mut bytes = vec![0; tensor.numel() * 4];
            tensor.copy_data_u8(&mut bytes, tensor.numel());
            let shape = shape.iter().map(|&size| size as usize).collect();
            (name, shape, bytes)
        })
        .collect();
    let views = buffers.iter().map(|(name, shape, bytes): &(String, Vec<usize>, Vec<u8>)| {
        (name, TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap())
    });
    serialize_to_file(views, None, &dir.join("model.safetensors")).unwrap();
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
}

#[test]
fn the_plan_is_within_ten_percent_of_the_measured_peak() {
    for number in 0..3 {
        let dir = tempfile::tempdir().unwrap();
        let case = case(number);
        write_model(dir.path(), &case.config);
        let planned = planned(&case, &LlamaConfig::open(dir.path()).unwrap());
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "memory::child", "--ignored", "--nocapture", "--test-threads", "1"])
            .env(CASE, format!("{number} {}", dir.path().display()))
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&child.stdout).into_owned();
        let peak = text.lines().find_map(|line| line.split("peak ").nth(1));
        let peak: u64 = peak.unwrap_or_else(|| panic!("{text}")).trim().parse().unwrap();
        let off = planned as f64 / peak as f64 - 1.0;
        eprintln!("case {number}: planned {planned}, measured {peak}, off by {off:.3}");
        assert!(off.abs() < 0.1, "case {number}: planned {planned}, measured {peak}");
    }
}

/// A number in the line of the log that has these words.
fn logged(log: &str, words: &str) -> f64 {
    let line = log.lines().find(|line| line.contains(words)).unwrap_or_else(|| panic!("{log}"));
    let number = line.split("megabytes=").nth(1).unwrap_or_else(|| panic!("{line}"));
    number.split_whitespace().next().unwrap().parse().unwrap()
}

/// Neither held-out rows, more of them in a batch than training has, nor a checkpoint that is gone on from take
/// more.
#[test]
fn a_whole_run_and_its_resumption_stay_within_the_plan() {
    let job = Job::new(8);
    let base = job.path("base");
    fs::create_dir(&base).unwrap();
    write_model(&base, &config([512, 1408, 8, 8, 8, 512], true));
    let rows = job.path("sft.json");
    let mut long: Vec<Value> = serde_json::from_slice(&fs::read(&rows).unwrap()).unwrap();
    for row in &mut long {
        row["output"] = json!("Once upon a time there were cats. ".repeat(40));
    }
    fs::write(&rows, serde_json::to_vec(&long).unwrap()).unwrap();
    let tokenizer = support::stories260k();
    let flags = ["--tokenizer", tokenizer.to_str().unwrap(), "--full-finetune", "true"];
    let held_out = ["--eval-dataset", rows.to_str().unwrap(), "--eval-steps", "1"];
    let steps = ["--max-steps", "2", "--save-steps", "1", "--target-max-len", "512"];
    let flags = [&flags[..], &held_out, &steps].concat();
    for goes_on in [false, true] {
        let run = job.train_on(base.to_str().unwrap(), "out", &flags);
        let log = stderr(&run);
        succeeded(run);
        assert_eq!(log.contains("going on behind step 1"), goes_on, "{log}");
        fs::remove_dir_all(job.path("out/checkpoint-2")).unwrap();
        let (planned, peak) = (logged(&log, "planned memory"), logged(&log, "peak memory"));
        let off = planned / peak - 1.0;
        eprintln!("planned {planned} MB, measured {peak} MB, off by {off:.3}");
        assert!(off.abs() < 0.1, "planned {planned} MB, measured {peak} MB: {log}");
    }
}

/// A process whose memory is measured.
#[test]
#[ignore = "another test starts it"]
fn child() {
    let case_and_dir = std::env::var(CASE).unwrap();
    let (number, dir) = case_and_dir.split_once(' ').unwrap();
    let case = case(number.parse().unwrap());
    tch::set_num_threads(2);
    let options = LoadOptions { pack: false, ..LoadOptions::default() };
    let mut model = Llama::load(&Checkpoint::open(dir).unwrap(), &options).unwrap();
    let adamw = AdamWConfig::default();
    let trained = match &case.training {
        PlannedTraining::Weights => Trained::take_weights(&mut model, adamw),
        PlannedTraining::Adapters(lora) => Trained::attach(&mut model, lora, adamw, 0),
    };
    let length = case.row_tokens;
    let examples: Vec<_> = (0..ROWS as u64)
        .map(|example_id| {
            let input_ids = (0..length as u32).map(|at| at * 7 % 8000 + 3).collect();
            Example::learned_from(example_id, input_ids, length / 2)
        })
        .collect();
    let mut trainer = support::trainer(&model, trained.unwrap(), &examples, case.kept_layers);
    for _ in 0..2 {
        trainer.train_step().unwrap();
    }
    println!("peak {}", peak());
}

/// The most memory that this process has held, in bytes.
pub(crate) fn peak() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    peak.split_whitespace().next().unwrap().parse::<u64>().unwrap() << 10
}

#[test]
fn auto_keeps_as_many_layers_as_fit_and_names_what_is_needed() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), config([512, 1408, 8, 8, 8, 8192], true).to_string())
        .unwrap();
    let config = LlamaConfig::open(dir.path()).unwrap();
    let input = PlanInput {
        config: &config,
        kind: Kind::Float,
        training: PlannedTraining::Adapters(LoraConfig::default()),
        tokens: 4096,
        targets: 2048,
        kept_layers: 0,
        rank: PlannedRank::default(),
    };
    let total =
        |kept_layers| MemoryPlan::new(&PlanInput { kept_layers, ..input.clone() }).unwrap().total();
    let auto = |memory| ActivationsMode::Auto.kept_layers(&input, Some(memory));
    // The one layer that is computed twice holds as much for the moment as one that is kept.
    assert!((1..7).all(|kept| total(kept) < total(kept + 1)) && total(7) == total(8));
    for kept in [0, 3, 8] {
        assert_eq!(auto(total(kept)).unwrap(), kept);
    }
    assert_eq!(auto(total(5) - 1).unwrap(), 4);
    let Err(error @ Error::Setting { .. }) = auto(total(0) - 1) else { panic!("it fits") };
    assert!(error.to_string().contains("GB are needed"), "{error}");
    assert_eq!(ActivationsMode::Keep.kept_layers(&input, None).unwrap(), 8);
    assert_eq!(ActivationsMode::Recompute.kept_layers(&input, None).unwrap(), 0);
}
