//! The patterns that cut a text before its bytes are merged, in linear time.

use regex::Regex;
use tokenizers::pattern::Pattern;
use tokenizers::{
    Offsets, PreTokenizedString, PreTokenizer, Result, SplitDelimiterBehavior as Behavior,
};

/// GPT-2's pattern, which a byte-level pre-tokenizer uses unless another split comes first.
pub(crate) const GPT2_PATTERN: &str =
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// How the patterns of this family end. The crate's engine backtracks for the look-ahead, gives up
/// on a long run of spaces, and leaves the rest of the text as one part; [`Split`] does the same as
/// the look-ahead by hand.
const SPACE_TAIL: &str = r"\s+(?!\S)|\s+";

/// A pre-tokenizer: each match of the pattern is a part, and what lies between matches too.
pub(crate) struct Split {
    regex: Regex,
    /// The group that stands for [`SPACE_TAIL`].
    space_tail: Option<usize>,
    /// Puts a space before a text that does not begin with one.
    prefix_space: bool,
}

impl Split {
    pub(crate) fn new(
        pattern: &str,
        prefix_space: bool,
    ) -> std::result::Result<Self, regex::Error> {
        let head = pattern.strip_suffix(SPACE_TAIL);
        let regex = match head {
            Some(head) => Regex::new(&format!(r"{head}(\s+)"))?,
            None => Regex::new(pattern)?,
        };
        let space_tail = head.map(|_| regex.captures_len() - 1);
        Ok(Self { regex, space_tail, prefix_space })
    }
}

impl PreTokenizer for Split {
    fn pre_tokenize(&self, text: &mut PreTokenizedString) -> Result<()> {
        text.split(|_, mut part| {
            if self.prefix_space && !part.get().starts_with(' ') {
                part.prepend(" ");
            }
            part.split(self, Behavior::Isolated)
        })
    }
}

impl Pattern for &Split {
    fn find_matches(&self, text: &str) -> Result<Vec<(Offsets, bool)>> {
        let mut parts = Vec::new();
        let (mut done, mut at) = (0, 0);
        let mut groups = self.regex.capture_locations();
        while let Some(found) = self.regex.captures_read_at(&mut groups, text, at) {
            let spaces = self.space_tail.and_then(|group| groups.get(group));
            let end = spaces.map_or(found.end(), |(start, end)| end_of_spaces(text, start, end));
            parts.extend([((done, found.start()), false), ((found.start(), end), true)]);
            // Behind an empty match, the search goes on with the next character.
            let next = text[end..].chars().next().map_or(1, char::len_utf8);
            (done, at) = (end, if end > at { end } else { end + next });
            if at > text.len() {
                break;
            }
        }
        parts.push(((done, text.len()), false));
        parts.retain(|((start, end), _)| start < end);
        Ok(parts)
    }
}

/// The last space before a word belongs to the word, if it is not the only one.
fn end_of_spaces(text: &str, start: usize, end: usize) -> usize {
    match text[start..end].char_indices().next_back() {
        Some((last, _)) if last > 0 && end < text.len() => start + last,
        _ => end,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts<'t>(pattern: &str, text: &'t str) -> Vec<&'t str> {
        let split = Split::new(pattern, false).unwrap();
        let found = (&split).find_matches(text).unwrap();
        found.into_iter().map(|((start, end), _)| &text[start..end]).collect()
    }

    #[test]
    fn gpt2_pattern_leaves_the_last_space_to_the_word() {
        assert_eq!(
            parts(GPT2_PATTERN, "it's  two\n\n\nx \n"),
            ["it", "'s", " ", " two", "\n\n", "\n", "x", " \n"]
        );
        assert_eq!(parts(GPT2_PATTERN, "\u{3000}a\ta"), ["\u{3000}", "a", "\t", "a"]);
        assert_eq!(parts(GPT2_PATTERN, ""), [""; 0]);
    }

    #[test]
    fn groups_of_the_pattern_are_not_taken_for_spaces() {
        assert_eq!(parts(r"(b+)|\s+(?!\S)|\s+", "abb  b"), ["a", "bb", " ", " ", "b"]);
    }

    #[test]
    fn what_lies_between_matches_is_a_part() {
        assert_eq!(parts("b+", "abbcb"), ["a", "bb", "c", "b"]);
        assert_eq!(parts("x*", "\u{e9}xx\u{e9}"), ["\u{e9}", "xx", "\u{e9}"]);
    }
}
