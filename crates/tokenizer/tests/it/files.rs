use std::fs;
use std::path::{Path, PathBuf};

use dromedary_tokenizer::{Error, Tokenizer};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::golden;
use crate::vocabularies::{self, Vocabulary, cases, text};

fn parsed(vocabulary: &Vocabulary) -> Value {
    serde_json::from_slice(&fs::read(&vocabulary.file).unwrap()).unwrap()
}

fn write(folder: &Path, file: &Value) -> PathBuf {
    let path = folder.join("tokenizer.json");
    fs::write(&path, file.to_string()).unwrap();
    path
}

fn opened(file: &Value) -> Tokenizer {
    let folder = tempfile::tempdir().unwrap();
    Tokenizer::open(write(folder.path(), file)).unwrap()
}

/// Opens a changed file: the ids are the Python package's for the same change.
fn as_in_hugging_face(change: &str, file: &Value) -> Tokenizer {
    let tokenizer = opened(file);
    for (text, ids) in golden::of_changed(change) {
        assert_eq!(tokenizer.encode(&text), ids, "{change} {text:?}");
        let bos = usize::from(tokenizer.adds_bos());
        assert_eq!(tokenizer.len_with_bos(&text), bos + ids.len(), "{change} {text:?}");
    }
    proptest!(cases(300), |(text in text())| {
        prop_assert_eq!(tokenizer.fits(&text, 12), tokenizer.len_with_bos(&text) <= 12);
    });
    tokenizer
}

#[test]
fn a_folder_and_its_file_are_the_same_tokenizer() {
    let file = vocabularies::stories260k().file;
    let (of_file, of_folder) =
        (Tokenizer::open(&file).unwrap(), Tokenizer::open(file.parent().unwrap()).unwrap());
    assert_eq!(of_file.fingerprint(), of_folder.fingerprint());
    assert_eq!((of_folder.bos_id(), of_folder.eos_id()), (Some(1), Some(2)));
    assert!(of_folder.adds_bos());
    assert_eq!(of_folder.encode_with_bos("a")[0], 1);
    assert_eq!(of_folder.encode_with_bos(""), [1]);
}

#[test]
fn bos_comes_if_the_configuration_or_else_the_post_processor_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let mut file = parsed(&vocabularies::stories260k());
    let open = |file: &Value, config: Value| {
        fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        Tokenizer::open(write(folder.path(), file)).unwrap()
    };
    let with = open(&file, json!({}));
    let without = open(&file, json!({ "add_bos_token": false, "bos_token": "<s>" }));
    assert_eq!((with.adds_bos(), without.adds_bos()), (true, false));
    assert_ne!(with.fingerprint(), without.fingerprint());
    file["post_processor"] = Value::Null;
    assert!(!open(&file, json!({ "bos_token": "<s>" })).adds_bos());
    let asked = open(
        &file,
        json!({ "add_bos_token": true, "bos_token": { "content": "<s>" }, "eos_token": null }),
    );
    assert_eq!(asked.encode_with_bos("a")[0], 1);
}

#[test]
fn smollm2s_kind_has_no_bos() {
    let tokenizer = vocabularies::small_byte_level().open();
    assert!(!tokenizer.adds_bos());
    assert_eq!(tokenizer.encode_with_bos("a"), tokenizer.encode("a"));
}

/// LLaMA-2 as newer conversions write it: no normalizer, a pre-tokenizer that puts the marker.
#[test]
fn metaspace_pre_tokenizers_give_the_same_ids_as_in_hugging_face() {
    for (change, scheme, split) in [
        ("metaspace first", "first", false),
        ("metaspace always", "always", false),
        ("metaspace never", "never", false),
        ("metaspace split", "always", true),
    ] {
        let mut file = parsed(&vocabularies::stories260k());
        file["normalizer"] = Value::Null;
        file["pre_tokenizer"] = json!({
            "type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": scheme, "split": split
        });
        let tokenizer = as_in_hugging_face(change, &file);
        let ids = tokenizer.encode_continuation("a", "b c");
        assert_eq!(tokenizer.decode_continuation(&ids), "b c", "{change}");
    }
}

