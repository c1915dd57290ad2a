//! How many tokens a text has, without making its ids.

use std::cell::RefCell;

use thread_local::ThreadLocal;

use crate::build::MARKER;

/// Characters that stand side by side in a piece that some merge makes.
///
/// A text can be cut between any other two: no token reaches over such a border, and merges on
/// one side do not change those on the other. So words can be counted alone, as long as each
/// character becomes a token of its own before the merges.
pub(crate) struct Borders {
    /// Bit `right` of element `left`: both ASCII, the space standing for the marker.
    ascii: Box<[u128; 128]>,
    /// All other pairs, sorted.
    others: Vec<(char, char)>,
}

impl Borders {
    /// Of a model whose merges make these pieces.
    pub(crate) fn of<'p>(pieces: impl Iterator<Item = &'p str>) -> Borders {
        let mut ascii = Box::new([0_u128; 128]);
        let mut others = Vec::new();
        for piece in pieces {
            let right = piece.chars().map(as_in_text).skip(1);
            for (left, right) in piece.chars().map(as_in_text).zip(right) {
                match (u8::try_from(left), u8::try_from(right)) {
                    (Ok(left @ ..128), Ok(right @ ..128)) => {
                        ascii[usize::from(left)] |= 1 << right;
                    }
                    _ => others.push((left, right)),
                }
            }
        }
        others.sort_unstable();
        others.dedup();
        Borders { ascii, others }
    }

    /// Whether a token may hold both characters, `left` before `right`.
    fn join(&self, left: char, right: char) -> bool {
        if left.is_ascii() && right.is_ascii() {
            self.ascii[left as usize] >> (right as u32) & 1 == 1
        } else {
            self.others.binary_search(&(left, right)).is_ok()
        }
    }

    /// Where the first word of the text ends, if `before` stands before the text.
    fn end_of_word(&self, before: Option<char>, text: &str) -> usize {
        let mut left = before;
        for (at, c) in text.char_indices() {
            let right = as_in_text(c);
            if left.is_some_and(|left| !self.join(left, right)) {
                return at;
            }
            left = Some(right);
        }
        text.len()
    }
}

/// The marker of sentencepiece is how the model sees a space.
fn as_in_text(c: char) -> char {
    if c == MARKER { ' ' } else { c }
}

/// Bytes of the longest word that is remembered.
const WORD_BYTES: usize = 30;
const SLOTS: usize = 1 << 15;

/// A word, its length in byte 30 and its number of tokens in byte 31; all zero where none is.
type Slot = [u64; 4];

/// The byte of the number of tokens, in the last part of a slot.
const COUNT: u64 = 0xff << 56;

/// The number of tokens of words seen before. Of two words with the same place the last one stays,
/// so the memory is bounded: one megabyte.
pub(crate) struct SeenWords(Box<[Slot]>);

impl SeenWords {
    fn new() -> SeenWords {
        SeenWords(vec![[0; 4]; SLOTS].into_boxed_slice())
    }

    /// The number of tokens of `prefix` and `word`, from memory or else from `count`.
    fn tokens(&mut self, prefix: &str, word: &str, count: impl Fn(&str) -> usize) -> usize {
        let length = prefix.len() + word.len();
        if length > WORD_BYTES {
            return count(&[prefix, word].concat());
        }
        let mut bytes = [0; 32];
        bytes[..prefix.len()].copy_from_slice(prefix.as_bytes());
        bytes[prefix.len()..length].copy_from_slice(word.as_bytes());
        bytes[WORD_BYTES] = length as u8;
        let parts = bytes.as_chunks::<8>().0;
        let key: Slot = [0, 1, 2, 3].map(|part| u64::from_le_bytes(parts[part]));
        let slot = &mut self.0[place(&key)];
        let [a, b, c, d] = *slot;
        if [a, b, c, d & !COUNT] == key {
            return (d >> 56) as usize;
        }
        let tokens = count(&[prefix, word].concat());
        // They are no more than the bytes, of which a prefix has one for its one token.
        *slot = [key[0], key[1], key[2], key[3] | (tokens as u64) << 56];
        tokens
    }
}

fn place(word: &Slot) -> usize {
    const ODD: u64 = 0x9e37_79b9_7f4a_7c15;
    let mixed =
        word.iter().fold(0_u64, |hash, part| (hash.rotate_left(23) ^ part).wrapping_mul(ODD));
    (mixed >> (64 - SLOTS.ilog2())) as usize
}

