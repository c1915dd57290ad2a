//! Sentencepiece's way: spaces become a marker, one marker is put before the text, and characters
//! that have no piece become byte tokens.

use crate::bpe::{Merges, Scratch, Table};

/// Sentencepiece's stand-in for the space, U+2581.
pub(crate) const MARKER: char = '\u{2581}';

/// When a text gets a marker of its own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum DummyPrefix {
    Always,
    /// Not if it begins with one already.
    UnlessMarked,
    Never,
}

/// Where a text may be cut into words that are merged one by one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Cuts {
    /// Before a marker that follows another character: no merge of this vocabulary crosses it.
    BeforeRunsOfMarkers,
    /// Before each marker: the file asks for it.
    BeforeMarkers,
    /// Some merge crosses the border of words: the text is one word.
    Nowhere,
}

pub(crate) struct Metaspace {
    pub(crate) prefix: DummyPrefix,
    pub(crate) cuts: Cuts,
    pub(crate) characters: Table<u32, u32>,
    /// The token of each byte, where there is byte fallback.
    pub(crate) bytes: Option<Box<[Option<u32>; 256]>>,
    pub(crate) unknown: Option<u32>,
    pub(crate) fuse_unknown: bool,
    pub(crate) merges: Merges,
}

impl Metaspace {
    /// True if the text as a whole, not a continuation of another, gets a marker before it.
    pub(crate) fn wants_prefix(&self, text: &str) -> bool {
        !text.is_empty()
            && match self.prefix {
                DummyPrefix::Always => true,
                DummyPrefix::UnlessMarked => !text.starts_with([' ', MARKER]),
                DummyPrefix::Never => false,
            }
    }

    /// Every character gives one token or more, so that a length bound from below is valid.
    pub(crate) fn keeps_every_character(&self) -> bool {
        self.bytes.as_ref().is_some_and(|bytes| bytes.iter().all(Option::is_some))
    }

    /// Appends the ids of `text`, with a marker before it if `prefix`.
    pub(crate) fn encode(
        &self,
        text: &str,
        prefix: bool,
        scratch: &mut Scratch,
        out: &mut Vec<u32>,
    ) {
        let mut pending_unknown = false;
        let mut after_marker = true;
        let marker = prefix.then_some(MARKER);
        for c in marker.into_iter().chain(text.chars()) {
            let c = if c == ' ' { MARKER } else { c };
            if c == MARKER && self.cuts_after(after_marker) {
                self.flush_unknown(&mut pending_unknown, scratch);
                self.merges.apply(scratch, out);
            }
            after_marker = c == MARKER;
            self.push(c, &mut pending_unknown, scratch);
        }
        self.flush_unknown(&mut pending_unknown, scratch);
        self.merges.apply(scratch, out);
    }

    fn cuts_after(&self, after_marker: bool) -> bool {
        match self.cuts {
            Cuts::BeforeRunsOfMarkers => !after_marker,
            Cuts::BeforeMarkers => true,
            Cuts::Nowhere => false,
        }
    }

    fn push(&self, c: char, pending_unknown: &mut bool, scratch: &mut Scratch) {
        if let Some(&id) = self.characters.get(&u32::from(c)) {
            self.flush_unknown(pending_unknown, scratch);
            scratch.word.push(id);
        } else if !self.push_bytes(c, scratch) {
            if *pending_unknown && !self.fuse_unknown {
                scratch.word.extend(self.unknown);
            }
            *pending_unknown = true;
        }
    }

    /// False, and nothing pushed, if one of the character's bytes has no token.
    fn push_bytes(&self, c: char, scratch: &mut Scratch) -> bool {
        let Some(table) = &self.bytes else { return false };
        let mut buffer = [0; 4];
        let bytes = c.encode_utf8(&mut buffer).as_bytes();
        let start = scratch.word.len();
        scratch.word.extend(bytes.iter().map_while(|&byte| table[usize::from(byte)]));
        let whole = scratch.word.len() - start == bytes.len();
        if !whole {
            scratch.word.truncate(start);
        }
        whole
    }

    fn flush_unknown(&self, pending_unknown: &mut bool, scratch: &mut Scratch) {
        if std::mem::take(pending_unknown) {
            scratch.word.extend(self.unknown);
        }
    }
}
