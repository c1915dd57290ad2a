use dromedary_prompt_cleaning::text::{is_space, normalize, strip};
use dromedary_prompt_cleaning::{Cleaned, Cleaner, Edit, Lists, Rules, Source};
use proptest::prelude::*;

const GOLDENS: &str = include_str!("../data/cleaning_goldens.json");

fn clean(rules: Rules, source: Source, text: &str) -> Cleaned<'_> {
    Cleaner::new(rules, Lists::built_in()).clean(source, text)
}

fn goldens() -> serde_json::Value {
    serde_json::from_str(GOLDENS).unwrap()
}

#[test]
fn white_space_is_pythons() {
    let spaces: Vec<u32> = ('\0'..=char::MAX).filter(|&c| is_space(c)).map(|c| c as u32).collect();
    let expected: Vec<u32> = serde_json::from_value(goldens()["spaces"].clone()).unwrap();
    assert_eq!(spaces, expected);
}

#[test]
fn dromedarys_rules_clean_as_python_does() {
    let pairs: Vec<(String, String)> =
        serde_json::from_value(goldens()["cleaned"].clone()).unwrap();
    assert!(pairs.len() > 800, "only {} goldens", pairs.len());
    for (text, expected) in pairs {
        for source in Source::ALL {
            let cleaned = clean(Rules::Dromedary, source, &text);
            assert_eq!(cleaned.text, expected, "{text:?}");
            assert_eq!(cleaned.edits.is_empty(), expected == text, "{text:?}");
        }
    }
}

#[test]
fn every_edit_has_a_golden() {
    let pairs: Vec<(String, String)> =
        serde_json::from_value(goldens()["cleaned"].clone()).unwrap();
    for edit in Edit::ALL {
        assert!(
            pairs.iter().any(|(text, _)| {
                clean(Rules::Dromedary, Source::Dolly, text).edits.contains(&edit)
            }),
            "{edit:?}"
        );
    }
}

fn corrected(text: &str) -> (&str, Vec<Edit>) {
    let cleaned = clean(Rules::Corrected, Source::ShareGpt, text);
    (cleaned.text, cleaned.edits)
}

#[test]
fn ordinary_text_that_looks_like_chrome_survives() {
    for text in [
        "24/7 support: what is it?",
        "Simplify 6/8",
        "What does 1 / 1 mean on a print?",
        "Simplify:\n6 / 8",
        "9 / 4\n\nis an improper fraction, why?",
        "0 / 3\n\nof what?",
        "1/2\n\ncup of sugar, how many grams?",
        "How do I translate \u{c9c0}\u{ae08} \u{bc88}\u{c5ed}\u{d558}\u{ae30}?",
        "Where is the button Share Prompt",
        "Say: Translate now",
        "My Language: English",
        "Language: Klingon",
        "First line\n \n Language: none of the list",
        "Please explain:\n\n1 / 1\n\nas a page mark.",
    ] {
        assert_eq!(corrected(text), (text, vec![]));
    }
}

#[test]
fn chrome_as_pages_print_it_goes() {
    let text = "What is a loop?";
    for (page, edit) in [
        (format!("1 / 1\n\n{text}"), Edit::LeadingCounter),
        (format!("2 / 13\n \t\n{text}"), Edit::LeadingCounter),
        (format!("{text}\r\n\r\n3 / 3"), Edit::TrailingCounter),
        (format!("Jane Doe\n\n1 / 1\n\n{text}"), Edit::PageMark),
        (format!("{text}\n\u{c9c0}\u{ae08} \u{bc88}\u{c5ed}\u{d558}\u{ae30}\nrest"), Edit::Footer),
        (format!("{text}\n \n Language: Thai and more"), Edit::LanguageBlock),
        (format!("{text}\nShare Prompt"), Edit::Button),
        (format!("{text}\n\nTranslate now"), Edit::Button),
        (
            format!("~The following is a conversation with Bing, not ChatGPT.~\n{text}"),
            Edit::Banner,
        ),
        (format!("\u{1c}{text}\u{3000}"), Edit::Whitespace),
    ] {
        assert_eq!(corrected(&page), (text, vec![edit]), "{page:?}");
    }
    for language in &Lists::built_in().languages {
        let page = format!("{text}\nLanguage: {language}");
        assert_eq!(corrected(&page), (text, vec![Edit::LanguageName]), "{page:?}");
    }
}

