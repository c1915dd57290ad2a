//! The parts of `tokenizer.json` and `tokenizer_config.json` that LLaMA's family uses. A part of
//! another kind is a parse error that names it, so that nothing is silently tokenised differently.

use std::collections::BTreeMap;

use serde::Deserialize;

#[derive(Deserialize)]
pub(crate) struct TokenizerFile {
    #[serde(default)]
    pub(crate) added_tokens: Vec<AddedToken>,
    pub(crate) normalizer: Option<Normalizer>,
    pub(crate) pre_tokenizer: Option<PreTokenizer>,
    pub(crate) post_processor: Option<PostProcessor>,
    pub(crate) decoder: Option<Decoder>,
    pub(crate) model: Model,
}

#[derive(Deserialize)]
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

#[derive(Deserialize)]
pub(crate) enum Pattern {
    String(String),
    Regex(String),
}

#[derive(Deserialize)]
#[serde(tag = "type")]
pub(crate) enum Normalizer {
    Sequence { normalizers: Vec<Normalizer> },
    Prepend { prepend: String },
    Replace { pattern: Pattern, content: String },
}

#[derive(Deserialize)]
#[serde(tag = "type")]
pub(crate) enum PreTokenizer {
    Sequence {
        pretokenizers: Vec<PreTokenizer>,
    },
    ByteLevel {
        #[serde(default = "yes")]
        add_prefix_space: bool,
        #[serde(default = "yes")]
        use_regex: bool,
    },
    Digits {
        #[serde(default)]
        individual_digits: bool,
    },
    Split {
        pattern: Pattern,
        behavior: String,
        #[serde(default)]
        invert: bool,
    },
    Metaspace {
        replacement: char,
        #[serde(default)]
        prepend_scheme: PrependScheme,
        #[serde(default = "yes")]
        split: bool,
    },
}

#[derive(Deserialize, Default, Clone, Copy, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub(crate) enum PrependScheme {
    #[default]
    Always,
    First,
    Never,
}

fn yes() -> bool {
    true
}

#[derive(Deserialize)]
#[serde(tag = "type")]
pub(crate) enum Decoder {
    Sequence {
        decoders: Vec<Decoder>,
    },
    Replace {
        pattern: Pattern,
        content: String,
    },
    ByteFallback,
    Fuse,
    Strip {
        content: char,
        start: usize,
        stop: usize,
    },
    ByteLevel,
    Metaspace {
        #[serde(default)]
        prepend_scheme: PrependScheme,
    },
}

#[derive(Deserialize)]
#[serde(tag = "type")]
pub(crate) enum PostProcessor {
    Sequence {
        processors: Vec<PostProcessor>,
    },
    TemplateProcessing {
        single: Vec<TemplatePiece>,
        #[serde(default)]
        special_tokens: BTreeMap<String, TemplateToken>,
    },
    ByteLevel,
}

#[derive(Deserialize)]
pub(crate) enum TemplatePiece {
    SpecialToken { id: String },
    Sequence {},
}

#[derive(Deserialize)]
pub(crate) struct TemplateToken {
    pub(crate) ids: Vec<u32>,
}

/// The keys of `tokenizer_config.json` that matter here; the file has many more.
#[derive(Deserialize, Default)]
#[serde(default)]
pub(crate) struct ConfigFile {
    pub(crate) add_bos_token: Option<bool>,
    pub(crate) bos_token: Option<TokenName>,
    pub(crate) eos_token: Option<TokenName>,
}

#[derive(Deserialize)]
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
