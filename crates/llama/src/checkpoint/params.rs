//! Meta's `params.json`, and the `config.json` that says the same.

use std::{collections::BTreeMap, fs, path::Path};

use dromedary_tokenizer::Tokenizer;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::dtype::Dtype;
use crate::{
    config::{LlamaConfig, RopeScaling},
    error::{Error, Result},
};

pub(crate) const PARAMS: &str = "params.json";

/// Keys that say how a program may run the model, and nothing of the model.
const OF_RUNS: [&str; 4] =
    ["max_batch_size", "max_seq_len", "max_shared_seq_len", "model_parallel_size"];

/// `use_scaled_rope`: LLaMA 3.1's numbers, which its own code holds.
const SCALED_ROPE: RopeScaling = RopeScaling::Llama3 {
    factor: 8.0,
    low_freq_factor: 1.0,
    high_freq_factor: 4.0,
    original_max_position_embeddings: 8192,
};

/// A model's sizes by Meta's names.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Params {
    pub(crate) dim: i64,
    pub(crate) n_layers: i64,
    pub(crate) n_heads: i64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) n_kv_heads: Option<i64>,
    /// -1: as many as the tokenizer has.
    #[serde(default = "of_tokenizer")]
    pub(crate) vocab_size: i64,
    #[serde(default = "usual_multiple")]
    pub(crate) multiple_of: i64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) ffn_dim_multiplier: Option<f64>,
    #[serde(default = "usual_eps")]
    pub(crate) norm_eps: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) rope_theta: Option<f64>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) use_scaled_rope: bool,
    /// Width of all query heads of a checkpoint that Dromedary padded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) qkv_dim: Option<i64>,
    /// Width inside of its feed-forward block, before it is rounded up to `multiple_of`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) ffn_dim: Option<i64>,
    /// Rows of its embedding and of its head.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) model_vocab_size: Option<i64>,
    #[serde(flatten, skip_serializing)]
    rest: BTreeMap<String, Value>,
}

fn of_tokenizer() -> i64 {
    -1
}

fn usual_multiple() -> i64 {
    256
}

fn usual_eps() -> f64 {
    1e-5
}

/// What `config.json` has and `params.json` has not.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HfSizes {
    pub(crate) num_attention_heads: i64,
    pub(crate) num_key_value_heads: i64,
    pub(crate) intermediate_size: i64,
    pub(crate) vocab_size: i64,
    pub(crate) max_position_embeddings: i64,
    pub(crate) dtype: Dtype,
}

impl Params {
    /// Reads `params.json` of a folder, and refuses what is not followed.
    pub(crate) fn open(dir: &Path) -> Result<Self> {
        let path = dir.join(PARAMS);
        let bytes = fs::read(&path).map_err(Error::io(&path))?;
        let params: Self = serde_json::from_slice(&bytes)
            .map_err(|source| Error::Json { path: path.clone(), source })?;
        let wrong = |message| Err(Error::Config { path: path.clone(), message });
        if let Some(key) = params.rest.keys().find(|key| !OF_RUNS.contains(&key.as_str())) {
            return wrong(format!("the key {key} is not known, and may change the model"));
        }
        for (key, value) in
            [("dim", params.dim), ("n_heads", params.n_heads), ("multiple_of", params.multiple_of)]
        {
            if !(1..=1 << 26).contains(&value) {
                return wrong(format!("{key} {value} is not in 1..={}", 1 << 26));
            }
        }
        if params.dim % params.n_heads != 0 {
            let (dim, heads) = (params.dim, params.n_heads);
            return wrong(format!("dim {dim} is not a multiple of n_heads {heads}"));
        }
        Ok(params)
    }

    pub(crate) fn head_dim(&self) -> i64 {
        self.dim / self.n_heads
    }

    /// Whether Dromedary's converter wrote it, with all sizes but `dim` rounded up.
    pub(crate) fn is_padded(&self) -> bool {
        self.qkv_dim.is_some() || self.ffn_dim.is_some() || self.model_vocab_size.is_some()
    }

    /// Width of the feed-forward block as Meta's code computes it.
    pub(crate) fn intermediate_size(&self) -> i64 {
        self.rounded_up(unrounded(self.dim, self.ffn_dim_multiplier))
    }

    /// Width of the feed-forward block in the files.
    pub(crate) fn stored_intermediate_size(&self) -> i64 {
        self.ffn_dim.map_or_else(|| self.intermediate_size(), |width| self.rounded_up(width))
    }

    /// Query heads in the files.
    pub(crate) fn stored_heads(&self) -> i64 {
        self.qkv_dim.unwrap_or(self.dim) / self.head_dim()
    }

    fn rounded_up(&self, width: i64) -> i64 {
        width.saturating_add(self.multiple_of - 1) / self.multiple_of * self.multiple_of
    }

    /// The context of pre-training, which no key says: as Meta's model cards have it for models of
    /// these constants.
    pub(crate) fn usual_context(&self) -> i64 {
        match self.rope_theta {
            _ if self.use_scaled_rope => 131_072,
            Some(theta) if theta >= 1e6 => 16_384,
            Some(theta) if theta >= 5e5 => 8192,
            _ if self.norm_eps == 1e-5 => 4096,
            _ => 2048,
        }
    }

