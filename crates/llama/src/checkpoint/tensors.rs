//! Names and shapes of a LLaMA's tensors, as Hugging Face stores them.

use std::ops::Range;

use crate::config::LlamaConfig;

/// The linear layers of a layer, by their path within it, with (out, in) features.
pub(crate) fn linear_shapes(config: &LlamaConfig) -> [(&'static str, [i64; 2]); 7] {
    let hidden = config.hidden_size;
    let q = config.num_attention_heads * config.head_dim;
    let kv = config.num_key_value_heads * config.head_dim;
    let ffn = config.intermediate_size;
    [
        ("self_attn.q_proj", [q, hidden]),
        ("self_attn.k_proj", [kv, hidden]),
        ("self_attn.v_proj", [kv, hidden]),
        ("self_attn.o_proj", [hidden, q]),
        ("mlp.gate_proj", [ffn, hidden]),
        ("mlp.up_proj", [ffn, hidden]),
        ("mlp.down_proj", [hidden, ffn]),
    ]
}

/// Every tensor that the model needs, in the order of the forward pass.
pub(crate) fn tensor_shapes(config: &LlamaConfig) -> Vec<(String, Vec<i64>)> {
    let hidden = config.hidden_size;
    let mut all = vec![(EMBEDDING.to_string(), vec![config.vocab_size, hidden])];
    for layer in 0..config.num_hidden_layers {
        let prefix = format!("model.layers.{layer}");
        all.push((format!("{prefix}.input_layernorm.weight"), vec![hidden]));
        for (module, shape) in linear_shapes(config) {
            all.push((format!("{prefix}.{module}.weight"), shape.to_vec()));
            if module == "self_attn.o_proj" {
                all.push((format!("{prefix}.post_attention_layernorm.weight"), vec![hidden]));
            }
        }
    }
    all.push(("model.norm.weight".to_string(), vec![hidden]));
    if !config.tie_word_embeddings {
        all.push((HEAD.to_string(), vec![config.vocab_size, hidden]));
    }
    all
}

/// The shape of a tensor of the model; of a name that it does not have, that of a norm.
pub(crate) fn shape_of(config: &LlamaConfig, name: &str) -> Vec<i64> {
    if name == EMBEDDING || name == HEAD {
        return vec![config.vocab_size, config.hidden_size];
    }
    let module = name.strip_suffix(".weight").unwrap_or(name);
    let linear = linear_shapes(config).into_iter().find(|(path, _)| module.ends_with(path));
    linear.map_or_else(|| vec![config.hidden_size], |(_, shape)| shape.to_vec())
}

pub(crate) const EMBEDDING: &str = "model.embed_tokens.weight";
pub(crate) const HEAD: &str = "lm_head.weight";

/// Whether a stored tensor holds nothing of the model: rotary frequencies, which the first
/// conversions of LLaMA stored with the weights though the configuration gives them.
pub(crate) fn is_derived(name: &str) -> bool {
    name.starts_with("model.layers.") && name.ends_with(".self_attn.rotary_emb.inv_freq")
}

/// Rows `0..rows` in blocks of about `max_bytes`, each a multiple of `unit` rows.
pub(crate) fn blocks(
    rows: i64,
    row_bytes: u64,
    unit: i64,
    max_bytes: usize,
) -> impl Iterator<Item = Range<i64>> {
    let units = (max_bytes as u64 / (row_bytes * unit as u64).max(1)).max(1);
    let step = units as i64 * unit;
    (0..rows).step_by(step as usize).map(move |start| start..rows.min(start + step))
}
