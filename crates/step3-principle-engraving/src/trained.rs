//! What training changes: the adapters of a model, or all of its weights.

use std::{collections::BTreeMap, ops::Range, path::Path};

use dromedary_llama::{
    Adapter, AdapterWriter, DropoutDraw, Llama, Lora, LoraConfig, LoraDropout, LoraPair, Shard,
    TrainedPart, TrainedTensor, gather_trained, global_norm, sum_gradients,
};
use dromedary_parallel::Communicator;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::{Device, Kind, Tensor, no_grad};

use crate::{
    error::{Error, Result},
    half_block::Half,
    optimizer::{Entry, FlatAdamW, FlatValues, Held, OptimizerConfig, Share},
    ranks::Ranks,
};

/// Leaves of a layer where weights are trained: norm, qkv and output projection; norm, gate and up, and
/// down projection.
const LEAVES_PER_LAYER: usize = 6;

/// Everything that training changes: this rank's parts of it.
#[derive(Debug)]
pub struct Trained {
    /// Values in f32, gradients and moments.
    pub optimizer: FlatAdamW,
    /// What each of the optimizer's entries is a part of.
    parts: Vec<TrainedPart>,
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
    /// module name, so they do not depend on which other modules are trained, nor on the ranks that share
    /// the model, each of which has its part; so are dropout's masks.
    ///
    /// # Errors
    /// If the adapters do not fit into memory.
    pub fn attach(
        model: &mut Llama,
        config: &LoraConfig,
        optimizer: impl Into<OptimizerConfig>,
        seed: u64,
    ) -> Result<Self> {
        let mut modules = Vec::new();
        let mut initial = Vec::new();
        let mut parts = Vec::new();
        let f32 = (Kind::Float, Device::Cpu);
        for (module, [out_features, in_features]) in config.modules(model.config())? {
            let a = initial_a(&module, config.r, in_features, seed);
            let b = Tensor::f_zeros([out_features, config.r], f32)?;
            for (tensor, name, whole) in
                [(TrainedTensor::LoraA, "lora_A", a), (TrainedTensor::LoraB, "lora_B", b)]
            {
                let part = part_of(model, &module, tensor)?;
                initial.push((format!("{module}.{name}"), part.shard().narrow(&whole)?));
                parts.push(part);
            }
            modules.push(module);
        }
        let values = FlatValues::new(optimizer.into(), &initial, model.device(), false)?;
        drop(initial);
        let optimizer = values.into_optimizer()?;
        let leaves = (0..parts.len())
            .map(|entry| Leaf {
                tensor: optimizer.parameter(entry),
                entries: entry..entry + 1,
                copied: false,
            })
            .collect();
        let what = What::Adapters { config: config.clone(), modules, draw: DropoutDraw::default() };
        let trained = Self { optimizer, parts, what, leaves };
        trained.attach_leaves(model, seed);
        Ok(trained)
    }