/// LLaMA-3: a split of its own before the bytes, digits by threes, whole words before merges.
#[test]
fn llama3s_form_gives_the_same_ids_as_in_hugging_face() {
    let mut file = parsed(&vocabularies::small_byte_level());
    let pattern = [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ]
    .concat();
    file["pre_tokenizer"] = json!({ "type": "Sequence", "pretokenizers": [
        { "type": "Split", "pattern": { "Regex": pattern },
          "behavior": "Isolated", "invert": false },
        { "type": "ByteLevel", "add_prefix_space": false,
          "trim_offsets": true, "use_regex": false },
    ]});
    file["model"]["ignore_merges"] = true.into();
    // A word that no merge makes: only the vocabulary has it.
    file["model"]["vocab"]["zqzqzq"] = 5000.into();
    let tokenizer = as_in_hugging_face("llama3", &file);
    assert_eq!(tokenizer.encode("zqzqzq"), [5000]);
}

/// GPT-2's space before a text; a target that follows a source does not get it.
#[test]
fn a_byte_level_prefix_space_is_put_before_a_text_only() {
    let mut file = parsed(&vocabularies::small_byte_level());
    file["pre_tokenizer"] = json!({ "type": "ByteLevel", "add_prefix_space": true,
        "trim_offsets": true, "use_regex": true });
    let tokenizer = as_in_hugging_face("prefix space", &file);
    assert_eq!(tokenizer.encode("a b"), tokenizer.encode(" a b"));
    let ids = tokenizer.encode_continuation("a", "b c");
    assert_eq!(tokenizer.decode_continuation(&ids), "b c");
}

#[test]
fn added_words_that_are_not_special_are_found_as_in_hugging_face() {
    for vocabulary in [vocabularies::stories260k(), vocabularies::small_byte_level()] {
        let mut file = parsed(&vocabulary);
        let vocab = file["model"]["vocab"].as_object().unwrap().clone();
        let mut ids = Vec::new();
        for content in ["\n\n", "ab", "abc", "\u{4f60}", "Quick"] {
            let new = vocab.len() + ids.len();
            let id = vocab.get(content).map_or(new as u64, |id| id.as_u64().unwrap());
            let plain = json!({ "id": id, "content": content, "special": false,
                "normalized": content == "Quick", "single_word": false, "lstrip": false,
                "rstrip": false });
            file["added_tokens"].as_array_mut().unwrap().push(plain);
            ids.extend((id == new as u64).then_some(id));
        }
        let change = format!("added words of {}", vocabulary.name);
        let ours = as_in_hugging_face(&change, &file);
        let abc = ours.encode("xabcd").into_iter().find(|&id| ours.token(id) == Some("abc"));
        assert!(abc.is_some_and(|id| ids.contains(&u64::from(id))));
        let quick = ours.encode("Quick");
        assert_eq!((quick.len(), &*ours.decode(&quick)), (1, "Quick"));
    }
}

/// A merge over the border of two words: the text may not be cut into words any more.
#[test]
fn merges_across_words_are_seen() {
    let mut file = parsed(&vocabularies::stories260k());
    file["model"]["vocab"]["a\u{2581}"] = 512.into();
    file["model"]["merges"].as_array_mut().unwrap().insert(0, "a \u{2581}".into());
    let tokenizer = as_in_hugging_face("merge across words", &file);
    assert!(tokenizer.encode("a b").contains(&512));
}

/// Latin-1 characters are in the alphabet that stands for bytes; an added word is not written in it.
#[test]
fn an_added_word_decodes_to_itself() {
    for vocabulary in [vocabularies::stories260k(), vocabularies::small_byte_level()] {
        let mut file = parsed(&vocabulary);
        let id = file["model"]["vocab"].as_object().unwrap().len();
        file["added_tokens"].as_array_mut().unwrap().push(json!({ "id": id,
            "content": "caf\u{e9}", "normalized": false, "special": false }));
        let tokenizer = opened(&file);
        let ids = tokenizer.encode_continuation("a", "a caf\u{e9}!");
        assert!(ids.contains(&(id as u32)), "{}", vocabulary.name);
        assert_eq!(tokenizer.decode_continuation(&ids), "a caf\u{e9}!");
        assert_eq!(tokenizer.token(id as u32), Some("caf\u{e9}"));
    }
}