#[test]
fn chrome_goes_in_any_order_and_each_rule_is_named_once() {
    let page =
        "1 / 1\n\nWhat is a loop?\nShare Prompt\nTranslate now\nLanguage: Thai\nShare Prompt";
    let (text, edits) = corrected(page);
    assert_eq!(text, "What is a loop?");
    let expected = [Edit::LeadingCounter, Edit::Button, Edit::LanguageName];
    assert_eq!(edits, expected);
}

#[test]
fn only_chrome_leaves_nothing() {
    for page in ["Share Prompt", "1 / 1", "Language: Thai\nShare Prompt", " \n"] {
        assert_eq!(corrected(page).0, "", "{page:?}");
    }
}

#[test]
fn other_sources_are_stripped_only() {
    let page = " 1 / 1\n\nWhat is a loop?\n\nShare Prompt\n";
    for source in [Source::Dolly, Source::Oasst1, Source::OpenOrca] {
        let cleaned = clean(Rules::Corrected, source, page);
        assert_eq!((cleaned.text, cleaned.edits), (page.trim(), vec![Edit::Whitespace]));
    }
}

/// Texts that are mostly made of what the rules look for.
fn pages() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        4 => prop::sample::select(vec![
            "1 / 1", "2 / 3", "7/8", "\n", "\n\n", "\n \n ", " ", "\u{1c}", "\r\n", "Share Prompt",
            "Translate now", "Language: ", "Thai", "Language: Chinese (Simplified)", "text", "Jane",
            "\u{c9c0}\u{ae08} \u{bc88}\u{c5ed}\u{d558}\u{ae30}",
            "~The following is a conversation with Bing, not ChatGPT.~",
        ])
        .prop_map(str::to_owned),
        1 => "\\PC{0,6}",
    ];
    prop::collection::vec(piece, 0..10).prop_map(|pieces| pieces.concat())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..Default::default() })]

    #[test]
    fn the_corrected_rules_are_idempotent(page in pages()) {
        for source in Source::ALL {
            let once = clean(Rules::Corrected, source, &page);
            let twice = clean(Rules::Corrected, source, once.text);
            prop_assert_eq!(twice.text, once.text);
            prop_assert!(twice.edits.is_empty());
        }
    }

    #[test]
    fn edits_are_named_if_and_only_if_the_text_changes(page in pages()) {
        for rules in [Rules::Corrected, Rules::Dromedary] {
            let cleaned = clean(rules, Source::ShareGpt, &page);
            prop_assert_eq!(cleaned.edits.is_empty(), cleaned.text == page);
            prop_assert_eq!(strip(cleaned.text), cleaned.text);
            prop_assert!(page.contains(cleaned.text));
        }
    }

    #[test]
    fn chrome_for_us_is_chrome_for_dromedary(text in "[a-z]{1,9}( [a-z]{1,9}){0,3}", page in pages()) {
        // A text without digits, slashes and marks is untouched by both.
        prop_assert_eq!(clean(Rules::Dromedary, Source::ShareGpt, &text).text, text.as_str());
        prop_assert_eq!(clean(Rules::Corrected, Source::ShareGpt, &text).text, text.as_str());
        // What we call chrome for other sources is white space alone.
        prop_assert_eq!(clean(Rules::Corrected, Source::Dolly, &page).text, strip(&page));
    }

    #[test]
    fn normalizing_ignores_case_and_white_space_only(words in prop::collection::vec("[a-zA-Z0-9]{1,5}", 1..6)) {
        let one = normalize(&words.join(" "));
        let other = normalize(&format!("\n{}\u{1f}", words.join("\t \u{a0}").to_uppercase()));
        prop_assert_eq!(&one, &other);
        prop_assert_ne!(one, normalize(&words.concat()) + "x");
    }
}
