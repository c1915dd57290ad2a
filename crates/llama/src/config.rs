//! The model's hyper-parameters, from Hugging Face's `config.json`.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use dromedary_tokenizer::Tokenizer;
use serde::Deserialize;
use serde_json::Value;

use crate::{
    checkpoint::Dtype,
    error::{Error, Result},
};

/// Bounds that no LLaMA comes near; they keep products of sizes far from overflow, and the list of
/// expected tensors small, whatever a damaged file says.
const MAX_LAYERS: i64 = 4096;
const MAX_SIZE: i64 = 1 << 26;

/// How rotary frequencies are stretched for contexts longer than those of pre-training.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// As trained.
    None,
    /// Positions are divided by `factor`.
    Linear {
        /// How many times longer the context is.
        factor: f64,
    },
    /// LLaMA 3.1's: low frequencies are divided by `factor`, high ones kept, those between blended.
    Llama3 {
        /// The divisor of the low frequencies.
        factor: f64,
        /// Wave lengths above `original_max_position_embeddings / low_freq_factor` are stretched.
        low_freq_factor: f64,
        /// Wave lengths below `original_max_position_embeddings / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// The context length of pre-training, in tokens.
        original_max_position_embeddings: i64,
    },
}

/// A LLaMA's sizes and constants, resolved and checked; names are those of `config.json`.
#[derive(Debug, Clone, PartialEq)]
pub struct LlamaConfig {
    /// Width of the residual stream.
    pub hidden_size: i64,
    /// Width inside the feed-forward block.
    pub intermediate_size: i64,
    /// Number of layers.
    pub num_hidden_layers: i64,
    /// Number of query heads.
    pub num_attention_heads: i64,
    /// Number of key/value heads; divides the number of query heads.
    pub num_key_value_heads: i64,
    /// Width of a head; even.
    pub head_dim: i64,
    /// Rows of the embedding and of the head.
    pub vocab_size: i64,
    /// Context length in tokens.
    pub max_position_embeddings: i64,
    /// Added to the mean square in RMSNorm.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Stretching of the rotary frequencies.
    pub rope_scaling: RopeScaling,
    /// Whether the head is the embedding's matrix.
    pub tie_word_embeddings: bool,
    /// The data type that the file claims; what is stored counts, see
    /// [`Checkpoint::dtype`](crate::Checkpoint::dtype).
    pub torch_dtype: Option<Dtype>,
}

impl LlamaConfig {
    /// Reads `config.json`, given itself or as the folder that holds it.
    ///
    /// # Errors
    /// A missing or malformed file, sizes that contradict each other, and everything that changes
    /// the computation in a way that this crate does not follow (biases, other activations, other
    /// model types, other kinds of rope scaling), by name.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = config_path(path.as_ref());
        let bytes = fs::read(&path).map_err(Error::io(&path))?;
        Self::from_json(&bytes, &path)
    }

    /// Resolves the text of a `config.json`; `path` is what errors name.
    ///
    /// # Errors
    /// As [`LlamaConfig::open`].
    pub fn from_json(bytes: &[u8], path: &Path) -> Result<Self> {
        let hf: HfConfig = serde_json::from_slice(bytes)
            .map_err(|source| Error::Json { path: path.to_path_buf(), source })?;
        Resolver { path }.resolve(hf)
    }

    /// Query heads that share one key/value head.
    pub fn num_key_value_groups(&self) -> i64 {
        self.num_attention_heads / self.num_key_value_heads
    }

    /// Number of parameters; a tied head counts once.
    pub fn num_parameters(&self) -> i64 {
        crate::checkpoint::tensor_shapes(self)
            .iter()
            .map(|(_, shape)| shape.iter().product::<i64>())
            .sum()
    }
}

/// Token ids that end a text: those of `generation_config.json`, of `config.json` and of the
/// tokenizer together, ascending, each once. Chat models list several, and the three files do not
/// always agree.
///
/// # Errors
/// A file that is there but malformed, or an id that the vocabulary does not have.
pub fn eos_token_ids(dir: impl AsRef<Path>, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
    let dir = dir.as_ref();
    let mut ids = BTreeSet::new();
    for name in ["generation_config.json", "config.json"] {
        let path = dir.join(name);
        if path.exists() {
            ids.extend(eos_ids_of_file(&path)?);
        }
    }
    ids.extend(tokenizer.eos_id());
    Ok(ids.into_iter().collect())
}

