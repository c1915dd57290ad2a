use dromedary_tokenizer::Tokenizer;
use proptest::prelude::*;

use crate::vocabularies::{self, Vocabulary, cases, text};

/// What targets begin with: digit, space, newline, list mark, CJK, and the rest of the usual.
const TARGETS: [&str; 24] = [
    "",
    "1",
    "42 is it",
    "7. seven",
    " leading space",
    "  two",
    " ",
    "\n",
    "\n\n",
    "\n1. first",
    "\n\n1. first\n2. second",
    "\n\n- item",
    "- item\n- other",
    "* star",
    "1) one",
    "\n* star",
    "\u{4f60}\u{597d}",
    "\n\u{4f60}\u{597d}\u{3002}",
    "\u{1f42a} camel",
    "word",
    "s",
    "\t\ttabs",
    "\r\nwindows",
    "'s",
];

const SOURCES: [&str; 9] = [
    "### Dromedary",
    "a",
    "ends in space ",
    "ends in newline\n",
    "\n\n",
    "1",
    "\u{4f60}\u{597d}",
    " ",
    "### User\nWhat is 2 + 2?\n\n### Dromedary",
];

#[test]
fn source_and_target_ids_decode_to_source_and_target() {
    for vocabulary in vocabularies::all() {
        let tokenizer = vocabulary.open();
        for source in SOURCES.into_iter().chain([""]) {
            for target in TARGETS {
                let target_ids = tokenizer.encode_continuation(source, target);
                let ids = [tokenizer.encode_with_bos(source), target_ids.clone()].concat();
                let case = format!("{} {source:?} {target:?}", vocabulary.name);
                assert_eq!(tokenizer.decode(&ids), format!("{source}{target}"), "{case}");
                if !source.is_empty() {
                    assert_eq!(tokenizer.decode_continuation(&target_ids), target, "{case}");
                }
            }
        }
        let holds = |text: &String| vocabulary.holds(text);
        let text = || text().prop_filter("not in the vocabulary", holds);
        proptest!(cases(500), |(source in text(), target in text())| {
            let target_ids = tokenizer.encode_continuation(&source, &target);
            let ids = [tokenizer.encode_with_bos(&source), target_ids].concat();
            prop_assert_eq!(tokenizer.decode(&ids), source + &target);
        });
    }
}

/// The original's way: the ids of a newline and the target, without the newline's.
fn behind_a_newline(tokenizer: &Tokenizer, target: &str) -> Vec<u32> {
    let newline = tokenizer.encode("\n");
    let both = tokenizer.encode(&format!("\n{target}"));
    assert!(both.starts_with(&newline), "{target:?}");
    both[newline.len()..].to_vec()
}

#[test]
fn sentencepiece_targets_are_what_the_original_trains_on() {
    for vocabulary in vocabularies::all().into_iter().filter(Vocabulary::is_sentencepiece) {
        let tokenizer = vocabulary.open();
        for target in TARGETS {
            let ids = tokenizer.encode_continuation("### Dromedary", target);
            assert_eq!(ids, behind_a_newline(&tokenizer, target), "{} {target:?}", vocabulary.name);
        }
    }
}

/// Why byte-level vocabularies need a rule of their own: there the newlines are one token, and
/// dropping the tokens of one drops both.
#[test]
fn byte_level_targets_are_encoded_as_they_are() {
    for vocabulary in
        vocabularies::all().into_iter().filter(|vocabulary| !vocabulary.is_sentencepiece())
    {
        let tokenizer = vocabulary.open();
        let target = "\n1. first";
        assert_eq!(
            tokenizer.encode_continuation("### Dromedary", target),
            tokenizer.encode(target)
        );
        let both = tokenizer.encode("\n\n1. first");
        let newline = tokenizer.encode("\n").len();
        assert_eq!(
            (newline, tokenizer.decode_continuation(&both[newline..])),
            (1, "1. first".to_owned())
        );
    }
}
