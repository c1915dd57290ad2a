//! Gradients through the halves of a layer on several ranks: those of one rank, by the rules of
//! [`TrainedPart`](dromedary_llama::TrainedPart).

use std::{collections::BTreeMap, path::Path};

use dromedary_llama::{LoadOptions, TrainedTensor, global_norm, sum_gradients};
use dromedary_parallel::SingleProcess;
use serde_json::json;

use crate::{
    same::{
        gradients::{F32, R, Trained, gradients, off},
        tensor,
    },
    support::{data, load, on_ranks, processes},
    tiny::{self, Tiny, noise},
};

fn equal_those_of_one_rank(dir: &Path, pack: bool, index: usize, tp: usize) {
    let one = gradients(dir, pack, index, &SingleProcess);
    let ranks = on_ranks(tp, |comm| gradients(dir, pack, index, comm));
    let mut needed = BTreeMap::<&str, f64>::new();
    let mut squares = 0.0;
    for (number, rank) in ranks.iter().enumerate() {
        assert_eq!(rank.common, ranks[0].common, "rank {number} differs from rank 0");
        rank.compare(&one).unwrap_or_else(|error| panic!("rank {number} of {tp}: {error}"));
        for (key, Trained { part, raw, complete }) in &rank.trained {
            let whole = &one.trained[key].complete;
            let rule = match (part.is_replicated(), key.0.contains("norm"), key.1) {
                (true, true, _) => "norm",
                (true, false, name) => name,
                (false, ..) if !part.shared().is_empty() => "shared rows",
                (false, ..) => "sliced",
            };
            let error = needed.entry(rule).or_default();
            *error = error.max(off(part, raw, whole));
            squares += tensor(complete).norm().double_value(&[]).powi(2);
        }
    }
    // Each rule is one that this model needs: as backward leaves them, the gradients are others.
    assert!(needed["sliced"] <= F32);
    for rule in ["lora_A", "lora_B", "norm"] {
        assert!(needed[rule] > 1e-2, "{rule}: {:.1e}", needed[rule]);
    }
    if let Some(shared) = needed.get("shared rows") {
        assert!(*shared > 1e-2, "shared rows: {shared:.1e}");
    }
    // Everybody counting all that it holds gives another norm.
    assert!(squares.sqrt() / one.norm > 1.01, "{} of {}", squares.sqrt(), one.norm);
}

#[test]
fn gradients_are_those_of_one_rank() {
    // tp 2 cuts 8 heads of 4 K/V heads evenly, tp 3 puts two K/V heads on two ranks each.
    for (tp, pack) in [(2, true), (2, false), (3, true), (3, false)] {
        equal_those_of_one_rank(&data("stories260k"), pack, 1, tp);
    }
    processes(2, "gradients", &[&data("stories260k"), Path::new("1")], "has these gradients");
}

/// Sizes that share no factor; at tp 5 both K/V heads are on three ranks, and three ranks own none.
#[test]
fn gradients_of_odd_sizes_are_those_of_one_rank() {
    let mut config = tiny::config();
    for (key, value) in [
        ("hidden_size", 29),
        ("intermediate_size", 53),
        ("num_attention_heads", 14),
        ("num_key_value_heads", 2),
        ("head_dim", 6),
        ("num_hidden_layers", 1),
    ] {
        config[key] = json!(value);
    }
    let mut model = Tiny::of(config, 31);
    model.tensors.values_mut().for_each(|weight| *weight = &*weight * 0.2);
    let model = model.single();
    let plan = load(model.path(), &LoadOptions { tp: 5, ..LoadOptions::default() });
    assert_eq!(plan.plan().kv_head_holders(0), 0..3);
    assert_eq!(plan.plan().kv_head_holders(1), 2..5);
    for tp in [3, 5, 7] {
        equal_those_of_one_rank(model.path(), false, 0, tp);
    }
    equal_those_of_one_rank(model.path(), true, 0, 5);
    processes(3, "gradients", &[model.path(), Path::new("0")], "has these gradients");
}

#[test]
fn gradients_need_the_group_of_their_plan() {
    let model = load(&data("stories260k"), &LoadOptions { tp: 2, ..LoadOptions::default() });
    let module = "model.layers.0.self_attn.k_proj";
    let part = model.plan().trained_part(0, module, TrainedTensor::LoraA).unwrap();
    let gradient = noise(&[R, 64], 1);
    for result in [
        sum_gradients(&[(&part, &gradient)], &SingleProcess).err(),
        global_norm(&[(&part, &gradient)], &SingleProcess).err(),
    ] {
        assert!(result.unwrap().to_string().contains("group of 2"));
    }
    for (module, tensor) in [
        ("model.norm", TrainedTensor::LoraB),
        ("model.layers.0.input_layernorm", TrainedTensor::LoraA),
    ] {
        assert_eq!(model.plan().trained_part(0, module, tensor), None);
    }
}

/// A rank that panicked here would leave the others waiting for its sum.
#[test]
fn gradients_of_another_shape_are_refused() {
    let model = load(&data("stories260k"), &LoadOptions::default());
    for (module, tensor, shape, expected) in [
        ("k_proj", TrainedTensor::Weight, [31, 64], "32 of its dimension 0"),
        ("q_proj", TrainedTensor::LoraB, [63, R], "64 of its dimension 0"),
        ("o_proj", TrainedTensor::LoraA, [R, 65], "64 of its dimension 1"),
    ] {
        let module = format!("model.layers.0.self_attn.{module}");
        let part = model.plan().trained_part(0, &module, tensor).unwrap();
        let gradient = noise(&shape, 1);
        for result in [
            sum_gradients(&[(&part, &gradient)], &SingleProcess).err(),
            global_norm(&[(&part, &gradient)], &SingleProcess).err(),
        ] {
            let message = result.unwrap().to_string();
            assert_eq!(message, format!("a gradient is {shape:?}, the rank holds {expected}"));
        }
    }
}