#[test]
fn damaged_files_are_errors_that_name_the_file() {
    let vocabulary = vocabularies::stories260k();
    let good = fs::read(&vocabulary.file).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    let mut inputs: Vec<Vec<u8>> =
        (0..good.len()).step_by(997).map(|end| good[..end].to_vec()).collect();
    inputs.extend([
        b"[]".to_vec(),
        b"{}".to_vec(),
        b"\xff\xfe".to_vec(),
        b"null".to_vec(),
        vec![b'['; 100_000],
    ]);
    for bytes in inputs {
        fs::write(&path, &bytes).unwrap();
        let error = Tokenizer::open(&path).unwrap_err();
        assert!(matches!(error, Error::Parse { .. }), "{error}");
        assert!(error.to_string().contains("tokenizer.json"), "{error}");
    }
}

#[test]
fn files_that_are_not_there_or_of_another_kind_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let missing = Tokenizer::open(folder.path()).unwrap_err();
    assert!(
        matches!(&missing, Error::Open { path, .. } if path.ends_with("tokenizer.json")),
        "{missing}"
    );
    let config = folder.path().join("tokenizer_config.json");
    fs::copy(vocabularies::stories260k().file, folder.path().join("tokenizer.json")).unwrap();
    fs::write(&config, "{").unwrap();
    let error = Tokenizer::open(folder.path()).unwrap_err();
    assert!(matches!(&error, Error::Parse { path, .. } if *path == config), "{error}");
}

#[test]
fn parts_that_do_not_fit_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let stories = vocabularies::stories260k;
    let bytes = vocabularies::small_byte_level;
    type Change = fn(&mut Value);
    let cases: [(Vocabulary, Change, &str); 17] = [
        (stories(), |f| f["model"]["type"] = "Unigram".into(), "Unigram"),
        (stories(), |f| f["model"]["dropout"] = 0.1.into(), "dropout"),
        (stories(), |f| f["model"]["end_of_word_suffix"] = "</w>".into(), "</w>"),
        (stories(), |f| f["model"]["merges"][0] = "qq zz".into(), "qq"),
        (stories(), |f| f["model"]["merges"][0] = "alone".into(), "merge 0"),
        (stories(), |f| f["model"]["vocab"]["new"] = 5.into(), "id 5"),
        (stories(), |f| f["model"]["vocab"]["new"] = 4_000_000_000_u32.into(), "4000000000"),
        (stories(), |f| f["model"]["unk_token"] = "<none>".into(), "<none>"),
        (stories(), |f| f["added_tokens"][0]["content"] = "<other>".into(), "<other>"),
        (stories(), |f| f["added_tokens"][2]["content"] = "<s>".into(), "<s>"),
        (stories(), |f| f["normalizer"] = json!({ "type": "NFKC" }), "NFKC"),
        (stories(), |f| f["decoder"] = Value::Null, "decoder"),
        (stories(), |f| f["post_processor"]["type"] = "Other".into(), "Other"),
        (stories(), |f| f["model"]["ignore_merges"] = true.into(), "ignore_merges"),
        (stories(), |f| f["model"]["vocab"] = json!({}), "empty"),
        (bytes(), |f| f["pre_tokenizer"] = Value::Null, "pre_tokenizer"),
        (
            bytes(),
            |f| {
                f["pre_tokenizer"]["pretokenizers"][0] = json!({ "type": "Split",
            "behavior": "Isolated",
            "invert": false, "pattern": { "Regex": "a(?=b)" } })
            },
            "a(?=b)",
        ),
    ];
    for (vocabulary, change, named) in cases {
        let mut file = parsed(&vocabulary);
        change(&mut file);
        let error = Tokenizer::open(write(folder.path(), &file)).unwrap_err().to_string();
        assert!(error.contains(named) && error.contains("tokenizer.json"), "{named}: {error}");
    }
}
