use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::{Replace, Sequence};
use tokenizers::{
    AddedVocabulary, Decoder as _, Encoding, Model as _, OffsetReferential, OffsetType,
    PreTokenizedString, PreTokenizer,
};

use crate::build::MARKER;
use crate::count::{Borders, Memories, Sum};
use crate::spans::Controls;
use crate::{Result, build};

/// Why the crate's pipeline cannot fail: it does for parts outside of the text and for an unknown
/// token that is not in the vocabulary. But parts are what a pattern has found in the text, and
/// the unknown token is looked up when the file is opened.
pub(crate) const CHECKED: &str = "the parts were checked when the file was opened";

/// A tokenizer of the LLaMA family. It can be shared between threads.
pub struct Tokenizer {
    pub(crate) model: BPE,
    /// Plain words that the model was given later.
    pub(crate) added: AddedVocabulary,
    /// Special tokens, for the one kind of text that may spell them: what a chat template writes.
    pub(crate) controls: Controls,
    /// The space that the file puts before a text comes behind each special token, too.
    pub(crate) prefixes_each_part: bool,
    pub(crate) at_start: Pipeline,
    /// For a text that follows another: without the space that some files put before a text.
    pub(crate) continuation: Pipeline,
    pub(crate) decoder: Decoder,
    /// By id; `None` where the file leaves an id out.
    pub(crate) tokens: Vec<Option<Token>>,
    pub(crate) bos: Option<u32>,
    pub(crate) eos: Option<u32>,
    pub(crate) adds_bos: bool,
    /// Characters (sentencepiece) or bytes (byte-level) of the longest token, if each character of
    /// any text is in some token.
    pub(crate) longest_piece: Option<usize>,
    /// Where a text may be cut before its tokens are counted, if anywhere.
    pub(crate) borders: Option<Borders>,
    pub(crate) memories: Memories,
    pub(crate) merged_bytes: AtomicU64,
    pub(crate) fingerprint: String,
}

/// One token of the vocabulary.
#[derive(Clone)]
pub(crate) struct Token {
    /// As the file writes it.
    pub(crate) piece: String,
    /// As the decoder reads it.
    pub(crate) spelled: String,
    /// Decoding leaves it out.
    pub(crate) special: bool,
}

/// What happens to a text before the merges.
pub(crate) struct Pipeline {
    pub(crate) normalizer: Sequence,
    pub(crate) pre_tokenizers: Vec<Step>,
    /// What the normalizer puts before a text, markers as spaces.
    pub(crate) prefix: &'static str,
}

pub(crate) type Step = Box<dyn PreTokenizer + Send + Sync>;

pub(crate) enum Decoder {
    ByteLevel(ByteLevel),
    /// Spaces for markers, and one space fewer at the start if the encoder puts one there.
    Metaspace {
        spaces: Replace,
        strips_first: bool,
    },
}

