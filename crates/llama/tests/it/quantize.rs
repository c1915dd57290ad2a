//! `llama quantize`: NF4 against what bitsandbytes made of the same weights.

use std::{
    collections::BTreeMap,
    fs,
    ops::ControlFlow,
    path::{Path, PathBuf},
    process::Command,
};

use dromedary_llama::{
    Checkpoint, DEFAULT_MAX_SHARD_SIZE, Error, LoadOptions, MergeOptions, Plan, QuantizeOptions,
    QuantizeReport, Weight, merge, quantize,
};
use dromedary_parallel::SingleProcess;
use serde_json::{Value, json};
use tch::{Kind, Tensor};

use crate::{
    adapter, hostile, support,
    tiny::{self, Tiny, assert_same},
};

fn options(from: &Path, to: &Path) -> QuantizeOptions {
    QuantizeOptions {
        checkpoint: from.to_path_buf(),
        output: to.to_path_buf(),
        max_shard_size: DEFAULT_MAX_SHARD_SIZE,
        verify: true,
    }
}

pub(crate) fn run(from: &Path, to: &Path) -> dromedary_llama::Result<QuantizeReport> {
    quantize(&options(from, to), &mut |_| ControlFlow::Continue(()))
}

fn tensors(path: &Path) -> BTreeMap<String, Tensor> {
    Tensor::read_safetensors(path).unwrap().into_iter().collect()
}

/// A model of one layer whose weight `name` has this shape, and other sizes that fit.
fn model_with(name: &str, weight: &Tensor) -> Tiny {
    let (rows, columns) = weight.size2().unwrap();
    let mut config = tiny::config();
    for (key, value) in
        [("hidden_size", columns), ("intermediate_size", rows), ("num_hidden_layers", 1)]
    {
        config[key] = json!(value);
    }
    let mut model = Tiny::of(config, 5).stored_as(weight.kind());
    assert_eq!(model.tensors[name].size(), weight.size());
    model.tensors.insert(name.into(), weight.shallow_clone());
    model
}

#[test]
fn codes_scales_and_offset_are_those_of_bitsandbytes() {
    let golden = tensors(&support::data("nf4").join("golden.safetensors"));
    let name = "model.layers.0.mlp.gate_proj.weight";
    for case in ["float32", "float16", "bfloat16", "short", "zeros", "edges", "equal"] {
        let want = |part: &str| golden[&format!("{case}.{part}")].shallow_clone();
        let base = model_with(name, &want("weight")).single();
        let to = base.path().join("nf4");
        let report = run(base.path(), &to).unwrap();
        assert_eq!(report.quantised, 7);
        let got = tensors(&to.join("model.safetensors"));
        assert_same(&got[name], &want("codes"));
        for part in ["absmax", "nested_absmax"] {
            assert!(got[&format!("{name}.{part}")] == want(part), "{case}: {part}");
        }
        for map in ["quant_map", "nested_quant_map"] {
            assert_same(&got[&format!("{name}.{map}")], &golden[map]);
        }
        let state = Vec::<u8>::try_from(&got[&format!("{name}.quant_state.bitsandbytes__nf4")]);
        let state: Value = serde_json::from_slice(&state.unwrap()).unwrap();
        let offset = f64::try_from(want("offset").get(0)).unwrap();
        assert_eq!(state["nested_offset"].as_f64(), Some(offset), "{case}");

        let checkpoint = Checkpoint::open(&to).unwrap();
        assert!(checkpoint.is_quantised(name) && !checkpoint.is_quantised("lm_head.weight"));
        assert_same(&checkpoint.read(name).unwrap(), &want("dequantised"));
        assert_same(&checkpoint.read("lm_head.weight").unwrap(), &base.tensors["lm_head.weight"]);
    }
}