/// Checks that a tokenizer can be a model's: it makes no id that the model does not know, and it is
/// not of another order of size. (Vocabularies are often padded, but never to twice their size.)
///
/// # Errors
/// [`Error::TokenizerMismatch`] with both sizes.
pub fn check_tokenizer(config: &LlamaConfig, tokenizer: &Tokenizer) -> Result<()> {
    let (tokens, vocab_size) = (tokenizer.vocab_size(), config.vocab_size);
    if tokens as i64 > vocab_size || (tokens as i64) * 2 < vocab_size {
        return Err(Error::TokenizerMismatch { tokens, vocab_size });
    }
    Ok(())
}

fn eos_ids_of_file(path: &Path) -> Result<Vec<u32>> {
    #[derive(Deserialize)]
    struct WithEos {
        #[serde(default)]
        eos_token_id: Option<OneOrMany>,
        #[serde(default)]
        vocab_size: Option<u32>,
    }
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum OneOrMany {
        One(u32),
        Many(Vec<u32>),
    }
    let bytes = fs::read(path).map_err(Error::io(path))?;
    let file: WithEos = serde_json::from_slice(&bytes)
        .map_err(|source| Error::Json { path: path.to_path_buf(), source })?;
    let ids = match file.eos_token_id {
        None => Vec::new(),
        Some(OneOrMany::One(id)) => vec![id],
        Some(OneOrMany::Many(ids)) => ids,
    };
    match file.vocab_size.and_then(|size| ids.iter().find(|&&id| id >= size).zip(Some(size))) {
        Some((id, size)) => Err(Error::Config {
            path: path.to_path_buf(),
            message: format!("eos_token_id {id} is not below vocab_size {size}"),
        }),
        None => Ok(ids),
    }
}

/// The text of a folder's `config.json`, for weights that are written without quantisation.
pub(crate) fn plain_config(dir: &Path) -> Result<Vec<u8>> {
    let path = config_path(dir);
    let bytes = fs::read(&path).map_err(Error::io(&path))?;
    let mut config: serde_json::Map<String, Value> =
        serde_json::from_slice(&bytes).map_err(|source| Error::Json { path, source })?;
    match config.remove("quantization_config") {
        None => Ok(bytes),
        Some(_) => Ok(format!("{:#}\n", Value::from(config)).into_bytes()),
    }
}

/// Whether a `config.json`, given itself or as the folder that holds it, is of quantised weights.
pub(crate) fn is_quantised(path: &Path) -> Result<bool> {
    let path = config_path(path);
    let bytes = fs::read(&path).map_err(Error::io(&path))?;
    let config: Value =
        serde_json::from_slice(&bytes).map_err(|source| Error::Json { path, source })?;
    Ok(config.get("quantization_config").is_some_and(|settings| !settings.is_null()))
}

pub(crate) fn config_path(path: &Path) -> PathBuf {
    if path.is_dir() { path.join("config.json") } else { path.to_path_buf() }
}

/// The keys of `config.json` that matter here; the rest belongs to training or to other programs.
#[derive(Deserialize)]
struct HfConfig {
    model_type: Option<String>,
    architectures: Option<Vec<String>>,
    hidden_size: i64,
    intermediate_size: i64,
    num_hidden_layers: i64,
    num_attention_heads: i64,
    num_key_value_heads: Option<i64>,
    head_dim: Option<i64>,
    vocab_size: i64,
    max_position_embeddings: Option<i64>,
    rms_norm_eps: Option<f64>,
    rope_theta: Option<f64>,
    rope_scaling: Option<RopeParameters>,
    /// Since transformers 5 in place of `rope_theta` and `rope_scaling`.
    rope_parameters: Option<RopeParameters>,
    tie_word_embeddings: Option<bool>,
    #[serde(alias = "dtype")]
    torch_dtype: Option<String>,
    hidden_act: Option<String>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    partial_rotary_factor: Option<f64>,
    quantization_config: Option<Value>,
}

#[derive(Deserialize)]
struct RopeParameters {
    #[serde(alias = "type")]
    rope_type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<i64>,
    partial_rotary_factor: Option<f64>,
}

struct Resolver<'a> {
    path: &'a Path,
}

