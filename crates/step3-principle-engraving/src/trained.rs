//! The adapters of a model: made, attached, trained by half-block, written out.

use std::collections::BTreeMap;

use dromedary_llama::{Adapter, Llama, Lora, LoraConfig, LoraPair};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::{Device, Kind, Tensor};

use crate::{
    error::Result,
    half_block::Half,
    optimizer::{AdamWConfig, FlatAdamW},
};

/// Everything that training changes.
#[derive(Debug)]
pub struct Trained {
    /// Values, gradients and moments; entry `2 i` is A of module `i`, entry `2 i + 1` its B.
    pub optimizer: FlatAdamW,
    config: LoraConfig,
    modules: Vec<String>,
    /// Leaves of the autograd graph, by entry.
    leaves: Vec<Tensor>,
}

impl Trained {
    /// Makes adapters for the layers that `config` names and attaches them to `model`.
    ///
    /// A is uniform in `+-1 / sqrt(in)` and B is 0, as in PEFT. A's numbers are a function of seed and
    /// module name, so they do not depend on which other modules are trained.
    ///
    /// # Errors
    /// If the adapters do not fit into memory.
    pub fn attach(
        model: &mut Llama,
        config: &LoraConfig,
        adamw: AdamWConfig,
        seed: u64,
    ) -> Result<Self> {
        let mut modules = Vec::new();
        let mut initial = Vec::new();
        let f32 = (Kind::Float, Device::Cpu);
        for (module, [out_features, in_features]) in config.modules(model.config())? {
            let a = initial_a(&module, config.r, in_features, seed);
            initial.push((format!("{module}.lora_A"), a));
            let b = Tensor::f_zeros([out_features, config.r], f32)?;
            initial.push((format!("{module}.lora_B"), b));
            modules.push(module);
        }
        let optimizer = FlatAdamW::new(adamw, &initial, model.device())?;
        let leaves =
            (0..optimizer.entries().len()).map(|index| optimizer.parameter(index)).collect();
        let trained = Self { optimizer, config: config.clone(), modules, leaves };
        trained.attach_leaves(model);
        Ok(trained)
    }

    fn attach_leaves(&self, model: &mut Llama) {
        let index: BTreeMap<&str, usize> =
            self.modules.iter().enumerate().map(|(index, name)| (name.as_str(), index)).collect();
        for (module, part) in model.linears_mut() {
            if let Some(&index) = index.get(module.as_str()) {
                part.lora = Some(Lora {
                    a: self.leaves[2 * index].shallow_clone(),
                    b: self.leaves[2 * index + 1].shallow_clone(),
                    scaling: self.config.scaling(),
                });
            }
        }
    }

    /// The entries that half-block `half` of layer `layer` uses.
    pub fn entries_of(&self, layer: usize, half: Half) -> Vec<usize> {
        let prefix = match half {
            Half::Attention => format!("model.layers.{layer}.self_attn."),
            Half::Mlp => format!("model.layers.{layer}.mlp."),
        };
        let of_half = |(_, module): &(usize, &String)| module.starts_with(&prefix);
        self.modules
            .iter()
            .enumerate()
            .filter(of_half)
            .flat_map(|(index, _)| [2 * index, 2 * index + 1])
            .collect()
    }

    /// The leaf that the model computes with.
    pub fn leaf(&self, entry: usize) -> &Tensor {
        &self.leaves[entry]
    }

    /// The adapters as they are now, in f32.
    pub fn adapter(&self) -> Adapter {
        let value = |entry: usize| self.leaves[entry].detach().to_device(Device::Cpu);
        let tensors = self
            .modules
            .iter()
            .enumerate()
            .map(|(index, module)| {
                let (lora_a, lora_b) = (value(2 * index), value(2 * index + 1));
                (module.clone(), LoraPair { lora_a, lora_b })
            })
            .collect();
        Adapter { config: self.config.clone(), tensors }
    }
}

/// `kaiming_uniform_(a = sqrt(5))` of a (r, columns) matrix: uniform in `+-1 / sqrt(columns)`.
fn initial_a(module: &str, r: i64, columns: i64, seed: u64) -> Tensor {
    let mut key = blake3::Hasher::new();
    key.update(&seed.to_le_bytes());
    key.update(module.as_bytes());
    let mut rng = ChaCha8Rng::from_seed(*key.finalize().as_bytes());
    let bound = 1.0 / (columns as f32).sqrt();
    let values: Vec<f32> = (0..r * columns).map(|_| rng.random_range(-bound..=bound)).collect();
    Tensor::from_slice(&values).view([r, columns])
}