#[test]
fn any_rank_reads_its_slices_alone() {
    let base = Tiny::new(41).sharded(2);
    let to = base.path().join("nf4");
    run(base.path(), &to).unwrap();
    let checkpoint = Checkpoint::open(&to).unwrap();
    for tp in [1, 2, 3, 5, 6] {
        let plan = Plan::new(checkpoint.config(), tp).unwrap();
        for rank in 0..tp {
            for spec in checkpoint.specs().unwrap() {
                let shard = plan.rank(rank).shard(&spec.name);
                let whole = checkpoint.read(&spec.name).unwrap();
                let want = match &shard {
                    dromedary_llama::Shard::Replicated => whole,
                    dromedary_llama::Shard::Rows(slice) => {
                        let range = slice.range();
                        whole.narrow(0, range.start, range.end - range.start)
                    }
                    dromedary_llama::Shard::Columns(slice) => {
                        let range = slice.range();
                        whole.narrow(1, range.start, range.end - range.start)
                    }
                };
                assert_same(&checkpoint.read_slice(&spec.name, &shard).unwrap(), &want);
            }
        }
    }
    // Rows are read alone: half of the rows, half of the codes.
    let before = checkpoint.counters();
    let name = "model.layers.0.mlp.up_proj.weight";
    let _ = checkpoint.read_rows(name, 0..tiny::FFN).unwrap();
    let all = checkpoint.counters().bytes_read - before.bytes_read;
    let _ = checkpoint.read_rows(name, 0..2).unwrap();
    assert!(checkpoint.counters().bytes_read - before.bytes_read - all < all);
}

#[test]
fn a_real_model_runs_from_four_bits_split_and_whole() {
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("nf4");
    let report = run(&support::stories(), &to).unwrap();
    let difference = report.difference.unwrap().largest;
    // What four bits cost this small model; 0 would mean that nothing was quantised.
    assert!((0.01..0.5).contains(&difference), "{difference}");
    let ids: Vec<u32> = (1..30).collect();
    let whole = support::load(&to, &LoadOptions::default());
    let want = whole.forward_logits(&ids, &SingleProcess).unwrap();
    let got = support::on_ranks(3, |comm| {
        support::Loaded::new(&to, comm).model.forward_logits(&ids, comm).unwrap()
    });
    assert!(support::difference(&got[0], &want) < 1e-5);
    let base = support::load(&support::stories(), &LoadOptions::default());
    let plain = base.forward_logits(&ids, &SingleProcess).unwrap();
    assert!((0.01..0.6).contains(&support::difference(&want, &plain)));
}

#[test]
fn an_adapter_is_merged_into_the_dequantised_base() {
    let base = Tiny::new(42).stored_as(Kind::BFloat16).single();
    let [adapter, nf4, merged] = ["adapter", "nf4", "merged"].map(|name| base.path().join(name));
    adapter::random(&base, 3, 7).save(&adapter).unwrap();
    run(base.path(), &nf4).unwrap();
    let options = MergeOptions {
        checkpoint: nf4.clone(),
        adapter,
        output: merged.clone(),
        max_shard_size: DEFAULT_MAX_SHARD_SIZE,
        verify: true,
    };
    merge(&options, &mut |_| ControlFlow::Continue(())).unwrap();
    let (nf4, merged) = (Checkpoint::open(&nf4).unwrap(), Checkpoint::open(&merged).unwrap());
    let factors = adapter::random(&base, 3, 7).tensors;
    for (module, pair) in &factors {
        let name = format!("{module}.weight");
        assert!(!merged.is_quantised(&name));
        let product = pair.lora_b.to_kind(Kind::Double).matmul(&pair.lora_a.to_kind(Kind::Double));
        let want = nf4.read(&name).unwrap().to_kind(Kind::Double) + product * (12.0 / 3.0);
        let got = merged.read(&name).unwrap();
        assert_eq!(got.kind(), Kind::BFloat16);
        let worst = f64::try_from(((got - &want).abs() / want.abs().clamp_min(0.5)).max()).unwrap();
        assert!(worst < 0.005, "{name}: {worst}");
    }
    let config: Value =
        serde_json::from_slice(&fs::read(merged.dir().join("config.json")).unwrap()).unwrap();
    assert!(config.get("quantization_config").is_none());
}

