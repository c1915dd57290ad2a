use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use dromedary_llama::{Checkpoint, Llama, LoadOptions};
use dromedary_parallel::SingleProcess;
use dromedary_tokenizer::Tokenizer;
use serde_json::{Value, json};

use crate::{
    job::{BINARY, Job, computed, file, stderr, succeeded},
    support::stories260k,
};

/// Six steps at once against three steps, and three more in another process.
#[track_caller]
fn resumes_to_the_same_bits(flags: &[&str], result: &str) {
    let job = Job::new(12);
    let flags = [&["--max-steps", "6", "--save-steps", "3"], flags].concat();
    succeeded(job.train("whole", &flags));
    succeeded(job.train("cut", &flags));
    fs::remove_dir_all(job.path("cut/checkpoint-6")).unwrap();
    fs::remove_dir_all(job.path("cut").join(result)).unwrap();
    succeeded(job.train("cut", &flags));
    let steps = |dir| job.metrics(dir).iter().map(computed).collect::<Vec<_>>();
    assert_eq!(steps("whole"), steps("cut"));
    let name = "checkpoint-6/optimizer.safetensors";
    assert!(file(&job.path("whole"), name) == file(&job.path("cut"), name));
}

#[test]
fn dropout_goes_on_with_the_masks_it_would_have_had() {
    resumes_to_the_same_bits(&["--lora-dropout", "0.1"], "adapter");
}

#[test]
fn all_weights_go_on_as_they_were() {
    resumes_to_the_same_bits(&["--full-finetune", "true", "--learning-rate", "1e-3"], "model");
    let bf16 = ["--full-finetune", "true", "--learning-rate", "1e-3", "--dtype", "bf16"];
    resumes_to_the_same_bits(&bf16, "model");
}

#[test]
fn all_weights_are_trained_into_a_model_that_loads() {
    let job = Job::new(12);
    let flags = ["--full-finetune", "true", "--learning-rate", "1e-3", "--num-train-epochs", "3"];
    succeeded(job.train("out", &flags));
    let metrics = job.metrics("out");
    let (first, last) = (computed(&metrics[0]).1, computed(metrics.last().unwrap()).1);
    assert!(last < 0.7 * first, "{first} {last}");
    let logits = |dir| {
        let checkpoint = Checkpoint::open(dir).unwrap();
        let options = LoadOptions { pack: false, ..LoadOptions::default() };
        let model = Llama::load(&checkpoint, &options).unwrap();
        model.forward_logits(&[1, 403, 407, 261], &SingleProcess).unwrap()
    };
    let changed = (logits(job.path("out/model")) - logits(stories260k())).abs().max();
    assert!(changed.double_value(&[]) > 0.1);
    assert!(!job.path("out/adapter").exists());
}

#[test]
fn a_trained_model_has_the_tokenizer_that_it_was_trained_with() {
    let job = Job::new(4);
    let base = job.path("base");
    fs::create_dir(&base).unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(stories260k().join(name), base.join(name)).unwrap();
    }
    let whole = stories260k();
    for (dir, tokenizer) in [("of-folder", whole.clone()), ("of-file", Tokenizer::file(&whole))] {
        let tokenizer = tokenizer.to_str().unwrap();
        let flags = ["--full-finetune", "true", "--max-steps", "1", "--tokenizer", tokenizer];
        succeeded(job.train_on(base.to_str().unwrap(), dir, &flags));
        let own = Tokenizer::open(job.path(dir).join("model")).unwrap();
        let text = "Once upon a time";
        assert_eq!(own.encode(text), Tokenizer::open(&whole).unwrap().encode(text));
    }
}

#[test]
fn activations_change_memory_and_nothing_else() {
    let job = Job::new(12);
    let steps = |dir: &str, flags: &[&str]| {
        succeeded(job.train(dir, &[&["--max-steps", "4"], flags].concat()));
        job.metrics(dir).iter().map(computed).collect::<Vec<_>>()
    };
    let recomputed = steps("recompute", &[]);
    assert_eq!(recomputed, steps("keep", &["--activations", "keep"]));
    assert_eq!(recomputed, steps("auto", &["--activations", "auto", "--max-memory", "1GB"]));
    assert_eq!(recomputed, steps("switch", &["--gradient-checkpointing", "False"]));
    let refused = job.train("small", &["--activations", "auto", "--max-memory", "1MB"]);
    assert!(!refused.status.success());
    assert!(stderr(&refused).contains("--max-memory: 0.00 GB, but"), "{}", stderr(&refused));
}

