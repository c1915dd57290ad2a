//! Sentencepiece's `tokenizer.model`, as what Hugging Face's conversion makes of it.
//!
//! A merge model has a list of pieces with scores and no merges: the piece of the highest score that
//! two neighbours make is made first, whichever two they are. So each way to put a piece together
//! becomes a merge, in the order of the scores.
//!
//! Extra spaces are kept whatever the model says of them, as in Hugging Face's conversion of LLaMA's;
//! LLaMA's own models keep them, too.

use std::cmp::{Ordering, Reverse};
use std::collections::BTreeMap;
use std::path::Path;

use prost::Message;
use serde_json::{Value, json};

use crate::build::MARKER;
use crate::format::{AddedToken, Merge, Model, TokenizerFile};
use crate::{Error, Result};

/// Far longer than any piece: the ways to put a piece together grow with its length.
const MAX_PIECE_BYTES: usize = 1 << 10;

/// What [`TrainerSpec::model_type`] says of merge models.
const BPE: i32 = 2;

/// The file, as `sentencepiece_model.proto` describes it, without what has no meaning here.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct ModelProto {
    #[prost(message, repeated, tag = "1")]
    pub(crate) pieces: Vec<Piece>,
    #[prost(message, optional, tag = "2")]
    pub(crate) trainer_spec: Option<TrainerSpec>,
    #[prost(message, optional, tag = "3")]
    pub(crate) normalizer_spec: Option<NormalizerSpec>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Piece {
    #[prost(string, optional, tag = "1")]
    pub(crate) piece: Option<String>,
    #[prost(float, optional, tag = "2")]
    pub(crate) score: Option<f32>,
    #[prost(enumeration = "Kind", optional, tag = "3")]
    pub(crate) kind: Option<i32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, prost::Enumeration)]
pub(crate) enum Kind {
    Normal = 1,
    Unknown = 2,
    Control = 3,
    UserDefined = 4,
    Unused = 5,
    Byte = 6,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct TrainerSpec {
    #[prost(int32, optional, tag = "3", default = "1")]
    pub(crate) model_type: Option<i32>,
    #[prost(int32, optional, tag = "4", default = "8000")]
    pub(crate) vocab_size: Option<i32>,
    #[prost(bool, optional, tag = "24")]
    pub(crate) treat_whitespace_as_suffix: Option<bool>,
    #[prost(bool, optional, tag = "35")]
    pub(crate) byte_fallback: Option<bool>,
    #[prost(int32, optional, tag = "41", default = "1")]
    pub(crate) bos_id: Option<i32>,
    #[prost(int32, optional, tag = "42", default = "2")]
    pub(crate) eos_id: Option<i32>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct NormalizerSpec {
    #[prost(bytes = "vec", optional, tag = "2")]
    pub(crate) precompiled_charsmap: Option<Vec<u8>>,
    #[prost(bool, optional, tag = "3", default = "true")]
    pub(crate) add_dummy_prefix: Option<bool>,
    #[prost(bool, optional, tag = "5", default = "true")]
    pub(crate) escape_whitespaces: Option<bool>,
}

/// A model in the form of `tokenizer.json`, and the names of its BOS and EOS.
pub(crate) struct Converted {
    pub(crate) file: TokenizerFile,
    pub(crate) bos: Option<String>,
    pub(crate) eos: Option<String>,
}

/// Reads the bytes of a model; `path` is for messages.
pub(crate) fn convert(path: &Path, bytes: &[u8]) -> Result<Converted> {
    let model = ModelProto::decode(bytes)
        .map_err(|source| Error::SentencePiece { path: path.to_owned(), source })?;
    Converter { path, pieces: &model.pieces }.convert(&model)
}

struct Converter<'m> {
    path: &'m Path,
    pieces: &'m [Piece],
}

impl Converter<'_> {
    fn convert(&self, model: &ModelProto) -> Result<Converted> {
        let (Some(trainer), Some(normalizer)) = (&model.trainer_spec, &model.normalizer_spec)
        else {
            return Err(self.inconsistent("the file ends before it says how texts are prepared"));
        };
        self.check(trainer, normalizer)?;
        let vocab = self.vocab()?;
        let named = |id: i32| {
            let piece = self.pieces.get(usize::try_from(id).ok()?)?;
            (piece.kind() == Kind::Control).then(|| piece.piece().to_owned())
        };
        let (bos, eos) = (named(trainer.bos_id()), named(trainer.eos_id()));
        let unknown = self.pieces.iter().find(|piece| piece.kind() == Kind::Unknown);
        let file = TokenizerFile {
            added_tokens: self.added_tokens(),
            normalizer: Some(normalizer_of(normalizer.add_dummy_prefix())),
            pre_tokenizer: None,
            post_processor: bos.as_ref().map(|bos| template(bos, trainer.bos_id())),
            decoder: Some(decoder(normalizer.add_dummy_prefix())),
            model: Model {
                kind: "BPE".to_owned(),
                merges: self.merges(&vocab),
                vocab,
                unk_token: unknown.map(|piece| piece.piece().to_owned()),
                dropout: None,
                continuing_subword_prefix: None,
                end_of_word_suffix: None,
                fuse_unk: true,
                byte_fallback: trainer.byte_fallback(),
                ignore_merges: false,
            },
        };
        Ok(Converted { file, bos, eos })
    }

