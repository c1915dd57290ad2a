//! Ids together with the places in the text that they stand for.

use std::collections::BTreeMap;
use std::ops::Range;

use regex::Regex;
use tokenizers::OffsetType;

use crate::Tokenizer;
use crate::format::AddedToken;
use crate::tokenizer::CHECKED;

/// The special tokens as a text may spell them, for texts in which their names do stand for them.
#[derive(Default)]
pub(crate) struct Controls {
    names: Option<Regex>,
    tokens: BTreeMap<String, Control>,
}

#[derive(Clone, Copy)]
struct Control {
    id: u32,
    lstrip: bool,
    rstrip: bool,
    single_word: bool,
}

/// A special token in a text: its id and the bytes of its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) id: u32,
    pub(crate) bytes: Range<usize>,
}

/// Ids, and the bytes of the text that each stands for. Tokens that share a character have all of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tokens {
    pub(crate) ids: Vec<u32>,
    offsets: Vec<Range<usize>>,
}

impl Controls {
    pub(crate) fn new<'f>(added: impl IntoIterator<Item = &'f AddedToken>) -> Self {
        let special = added.into_iter().filter(|token| token.special && !token.content.is_empty());
        let tokens: BTreeMap<String, Control> = special
            .map(|token| {
                let &AddedToken { id, lstrip, rstrip, single_word, .. } = token;
                (token.content.clone(), Control { id, lstrip, rstrip, single_word })
            })
            .collect();
        Self { names: longest_of(tokens.keys()), tokens }
    }

    /// The names, in sorted order.
    pub(crate) fn names(&self) -> impl Iterator<Item = &String> {
        self.tokens.keys()
    }

    /// The special tokens that `text` spells, from left to right; the longest name wins.
    pub(crate) fn find(&self, text: &str) -> Vec<Found> {
        let matches = self.names.iter().flat_map(|names| names.find_iter(text));
        matches
            .filter_map(|found| {
                let control = self.tokens.get(found.as_str())?;
                let alone = !control.single_word || is_word(text, found.range());
                alone.then(|| Found { id: control.id, bytes: found.range() })
            })
            .collect()
    }

    /// The bytes that a token takes: some take the white space around them, as far as no other has it.
    fn taken(&self, text: &str, found: &Found, free_from: usize) -> Range<usize> {
        let Range { start, end } = found.bytes.clone();
        let control = self.tokens.get(&text[start..end]);
        let strips = |side: fn(&Control) -> bool| control.is_some_and(side);
        let before = text[free_from..start].trim_end().len() + free_from;
        let behind = text.len() - text[end..].trim_start().len();
        let start = if strips(|control| control.lstrip) { before } else { start };
        start..if strips(|control| control.rstrip) { behind } else { end }
    }
}

/// A pattern of any of the names, a longer one before one that it begins with.
pub(crate) fn longest_of<'n>(names: impl IntoIterator<Item = &'n String>) -> Option<Regex> {
    let mut names: Vec<&String> = names.into_iter().collect();
    names.sort_by_key(|name| std::cmp::Reverse(name.len()));
    let escaped: Vec<String> = names.into_iter().map(|name| regex::escape(name)).collect();
    if escaped.is_empty() {
        return None;
    }
    Regex::new(&escaped.join("|")).ok()
}

/// Whether no letter or digit stands beside these bytes.
fn is_word(text: &str, bytes: Range<usize>) -> bool {
    let is_part = |c: char| c.is_alphanumeric() || c == '_';
    !text[..bytes.start].ends_with(is_part) && !text[bytes.end..].starts_with(is_part)
}

impl Tokens {
    /// Positions of the tokens that stand for at least one of these bytes.
    pub(crate) fn of(&self, bytes: &Range<usize>) -> Range<usize> {
        let first = self.offsets.partition_point(|token| token.end <= bytes.start);
        let end = self.offsets.partition_point(|token| token.start < bytes.end);
        if bytes.is_empty() { first..first } else { first..end.max(first) }
    }
}

