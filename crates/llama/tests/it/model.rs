//! The model's parts: adapters, kinds, bad input.

use std::ops::ControlFlow;

use dromedary_llama::{
    Adapter, Checkpoint, DEFAULT_MAX_SHARD_SIZE, Error, Llama, LoadOptions, Lora, MergeOptions,
    Weight,
};
use dromedary_parallel::SingleProcess;
use tch::{Device, Kind, Tensor};

use crate::support::{data, difference, load, stories};

const F: (Kind, Device) = (Kind::Float, Device::Cpu);

fn logits(model: &Llama) -> Tensor {
    let ids: Vec<u32> = (0..40).map(|i| (i * 29 + 3) % 90).collect();
    model.forward_logits(&ids, &SingleProcess).unwrap()
}

/// Random adapters on every projection, large enough to change the logits.
fn attach(model: &mut Llama) -> Vec<String> {
    tch::manual_seed(21);
    let widths: Vec<i64> = model
        .layers()
        .iter()
        .flat_map(|layer| {
            let width = |linear: &dromedary_llama::Linear| linear.weight.size().1;
            let [c, o] = [width(&layer.qkv_proj), width(&layer.o_proj)];
            [c, c, c, o, width(&layer.gate_up_proj), c, width(&layer.down_proj)]
        })
        .collect();
    let mut names = Vec::new();
    for ((name, part), width) in model.linears_mut().zip(widths) {
        let rows = part.rows.end - part.rows.start;
        let a = Tensor::randn([4, width], F) * 0.3;
        part.lora =
            Some(Lora { a, b: Tensor::randn([rows, 4], F) * 0.3, scaling: 0.25, dropout: None });
        names.push(name);
    }
    names
}

/// Adds the adapters into the weights.
fn merge(model: &mut Llama) {
    let merged: Vec<(i64, Tensor)> = model
        .linears_mut()
        .filter_map(|(_, part)| {
            let lora = part.lora.take()?;
            Some((part.rows.start, lora.b.matmul(&lora.a) * lora.scaling))
        })
        .collect();
    let mut merged = merged.into_iter();
    for layer in model.layers() {
        for linear in [&layer.qkv_proj, &layer.o_proj, &layer.gate_up_proj, &layer.down_proj] {
            let Weight::Dense(weight) = &linear.weight else { panic!("packed") };
            for _ in &linear.parts {
                let (start, delta) = merged.next().unwrap();
                let mut rows = weight.narrow(0, start, delta.size()[0]);
                rows += delta;
            }
        }
    }
}

#[test]
fn adapters_on_all_parts_equal_merged_weights() {
    for folder in ["stories260k", "untied"] {
        let dense = LoadOptions { pack: false, ..LoadOptions::default() };
        let mut model = load(&data(folder), &dense);
        let base = logits(&model);
        let names = attach(&mut model);
        assert_eq!(names.len(), 7 * model.layers().len());
        assert_eq!(names[0], "model.layers.0.self_attn.q_proj");
        assert_eq!(names[12], "model.layers.1.mlp.up_proj");
        let adapted = logits(&model);
        assert!(difference(&adapted, &base) > 1e-2, "the adapters show");

        let mut packed = load(&data(folder), &LoadOptions::default());
        attach(&mut packed);
        assert!(difference(&logits(&packed), &adapted) < 1e-5);

        merge(&mut model);
        assert!(difference(&logits(&model), &adapted) < 1e-5);
    }
}

#[test]
fn an_adapter_of_peft_in_place_equals_the_merged_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let options = MergeOptions {
        checkpoint: data("untied"),
        adapter: data("peft_adapter"),
        output: dir.path().join("merged"),
        max_shard_size: DEFAULT_MAX_SHARD_SIZE,
        verify: true,
    };
    dromedary_llama::merge(&options, &mut |_| ControlFlow::Continue(())).unwrap();
    let want = logits(&load(&options.output, &LoadOptions::default()));

    let mut adapter = Adapter::open(&options.adapter).unwrap();
    let scaling = adapter.config.scaling();
    let mut model = load(&options.checkpoint, &LoadOptions::default());
    let base = logits(&model);
    for (name, part) in model.linears_mut() {
        if let Some(pair) = adapter.tensors.remove(&name) {
            part.lora = Some(Lora { a: pair.lora_a, b: pair.lora_b, scaling, dropout: None });
        }
    }
    assert!(adapter.tensors.is_empty(), "every module of the adapter has its part");
    // The adapter is so large that rounding the weights once more moves the logits by 4e-5.
    let off = difference(&logits(&model), &want);
    assert!(off < 2e-4, "{off:.1e} x max|logit|");
    assert!(difference(&base, &want) > 0.5, "the adapter shows");
}

#[test]
fn token_ids_outside_of_the_vocabulary_are_errors() {
    let model = load(&stories(), &LoadOptions::default());
    let error = model.forward_logits(&[1, 512], &SingleProcess).unwrap_err();
    assert!(matches!(error, Error::TokenId { id: 512, vocab_size: 512 }), "{error}");
}

#[test]
fn sixteen_bit_weights_are_kept_as_they_are() {
    let checkpoint = Checkpoint::open(data("bf16")).unwrap();
    let options = LoadOptions { kind: Kind::BFloat16, ..LoadOptions::default() };
    let model = Llama::load(&checkpoint, &options).unwrap();
    assert_eq!(model.kind(), Kind::Float);
    let Weight::Dense(weight) = &model.layers()[0].o_proj.weight else { panic!("packed") };
    let stored = checkpoint.read("model.layers.0.self_attn.o_proj.weight").unwrap();
    assert_eq!(weight, &stored);
    // The same numbers as with the weights widened once: nothing was rounded on the way.
    let wide = load(&data("bf16"), &LoadOptions { pack: false, ..LoadOptions::default() });
    assert_eq!(logits(&model), logits(&wide));
}
