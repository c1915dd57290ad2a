//! Gradients through the halves of a layer on one rank of a group, by the rules of [`TrainedPart`].

// Shapes: T = tokens, C = hidden_size, r = LoRA rank.

use std::{collections::BTreeMap, path::Path};

use dromedary_llama::{
    Checkpoint, Llama, LoadOptions, Lora, Shard, TrainedPart, TrainedTensor, Weight,
    block::{Layer, attention_partial, causal_attention, mlp_partial},
    global_norm, sum_gradients,
};
use dromedary_parallel::Communicator;
use dromedary_torch_ext::run_backward;
use tch::Tensor;

use super::{Values, noise, tensor, values};

pub(crate) const R: i64 = 3;
/// Two sequences, one behind the other.
const LENGTHS: [i64; 2] = [7, 12];
pub(crate) const F32: f64 = 1e-5;

/// The gradients of one rank.
#[derive(Default)]
pub(crate) struct Gradients {
    /// Outputs and gradients of inputs: the same on all ranks.
    pub(crate) common: BTreeMap<String, Values>,
    /// By module and tensor, as backward left it and as it is in the end.
    pub(crate) trained: BTreeMap<(String, &'static str), Trained>,
    pub(crate) norm: f64,
}

pub(crate) struct Trained {
    pub(crate) part: TrainedPart,
    pub(crate) raw: Values,
    pub(crate) complete: Values,
}

/// The slice of a whole tensor that belongs to a rank.
fn slice(whole: &Tensor, shard: &Shard) -> Tensor {
    match shard {
        Shard::Replicated => whole.copy(),
        Shard::Rows(of) => {
            whole.narrow(0, of.range().start, of.range().end - of.range().start).copy()
        }
        Shard::Columns(of) => {
            whole.narrow(1, of.range().start, of.range().end - of.range().start).copy()
        }
    }
}

/// A leaf and what it is a part of.
struct Leaf {
    module: String,
    tensor: (&'static str, TrainedTensor),
    leaf: Tensor,
}

/// Adapters on all projections, each rank's part of the same whole ones.
fn attach(model: &mut Llama) -> Vec<Leaf> {
    let plan = model.plan().clone();
    let rank = model.rank_plan().clone();
    let tp_rank = (0..plan.tp()).find(|index| *plan.rank(*index) == rank).unwrap();
    let config = model.config().clone();
    let (q, kv) = (
        config.num_attention_heads * config.head_dim,
        config.num_key_value_heads * config.head_dim,
    );
    let mut leaves = Vec::new();
    for (seed, (module, part)) in model.linears_mut().enumerate() {
        let [out, inner] = match part.name {
            "q_proj" => [q, config.hidden_size],
            "k_proj" | "v_proj" => [kv, config.hidden_size],
            "o_proj" => [config.hidden_size, q],
            "down_proj" => [config.hidden_size, config.intermediate_size],
            _ => [config.intermediate_size, config.hidden_size],
        };
        let leaf = |tensor: (&'static str, TrainedTensor), shape: [i64; 2], seed: usize| {
            let part = plan.trained_part(tp_rank, &module, tensor.1).unwrap();
            let whole = noise(&shape, seed as u64) * 0.2;
            let leaf = slice(&whole, part.shard()).set_requires_grad(true);
            Leaf { module: module.clone(), tensor, leaf }
        };
        let a = leaf(("lora_A", TrainedTensor::LoraA), [R, inner], 100 + seed);
        let b = leaf(("lora_B", TrainedTensor::LoraB), [out, R], 500 + seed);
        let [a_leaf, b_leaf] = [&a, &b].map(|of| of.leaf.shallow_clone());
        part.lora = Some(Lora { a: a_leaf, b: b_leaf, scaling: 0.5, dropout: None });
        leaves.extend([a, b]);
    }
    leaves
}

/// The weights themselves: norms always, projections where they are not packed.
fn weights(layer: &Layer, index: usize) -> Vec<(Vec<String>, Tensor)> {
    let prefix = format!("model.layers.{index}");
    let mut leaves = Vec::new();
    for (name, norm) in [
        ("input_layernorm", &layer.input_layernorm),
        ("post_attention_layernorm", &layer.post_attention_layernorm),
    ] {
        leaves.push((vec![format!("{prefix}.{name}")], norm.weight.shallow_clone()));
    }
    for (block, linear) in [
        ("self_attn", &layer.qkv_proj),
        ("self_attn", &layer.o_proj),
        ("mlp", &layer.gate_up_proj),
        ("mlp", &layer.down_proj),
    ] {
        if let Weight::Dense(weight) = &linear.weight {
            let names = linear.parts.iter().map(|part| format!("{prefix}.{block}.{}", part.name));
            leaves.push((names.collect(), weight.shallow_clone()));
        }
    }
    leaves
}

fn leaves_of(model: &mut Llama, index: usize) -> Vec<Leaf> {
    let mut leaves: Vec<Leaf> = attach(model)
        .into_iter()
        .filter(|leaf| leaf.module.starts_with(&format!("model.layers.{index}.")))
        .collect();
    for (modules, weight) in weights(&model.layers()[index], index) {
        let leaf = weight.set_requires_grad(true);
        for module in modules {
            let leaf = leaf.shallow_clone();
            leaves.push(Leaf { module, tensor: ("weight", TrainedTensor::Weight), leaf });
        }
    }
    leaves
}

/// The part of a fused weight's gradient that belongs to one projection.
fn of_part(layer: &Layer, leaf: &Leaf, gradient: Tensor) -> Tensor {
    let name = leaf.module.rsplit('.').next().unwrap();
    let mut parts = layer.qkv_proj.parts.iter().chain(&layer.gate_up_proj.parts);
    match parts.find(|part| part.name == name && leaf.tensor.0 == "weight") {
        None => gradient,
        Some(part) => gradient.narrow(0, part.rows.start, part.rows.end - part.rows.start).copy(),
    }
}

/// Every rank of the group must call this.
pub(crate) fn gradients(
    dir: &Path,
    pack: bool,
    index: usize,
    comm: &dyn Communicator,
) -> Gradients {
    let (tp_rank, tp) = (comm.rank(), comm.world_size());
    let options = LoadOptions { tp_rank, tp, pack, ..LoadOptions::default() };
    tch::set_num_threads(1);
    let mut model = Llama::load(&Checkpoint::open(dir).unwrap(), &options).unwrap();
    let leaves = leaves_of(&mut model, index);
    let layer = &model.layers()[index];
    let tokens: i64 = LENGTHS.iter().sum();
    let shape = [tokens, model.config().hidden_size];
    let positions: Vec<i64> = LENGTHS.iter().flat_map(|length| 0..*length).collect();
    let rotary_at = model.rotary_at(&positions).unwrap();

    let mut result = Gradients::default();
    let mut complete: Vec<(TrainedPart, &Leaf, Values, Tensor)> = Vec::new();
    for (half, seed) in [("attention", 11), ("mlp", 21)] {
        let x = noise(&shape, seed).set_requires_grad(true); // (T, C)
        let grad_output = noise(&shape, seed + 1); // (T, C)
        let mut attend =
            |q: &Tensor, k: &Tensor, v: &Tensor| causal_attention(&layer.heads, q, k, v, &LENGTHS);
        let partial = if half == "attention" {
            attention_partial(layer, &x, &rotary_at, &mut attend).unwrap()
        } else {
            mlp_partial(layer, &x).unwrap()
        };
        let inputs: Vec<&Tensor> =
            [&x].into_iter().chain(leaves.iter().map(|leaf| &leaf.leaf)).collect();
        let grads = run_backward(&[&partial], &[&grad_output], &inputs, false).unwrap();
        let mut grads = grads.into_iter();
        let mut grad_x = grads.next().unwrap().unwrap();
        let mut y = partial.detach().copy();
        comm.all_reduce_sum(&mut grad_x).unwrap();
        comm.all_reduce_sum(&mut y).unwrap();
        result.common.insert(format!("{half} output"), values(&y));
        result.common.insert(format!("{half} gradient of its input"), values(&grad_x));
        for (leaf, gradient) in leaves.iter().zip(grads) {
            let Some(gradient) = gradient else { continue };
            let gradient = of_part(layer, leaf, gradient);
            let part = model.plan().trained_part(tp_rank, &leaf.module, leaf.tensor.1).unwrap();
            complete.push((part, leaf, values(&gradient), gradient));
        }
    }
    let pairs: Vec<_> = complete.iter().map(|(part, _, _, gradient)| (part, gradient)).collect();
    sum_gradients(&pairs, comm).unwrap();
    result.norm = global_norm(&pairs, comm).unwrap();
    for (part, leaf, raw, gradient) in &complete {
        let (part, raw, complete) = (part.clone(), raw.clone(), values(gradient));
        let key = (leaf.module.clone(), leaf.tensor.0);
        result.trained.insert(key, Trained { part, raw, complete });
    }
    result
}

/// How far a rank's gradient is from its slice of the whole, as a share of the whole's largest.
pub(crate) fn off(part: &TrainedPart, got: &Values, whole: &Values) -> f64 {
    let whole = tensor(whole);
    let largest = f64::try_from(whole.abs().max()).unwrap();
    let want = slice(&whole, part.shard());
    let got = tensor(got);
    assert_eq!(got.size(), want.size());
    f64::try_from((got - want).abs().max()).unwrap() / largest
}

impl Gradients {
    /// Whether these, of one rank of a group, are those of one rank alone.
    pub(crate) fn compare(&self, one: &Self) -> Result<(), String> {
        for (name, want) in &one.common {
            let (got, want) = (tensor(&self.common[name]), tensor(want));
            let largest = |t: &Tensor| f64::try_from(t.abs().max()).unwrap();
            let error = largest(&(got - &want)) / largest(&want);
            if error.is_nan() || error > F32 {
                return Err(format!("{name}: {error:.1e}"));
            }
        }
        if self.trained.len() != one.trained.len() {
            return Err(format!("{} gradients of {}", self.trained.len(), one.trained.len()));
        }
        for (key, Trained { part, complete, .. }) in &self.trained {
            let error = off(part, complete, &one.trained[key].complete);
            if error.is_nan() || error > F32 {
                return Err(format!("{key:?}: {error:.1e}"));
            }
        }
        let error = (self.norm / one.norm - 1.0).abs();
        if error < 1e-5 { Ok(()) } else { Err(format!("norm {} of {}", self.norm, one.norm)) }
    }
}
