use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use dromedary_tokenizer::Tokenizer;
use flate2::read::GzDecoder;
use proptest::prelude::*;
use serde::Deserialize;

use crate::vocabularies::{self, Vocabulary, cases, text};

/// What Hugging Face's Python package counts.
#[derive(Deserialize)]
struct Golden {
    hard: Vec<String>,
    /// Units of a text, and how many it has.
    large: Vec<(String, usize)>,
    lengths: BTreeMap<String, Lengths>,
}

#[derive(Deserialize)]
struct Lengths {
    hard: Vec<usize>,
    real: Vec<usize>,
    large: Vec<usize>,
}

fn golden() -> Golden {
    let packed = include_bytes!("../data/lengths.json.gz");
    serde_json::from_reader(GzDecoder::new(&packed[..])).unwrap()
}

#[track_caller]
fn check(vocabulary: &Vocabulary, tokenizer: &Tokenizer, text: &str, length: usize) {
    let shown = || format!("{} {:?}", vocabulary.name, &text[..text.len().min(200)]);
    assert_eq!(tokenizer.len_with_bos(text), length, "{}", shown());
    for limit in [length.saturating_sub(1), length, 256] {
        assert_eq!(tokenizer.fits(text, limit), length <= limit, "{} {limit}", shown());
    }
}

#[test]
fn lengths_are_those_of_hugging_face() {
    let (golden, real) = (golden(), real_texts());
    for vocabulary in vocabularies::all() {
        let (tokenizer, lengths) = (vocabulary.open(), &golden.lengths[vocabulary.name]);
        assert_eq!(lengths.hard.len(), 4000);
        for (text, &length) in golden.hard.iter().zip(&lengths.hard) {
            check(&vocabulary, &tokenizer, text, length);
        }
        for ((unit, times), &length) in golden.large.iter().zip(&lengths.large) {
            let counted = tokenizer.len_with_bos(&unit.repeat(*times));
            assert_eq!(counted, length, "{} {unit:?}", vocabulary.name);
        }
        if !real.is_empty() {
            assert_eq!(real.len(), lengths.real.len(), "the samples are others");
        }
        for (text, &length) in real.iter().zip(&lengths.real) {
            check(&vocabulary, &tokenizer, text, length);
        }
    }
}

/// Texts that are cut in many ways: scripts without spaces, marks that combine, emoji of several
/// characters, runs of one thing.
fn hard_text() -> impl Strategy<Value = String> {
    let letters = prop_oneof![
        4 => "[a-zA-Z]{1,12}",
        2 => "[\u{4e00}-\u{4eff}\u{3042}-\u{3090}\u{ac00}-\u{ac80}]{1,12}",
        2 => "[\u{430}-\u{44f}\u{e0}-\u{ff}\u{3b1}-\u{3c9}]{1,40}",
        2 => "[a-z][\u{300}-\u{30f}]{1,4}",
        2 => "[\u{1f600}-\u{1f64f}\u{1f3fb}-\u{1f3ff}\u{200d}\u{fe0f}]{1,6}",
        2 => "[ \u{2581}\t\n\u{a0}\u{3000}]{1,9}",
        1 => (prop::sample::select(vec![" ", "a", "1", "=", "\n", "\u{2581}", "\u{4f60}", "\u{1f42a}"]), 1..300_usize)
            .prop_map(|(unit, times)| unit.repeat(times)),
        1 => text(),
    ];
    let joined = prop::sample::select(vec!["", " ", "  ", "\n", ", "]);
    prop::collection::vec((letters, joined), 0..60)
        .prop_map(|parts| parts.into_iter().map(|(part, joint)| part + joint).collect())
}

#[test]
fn lengths_of_generated_texts_are_those_of_the_ids() {
    for vocabulary in vocabularies::all() {
        let tokenizer = vocabulary.open();
        proptest!(cases(400), |(text in hard_text())| {
            let length = tokenizer.encode_with_bos(&text).len();
            prop_assert_eq!(tokenizer.len_with_bos(&text), length, "{} {:?}", vocabulary.name, text);
            for limit in [length.saturating_sub(1), length, length / 2, length * 2] {
                prop_assert_eq!(tokenizer.fits(&text, limit), length <= limit);
            }
        });
    }
}

/// All files of real samples in the folder that DROMEDARY_TEST_DATA names.
fn real_samples() -> Vec<PathBuf> {
    let Some(folder) = std::env::var_os("DROMEDARY_TEST_DATA").map(PathBuf::from) else {
        let required = std::env::var_os("DROMEDARY_REQUIRE_TEST_DATA").is_some_and(|v| v == "1");
        assert!(!required, "DROMEDARY_TEST_DATA names no folder");
        eprintln!("skipped: DROMEDARY_TEST_DATA names no folder");
        return Vec::new();
    };
    let mut files = Vec::new();
    for source in ["dolly", "hhh", "oasst1", "openorca", "self_instruct", "sharegpt", "truthfulqa"]
    {
        collect(&folder.join(source), &mut files);
    }
    assert!(files.len() >= 8, "{files:?}");
    files
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { collect(&path, files) } else { files.push(path) }
    }
}

