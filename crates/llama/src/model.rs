//! The LLaMA of one rank: its slices of the weights, and a forward pass over whatever attends.

// Shapes: T = tokens of all sequences, flattened; C = hidden_size, V = vocab_size,
// W = this rank's rows of the vocabulary, H = query heads and KV = K/V heads of this rank, D = head_dim.

use std::env;
use std::ops::Range;

use dromedary_parallel::{Communicator, fault_point};
use dromedary_torch_ext::release_free_memory;
use tch::{Device, Kind, Tensor};

use crate::{
    Checkpoint, Error, LlamaConfig, Plan, RankPlan, Result, Shard,
    attention::causal_attention,
    block::{self, Layer},
    checkpoint::{EMBEDDING, HEAD},
    heads::Heads,
    kernels::Kernels,
    linear::{Linear, Parallel, Part, Weight},
    norm::RmsNorm,
    quantised::Nf4Slice,
    rotary::{Rotary, RotaryAt},
};

/// Makes a CPU compute in the kind of the weights as a GPU does, with the same casts: for tests of
/// what no GPU is needed for.
const AS_STORED: &str = "DROMEDARY_COMPUTE_AS_STORED";

/// How a model is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadOptions {
    /// Where the weights go.
    pub device: Device,
    /// The kind that weights are kept in: `Float`, `BFloat16` or `Half`. A GPU computes in it, a CPU
    /// in f32, see [`Llama::computing_in`]. Norms' statistics, softmax, rotary embedding and logits are
    /// in f32 whatever this is.
    pub kind: Kind,
    /// Pack the linear layers for this crate's own kernels, and compute with them, where that is
    /// possible: f32 on a CPU. Elsewhere, and without it, libtorch's operations compute.
    pub pack: bool,
    /// Keep linear layers that are stored in NF4 so, on a CPU, and dequantise each when it is used:
    /// 4.13 bits a parameter, and the work of dequantising in each pass. This crate's own kernels (see
    /// `pack`) dequantise some rows at a time. Without it, and on other devices, they are dequantised
    /// when they are read.
    pub nf4: bool,
    /// This process in its tensor-parallel group.
    pub tp_rank: usize,
    /// Size of the tensor-parallel group.
    pub tp: usize,
}

impl Default for LoadOptions {
    /// The whole model on the CPU in f32, packed where possible.
    fn default() -> Self {
        Self { device: Device::Cpu, kind: Kind::Float, pack: true, nf4: false, tp_rank: 0, tp: 1 }
    }
}

impl LoadOptions {
    /// Most CPUs multiply 16-bit numbers one by one: on two cores with AVX2 a product takes 2.6 s in
    /// bf16 and 0.04 s in f32.
    pub(crate) fn compute_kind(&self) -> Kind {
        let as_stored = self.device != Device::Cpu || env::var_os(AS_STORED).is_some();
        if as_stored { self.kind } else { Kind::Float }
    }

    /// This crate's own kernels, where they compute.
    pub(crate) fn kernels(&self) -> Option<Kernels> {
        self.packs().then(Kernels::detect)
    }

    /// Whether a packed head holds the embedding too: both are one matrix, and the head is whole.
    pub(crate) fn embeds_by_head(&self, config: &LlamaConfig) -> bool {
        self.packs() && self.tp == 1 && config.tie_word_embeddings
    }

    /// Whether packing is asked for and possible.
    pub(crate) fn packs(&self) -> bool {
        self.pack && self.device == Device::Cpu && self.kind == Kind::Float
    }
}

/// A LLaMA, or one rank's share of it.
#[derive(Debug)]
pub struct Llama {
    config: LlamaConfig,
    options: LoadOptions,
    compute_kind: Kind,
    plan: Plan,
    heads: Heads,
    rotary: Rotary,
    /// `(V, C)`; none where it is the packed head.
    embed_tokens: Option<Tensor>,
    layers: Vec<Layer>,
    norm: RmsNorm,
    lm_head: Linear, // (W, C)
}

