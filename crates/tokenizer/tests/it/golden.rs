use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use flate2::read::GzDecoder;
use serde::Deserialize;

use crate::vocabularies;

#[derive(Deserialize)]
struct Golden {
    texts: Vec<(String, Vec<u32>)>,
    with_bos: Vec<(String, Vec<u32>)>,
    control: Vec<(String, Vec<u32>)>,
    large: Vec<Large>,
}

#[derive(Deserialize)]
struct Large {
    unit: String,
    times: usize,
    count: usize,
    hash: u64,
}

fn golden() -> BTreeMap<String, Golden> {
    let packed = include_bytes!("../data/golden.json.gz");
    serde_json::from_reader(GzDecoder::new(&packed[..])).unwrap()
}

fn hash(ids: &[u32]) -> u64 {
    let modulus = (1_u128 << 61) - 1;
    ids.iter().fold(0, |value, &id| (value * 31 + u128::from(id) + 1) % modulus) as u64
}

#[test]
fn ids_are_those_of_the_python_package() {
    let golden = golden();
    for vocabulary in vocabularies::all() {
        let (tokenizer, golden) = (vocabulary.open(), &golden[vocabulary.name]);
        for (text, ids) in golden.texts.iter().chain(&golden.control) {
            assert_eq!(&tokenizer.encode(text), ids, "{} {text:?}", vocabulary.name);
        }
        for (text, ids) in &golden.with_bos {
            assert_eq!(&tokenizer.encode_with_bos(text), ids, "{} {text:?}", vocabulary.name);
        }
    }
}

/// A megabyte of one thing, and as many ids: quadratic work would take hours here.
#[test]
fn a_megabyte_of_one_thing_is_encoded_and_decoded_in_time() {
    let golden = golden();
    for vocabulary in vocabularies::all() {
        let tokenizer = vocabulary.open();
        for large in &golden[vocabulary.name].large {
            let text = large.unit.repeat(large.times);
            let started = Instant::now();
            let ids = tokenizer.encode(&text);
            assert!(!tokenizer.fits(&text, 256));
            let decoded = tokenizer.decode(&ids);
            let case = format!("{} {:?}", vocabulary.name, large.unit);
            assert!(started.elapsed() < Duration::from_secs(20), "{case}");
            assert_eq!((ids.len(), hash(&ids)), (large.count, large.hash), "{case}");
            assert!(decoded == text || !vocabulary.holds(&text), "{case}");
        }
    }
}
