//! Where vocabularies are. Two small ones are in the checkout; the large ones are in the folder
//! that DROMEDARY_TOKENIZERS names.

use std::path::{Path, PathBuf};

use dromedary_tokenizer::Tokenizer;
use proptest::prelude::*;

/// A vocabulary's name, and its file.
pub(crate) struct Vocabulary {
    pub(crate) name: &'static str,
    pub(crate) file: PathBuf,
}

impl Vocabulary {
    pub(crate) fn open(&self) -> Tokenizer {
        Tokenizer::open(&self.file).unwrap()
    }

    /// True if texts get a space of their own before them.
    pub(crate) fn is_sentencepiece(&self) -> bool {
        !matches!(self.name, "smollm2" | "small_byte_level")
    }

    /// False for text that the vocabulary cannot hold: SmolLM2's has no token for some bytes, and
    /// sentencepiece's marker comes back as a space.
    pub(crate) fn holds(&self, text: &str) -> bool {
        if self.is_sentencepiece() {
            !text.contains('\u{2581}')
        } else {
            !text
                .bytes()
                .any(|byte| matches!(byte, 0x04 | 0x06 | 0x13 | 0x14 | 0x16 | 0x1d | 0xf1 | 0xf2))
        }
    }
}

pub(crate) fn stories260k() -> Vocabulary {
    Vocabulary {
        name: "stories260k",
        file: crate_file("../llama/tests/data/stories260k/tokenizer.json"),
    }
}

pub(crate) fn small_byte_level() -> Vocabulary {
    Vocabulary { name: "small_byte_level", file: crate_file("tests/data/small_byte_level.json") }
}

fn crate_file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// The vocabularies that are here. The large ones may be missing unless
/// DROMEDARY_REQUIRE_TEST_DATA=1.
pub(crate) fn all() -> Vec<Vocabulary> {
    let large = [("llama", "llama.json"), ("mistral", "mistral.json"), ("smollm2", "smollm2.json")];
    let large = large.into_iter().filter_map(|(name, file)| {
        let file = downloaded(file)?;
        Some(Vocabulary { name, file })
    });
    [stories260k(), small_byte_level()].into_iter().chain(large).collect()
}

/// A file of the folder of large vocabularies. It may be missing unless
/// DROMEDARY_REQUIRE_TEST_DATA=1.
pub(crate) fn downloaded(file: &str) -> Option<PathBuf> {
    let folder = std::env::var_os("DROMEDARY_TOKENIZERS").map(PathBuf::from);
    let found = folder.map(|folder| folder.join(file)).filter(|path| path.is_file());
    if found.is_none() {
        let required =
            std::env::var_os("DROMEDARY_REQUIRE_TEST_DATA").is_some_and(|value| value == "1");
        assert!(!required, "DROMEDARY_TOKENIZERS names no folder with {file}");
        eprintln!("skipped: {file}, because DROMEDARY_TOKENIZERS names no folder with it");
    }
    found
}

pub(crate) fn cases(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

/// Text that meets every branch: scripts, runs of spaces, digits, contractions, emoji, control
/// characters.
pub(crate) fn text() -> impl Strategy<Value = String> {
    const ODD: [&str; 24] = [
        "'s",
        "'ll",
        " I'm",
        "\u{2581}",
        "\u{a0}",
        "\u{3000}",
        "<0x0A>",
        "\u{4f60}\u{597d}",
        "\u{1f42a}",
        "e\u{301}",
        "\u{e9}",
        "\u{fb01}",
        "\0",
        "\u{200b}",
        "\u{feff}",
        "\u{1f468}\u{200d}\u{1f469}",
        "\u{664}\u{665}",
        "\u{c548}\u{b155}",
        "  1. ",
        "\n\n- ",
        "\u{bd}",
        "\u{2028}",
        "\u{1d}",
        "\u{85}",
    ];
    let piece = prop_oneof![
        4 => "[a-zA-Z]{1,8}",
        3 => "[ \t\n\r]{1,5}",
        2 => "[0-9]{1,6}",
        2 => "[.,:;!?()'\"#*/<>|_-]{1,4}",
        1 => prop::sample::select(ODD.to_vec()).prop_map(str::to_owned),
        1 => any::<char>().prop_map(String::from),
    ];
    prop::collection::vec(piece, 0..24).prop_map(|pieces| pieces.concat())
}