#[test]
fn damaged_and_foreign_descriptions_are_refused_by_name() {
    let base = Tiny::new(43).single();
    let to = base.path().join("nf4");
    run(base.path(), &to).unwrap();
    let again = run(&to, &base.path().join("again")).unwrap_err().to_string();
    assert!(again.contains("quantised already"), "{again}");

    let path = to.join("model.safetensors");
    let good = fs::read(&path).unwrap();
    let replace = |from: &str, with: &str| {
        assert_eq!(from.len(), with.len());
        let mut bytes = good.clone();
        let at = bytes.windows(from.len()).position(|part| part == from.as_bytes()).unwrap();
        bytes[at..at + from.len()].copy_from_slice(with.as_bytes());
        fs::write(&path, bytes).unwrap();
        Checkpoint::open(&to).map(|_| ()).unwrap_err().to_string()
    };
    for (from, with, expected) in [
        ("\"quant_type\":\"nf4\"", "\"quant_type\":\"fp4\"", "fp4"),
        ("\"blocksize\":64", "\"blocksize\":32", "32"),
        ("\"dtype\":\"float32\"", "\"dtype\":\"float64\"", "float64"),
        ("\"quant_type\"", "\"quant_tipe\"", "quant_type"),
        ("\"shape\":[12,", "\"shape\":[13,", "k_proj"),
    ] {
        let text = replace(from, with);
        assert!(text.contains(expected) && text.contains("_proj"), "{text}");
    }
    fs::write(&path, &good).unwrap();
    let config = to.join("config.json");
    let text = fs::read_to_string(&config).unwrap();
    for (from, with) in [("\"nf4\"", "\"fp4\""), ("\"bitsandbytes\"", "\"gptq\"")] {
        fs::write(&config, text.replace(from, with)).unwrap();
        let error = Checkpoint::open(&to).unwrap_err().to_string();
        assert!(error.contains("quantization_config"), "{error}");
    }
}

#[test]
fn the_program_quantises_and_prints_the_difference() {
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("nf4");
    let llama = |args: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_llama")).args(args).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    let (stories, to_text) = (support::stories(), to.to_str().unwrap());
    let args = ["quantize", "--checkpoint", stories.to_str().unwrap(), "--output", to_text];
    let (code, _, said) = llama(&args);
    assert_eq!(code, Some(2));
    assert!(said.contains("--nf4"), "{said}");
    let (code, printed, said) = llama(&[&args[..], &["--nf4"]].concat());
    assert_eq!(code, Some(0), "{said}");
    assert!(printed.starts_with("logits differ by "), "{printed}");
    let args = ["complete", "--checkpoint", to_text, "--prompt", "Once", "--max-gen-len", "8"];
    let (code, printed, said) = llama(&args);
    assert_eq!((code, printed.is_empty()), (Some(0), false), "{said}");
}

