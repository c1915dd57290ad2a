use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use dromedary_llama::{Adapter, Llama};
use dromedary_parallel::SingleProcess;
use dromedary_principle_engraving::{
    AdamWConfig, BatchConfig, Batches, Example, Ranks, Schedule, ScheduleType, Trained, Trainer,
    TrainerParts,
};
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use tch::{Kind, Tensor, no_grad};

use crate::support;

#[derive(Deserialize)]
struct Golden {
    loss: f64,
    grad_norm: f64,
    target_tokens: usize,
    training: Training,
}

#[derive(Deserialize)]
struct Training {
    losses: Vec<f64>,
    grad_norms: Vec<f64>,
    learning_rates: Vec<f64>,
}

pub(crate) fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data")
}

fn golden() -> Golden {
    serde_json::from_slice(&fs::read(data().join("golden.json")).unwrap()).unwrap()
}

pub(crate) fn tensors(name: &str) -> BTreeMap<String, Tensor> {
    let bytes = fs::read(data().join(name)).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = |view: safetensors::tensor::TensorView<'_>| {
        let kind = match view.dtype() {
            Dtype::F32 => Kind::Float,
            Dtype::F64 => Kind::Double,
            Dtype::I64 => Kind::Int64,
            other => panic!("{other:?}"),
        };
        let shape: Vec<i64> = view.shape().iter().map(|&size| size as i64).collect();
        Tensor::from_data_size(view.data(), &shape, kind)
    };
    file.tensors().into_iter().map(|(name, view)| (name, tensor(view))).collect()
}

/// The two rows, their masks as positions.
pub(crate) fn examples(tensors: &BTreeMap<String, Tensor>) -> Vec<Example> {
    (0..2)
        .map(|row| {
            let ints =
                |name: &str| Vec::<i64>::try_from(&tensors[&format!("row{row}.{name}")]).unwrap();
            let labels = ints("labels");
            let learn_from = labels.iter().position(|&label| label != -100).unwrap();
            let input_ids = ints("ids").into_iter().map(|id| id as u32).collect();
            Example::learned_from(row + 1, input_ids, learn_from)
        })
        .collect()
}

/// The tiny model with the golden adapter as the start of training.
fn model() -> (Llama, Trained) {
    adapted(support::load(&data().join("model")), "adapter")
}

/// A model with a golden adapter as the start of training.
pub(crate) fn adapted(mut model: Llama, adapter: &str) -> (Llama, Trained) {
    let adapter = Adapter::open(data().join(adapter)).unwrap();
    let trained = Trained::attach(&mut model, &adapter.config, AdamWConfig::default(), 0).unwrap();
    for (entry, of) in trained.optimizer.entries().iter().enumerate() {
        let (module, matrix) = of.name.rsplit_once('.').unwrap();
        let pair = &adapter.tensors[module];
        let value = if matrix == "lora_A" { &pair.lora_a } else { &pair.lora_b };
        no_grad(|| trained.leaf(entry).detach().copy_(value));
    }
    (model, trained)
}

pub(crate) fn trainer<'a>(
    model: &'a Llama,
    trained: Trained,
    examples: &'a [Example],
    (batch_size, accumulation_steps): (usize, usize),
) -> Trainer<'a> {
    let config = BatchConfig { batch_size, accumulation_steps, group_by_length: false, seed: 0 };
    Trainer::new(TrainerParts {
        model,
        trained,
        examples,
        batches: Batches::new(config, vec![1; examples.len()]),
        schedule: Schedule::new(ScheduleType::Cosine, 1e-3, 0.03, 20),
        kept_layers: 0,
        ranks: Ranks::single(),
    })
}

pub(crate) fn relative(got: f64, want: f64) -> f64 {
    (got - want).abs() / want.abs()
}

#[track_caller]
pub(crate) fn close_to_the_largest(got: &Tensor, want: &Tensor, tolerance: f64, name: &str) {
    let largest = want.abs().max().double_value(&[]);
    let difference = (got - want).abs().max().double_value(&[]);
    assert!(difference <= tolerance * largest, "{name}: {difference} of {largest}");
}

#[test]
fn gradients_of_every_a_and_b_are_those_of_peft() {
    let (tensors, golden) = (tensors("golden.safetensors"), golden());
    let examples = examples(&tensors);
    for shape in [(2, 1), (1, 2)] {
        let (model, trained) = model();
        let mut trainer = trainer(&model, trained, &examples, shape);
        let metrics = trainer.forward_backward().unwrap();
        assert_eq!(metrics.targets, golden.target_tokens);
        assert!(relative(metrics.loss, golden.loss) < 1e-5, "{}", metrics.loss);
        let optimizer = &trainer.trained().optimizer;
        assert!(relative(optimizer.grad_norm(), golden.grad_norm) < 1e-4);
        for (entry, of) in optimizer.entries().iter().enumerate() {
            let want = &tensors[&format!("grad.{}", of.name)];
            close_to_the_largest(&optimizer.gradient(entry), want, 1e-4, &of.name);
        }
    }
}

#[test]
fn twenty_steps_follow_peft() {
    let (tensors, golden) = (tensors("golden.safetensors"), golden().training);
    let (model, trained) = model();
    let examples = examples(&tensors);
    let mut trainer = trainer(&model, trained, &examples, (2, 1));
    for step in 0..20 {
        let metrics = trainer.train_step().unwrap();
        assert!((metrics.learning_rate - golden.learning_rates[step]).abs() < 1e-9);
        assert!(relative(metrics.loss, golden.losses[step]) < 1e-3, "step {step}: {metrics:?}");
        assert!(relative(metrics.grad_norm, golden.grad_norms[step]) < 1e-2, "step {step}");
    }
    let adapter = trainer.trained().adapter(&SingleProcess).unwrap().unwrap();
    for (module, pair) in &adapter.tensors {
        for (matrix, got) in [("lora_A", &pair.lora_a), ("lora_B", &pair.lora_b)] {
            let want = &tensors[&format!("trained.{module}.{matrix}")];
            close_to_the_largest(got, want, 1e-2, module);
        }
    }
}
