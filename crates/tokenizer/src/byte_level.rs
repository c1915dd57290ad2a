//! GPT-2's way: the text is split by patterns, each part is merged from its UTF-8 bytes.

use regex::Regex;

use crate::bpe::{Merges, Scratch, Table};

/// GPT-2's pattern, which a byte-level pre-tokenizer uses unless another split comes first.
pub(crate) const GPT2_PATTERN: &str =
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// How all patterns of this family end. It needs a look-ahead, which backtracking engines pay for
/// with memory and, on long runs of spaces, with a stack overflow; [`Split::Pattern`] does the
/// same by hand.
const SPACE_TAIL: &str = r"\s+(?!\S)|\s+";

/// One step of cutting a text into parts.
#[derive(Debug)]
pub(crate) enum Split {
    /// Each match is a part, and what lies between matches too. With `space_tail`, the first group
    /// is `\s+(?!\S)|\s+`.
    Pattern { regex: Box<Regex>, space_tail: bool },
    /// Each run of digits is a part, or each digit.
    Digits { individual: bool },
}

impl Split {
    pub(crate) fn pattern(pattern: &str) -> Result<Self, regex::Error> {
        let (pattern, space_tail) = match pattern.strip_suffix(SPACE_TAIL) {
            Some(head) => (format!(r"{head}(\s+)"), true),
            None => (pattern.to_owned(), false),
        };
        Ok(Self::Pattern { regex: Box::new(Regex::new(&pattern)?), space_tail })
    }

    /// Calls `part` with each part of `text`, in order; together they are `text`.
    fn each<'t>(&self, text: &'t str, part: &mut dyn FnMut(&'t str)) {
        match self {
            Self::Pattern { regex, space_tail } => each_match(regex, *space_tail, text, part),
            Self::Digits { individual } => each_run_of_digits(*individual, text, part),
        }
    }
}

fn each_match<'t>(regex: &Regex, space_tail: bool, text: &'t str, part: &mut dyn FnMut(&'t str)) {
    let mut done = 0;
    let mut locations = regex.capture_locations();
    let mut at = 0;
    while let Some(found) = regex.captures_read_at(&mut locations, text, at) {
        let spaces = space_tail && locations.get(1).is_some();
        let end = if spaces { end_of_spaces(text, found.range()) } else { found.end() };
        if found.start() > done {
            part(&text[done..found.start()]);
        }
        if end > found.start() {
            part(&text[found.start()..end]);
        }
        done = end;
        at = match end.cmp(&at) {
            std::cmp::Ordering::Greater => end,
            // An empty match: go on behind the next character.
            _ => match text[at..].chars().next() {
                Some(c) => at + c.len_utf8(),
                None => break,
            },
        };
    }
    if done < text.len() {
        part(&text[done..]);
    }
}

/// `\s+(?!\S)|\s+`: the last space before a word belongs to the word, if it is not the only one.
fn end_of_spaces(text: &str, spaces: std::ops::Range<usize>) -> usize {
    if spaces.end == text.len() {
        return spaces.end;
    }
    match text[spaces.clone()].char_indices().next_back() {
        Some((last, _)) if last > 0 => spaces.start + last,
        _ => spaces.end,
    }
}

fn each_run_of_digits<'t>(individual: bool, text: &'t str, part: &mut dyn FnMut(&'t str)) {
    let mut start = 0;
    let mut was_digit = None;
    for (at, c) in text.char_indices() {
        let digit = c.is_numeric();
        let cut = was_digit.is_some_and(|was| was != digit || (digit && individual));
        if cut {
            part(&text[start..at]);
            start = at;
        }
        was_digit = Some(digit);
    }
    if start < text.len() {
        part(&text[start..]);
    }
}

pub(crate) struct ByteLevel {
    pub(crate) splits: Vec<Split>,
    pub(crate) prefix_space: bool,
    pub(crate) bytes: Box<[Option<u32>; 256]>,
    /// Parts that are tokens as they stand, whatever the merges say (LLaMA-3).
    pub(crate) whole: Option<Table<Box<[u8]>, u32>>,
    pub(crate) merges: Merges,
}

