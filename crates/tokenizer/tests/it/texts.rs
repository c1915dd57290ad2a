use std::collections::BTreeMap;

use proptest::prelude::*;

use crate::vocabularies::{self, cases, text};

#[test]
fn lengths_and_bos_go_with_the_ids() {
    for vocabulary in vocabularies::all() {
        let tokenizer = vocabulary.open();
        proptest!(cases(300), |(text in text())| {
            let with_bos = tokenizer.encode_with_bos(&text);
            let begin = usize::from(tokenizer.adds_bos());
            prop_assert_eq!(&with_bos[begin..], &tokenizer.encode(&text)[..]);
            prop_assert!(begin == 0 || with_bos.first().copied() == tokenizer.bos_id());
            prop_assert_eq!(tokenizer.len_with_bos(&text), with_bos.len());
        });
    }
}

#[test]
fn a_text_comes_back_from_its_ids() {
    for vocabulary in vocabularies::all() {
        let tokenizer = vocabulary.open();
        let text = || text().prop_filter("not in the vocabulary", |text| vocabulary.holds(text));
        proptest!(cases(300), |(text in text())| {
            prop_assert_eq!(tokenizer.decode(&tokenizer.encode_with_bos(&text)), text);
        });
    }
}

#[test]
fn every_token_is_what_the_file_says() {
    for vocabulary in vocabularies::all() {
        let tokenizer = vocabulary.open();
        let file: serde_json::Value =
            serde_json::from_slice(&std::fs::read(&vocabulary.file).unwrap()).unwrap();
        let model = file["model"]["vocab"].as_object().unwrap();
        let model = model.iter().map(|(piece, id)| (id.as_u64().unwrap() as u32, piece.as_str()));
        let added = file["added_tokens"].as_array().unwrap().iter();
        let added = added.map(|token| {
            (token["id"].as_u64().unwrap() as u32, token["content"].as_str().unwrap())
        });
        let pieces: BTreeMap<u32, &str> = model.chain(added).collect();
        assert_eq!(tokenizer.vocab_size(), pieces.len(), "{}", vocabulary.name);
        for id in 0..tokenizer.vocab_size() as u32 + 2 {
            assert_eq!(tokenizer.token(id), pieces.get(&id).copied());
        }
    }
}

#[test]
fn threads_share_a_tokenizer() {
    let tokenizer = vocabularies::small_byte_level().open();
    let text = "Once upon a time, there was a cat.";
    let ids = tokenizer.encode(text);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| assert_eq!(tokenizer.encode(text), ids));
        }
    });
}
