//! From the files to a [`Tokenizer`]: which of the two families it is, and whether the parts fit
//! together.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;

use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::normalizers::{ByteLevel as Spelling, Prepend, Replace, Sequence};
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::{AddedToken as Word, AddedVocabulary, NormalizedString, Normalizer as _};

use crate::count::{Borders, Memories};
use crate::format::{ConfigFile, TokenName, TokenizerFile, kind, steps};
use crate::sentencepiece::{self, Converted};
use crate::spans::Controls;
use crate::split::{GPT2_PATTERN, Split};
use crate::tokenizer::{Decoder, Pipeline, Step, Token, byte_of_token};
use crate::{Error, Result, Tokenizer};

/// Far more than any vocabulary has: a damaged id must not make us allocate gigabytes.
const MAX_ID: u32 = 1 << 22;

/// The names of the files in a model's folder.
const JSON: &str = "tokenizer.json";
const MODEL: &str = "tokenizer.model";

/// Sentencepiece's stand-in for the space, U+2581.
pub(crate) const MARKER: char = '\u{2581}';

pub(crate) fn open(path: &Path) -> Result<Tokenizer> {
    let path = file(path);
    let bytes =
        std::fs::read(&path).map_err(|source| Error::Open { path: path.clone(), source })?;
    let mut config = match path.file_name() {
        Some(name) if name == JSON || name == MODEL => {
            read_config(&path.with_file_name("tokenizer_config.json"))?
        }
        _ => ConfigFile::default(),
    };
    let file = if is_sentencepiece(&path) {
        let Converted { file, bos, eos } = sentencepiece::convert(&path, &bytes)?;
        config.bos_token = config.bos_token.or(bos.map(TokenName::Plain));
        config.eos_token = config.eos_token.or(eos.map(TokenName::Plain));
        file
    } else {
        serde_json::from_slice(&bytes)
            .map_err(|source| Error::Parse { path: path.clone(), source })?
    };
    Builder { path, file, config }.build(&bytes)
}

/// Of a folder that has both, `tokenizer.json`: it may hold words that were added later.
pub(crate) fn file(path: &Path) -> PathBuf {
    if !path.is_dir() {
        return path.to_owned();
    }
    let [json, model] = [JSON, MODEL].map(|name| path.join(name));
    if !json.exists() && model.exists() { model } else { json }
}

