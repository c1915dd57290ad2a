use crate::Tokenizer;

/// Decodes token by token; what it gives, joined, is what [`Tokenizer::decode`] gives for all
/// tokens at once.
///
/// ```no_run
/// # fn main() -> dromedary_tokenizer::Result<()> {
/// let tokenizer = dromedary_tokenizer::Tokenizer::open("model")?;
/// let mut stream = dromedary_tokenizer::DecodeStream::new(&tokenizer);
/// let mut text = String::new();
/// for id in [15043, 3186] {
///     text.extend(stream.push(id));
/// }
/// text.extend(stream.finish());
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct DecodeStream<'t> {
    tokenizer: &'t Tokenizer,
    /// The beginning of a character whose other bytes are still to come.
    pending: Vec<u8>,
    at_start: bool,
}

impl<'t> DecodeStream<'t> {
    /// Decodes as [`Tokenizer::decode`] does: a text of its own, without the space that
    /// sentencepiece puts before it.
    pub fn new(tokenizer: &'t Tokenizer) -> Self {
        Self { tokenizer, pending: Vec::new(), at_start: true }
    }

    /// Decodes as [`Tokenizer::decode_continuation`] does: what follows other text, with its
    /// leading space.
    pub fn continuation(tokenizer: &'t Tokenizer) -> Self {
        Self { at_start: false, ..Self::new(tokenizer) }
    }

    /// Takes the next token and gives the characters that are complete now, if any.
    pub fn push(&mut self, id: u32) -> Option<String> {
        let mut bytes = self.tokenizer.token_bytes(id);
        if bytes.is_empty() {
            return None;
        }
        if std::mem::take(&mut self.at_start) && self.tokenizer.strips_leading_space() {
            bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
        }
        self.pending.extend_from_slice(bytes);
        let complete = self.pending.len() - incomplete_tail(&self.pending);
        let text = String::from_utf8_lossy(&self.pending[..complete]).into_owned();
        self.pending.drain(..complete);
        (!text.is_empty()).then_some(text)
    }

    /// Gives what is left when no token follows: the replacement character for a character that was
    /// cut off.
    pub fn finish(self) -> Option<String> {
        (!self.pending.is_empty()).then(|| String::from_utf8_lossy(&self.pending).into_owned())
    }
}

/// Number of bytes at the end that may be the beginning of a character.
fn incomplete_tail(bytes: &[u8]) -> usize {
    (1..=bytes.len().min(3))
        .find(|&tail| {
            let start = &bytes[bytes.len() - tail..];
            std::str::from_utf8(start)
                .is_err_and(|error| error.valid_up_to() == 0 && error.error_len().is_none())
        })
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_possible_beginning_waits() {
        for (bytes, tail) in [
            (&b"abc"[..], 0),
            ("\u{4f60}".as_bytes(), 0),
            (&"\u{4f60}".as_bytes()[..2], 2),
            (b"\xf0\x9f\x90", 3),
            (b"\xf0\x9f\x90\xaa", 0),
            (b"\xff", 0),
            (b"\x80\x80", 0),
            (b"a\xc3", 1),
            (b"\xc0", 0),
            (b"\xe0\x80", 0),
            (b"", 0),
        ] {
            assert_eq!(incomplete_tail(bytes), tail, "{bytes:x?}");
        }
    }
}