/// What attends in each layer of a forward pass: the layer's number, then the arguments of
/// [`block::Attend`].
pub type AttendInLayer<'a> = &'a mut dyn FnMut(usize, &Tensor, &Tensor, &Tensor) -> Result<Tensor>;

/// Gives the successor of a weight; see [`Llama::replace_weights`].
pub type ReplaceWeight<'a> = &'a mut dyn FnMut(&[(String, i64)], &Tensor) -> Result<Tensor>;

impl Llama {
    /// Reads this rank's slices of a checkpoint.
    ///
    /// # Errors
    /// The model cannot be split over `tp` ranks, `tp_rank` is not below `tp`, a file cannot be
    /// read, memory ends.
    pub fn load(checkpoint: &Checkpoint, options: &LoadOptions) -> Result<Self> {
        let config = checkpoint.config().clone();
        let plan = Plan::new(&config, options.tp)?;
        if options.tp_rank >= options.tp {
            return Err(Error::GroupRank { rank: options.tp_rank, size: options.tp });
        }
        checkpoint.check_rank(options.tp_rank, options.tp)?;
        let rank_plan = plan.rank(options.tp_rank).clone();
        let loader = Loader { checkpoint, options, plan: &rank_plan, config: &config };
        let heads = Heads::new(&rank_plan, config.head_dim);
        let layers = (0..config.num_hidden_layers)
            .map(|layer| {
                let layer = loader.layer(&format!("model.layers.{layer}"), &heads)?;
                // What its weights were read into is too scattered for the next one's.
                release_free_memory();
                Ok(layer)
            })
            .collect::<Result<_>>()?;
        let embed_tokens = loader.tensor(EMBEDDING)?;
        let lm_head = loader.head(&embed_tokens)?;
        let embed_tokens = (!options.embeds_by_head(&config)).then_some(embed_tokens);
        let norm = loader.norm("model.norm")?;
        let rotary = Rotary::new(&config, options.device)?;
        release_free_memory();
        Ok(Self {
            config,
            options: *options,
            compute_kind: options.compute_kind(),
            plan,
            heads,
            rotary,
            embed_tokens,
            layers,
            norm,
            lm_head,
        })
    }

    /// The whole model's hyper-parameters.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// What each rank owns.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// What this rank owns.
    pub fn rank_plan(&self) -> &RankPlan {
        self.plan.rank(self.options.tp_rank)
    }

    /// This rank in its tensor-parallel group.
    pub fn tp_rank(&self) -> usize {
        self.options.tp_rank
    }

    /// The attention heads of this rank.
    pub fn heads(&self) -> &Heads {
        &self.heads
    }

    /// Where the weights are.
    pub fn device(&self) -> Device {
        self.options.device
    }

    /// The kind that is computed in, in which keys and values are kept too.
    pub fn kind(&self) -> Kind {
        self.compute_kind
    }

    /// The kind that weights are kept in, which rounds them.
    pub(crate) fn weights_kind(&self) -> Kind {
        self.options.kind
    }

    /// The same model, computing in another kind than the one that [`LoadOptions::kind`] and the device
    /// lead to: bf16 on a CPU that has units for it. Weights kept in another kind are converted one
    /// layer at a time, when they are used; packed ones are f32 and need `Kind::Float`.
    pub fn computing_in(mut self, kind: Kind) -> Self {
        let norms = self
            .layers
            .iter_mut()
            .flat_map(|layer| [&mut layer.input_layernorm, &mut layer.post_attention_layernorm]);
        for norm in norms.chain([&mut self.norm]) {
            norm.weight = norm.weight.to_kind(kind);
            norm.kernels = norm.kernels.filter(|_| kind == Kind::Float);
        }
        self.compute_kind = kind;
        self
    }