impl Tokenizer {
    /// Reads a `tokenizer.json` or a sentencepiece `tokenizer.model`, or the one in a folder. A
    /// `tokenizer_config.json` beside it says which tokens begin and end a text.
    ///
    /// # Errors
    /// A file that cannot be read, is damaged, or describes a tokenizer of another family.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        build::open(path.as_ref())
    }

    /// The file that [`Self::open`] reads: in a folder with `tokenizer.json` and `tokenizer.model`, the
    /// first.
    pub fn file(path: impl AsRef<Path>) -> PathBuf {
        build::file(path.as_ref())
    }

    /// The ids of a text, without BOS. Special tokens' names in the text are plain text.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        self.ids(&self.at_start, text)
    }

    /// The ids of a text, behind BOS if the model's texts begin with it.
    pub fn encode_with_bos(&self, text: &str) -> Vec<u32> {
        self.leading_bos().into_iter().chain(self.encode(text)).collect()
    }

    /// Number of ids that [`Self::encode_with_bos`] gives, mostly without making them: words are
    /// counted alone where the vocabulary allows it, and those seen before are remembered.
    pub fn len_with_bos(&self, text: &str) -> usize {
        usize::from(self.adds_bos()) + self.count(text, usize::MAX)
    }

    /// True if the text has at most `max_tokens` ids, BOS counted where the model has one. Most
    /// texts are decided by their length alone; others are counted until the answer is known.
    pub fn fits(&self, text: &str, max_tokens: usize) -> bool {
        let Some(max) = max_tokens.checked_sub(usize::from(self.adds_bos())) else {
            return false;
        };
        // An added word can be longer than any piece, and each one can start a new prefix.
        if self.added.is_empty() {
            let least = self.longest_piece.map_or(0, |piece| text.chars().count().div_ceil(piece));
            let most = text.len() + 1; // with a prefix
            if most <= max {
                return true;
            }
            if least > max {
                return false;
            }
        }
        self.count(text, max) <= max
    }

    /// Bytes of text that went through the merges since the tokenizer was opened: what encoding
    /// and counting have cost.
    pub fn merged_bytes(&self) -> u64 {
        self.merged_bytes.load(Ordering::Relaxed)
    }

    /// The ids of `target` where it follows `source`: the ids of both, joined, decode to both
    /// texts, joined.
    ///
    /// A sentencepiece tokenizer puts a space before each text that it encodes; a target that
    /// follows a source must not get one. (Dromedary encodes a newline and the target, then drops
    /// the newline's tokens; the result is the same, and right for byte-level vocabularies too,
    /// where the newline may be merged with what follows.)
    pub fn encode_continuation(&self, source: &str, target: &str) -> Vec<u32> {
        self.ids(if source.is_empty() { &self.at_start } else { &self.continuation }, target)
    }

    /// The text of the ids. Special tokens and ids beyond the vocabulary are left out, and so is
    /// the space that a sentencepiece tokenizer puts before a text. Bytes that are not UTF-8 become
    /// U+FFFD (one for each stretch that cannot be a character; HF gives up the whole run of byte
    /// tokens).
    pub fn decode(&self, ids: &[u32]) -> String {
        let text = self.decode_continuation(ids);
        self.without_prefix(&text).to_owned()
    }

    /// The text of ids that follow other ids: as [`Self::decode`], but a leading space is kept.
    pub fn decode_continuation(&self, ids: &[u32]) -> String {
        self.text(ids.iter().filter_map(|&id| self.spelled(id)).collect())
    }

    /// The token that begins a text, if the model has one; see [`Self::adds_bos`].
    pub fn bos_id(&self) -> Option<u32> {
        self.bos
    }

    /// The token that ends a text, as the tokenizer's files name it. Models may have more
    /// (`generation_config.json`).
    pub fn eos_id(&self) -> Option<u32> {
        self.eos
    }

    /// True if texts of this model begin with BOS.
    pub fn adds_bos(&self) -> bool {
        self.leading_bos().is_some()
    }

    /// One more than the largest id. The model's embedding may have more rows.
    pub fn vocab_size(&self) -> usize {
        self.tokens.len()
    }

    /// The token as the file writes it (sentencepiece's marker or byte-level characters for
    /// spaces).
    pub fn token(&self, id: u32) -> Option<&str> {
        self.entry(id).map(|token| &*token.piece)
    }

    /// True if decoding leaves the token out.
    pub fn is_special(&self, id: u32) -> bool {
        self.entry(id).is_some_and(|token| token.special)
    }

    /// A hash of what decides ids: the file, and whether texts begin with BOS.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    fn leading_bos(&self) -> Option<u32> {
        self.bos.filter(|_| self.adds_bos)
    }

    fn entry(&self, id: u32) -> Option<&Token> {
        self.tokens.get(id as usize)?.as_ref()
    }

    /// What the decoder is given for the id: nothing if decoding leaves it out.
    pub(crate) fn spelled(&self, id: u32) -> Option<String> {
        self.entry(id).filter(|token| !token.special).map(|token| token.spelled.clone())
    }

    fn ids(&self, pipeline: &Pipeline, text: &str) -> Vec<u32> {
        self.encoding(pipeline, text, OffsetType::None).expect(CHECKED).get_ids().to_vec()
    }

    /// As the crate's `Tokenizer` does it. We keep its parts apart because texts go through two
    /// pipelines, and the vocabulary should be in memory once.
    pub(crate) fn encoding(
        &self,
        pipeline: &Pipeline,
        text: &str,
        offsets: OffsetType,
    ) -> tokenizers::Result<Encoding> {
        let mut parts = self.parts(pipeline, text)?;
        parts.tokenize(|part| self.merge(part.get()))?;
        parts.into_encoding(None, 0, offsets)
    }

    fn parts(&self, pipeline: &Pipeline, text: &str) -> tokenizers::Result<PreTokenizedString> {
        let mut parts = self.added.extract_and_normalize(Some(&pipeline.normalizer), text);
        for step in &pipeline.pre_tokenizers {
            step.pre_tokenize(&mut parts)?;
        }
        Ok(parts)
    }

    fn merge(&self, part: &str) -> tokenizers::Result<Vec<tokenizers::Token>> {
        self.merged_bytes.fetch_add(part.len() as u64, Ordering::Relaxed);
        self.model.tokenize(part)
    }

    /// Number of ids that [`Self::encode`] gives, if it is at most `max`; else any number that is
    /// more. Below a `max` that is a limit at all, a smaller number will do, too.
    fn count(&self, text: &str, max: usize) -> usize {
        self.memories.with(|seen| {
            let count = |word: &str| {
                let word = word.replace(' ', MARKER.encode_utf8(&mut [0; 4]));
                self.merge(&word).expect(CHECKED).len()
            };
            let mut sum = Sum::new(seen, max, self.longest_piece, &count);
            self.add_words(&mut sum, text).expect(CHECKED);
            sum.tokens()
        })
    }

    fn add_words(&self, sum: &mut Sum<'_>, text: &str) -> tokenizers::Result<()> {
        let pipeline = &self.at_start;
        let borders = self.borders.as_ref();
        if let (Some(borders), [], true) =
            (borders, &*pipeline.pre_tokenizers, self.added.is_empty())
        {
            sum.add_text(borders, pipeline.prefix, text, true);
            return Ok(());
        }
        let parts = self.parts(pipeline, text)?;
        for (part, _, word) in parts.get_splits(OffsetReferential::Normalized, OffsetType::None) {
            match (word, borders) {
                (Some(added), _) => sum.add_tokens(added.len()),
                (None, Some(borders)) => sum.add_text(borders, "", part, false),
                (None, None) => sum.add_word("", part),
            }
        }
        Ok(())
    }

    /// The text of what [`Self::spelled`] gives, its leading space kept.
    pub(crate) fn text(&self, tokens: Vec<String>) -> String {
        self.decoder.text(tokens).expect("a decoder of this family takes any token")
    }

    /// A decoded text without the space that the encoder has put before it.
    pub(crate) fn without_prefix<'t>(&self, text: &'t str) -> &'t str {
        match self.decoder {
            Decoder::Metaspace { strips_first: true, .. } => text.strip_prefix(' ').unwrap_or(text),
            _ => text,
        }
    }
}

impl Decoder {
    fn text(&self, tokens: Vec<String>) -> tokenizers::Result<String> {
        let spaces = match self {
            Self::ByteLevel(decoder) => return decoder.decode(tokens),
            Self::Metaspace { spaces, .. } => spaces,
        };
        // Not the crate's `ByteFallback`: it makes a replacement character of every byte beside a
        // wrong one, and what a stream has given already could not be taken back.
        let mut bytes = Vec::new();
        for token in spaces.decode_chain(tokens)? {
            match byte_of_token(&token) {
                Some(byte) => bytes.push(byte),
                None => bytes.extend_from_slice(token.as_bytes()),
            }
        }
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

/// The byte of `<0x0A>`.
pub(crate) fn byte_of_token(piece: &str) -> Option<u8> {
    let hex = piece.strip_prefix("<0x")?.strip_suffix('>')?;
    let digits = hex.len() == 2 && hex.bytes().all(|digit| digit.is_ascii_hexdigit());
    digits.then(|| u8::from_str_radix(hex, 16).ok()).flatten()
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size())
            .field("bos", &self.bos)
            .field("eos", &self.eos)
            .field("fingerprint", &self.fingerprint)
            .finish_non_exhaustive()
    }
}
