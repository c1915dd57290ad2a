//! From the files to a [`Tokenizer`]: which of the two families it is, and whether the parts fit
//! together.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use regex::Regex;

use crate::bpe::{Merges, Table};
use crate::byte_level::{self, ByteLevel, GPT2_PATTERN, Split};
use crate::format::{
    AddedToken, ConfigFile, Decoder, Model, Normalizer, Pattern, PostProcessor, PreTokenizer,
    PrependScheme, TemplatePiece, TokenizerFile,
};
use crate::metaspace::{Cuts, DummyPrefix, MARKER, Metaspace};
use crate::tokenizer::{AddedText, Encoder};
use crate::vocabulary::{Token, Vocabulary};
use crate::{Error, Result, Tokenizer};

/// Far more than any vocabulary has: a damaged id must not make us allocate gigabytes.
const MAX_ID: u32 = 1 << 22;

pub(crate) fn open(path: &Path) -> Result<Tokenizer> {
    let file = if path.is_dir() { path.join("tokenizer.json") } else { path.to_owned() };
    if file.extension().is_some_and(|extension| extension == "model") {
        return Err(Error::SentencePieceModel { path: file });
    }
    let bytes = read(&file)?;
    let config = match file.file_name() {
        Some(name) if name == "tokenizer.json" => {
            read_config(&file.with_file_name("tokenizer_config.json"))?
        }
        _ => ConfigFile::default(),
    };
    let parsed = serde_json::from_slice(&bytes)
        .map_err(|source| Error::Parse { path: file.clone(), source })?;
    Builder { path: file, file: parsed, config }.build(&bytes)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|source| Error::Open { path: path.to_owned(), source })
}

fn read_config(path: &Path) -> Result<ConfigFile> {
    match std::fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map_err(|source| Error::Parse { path: path.to_owned(), source }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(ConfigFile::default()),
        Err(source) => Err(Error::Open { path: path.to_owned(), source }),
    }
}

struct Builder {
    path: PathBuf,
    file: TokenizerFile,
    config: ConfigFile,
}

impl Builder {
    fn build(self, bytes: &[u8]) -> Result<Tokenizer> {
        self.check_model()?;
        let byte_level = match &self.file.decoder {
            Some(Decoder::ByteLevel) => true,
            Some(_) => false,
            None => return Err(self.unsupported("decoder", "none")),
        };
        let encoder = if byte_level {
            Encoder::ByteLevel(self.byte_level()?)
        } else {
            Encoder::Metaspace(self.metaspace()?)
        };
        let vocabulary = self.vocabulary(byte_level)?;
        let bos_of_template = self.bos_of_template();
        let named =
            |name: &str| self.file.added_tokens.iter().find(|t| t.content == name).map(|t| t.id);
        let configured = |name: &Option<crate::format::TokenName>| {
            name.as_ref().and_then(|name| named(name.content()))
        };
        let bos = configured(&self.config.bos_token).or(bos_of_template).or_else(|| named("<s>"));
        let adds_bos = self.config.add_bos_token.unwrap_or(bos_of_template.is_some());
        let longest =
            vocabulary.tokens.iter().flatten().map(|token| token.piece.chars().count()).max();
        Ok(Tokenizer {
            encoder,
            vocabulary,
            added: self.added_text()?,
            bos,
            eos: configured(&self.config.eos_token).or_else(|| named("</s>")),
            adds_bos,
            longest_piece: longest.unwrap_or(0).max(1),
            fingerprint: fingerprint(bytes, bos.filter(|_| adds_bos)),
        })
    }

    fn unsupported(&self, part: &'static str, found: impl Into<String>) -> Error {
        Error::Unsupported { path: self.path.clone(), part, found: found.into() }
    }

    fn inconsistent(&self, message: String) -> Error {
        Error::Inconsistent { path: self.path.clone(), message }
    }

    fn check_model(&self) -> Result<()> {
        let model = &self.file.model;
        if model.kind != "BPE" {
            return Err(self.unsupported("model type", &*model.kind));
        }
        if model.dropout.is_some_and(|dropout| dropout > 0.0) {
            return Err(self.unsupported("model", "dropout of merges"));
        }
        for affix in
            [&model.continuing_subword_prefix, &model.end_of_word_suffix].into_iter().flatten()
        {
            if !affix.is_empty() {
                return Err(self.unsupported("model", format!("word affix {affix:?}")));
            }
        }
        if model.vocab.is_empty() {
            return Err(self.inconsistent("the vocabulary is empty".to_owned()));
        }
        let ids = model.vocab.values().chain(self.file.added_tokens.iter().map(|token| &token.id));
        match ids.max() {
            Some(&id) if id >= MAX_ID => {
                Err(self.inconsistent(format!("token id {id} is out of bounds")))
            }
            _ => Ok(()),
        }
    }