    fn attach_leaves(&self, model: &mut Llama, seed: u64) {
        let What::Adapters { config, modules, draw } = &self.what else { return };
        let index: BTreeMap<&str, usize> =
            modules.iter().enumerate().map(|(index, name)| (name.as_str(), index)).collect();
        for (module, part) in model.linears_mut() {
            if let Some(&index) = index.get(module.as_str()) {
                let first_column = match self.parts[2 * index].shard() {
                    Shard::Columns(slice) => slice.range().start,
                    _ => 0,
                };
                let (p, draw) = (config.lora_dropout, draw.clone());
                let dropout =
                    (p > 0.0).then(|| LoraDropout::new(p, seed, &module, first_column, draw));
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
    /// the same memory, or, where it keeps them in another kind, with copies that follow each step. Behind
    /// copies the optimizer's values are divided as its moments are.
    ///
    /// # Errors
    /// If values, gradients and moments do not fit into memory.
    pub fn take_weights(model: &mut Llama, optimizer: impl Into<OptimizerConfig>) -> Result<Self> {
        let config = optimizer.into();
        let mut initial = Vec::new();
        let mut ranges = Vec::new();
        let mut has_copies = false;
        model.replace_weights(&mut |parts, weight| {
            has_copies |= weight.kind() != Kind::Float;
            let first = initial.len();
            let mut start = 0;
            for (name, rows) in parts {
                initial.push((name.clone(), weight.f_narrow(0, start, *rows)?));
                start += rows;
            }
            ranges.push(first..initial.len());
            Ok(weight.shallow_clone())
        })?;
        let divides_values = has_copies && config.share != Share::ALL;
        let values = FlatValues::new(config, &initial, model.device(), divides_values)?;
        let part = |(name, _): &(String, Tensor)| {
            let module = name.strip_suffix(".weight").unwrap_or(name);
            part_of(model, module, TrainedTensor::Weight)
        };
        let parts = initial.iter().map(part).collect::<Result<_>>()?;
        drop(initial);
        let mut ranges = ranges.into_iter();
        let mut leaves = Vec::new();
        model.replace_weights(&mut |_, weight| {
            let entries = ranges.next().unwrap_or_default();
            let copied = weight.kind() != Kind::Float || divides_values;
            let tensor = match copied {
                true => weight.detach().contiguous(),
                false => values.joined(entries.clone(), &weight.size()).detach(),
            };
            let tensor = tensor.set_requires_grad(true);
            leaves.push(Leaf { tensor: tensor.shallow_clone(), entries, copied });
            Ok(tensor)
        })?;
        // Of the model's own weights what is not computed with is gone by now.
        let optimizer = values.into_optimizer()?;
        let config = model.config();
        let what = What::Weights {
            num_layers: config.num_hidden_layers as usize,
            tied: config.tie_word_embeddings,
        };
        Ok(Self { optimizer, parts, what, leaves })
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
    ///
    /// # Panics
    /// If values are divided, and not all of it are here.
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

    /// An optimizer step, see [`FlatAdamW::step`]; the model follows. Every rank must call this.
    ///
    /// # Errors
    /// If libtorch refuses the update, or a rank is gone.
    pub fn step(&mut self, learning_rate: f64, grad_norm: f64, ranks: &Ranks<'_>) -> Result<()> {
        self.optimizer.step(learning_rate, grad_norm)?;
        self.optimizer.share_updates(ranks.dp())?;
        for leaf in self.leaves.iter().filter(|leaf| leaf.copied) {
            let target = leaf.tensor.detach();
            self.optimizer.copy_joined_to(leaf.entries.clone(), &target, ranks.dp())?;
        }
        Ok(())
    }

    /// Makes the gradients of this rank's rows complete: sums them over the replicas, then what is a
    /// partial sum over the ranks that share a replica. Gives their global norm. Every rank must call
    /// this; copies of a parameter have the same gradient afterwards, to the last bit.
    ///
    /// # Errors
    /// If a rank is gone.
    pub fn complete_gradients(&mut self, ranks: &Ranks<'_>) -> Result<f64> {
        self.optimizer.all_reduce_gradients(ranks.dp())?;
        if ranks.dims().tp == 1 {
            return Ok(self.optimizer.grad_norm());
        }
        let gradients: Vec<_> =
            (0..self.parts.len()).map(|entry| self.optimizer.gradient(entry)).collect();
        let pairs: Vec<_> = self.parts.iter().zip(&gradients).collect();
        sum_gradients(&pairs, ranks.tp())?;
        Ok(global_norm(&pairs, ranks.tp())?)
    }

    /// What each of the optimizer's entries is a part of.
    pub fn parts(&self) -> &[TrainedPart] {
        &self.parts
    }

    /// Trained numbers of the whole model.
    pub fn num_parameters(&self) -> i64 {
        (0..self.parts.len()).map(|entry| self.whole_shape(entry).iter().product::<i64>()).sum()
    }

    /// Takes over values and moments after `updates` updates, one tensor at a time: `read` gives this rank's
    /// part of an entry, as the shard says. The model follows.
    ///
    /// # Errors
    /// Those of `read`, or if a shape differs; some entries are restored then.
    pub fn restore(
        &mut self,
        updates: u64,
        mut read: impl FnMut(&Entry, Held, &Shard) -> Result<Tensor>,
    ) -> Result<()> {
        for index in 0..self.parts.len() {
            for held in Held::ALL {
                let entry = &self.optimizer.entries()[index];
                let own = read(entry, held, self.parts[index].shard())?;
                self.optimizer.restore(index, held, &own)?;
                if held == Held::Value {
                    self.copy_to_leaf(index, &own)?;
                }
            }
        }
        self.optimizer.go_on_behind(updates);
        Ok(())
    }

    /// Puts this rank's part of a matrix in the place of entry `index`'s value.
    ///
    /// # Errors
    /// If the shape differs.
    pub fn set_value(&mut self, index: usize, own: &Tensor) -> Result<()> {
        self.optimizer.restore(index, Held::Value, own)?;
        self.copy_to_leaf(index, own)
    }

    /// Value and moments of entry `index` of the whole model. Every rank must call this; those of the
    /// first replica get them.
    ///
    /// # Errors
    /// If a rank is gone.
    pub fn whole_state(&self, index: usize, ranks: &Ranks<'_>) -> Result<Option<[Tensor; 3]>> {
        let [value, m, v] = self.optimizer.state(index, ranks.dp())?;
        if !ranks.is_of_first_replica() {
            return Ok(None);
        }
        let whole = |part: &Tensor| gather_trained(&self.parts[index], part, ranks.tp());
        Ok(Some([whole(&value)?, whole(&m)?, whole(&v)?]))
    }

    /// The shape of entry `index` of the whole model.
    pub fn whole_shape(&self, index: usize) -> Vec<i64> {
        self.parts[index].shard().full_shape(&self.optimizer.entries()[index].shape)
    }

    /// Where the model computes with a copy, it takes over the value of entry `index`.
    fn copy_to_leaf(&self, index: usize, value: &Tensor) -> Result<()> {
        let holds = |leaf: &&Leaf| leaf.copied && leaf.entries.contains(&index);
        let Some(leaf) = self.leaves.iter().find(holds) else { return Ok(()) };
        let entries = self.optimizer.entries();
        let start = entries[index].range.start - entries[leaf.entries.start].range.start;
        let flat = leaf.tensor.detach().f_view([-1])?;
        let mut place = flat.f_narrow(0, start, value.numel() as i64)?;
        no_grad(|| place.f_copy_(&value.f_reshape([-1])?))?;
        Ok(())
    }

    /// The whole model's adapters as they are now, in f32; nothing where weights are trained. Every rank
    /// of the group that shares the model must call this; all get the same.
    ///
    /// # Errors
    /// If a rank is gone.
    pub fn adapter(&self, tp: &dyn Communicator) -> Result<Option<Adapter>> {
        let What::Adapters { config, .. } = &self.what else { return Ok(None) };
        let mut tensors = BTreeMap::new();
        self.each_pair(tp, |module, pair| {
            tensors.insert(module.to_owned(), pair);
            Ok(())
        })?;
        Ok(Some(Adapter { config: config.clone(), tensors }))
    }

    /// Writes what [`Trained::adapter`] would give, a module at a time, into an existing folder on the rank
    /// that names one; nothing where weights are trained. Every rank of the group that shares the model must
    /// call this.
    ///
    /// # Errors
    /// If a rank is gone, or the disk is full.
    pub fn write_adapter(&self, dir: Option<&Path>, tp: &dyn Communicator) -> Result<()> {
        let What::Adapters { config, modules, .. } = &self.what else { return Ok(()) };
        let shape = |index: usize| {
            let [a, b] = [2 * index, 2 * index + 1].map(|entry| self.whole_shape(entry));
            (modules[index].clone(), [b[0], a[1]])
        };
        let shapes: Vec<_> = self.modules_by_name().map(shape).collect();
        let mut writer = dir.map(|dir| AdapterWriter::create(dir, config, &shapes)).transpose()?;
        self.each_pair(tp, |module, pair| {
            writer.as_mut().map_or(Ok(()), |writer| Ok(writer.append(module, &pair)?))
        })?;
        Ok(writer.map_or(Ok(()), AdapterWriter::finish)?)
    }

    /// Gives `take` the factors of each module of the whole model, by the modules' names.
    fn each_pair(
        &self,
        tp: &dyn Communicator,
        mut take: impl FnMut(&str, LoraPair) -> Result<()>,
    ) -> Result<()> {
        let What::Adapters { modules, .. } = &self.what else { return Ok(()) };
        for index in self.modules_by_name() {
            let value = |leaf: usize| -> Result<Tensor> {
                let whole = gather_trained(&self.parts[leaf], &self.leaf(leaf).detach(), tp)?;
                Ok(whole.f_to_device(Device::Cpu)?)
            };
            let (lora_a, lora_b) = (value(2 * index)?, value(2 * index + 1)?);
            take(&modules[index], LoraPair { lora_a, lora_b })?;
        }
        Ok(())
    }

    fn modules_by_name(&self) -> impl Iterator<Item = usize> + use<> {
        let mut order = Vec::new();
        if let What::Adapters { modules, .. } = &self.what {
            order.extend(0..modules.len());
            order.sort_by_key(|&index: &usize| &modules[index]);
        }
        order.into_iter()
    }
}

/// What this rank holds of a trained tensor.
fn part_of(model: &Llama, module: &str, tensor: TrainedTensor) -> Result<TrainedPart> {
    let part = model.plan().trained_part(model.tp_rank(), module, tensor);
    part.ok_or_else(|| Error::NotTrained { module: module.to_owned() })
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