/// The tokens of words, added up until there are too many.
pub(crate) struct Sum<'s> {
    seen: &'s mut SeenWords,
    max: usize,
    /// Characters of the longest token, if each character is in some token.
    longest: Option<usize>,
    /// Counts the tokens of a word.
    count: &'s dyn Fn(&str) -> usize,
    tokens: usize,
}

impl<'s> Sum<'s> {
    pub(crate) fn new(
        seen: &'s mut SeenWords,
        max: usize,
        longest: Option<usize>,
        count: &'s dyn Fn(&str) -> usize,
    ) -> Sum<'s> {
        Sum { seen, max, longest, count, tokens: 0 }
    }

    pub(crate) fn tokens(&self) -> usize {
        self.tokens
    }

    pub(crate) fn add_tokens(&mut self, tokens: usize) {
        self.tokens += tokens;
    }

    /// Adds a word behind a prefix. Of one that is too long in any case, only so much is counted.
    pub(crate) fn add_word(&mut self, prefix: &str, word: &str) {
        // A character has at most four bytes.
        let least = self.longest.map_or(0, |longest| word.len().div_ceil(4).div_ceil(longest));
        self.tokens += if self.tokens + least > self.max {
            least
        } else {
            self.seen.tokens(prefix, word, self.count)
        };
    }

    /// Adds a text, cut at its borders. It stops as soon as the answer is known: there are too many
    /// tokens, or `is_last` and the rest is too short to be too long.
    pub(crate) fn add_text(&mut self, borders: &Borders, prefix: &str, text: &str, is_last: bool) {
        let (mut prefix, mut rest) = (prefix, text);
        while !rest.is_empty() && self.tokens <= self.max {
            let most = self.tokens + prefix.len() + rest.len();
            if is_last && most <= self.max && self.max < usize::MAX {
                return;
            }
            let (word, behind) = rest.split_at(borders.end_of_word(prefix.chars().next(), rest));
            self.add_word(prefix, word);
            (prefix, rest) = ("", behind);
        }
    }
}

/// Memories of words, one for each thread: a lock around them would be taken for every text.
#[derive(Default)]
pub(crate) struct Memories(ThreadLocal<RefCell<SeenWords>>);

impl Memories {
    /// Lends out the thread's own; `work` must not ask for it again.
    pub(crate) fn with<T>(&self, work: impl FnOnce(&mut SeenWords) -> T) -> T {
        work(&mut self.0.get_or(|| RefCell::new(SeenWords::new())).borrow_mut())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words<'t>(borders: &Borders, before: Option<char>, text: &'t str) -> Vec<&'t str> {
        let (mut before, mut rest, mut words) = (before, text, Vec::new());
        while !rest.is_empty() {
            let (word, behind) = rest.split_at(borders.end_of_word(before, rest));
            words.push(word);
            (before, rest) = (None, behind);
        }
        words
    }

    #[test]
    fn words_end_where_no_piece_goes_on() {
        let borders = Borders::of(["ab", "\u{2581}a", "b\u{e9}", "\u{2581}\u{2581}"].into_iter());
        assert_eq!(words(&borders, Some(' '), "ab abx"), ["ab", " ab", "x"]);
        assert_eq!(words(&borders, None, "ba  ab\u{e9}\u{e9}"), ["b", "a", "  ab\u{e9}", "\u{e9}"]);
        // The marker in a text is a space to the model; a prefix may be a word of its own.
        assert_eq!(words(&borders, Some(' '), "x\u{2581}ab"), ["", "x", "\u{2581}ab"]);
    }

    #[test]
    fn a_word_is_counted_once() {
        let mut seen = SeenWords::new();
        let counted = RefCell::new(Vec::new());
        for (prefix, word) in [(" ", "word"), ("", " word"), ("", "word"), (" ", "word")] {
            assert_eq!(
                seen.tokens(prefix, word, |word| {
                    counted.borrow_mut().push(word.to_owned());
                    word.len()
                }),
                prefix.len() + word.len()
            );
        }
        assert_eq!(*counted.borrow(), [" word", "word"]);
        for _ in 0..2 {
            for word in ["a\0", "a", &"x".repeat(30), &"x".repeat(31)] {
                assert_eq!(seen.tokens("", word, str::len), word.len());
            }
        }
    }
}