    /// Tokens that no text may become: control tokens, and the names of byte tokens (`<0x0A>`).
    fn hidden(&self) -> BTreeSet<u32> {
        let special =
            self.file.added_tokens.iter().filter(|token| token.special).map(|token| token.id);
        let model = &self.file.model;
        let bytes = byte_tokens(model).into_iter().flat_map(|table| table.into_iter().flatten());
        special.chain(bytes).collect()
    }

    fn merges(&self) -> Result<Merges> {
        let model = &self.file.model;
        let hidden = self.hidden();
        let id = |piece: &str| {
            model.vocab.get(piece).copied().ok_or_else(|| {
                self.inconsistent(format!("merge needs {piece:?}, which is not in the vocabulary"))
            })
        };
        let mut merges = Merges::default();
        for (rank, merge) in model.merges.iter().enumerate() {
            let (left, right) = merge
                .pair()
                .ok_or_else(|| self.inconsistent(format!("merge {rank} is not a pair")))?;
            let merged = id(&format!("{left}{right}"))?;
            // A conversion from sentencepiece may hold merges that spell out control tokens.
            if !hidden.contains(&merged) {
                merges.insert(id(left)?, id(right)?, rank as u32, merged);
            }
        }
        Ok(merges)
    }

    fn metaspace(&self) -> Result<Metaspace> {
        let model = &self.file.model;
        let hidden = self.hidden();
        let mut characters = Table::default();
        for (piece, &id) in &model.vocab {
            let mut chars = piece.chars();
            if let (Some(c), None, false) = (chars.next(), chars.next(), hidden.contains(&id)) {
                characters.insert(u32::from(c), id);
            }
        }
        if !characters.contains_key(&u32::from(MARKER)) {
            return Err(
                self.inconsistent("the vocabulary has no piece for the space, U+2581".to_owned())
            );
        }
        let (prefix, split) = self.space_handling()?;
        let cuts = if split {
            Cuts::BeforeMarkers
        } else if model.merges.iter().any(crosses_words) {
            Cuts::Nowhere
        } else {
            Cuts::BeforeRunsOfMarkers
        };
        let bytes = if model.byte_fallback { byte_tokens(model) } else { None };
        Ok(Metaspace {
            prefix,
            cuts,
            characters,
            bytes,
            unknown: self.unknown()?,
            fuse_unknown: model.fuse_unk,
            merges: self.merges()?,
        })
    }

    fn unknown(&self) -> Result<Option<u32>> {
        let model = &self.file.model;
        match &model.unk_token {
            None => Ok(None),
            Some(name) => {
                match model.vocab.get(name) {
                    Some(&id) => Ok(Some(id)),
                    None => Err(self
                        .inconsistent(format!("unknown token {name:?} is not in the vocabulary"))),
                }
            }
        }
    }

    /// When a marker is put before a text, and whether each marker begins a word of its own.
    fn space_handling(&self) -> Result<(DummyPrefix, bool)> {
        match (&self.file.normalizer, &self.file.pre_tokenizer) {
            (Some(normalizer), None) => {
                let mut prepends = false;
                let mut replaces = false;
                self.walk_normalizer(normalizer, &mut prepends, &mut replaces)?;
                if !replaces {
                    return Err(
                        self.unsupported("normalizer", "one that leaves spaces as they are")
                    );
                }
                Ok((if prepends { DummyPrefix::Always } else { DummyPrefix::Never }, false))
            }
            (
                None,
                Some(PreTokenizer::Metaspace { replacement: MARKER, prepend_scheme, split }),
            ) => {
                let prefix = match prepend_scheme {
                    PrependScheme::Always | PrependScheme::First => DummyPrefix::UnlessMarked,
                    PrependScheme::Never => DummyPrefix::Never,
                };
                Ok((prefix, *split))
            }
            (None, None) => Err(self.unsupported("normalizer", "none")),
            _ => Err(self.unsupported("pre_tokenizer", "one that does not fit the decoder")),
        }
    }

    fn walk_normalizer(
        &self,
        part: &Normalizer,
        prepends: &mut bool,
        replaces: &mut bool,
    ) -> Result<()> {
        let marker = MARKER.to_string();
        match part {
            Normalizer::Sequence { normalizers } => {
                for part in normalizers {
                    self.walk_normalizer(part, prepends, replaces)?;
                }
                Ok(())
            }
            Normalizer::Prepend { prepend } if *prepend == marker && !*prepends => {
                *prepends = true;
                Ok(())
            }
            Normalizer::Replace { pattern: Pattern::String(space), content }
                if space == " " && *content == marker =>
            {
                *replaces = true;
                Ok(())
            }
            Normalizer::Prepend { prepend } => {
                Err(self.unsupported("normalizer", format!("prepend {prepend:?}")))
            }
            Normalizer::Replace { content, .. } => {
                Err(self.unsupported("normalizer", format!("replace by {content:?}")))
            }
        }
    }

