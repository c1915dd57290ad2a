//! Every tool that writes checkpoints, at two sizes: what it needs of memory is the same (soak).

use std::{
    fs,
    ops::ControlFlow,
    path::{Path, PathBuf},
    process::Command,
};

use dromedary_llama::{
    Adapter, Checkpoint, CheckpointWriter, ConvertOptions, DEFAULT_MAX_SHARD_SIZE, Dtype,
    LoraConfig, LoraPair, MergeOptions, QuantizeOptions, ShardOptions, TensorSpec, convert, merge,
    quantize, shard,
};
use serde_json::json;
use tch::{Kind, Tensor};

use crate::{given, hostile, tiny};

const DIR: &str = "STREAMING_DIR";
const TOOL: &str = "STREAMING_TOOL";
/// Above what the process has when it starts.
const MAX_GROWTH_KB: u64 = 300 * 1024;
const TOOLS: [&str; 6] = ["to-meta", "to-hf", "shard", "quantize", "merge", "merge-nf4"];

/// A checkpoint in bf16 of 122 MB a layer and 33 MB beside them.
fn write_model(dir: &Path, layers: i64) -> u64 {
    let mut config = tiny::config();
    for (key, value) in [
        ("hidden_size", 2048),
        ("intermediate_size", 8192),
        ("num_hidden_layers", layers),
        ("num_attention_heads", 16),
        ("num_key_value_heads", 4),
        ("head_dim", 128),
        ("vocab_size", 4000),
    ] {
        config[key] = json!(value);
    }
    let text = config.to_string();
    let spec = |(name, shape)| TensorSpec { name, dtype: Dtype::Bf16, shape };
    let specs: Vec<_> = tiny::shapes(&config).into_iter().map(spec).collect();
    let size = specs.iter().map(TensorSpec::size).sum();
    let mut writer = CheckpointWriter::create(dir, specs, DEFAULT_MAX_SHARD_SIZE).unwrap();
    writer.add_file("config.json", text.as_bytes()).unwrap();
    let noise = (tiny::noise(&[1 << 22], 9) * 0.03).to_kind(Kind::BFloat16);
    for TensorSpec { name, shape, .. } in writer.order().to_vec() {
        let columns = shape.get(1).copied().unwrap_or(1);
        let step = (noise.numel() as i64 / columns).min(shape[0]);
        for start in (0..shape[0]).step_by(step as usize) {
            let rows = step.min(shape[0] - start);
            let block = noise.narrow(0, 0, rows * columns);
            let block = if shape.len() == 1 { block + 1.0 } else { block.view([rows, columns]) };
            writer.append(&name, &block.to_kind(Kind::BFloat16)).unwrap();
        }
    }
    writer.finish().unwrap();
    size
}

fn write_adapter(base: &Path, dir: &Path) {
    let config = LoraConfig { r: 16, ..LoraConfig::default() };
    let modules = config.modules(Checkpoint::open(base).unwrap().config()).unwrap();
    let pair = |(module, [out, inner]): (String, [i64; 2])| {
        let (a, b) = (tiny::noise(&[16, inner], 3) * 0.01, tiny::noise(&[out, 16], 4) * 0.01);
        (module, LoraPair { lora_a: a, lora_b: b })
    };
    let tensors = modules.into_iter().map(pair).collect();
    Adapter { config, tensors }.save(dir).unwrap();
}

#[test]
fn memory_is_the_same_for_half_a_gigabyte_and_for_two() {
    if !given::soak() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut growth = Vec::new();
    for (layers, gigabytes) in [(4, 0.5), (16, 2.0)] {
        let folder = dir.path().join(layers.to_string());
        fs::create_dir(&folder).unwrap();
        let size = write_model(&folder.join("base"), layers);
        assert!((0.95..1.1).contains(&(size as f64 / 1e9 / gigabytes)), "{size} bytes");
        write_adapter(&folder.join("base"), &folder.join("adapter"));
        growth.push(TOOLS.map(|tool| measured(&folder, tool)));
    }
    for (number, tool) in TOOLS.iter().enumerate() {
        let (small, large) = (growth[0][number], growth[1][number]);
        eprintln!("{tool}: {small} kB at 0.5 GB, {large} kB at 2 GB");
        assert!(large < MAX_GROWTH_KB, "{tool}: {large} kB");
        assert!(small.abs_diff(large) * 10 <= small.max(large), "{tool}: {small} and {large} kB");
    }
}

/// How much memory a tool needs, in a process of its own, in kB.
fn measured(folder: &Path, tool: &str) -> u64 {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "--nocapture", "streaming::run_and_measure"])
        .envs([(DIR, folder.as_os_str()), (TOOL, tool.as_ref())])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    let grown = said.lines().find_map(|line| line.strip_prefix("grew by "));
    grown.unwrap().strip_suffix(" kB").unwrap().parse().unwrap()
}

#[test]
#[ignore = "a child of memory_is_the_same_for_half_a_gigabyte_and_for_two"]
fn run_and_measure() {
    // Unset where somebody asks for all ignored tests: its parent is among them.
    let Some(dir) = std::env::var_os(DIR).map(PathBuf::from) else { return };
    let tool = std::env::var(TOOL).unwrap();
    tch::set_num_threads(1);
    let at = |name: &str| dir.join(name);
    let mut go_on = |_| ControlFlow::Continue(());
    let convert_options = |from: &str, to: &str| ConvertOptions {
        checkpoint: at(from),
        output: at(to),
        num_shards: 4,
        max_shard_size: DEFAULT_MAX_SHARD_SIZE,
        tokenizer: None,
        max_position_embeddings: None,
        verify: true,
    };
    let merge_options = |from: &str, to: &str| MergeOptions {
        checkpoint: at(from),
        adapter: at("adapter"),
        output: at(to),
        max_shard_size: DEFAULT_MAX_SHARD_SIZE,
        verify: true,
    };
    let _: Tensor = Tensor::zeros([1], (Kind::Float, tch::Device::Cpu));
    let before = hostile::peak_rss_kb();
    let (checkpoint, max_shard_size, verify) = (at("base"), DEFAULT_MAX_SHARD_SIZE, true);
    let done = match tool.as_str() {
        "to-meta" => convert(&convert_options("base", "meta"), &mut go_on).map(drop),
        "to-hf" => convert(&convert_options("meta", "hf"), &mut go_on).map(drop),
        "shard" => {
            let options = ShardOptions { checkpoint, output: at("cut"), tp: 3, verify };
            shard(&options, &mut go_on).map(drop)
        }
        "quantize" => {
            let output = at("nf4");
            let options = QuantizeOptions { checkpoint, output, max_shard_size, verify };
            quantize(&options, &mut go_on).map(drop)
        }
        "merge" => merge(&merge_options("base", "merged"), &mut go_on).map(drop),
        _ => merge(&merge_options("nf4", "merged-nf4"), &mut go_on).map(drop),
    };
    done.unwrap();
    println!("grew by {} kB", hostile::peak_rss_kb() - before);
}
