//! The parts of `tokenizer.json` and `tokenizer_config.json` that are checked or changed before the
//! crate gets them.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

#[derive(Deserialize)]
pub(crate) struct TokenizerFile {
    #[serde(default)]
    pub(crate) added_tokens: Vec<AddedToken>,
    pub(crate) normalizer: Option<Value>,
    pub(crate) pre_tokenizer: Option<Value>,
    pub(crate) post_processor: Option<Value>,
    pub(crate) decoder: Option<Value>,
    pub(crate) model: Model,
}

#[derive(Deserialize, Default)]
pub(crate) struct AddedToken {
    pub(crate) id: u32,
    pub(crate) content: String,
    #[serde(default)]
    pub(crate) single_word: bool,
    #[serde(default)]
    pub(crate) lstrip: bool,
    #[serde(default)]
    pub(crate) rstrip: bool,
    #[serde(default)]
    pub(crate) normalized: bool,
    #[serde(default)]
    pub(crate) special: bool,
}

impl AddedToken {
    /// A plain word that texts are searched for. Conditions on a word's surroundings make the
    /// search quadratic; no model of the family has them on a plain word, which then is text.
    pub(crate) fn is_plain_word(&self) -> bool {
        let conditional = self.single_word || self.lstrip || self.rstrip;
        !(self.special || conditional || self.content.is_empty())
    }
}

#[derive(Deserialize)]
pub(crate) struct Model {
    /// Old files leave the type out.
    #[serde(rename = "type", default = "bpe")]
    pub(crate) kind: String,
    pub(crate) vocab: BTreeMap<String, u32>,
    pub(crate) merges: Vec<Merge>,
    pub(crate) unk_token: Option<String>,
    pub(crate) dropout: Option<f64>,
    pub(crate) continuing_subword_prefix: Option<String>,
    pub(crate) end_of_word_suffix: Option<String>,
    #[serde(default)]
    pub(crate) fuse_unk: bool,
    #[serde(default)]
    pub(crate) byte_fallback: bool,
    #[serde(default)]
    pub(crate) ignore_merges: bool,
}

fn bpe() -> String {
    "BPE".to_owned()
}

/// `"a b"` in older files, `["a", "b"]` in newer ones.
#[derive(Deserialize)]
#[serde(untagged)]
pub(crate) enum Merge {
    Joined(String),
    Pair(String, String),
}

impl Merge {
    pub(crate) fn pair(&self) -> Option<(&str, &str)> {
        match self {
            Self::Joined(text) => text.split_once(' '),
            Self::Pair(left, right) => Some((left, right)),
        }
    }
}

/// The steps of a normalizer, pre-tokenizer, post-processor or decoder; `key` is where a sequence
/// of that kind holds them.
pub(crate) fn steps<'f>(part: &'f Value, key: &str) -> Vec<&'f Value> {
    match (kind(part), part[key].as_array()) {
        ("Sequence", Some(parts)) => parts.iter().flat_map(|part| steps(part, key)).collect(),
        _ => vec![part],
    }
}

pub(crate) fn kind(step: &Value) -> &str {
    step["type"].as_str().unwrap_or_default()
}

/// The keys of `tokenizer_config.json` that matter here; the file has many more.
#[derive(Deserialize, Default)]
#[serde(default)]
pub(crate) struct ConfigFile {
    pub(crate) add_bos_token: Option<bool>,
    pub(crate) bos_token: Option<TokenName>,
    pub(crate) eos_token: Option<TokenName>,
}

#[derive(Clone, Deserialize)]
#[serde(untagged)]
pub(crate) enum TokenName {
    Plain(String),
    Object { content: String },
}

impl TokenName {
    pub(crate) fn content(&self) -> &str {
        match self {
            Self::Plain(content) | Self::Object { content } => content,
        }
    }
}