    fn byte_level(&self) -> Result<ByteLevel> {
        let model = &self.file.model;
        if self.file.normalizer.is_some() {
            return Err(self.unsupported("normalizer", "one before a byte-level vocabulary"));
        }
        let mut splits = Vec::new();
        let mut prefix_space = None;
        if let Some(pre_tokenizer) = &self.file.pre_tokenizer {
            self.walk_pre_tokenizer(pre_tokenizer, &mut splits, &mut prefix_space)?;
        }
        let Some(prefix_space) = prefix_space else {
            return Err(self.unsupported(
                "pre_tokenizer",
                "none that maps bytes, before a byte-level decoder",
            ));
        };
        let hidden = self.hidden();
        let bytes = byte_level::byte_characters()
            .map(|c| model.vocab.get(c.encode_utf8(&mut [0; 4]) as &str).copied())
            .map(|id| id.filter(|id| !hidden.contains(id)));
        let whole = model.ignore_merges.then(|| {
            let shown = model.vocab.iter().filter(|(_, id)| !hidden.contains(id));
            shown.filter_map(|(piece, &id)| Some((byte_level_bytes(piece)?, id))).collect()
        });
        Ok(ByteLevel {
            splits,
            prefix_space,
            bytes: Box::new(bytes),
            whole,
            merges: self.merges()?,
        })
    }

    fn walk_pre_tokenizer(
        &self,
        part: &PreTokenizer,
        splits: &mut Vec<Split>,
        prefix_space: &mut Option<bool>,
    ) -> Result<()> {
        match part {
            _ if prefix_space.is_some() => {
                return Err(self.unsupported("pre_tokenizer", "a step behind the byte-level one"));
            }
            PreTokenizer::Sequence { pretokenizers } => {
                for part in pretokenizers {
                    self.walk_pre_tokenizer(part, splits, prefix_space)?;
                }
            }
            PreTokenizer::Digits { individual_digits } => {
                splits.push(Split::Digits { individual: *individual_digits });
            }
            PreTokenizer::Split { pattern, behavior, invert } => {
                if behavior != "Isolated" || *invert {
                    return Err(self.unsupported("split behavior", &**behavior));
                }
                splits.push(match pattern {
                    Pattern::Regex(pattern) => self.split(pattern)?,
                    Pattern::String(text) => self.split(&regex::escape(text))?,
                });
            }
            PreTokenizer::ByteLevel { add_prefix_space, use_regex } => {
                // The space would be put before every part, not before the text.
                if *add_prefix_space && !splits.is_empty() {
                    return Err(self.unsupported("pre_tokenizer", "a prefix space behind a split"));
                }
                if *use_regex {
                    splits.push(self.split(GPT2_PATTERN)?);
                }
                *prefix_space = Some(*add_prefix_space);
            }
            PreTokenizer::Metaspace { .. } => {
                return Err(
                    self.unsupported("pre_tokenizer", "Metaspace before a byte-level decoder")
                );
            }
        }
        Ok(())
    }

    fn split(&self, pattern: &str) -> Result<Split> {
        Split::pattern(pattern)
            .map_err(|error| self.unsupported("split pattern", format!("{pattern:?}: {error}")))
    }

    fn vocabulary(&self, byte_level: bool) -> Result<Vocabulary> {
        let mut tokens: Vec<Option<Token>> = Vec::new();
        for (piece, &id) in &self.file.model.vocab {
            let bytes = if byte_level {
                // HF decodes a piece with a character outside the byte alphabet as it stands.
                byte_level_bytes(piece).unwrap_or_else(|| piece.as_bytes().into())
            } else {
                metaspace_bytes(piece)
            };
            let token = Token { piece: piece.as_str().into(), bytes, special: false };
            if let Some(other) = place(&mut tokens, id).replace(token) {
                let message = format!("{:?} and {piece:?} have the same id {id}", other.piece);
                return Err(self.inconsistent(message));
            }
        }
        for added in &self.file.added_tokens {
            let token = Token {
                piece: added.content.as_str().into(),
                bytes: added.content.as_bytes().into(),
                special: added.special,
            };
            match place(&mut tokens, added.id) {
                Some(other) if *other.piece != added.content => {
                    let message =
                        format!("added token {:?} has the id of {:?}", added.content, other.piece);
                    return Err(self.inconsistent(message));
                }
                slot => *slot = Some(token),
            }
        }
        let strip_leading_space = !byte_level && self.strips_leading_space()?;
        Ok(Vocabulary { tokens, strip_leading_space })
    }

