use proptest::prelude::*;

use crate::vocabularies::{self, Vocabulary, cases, text};

const NAMES: [&str; 10] = [
    "</s>",
    "<s>",
    "<unk>",
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<repo_name>",
    "<0x0A>",
    "<0xE4>",
    "<empty_output>",
];

fn with_names() -> impl Strategy<Value = String> {
    let part = prop_oneof![text(), prop::sample::select(NAMES.to_vec()).prop_map(str::to_owned)];
    prop::collection::vec(part, 1..5).prop_map(|parts| parts.concat())
}

#[test]
fn names_of_control_tokens_in_a_text_are_text() {
    for vocabulary in vocabularies::all() {
        let tokenizer = vocabulary.open();
        proptest!(cases(500), |(text in with_names())| {
            let ids = tokenizer.encode(&text);
            let plain = ids.iter().all(|&id| !tokenizer.is_special(id));
            prop_assert!(plain, "{} {:?} {:?}", vocabulary.name, text, ids);
            if vocabulary.holds(&text) {
                prop_assert_eq!(tokenizer.decode(&ids), text);
            }
        });
    }
}

#[test]
fn each_control_token_of_the_file_stays_out_of_reach() {
    for vocabulary in vocabularies::all() {
        let tokenizer = vocabulary.open();
        let special: Vec<u32> =
            (0..tokenizer.vocab_size() as u32).filter(|&id| tokenizer.is_special(id)).collect();
        assert!(special.len() >= 3, "{}", vocabulary.name);
        for id in special {
            let name = tokenizer.token(id).unwrap();
            for text in [name.to_owned(), format!("a{name}b"), format!(" {name}\n"), name.repeat(3)]
            {
                let ids = tokenizer.encode_with_bos(&text);
                let begin = usize::from(tokenizer.adds_bos());
                assert!(
                    ids[begin..].iter().all(|&id| !tokenizer.is_special(id)),
                    "{text:?} {ids:?}"
                );
                assert_eq!(tokenizer.decode(&ids), text);
            }
        }
    }
}

/// Conversions from sentencepiece list every way to put a piece together, control pieces included.
#[test]
fn merges_that_spell_out_a_control_or_byte_token_are_not_used() {
    let vocabulary = vocabularies::stories260k();
    let mut file: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&vocabulary.file).unwrap()).unwrap();
    let mut next = 512;
    for piece in ["<", "/", ">", "</", "s>", "x", "0", "A", "<0", "x0", "A>", "<0x0", "<0x0A"] {
        let vocab = file["model"]["vocab"].as_object_mut().unwrap();
        if !vocab.contains_key(piece) {
            vocab.insert(piece.to_owned(), next.into());
            next += 1;
        }
    }
    let spelling = ["< /", "s >", "</ s>", "< 0", "x 0", "<0 x0", "<0x0 A", "<0x0A >"]
        .map(serde_json::Value::from);
    let merges = file["model"]["merges"].as_array_mut().unwrap();
    merges.splice(0..0, spelling);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    std::fs::write(&path, file.to_string()).unwrap();
    let tokenizer = Vocabulary { name: "spelling", file: path }.open();
    for text in ["</s>", "a </s> <0x0A>", "<0x0A>"] {
        let ids = tokenizer.encode(text);
        assert!(ids.iter().all(|&id| !tokenizer.is_special(id)), "{ids:?}");
        assert_eq!(tokenizer.decode(&ids), text);
    }
    let pieces: Vec<_> = tokenizer
        .encode("</s>")
        .iter()
        .filter_map(|&id| tokenizer.token(id))
        .map(str::to_owned)
        .collect();
    assert_eq!(pieces, ["\u{2581}", "</", "s>"]);
}