#[test]
fn settings_that_would_be_ignored_are_refused() {
    let job = Job::new(4);
    let settings = job.path("settings.toml");
    let text = "[train]\ngradient_checkpointing = true\nresume_from_training = true\n";
    fs::write(&settings, text).unwrap();
    let settings = settings.to_str().unwrap();
    for (flags, message) in [
        (&["--full-finetune", "true", "--lora-dropout", "0.1"][..], "--full-finetune"),
        (&["--max-memory", "1GB"][..], "--activations auto"),
        (&["--lora-dropout", "1"][..], "--lora-dropout"),
        (&["--activations", "keep", "--gradient-checkpointing", "true"][..], "cannot be used"),
        (&["--dtype", "f32", "--bf16", "true"][..], "--bf16 says otherwise than --dtype f32"),
        (&["--dtype", "bf16", "--fp16", "true"][..], "--fp16 says otherwise than --dtype bf16"),
        (&["--bf16", "true", "--fp16", "true"][..], "give one of them"),
        (&["--config", settings, "--activations", "keep"][..], "--gradient-checkpointing says"),
        (&["--config", settings, "--resume", "never"][..], "--resume-from-training says"),
    ] {
        let refused = job.train("out", flags);
        assert_eq!(refused.status.code(), Some(2), "{flags:?}");
        assert!(stderr(&refused).contains(message), "{}", stderr(&refused));
    }
}

#[test]
fn settings_of_adapters_are_said_to_be_ignored_where_weights_are_trained() {
    let job = Job::new(4);
    let lora = ["--lora-alpha", "8", "--use-rslora", "true", "--dtype", "bf16", "--bf16", "true"];
    let run =
        job.train("out", &[&["--full-finetune", "true", "--max-steps", "1"], &lora[..]].concat());
    let text = stderr(&run);
    succeeded(run);
    for flag in ["--lora-r", "--lora-alpha", "--use-rslora"] {
        assert!(text.contains(&format!("{flag} is ignored")), "{flag}: {text}");
    }
    assert!(!text.contains("--lora-modules"), "{text}");
}

fn plan(flags: &[&str]) -> Output {
    let mut command = Command::new(BINARY);
    command.arg("plan").arg("--checkpoint").arg(stories260k().join("config.json")).args(flags);
    command.output().unwrap()
}

#[test]
fn a_plan_comes_from_a_config_alone() {
    let json = |flags: &[&str]| -> Value {
        let output = plan(&[flags, &["--json", "--gflops", "100"]].concat());
        assert!(output.status.success(), "{}", stderr(&output));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let report = json(&["--rows", "100", "--row-tokens", "40", "--num-train-epochs", "2"]);
    assert_eq!((&report["steps"], &report["tokens"]), (&Value::from(14), &Value::from(8000)));
    let parts: u64 =
        report["memory"].as_object().unwrap().values().map(|part| part.as_u64().unwrap()).sum();
    assert_eq!(report["total_bytes"].as_u64(), Some(parts));
    // m and v of r 64 on all linear layers, two f32 numbers each.
    let trained = 5 * 64 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 172));
    assert_eq!(report["memory"]["moments"], Value::from(trained * 8));
    let hours = |report: &Value| report["hours"].as_f64().unwrap();
    let flops = report["flops"].as_f64().unwrap();
    assert!((hours(&report) - flops / (0.8 * 100e9) / 3600.0).abs() < 1e-12);
    assert!(hours(&json(&["--activations", "keep"])) < hours(&json(&[])));
    assert_eq!(json(&["--activations", "keep"])["kept_layers"], Value::from(5));

    let table = plan(&[]);
    let table = String::from_utf8(table.stdout).unwrap();
    for part in ["weights", "adapter", "gradients", "m and v", "activations", "head", "hours"] {
        assert!(table.contains(part), "{table}");
    }
    let refused = plan(&["--activations", "auto", "--max-memory", "1MB"]);
    assert!(!refused.status.success() && stderr(&refused).contains("are needed"));
}

/// `plan` of LLaMA-2-70B.
fn plan_70b(flags: &[&str]) -> Output {
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/llama/llama2-70b");
    let mut command = Command::new(BINARY);
    command.arg("plan").arg("--checkpoint").arg(config).args(["--gflops", "1e5"]).args(flags);
    command.output().unwrap()
}

