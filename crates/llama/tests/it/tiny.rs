//! Small checkpoints and adapters, written by the `safetensors` crate and by hand, not by ours.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use dromedary_llama::Dtype;
use safetensors::tensor::{TensorView, serialize_to_file};
use serde_json::{Value, json};
use tch::{Kind, Tensor};
use tempfile::TempDir;

pub(crate) use crate::same::noise;

/// Sizes that share no factor, so that a swapped dimension cannot go unseen.
pub(crate) const HIDDEN: i64 = 14;
pub(crate) const FFN: i64 = 23;
pub(crate) const HEADS: i64 = 6;
pub(crate) const KV_HEADS: i64 = 3;
pub(crate) const HEAD_DIM: i64 = 4;
pub(crate) const VOCAB: i64 = 37;
pub(crate) const LAYERS: i64 = 2;

/// A checkpoint folder under construction.
pub(crate) struct Tiny {
    pub(crate) dir: TempDir,
    pub(crate) config: Value,
    pub(crate) tensors: BTreeMap<String, Tensor>,
}

pub(crate) fn config() -> Value {
    json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu",
        "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM,
        "vocab_size": VOCAB, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": false, "torch_dtype": "float32", "eos_token_id": 2
    })
}

/// Names and shapes of the tensors of a model.
pub(crate) fn shapes(config: &Value) -> Vec<(String, Vec<i64>)> {
    let size = |key: &str| config[key].as_i64().unwrap();
    let (hidden, ffn, vocab) = (size("hidden_size"), size("intermediate_size"), size("vocab_size"));
    let q = size("num_attention_heads") * size("head_dim");
    let kv = size("num_key_value_heads") * size("head_dim");
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_string(), vec![vocab, hidden]),
        ("model.norm.weight".to_string(), vec![hidden]),
    ];
    if config["tie_word_embeddings"] != json!(true) {
        shapes.push(("lm_head.weight".to_string(), vec![vocab, hidden]));
    }
    for layer in 0..size("num_hidden_layers") {
        for (name, shape) in [
            ("input_layernorm", vec![hidden]),
            ("post_attention_layernorm", vec![hidden]),
            ("self_attn.q_proj", vec![q, hidden]),
            ("self_attn.k_proj", vec![kv, hidden]),
            ("self_attn.v_proj", vec![kv, hidden]),
            ("self_attn.o_proj", vec![hidden, q]),
            ("mlp.gate_proj", vec![ffn, hidden]),
            ("mlp.up_proj", vec![ffn, hidden]),
            ("mlp.down_proj", vec![hidden, ffn]),
        ] {
            shapes.push((format!("model.layers.{layer}.{name}.weight"), shape));
        }
    }
    shapes
}

impl Tiny {
    /// Random weights in f32, not written yet.
    pub(crate) fn new(seed: u64) -> Self {
        Self::of(config(), seed)
    }

    pub(crate) fn of(config: Value, seed: u64) -> Self {
        let tensors = shapes(&config)
            .into_iter()
            .enumerate()
            .map(|(number, (name, shape))| (name, noise(&shape, seed * 1000 + number as u64)))
            .collect();
        Self { dir: tempfile::tempdir().unwrap(), config, tensors }
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn stored_as(mut self, kind: Kind) -> Self {
        self.tensors.values_mut().for_each(|tensor| *tensor = tensor.to_kind(kind));
        self
    }

    /// Writes `config.json` and one file.
    pub(crate) fn single(self) -> Self {
        self.write_config();
        write_file(&self.path().join("model.safetensors"), &self.tensors);
        self
    }

    /// Writes `config.json`, an index and `count` files with neighbouring tensors dealt to
    /// different ones.
    pub(crate) fn sharded(self, count: usize) -> Self {
        self.write_config();
        let mut weight_map = BTreeMap::new();
        for number in 0..count {
            let file = format!("model-{:05}-of-{count:05}.safetensors", number + 1);
            let part: BTreeMap<_, _> = self
                .tensors
                .iter()
                .skip(number)
                .step_by(count)
                .map(|(name, tensor)| (name.clone(), tensor.shallow_clone()))
                .collect();
            write_file(&self.path().join(&file), &part);
            weight_map.extend(part.into_keys().map(|name| (name, file.clone())));
        }
        let index = json!({ "metadata": { "total_size": 1 }, "weight_map": weight_map });
        fs::write(self.index(), index.to_string()).unwrap();
        self
    }

    pub(crate) fn index(&self) -> PathBuf {
        self.path().join("model.safetensors.index.json")
    }

    pub(crate) fn write_config(&self) {
        fs::write(self.path().join("config.json"), self.config.to_string()).unwrap();
    }
}

/// Writes tensors as any program might.
pub(crate) fn write_file(path: &Path, tensors: &BTreeMap<String, Tensor>) {
    let bytes: BTreeMap<_, _> = tensors.iter().map(|(name, t)| (name, bytes_of(t))).collect();
    let views = tensors.iter().map(|(name, tensor)| {
        let shape = tensor.size().iter().map(|size| *size as usize).collect();
        let dtype = match tensor.kind() {
            Kind::Float => safetensors::Dtype::F32,
            Kind::Half => safetensors::Dtype::F16,
            Kind::BFloat16 => safetensors::Dtype::BF16,
            Kind::Int64 => safetensors::Dtype::I64,
            other => panic!("{other:?}"),
        };
        (name.clone(), TensorView::new(dtype, shape, &bytes[name]).unwrap())
    });
    serialize_to_file(views, None, path).unwrap();
}

pub(crate) fn bytes_of(tensor: &Tensor) -> Vec<u8> {
    let mut bytes = vec![0; tensor.numel() * tensor.kind().elt_size_in_bytes()];
    tensor.contiguous().copy_data_u8(&mut bytes, tensor.numel());
    bytes
}

/// Bit by bit, shape and type included.
#[track_caller]
pub(crate) fn assert_same(got: &Tensor, expected: &Tensor) {
    assert_eq!((got.kind(), got.size()), (expected.kind(), expected.size()));
    assert!(bytes_of(got) == bytes_of(expected), "the elements differ");
}

/// The modules that LoRA adapts, with (out, in).
pub(crate) fn modules(tiny: &Tiny) -> Vec<(String, i64, i64)> {
    tiny.tensors
        .iter()
        .filter(|(name, _)| name.contains("_proj"))
        .map(|(name, tensor)| {
            let (out, inner) = tensor.size2().unwrap();
            (name.strip_suffix(".weight").unwrap().to_string(), out, inner)
        })
        .collect()
}

pub(crate) fn dtype_of(kind: Kind) -> Dtype {
    Dtype::of_kind(kind).unwrap()
}
