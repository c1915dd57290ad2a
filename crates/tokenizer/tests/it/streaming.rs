use dromedary_tokenizer::{DecodeStream, Tokenizer};
use proptest::prelude::*;

use crate::vocabularies::{self, cases, text};

/// The pieces that a stream gives for the ids, the last by `finish`.
fn pieces(mut stream: DecodeStream<'_>, ids: &[u32]) -> Vec<String> {
    let mut pieces: Vec<String> = ids.iter().filter_map(|&id| stream.push(id)).collect();
    pieces.extend(stream.finish());
    pieces
}

#[test]
fn joined_pieces_are_the_decoded_text_for_any_ids() {
    for vocabulary in vocabularies::all() {
        let tokenizer = vocabulary.open();
        let ids = 0..tokenizer.vocab_size() as u32 + 3;
        // The first ids: control tokens and bytes, so that characters begin, break off and go on.
        let ids = prop_oneof![ids, 0..300_u32];
        proptest!(cases(1000), |(ids in prop::collection::vec(ids, 0..40))| {
            let streamed = pieces(DecodeStream::new(&tokenizer), &ids).concat();
            prop_assert_eq!(streamed, tokenizer.decode(&ids));
            let continued = pieces(DecodeStream::continuation(&tokenizer), &ids).concat();
            prop_assert_eq!(continued, tokenizer.decode_continuation(&ids));
        });
    }
}

#[test]
fn no_character_is_split_and_none_is_held_back() {
    for vocabulary in vocabularies::all() {
        let tokenizer = vocabulary.open();
        let held = |t: &String| vocabulary.holds(t) && !t.contains('\u{fffd}');
        proptest!(cases(500), |(text in text().prop_filter("not in the vocabulary", held))| {
            let mut stream = DecodeStream::new(&tokenizer);
            let mut given = String::new();
            let ids = tokenizer.encode_with_bos(&text);
            for (count, &id) in ids.iter().enumerate() {
                if let Some(piece) = stream.push(id) {
                    prop_assert!(!piece.is_empty() && !piece.contains('\u{fffd}'), "{:?}", piece);
                    given.push_str(&piece);
                }
                // All that is complete has been given: what a full decoding has more is the cut-off
                // character.
                let decoded = tokenizer.decode(&ids[..=count]);
                prop_assert_eq!(&given, decoded.trim_end_matches('\u{fffd}'));
            }
            prop_assert_eq!(stream.finish(), None);
            prop_assert_eq!(given, text);
        });
    }
}

#[test]
fn a_character_of_byte_tokens_comes_when_its_last_byte_does() {
    let tokenizer: Tokenizer = vocabularies::stories260k().open();
    let ids = tokenizer.encode_continuation("x", "\u{1f42a}!");
    let mut stream = DecodeStream::new(&tokenizer);
    let given: Vec<Option<String>> = ids.iter().map(|&id| stream.push(id)).collect();
    let camel = Some("\u{1f42a}".to_owned());
    assert_eq!(given, [None, None, None, camel, Some("!".to_owned())]);
    assert_eq!(stream.finish(), None);
}

#[test]
fn a_character_that_breaks_off_becomes_one_replacement_character() {
    let tokenizer = vocabularies::stories260k().open();
    let ids = tokenizer.encode_continuation("x", "\u{1f42a}");
    let broken = [&ids[..3], &tokenizer.encode_continuation("x", "a")].concat();
    assert_eq!(tokenizer.decode(&broken), "\u{fffd}a");
    assert_eq!(pieces(DecodeStream::new(&tokenizer), &broken), ["\u{fffd}a"]);
    assert_eq!(pieces(DecodeStream::new(&tokenizer), &ids[..3]), ["\u{fffd}"]);
}

#[test]
fn only_a_text_of_its_own_loses_its_first_space() {
    let tokenizer = vocabularies::stories260k().open();
    let ids = tokenizer.encode(" once  more");
    assert_eq!(tokenizer.decode(&ids), " once  more");
    assert_eq!(tokenizer.decode_continuation(&ids), "  once  more");
    let words = tokenizer.encode("once");
    assert_eq!(
        (tokenizer.decode(&words), tokenizer.decode_continuation(&words)),
        ("once".into(), " once".into())
    );
    let byte_level = vocabularies::small_byte_level().open();
    assert_eq!(byte_level.decode(&byte_level.encode(" once")), " once");
}
