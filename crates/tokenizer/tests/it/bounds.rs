use proptest::prelude::*;

use crate::vocabularies::{self, cases, text};

#[test]
fn fits_says_what_the_length_says() {
    for vocabulary in vocabularies::all() {
        let tokenizer = vocabulary.open();
        proptest!(cases(500), |(text in text())| {
            let length = tokenizer.len_with_bos(&text);
            for limit in [0, 1, length.saturating_sub(1), length, length + 1, usize::MAX] {
                let fits = tokenizer.fits(&text, limit);
                prop_assert_eq!(fits, length <= limit, "{} {:?} {}", vocabulary.name, text, limit);
            }
        });
    }
}

#[test]
fn the_shortest_encodings_keep_the_bound() {
    for vocabulary in vocabularies::all() {
        let tokenizer = vocabulary.open();
        let longest = (0..tokenizer.vocab_size() as u32)
            .filter(|&id| !tokenizer.is_special(id))
            .max_by_key(|&id| tokenizer.decode_continuation(&[id]).chars().count())
            .unwrap();
        let text = tokenizer.decode_continuation(&[longest]).repeat(20);
        let length = tokenizer.len_with_bos(&text);
        assert!(
            tokenizer.fits(&text, length) && !tokenizer.fits(&text, length - 1),
            "{}",
            vocabulary.name
        );
    }
}
