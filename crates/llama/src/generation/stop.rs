//! When a row ends.

use std::collections::BTreeSet;

/// What ends a row before its length does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StopRule {
    eos_token_ids: BTreeSet<u32>,
    strings: Vec<String>,
    longest: usize,
}

impl StopRule {
    /// Rows end at any of these tokens, which are not part of the text, and behind the first of these
    /// strings, which is. Empty strings are left out.
    pub fn new(
        eos_token_ids: impl IntoIterator<Item = u32>,
        strings: impl IntoIterator<Item = String>,
    ) -> Self {
        let strings: Vec<String> = strings.into_iter().filter(|s| !s.is_empty()).collect();
        let longest = strings.iter().map(String::len).max().unwrap_or(0);
        Self { eos_token_ids: eos_token_ids.into_iter().collect(), strings, longest }
    }

    /// Whether this token ends a row.
    pub fn is_eos(&self, id: u32) -> bool {
        self.eos_token_ids.contains(&id)
    }

    /// Where the first stop string ends in `text`, of which everything before `new` was searched
    /// already. A string may lie across that border, since tokens end anywhere.
    pub fn end_in(&self, text: &str, new: usize) -> Option<usize> {
        let mut from = new.saturating_sub(self.longest.saturating_sub(1));
        while !text.is_char_boundary(from) {
            from -= 1;
        }
        let ends = self.strings.iter().filter_map(|stop| {
            text[from..].find(stop.as_str()).map(|start| from + start + stop.len())
        });
        ends.min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn finds_strings_across_borders() {
        let rule = StopRule::new([2, 7], ["\n\nUser:".into(), "###".into(), String::new()]);
        assert!(rule.is_eos(7) && !rule.is_eos(1));
        let text = "answer\n\nUser: next";
        assert_eq!(rule.end_in(text, 9), Some(13));
        assert_eq!(rule.end_in(text, 13), None);
        assert_eq!(rule.end_in("a\u{4f60}\u{4f60}###", 8), Some(10));
        assert_eq!(StopRule::new([], []).end_in("", 0), None);
    }

    proptest! {
        #[test]
        fn pieces_stop_where_the_whole_text_does(text in "[ab\u{4f60}]{0,40}", cut in 1usize..4) {
            let rule = StopRule::new([], ["ab\u{4f60}".into(), "bb".into()]);
            let mut seen = String::new();
            let mut found = None;
            let characters: Vec<char> = text.chars().collect();
            for piece in characters.chunks(cut) {
                let new = seen.len();
                seen.extend(piece);
                found = rule.end_in(&seen, new);
                if found.is_some() {
                    break;
                }
            }
            prop_assert_eq!(found, rule.end_in(&text, 0));
        }
    }
}
