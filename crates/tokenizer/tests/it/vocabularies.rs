//! Where the real vocabularies are. stories260k's is in the checkout; the large ones are in the folder that
//! DROMEDARY_TOKENIZERS names.

use std::path::{Path, PathBuf};

use dromedary_tokenizer::Tokenizer;

/// A vocabulary's name, and its file.
pub(crate) struct Vocabulary {
    pub(crate) name: &'static str,
    pub(crate) file: PathBuf,
}

impl Vocabulary {
    pub(crate) fn open(&self) -> Tokenizer {
        Tokenizer::open(&self.file).unwrap()
    }
}

pub(crate) fn stories260k() -> Vocabulary {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    Vocabulary {
        name: "stories260k",
        file: root.join("../llama/tests/data/stories260k/tokenizer.json"),
    }
}

/// The vocabularies that are here. The large ones may be missing unless DROMEDARY_REQUIRE_TEST_DATA=1.
pub(crate) fn all() -> Vec<Vocabulary> {
    let mut found = vec![stories260k()];
    for (name, file) in
        [("llama", "llama.json"), ("mistral", "mistral.json"), ("smollm2", "smollm2.json")]
    {
        let folder = std::env::var_os("DROMEDARY_TOKENIZERS").map(PathBuf::from);
        match folder.map(|folder| folder.join(file)).filter(|path| path.is_file()) {
            Some(file) => found.push(Vocabulary { name, file }),
            None if std::env::var_os("DROMEDARY_REQUIRE_TEST_DATA")
                .is_some_and(|value| value == "1") =>
            {
                panic!("DROMEDARY_TOKENIZERS names no folder with {file}")
            }
            None => eprintln!(
                "skipped: {name}'s vocabulary; DROMEDARY_TOKENIZERS names no folder with {file}"
            ),
        }
    }
    found
}
