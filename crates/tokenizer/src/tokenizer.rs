use std::path::Path;

use crate::Result;
use crate::bpe::Scratch;
use crate::build;
use crate::byte_level::ByteLevel;
use crate::metaspace::{DummyPrefix, Metaspace};
use crate::vocabulary::Vocabulary;

/// A tokenizer of the LLaMA family. It can be shared between threads.
pub struct Tokenizer {
    pub(crate) encoder: Encoder,
    pub(crate) vocabulary: Vocabulary,
    pub(crate) added: Option<AddedText>,
    pub(crate) bos: Option<u32>,
    pub(crate) eos: Option<u32>,
    pub(crate) adds_bos: bool,
    /// Characters (sentencepiece) or bytes (byte-level) of the longest token.
    pub(crate) longest_piece: usize,
    pub(crate) fingerprint: String,
}

pub(crate) enum Encoder {
    Metaspace(Metaspace),
    ByteLevel(ByteLevel),
}

/// Added tokens that are not special: plain words that the model was given later.
pub(crate) struct AddedText {
    /// All contents, the longest first.
    pub(crate) pattern: regex::Regex,
    pub(crate) ids: std::collections::BTreeMap<String, u32>,
}

impl Tokenizer {
    /// Reads a `tokenizer.json`, or the one in a folder. A `tokenizer_config.json` beside it says
    /// which tokens begin and end a text.
    ///
    /// # Errors
    /// A file that cannot be read, is damaged, or describes a tokenizer of another family.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        build::open(path.as_ref())
    }

    /// The ids of a text, without BOS. Special tokens' names in the text are plain text.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        let mut ids = Vec::new();
        self.encode_into(text, true, &mut ids);
        ids
    }

    /// The ids of a text, behind BOS if the model's texts begin with it.
    pub fn encode_with_bos(&self, text: &str) -> Vec<u32> {
        let mut ids = Vec::new();
        ids.extend(self.leading_bos());
        self.encode_into(text, true, &mut ids);
        ids
    }

    /// Number of ids that [`Self::encode_with_bos`] gives.
    pub fn len_with_bos(&self, text: &str) -> usize {
        self.encode_with_bos(text).len()
    }

    /// True if the text has at most `max_tokens` ids, BOS counted where the model has one. Most
    /// texts are decided by their length alone.
    pub fn fits(&self, text: &str, max_tokens: usize) -> bool {
        let (least, most) = self.length_bounds(text);
        most <= max_tokens || (least <= max_tokens && self.len_with_bos(text) <= max_tokens)
    }

    /// Bounds of [`Self::len_with_bos`] that need no encoding.
    pub(crate) fn length_bounds(&self, text: &str) -> (usize, usize) {
        let bos = usize::from(self.leading_bos().is_some());
        // An added token can be longer than any piece, and each one can start a new prefix.
        if self.added.is_some() {
            return (bos, usize::MAX);
        }
        match &self.encoder {
            Encoder::Metaspace(encoder) => {
                let prefix = usize::from(encoder.wants_prefix(text));
                let least =
                    if encoder.keeps_every_character() { text.chars().count() + prefix } else { 0 };
                (bos + least.div_ceil(self.longest_piece), bos + text.len() + prefix)
            }
            Encoder::ByteLevel(encoder) => {
                let covered = encoder.covered_bytes(text);
                let prefix = usize::from(encoder.wants_prefix(text));
                (bos + covered.div_ceil(self.longest_piece), bos + text.len() + prefix)
            }
        }
    }

    /// The ids of `target` where it follows `source`: the ids of both, joined, decode to both
    /// texts, joined.
    ///
    /// A sentencepiece tokenizer puts a space before each text that it encodes; a target that
    /// follows a source must not get one. (Dromedary encodes a newline and the target, then drops
    /// the newline's tokens; the result is the same, and right for byte-level vocabularies too,
    /// where the newline may be merged with what follows.)
    pub fn encode_continuation(&self, source: &str, target: &str) -> Vec<u32> {
        let mut ids = Vec::new();
        self.encode_into(target, source.is_empty(), &mut ids);
        ids
    }

    /// The text of the ids. Special tokens and ids beyond the vocabulary are left out, and so is
    /// the space that a sentencepiece tokenizer puts before a text. Bytes that are not UTF-8 become
    /// U+FFFD (one for each stretch that cannot be a character; HF gives up the whole run of byte
    /// tokens).
    pub fn decode(&self, ids: &[u32]) -> String {
        self.vocabulary.decode(ids, true)
    }

    /// The text of ids that follow other ids: as [`Self::decode`], but a leading space is kept.
    pub fn decode_continuation(&self, ids: &[u32]) -> String {
        self.vocabulary.decode(ids, false)
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
        self.vocabulary.tokens.len()
    }

    /// The token as the file writes it (sentencepiece's marker or byte-level characters for
    /// spaces).
    pub fn token(&self, id: u32) -> Option<&str> {
        self.vocabulary.token(id).map(|token| &*token.piece)
    }

    /// True if decoding leaves the token out.
    pub fn is_special(&self, id: u32) -> bool {
        self.vocabulary.token(id).is_some_and(|token| token.special)
    }

    /// A hash of what decides ids: the file, and whether texts begin with BOS.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    pub(crate) fn token_bytes(&self, id: u32) -> &[u8] {
        self.vocabulary.bytes(id)
    }

    pub(crate) fn strips_leading_space(&self) -> bool {
        self.vocabulary.strip_leading_space
    }

    fn leading_bos(&self) -> Option<u32> {
        self.bos.filter(|_| self.adds_bos)
    }

    /// Appends the ids of `text`; `at_start` if it begins a text, so that a prefix is due.
    fn encode_into(&self, text: &str, at_start: bool, out: &mut Vec<u32>) {
        let mut scratch = Scratch::default();
        let Some(added) = &self.added else {
            return self.encoder.encode(text, at_start, &mut scratch, out);
        };
        let mut done = 0;
        for found in added.pattern.find_iter(text) {
            let plain = &text[done..found.start()];
            self.encoder.encode(plain, self.prefix_due(at_start, done), &mut scratch, out);
            out.extend(added.ids.get(found.as_str()));
            done = found.end();
        }
        self.encoder.encode(&text[done..], self.prefix_due(at_start, done), &mut scratch, out);
    }

    /// HF normalises the stretches between added tokens one by one, so that each gets a prefix.
    fn prefix_due(&self, at_start: bool, done: usize) -> bool {
        if done == 0 { at_start } else { self.encoder.prefixes_every_stretch() }
    }
}

