//! Equality with Hugging Face's own crate.

use proptest::prelude::*;
use tokenizers::Tokenizer as Reference;

use crate::vocabularies;

fn reference(vocabulary: &vocabularies::Vocabulary) -> Reference {
    Reference::from_file(&vocabulary.file).unwrap()
}

fn reference_ids(reference: &Reference, text: &str) -> Vec<u32> {
    reference.encode(text, false).unwrap().get_ids().to_vec()
}

/// Pieces of text that meet every branch: scripts, runs of spaces, digits, contractions, emoji, control characters.
fn text() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        4 => "[a-zA-Z]{1,8}",
        3 => "[ \t\n\r]{1,5}",
        2 => "[0-9]{1,6}",
        2 => "[.,:;!?()'\"#*/<>|_-]{1,4}",
        1 => prop::sample::select(vec![
            "'s", "'ll", " I'm", "\u{2581}", "\u{a0}", "\u{3000}", "<0x0A>", "\u{4f60}\u{597d}", "\u{1f42a}",
            "e\u{301}", "\u{e9}", "\u{fb01}", "\0", "\u{200b}", "\u{feff}", "\u{1f468}\u{200d}\u{1f469}", "\u{664}\u{665}",
            "\u{c548}\u{b155}", "  1. ", "\n\n- ", "\u{bd}", "\u{2028}",
        ]).prop_map(str::to_owned),
        1 => any::<char>().prop_map(String::from),
    ];
    prop::collection::vec(piece, 0..24).prop_map(|pieces| pieces.concat())
}

#[test]
fn ordinary_text_has_the_ids_that_hugging_face_gives() {
    for vocabulary in vocabularies::all() {
        let (ours, theirs) = (vocabulary.open(), reference(&vocabulary));
        let config =
            ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() };
        proptest!(config, |(text in text())| {
            let ids = ours.encode(&text);
            prop_assert_eq!(&ids, &reference_ids(&theirs, &text), "{} {:?}", vocabulary.name, text);
            prop_assert_eq!(ours.decode(&ids), theirs.decode(&ids, true).unwrap());
        });
    }
}