/// Every text anywhere in a JSON value.
fn texts_in(value: &serde_json::Value, texts: &mut Vec<String>) {
    match value {
        serde_json::Value::String(text) => texts.push(text.clone()),
        serde_json::Value::Array(values) => values.iter().for_each(|v| texts_in(v, texts)),
        serde_json::Value::Object(fields) => fields.values().for_each(|v| texts_in(v, texts)),
        _ => {}
    }
}

fn real_texts() -> Vec<String> {
    let mut texts = Vec::new();
    for file in real_samples() {
        let text = std::fs::read_to_string(&file).unwrap();
        let values = serde_json::Deserializer::from_str(&text).into_iter::<serde_json::Value>();
        values.for_each(|value| texts_in(&value.unwrap(), &mut texts));
    }
    texts.sort();
    texts.dedup();
    texts
}

#[test]
fn lengths_of_real_texts_are_those_of_the_ids_at_a_tenth_of_the_cost() {
    let texts = real_texts();
    let bytes: usize = texts.iter().map(String::len).sum();
    for vocabulary in vocabularies::all() {
        let (tokenizer, reference) = (vocabulary.open(), vocabulary.open());
        for text in &texts {
            let length = reference.encode_with_bos(text).len();
            assert_eq!(tokenizer.len_with_bos(text), length, "{} {text:?}", vocabulary.name);
            assert_eq!(tokenizer.fits(text, 256), length <= 256, "{} {text:?}", vocabulary.name);
        }
        if !texts.is_empty() {
            let (counted, encoded) = (tokenizer.merged_bytes(), reference.merged_bytes());
            assert!(encoded >= bytes as u64);
            assert!(counted < encoded / 5, "{}: {counted} of {encoded}", vocabulary.name);
        }
    }
}

/// What is done with a text.
type Work = fn(&Tokenizer, &str);

/// Twice the text is at most twice the work, and whether it fits is no more work at all.
#[test]
fn cost_grows_in_proportion_to_the_text() {
    for vocabulary in vocabularies::all() {
        for unit in ["a", " ", "\0", "</s>", "\u{4f60}", "word ", "\u{1f42a}\u{300}"] {
            let merged = |times: usize, work: Work| {
                let tokenizer = vocabulary.open();
                work(&tokenizer, &unit.repeat(times));
                tokenizer.merged_bytes()
            };
            let works: [Work; 3] = [
                |tokenizer, text| assert!(!tokenizer.encode(text).is_empty()),
                |tokenizer, text| assert!(tokenizer.len_with_bos(text) > 0),
                |tokenizer, text| assert!(!tokenizer.fits(text, 256)),
            ];
            let [encoded, counted, fitted] = works.map(|work| {
                let (once, twice) = (merged(100_000, work), merged(200_000, work));
                let case = format!("{} {unit:?}: {once}, {twice}", vocabulary.name);
                assert!(twice as f64 <= 2.6 * once as f64, "{case}");
                (once, twice, case)
            });
            assert!(encoded.1 >= 200_000, "{}", encoded.2);
            assert!(counted.1 <= encoded.1 && fitted.1 <= counted.1, "{}", counted.2);
        }
    }
}

#[test]
fn bounds_decide_without_a_merge() {
    for vocabulary in vocabularies::all() {
        let tokenizer = vocabulary.open();
        assert!(tokenizer.fits(&"a b ".repeat(60), 256));
        // Of bytes that a vocabulary lacks, as these two do, any number may be in no token.
        if vocabulary.is_sentencepiece() {
            assert!(!tokenizer.fits(&"word ".repeat(100_000), 256));
        }
        assert_eq!(tokenizer.merged_bytes(), 0, "{}", vocabulary.name);
    }
}

#[test]
fn counting_ends_where_the_limit_is_passed() {
    for vocabulary in vocabularies::all().into_iter().filter(Vocabulary::is_sentencepiece) {
        let tokenizer = vocabulary.open();
        let ids = 0..tokenizer.vocab_size() as u32;
        let longest = ids.filter_map(|id| tokenizer.token(id)).map(|token| token.chars().count());
        // As long as it can be without a bound that decides, and each word another one.
        let limit = 1000;
        let words: String = (0..limit * 9).map(|number| format!(" w{number}")).collect();
        let text = &words[..(limit - 1) * longest.max().unwrap() - 10];
        assert!(!tokenizer.fits(text, limit));
        let merged = tokenizer.merged_bytes() as usize;
        // A word's space becomes a marker of three bytes; a token has at least a byte.
        assert!((1..limit * 6).contains(&merged), "{}: {merged}", vocabulary.name);
        assert!(merged * 2 < text.len(), "{}: {merged} of {}", vocabulary.name, text.len());
    }
}
