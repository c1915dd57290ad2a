use std::{
    ops::ControlFlow,
    path::{Path, PathBuf},
};

use dromedary_llama::{
    Checkpoint, DEFAULT_MAX_SHARD_SIZE, Llama, LoadOptions, LoraConfig, QuantizeOptions, quantize,
};
use dromedary_parallel::SingleProcess;
use dromedary_principle_engraving::{
    AdamWConfig, BatchConfig, Batches, Example, FlatAdamW, Ranks, Schedule, ScheduleType, Trained,
    Trainer, TrainerParts,
};
use tch::{Kind, Tensor};

/// stories260k: a real trained LLaMA of 260,032 parameters with grouped-query attention.
pub(crate) fn stories260k() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../llama/tests/data/stories260k")
}

pub(crate) fn load(dir: &Path) -> Llama {
    load_as(dir, Kind::Float)
}

pub(crate) fn load_as(dir: &Path, kind: Kind) -> Llama {
    tch::set_num_threads(1);
    let options = LoadOptions { pack: false, kind, ..LoadOptions::default() };
    Llama::load(&Checkpoint::open(dir).unwrap(), &options).unwrap()
}

/// The checkpoint with its linear layers in NF4, as `llama quantize` writes it.
pub(crate) fn quantised(checkpoint: &Path, output: &Path) -> PathBuf {
    let options = QuantizeOptions {
        checkpoint: checkpoint.to_owned(),
        output: output.to_owned(),
        max_shard_size: DEFAULT_MAX_SHARD_SIZE,
        verify: false,
    };
    quantize(&options, &mut |_| ControlFlow::Continue(())).unwrap();
    output.to_owned()
}

pub(crate) fn lora_config(r: i64) -> LoraConfig {
    LoraConfig { r, ..LoraConfig::default() }
}

/// Adapters on all layers with A and B both random, so that no gradient is 0 by construction.
pub(crate) fn attach_random(model: &mut Llama, r: i64) -> Trained {
    let trained = Trained::attach(model, &lora_config(r), AdamWConfig::default(), 7).unwrap();
    add_noise(&trained);
    trained
}

pub(crate) fn add_noise(trained: &Trained) {
    tch::manual_seed(11);
    tch::no_grad(|| {
        for leaf in 0..trained.num_leaves() {
            let noise = trained.leaf(leaf).randn_like() * 0.05;
            let _ = trained.leaf(leaf).detach().g_add_(&noise);
        }
    });
}

/// Copies of all values and of both moments.
pub(crate) fn numbers(optimizer: &FlatAdamW) -> Vec<Tensor> {
    let state = |entry| optimizer.state(entry, &SingleProcess).unwrap();
    (0..optimizer.entries().len()).flat_map(state).map(|tensor| tensor.copy()).collect()
}

/// A trainer whose one step sees all rows at once.
pub(crate) fn trainer<'a>(
    model: &'a Llama,
    trained: Trained,
    examples: &'a [Example],
    kept_layers: usize,
) -> Trainer<'a> {
    let batches = BatchConfig {
        batch_size: examples.len(),
        accumulation_steps: 1,
        group_by_length: false,
        seed: 0,
    };
    Trainer::new(TrainerParts {
        model,
        trained,
        examples,
        batches: Batches::new(batches, vec![1; examples.len()]),
        schedule: Schedule::new(ScheduleType::Constant, 1e-3, 0.0, 100),
        kept_layers,
        ranks: Ranks::single(),
    })
}
