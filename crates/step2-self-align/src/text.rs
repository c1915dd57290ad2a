//! Words, n-grams and the original's idea of white space.

use std::collections::BTreeSet;

/// Words in lower case; a CJK character is a word of its own, since no space parts them.
pub(crate) fn words(text: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word = String::new();
    for character in text.chars() {
        if character.is_alphanumeric() && !is_cjk(character) {
            word.extend(character.to_lowercase());
            continue;
        }
        if !word.is_empty() {
            words.push(std::mem::take(&mut word));
        }
        if is_cjk(character) {
            words.push(character.to_string());
        }
    }
    if !word.is_empty() {
        words.push(word);
    }
    words
}

/// Kana, CJK ideographs with their extensions, compatibility forms. Korean has spaces.
pub(crate) fn is_cjk(character: char) -> bool {
    matches!(character,
        '\u{3040}'..='\u{30ff}' | '\u{3400}'..='\u{4dbf}' | '\u{4e00}'..='\u{9fff}'
        | '\u{f900}'..='\u{faff}' | '\u{20000}'..='\u{323af}')
}

/// The share of n-grams that occurred before in the same text; `None` where there are fewer than
/// `at_least` of them.
pub(crate) fn repeated_share(words: &[String], n: usize, at_least: usize) -> Option<f64> {
    let total = (words.len() + 1).checked_sub(n)?;
    if total < at_least.max(1) {
        return None;
    }
    let distinct = words.windows(n).collect::<BTreeSet<_>>().len();
    Some((total - distinct) as f64 / total as f64)
}

/// The n-grams of a text.
#[derive(Clone, Debug)]
pub(crate) struct Ngrams {
    n: usize,
    grams: BTreeSet<Vec<String>>,
}

impl Ngrams {
    pub(crate) fn of(text: &str, n: usize) -> Self {
        Self { n, grams: words(text).windows(n).map(<[String]>::to_vec).collect() }
    }

    /// The share of the n-grams of `words` that are in this text and not in `own`.
    pub(crate) fn share_of(&self, words: &[String], own: &Ngrams) -> f64 {
        let Some(total) = (words.len() + 1).checked_sub(self.n).filter(|&total| total > 0) else {
            return 0.0;
        };
        let known = |gram: &[String]| self.grams.contains(gram) && !own.grams.contains(gram);
        words.windows(self.n).filter(|gram| known(gram)).count() as f64 / total as f64
    }
}

/// Whether `phrase` stands in `text` with no letter or digit of the same kind against its ends.
///
/// A word of a CJK phrase has no borders that can be seen, so none are asked for there.
pub(crate) fn contains_phrase(text: &str, phrase: &str) -> bool {
    let part_of_word = |character: char| character.is_alphanumeric() && !is_cjk(character);
    let opens = phrase.chars().next().is_some_and(part_of_word);
    let closes = phrase.chars().next_back().is_some_and(part_of_word);
    text.match_indices(phrase).any(|(at, found)| {
        let before = text[..at].chars().next_back().is_some_and(part_of_word);
        let after = text[at + found.len()..].chars().next().is_some_and(part_of_word);
        !(opens && before || closes && after)
    })
}

/// Replaces `name` where it stands as a word.
pub(crate) fn replace_word(text: &str, name: &str, by: &str) -> String {
    let mut result = String::with_capacity(text.len());
    let mut rest = 0;
    for (at, found) in text.match_indices(name) {
        let before = text[..at].chars().next_back().is_some_and(char::is_alphanumeric);
        let after = text[at + found.len()..].chars().next().is_some_and(char::is_alphanumeric);
        if before || after {
            continue;
        }
        result.push_str(&text[rest..at]);
        result.push_str(by);
        rest = at + found.len();
    }
    result.push_str(&text[rest..]);
    result
}

/// Python's `str.strip`: its white space includes U+001C to U+001F, Rust's does not.
pub(crate) fn python_strip(text: &str) -> &str {
    text.trim_matches(|character: char| {
        character.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&character)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_lower_case_and_cjk_characters_stand_alone() {
        assert_eq!(
            words("It's 5 PM, \u{4f60}\u{597d}!"),
            ["it", "s", "5", "pm", "\u{4f60}", "\u{597d}"]
        );
        assert!(words(" -- ").is_empty());
    }

    #[test]
    fn repeated_share_counts_what_came_before() {
        let words = words("a b c a b c a b c");
        assert_eq!(repeated_share(&words, 3, 1), Some(4.0 / 7.0));
        assert_eq!(repeated_share(&words, 3, 8), None);
        assert_eq!(repeated_share(&words, 12, 1), None);
        assert_eq!(repeated_share(&[], 1, 0), None);
    }

    #[test]
    fn shared_ngrams_leave_out_the_rows_own_text() {
        let known = Ngrams::of("one two three four five", 3);
        let answer = words("one two three, and six");
        assert_eq!(known.share_of(&answer, &Ngrams::of("", 3)), 1.0 / 3.0);
        assert_eq!(known.share_of(&answer, &Ngrams::of("One two three?", 3)), 0.0);
        assert_eq!(known.share_of(&words("one"), &Ngrams::of("", 3)), 0.0);
    }

    #[test]
    fn phrases_stand_alone() {
        assert!(contains_phrase("in 2047, too", "2047"));
        assert!(!contains_phrase("in 20471", "2047"));
        assert!(contains_phrase("\u{662f}\u{6797}\u{53ef}\u{7684}", "\u{6797}\u{53ef}"));
        assert!(contains_phrase("a20 and 20", "20"));
    }

    #[test]
    fn names_are_replaced_as_words() {
        assert_eq!(replace_word("Watson's, Watsons; Watson", "Watson", "D"), "D's, Watsons; D");
    }

    #[test]
    fn python_strips_separators_too() {
        assert_eq!(python_strip("\u{1c}\u{a0} x\u{1f}\n"), "x");
    }
}