    /// The text of `config.json`.
    pub(crate) fn to_hf(&self, sizes: &HfSizes, tokenizer: Option<&Tokenizer>) -> Value {
        let mut config = json!({
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": false,
            "attention_dropout": 0.0,
            "head_dim": self.head_dim(),
            "hidden_act": "silu",
            "hidden_size": self.dim,
            "initializer_range": 0.02,
            "intermediate_size": sizes.intermediate_size,
            "max_position_embeddings": sizes.max_position_embeddings,
            "mlp_bias": false,
            "model_type": "llama",
            "num_attention_heads": sizes.num_attention_heads,
            "num_hidden_layers": self.n_layers,
            "num_key_value_heads": sizes.num_key_value_heads,
            "pretraining_tp": 1,
            "rms_norm_eps": self.norm_eps,
            "rope_scaling": null,
            "rope_theta": self.rope_theta.unwrap_or(10_000.0),
            "tie_word_embeddings": false,
            "torch_dtype": sizes.dtype.torch_name(),
            "use_cache": true,
            "vocab_size": sizes.vocab_size,
        });
        if self.use_scaled_rope {
            config["rope_scaling"] = json!({
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            });
        }
        for (key, id) in [
            ("bos_token_id", tokenizer.and_then(Tokenizer::bos_id)),
            ("eos_token_id", tokenizer.and_then(Tokenizer::eos_id)),
        ] {
            if let Some(id) = id {
                config[key] = json!(id);
            }
        }
        config
    }

    /// What Meta's code computes the same model from. `path` is what errors name.
    ///
    /// # Errors
    /// A model that `params.json` cannot describe: heads that are not `dim / n_heads` wide, scaled
    /// rotary frequencies of other numbers than LLaMA 3.1's.
    pub(crate) fn of_hf(config: &LlamaConfig, path: &Path) -> Result<Self> {
        let (dim, n_heads) = (config.hidden_size, config.num_attention_heads);
        if config.head_dim * n_heads != dim {
            let message = format!(
                "Meta's format has heads of hidden_size / num_attention_heads = {dim} / {n_heads} \
                 features, these have {}",
                config.head_dim
            );
            return Err(Error::Config { path: path.into(), message });
        }
        let use_scaled_rope = match config.rope_scaling {
            RopeScaling::None => false,
            scaling if scaling == SCALED_ROPE => true,
            scaling => {
                let message = format!("Meta's format has no place for {scaling:?}");
                return Err(Error::Config { path: path.into(), message });
            }
        };
        let kv_heads = config.num_key_value_heads;
        let (multiple_of, ffn_dim_multiplier) = rounding_to(dim, config.intermediate_size);
        Ok(Self {
            dim,
            n_layers: config.num_hidden_layers,
            n_heads,
            n_kv_heads: (kv_heads != n_heads).then_some(kv_heads),
            vocab_size: config.vocab_size,
            multiple_of,
            ffn_dim_multiplier,
            norm_eps: config.rms_norm_eps,
            rope_theta: Some(config.rope_theta).filter(|theta| *theta != 10_000.0),
            use_scaled_rope,
            qkv_dim: None,
            ffn_dim: None,
            model_vocab_size: None,
            rest: BTreeMap::new(),
        })
    }
}

/// Two thirds of four times the width, times the multiplier, each rounded down as Python's `int` does.
fn unrounded(dim: i64, multiplier: Option<f64>) -> i64 {
    let width = 2 * 4 * dim / 3;
    multiplier.map_or(width, |multiplier| (multiplier * width as f64) as i64)
}

/// `multiple_of` and `ffn_dim_multiplier` that lead from a model's width to that of its feed-forward
/// block: no multiplier where it can be, else one of few digits.
fn rounding_to(dim: i64, width: i64) -> (i64, Option<f64>) {
    let plain = unrounded(dim, None);
    let powers = (0..=12).rev().map(|power| 1_i64 << power).filter(|power| width % power == 0);
    // 256 is what most of Meta's files have.
    let candidates: Vec<i64> = [256].into_iter().filter(|m| width % m == 0).chain(powers).collect();
    let reached = |from: i64, m: i64| (from + m - 1) / m * m == width;
    if let Some(m) = candidates.iter().copied().find(|m| reached(plain, *m)) {
        return (m, None);
    }
    let ratio = width as f64 / plain.max(1) as f64;
    for digits in 1..=12 {
        let scale = 10_f64.powi(digits);
        for multiplier in [(ratio * scale).floor() / scale, (ratio * scale).ceil() / scale] {
            let from = unrounded(dim, Some(multiplier));
            if let Some(m) = candidates.iter().copied().find(|m| reached(from, *m)) {
                return (m, Some(multiplier));
            }
        }
    }
    (1, Some(ratio))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widths_of_metas_models_are_computed_and_described() {
        // dim, multiple_of, multiplier, width: LLaMA-1 and -2 of 7, 13, 65, 70 B, LLaMA-3 of 8, 70 B.
        for (dim, multiple_of, multiplier, width) in [
            (4096, 256, None, 11_008),
            (5120, 256, None, 13_824),
            (8192, 256, None, 22_016),
            (8192, 4096, Some(1.3), 28_672),
            (4096, 1024, Some(1.3), 14_336),
            (2048, 256, Some(1.5), 8192),
        ] {
            let params = |multiple_of, ffn_dim_multiplier| Params {
                dim,
                multiple_of,
                ffn_dim_multiplier,
                ..serde_json::from_value(json!({"dim": 2, "n_layers": 1, "n_heads": 1})).unwrap()
            };
            assert_eq!(params(multiple_of, multiplier).intermediate_size(), width);
            let (multiple_of, multiplier) = rounding_to(dim, width);
            assert_eq!(params(multiple_of, multiplier).intermediate_size(), width, "{dim}");
        }
        for width in 1..3000 {
            let (multiple_of, multiplier) = rounding_to(70, width);
            let got = unrounded(70, multiplier);
            assert_eq!((got + multiple_of - 1) / multiple_of * multiple_of, width);
        }
    }
}