impl Encoder {
    fn prefixes_every_stretch(&self) -> bool {
        match self {
            Self::Metaspace(encoder) => encoder.prefix == DummyPrefix::Always,
            Self::ByteLevel(_) => true,
        }
    }

    fn encode(&self, text: &str, at_start: bool, scratch: &mut Scratch, out: &mut Vec<u32>) {
        match self {
            Self::Metaspace(encoder) => {
                encoder.encode(text, at_start && encoder.wants_prefix(text), scratch, out);
            }
            Self::ByteLevel(encoder) => {
                encoder.encode(text, at_start && encoder.wants_prefix(text), scratch, out);
            }
        }
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Counted, not timed: twice the text, twice the steps.
    #[test]
    fn no_text_takes_quadratic_work() {
        for file in
            ["../llama/tests/data/stories260k/tokenizer.json", "tests/data/small_byte_level.json"]
        {
            let tokenizer =
                Tokenizer::open(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).unwrap();
            for unit in ["a", " ", "\n", "\u{4f60}", "the ", "in", "</s>", "\0", "=", " \n", "1"] {
                let steps = |times: usize| {
                    let mut scratch = Scratch::default();
                    let text = unit.repeat(times);
                    tokenizer.encoder.encode(&text, true, &mut scratch, &mut Vec::new());
                    scratch.steps
                };
                let (once, twice) = (steps(20_000), steps(40_000));
                assert!(twice <= 2 * once + 100, "{file} {unit:?}: {once} and {twice} steps");
            }
        }
    }
}
