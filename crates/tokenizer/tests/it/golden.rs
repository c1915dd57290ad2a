use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use flate2::read::GzDecoder;
use serde::Deserialize;

use crate::vocabularies;

/// Texts, and the ids that the Python package gives for them.
type Texts = Vec<(String, Vec<u32>)>;

#[derive(Deserialize)]
struct Goldens {
    vocabularies: BTreeMap<String, Golden>,
    changed: BTreeMap<String, Texts>,
}

#[derive(Deserialize)]
struct Golden {
    texts: Texts,
    with_bos: Texts,
    control: Texts,
    large: Vec<Large>,
}

#[derive(Deserialize)]
struct Large {
    unit: String,
    times: usize,
    count: usize,
    hash: u64,
}

fn goldens() -> Goldens {
    let packed = include_bytes!("../data/golden.json.gz");
    serde_json::from_reader(GzDecoder::new(&packed[..])).unwrap()
}

/// Ids of a file with the change that is named, for [`crate::files`].
pub(crate) fn of_changed(change: &str) -> Texts {
    goldens().changed.remove(change).unwrap()
}

pub(crate) fn hash(ids: &[u32]) -> u64 {
    let modulus = (1_u128 << 61) - 1;
    ids.iter().fold(0, |value, &id| (value * 31 + u128::from(id) + 1) % modulus) as u64
}

#[test]
fn ids_are_those_of_the_python_package() {
    let golden = goldens().vocabularies;
    for vocabulary in vocabularies::all() {
        let (tokenizer, golden) = (vocabulary.open(), &golden[vocabulary.name]);
        for (text, ids) in golden.texts.iter().chain(&golden.control) {
            assert_eq!(&tokenizer.encode(text), ids, "{} {text:?}", vocabulary.name);
        }
        for (text, ids) in &golden.with_bos {
            assert_eq!(&tokenizer.encode_with_bos(text), ids, "{} {text:?}", vocabulary.name);
            assert_eq!(tokenizer.len_with_bos(text), ids.len(), "{} {text:?}", vocabulary.name);
        }
    }
}

/// A megabyte of one thing, and as many ids: quadratic work would take hours here.
#[test]
fn a_megabyte_of_one_thing_is_encoded_and_decoded_in_time() {
    let golden = goldens().vocabularies;
    for vocabulary in vocabularies::all() {
        let tokenizer = vocabulary.open();
        for large in &golden[vocabulary.name].large {
            let text = large.unit.repeat(large.times);
            let started = Instant::now();
            let ids = tokenizer.encode(&text);
            assert!(!tokenizer.fits(&text, 256));
            let length = large.count + usize::from(tokenizer.adds_bos());
            assert_eq!(tokenizer.len_with_bos(&text), length);
            let decoded = tokenizer.decode(&ids);
            let case = format!("{} {:?}", vocabulary.name, large.unit);
            assert!(started.elapsed() < Duration::from_secs(20), "{case}");
            assert_eq!((ids.len(), hash(&ids)), (large.count, large.hash), "{case}");
            assert!(decoded == text || !vocabulary.holds(&text), "{case}");
        }
    }
}

/// The crate's own engine would stop at such a run, and leave what follows as one part.
#[test]
fn text_behind_a_long_run_of_spaces_is_encoded_as_ever() {
    for vocabulary in vocabularies::all().into_iter().filter(|v| !v.is_sentencepiece()) {
        let tokenizer = vocabulary.open();
        let behind = tokenizer.encode(" a cat, once upon a time in 1999\n\n\n- item");
        let text = " ".repeat(1_500_000) + " a cat, once upon a time in 1999\n\n\n- item";
        assert!(tokenizer.encode(&text).ends_with(&behind), "{}", vocabulary.name);
    }
}