    /// Whether linear layers are kept in NF4.
    pub fn keeps_nf4(&self) -> bool {
        self.nf4_bytes() > 0
    }

    /// Bytes of the linear layers that are kept in NF4.
    pub fn nf4_bytes(&self) -> u64 {
        let bytes = |linear: &Linear| match &linear.weight {
            Weight::Nf4(weight) => weight.bytes(),
            _ => 0,
        };
        self.layers.iter().flat_map(Layer::linears).map(bytes).sum()
    }

    /// Whether weights are packed, and this crate's own kernels compute.
    pub fn packs(&self) -> bool {
        self.options.packs()
    }

    /// What computes between the linear layers and attends, where it is not libtorch.
    pub(crate) fn kernels(&self) -> Option<Kernels> {
        self.options.kernels().filter(|_| self.compute_kind == Kind::Float)
    }

    /// The layers, first to last.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// This rank's slice of a stored tensor (`model.layers.0.self_attn.q_proj.weight`), as
    /// [`RankPlan::shard`] cuts it: a view, but of a packed weight, which is unpacked. Nothing if the
    /// model has no such tensor.
    ///
    /// # Errors
    /// No memory.
    pub fn slice(&self, tensor: &str) -> Result<Option<Tensor>> {
        match tensor {
            EMBEDDING => return self.embedding().map(Some),
            HEAD => return self.lm_head.part_weight("lm_head"),
            "model.norm.weight" => return Ok(Some(self.norm.weight.shallow_clone())),
            _ => {}
        }
        let path = tensor.strip_prefix("model.layers.").and_then(|t| t.strip_suffix(".weight"));
        let Some((index, path)) = path.and_then(|path| path.split_once('.')) else {
            return Ok(None);
        };
        let Some(layer) = index.parse().ok().and_then(|index: usize| self.layers.get(index)) else {
            return Ok(None);
        };
        let (linears, part) = match path.split_once('.') {
            Some(("self_attn", part)) => ([&layer.qkv_proj, &layer.o_proj], part),
            Some(("mlp", part)) => ([&layer.gate_up_proj, &layer.down_proj], part),
            _ => {
                return Ok(match path {
                    "input_layernorm" => Some(layer.input_layernorm.weight.shallow_clone()),
                    "post_attention_layernorm" => {
                        Some(layer.post_attention_layernorm.weight.shallow_clone())
                    }
                    _ => None,
                });
            }
        };
        let found = linears.iter().find(|linear| linear.part(part).is_some());
        found.map_or(Ok(None), |linear| linear.part_weight(part))
    }

