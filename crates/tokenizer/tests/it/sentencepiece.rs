//! Models of sentencepiece against the sentencepiece library.

use std::fs;
use std::path::{Path, PathBuf};

use dromedary_tokenizer::{Error, Tokenizer};
use flate2::read::GzDecoder;
use serde::Deserialize;

use crate::golden::hash;
use crate::vocabularies::{self, Vocabulary};

/// What the library gives for Mistral's model.
#[derive(Deserialize)]
struct Golden {
    pieces: usize,
    bos: u32,
    eos: u32,
    texts: Vec<String>,
    /// Number and hash of the ids of each text.
    ids: Vec<(usize, u64)>,
}

fn golden() -> Golden {
    let packed = include_bytes!("../data/sentencepiece.json.gz");
    serde_json::from_reader(GzDecoder::new(&packed[..])).unwrap()
}

fn stories() -> PathBuf {
    vocabularies::stories260k().file.with_extension("model")
}

#[test]
fn ids_and_lengths_are_those_of_the_library() {
    let Some(mistral) = vocabularies::downloaded("mistral.model") else { return };
    let (tokenizer, golden) = (Tokenizer::open(mistral).unwrap(), golden());
    assert_eq!(golden.texts.len(), 10_000);
    assert_eq!(tokenizer.vocab_size(), golden.pieces);
    assert_eq!((tokenizer.bos_id(), tokenizer.eos_id()), (Some(golden.bos), Some(golden.eos)));
    assert!(tokenizer.adds_bos());
    for (text, &(count, of_ids)) in golden.texts.iter().zip(&golden.ids) {
        let ids = tokenizer.encode(text);
        assert_eq!((ids.len(), hash(&ids)), (count, of_ids), "{text:?}: {ids:?}");
        assert_eq!(tokenizer.len_with_bos(text), 1 + count, "{text:?}");
        assert!(tokenizer.fits(text, 1 + count) && !tokenizer.fits(text, count), "{text:?}");
        if !text.contains('\u{2581}') {
            assert_eq!(&tokenizer.decode(&ids), text);
        }
    }
}

/// Both files of a model are the same tokenizer, also in what comes before and behind a text.
#[test]
fn the_model_is_the_tokenizer_json_that_was_made_of_it() {
    let mut pairs = vec![(stories(), vocabularies::stories260k())];
    if let Some(model) = vocabularies::downloaded("mistral.model") {
        let json = vocabularies::all().into_iter().find(|vocabulary| vocabulary.name == "mistral");
        pairs.push((model, json.unwrap()));
    }
    for (model, json) in pairs {
        let (model, json) = (Tokenizer::open(model).unwrap(), Vocabulary::open(&json));
        assert_eq!(model.vocab_size(), json.vocab_size());
        for id in 0..model.vocab_size() as u32 {
            assert_eq!(model.token(id), json.token(id));
            assert_eq!(model.is_special(id), json.is_special(id), "{id}");
        }
        assert_eq!((model.bos_id(), model.eos_id()), (json.bos_id(), json.eos_id()));
        for text in golden().texts {
            assert_eq!(model.encode_with_bos(&text), json.encode_with_bos(&text), "{text:?}");
            assert_eq!(model.len_with_bos(&text), json.len_with_bos(&text), "{text:?}");
        }
        let ids = model.encode_continuation("Once", " upon");
        assert_eq!(ids, json.encode_continuation("Once", " upon"));
        assert_eq!(model.decode_continuation(&ids), json.decode_continuation(&ids));
    }
}

#[test]
fn a_folder_may_hold_the_model_alone() {
    let folder = tempfile::tempdir().unwrap();
    fs::copy(stories(), folder.path().join("tokenizer.model")).unwrap();
    let alone = Tokenizer::open(folder.path()).unwrap();
    assert_eq!(alone.fingerprint(), Tokenizer::open(stories()).unwrap().fingerprint());
    fs::write(folder.path().join("tokenizer_config.json"), r#"{ "add_bos_token": false }"#)
        .unwrap();
    assert!(!Tokenizer::open(folder.path()).unwrap().adds_bos());
    // The newer file goes first.
    fs::copy(vocabularies::small_byte_level().file, folder.path().join("tokenizer.json")).unwrap();
    assert_eq!(Tokenizer::open(folder.path()).unwrap().encode("a").len(), 1);
    assert_ne!(
        Tokenizer::open(folder.path()).unwrap().vocab_size(),
        alone.vocab_size(),
        "tokenizer.json was not read"
    );
}

/// Opens changed bytes under a model's name.
fn open(folder: &Path, bytes: &[u8]) -> Result<Tokenizer, Error> {
    let path = folder.join("cut.model");
    fs::write(&path, bytes).unwrap();
    Tokenizer::open(path)
}

#[test]
fn no_cut_of_a_model_is_a_tokenizer() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = fs::read(stories()).unwrap();
    for length in 0..bytes.len() {
        let error = open(folder.path(), &bytes[..length]).unwrap_err().to_string();
        assert!(error.contains("cut.model"), "{length}: {error}");
    }
    open(folder.path(), &bytes).unwrap();
}

/// A flipped bit may change a score or a letter; it must not do harm, and where it is seen, the file
/// is named.
#[test]
fn flipped_bits_do_no_harm() {
    let folder = tempfile::tempdir().unwrap();
    let whole = fs::read(stories()).unwrap();
    let mut refused = 0;
    for at in 0..whole.len() {
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (at % 8);
        match open(folder.path(), &bytes) {
            Ok(tokenizer) => assert!(!tokenizer.encode("Once upon").is_empty()),
            Err(error) => {
                assert!(error.to_string().contains("cut.model"), "{error}");
                refused += 1;
            }
        }
    }
    assert!(refused > whole.len() / 4, "{refused} of {} were refused", whole.len());
}

#[test]
fn other_files_under_a_models_name_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let json = fs::read(vocabularies::stories260k().file).unwrap();
    for bytes in [&json[..], b"", b"\0\0\0\0", &[0xff; 4096]] {
        let error = open(folder.path(), bytes).unwrap_err().to_string();
        assert!(error.contains("cut.model"), "{error}");
    }
}
