//! Whether two stored models compute the same: logits of both on a fixed prompt, in little memory.
//!
//! The forward pass reads each weight in blocks and keeps none. It shares no step with the converters:
//! weights of Meta's order are used as they lie, and the features that are neighbours are turned. It is
//! computed in f64: on ids without sense some models blow the rounding of f32 up to 1e-4 of a logit, and
//! two orders of one sum would look like two models.

// Shapes: T = tokens, C = hidden_size, O = out features, V = vocab_size, H = query or key heads,
// D = head_dim.

use std::{fmt, ops::Range, path::Path};

use tch::{Device, Kind, Tensor};

use crate::{
    Checkpoint, Error, LlamaConfig, LoraPair, Plan, Result,
    adapter::AdapterFile,
    attention::{causal_attention, one_or_cat},
    checkpoint::{EMBEDDING, HEAD, MetaCheckpoint, blocks, shape_of},
    heads::Heads,
    meter::Meter,
    rotary::Rotary,
};

/// The kind that is computed in.
const KIND: Kind = Kind::Double;
/// Bytes of a weight in memory at once, in this kind.
const BLOCK: usize = 4 << 20;
/// Logits of two layouts of one model may differ by so much: the same numbers, summed in another order.
pub(crate) const TOLERANCE: f64 = 1e-8;
/// Tokens of the fixed prompt.
const TOKENS: u64 = 12;

/// A stored model, of which some rows of a weight are read at a time.
pub(crate) trait StoredModel {
    /// The sizes of what is stored.
    fn config(&self) -> &LlamaConfig;

    /// Rows of a tensor, by the name that Hugging Face gives it.
    fn rows(&self, name: &str, rows: Range<i64>) -> Result<Tensor>;

    /// Whether the features of a head that turn with each other are neighbours (Meta) or half a head
    /// apart (Hugging Face).
    fn turns_neighbours(&self) -> bool {
        false
    }

    /// What is added to a module's weight, and how strongly.
    fn lora(&self, _module: &str) -> Result<Option<(LoraPair, f64)>> {
        Ok(None)
    }
}

impl StoredModel for Checkpoint {
    fn config(&self) -> &LlamaConfig {
        self.config()
    }

    fn rows(&self, name: &str, rows: Range<i64>) -> Result<Tensor> {
        self.read_rows(name, rows)
    }
}

impl StoredModel for MetaCheckpoint {
    fn config(&self) -> &LlamaConfig {
        self.stored_config()
    }

    fn rows(&self, name: &str, rows: Range<i64>) -> Result<Tensor> {
        self.stored_rows(name, rows)
    }

    fn turns_neighbours(&self) -> bool {
        true
    }
}

/// A base with an adapter that is not merged into it.
pub(crate) struct Adapted<'a> {
    pub(crate) base: &'a Checkpoint,
    pub(crate) adapter: &'a AdapterFile,
}

impl StoredModel for Adapted<'_> {
    fn config(&self) -> &LlamaConfig {
        self.base.config()
    }

    fn rows(&self, name: &str, rows: Range<i64>) -> Result<Tensor> {
        self.base.read_rows(name, rows)
    }

    fn lora(&self, module: &str) -> Result<Option<(LoraPair, f64)>> {
        if !self.adapter.has(module) {
            return Ok(None);
        }
        Ok(Some((self.adapter.read(module)?, self.adapter.config().scaling())))
    }
}

/// How far the logits of two stored models are apart.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LogitDifference {
    /// The largest difference, as a share of the largest logit.
    pub largest: f64,
    /// Positions of the prompt at which both models find the same next token best.
    pub same_best: usize,
    /// Tokens of the prompt.
    pub tokens: usize,
}

impl fmt::Display for LogitDifference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { largest, same_best, tokens } = self;
        write!(f, "{largest:.1e} x max|logit|, best token equal at {same_best} of {tokens}")
    }
}

/// As [`difference`], and more than `allowed` is an error that names `path`.
pub(crate) fn compare(
    one: &dyn StoredModel,
    other: &dyn StoredModel,
    path: &Path,
    allowed: f64,
    meter: &Meter<'_>,
) -> Result<LogitDifference> {
    let difference = difference(one, other, meter)?;
    // NaN is too much as well.
    if difference.largest <= allowed {
        return Ok(difference);
    }
    Err(Error::LogitsDiffer { path: path.into(), difference, allowed })
}

/// Compares two models on the same fixed token ids, over the vocabulary that both have.
pub(crate) fn difference(
    one: &dyn StoredModel,
    other: &dyn StoredModel,
    meter: &Meter<'_>,
) -> Result<LogitDifference> {
    let vocab_size = one.config().vocab_size.min(other.config().vocab_size);
    let prompt = prompt(vocab_size);
    let [one, other] = [logits(one, &prompt, meter)?, logits(other, &prompt, meter)?]
        .map(|logits| logits.narrow(1, 0, vocab_size)); // (T, V)
    let largest = one.abs().max().f_double_value(&[])?;
    let apart = (&one - &other).abs().max().f_double_value(&[])?;
    let same = one.argmax(1, false).eq_tensor(&other.argmax(1, false));
    let same_best = same.sum(Kind::Int64).f_int64_value(&[])? as usize;
    Ok(LogitDifference { largest: apart / largest, same_best, tokens: prompt.len() })
}

/// Ids spread over the vocabulary, so that no tokenizer is needed.
fn prompt(vocab_size: i64) -> Vec<i64> {
    // The increments of a Weyl sequence: no two of a few dozen are near each other.
    let spread = |token: u64| (token.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33) as i64;
    (1..=TOKENS).map(|token| spread(token) % vocab_size).collect()
}