impl Resolver<'_> {
    fn resolve(&self, hf: HfConfig) -> Result<LlamaConfig> {
        self.refuse_other_models(&hf)?;
        let num_key_value_heads = hf.num_key_value_heads.unwrap_or(hf.num_attention_heads);
        self.positive("num_attention_heads", hf.num_attention_heads, MAX_SIZE)?;
        let head_dim = match hf.head_dim {
            Some(head_dim) => head_dim,
            None if hf.hidden_size % hf.num_attention_heads == 0 => {
                hf.hidden_size / hf.num_attention_heads
            }
            None => {
                return Err(self.wrong(format!(
                    "hidden_size {} is not a multiple of num_attention_heads {}, and there is no \
                     head_dim",
                    hf.hidden_size, hf.num_attention_heads
                )));
            }
        };
        let config = LlamaConfig {
            hidden_size: hf.hidden_size,
            intermediate_size: hf.intermediate_size,
            num_hidden_layers: hf.num_hidden_layers,
            num_attention_heads: hf.num_attention_heads,
            num_key_value_heads,
            head_dim,
            vocab_size: hf.vocab_size,
            max_position_embeddings: hf.max_position_embeddings.unwrap_or(2048),
            rms_norm_eps: hf.rms_norm_eps.unwrap_or(1e-6),
            rope_theta: self.rope_theta(&hf)?,
            rope_scaling: self.rope_scaling(&hf)?,
            tie_word_embeddings: hf.tie_word_embeddings.unwrap_or(false),
            torch_dtype: self.torch_dtype(hf.torch_dtype.as_deref())?,
        };
        self.check_sizes(&config)?;
        Ok(config)
    }

    fn refuse_other_models(&self, hf: &HfConfig) -> Result<()> {
        let model_type = hf.model_type.as_deref().unwrap_or("(none)");
        if model_type != "llama" {
            return Err(self.unsupported("model_type", model_type, "llama"));
        }
        if let Some(names) = &hf.architectures
            && names.iter().any(|name| name != "LlamaForCausalLM")
        {
            return Err(self.unsupported("architectures", names.join(", "), "LlamaForCausalLM"));
        }
        if let Some(act) = hf.hidden_act.as_deref()
            && !matches!(act, "silu" | "swish")
        {
            return Err(self.unsupported("hidden_act", act, "silu"));
        }
        if hf.attention_bias == Some(true) {
            return Err(self.unsupported("attention_bias", "true", "false"));
        }
        if hf.mlp_bias == Some(true) {
            return Err(self.unsupported("mlp_bias", "true", "false"));
        }
        let partial = hf
            .partial_rotary_factor
            .or(hf.rope_parameters.as_ref().and_then(|rope| rope.partial_rotary_factor));
        if let Some(factor) = partial
            && factor != 1.0
        {
            return Err(self.unsupported("partial_rotary_factor", factor.to_string(), "1"));
        }
        match hf.quantization_config.as_ref() {
            Some(quantization) if !quantization.is_null() => self.check_quantization(quantization),
            _ => Ok(()),
        }
    }

    /// bitsandbytes' NF4 with double quantisation is read, and nothing else.
    fn check_quantization(&self, quantization: &Value) -> Result<()> {
        let text = |key| quantization.get(key).and_then(Value::as_str).unwrap_or("(unnamed)");
        let is_set = |key| quantization.get(key).and_then(Value::as_bool) == Some(true);
        let (method, kind) = (text("quant_method"), text("bnb_4bit_quant_type"));
        if method == "bitsandbytes"
            && kind == "nf4"
            && is_set("load_in_4bit")
            && is_set("bnb_4bit_use_double_quant")
        {
            return Ok(());
        }
        Err(self.unsupported(
            "quantization_config",
            if method == "bitsandbytes" { format!("{method} {kind}") } else { method.into() },
            "none, or bitsandbytes nf4 with double quantisation",
        ))
    }

    fn rope_theta(&self, hf: &HfConfig) -> Result<f64> {
        let nested = hf.rope_parameters.as_ref().and_then(|rope| rope.rope_theta);
        match (hf.rope_theta, nested) {
            (Some(outer), Some(inner)) if outer != inner => Err(self.wrong(format!(
                "rope_theta is {outer}, but rope_parameters has rope_theta {inner}"
            ))),
            (outer, inner) => Ok(inner.or(outer).unwrap_or(10_000.0)),
        }
    }

    fn rope_scaling(&self, hf: &HfConfig) -> Result<RopeScaling> {
        let scaling = hf.rope_scaling.as_ref().map(|rope| self.one_scaling(rope)).transpose()?;
        let newer = hf.rope_parameters.as_ref().map(|rope| self.one_scaling(rope)).transpose()?;
        match (scaling, newer) {
            (Some(older), Some(newer)) if older != newer => {
                Err(self.wrong("rope_scaling and rope_parameters contradict each other".into()))
            }
            (older, newer) => Ok(newer.or(older).unwrap_or(RopeScaling::None)),
        }
    }

    fn one_scaling(&self, rope: &RopeParameters) -> Result<RopeScaling> {
        let scaling = match rope.rope_type.as_deref() {
            Some("default") => return Ok(RopeScaling::None),
            Some("linear") => {
                RopeScaling::Linear { factor: self.at_least_one("factor", rope.factor)? }
            }
            Some("llama3") => self.llama3(rope)?,
            Some(other) => {
                return Err(self.unsupported("rope_type", other, "default, linear, llama3"));
            }
            None => return Err(self.wrong("rope scaling without a rope_type".into())),
        };
        Ok(scaling)
    }

    fn llama3(&self, rope: &RopeParameters) -> Result<RopeScaling> {
        let low_freq_factor = self.at_least_one("low_freq_factor", rope.low_freq_factor)?;
        let high_freq_factor = self.at_least_one("high_freq_factor", rope.high_freq_factor)?;
        if low_freq_factor >= high_freq_factor {
            return Err(self.wrong(format!(
                "rope scaling: low_freq_factor {low_freq_factor} is not below high_freq_factor \
                 {high_freq_factor}"
            )));
        }
        let length = rope.original_max_position_embeddings.ok_or_else(|| {
            self.wrong("rope scaling: original_max_position_embeddings is missing".into())
        })?;
        self.positive("original_max_position_embeddings", length, MAX_SIZE)?;
        Ok(RopeScaling::Llama3 {
            factor: self.at_least_one("factor", rope.factor)?,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings: length,
        })
    }

    fn at_least_one(&self, key: &str, value: Option<f64>) -> Result<f64> {
        match value {
            Some(value) if value.is_finite() && value >= 1.0 => Ok(value),
            Some(value) => Err(self.wrong(format!("rope scaling: {key} {value} is below 1"))),
            None => Err(self.wrong(format!("rope scaling: {key} is missing"))),
        }
    }

    fn torch_dtype(&self, name: Option<&str>) -> Result<Option<Dtype>> {
        let Some(name) = name else { return Ok(None) };
        match Dtype::of_torch_name(name) {
            Some(dtype) => Ok(Some(dtype)),
            None => Err(self.unsupported("torch_dtype", name, "float32, float16, bfloat16")),
        }
    }

    fn check_sizes(&self, config: &LlamaConfig) -> Result<()> {
        for (key, value, max) in [
            ("hidden_size", config.hidden_size, MAX_SIZE),
            ("intermediate_size", config.intermediate_size, MAX_SIZE),
            ("num_hidden_layers", config.num_hidden_layers, MAX_LAYERS),
            ("num_key_value_heads", config.num_key_value_heads, MAX_SIZE),
            ("head_dim", config.head_dim, MAX_SIZE),
            ("vocab_size", config.vocab_size, MAX_SIZE),
            ("max_position_embeddings", config.max_position_embeddings, 1 << 40),
        ] {
            self.positive(key, value, max)?;
        }
        let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
        if heads % kv_heads != 0 {
            return Err(self.wrong(format!(
                "num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
            )));
        }
        if config.head_dim % 2 != 0 {
            return Err(self.wrong(format!(
                "head_dim {} is odd, rotary embeddings turn pairs",
                config.head_dim
            )));
        }
        self.positive("num_attention_heads * head_dim", heads * config.head_dim, MAX_SIZE)?;
        for (key, value) in
            [("rms_norm_eps", config.rms_norm_eps), ("rope_theta", config.rope_theta)]
        {
            if !(value.is_finite() && value > 0.0) {
                return Err(self.wrong(format!("{key} {value} is not a positive number")));
            }
        }
        Ok(())
    }

    fn positive(&self, key: &str, value: i64, max: i64) -> Result<()> {
        if (1..=max).contains(&value) {
            Ok(())
        } else {
            Err(self.wrong(format!("{key} {value} is not in 1..={max}")))
        }
    }

    fn wrong(&self, message: String) -> Error {
        Error::Config { path: self.path.to_path_buf(), message }
    }

    fn unsupported(
        &self,
        key: &'static str,
        value: impl Into<String>,
        supported: &'static str,
    ) -> Error {
        Error::Unsupported { path: self.path.to_path_buf(), key, value: value.into(), supported }
    }
}