    /// Refuses what LLaMA's models do not do.
    fn check(&self, trainer: &TrainerSpec, normalizer: &NormalizerSpec) -> Result<()> {
        let found = |part, found: &str| {
            Err(Error::Unsupported { path: self.path.to_owned(), part, found: found.to_owned() })
        };
        if trainer.model_type() != BPE {
            let name = match trainer.model_type() {
                1 => "unigram",
                3 => "word",
                4 => "char",
                _ => "unknown",
            };
            return found("model type", name);
        }
        if trainer.treat_whitespace_as_suffix() {
            return found("trainer_spec", "spaces behind words");
        }
        if !normalizer.precompiled_charsmap().is_empty() {
            return found("normalizer_spec", "a map of characters");
        }
        if !normalizer.escape_whitespaces() {
            return found("normalizer_spec", "spaces without a marker");
        }
        let size = trainer.vocab_size();
        if usize::try_from(size).is_ok_and(|size| self.pieces.len() < size) {
            let pieces = self.pieces.len();
            return Err(self.inconsistent(&format!("it has {pieces} of {size} pieces")));
        }
        Ok(())
    }

    fn vocab(&self) -> Result<BTreeMap<String, u32>> {
        let mut vocab = BTreeMap::new();
        for (id, piece) in (0_u32..).zip(self.pieces) {
            let name = piece.piece();
            let wrong = if name.is_empty() {
                Some("is empty".to_owned())
            } else if name.len() > MAX_PIECE_BYTES {
                Some(format!("has {} bytes", name.len()))
            } else if !piece.score().is_finite() {
                Some(format!("has the score {}", piece.score()))
            } else if piece.kind.is_some_and(|kind| Kind::try_from(kind).is_err()) {
                Some(format!("is of the unknown kind {}", piece.kind.unwrap_or_default()))
            } else if piece.kind() == Kind::Unused {
                Some("is marked as unused, which is not supported".to_owned())
            } else {
                vocab.insert(name.to_owned(), id).map(|other| format!("is {other} again"))
            };
            if let Some(wrong) = wrong {
                return Err(self.inconsistent(&format!("piece {id} {wrong}")));
            }
        }
        Ok(vocab)
    }

    /// Control tokens and the unknown one, and the words that the model's user has added.
    fn added_tokens(&self) -> Vec<AddedToken> {
        let added = |(id, piece): (u32, &Piece)| {
            let special = match piece.kind() {
                Kind::Control | Kind::Unknown => true,
                Kind::UserDefined => false,
                Kind::Normal | Kind::Unused | Kind::Byte => return None,
            };
            let content = piece.piece().to_owned();
            Some(AddedToken { id, content, special, ..AddedToken::default() })
        };
        (0_u32..).zip(self.pieces).filter_map(added).collect()
    }

    /// As `generate_merges` of Hugging Face's `convert_slow_tokenizer.py`.
    fn merges(&self, vocab: &BTreeMap<String, u32>) -> Vec<Merge> {
        let mut merges = Vec::new();
        for piece in self.pieces {
            let name = piece.piece();
            let mut ways: Vec<_> = name
                .char_indices()
                .skip(1)
                .filter_map(|(at, _)| {
                    let (left, right) = name.split_at(at);
                    Some(((vocab.get(left)?, vocab.get(right)?), (left, right)))
                })
                .collect();
            ways.sort_unstable();
            merges.extend(ways.into_iter().map(|(_, pair)| (piece.score(), pair)));
        }
        let characters = |text: &str| text.chars().count();
        // Scores are finite. The sort is stable: where all is equal, the order of the pieces decides.
        merges.sort_by(|(score, (left, right)), (other_score, (other_left, other_right))| {
            let lengths = Reverse((characters(left), characters(right)));
            let other_lengths = Reverse((characters(other_left), characters(other_right)));
            other_score
                .partial_cmp(score)
                .unwrap_or(Ordering::Equal)
                .then(lengths.cmp(&other_lengths))
        });
        let pair = |(_, (left, right)): (f32, (&str, &str))| {
            Merge::Pair(left.to_owned(), right.to_owned())
        };
        merges.into_iter().map(pair).collect()
    }

    fn inconsistent(&self, message: &str) -> Error {
        Error::Inconsistent { path: self.path.to_owned(), message: message.to_owned() }
    }
}

fn normalizer_of(prefix: bool) -> Value {
    let spaces = json!({
        "type": "Replace", "pattern": { "String": " " }, "content": MARKER.to_string()
    });
    if !prefix {
        return spaces;
    }
    let prepend = json!({ "type": "Prepend", "prepend": MARKER.to_string() });
    json!({ "type": "Sequence", "normalizers": [prepend, spaces] })
}

fn decoder(prefix: bool) -> Value {
    let spaces = json!({
        "type": "Replace", "pattern": { "String": MARKER.to_string() }, "content": " "
    });
    let mut steps = vec![spaces, json!({ "type": "ByteFallback" }), json!({ "type": "Fuse" })];
    if prefix {
        steps.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
    }
    json!({ "type": "Sequence", "decoders": steps })
}

/// LLaMA's texts begin with BOS.
fn template(bos: &str, id: i32) -> Value {
    json!({
        "type": "TemplateProcessing",
        "single": [{ "SpecialToken": { "id": bos } }, { "Sequence": { "id": "A" } }],
        "special_tokens": { bos: { "ids": [id] } }
    })
}
