use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use dromedary_llama::{Checkpoint, Llama, LoadOptions};
use dromedary_principle_engraving::{AdamWConfig, Example, Trained};
use serde::Deserialize;

use crate::{
    goldens::{self, close_to_the_largest, relative, tensors},
    job::{Job, computed, file, stderr, succeeded},
    memory::{self, peak},
    support::{self, stories260k},
};

#[derive(Deserialize)]
struct Golden {
    loss: f64,
    grad_norm: f64,
    target_tokens: usize,
    losses: Vec<f64>,
    grad_norms: Vec<f64>,
}

fn load(dir: &Path, nf4: bool) -> Llama {
    tch::set_num_threads(1);
    let options = LoadOptions { pack: false, nf4, ..LoadOptions::default() };
    Llama::load(&Checkpoint::open(dir).unwrap(), &options).unwrap()
}

#[test]
fn loss_gradients_and_steps_are_those_of_bitsandbytes() {
    let golden: Golden =
        serde_json::from_slice(&fs::read(goldens::data().join("qlora/golden.json")).unwrap())
            .unwrap();
    let want = tensors("qlora/golden.safetensors");
    let examples = goldens::examples(&tensors("golden.safetensors"));
    let dir = tempfile::tempdir().unwrap();
    let base = support::quantised(&goldens::data().join("qlora/model"), &dir.path().join("nf4"));

    let (model, trained) = goldens::adapted(load(&base, true), "qlora/adapter");
    assert!(model.keeps_nf4());
    let mut trainer = goldens::trainer(&model, trained, &examples, (2, 1));
    let got = trainer.forward_backward().unwrap();
    assert_eq!(got.targets, golden.target_tokens);
    assert!(relative(got.loss, golden.loss) < 1e-5, "{} {}", got.loss, golden.loss);
    let optimizer = &trainer.trained().optimizer;
    assert!(relative(optimizer.grad_norm(), golden.grad_norm) < 1e-3);
    for (entry, of) in optimizer.entries().iter().enumerate() {
        close_to_the_largest(
            &optimizer.gradient(entry),
            &want[&format!("grad.{}", of.name)],
            1e-3,
            &of.name,
        );
    }

    // The weights before quantisation lead elsewhere.
    let (plain, trained) =
        goldens::adapted(load(&goldens::data().join("qlora/model"), true), "qlora/adapter");
    assert!(!plain.keeps_nf4());
    let loss =
        goldens::trainer(&plain, trained, &examples, (2, 1)).forward_backward().unwrap().loss;
    assert!(relative(loss, golden.loss) > 1e-3, "{loss} {}", golden.loss);
}

#[test]
fn steps_follow_bitsandbytes() {
    let golden: Golden =
        serde_json::from_slice(&fs::read(goldens::data().join("qlora/golden.json")).unwrap())
            .unwrap();
    let examples = goldens::examples(&tensors("golden.safetensors"));
    let dir = tempfile::tempdir().unwrap();
    let base = support::quantised(&goldens::data().join("qlora/model"), &dir.path().join("nf4"));
    let (model, trained) = goldens::adapted(load(&base, true), "qlora/adapter");
    let mut trainer = support::trainer(&model, trained, &examples, 0);
    for (loss, norm) in golden.losses.iter().zip(&golden.grad_norms) {
        let step = trainer.train_step().unwrap();
        assert!(relative(step.loss, *loss) < 1e-3, "{} {loss}", step.loss);
        assert!(relative(step.grad_norm, *norm) < 1e-2, "{} {norm}", step.grad_norm);
    }
}

/// `--bits 16` dequantises when it loads; the same numbers are multiplied either way.
#[test]
fn a_quantised_base_trains_as_the_dequantised_one() {
    let job = Job::new(12);
    let base = support::quantised(&stories260k(), &job.path("nf4"));
    let base = base.to_str().unwrap();
    let steps = |dir: &str, flags: &[&str]| {
        let output = job.train_on(base, dir, &[&["--max-steps", "4"], flags].concat());
        let text = stderr(&output);
        succeeded(output);
        assert_eq!(text.contains("in four bits"), !flags.contains(&"16"), "{text}");
        job.metrics(dir).iter().map(computed).collect::<Vec<_>>()
    };
    let kept = steps("kept", &[]);
    assert_eq!(kept, steps("asked-for", &["--bits", "4"]));
    assert_eq!(kept, steps("dequantised", &["--bits", "16"]));
    let name = "adapter/adapter_model.safetensors";
    assert!(file(&job.path("kept"), name) == file(&job.path("dequantised"), name));
}