    /// Checks that the decoder is the usual one, and tells whether it drops a leading space.
    fn strips_leading_space(&self) -> Result<bool> {
        let mut strips = false;
        let parts = match &self.file.decoder {
            Some(Decoder::Sequence { decoders }) => decoders.as_slice(),
            Some(one) => std::slice::from_ref(one),
            None => &[],
        };
        for part in parts {
            match part {
                Decoder::Replace { pattern: Pattern::String(from), content }
                    if from.chars().eq([MARKER]) && content == " " => {}
                Decoder::ByteFallback | Decoder::Fuse => {}
                Decoder::Strip { content: ' ', start: 1, stop: 0 } => strips = true,
                Decoder::Metaspace { prepend_scheme } => {
                    strips = *prepend_scheme != PrependScheme::Never
                }
                _ => {
                    return Err(self.unsupported(
                        "decoder",
                        "a step that sentencepiece's decoder does not have",
                    ));
                }
            }
        }
        Ok(strips)
    }

    /// The special token that the post-processor puts before a single text.
    fn bos_of_template(&self) -> Option<u32> {
        first_of_template(self.file.post_processor.as_ref()?)
    }

    /// A plain added token with conditions on its surroundings is left to be plain text: no model
    /// of the family has one, and a text without it is encoded as ever.
    fn added_text(&self) -> Result<Option<AddedText>> {
        let unconditional = |token: &&AddedToken| {
            let conditional = token.single_word || token.lstrip || token.rstrip;
            let changed = token.normalized && self.file.normalizer.is_some();
            !(token.special || token.content.is_empty() || conditional || changed)
        };
        let ids: BTreeMap<String, u32> = self
            .file
            .added_tokens
            .iter()
            .filter(unconditional)
            .map(|token| (token.content.clone(), token.id))
            .collect();
        if ids.is_empty() {
            return Ok(None);
        }
        let mut contents: Vec<&String> = ids.keys().collect();
        contents.sort_by_key(|content| std::cmp::Reverse(content.len()));
        let alternatives: Vec<String> =
            contents.into_iter().map(|content| regex::escape(content)).collect();
        let pattern = Regex::new(&alternatives.join("|"))
            .map_err(|error| self.unsupported("added tokens", error.to_string()))?;
        Ok(Some(AddedText { pattern, ids }))
    }
}

fn place(tokens: &mut Vec<Option<Token>>, id: u32) -> &mut Option<Token> {
    let index = id as usize;
    if tokens.len() <= index {
        tokens.resize(index + 1, None);
    }
    &mut tokens[index]
}

/// The ids of `<0x00>` to `<0xFF>`, if the vocabulary has any of them.
fn byte_tokens(model: &Model) -> Option<Box<[Option<u32>; 256]>> {
    let table: [Option<u32>; 256] =
        std::array::from_fn(|byte| model.vocab.get(&format!("<0x{byte:02X}>")).copied());
    table.iter().any(Option::is_some).then(|| Box::new(table))
}

/// True if the merge makes a piece in which a marker follows another character.
fn crosses_words(merge: &crate::format::Merge) -> bool {
    let Some((left, right)) = merge.pair() else { return false };
    let mut previous = MARKER;
    left.chars().chain(right.chars()).any(|c| {
        let crosses = c == MARKER && previous != MARKER;
        previous = c;
        crosses
    })
}

fn metaspace_bytes(piece: &str) -> Box<[u8]> {
    match byte_of_token(piece) {
        Some(byte) => [byte].into(),
        None => piece.replace(MARKER, " ").into_bytes().into(),
    }
}

/// The byte of `<0x0A>`.
fn byte_of_token(piece: &str) -> Option<u8> {
    let hex = piece.strip_prefix("<0x")?.strip_suffix('>')?;
    (hex.len() == 2).then(|| u8::from_str_radix(hex, 16).ok()).flatten()
}

/// The bytes that a byte-level piece stands for; none if a character is outside its alphabet.
fn byte_level_bytes(piece: &str) -> Option<Box<[u8]>> {
    let alphabet = byte_level::byte_characters();
    piece
        .chars()
        .map(|c| alphabet.iter().position(|&other| other == c).map(|byte| byte as u8))
        .collect()
}

fn first_of_template(processor: &PostProcessor) -> Option<u32> {
    match processor {
        PostProcessor::Sequence { processors } => processors.iter().find_map(first_of_template),
        PostProcessor::TemplateProcessing { single, special_tokens } => match single.first()? {
            TemplatePiece::SpecialToken { id } => special_tokens.get(id)?.ids.first().copied(),
            TemplatePiece::Sequence {} => None,
        },
        PostProcessor::ByteLevel => None,
    }
}

fn fingerprint(bytes: &[u8], leading_bos: Option<u32>) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(bytes);
    hasher.update(format!("{leading_bos:?}").as_bytes());
    hasher.finalize().to_hex().to_string()
}
