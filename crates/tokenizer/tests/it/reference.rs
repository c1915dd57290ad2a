use proptest::prelude::*;

use crate::vocabularies::{self, cases, reference_ids, text};

#[test]
fn ordinary_text_has_the_ids_that_hugging_face_gives() {
    for vocabulary in vocabularies::all() {
        let (ours, theirs) = (vocabulary.open(), vocabulary.reference());
        proptest!(cases(1000), |(text in text())| {
            let ids = ours.encode(&text);
            let theirs_ids = reference_ids(&theirs, &text, false);
            prop_assert_eq!(&ids, &theirs_ids, "{} {:?}", vocabulary.name, text);
            prop_assert_eq!(ours.decode(&ids), theirs.decode(&ids, true).unwrap());
            let with_bos = ours.encode_with_bos(&text);
            prop_assert_eq!(&with_bos, &reference_ids(&theirs, &text, true));
            prop_assert_eq!(ours.len_with_bos(&text), with_bos.len());
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
fn every_token_is_what_hugging_face_says() {
    for vocabulary in vocabularies::all() {
        let (ours, theirs) = (vocabulary.open(), vocabulary.reference());
        assert_eq!(ours.vocab_size(), theirs.get_vocab_size(true), "{}", vocabulary.name);
        for id in 0..ours.vocab_size() as u32 + 2 {
            assert_eq!(ours.token(id).map(str::to_owned), theirs.id_to_token(id));
        }
    }
}