fn report_70b(flags: &[&str]) -> Value {
    let output = plan_70b(&[flags, &["--json"]].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The original's run, 8 replicas in four bits, and one model over 8 ranks in 16 bits.
#[test]
fn a_plan_tells_each_ranks_memory() {
    let report = |flags: &[&str]| report_70b(&[flags, &["--device", "cpu"]].concat());
    let bytes = |memory: &Value, part: &str| memory[part].as_f64().unwrap();
    let qlora = report(&["--dp", "8", "--bits", "4", "--dtype", "bf16"]);
    assert_eq!(qlora["ranks"].as_array().unwrap().len(), 1);
    // 80 layers of 2 x 8192 x 8192 + 2 x 8192 x 1024 + 3 x 8192 x 28672 numbers in 4.127 bits, embedding
    // and head of 32000 x 8192 in 16 bits each, norms in 32.
    let linears = 80.0 * (2.0 * 8192.0 * 8192.0 + 2.0 * 8192.0 * 1024.0 + 3.0 * 8192.0 * 28672.0);
    let weights =
        linears * 4.126_953_125 / 8.0 + 2.0 * 2.0 * 32000.0 * 8192.0 + 161.0 * 4.0 * 8192.0;
    assert!((bytes(&qlora["memory"], "weights") / weights - 1.0).abs() < 1e-6);
    assert!(qlora["total_bytes"].as_f64().unwrap() < 80e9);
    let divided = report(&["--dp", "8", "--bits", "4", "--dtype", "bf16", "--shard-optimizer"]);
    let moments = |report: &Value| bytes(&report["memory"], "moments");
    assert_eq!(moments(&divided), moments(&qlora) / 8.0);
    assert_eq!(qlora["steps"], report(&["--gradient-accumulation-steps", "128"])["steps"]);

    let whole = report(&["--dtype", "bf16"]);
    let cut = report(&["--tp", "8", "--dtype", "bf16"]);
    let ranks = cut["ranks"].as_array().unwrap();
    assert_eq!(ranks.len(), 8);
    // Each rank holds the embedding, 1/8 of the linear layers and of the head, and the norms.
    let weights: f64 = ranks.iter().map(|rank| bytes(rank, "weights")).sum();
    let replicated = 7.0 * (2.0 * 32000.0 * 8192.0 + 161.0 * 4.0 * 8192.0);
    assert!((weights - bytes(&whole["memory"], "weights") - replicated).abs() < 1.0);
    assert!(cut["total_bytes"].as_f64().unwrap() < 80e9);
    for refused in [["--tp", "65"], ["--tp", "0"], ["--bits", "3"], ["--device", "gpu"]] {
        assert!(!plan_70b(&refused).status.success(), "{refused:?}");
    }
}

/// `train` dequantises a base in four bits on a GPU, which need not be here to be planned for.
#[test]
fn a_plan_of_a_gpu_has_no_four_bits() {
    let flags = ["--tp", "8", "--bits", "4", "--dtype", "bf16", "--device"];
    let on = |device| report_70b(&[&flags[..], &[device]].concat());
    let weights = |report: &Value| report["memory"]["weights"].as_u64().unwrap();
    let (cpu, gpu) = (on("cpu"), on("cuda:1"));
    assert!(weights(&cpu) < 6_000_000_000, "{cpu}");
    let dense = report_70b(&["--tp", "8", "--dtype", "bf16", "--device", "cuda"]);
    assert_eq!(gpu["memory"], dense["memory"]);
    assert!((17_000_000_000..18_000_000_000).contains(&weights(&gpu)), "{gpu}");
    for (report, [device, nf4, dequantised]) in [
        (cpu, [json!("cpu"), json!(true), json!(false)]),
        (gpu, [json!("cuda"), json!(false), json!(true)]),
    ] {
        assert_eq!(
            [&report["device"], &report["nf4"], &report["dequantised"]],
            [&device, &nf4, &dequantised]
        );
    }
    let table = plan_70b(&[&flags[..], &["cuda"]].concat()).stdout;
    let table = String::from_utf8(table).unwrap();
    assert!(table.starts_with("kept as      BF16 on cuda\n"), "{table}");
    assert!(table.contains("dequantised: four bits are kept on a CPU alone"), "{table}");
}

#[test]
fn a_plan_takes_the_file_of_train() {
    let settings =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/step3_llama2_70b.toml");
    let settings = settings.to_str().unwrap();
    let of_file = |path: &str, more: &[&str]| {
        report_70b(&[&["--config", path, "--device", "cpu"], more].concat())
    };
    let told = [
        ["--bits", "4"],
        ["--dtype", "bf16"],
        ["--max-row-tokens", "1024"],
        ["--per-device-train-batch-size", "4"],
        ["--gradient-accumulation-steps", "4"],
        ["--device", "cpu"],
    ];
    assert_eq!(of_file(settings, &[]), report_70b(&told.concat()));
    // What the README says of 8 GPUs of 80 GB.
    let all = |flags: &[&str]| {
        let of_file = report_70b(&[&["--config", settings], flags].concat());
        of_file["total_bytes"].as_u64().unwrap()
    };
    let room = 80_000_000_000;
    assert!(all(&["--dp", "8", "--device", "cpu"]) < room);
    assert!(all(&["--dp", "8", "--device", "cuda"]) > 2 * room);
    assert!(all(&["--tp", "8", "--device", "cuda"]) < room);

    // Flags win over [plan], which wins over [train]; what is misspelt is named.
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("both.toml");
    let written = |text: &str| fs::write(&file, text).unwrap();
    let file_name = file.to_str().unwrap();
    written("[train]\nlora_r = 4\ntp = 2\nseed = 3\nfp16 = true\n[plan]\ntp = 4\n");
    let flags = ["--lora-r", "4", "--dtype", "f16", "--device", "cpu", "--tp"];
    let with_tp = |tp| report_70b(&[&flags[..], &[tp]].concat());
    assert_eq!(of_file(file_name, &[]), with_tp("4"));
    assert_eq!(of_file(file_name, &["--tp", "8"]), with_tp("8"));
    written("[train]\nlora_rr = 4\n");
    let refused = plan_70b(&["--config", file_name]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(stderr(&refused).contains("unknown key lora_rr, did you mean lora_r?"));
    // Nothing is ignored in silence.
    let refused = plan_70b(&["--chat-date", "2024-07-26"]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(stderr(&refused).contains("--chat-date"), "{}", stderr(&refused));
}
