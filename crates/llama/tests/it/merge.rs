//! Adapters merged into their base, by the library and by the program.

use std::{
    fs,
    ops::ControlFlow,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use dromedary_llama::{
    Checkpoint, DEFAULT_MAX_SHARD_SIZE, Error, MergeOptions, MergeReport, merge,
};
use serde_json::{Value, json};
use tch::{Kind, Tensor};

use crate::{
    adapter, hostile,
    tiny::{self, Tiny, assert_same},
};

struct Case {
    base: Tiny,
    adapter: PathBuf,
    output: PathBuf,
}

/// A base and an adapter for it, in one folder.
fn case(base: Tiny) -> Case {
    let [adapter, output] = ["adapter", "merged"].map(|name| base.path().join(name));
    adapter::random(&base, 3, 7).save(&adapter).unwrap();
    Case { base, adapter, output }
}

impl Case {
    fn options(&self) -> MergeOptions {
        MergeOptions {
            checkpoint: self.base.path().to_path_buf(),
            adapter: self.adapter.clone(),
            output: self.output.clone(),
            max_shard_size: DEFAULT_MAX_SHARD_SIZE,
            verify: true,
        }
    }

    fn run(&self) -> dromedary_llama::Result<MergeReport> {
        merge(&self.options(), &mut |_| ControlFlow::Continue(()))
    }

    /// Nothing but what the test itself put there.
    fn assert_nothing_left(&self) {
        for entry in fs::read_dir(self.base.path()).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            let known = ["adapter", "config.json", "model.safetensors"];
            assert!(known.contains(&name.as_str()), "{name} was left");
        }
    }
}

#[test]
fn merged_weights_are_base_plus_scaled_product() {
    for (kind, tolerance) in [(Kind::Float, 1e-6), (Kind::BFloat16, 0.005), (Kind::Half, 0.0007)] {
        let case = case(Tiny::new(3).stored_as(kind).single());
        fs::write(case.base.path().join("tokenizer.json"), "{}").unwrap();
        let report = case.run().unwrap();
        assert_eq!((report.tensors, report.merged), (case.base.tensors.len(), 14));
        let merged = Checkpoint::open(&case.output).unwrap();
        let factors = adapter::random(&case.base, 3, 7).tensors;
        for (name, base) in &case.base.tensors {
            let got = merged.read(name).unwrap();
            let Some(pair) = factors.get(name.strip_suffix(".weight").unwrap()) else {
                assert_same(&got, base);
                continue;
            };
            let product =
                pair.lora_b.to_kind(Kind::Double).matmul(&pair.lora_a.to_kind(Kind::Double));
            let expected = base.to_kind(Kind::Double) + product * (12.0 / 3.0);
            assert_eq!(got.kind(), kind);
            // Rounding of the stored type, and that of f32 sums whose terms cancel.
            let error = (got.to_kind(Kind::Double) - &expected).abs() - 1e-5;
            let worst = (error / expected.abs()).max().double_value(&[]);
            assert!(worst < tolerance, "{name}: {worst}");
        }
        for name in ["config.json", "tokenizer.json"] {
            let copy = fs::read(case.output.join(name)).unwrap();
            assert_eq!(copy, fs::read(case.base.path().join(name)).unwrap());
        }
        dromedary_files::Manifest::read(&case.output).unwrap().verify(&case.output).unwrap();
    }
}