#[test]
fn four_bits_of_a_base_that_has_more_are_warned_of_and_those_of_all_weights_refused() {
    let job = Job::new(4);
    let output = job.train("out", &["--max-steps", "1", "--bits", "4"]);
    let text = stderr(&output);
    succeeded(output);
    assert!(text.contains("llama quantize --nf4"), "{text}");
    let refused = job.train("all", &["--bits", "4", "--full-finetune", "true"]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(stderr(&refused).contains("--bits 4"), "{}", stderr(&refused));
}

const CASE: &str = "DROMEDARY_TEST_NF4_MEMORY";

/// Numbers of the linear layers, of a layer's largest, and of the embedding.
const SIZES: [i64; 6] = [1024, 2816, 12, 16, 16, 512];
const FROZEN: f64 = (12 * (4 * 1024 * 1024 + 3 * 1024 * 2816)) as f64;
const LARGEST: f64 = (2 * 1024 * 2816) as f64;
const EMBEDDING: f64 = (512 * 1024) as f64;

/// What training adds to the frozen weights: the memory in which a layer at a time is dequantised, panels
/// of products, the adapters with gradients and moments, and 16 MB for everything else.
const TRAINING: f64 = 4.0 * LARGEST + (16 << 20) as f64 + 16.0 * TRAINED + 16e6;
const TRAINED: f64 = (4 * 12 * (4 * 2 * 1024 + 3 * (1024 + 2816))) as f64;

/// Loading adds four bits a frozen number to a process, and training no second copy in another form.
#[test]
fn frozen_weights_take_four_bits_at_the_peak() {
    let dir = tempfile::tempdir().unwrap();
    let (plain, nf4) = (dir.path().join("plain"), dir.path().join("nf4"));
    fs::create_dir(&plain).unwrap();
    memory::write_model(&plain, &memory::config(SIZES, true));
    support::quantised(&plain, &nf4);
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "qlora::child", "--ignored", "--nocapture", "--test-threads", "1"])
        .env(CASE, &nf4)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&child.stdout).into_owned();
    let line = text.lines().find_map(|line| line.split("bytes ").nth(1));
    let numbers: Vec<f64> = serde_json::from_str(line.unwrap_or_else(|| panic!("{text}"))).unwrap();
    let [before, loaded, trained, counted] = numbers[..] else { panic!("{text}") };
    assert!((8.0 * counted / FROZEN - 4.13).abs() < 0.01, "{counted}");
    let bits = 8.0 * (loaded - before - 4.0 * EMBEDDING) / FROZEN;
    eprintln!("{bits:.3} bits a frozen number; training adds {} bytes", trained - loaded);
    assert!((bits / 4.13 - 1.0).abs() < 0.1, "{bits} bits: {numbers:?}");
    assert!(trained - loaded < TRAINING, "{numbers:?}, more than {TRAINING}");
}

fn two_steps(model: &mut Llama) {
    let lora = support::lora_config(4);
    let trained = Trained::attach(model, &lora, AdamWConfig::default(), 0).unwrap();
    let examples = [Example::learned_from(0, (3..67).collect(), 32)];
    let mut trainer = support::trainer(model, trained, &examples, 0);
    for _ in 0..2 {
        trainer.train_step().unwrap();
    }
}

/// A process whose memory is measured.
#[test]
#[ignore = "another test starts it"]
fn child() {
    let dir = PathBuf::from(std::env::var(CASE).unwrap());
    // What libtorch and the kernels take when they are called for the first time.
    let small = tempfile::tempdir().unwrap();
    two_steps(&mut load(&support::quantised(&stories260k(), &small.path().join("nf4")), true));
    let before = peak();
    let mut model = load(&dir, true);
    let (loaded, counted) = (peak(), model.nf4_bytes());
    two_steps(&mut model);
    println!("bytes [{before}, {loaded}, {}, {counted}]", peak());
}