    /// The first part of a linear layer that has an adapter.
    pub(crate) fn adapted_part(&self) -> Option<&'static str> {
        let linears = self.layers.iter().flat_map(Layer::linears);
        linears.chain([&self.lm_head]).find_map(first_adapted)
    }

    /// The projections of all layers with the names of their modules, as in
    /// `model.layers.0.self_attn.q_proj`; this is where adapters are put.
    pub fn linears_mut(&mut self) -> impl Iterator<Item = (String, &mut Part)> {
        self.layers.iter_mut().enumerate().flat_map(|(index, layer)| {
            let attention = layer.qkv_proj.parts.iter_mut().chain(&mut layer.o_proj.parts);
            let mlp = layer.gate_up_proj.parts.iter_mut().chain(&mut layer.down_proj.parts);
            let named = move |block: &str, part: &Part| {
                format!("model.layers.{index}.{block}.{}", part.name)
            };
            attention
                .map(move |part| (named("self_attn", part), part))
                .chain(mlp.map(move |part| (named("mlp", part), part)))
        })
    }

    /// Puts other tensors in the place of all weights: `replace` gets each with the stored tensors that
    /// it is made of, by name and rows, one behind the other, and gives its successor of the same shape.
    /// The order is that of the forward pass; a tied head follows the embedding.
    ///
    /// # Errors
    /// Those of `replace`, no memory.
    pub fn replace_weights(&mut self, replace: ReplaceWeight<'_>) -> Result<()> {
        let mut embed_tokens = self.embedding()?;
        replace_single(EMBEDDING.to_owned(), &mut embed_tokens, replace)?;
        for (index, layer) in self.layers.iter_mut().enumerate() {
            let module = format!("model.layers.{index}");
            layer.replace_weights(&module, replace)?;
        }
        replace_single("model.norm.weight".to_owned(), &mut self.norm.weight, replace)?;
        if self.config.tie_word_embeddings {
            let rows = &self.plan.rank(self.options.tp_rank).vocab;
            let head = embed_tokens.f_narrow(0, rows.start, width(rows))?;
            self.lm_head.weight = Weight::Dense(head);
        } else {
            self.lm_head.replace_weight("", replace)?;
        }
        self.embed_tokens = Some(embed_tokens);
        Ok(())
    }

    /// The weight of the embedding, `(V, C)`: a view, or unpacked where the packed head holds it.
    fn embedding(&self) -> Result<Tensor> {
        match (&self.embed_tokens, &self.lm_head.weight) {
            (Some(weight), _) => Ok(weight.shallow_clone()),
            (None, head) => head.dense(),
        }
    }

    /// The embeddings of tokens.
    ///
    /// # Shapes
    /// result: `(T, C)`.
    ///
    /// # Errors
    /// A token id that is not in the vocabulary.
    pub fn embed(&self, ids: &[u32]) -> Result<Tensor> {
        if let Some(&id) = ids.iter().find(|&&id| i64::from(id) >= self.config.vocab_size) {
            return Err(Error::TokenId { id, vocab_size: self.config.vocab_size });
        }
        let weight = match (&self.embed_tokens, &self.lm_head.weight) {
            (None, Weight::Packed(head)) => return head.rows(ids),
            (Some(weight), _) => weight.shallow_clone(),
            (None, head) => head.dense()?,
        };
        let ids: Vec<i64> = ids.iter().map(|&id| i64::from(id)).collect();
        let ids = Tensor::from_slice(&ids).f_to_device(self.device())?;
        Ok(weight.f_index_select(0, &ids)?.f_to_kind(self.compute_kind)?)
    }

    /// The rotations of tokens at these positions.
    ///
    /// # Errors
    /// libtorch refused an operation.
    pub fn rotary_at(&self, positions: &[i64]) -> Result<RotaryAt> {
        self.rotary.at(positions)
    }

    /// The norm behind the last layer.
    ///
    /// # Shapes
    /// x: `(T, C)`, result: `(T, C)`.
    pub fn final_norm(&self, x: &Tensor) -> Tensor {
        self.norm.forward(x)
    }

    /// The weight of this rank's rows of the head.
    pub fn lm_head(&self) -> &Linear {
        &self.lm_head
    }

    /// This rank's columns of the logits, in f32.
    ///
    /// # Shapes
    /// x: `(T, C)`, result: `(T, W)`.
    ///
    /// # Errors
    /// libtorch refused an operation, as when memory ends.
    pub fn head(&self, x: &Tensor) -> Result<Tensor> {
        Ok(self.lm_head.forward(x)?.to_kind(Kind::Float))
    }

    /// All columns of the logits from each rank's own; every rank of the group must call this, and
    /// all get the same.
    ///
    /// # Shapes
    /// local: `(T, W)`, result: `(T, V)`.
    ///
    /// # Errors
    /// The group is not the one that the model was loaded for, or the exchange failed.
    pub fn gather_logits(&self, local: Tensor, comm: &dyn Communicator) -> Result<Tensor> {
        self.check_group(comm)?;
        if self.options.tp == 1 {
            return Ok(local);
        }
        let tokens = local.size2()?.0;
        let all = comm.all_gather(&local.reshape(-1))?; // (T x W of rank 0, T x W of rank 1, ..)
        let widths = (0..self.options.tp).map(|rank| width(&self.plan.rank(rank).vocab));
        join_columns(&all, tokens, widths) // (T, V)
    }

    /// All layers over embedded tokens; every rank of the group must call this, and all get the same.
    ///
    /// The residual stream is in f32 whatever the layers compute in: in bf16 it would lose, layer by
    /// layer, what the first layers have added.
    ///
    /// # Shapes
    /// x: `(T, C)`, positions: T, result: `(T, C)` in f32, before the final norm.
    ///
    /// # Errors
    /// Those of `attend`, of the exchange between ranks and of libtorch.
    pub fn forward_layers(
        &self,
        x: Tensor,
        positions: &[i64],
        comm: &dyn Communicator,
        attend: AttendInLayer<'_>,
    ) -> Result<Tensor> {
        self.check_group(comm)?;
        let rotary_at = self.rotary_at(positions)?;
        let mut x = x.f_to_kind(Kind::Float)?;
        for (index, layer) in self.layers.iter().enumerate() {
            fault_point("layer", index)?;
            let mut attend = |q: &Tensor, k: &Tensor, v: &Tensor| attend(index, q, k, v);
            let partial = block::attention_partial(layer, &x, &rotary_at, &mut attend)?;
            x = &x + all_reduced(partial, comm)?;
            let partial = block::mlp_partial(layer, &x)?;
            x = &x + all_reduced(partial, comm)?;
        }
        Ok(x)
    }

    /// The logits after each token of one sequence, without a cache; every rank of the group must
    /// call this, and all get the same.
    ///
    /// # Shapes
    /// result: `(T, V)` in f32.
    ///
    /// # Errors
    /// A token id that is not in the vocabulary, a failed exchange, no memory.
    pub fn forward_logits(&self, ids: &[u32], comm: &dyn Communicator) -> Result<Tensor> {
        tch::no_grad(|| {
            let length = ids.len() as i64;
            let positions: Vec<i64> = (0..length).collect();
            let x =
                self.forward_layers(self.embed(ids)?, &positions, comm, &mut |_, q, k, v| {
                    causal_attention(&self.heads, q, k, v, &[length])
                })?;
            self.gather_logits(self.head(&self.final_norm(&x))?, comm)
        })
    }

    fn check_group(&self, comm: &dyn Communicator) -> Result<()> {
        let (expected, got) = (self.options.tp, comm.world_size());
        if expected == got { Ok(()) } else { Err(Error::GroupSize { expected, got }) }
    }
}