#[test]
fn merged_weights_are_those_of_peft() {
    let dir = tempfile::tempdir().unwrap();
    let options = MergeOptions {
        checkpoint: crate::data().join("untied"),
        adapter: crate::data().join("peft_adapter"),
        output: dir.path().join("merged"),
        max_shard_size: DEFAULT_MAX_SHARD_SIZE,
        verify: true,
    };
    let report = merge(&options, &mut |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(report.merged, 6);
    let merged = Checkpoint::open(&options.output).unwrap();
    let golden = Tensor::read_safetensors(options.adapter.join("merged.safetensors")).unwrap();
    assert_eq!(golden.len(), 3);
    for (name, expected) in golden {
        let got = merged.read(&name).unwrap();
        let largest = expected.abs().max().double_value(&[]);
        let difference = (got - expected).abs().max().double_value(&[]);
        assert!(difference <= 1e-6 * largest, "{name}: {difference} of {largest}");
    }
}

#[test]
fn large_outputs_are_cut_into_files_with_an_index() {
    let case = case(Tiny::new(4).sharded(2));
    let options = MergeOptions { max_shard_size: 6000, ..case.options() };
    merge(&options, &mut |_| ControlFlow::Continue(())).unwrap();
    let index: Value = serde_json::from_slice(
        &fs::read(case.output.join("model.safetensors.index.json")).unwrap(),
    )
    .unwrap();
    let merged = Checkpoint::open(&case.output).unwrap();
    let files: Vec<_> = merged.files().map(Path::to_path_buf).collect();
    assert!(files.len() > 3);
    let mut total = 0;
    for (number, path) in files.iter().enumerate() {
        let name = format!("model-{:05}-of-{:05}.safetensors", number + 1, files.len());
        assert_eq!(path.file_name().unwrap().to_str().unwrap(), name);
        let bytes = fs::read(path).unwrap();
        let (header, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        assert!(metadata.data_len() <= 6000 && (header + 8).is_multiple_of(8));
        total += metadata.data_len();
    }
    assert_eq!(index["metadata"]["total_size"], json!(total));
    assert_eq!(index["weight_map"].as_object().unwrap().len(), case.base.tensors.len());
    dromedary_files::Manifest::read(&case.output).unwrap().verify(&case.output).unwrap();
}

#[test]
fn mixed_types_stay_as_they_are() {
    let mut base = Tiny::new(5).stored_as(Kind::BFloat16);
    for (name, tensor) in &mut base.tensors {
        if name.contains("norm") {
            *tensor = tensor.to_kind(Kind::Float);
        }
    }
    let case = case(base.single());
    case.run().unwrap();
    let merged = Checkpoint::open(&case.output).unwrap();
    for (name, tensor) in &case.base.tensors {
        assert_eq!(merged.dtype_of(name).unwrap(), tiny::dtype_of(tensor.kind()), "{name}");
    }
    // The file must also be one for readers that want aligned tensors.
    let bytes = fs::read(case.output.join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    for (name, view) in file.tensors() {
        let offset = view.data().as_ptr() as usize - bytes.as_ptr() as usize;
        assert_eq!(offset % (view.dtype().bitsize() / 8), 0, "{name}");
    }
}

#[test]
fn an_adapter_that_does_not_fit_writes_nothing() {
    let case = case(Tiny::new(6).single());
    let mut config = tiny::config();
    config["intermediate_size"] = json!(40);
    let other = Tiny::of(config, 6);
    fs::remove_dir_all(&case.adapter).unwrap();
    adapter::random(&other, 3, 7).save(&case.adapter).unwrap();
    let text = case.run().unwrap_err().to_string();
    for part in ["mlp.down_proj", "[3, 40]", "[14, 3]", "[14, 23]"] {
        assert!(text.contains(part), "{part} is not in: {text}");
    }
    case.assert_nothing_left();
}

#[test]
fn a_merge_that_stops_or_fails_leaves_nothing() {
    let case = case(Tiny::new(7).single());
    let mut blocks = 0;
    let error = merge(&case.options(), &mut |_| {
        blocks += 1;
        if blocks == 5 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert!(matches!(error, Err(Error::Interrupted)));
    case.assert_nothing_left();

    let weight = &case.base.tensors["model.layers.1.mlp.up_proj.weight"];
    let _ = weight.get(0).get(0).fill_(f64::NAN);
    tiny::write_file(&case.base.path().join("model.safetensors"), &case.base.tensors);
    let text = case.run().unwrap_err().to_string();
    assert!(text.contains("model.layers.1.mlp.up_proj.weight"), "{text}");
    case.assert_nothing_left();
}

#[test]
fn a_sum_that_overflows_its_type_is_an_error() {
    let base = Tiny::new(8).stored_as(Kind::Half);
    let name = "model.layers.0.self_attn.k_proj.weight";
    let _ = base.tensors[name].get(2).fill_(65_000.0);
    let case = case(base.single());
    // With these factors some element of the row grows beyond 65504.
    let mut config: Value =
        serde_json::from_slice(&fs::read(case.adapter.join("adapter_config.json")).unwrap())
            .unwrap();
    config["lora_alpha"] = json!(3000);
    fs::write(case.adapter.join("adapter_config.json"), config.to_string()).unwrap();
    let text = case.run().unwrap_err().to_string();
    assert!(text.contains(name) && text.contains("inf"), "{text}");
    case.assert_nothing_left();
}

#[test]
fn an_existing_folder_is_not_overwritten() {
    let case = case(Tiny::new(9).single());
    fs::create_dir(&case.output).unwrap();
    fs::write(case.output.join("mine"), "x").unwrap();
    let text = case.run().unwrap_err().to_string();
    assert!(text.contains("merged"), "{text}");
    assert_eq!(fs::read_to_string(case.output.join("mine")).unwrap(), "x");
}

const BASE: &str = "MERGE_MEMORY_BASE";

/// 190 MB of weights, one of them 100 MB.
#[test]
fn memory_does_not_grow_with_the_model() {
    let mut config = tiny::config();
    for (key, value) in [("hidden_size", 1000), ("intermediate_size", 3000), ("vocab_size", 25_000)]
    {
        config[key] = json!(value);
    }
    config["tie_word_embeddings"] = json!(true);
    let mut base = Tiny::of(config, 1);
    let embedding = base.tensors["model.embed_tokens.weight"].shallow_clone();
    assert_eq!(embedding.numel() * 4, 100_000_000);
    base.write_config();
    let case = case(base.single());
    base = case.base;
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "--nocapture", "merge::merge_and_measure"])
        .env(BASE, base.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("grew by"), "{text}");
    let merged = Checkpoint::open(&case.output).unwrap();
    assert_same(&merged.read("model.embed_tokens.weight").unwrap(), &embedding);
}

#[test]
#[ignore = "a child of memory_does_not_grow_with_the_model"]
fn merge_and_measure() {
    // Unset where somebody asks for all ignored tests: its parent is among them.
    let Some(base) = std::env::var_os(BASE).map(PathBuf::from) else { return };
    let before = hostile::peak_rss_kb();
    let options = MergeOptions {
        adapter: base.join("adapter"),
        output: base.join("merged"),
        checkpoint: base,
        max_shard_size: DEFAULT_MAX_SHARD_SIZE,
        // The comparison of logits is measured where all tools are, in streaming.rs.
        verify: false,
    };
    merge(&options, &mut |_| ControlFlow::Continue(())).unwrap();
    let grown = hostile::peak_rss_kb() - before;
    println!("grew by {grown} kB");
    assert!(grown < 90_000, "memory grew by {grown} kB");
}

fn llama(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_llama")).args(args).output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn the_program_merges_under_all_names_of_its_flags() {
    let case = case(Tiny::new(10).single());
    let base = case.base.path().to_str().unwrap();
    let adapter = case.adapter.to_str().unwrap();
    for (number, flags) in [
        ["--checkpoint", "--adapter", "--output"],
        ["--ckpt_dir", "--lora_weights", "--output_dir"],
        ["--base_model", "--lora-weights", "--output-dir"],
        ["--model_name_or_path", "--adapter", "--output"],
    ]
    .into_iter()
    .enumerate()
    {
        let out = case.base.path().join(format!("out{number}"));
        let out = out.to_str().unwrap();
        let output = llama(&["merge", flags[0], base, flags[1], adapter, flags[2], out]);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        assert!(output.stdout.starts_with(b"logits differ by "));
        assert_eq!(Checkpoint::open(out).unwrap().names().count(), case.base.tensors.len());
    }
}

#[test]
fn settings_come_from_a_file_and_are_printed_for_one() {
    let case = case(Tiny::new(11).single());
    let file = case.base.path().join("run.toml");
    let text = format!(
        "[merge]\ncheckpoint = {:?}\nadapter = {:?}\nmax_shard_size = '6KB'\n",
        case.base.path(),
        case.adapter
    );
    fs::write(&file, text).unwrap();
    let (file, out) = (file.to_str().unwrap(), case.output.to_str().unwrap());
    let printed = llama(&["merge", "--config", file, "--output", out, "--print-config"]);
    assert_eq!(printed.status.code(), Some(0), "{}", stderr(&printed));
    let second = case.base.path().join("printed.toml");
    fs::write(&second, &printed.stdout).unwrap();
    assert!(String::from_utf8_lossy(&printed.stdout).contains("max_shard_size = 6000"));
    assert!(!case.output.exists());
    let output = llama(&["merge", "--config", second.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(Checkpoint::open(out).unwrap().files().count() > 3);
}

#[test]
fn wrong_usage_is_2_and_failure_is_1() {
    let case = case(Tiny::new(12).single());
    let base = case.base.path().to_str().unwrap();
    let output = llama(&["merge", "--checkpoint", base]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("--adapter"), "{}", stderr(&output));
    let bad_size = ["merge", "--checkpoint", base, "--max-shard-size", "5 parsecs"];
    assert_eq!(llama(&bad_size).status.code(), Some(2));

    let out = case.output.to_str().unwrap();
    let output = llama(&["merge", "--checkpoint", base, "--adapter", base, "--output", out]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("adapter_config.json"), "{}", stderr(&output));
    assert_eq!(stderr(&output).lines().count(), 1, "{}", stderr(&output));
    case.assert_nothing_left();
}

#[test]
fn a_full_disk_is_a_clean_error() {
    let case = case(Tiny::new(13).single());
    // Files may not grow beyond 8 blocks of 512 or 1024 bytes, as the shell has it.
    let script =
        "ulimit -f 8; exec \"$0\" merge --checkpoint \"$1\" --adapter \"$2\" --output \"$3\"";
    let output = Command::new("sh")
        .args(["-c", script, env!("CARGO_BIN_EXE_llama")])
        .args([case.base.path(), &case.adapter, &case.output])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(stderr(&output).contains("merged/model.safetensors"), "{}", stderr(&output));
    case.assert_nothing_left();
}
