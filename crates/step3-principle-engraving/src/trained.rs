//! What training changes: the adapters of a model, or all of its weights.

use std::{collections::BTreeMap, ops::Range};

use dromedary_llama::{Adapter, DropoutDraw, Llama, Lora, LoraConfig, LoraDropout, LoraPair};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::{Device, Kind, Tensor, no_grad};

use crate::{
    error::Result,
    half_block::Half,
    optimizer::{AdamWConfig, FlatAdamW},
};

/// Leaves of a layer where weights are trained: norm, qkv and output projection; norm, gate and up, and
/// down projection.
const LEAVES_PER_LAYER: usize = 6;

/// Everything that training changes.
#[derive(Debug)]
pub struct Trained {
    /// Values in f32, gradients and moments.
    pub optimizer: FlatAdamW,
    what: What,
    leaves: Vec<Leaf>,
}

#[derive(Debug)]
enum What {
    /// Entry `2 i` is A of module `i`, entry `2 i + 1` its B; each is a leaf.
    Adapters { config: LoraConfig, modules: Vec<String>, draw: DropoutDraw },
    /// A leaf is a weight as the model multiplies it, its entries what is stored of it.
    Weights { num_layers: usize, tied: bool },
}

/// What the model computes with.
#[derive(Debug)]
struct Leaf {
    /// A leaf of the autograd graph.
    tensor: Tensor,
    entries: Range<usize>,
    /// The tensor is a copy in another kind than the optimizer's f32.
    copied: bool,
}