/// `llama.model`, `tokenizer.model.v1`.
fn is_sentencepiece(path: &Path) -> bool {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    name.split('.').skip(1).any(|part| part == "model") && !name.ends_with(".json")
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
        let decoder = self.decoder()?;
        let byte_level = matches!(decoder, Decoder::ByteLevel(_));
        let pipeline = |prefix| {
            if byte_level { self.byte_level(prefix) } else { self.metaspace(prefix) }
        };
        let (at_start, continuation) = (pipeline(true)?, pipeline(false)?);
        let tokens = self.tokens(byte_level, &at_start.normalizer)?;
        let model = self.model(byte_level)?;
        let mut added = AddedVocabulary::new();
        added
            .add_tokens(self.words(), &model, Some(&at_start.normalizer))
            .map_err(|error| self.refused(error))?;
        let named = |name: &str| {
            self.file.added_tokens.iter().find(|token| token.content == name).map(|token| token.id)
        };
        let configured =
            |name: &Option<TokenName>| name.as_ref().and_then(|name| named(name.content()));
        let template = self.first_of_template()?;
        let bos = configured(&self.config.bos_token).or(template).or_else(|| named("<s>"));
        let adds_bos = self.config.add_bos_token.unwrap_or(template.is_some());
        let keeps_all = self.keeps_every_character(byte_level);
        let borders = if keeps_all && !byte_level { Some(self.borders()?) } else { None };
        let longest = tokens.iter().flatten().map(|token| token.piece.chars().count()).max();
        Ok(Tokenizer {
            model,
            added,
            controls: Controls::new(&self.file.added_tokens),
            prefixes_each_part: self.prefixes_each_part()?,
            at_start,
            continuation,
            decoder,
            tokens,
            bos,
            eos: configured(&self.config.eos_token).or_else(|| named("</s>")),
            adds_bos,
            longest_piece: longest.filter(|_| keeps_all),
            borders,
            memories: Memories::default(),
            merged_bytes: AtomicU64::new(0),
            fingerprint: fingerprint(bytes, bos.filter(|_| adds_bos)),
        })
    }

    fn unsupported(&self, part: &'static str, found: impl Into<String>) -> Error {
        Error::Unsupported { path: self.path.clone(), part, found: found.into() }
    }

    fn inconsistent(&self, message: impl Into<String>) -> Error {
        Error::Inconsistent { path: self.path.clone(), message: message.into() }
    }

    /// A reason of the crate's, for which it has no type.
    fn refused(&self, source: Box<dyn std::error::Error + Send + Sync>) -> Error {
        self.inconsistent(source.to_string())
    }

    fn check_model(&self) -> Result<()> {
        let model = &self.file.model;
        if model.kind != "BPE" {
            return Err(self.unsupported("model type", &*model.kind));
        }
        if model.dropout.is_some_and(|dropout| dropout > 0.0) {
            return Err(self.unsupported("model", "dropout of merges"));
        }
        let affixes = [&model.continuing_subword_prefix, &model.end_of_word_suffix];
        if let Some(affix) = affixes.into_iter().flatten().find(|affix| !affix.is_empty()) {
            return Err(self.unsupported("model", format!("word affix {affix:?}")));
        }
        if model.vocab.is_empty() {
            return Err(self.inconsistent("the vocabulary is empty"));
        }
        let added = self.file.added_tokens.iter().map(|token| (&token.content, &token.id));
        if let Some((_, id)) = model.vocab.iter().chain(added).find(|(_, id)| **id >= MAX_ID) {
            return Err(self.inconsistent(format!("token id {id} is out of bounds")));
        }
        match &model.unk_token {
            Some(name) if !model.vocab.contains_key(name) => {
                Err(self.inconsistent(format!("unknown token {name:?} is not in the vocabulary")))
            }
            _ => Ok(()),
        }
    }

    fn tokens(&self, byte_level: bool, normalizer: &Sequence) -> Result<Vec<Option<Token>>> {
        let mut tokens: Vec<Option<Token>> = Vec::new();
        for (piece, &id) in &self.file.model.vocab {
            let token = Token { piece: piece.clone(), spelled: piece.clone(), special: false };
            if let Some(other) = place(&mut tokens, id).replace(token) {
                let message = format!("{:?} and {piece:?} have the same id {id}", other.piece);
                return Err(self.inconsistent(message));
            }
        }
        for added in &self.file.added_tokens {
            let mut spelled = NormalizedString::from(added.content.as_str());
            // The decoder undoes what is done to texts, but the file has an added token as it is.
            let normalized = match (byte_level, added.normalized) {
                (true, _) => Spelling::new().normalize(&mut spelled),
                (false, true) => normalizer.normalize(&mut spelled),
                (false, false) => Ok(()),
            };
            normalized.map_err(|error| self.refused(error))?;
            let (piece, spelled) = (added.content.clone(), spelled.get().to_owned());
            let in_model = self.file.model.vocab.get(&piece).copied().unwrap_or(added.id);
            let slot = place(&mut tokens, added.id);
            if in_model != added.id || slot.as_ref().is_some_and(|other| other.piece != piece) {
                let id = added.id;
                let message =
                    format!("added token {piece:?} does not have the id {id} in the vocabulary");
                return Err(self.inconsistent(message));
            }
            *slot = Some(Token { piece, spelled, special: added.special });
        }
        Ok(tokens)
    }

    /// The model, without what no text may become: control tokens, and the names of byte tokens
    /// (`<0x0A>`). The crate needs the names of byte tokens and of the unknown token in the
    /// vocabulary; that no merge makes them is enough, as long as words are not looked up whole.
    fn model(&self, byte_level: bool) -> Result<BPE> {
        let model = &self.file.model;
        if model.ignore_merges && !byte_level {
            return Err(self.unsupported("model", "ignore_merges with byte fallback"));
        }
        let unknown = model.unk_token.as_ref().filter(|_| !byte_level);
        let special = self.special();
        let kept = |piece: &String| !special.contains(piece) || unknown == Some(piece);
        let pieces = model.vocab.iter().filter(|(piece, _)| kept(piece));
        // The crate gives an added word the id that the vocabulary has for it.
        let words = self.file.added_tokens.iter().filter(|token| token.is_plain_word());
        let words = words.map(|word| (&word.content, &word.id));
        let vocab: Vocab = pieces.chain(words).map(|(piece, id)| (piece.clone(), *id)).collect();
        let mut builder = BPE::builder()
            .vocab_and_merges(vocab, self.merges(byte_level)?)
            .fuse_unk(model.fuse_unk)
            .byte_fallback(model.byte_fallback && !byte_level)
            .ignore_merges(model.ignore_merges);
        if let Some(unknown) = unknown {
            builder = builder.unk_token(unknown.clone());
        }
        builder.build().map_err(|error| self.refused(error))
    }

    /// All merges but those of hidden pieces: a conversion from sentencepiece may list every way to
    /// put a piece together, control tokens included.
    fn merges(&self, byte_level: bool) -> Result<Merges> {
        let model = &self.file.model;
        let special = self.special();
        let hidden = |piece: &String| {
            special.contains(piece) || (!byte_level && byte_of_token(piece).is_some())
        };
        let mut merges = Merges::new();
        for (rank, merge) in model.merges.iter().enumerate() {
            let (left, right) = merge
                .pair()
                .ok_or_else(|| self.inconsistent(format!("merge {rank} is not a pair")))?;
            let pieces = [left.to_owned(), right.to_owned(), format!("{left}{right}")];
            if let Some(piece) = pieces.iter().find(|piece| !model.vocab.contains_key(*piece)) {
                let message = format!("merge needs {piece:?}, which is not in the vocabulary");
                return Err(self.inconsistent(message));
            }
            if !pieces.iter().any(hidden) {
                let [left, right, _] = pieces;
                merges.push((left, right));
            }
        }
        Ok(merges)
    }

    fn special(&self) -> BTreeSet<&String> {
        let special = self.file.added_tokens.iter().filter(|token| token.special);
        special.map(|token| &token.content).collect()
    }

    /// Where a text of sentencepiece's kind may be cut.
    fn borders(&self) -> Result<Borders> {
        let pieces: Vec<String> =
            self.merges(false)?.into_iter().map(|(left, right)| left + &right).collect();
        Ok(Borders::of(pieces.iter().map(String::as_str)))
    }

    /// Plain words that texts are searched for.
    fn words(&self) -> impl Iterator<Item = Word> {
        let words = self.file.added_tokens.iter().filter(|token| token.is_plain_word());
        words.map(|word| Word::from(&*word.content, false).normalized(word.normalized))
    }

    /// True if each character of any text is in some token.
    fn keeps_every_character(&self, byte_level: bool) -> bool {
        let model = &self.file.model;
        if byte_level {
            let mut alphabet = ByteLevel::alphabet().into_iter();
            return alphabet.all(|c| model.vocab.contains_key(c.encode_utf8(&mut [0; 4]) as &str));
        }
        let mut bytes = 0..=u8::MAX;
        model.byte_fallback && bytes.all(|b| model.vocab.contains_key(&format!("<0x{b:02X}>")))
    }

    /// Markers for spaces, and one before a text if `prefix` and the file asks for it.
    fn metaspace(&self, prefix: bool) -> Result<Pipeline> {
        let marker = MARKER.to_string();
        if !self.file.model.vocab.contains_key(&marker) {
            return Err(self.inconsistent("the vocabulary has no piece for the space, U+2581"));
        }
        let normalizer = Sequence::new(vec![]);
        let mut pipeline = Pipeline { normalizer, pre_tokenizers: vec![], prefix: "" };
        match (&self.file.normalizer, &self.file.pre_tokenizer) {
            (None, Some(step)) if kind(step) == "Metaspace" => {
                let mut step: Metaspace = self.parse(step)?;
                if step.get_replacement() != MARKER {
                    return Err(self.unsupported("pre_tokenizer", "another marker than U+2581"));
                }
                if !prefix {
                    step.set_prepend_scheme(PrependScheme::Never);
                }
                pipeline.pre_tokenizers.push(Box::new(step));
            }
            (_, Some(step)) => return Err(self.unsupported("pre_tokenizer", step.to_string())),
            (normalizer, None) => {
                let normalizer = normalizer.as_ref().unwrap_or(&Value::Null);
                let prepends = prefix && self.prepends_marker(normalizer)?;
                let replace = Replace::new(" ", &*marker).map_err(|error| self.refused(error))?;
                let prepend = prepends.then(|| Prepend::new(marker).into());
                let steps = prepend.into_iter().chain([replace.into()]).collect();
                pipeline.normalizer = Sequence::new(steps);
                pipeline.prefix = if prepends { " " } else { "" };
            }
        }
        Ok(pipeline)
    }

    /// False where the file asks for a space at the very beginning only.
    fn prefixes_each_part(&self) -> Result<bool> {
        match &self.file.pre_tokenizer {
            Some(step) if kind(step) == "Metaspace" => {
                Ok(self.parse::<Metaspace>(step)?.prepend_scheme != PrependScheme::First)
            }
            _ => Ok(true),
        }
    }

    /// Checks that a normalizer puts markers for spaces; tells whether it puts one before a text.
    fn prepends_marker(&self, normalizer: &Value) -> Result<bool> {
        let prepend = json!({ "type": "Prepend", "prepend": "\u{2581}" });
        let spaces = json!({ "String": " " });
        let replace = json!({ "type": "Replace", "pattern": spaces, "content": "\u{2581}" });
        match steps(normalizer, "normalizers").as_slice() {
            [one] if **one == replace => Ok(false),
            [first, second] if **first == prepend && **second == replace => Ok(true),
            _ => Err(self.unsupported("normalizer", normalizer.to_string())),
        }
    }

    /// Splits, then bytes; a space before a text if `prefix` and the file asks for it.
    fn byte_level(&self, prefix: bool) -> Result<Pipeline> {
        if let Some(normalizer) = &self.file.normalizer {
            return Err(self.unsupported("normalizer", normalizer.to_string()));
        }
        let file = self.file.pre_tokenizer.as_ref().unwrap_or(&Value::Null);
        let mut cuts = steps(file, "pretokenizers");
        let Some(last) = cuts.pop().filter(|step| kind(step) == "ByteLevel") else {
            return Err(self.unsupported("pre_tokenizer", file.to_string()));
        };
        let bytes: ByteLevel = self.parse(last)?;
        if bytes.add_prefix_space && !cuts.is_empty() {
            // The space would be put before every part, not before the text.
            return Err(self.unsupported("pre_tokenizer", "a prefix space behind a split"));
        }
        let mut pre_tokenizers = Vec::new();
        for step in cuts {
            pre_tokenizers.push(self.cut(step)?);
        }
        let space = bytes.add_prefix_space && prefix;
        if bytes.use_regex {
            pre_tokenizers.push(self.split(GPT2_PATTERN, space)?);
        }
        let bytes = bytes.add_prefix_space(space && !bytes.use_regex).use_regex(false);
        pre_tokenizers.push(Box::new(bytes));
        Ok(Pipeline { normalizer: Sequence::new(vec![]), pre_tokenizers, prefix: "" })
    }

    /// A step before bytes are mapped.
    fn cut(&self, step: &Value) -> Result<Step> {
        match kind(step) {
            "Digits" => Ok(Box::new(self.parse::<Digits>(step)?)),
            "Split" if step["behavior"] == "Isolated" && step["invert"] != true => {
                let pattern = &step["pattern"];
                match (pattern["Regex"].as_str(), pattern["String"].as_str()) {
                    (Some(pattern), _) => self.split(pattern, false),
                    (_, Some(text)) => self.split(&regex::escape(text), false),
                    _ => Err(self.unsupported("split pattern", pattern.to_string())),
                }
            }
            _ => Err(self.unsupported("pre_tokenizer", step.to_string())),
        }
    }

    fn split(&self, pattern: &str, prefix_space: bool) -> Result<Step> {
        match Split::new(pattern, prefix_space) {
            Ok(split) => Ok(Box::new(split)),
            Err(error) => Err(self.unsupported("split pattern", format!("{pattern:?}: {error}"))),
        }
    }

    /// Byte-level, or the usual steps of sentencepiece's decoder.
    fn decoder(&self) -> Result<Decoder> {
        let file = self.file.decoder.as_ref().unwrap_or(&Value::Null);
        if kind(file) == "ByteLevel" {
            return Ok(Decoder::ByteLevel(ByteLevel::default()));
        }
        let marker = json!({ "String": "\u{2581}" });
        let replace = json!({ "type": "Replace", "pattern": marker, "content": " " });
        let strip = json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 });
        let mut strips_first = false;
        for step in steps(file, "decoders") {
            match kind(step) {
                "ByteFallback" | "Fuse" => {}
                "Metaspace" => {
                    let step: Metaspace = self.parse(step)?;
                    strips_first = step.prepend_scheme != PrependScheme::Never;
                }
                _ if *step == replace => {}
                _ if *step == strip => strips_first = true,
                _ => return Err(self.unsupported("decoder", step.to_string())),
            }
        }
        let spaces = Replace::new(MARKER.to_string(), " ").map_err(|error| self.refused(error))?;
        Ok(Decoder::Metaspace { spaces, strips_first })
    }

    /// The special token that the post-processor puts before a single text.
    fn first_of_template(&self) -> Result<Option<u32>> {
        let Some(file) = &self.file.post_processor else { return Ok(None) };
        let mut first = None;
        for step in steps(file, "processors") {
            match kind(step) {
                "TemplateProcessing" => {
                    let name = step["single"][0]["SpecialToken"]["id"].as_str().unwrap_or_default();
                    let id = step["special_tokens"][name]["ids"][0].as_u64();
                    first = first.or(id.and_then(|id| id.try_into().ok()));
                }
                "ByteLevel" => {}
                _ => return Err(self.unsupported("post_processor", step.to_string())),
            }
        }
        Ok(first)
    }

    /// A step as the crate reads it.
    fn parse<T: DeserializeOwned>(&self, step: &Value) -> Result<T> {
        T::deserialize(step).map_err(|source| Error::Parse { path: self.path.clone(), source })
    }
}

fn place(tokens: &mut Vec<Option<Token>>, id: u32) -> &mut Option<Token> {
    let index = id as usize;
    if tokens.len() <= index {
        tokens.resize(index + 1, None);
    }
    &mut tokens[index]
}

fn fingerprint(bytes: &[u8], leading_bos: Option<u32>) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(bytes);
    hasher.update(format!("{leading_bos:?}").as_bytes());
    hasher.finalize().to_hex().to_string()
}