impl Tokenizer {
    /// The ids of a text, without BOS, and for each of `spans` (bytes of the text) the positions of the ids
    /// that stand for at least one character of it. Special tokens' names in the text are plain text.
    ///
    /// ```no_run
    /// # fn main() -> dromedary_tokenizer::Result<()> {
    /// let tokenizer = dromedary_tokenizer::Tokenizer::open("models/llama-2-7b")?;
    /// let (ids, spans) = tokenizer.encode_spans("### Human: Hi### Assistant: Hello", &[27..33]);
    /// assert_eq!(tokenizer.decode_continuation(&ids[spans[0].clone()]), " Hello");
    /// # Ok(()) }
    /// ```
    pub fn encode_spans(
        &self,
        text: &str,
        spans: &[Range<usize>],
    ) -> (Vec<u32>, Vec<Range<usize>>) {
        let tokens = self.tokens_of(text, &[]);
        let spans = spans.iter().map(|span| tokens.of(span)).collect();
        (tokens.ids, spans)
    }

    /// The ids of a text in which the names at `controls` stand for special tokens.
    pub(crate) fn tokens_of(&self, text: &str, controls: &[Found]) -> Tokens {
        let mut tokens = Tokens::default();
        let mut done = 0;
        for found in controls {
            let taken = self.controls.taken(text, found, done);
            self.add_plain(text, done..taken.start, &mut tokens);
            done = taken.end;
            tokens.ids.push(found.id);
            tokens.offsets.push(taken);
        }
        self.add_plain(text, done..text.len(), &mut tokens);
        tokens
    }

    fn add_plain(&self, text: &str, bytes: Range<usize>, tokens: &mut Tokens) {
        if bytes.is_empty() {
            return;
        }
        let follows = bytes.start > 0 && !self.prefixes_each_part;
        let pipeline = if follows { &self.continuation } else { &self.at_start };
        let encoding = self.encoding(pipeline, &text[bytes.clone()], OffsetType::Byte);
        let encoding = encoding.expect(CHECKED);
        tokens.ids.extend_from_slice(encoding.get_ids());
        let shifted = |&(start, end): &(usize, usize)| bytes.start + start..bytes.start + end;
        tokens.offsets.extend(encoding.get_offsets().iter().map(shifted));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn controls(tokens: &[AddedToken]) -> Controls {
        Controls::new(tokens)
    }

    fn special(id: u32, content: &str) -> AddedToken {
        AddedToken { id, content: content.to_owned(), special: true, ..AddedToken::default() }
    }

    #[test]
    fn the_longest_name_wins_and_plain_words_are_no_controls() {
        let word = AddedToken { special: false, ..special(9, "word") };
        let found =
            controls(&[special(1, "<s>"), special(2, "<s>[x]"), word]).find("a<s>[x]word<s>");
        assert_eq!(found, [Found { id: 2, bytes: 1..7 }, Found { id: 1, bytes: 11..14 }]);
        assert_eq!(controls(&[]).find("<s>"), []);
    }

    #[test]
    fn a_token_may_take_the_space_around_it_and_must_stand_alone_where_it_says_so() {
        let strips = AddedToken { lstrip: true, rstrip: true, ..special(1, "<m>") };
        let controls_ = controls(&[strips, AddedToken { single_word: true, ..special(2, "X") }]);
        let text = "a <m> \n<m> Xa X";
        let found = controls_.find(text);
        assert_eq!(found.iter().map(|found| found.id).collect::<Vec<_>>(), [1, 1, 2]);
        assert_eq!(controls_.taken(text, &found[0], 0), 1..7);
        assert_eq!(controls_.taken(text, &found[1], 7), 7..11);
    }

    #[test]
    fn tokens_of_a_span_share_a_character_with_it() {
        // "ab", two bytes of one character, "c"
        let tokens = Tokens { ids: vec![7, 8, 9, 6], offsets: vec![0..2, 2..5, 2..5, 5..6] };
        for (bytes, expected) in [
            (0..1, 0..1),
            (1..2, 0..1),
            (2..5, 1..3),
            (1..6, 0..4),
            (5..6, 3..4),
            (2..2, 1..1),
            (6..6, 4..4),
        ] {
            assert_eq!(tokens.of(&bytes), expected, "{bytes:?}");
        }
    }
}
