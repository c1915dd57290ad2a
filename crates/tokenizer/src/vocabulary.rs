//! Tokens by id: their pieces, and the bytes that they stand for.

/// One token of the vocabulary.
#[derive(Clone, Default)]
pub(crate) struct Token {
    pub(crate) piece: Box<str>,
    pub(crate) bytes: Box<[u8]>,
    /// Decoding leaves it out.
    pub(crate) special: bool,
}

pub(crate) struct Vocabulary {
    /// `None` where the file leaves an id out.
    pub(crate) tokens: Vec<Option<Token>>,
    /// The decoder drops one space at the start of a text: the one the encoder has put there.
    pub(crate) strip_leading_space: bool,
}

impl Vocabulary {
    pub(crate) fn token(&self, id: u32) -> Option<&Token> {
        self.tokens.get(id as usize)?.as_ref()
    }

    /// The bytes that the token adds to a decoded text.
    pub(crate) fn bytes(&self, id: u32) -> &[u8] {
        match self.token(id) {
            Some(token) if !token.special => &token.bytes,
            _ => &[],
        }
    }

    /// The text of `ids`; with `at_start`, without the space that the encoder has put first.
    pub(crate) fn decode(&self, ids: &[u32], at_start: bool) -> String {
        let mut bytes = Vec::with_capacity(ids.len() * 4);
        for &id in ids {
            bytes.extend_from_slice(self.bytes(id));
        }
        let strip = at_start && self.strip_leading_space && bytes.first() == Some(&b' ');
        String::from_utf8_lossy(&bytes[usize::from(strip)..]).into_owned()
    }
}