/// A tensor that is stored as it is.
pub(crate) fn replace_single(
    name: String,
    tensor: &mut Tensor,
    replace: ReplaceWeight<'_>,
) -> Result<()> {
    let rows = tensor.size()[0];
    *tensor = replace(&[(name, rows)], tensor)?;
    Ok(())
}

fn width(range: &Range<i64>) -> i64 {
    range.end - range.start
}

/// The sum of the ranks' partial sums.
fn all_reduced(mut partial: Tensor, comm: &dyn Communicator) -> Result<Tensor> {
    if comm.world_size() > 1 {
        comm.all_reduce_sum(&mut partial)?;
    }
    Ok(partial)
}

fn first_adapted(linear: &Linear) -> Option<&'static str> {
    linear.parts.iter().find(|part| part.lora.is_some()).map(|part| part.name)
}

/// Puts columns beside each other that were gathered rank behind rank.
///
/// # Shapes
/// all: `(R x W of rank 0, R x W of rank 1, ..)`, widths: W of each rank, result: `(R, sum of W)`.
pub(crate) fn join_columns(
    all: &Tensor,
    rows: i64,
    widths: impl Iterator<Item = i64>,
) -> Result<Tensor> {
    let sizes: Vec<i64> = widths.map(|width| rows * width).collect();
    let parts = all.f_split_with_sizes(&sizes, 0)?;
    let columns: Vec<Tensor> =
        parts.iter().map(|part| part.f_view([rows, -1])).collect::<std::result::Result<_, _>>()?; // (R, W)
    Ok(Tensor::f_cat(&columns, 1)?) // (R, sum of W)
}

struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    options: &'a LoadOptions,
    plan: &'a RankPlan,
    config: &'a LlamaConfig,
}

impl Loader<'_> {
    fn slice(&self, name: &str, shard: &Shard) -> Result<Tensor> {
        let tensor = self.checkpoint.read_slice(name, shard)?;
        Ok(tensor.f_to_device(self.options.device)?.f_to_kind(self.options.kind)?)
    }

    fn tensor(&self, name: &str) -> Result<Tensor> {
        self.slice(name, &self.plan.shard(name))
    }

    fn norm(&self, module: &str) -> Result<RmsNorm> {
        let name = format!("{module}.weight");
        let weight = self.checkpoint.read_slice(&name, &self.plan.shard(&name))?;
        let weight =
            weight.f_to_device(self.options.device)?.f_to_kind(self.options.compute_kind())?;
        Ok(RmsNorm { weight, eps: self.config.rms_norm_eps, kernels: self.options.kernels() })
    }

    fn linear(&self, module: &str, parts: &[&'static str], parallel: Parallel) -> Result<Linear> {
        if let Some(slices) = self.quantised(module, parts)? {
            return Ok(Linear::fuse_quantised(slices, parallel, self.options.kernels()));
        }
        let weights = parts
            .iter()
            .map(|&part| Ok((part, self.tensor(&format!("{module}.{part}.weight"))?)))
            .collect::<Result<_>>()?;
        self.packed(Linear::fuse(weights, parallel)?)
    }

    /// The slices of a layer that is to stay in NF4; nothing where one of its projections is not in it.
    fn quantised(
        &self,
        module: &str,
        parts: &[&'static str],
    ) -> Result<Option<Vec<(&'static str, Nf4Slice)>>> {
        if !self.options.nf4 || self.options.device != Device::Cpu {
            return Ok(None);
        }
        let slice = |&part: &&'static str| {
            let name = format!("{module}.{part}.weight");
            let slice = self.checkpoint.read_quantised(&name, &self.plan.shard(&name))?;
            Ok(slice.map(|slice| (part, slice)))
        };
        parts.iter().map(slice).collect()
    }

    fn packed(&self, linear: Linear) -> Result<Linear> {
        if self.options.packs() { linear.pack() } else { Ok(linear) }
    }

    fn layer(&self, module: &str, heads: &Heads) -> Result<Layer> {
        let (attention, mlp) = (format!("{module}.self_attn"), format!("{module}.mlp"));
        Ok(Layer {
            input_layernorm: self.norm(&format!("{module}.input_layernorm"))?,
            qkv_proj: self.linear(&attention, &["q_proj", "k_proj", "v_proj"], Parallel::Column)?,
            o_proj: self.linear(&attention, &["o_proj"], Parallel::Row)?,
            post_attention_layernorm: self.norm(&format!("{module}.post_attention_layernorm"))?,
            gate_up_proj: self.linear(&mlp, &["gate_proj", "up_proj"], Parallel::Column)?,
            down_proj: self.linear(&mlp, &["down_proj"], Parallel::Row)?,
            heads: heads.clone(),
            kernels: self.options.kernels(),
        })
    }

    /// A tied head is a slice of the embedding, which is not read again.
    fn head(&self, embed_tokens: &Tensor) -> Result<Linear> {
        let weight = if self.config.tie_word_embeddings {
            let rows = &self.plan.vocab;
            embed_tokens.narrow(0, rows.start, width(rows))
        } else {
            self.tensor("lm_head.weight")?
        };
        self.packed(Linear::fuse(vec![("lm_head", weight)], Parallel::Column)?)
    }
}