/// The logits after each token.
fn logits(model: &dyn StoredModel, ids: &[i64], meter: &Meter<'_>) -> Result<Tensor> {
    tch::no_grad(|| Forward::new(model, ids.len(), meter)?.run(ids))
}

struct Forward<'a, 'm> {
    model: &'a dyn StoredModel,
    meter: &'a Meter<'m>,
    heads: Heads,
    /// Cosine and sine, `(T, 1, D/2)` each.
    rotary: [Tensor; 2],
    tokens: i64,
}

impl<'a, 'm> Forward<'a, 'm> {
    fn new(model: &'a dyn StoredModel, tokens: usize, meter: &'a Meter<'m>) -> Result<Self> {
        let config = model.config();
        let heads = Heads::new(Plan::new(config, 1)?.rank(0), config.head_dim);
        let positions: Vec<i64> = (0..tokens as i64).collect();
        let rotary = Rotary::new(config, Device::Cpu)?.at(&positions)?;
        let rotary = rotary.parts().map(|part| part.to_kind(KIND));
        Ok(Self { model, meter, heads, rotary, tokens: tokens as i64 })
    }

    fn run(&self, ids: &[i64]) -> Result<Tensor> {
        let config = self.model.config();
        let rows = ids.iter().map(|id| self.model.rows(EMBEDDING, *id..id + 1));
        let rows = rows.collect::<Result<Vec<_>>>()?;
        let mut x = one_or_cat(rows, 0)?.f_to_kind(KIND)?; // (T, C)
        for layer in 0..config.num_hidden_layers {
            let name = |path: &str| format!("model.layers.{layer}.{path}");
            let normed = self.norm(&name("input_layernorm"), &x)?;
            x += self.attention(&name("self_attn"), &normed)?;
            let normed = self.norm(&name("post_attention_layernorm"), &x)?;
            let gate = self.linear(&name("mlp.gate_proj"), &normed)?.silu();
            let up = self.linear(&name("mlp.up_proj"), &normed)?;
            x += self.linear(&name("mlp.down_proj"), &(gate * up))?;
        }
        let x = self.norm("model.norm", &x)?;
        let head = if config.tie_word_embeddings { EMBEDDING } else { HEAD };
        self.linear(head.strip_suffix(".weight").unwrap_or(head), &x) // (T, V)
    }

    fn norm(&self, module: &str, x: &Tensor) -> Result<Tensor> {
        let config = self.model.config();
        let weight = self.model.rows(&format!("{module}.weight"), 0..config.hidden_size)?;
        let mean_square = x.square().f_mean_dim(-1, true, KIND)?; // (T, 1)
        Ok(x * (mean_square + config.rms_norm_eps).rsqrt() * weight.f_to_kind(KIND)?) // (T, C)
    }

    /// `(T, C)` in, `(T, C)` out.
    fn attention(&self, module: &str, x: &Tensor) -> Result<Tensor> {
        let split = |name: &str| {
            let y = self.linear(&format!("{module}.{name}"), x)?;
            Ok::<_, crate::Error>(y.view([self.tokens, -1, self.heads.head_dim])) // (T, H, D)
        };
        let (q, k, v) =
            (self.turn(&split("q_proj")?), self.turn(&split("k_proj")?), split("v_proj")?);
        let y = causal_attention(&self.heads, &q, &k, &v, &[self.tokens])?; // (T, H, D)
        self.linear(&format!("{module}.o_proj"), &y.reshape([self.tokens, -1]))
    }

    /// Rotates each head by its token's position. `(T, H, D)` in and out.
    fn turn(&self, x: &Tensor) -> Tensor {
        let size = x.size();
        // The two that turn with each other are the last or the last but one dimension.
        let (pairs, dim) = match self.model.turns_neighbours() {
            true => (x.reshape([size[0], size[1], -1, 2]), 3), // (T, H, D/2, 2)
            false => (x.reshape([size[0], size[1], 2, -1]), 2), // (T, H, 2, D/2)
        };
        let (a, b) = (pairs.select(dim, 0), pairs.select(dim, 1)); // (T, H, D/2)
        let [cos, sin] = &self.rotary;
        let turned = [&a * cos - &b * sin, &a * sin + &b * cos];
        Tensor::stack(&turned, dim).reshape(&size)
    }

    /// `x W^T`, and the module's adapter. `(T, C)` in, `(T, O)` out.
    fn linear(&self, module: &str, x: &Tensor) -> Result<Tensor> {
        let name = format!("{module}.weight");
        let shape = shape_of(self.model.config(), &name);
        let columns = shape.get(1).copied().unwrap_or(1);
        let parts = blocks(shape[0], columns as u64 * 8, 1, BLOCK)
            .map(|rows| {
                self.meter.looked_at()?;
                let weight = self.model.rows(&name, rows)?.f_to_kind(KIND)?;
                Ok(x.f_matmul(&weight.tr())?)
            })
            .collect::<Result<Vec<_>>>()?;
        let y = one_or_cat(parts, 1)?; // (T, O)
        let Some((LoraPair { lora_a, lora_b }, scaling)) = self.model.lora(module)? else {
            return Ok(y);
        };
        let low = x.f_matmul(&lora_a.f_to_kind(KIND)?.tr())?; // (T, r)
        Ok(y + low.f_matmul(&lora_b.f_to_kind(KIND)?.tr())? * scaling)
    }
}