impl ByteLevel {
    pub(crate) fn wants_prefix(&self, text: &str) -> bool {
        self.prefix_space && !text.is_empty() && !text.starts_with(' ')
    }

    /// Appends the ids of `text`, with a space before it if `prefix`.
    pub(crate) fn encode(
        &self,
        text: &str,
        prefix: bool,
        scratch: &mut Scratch,
        out: &mut Vec<u32>,
    ) {
        let with_space;
        let text = if prefix {
            with_space = format!(" {text}");
            &with_space
        } else {
            text
        };
        self.split(&self.splits, text, scratch, out);
    }

    fn split(&self, splits: &[Split], text: &str, scratch: &mut Scratch, out: &mut Vec<u32>) {
        match splits.split_first() {
            None => self.encode_part(text, scratch, out),
            Some((first, rest)) => {
                first.each(text, &mut |part| self.split(rest, part, scratch, out));
            }
        }
    }

    fn encode_part(&self, part: &str, scratch: &mut Scratch, out: &mut Vec<u32>) {
        if let Some(&id) = self.whole.as_ref().and_then(|whole| whole.get(part.as_bytes())) {
            out.push(id);
            return;
        }
        // As in HF, a byte without a token is left out when there is no unknown token.
        scratch.word.extend(part.bytes().filter_map(|byte| self.bytes[usize::from(byte)]));
        self.merges.apply(scratch, out);
    }

    /// Bytes of `text` that give a token or a part of one.
    pub(crate) fn covered_bytes(&self, text: &str) -> usize {
        text.bytes().filter(|&byte| self.bytes[usize::from(byte)].is_some()).count()
    }
}

/// The printable stand-in of each byte in byte-level vocabularies: printable Latin-1 bytes stand
/// for themselves, the others for the characters from U+0100 on.
pub(crate) fn byte_characters() -> [char; 256] {
    let mut others = 0x100..;
    std::array::from_fn(|byte| {
        let byte = byte as u8;
        match byte {
            b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
            _ => others.next().and_then(char::from_u32).unwrap_or(char::REPLACEMENT_CHARACTER),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts<'t>(split: &Split, text: &'t str) -> Vec<&'t str> {
        let mut parts = Vec::new();
        split.each(text, &mut |part| parts.push(part));
        parts
    }

    #[test]
    fn gpt2_pattern_leaves_the_last_space_to_the_word() {
        let split = Split::pattern(GPT2_PATTERN).unwrap();
        assert_eq!(
            parts(&split, "it's  two\n\n\nx \n"),
            ["it", "'s", " ", " two", "\n\n", "\n", "x", " \n"]
        );
        assert_eq!(parts(&split, "\u{3000}a\ta"), ["\u{3000}", "a", "\t", "a"]);
        assert_eq!(parts(&split, ""), [""; 0]);
    }

    #[test]
    fn what_lies_between_matches_is_a_part() {
        let split = Split::pattern("b+").unwrap();
        assert_eq!(parts(&split, "abbcb"), ["a", "bb", "c", "b"]);
        assert_eq!(
            parts(&Split::pattern("x*").unwrap(), "\u{e9}xx\u{e9}"),
            ["\u{e9}", "xx", "\u{e9}"]
        );
    }

    #[test]
    fn digits_are_numbers_of_every_script() {
        let split = Split::Digits { individual: true };
        assert_eq!(parts(&split, "a12\u{664}b"), ["a", "1", "2", "\u{664}", "b"]);
        assert_eq!(parts(&Split::Digits { individual: false }, "a12b3"), ["a", "12", "b", "3"]);
    }

    #[test]
    fn every_byte_has_its_own_character() {
        let mut all = byte_characters().to_vec();
        assert_eq!((all[0x20], all[0x0a], all[0x41]), ('\u{120}', '\u{10a}', 'A'));
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 256);
    }
}
