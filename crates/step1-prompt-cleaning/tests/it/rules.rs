use std::collections::BTreeSet;
use std::sync::Arc;

use dromedary_prompt_cleaning::sources::Stratum;
use dromedary_prompt_cleaning::{
    DropReason, Edit, Fingerprint, KeyedOrder, LengthRule, Lists, NliRule, Rules, TokenCounter,
};
use proptest::prelude::*;

use crate::support::{real_sample, small_tokenizer};

fn is_nli_task(rules: Rules, text: &str) -> bool {
    NliRule::new(rules, Lists::built_in()).keyword(text).is_some()
}

#[test]
fn nli_keywords_stand_on_word_borders() {
    for text in ["Premise: x", "the premise is", "(hypothesis)", "Say: it is not possible to tell."]
    {
        assert!(is_nli_task(Rules::Corrected, text), "{text}");
        assert!(is_nli_task(Rules::Dromedary, text), "{text}");
    }
    for text in ["on the premises", "hypothesised", "it is not possible to telly", "\u{e9}premise"]
    {
        assert!(!is_nli_task(Rules::Corrected, text), "{text}");
        assert!(is_nli_task(Rules::Dromedary, text), "{text}");
    }
    assert!(!is_nli_task(Rules::Dromedary, "PREMISE, It is not possible to tell"));
}

#[test]
fn the_first_stratum_in_the_id_counts() {
    assert_eq!(Stratum::of_id("flan.1"), Some(Stratum::Flan));
    assert_eq!(Stratum::of_id("cot.t0.niv"), Some(Stratum::Niv));
    assert_eq!(Stratum::of_id("xt0x"), Some(Stratum::T0));
    assert_eq!(Stratum::of_id("FLAN.1"), None);
}

#[test]
fn lengths_are_checked_at_both_ends() {
    let counter = Arc::new(TokenCounter::open(Some(&small_tokenizer())).unwrap());
    let tokenizer = dromedary_tokenizer::Tokenizer::open(small_tokenizer()).unwrap();
    let text = "Once upon a time, there was a little girl.";
    let with_suffix = tokenizer.len_with_bos(&format!("{text}\n\n"));
    let check =
        |min, max, suffix| LengthRule { counter: counter.clone(), min, max, suffix }.check(text);
    assert_eq!(check(0, with_suffix, "\n\n"), None);
    assert_eq!(check(0, with_suffix - 1, "\n\n"), Some(DropReason::TooLong));
    let alone = tokenizer.len_with_bos(text);
    assert!(alone < with_suffix);
    assert_eq!(check(alone, alone, ""), None);
    assert_eq!(check(alone + 1, alone + 1, ""), Some(DropReason::TooShort));
}

#[test]
fn names_of_reasons_differ() {
    let drops: BTreeSet<&str> = DropReason::ALL.into_iter().map(DropReason::name).collect();
    assert_eq!(drops.len(), DropReason::ALL.len());
    let edits: BTreeSet<&str> = Edit::ALL.into_iter().map(Edit::name).collect();
    assert_eq!(edits.len(), Edit::ALL.len());
}

#[test]
fn the_estimate_is_near_the_count_of_real_prompts() {
    let counter = TokenCounter::open(None).unwrap();
    assert!(counter.is_estimate());
    // Counted with LLaMA's vocabulary, BOS included.
    for (text, tokens) in [
        ("Hello world!", 4_usize),
        ("Why do leaves turn red and yellow in autumn, and why do some trees stay green?", 20),
        ("Give me three synonyms of the word 'brave'.", 14),
    ] {
        assert!(counter.fits(text, tokens * 5 / 4), "{text}");
        assert!(!counter.fits(text, tokens * 3 / 4), "{text}");
    }
}

#[test]
fn most_decisions_of_the_estimate_are_those_of_a_real_vocabulary() {
    let Some(path) = real_sample("openorca/openorca_shaped_284.jsonl") else { return };
    let text = std::fs::read_to_string(path).unwrap();
    let lengths: Vec<bool> = text
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
        .map(|row| TokenCounter::Estimate.fits(row["question"].as_str().unwrap(), 256))
        .collect();
    // 220 of them fit by LLaMA's own count.
    let fit = lengths.iter().filter(|&&fits| fits).count();
    assert!((210..=230).contains(&fit), "{fit} of {}", lengths.len());
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

    #[test]
    fn what_we_take_for_nli_dromedary_takes_too(text in "(pre|premise|hypothesis|it is not possible to tell|s| |\\PC){0,6}") {
        if is_nli_task(Rules::Corrected, &text) {
            prop_assert!(is_nli_task(Rules::Dromedary, &text));
        }
    }

    #[test]
    fn equal_bytes_are_equal_prompts_under_both_rules(one in "[aA ]{0,3}", other in "[aA ]{0,3}") {
        let same = |rules| Fingerprint::of(rules, &one) == Fingerprint::of(rules, &other);
        prop_assert_eq!(same(Rules::Dromedary), one == other);
        prop_assert!(same(Rules::Corrected) || one != other);
    }

    #[test]
    fn the_order_is_a_function_of_seed_and_prompt(seed in any::<u64>(), text in "\\PC{0,20}") {
        let prompt = Fingerprint::of(Rules::Corrected, &text);
        let (one, same) = (KeyedOrder::new(seed), KeyedOrder::new(seed));
        prop_assert_eq!(one.output_key(&prompt), same.output_key(&prompt));
        prop_assert_eq!(one.sample_key(&prompt), same.sample_key(&prompt));
        prop_assert_ne!(one.output_key(&prompt), one.sample_key(&prompt));
        prop_assert_ne!(one.output_key(&prompt), KeyedOrder::new(seed ^ 1).output_key(&prompt));
    }
}
