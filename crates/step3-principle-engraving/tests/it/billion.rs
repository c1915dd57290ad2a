use std::{fs, path::Path, process::Command, time::Duration};

use dromedary_llama::{CheckpointWriter, Dtype, TensorSpec};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use crate::{
    given,
    job::{BINARY, Job},
    launched, memory,
};

/// Hidden size, feed-forward columns, layers, heads, K/V heads, and SmolLM2's vocabulary.
const SIZES: [i64; 6] = [2048, 5632, 18, 32, 8, 49_152];
const RANKS: usize = 2;
/// Numbers of a block of random weights.
const BLOCK: i64 = 4 << 20;
/// What all ranks together may take, in bytes.
const LIMIT: u64 = 20_000_000_000;
/// Against hanging; it takes one minute.
const LONG: Duration = Duration::from_secs(900);

/// Random weights in bf16, a block at a time.
fn write_model(dir: &Path) -> i64 {
    let config = memory::config(SIZES, false);
    let specs: Vec<_> = memory::shapes(&config)
        .into_iter()
        .map(|(name, shape)| TensorSpec { name, dtype: Dtype::Bf16, shape })
        .collect();
    let mut writer = CheckpointWriter::create(dir, specs, 1 << 30).unwrap();
    writer.add_file("config.json", config.to_string().as_bytes()).unwrap();
    tch::manual_seed(17);
    let mut count = 0;
    for TensorSpec { name, shape, .. } in writer.order().to_vec() {
        let width: i64 = shape[1..].iter().product();
        let mut rows = shape[0];
        count += rows * width;
        while rows > 0 {
            let block = rows.min(BLOCK / width);
            let size = [&[block], &shape[1..]].concat();
            let values = Tensor::randn(&size[..], (Kind::Float, Device::Cpu)) * 0.02;
            writer.append(&name, &values.to_kind(Kind::BFloat16)).unwrap();
            rows -= block;
        }
    }
    writer.finish().unwrap();
    count
}

/// Bytes of a rank's peak, planned or measured, as it has said them itself.
fn said_bytes(said: &str, rank: usize, what: &str) -> u64 {
    let of_rank = format!("rank={rank} ");
    let line = said.lines().find(|line| line.contains(&of_rank) && line.contains(what));
    let line = line.unwrap_or_else(|| panic!("rank {rank} says no {what}:\n{said}"));
    let megabytes = line.rsplit("megabytes=").next().unwrap().trim();
    megabytes.parse::<u64>().unwrap_or_else(|_| panic!("{line}")) << 20
}

/// Bytes of each rank, as `plan` tells them for the rows of the run.
fn planned(dir: &Path, metrics: &[Value]) -> Vec<u64> {
    let most = |key: &str| metrics.iter().map(|step| step[key].as_u64().unwrap()).max().unwrap();
    let (tokens, targets) = (most("tokens"), most("targets"));
    let learned = (targets as f64 / tokens as f64).to_string();
    let output = Command::new(BINARY)
        .args(["plan", "--json", "--gflops", "1", "--tp", &RANKS.to_string()])
        .args(["--max-row-tokens", &tokens.to_string(), "--learned", &learned])
        .arg("--checkpoint")
        .arg(dir)
        .output()
        .unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let total = |parts: &Value| -> u64 {
        parts.as_object().unwrap().values().map(|bytes| bytes.as_u64().unwrap()).sum()
    };
    report["ranks"].as_array().unwrap().iter().map(total).collect()
}

/// Each rank takes what `plan` says of it, the one that writes the checkpoint and the adapter included.
#[test]
fn a_billion_parameters_train_on_two_ranks_in_the_planned_memory() {
    if !given::soak() {
        return;
    }
    let Some(tokenizer) = given::smollm2() else { return };
    let job = Job::new(0);
    let (base, out) = (job.path("base"), job.path("out"));
    let count = write_model(&base);
    assert!((1_000_000_000..1_050_000_000).contains(&count), "{count}");
    let row = |id: u64| {
        let text = format!("Tell a story about {id} cats. ").repeat(12);
        json!({ "example_id": id, "instruction": text, "input": "", "output": text })
    };
    fs::write(job.path("sft.json"), json!([row(1), row(2)]).to_string()).unwrap();

    let mut command = launched::mpirun();
    command.args(["-n", &RANKS.to_string(), BINARY, "train", "--threads", "1"]);
    command.args(["--max-steps", "2", "--gradient-accumulation-steps", "1"]);
    command.arg("--checkpoint").arg(&base).arg("--tokenizer").arg(tokenizer);
    command.arg("--dataset").arg(job.path("sft.json"));
    command.arg("--meta-prompt-pattern").arg(job.path("dromedary_*prompt_distill.txt"));
    command.arg("--output-dir").arg(&out);
    let end = launched::start(command, &[("RUST_LOG", "info")]).end(LONG);
    end.assert_success();

    let metrics = job.metrics("out");
    assert_eq!(metrics.len(), 2);
    assert!(metrics.iter().all(|step| step["loss"].as_f64().unwrap().is_finite()));
    let mut all = 0;
    for (rank, planned) in planned(&base, &metrics).into_iter().enumerate() {
        let took = said_bytes(&end.said, rank, "peak memory");
        let off = took as f64 / planned as f64 - 1.0;
        eprintln!("rank {rank}: planned {planned}, took {took}: {off:+.3}");
        assert!(off.abs() < 0.1, "rank {rank}: planned {planned}, took {took}");
        let said = said_bytes(&end.said, rank, "planned memory");
        assert!(said.abs_diff(planned) < 2 << 20, "rank {rank}: {said}, not {planned}");
        all += took;
    }
    assert!(all < LIMIT, "{all} bytes");
}