impl Trained {
    /// Makes adapters for the layers that `config` names and attaches them to `model`.
    ///
    /// A is uniform in `+-1 / sqrt(in)` and B is 0, as in PEFT. A's numbers are a function of seed and
    /// module name, so they do not depend on which other modules are trained; so are dropout's masks.
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
        let leaves = (0..initial.len())
            .map(|entry| Leaf {
                tensor: optimizer.parameter(entry),
                entries: entry..entry + 1,
                copied: false,
            })
            .collect();
        let what = What::Adapters { config: config.clone(), modules, draw: DropoutDraw::default() };
        let trained = Self { optimizer, what, leaves };
        trained.attach_leaves(model, seed);
        Ok(trained)
    }

    fn attach_leaves(&self, model: &mut Llama, seed: u64) {
        let What::Adapters { config, modules, draw } = &self.what else { return };
        let index: BTreeMap<&str, usize> =
            modules.iter().enumerate().map(|(index, name)| (name.as_str(), index)).collect();
        for (module, part) in model.linears_mut() {
            if let Some(&index) = index.get(module.as_str()) {
                let dropout = (config.lora_dropout > 0.0)
                    .then(|| LoraDropout::new(config.lora_dropout, seed, &module, 0, draw.clone()));
                part.lora = Some(Lora {
                    a: self.leaf(2 * index).shallow_clone(),
                    b: self.leaf(2 * index + 1).shallow_clone(),
                    scaling: config.scaling(),
                    dropout,
                });
            }
        }
    }

    /// Takes over all weights of `model`: the optimizer holds them in f32, and the model computes with
    /// the same memory, or, where it keeps them in another kind, with copies that follow each step.
    ///
    /// # Errors
    /// If values, gradients and moments do not fit into memory.
    pub fn take_weights(model: &mut Llama, adamw: AdamWConfig) -> Result<Self> {
        let mut initial = Vec::new();
        let mut ranges = Vec::new();
        model.replace_weights(&mut |parts, weight| {
            let first = initial.len();
            let mut start = 0;
            for (name, rows) in parts {
                initial.push((name.clone(), weight.f_narrow(0, start, *rows)?));
                start += rows;
            }
            ranges.push(first..initial.len());
            Ok(weight.shallow_clone())
        })?;
        let optimizer = FlatAdamW::new(adamw, &initial, model.device())?;
        drop(initial);
        let mut ranges = ranges.into_iter();
        let mut leaves = Vec::new();
        model.replace_weights(&mut |_, weight| {
            let entries = ranges.next().unwrap_or_default();
            let copied = weight.kind() != Kind::Float;
            let tensor = match copied {
                true => weight.detach().copy(),
                false => optimizer.joined(entries.clone(), &weight.size()).detach(),
            };
            let tensor = tensor.set_requires_grad(true);
            leaves.push(Leaf { tensor: tensor.shallow_clone(), entries, copied });
            Ok(tensor)
        })?;
        let config = model.config();
        let what = What::Weights {
            num_layers: config.num_hidden_layers as usize,
            tied: config.tie_word_embeddings,
        };
        Ok(Self { optimizer, what, leaves })
    }

    /// Whether weights are trained, not adapters.
    pub fn trains_weights(&self) -> bool {
        matches!(self.what, What::Weights { .. })
    }

    /// The leaves that half-block `half` of layer `layer` uses, in the order of its gradients.
    pub fn leaves_of(&self, layer: usize, half: Half) -> Vec<usize> {
        let What::Adapters { modules, .. } = &self.what else {
            let first = 1 + LEAVES_PER_LAYER * layer;
            let middle = first + LEAVES_PER_LAYER / 2;
            return match half {
                Half::Attention => (first..middle).collect(),
                Half::Mlp => (middle..first + LEAVES_PER_LAYER).collect(),
            };
        };
        let prefix = match half {
            Half::Attention => format!("model.layers.{layer}.self_attn."),
            Half::Mlp => format!("model.layers.{layer}.mlp."),
        };
        let of_half = |(_, module): &(usize, &String)| module.starts_with(&prefix);
        modules
            .iter()
            .enumerate()
            .filter(of_half)
            .flat_map(|(index, _)| [2 * index, 2 * index + 1])
            .collect()
    }

    /// The leaf of the embedding, where it is trained.
    pub fn embedding_leaf(&self) -> Option<usize> {
        self.trains_weights().then_some(0)
    }

    /// The leaves of the final norm and of the head, where they are trained; a tied head's is that of
    /// the embedding.
    pub fn head_leaves(&self) -> Option<[usize; 2]> {
        match self.what {
            What::Adapters { .. } => None,
            What::Weights { num_layers, tied } => {
                let norm = 1 + LEAVES_PER_LAYER * num_layers;
                Some([norm, if tied { 0 } else { norm + 1 }])
            }
        }
    }

    /// Number of leaves.
    pub fn num_leaves(&self) -> usize {
        self.leaves.len()
    }

    /// The leaf that the model computes with.
    pub fn leaf(&self, leaf: usize) -> &Tensor {
        &self.leaves[leaf].tensor
    }

    /// The value behind a leaf, in f32, sharing the optimizer's memory.
    pub fn value(&self, leaf: usize) -> Tensor {
        let Leaf { tensor, entries, .. } = &self.leaves[leaf];
        self.optimizer.joined(entries.clone(), &tensor.size())
    }

    /// Adds to the gradient of a leaf.
    pub fn accumulate(&self, leaf: usize, gradient: &Tensor) {
        self.optimizer.accumulate_joined(self.leaves[leaf].entries.clone(), gradient);
    }

    /// The gradient of a leaf, sharing the optimizer's memory.
    pub fn gradient(&self, leaf: usize) -> Tensor {
        let Leaf { tensor, entries, .. } = &self.leaves[leaf];
        self.optimizer.joined_gradient(entries.clone(), &tensor.size())
    }

    /// Which masks dropout draws from now on, or none.
    pub fn set_draw(&self, number: Option<u64>) {
        if let What::Adapters { draw, .. } = &self.what {
            draw.set(number);
        }
    }

    /// An optimizer step, see [`FlatAdamW::step`]; the model follows.
    ///
    /// # Errors
    /// If libtorch refuses the update.
    pub fn step(&mut self, learning_rate: f64, grad_norm: f64) -> Result<()> {
        self.optimizer.step(learning_rate, grad_norm)?;
        self.follow()
    }

    /// Takes over a checkpoint's values and moments, see [`FlatAdamW::restore`]; the model follows.
    ///
    /// # Errors
    /// If a shape differs.
    pub fn restore(&mut self, states: &[[Tensor; 3]], updates: u64) -> Result<()> {
        self.optimizer.restore(states, updates)?;
        self.follow()
    }

    /// Copies of the model take over the optimizer's values.
    fn follow(&self) -> Result<()> {
        for leaf in self.leaves.iter().filter(|leaf| leaf.copied) {
            let value = self.optimizer.joined(leaf.entries.clone(), &leaf.tensor.size());
            no_grad(|| leaf.tensor.detach().f_copy_(&value))?;
        }
        Ok(())
    }

    /// The adapters as they are now, in f32; nothing where weights are trained.
    pub fn adapter(&self) -> Option<Adapter> {
        let What::Adapters { config, modules, .. } = &self.what else { return None };
        let value = |leaf: usize| self.leaf(leaf).detach().to_device(Device::Cpu);
        let tensors = modules
            .iter()
            .enumerate()
            .map(|(index, module)| {
                let (lora_a, lora_b) = (value(2 * index), value(2 * index + 1));
                (module.clone(), LoraPair { lora_a, lora_b })
            })
            .collect();
        Some(Adapter { config: config.clone(), tensors })
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