#[test]
fn what_stops_leaves_nothing() {
    let out = tempfile::tempdir().unwrap();
    let options = options(&support::stories(), &out.path().join("nf4"));
    for blocks in [1, 20] {
        let mut left = blocks;
        let stopped = quantize(&options, &mut |_| {
            left -= 1;
            if left == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        assert!(matches!(stopped, Err(Error::Interrupted)));
        assert_eq!(fs::read_dir(out.path()).unwrap().count(), 0);
    }
}

const MEMORY: &str = "QUANTIZE_MEMORY_DIR";

/// 140 MB of weights, the largest of them 32 MB.
#[test]
fn memory_does_not_grow_with_the_model() {
    let mut config = tiny::config();
    for (key, value) in [("hidden_size", 2000), ("intermediate_size", 4000), ("vocab_size", 1000)] {
        config[key] = json!(value);
    }
    let base = Tiny::of(config, 1).single();
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "--nocapture", "quantize::quantise_and_measure"])
        .env(MEMORY, base.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(said.contains("grew by"), "{said}");
}

#[test]
#[ignore = "a child of memory_does_not_grow_with_the_model"]
fn quantise_and_measure() {
    // Unset where somebody asks for all ignored tests: its parent is among them.
    let Some(base) = std::env::var_os(MEMORY).map(PathBuf::from) else { return };
    tch::set_num_threads(1);
    let before = hostile::peak_rss_kb();
    run(&base, &base.join("nf4")).unwrap();
    let grown = hostile::peak_rss_kb() - before;
    println!("grew by {grown} kB");
    assert!(grown < 110_000, "memory grew by {grown} kB");
}

/// Codes in memory stand for the same numbers as codes in the file, whichever rank holds which of them:
/// at these sizes blocks begin inside of rows, and rows inside of bytes.
#[test]
fn weights_that_stay_in_four_bits_are_the_dequantised_ones() {
    for (kind, seed) in [(Kind::Float, 43), (Kind::BFloat16, 44), (Kind::Half, 45)] {
        let base = Tiny::of(tiny::config(), seed).stored_as(kind).single();
        let to = base.path().join("nf4");
        run(base.path(), &to).unwrap();
        let names = linear_names(&Checkpoint::open(&to).unwrap());
        for tp in [1, 2, 3, 5] {
            for tp_rank in 0..tp {
                let options = LoadOptions { pack: false, tp_rank, tp, ..LoadOptions::default() };
                let dense = support::load(&to, &options);
                let kept = support::load(&to, &LoadOptions { nf4: true, ..options });
                assert!(kept.keeps_nf4() && !dense.keeps_nf4());
                for name in &names {
                    let [kept, dense] =
                        [&kept, &dense].map(|model| model.slice(name).unwrap().unwrap());
                    assert!(kept == dense, "{name} on rank {tp_rank} of {tp}");
                }
            }
        }
        let logits = |nf4, pack| {
            let model = support::load(&to, &LoadOptions { pack, nf4, ..LoadOptions::default() });
            model.forward_logits(&[1, 5, 9, 2], &SingleProcess).unwrap()
        };
        let off = (logits(true, false) - logits(false, false)).abs().max().double_value(&[]);
        assert!(off < 1e-5, "{off}");
        assert!(logits(true, true) == logits(false, true), "{kind:?}");
    }
}

fn linear_names(checkpoint: &Checkpoint) -> Vec<String> {
    checkpoint.names().filter(|name| checkpoint.is_quantised(name)).map(str::to_owned).collect()
}

/// Codes and scales take 4 + 8/64 + 32/(64 x 256) bits a number.
#[test]
fn weights_that_stay_in_four_bits_take_four_bits() {
    let mut config = tiny::config();
    for (key, value) in [("hidden_size", 512), ("intermediate_size", 1408), ("head_dim", 64)] {
        config[key] = json!(value);
    }
    let base = Tiny::of(config, 47).single();
    let to = base.path().join("nf4");
    run(base.path(), &to).unwrap();
    for tp in [1, 2] {
        let (mut bytes, mut numbers) = (0, 0);
        for tp_rank in 0..tp {
            let options = LoadOptions { nf4: true, tp_rank, tp, ..LoadOptions::default() };
            let model = support::load(&to, &options);
            for linear in model.layers().iter().flat_map(|layer| layer.linears()) {
                let Weight::Nf4(weight) = &linear.weight else { panic!("not in four bits") };
                let (rows, columns) = weight.size();
                bytes += weight.bytes();
                numbers += rows * columns;
            }
        }
        let bits = 8.0 * bytes as f64 / numbers as f64;
        assert!((4.126..4.14).contains(&bits), "{bits} bits at tp {tp}");
    }
}
