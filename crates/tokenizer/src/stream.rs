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
    /// Tokens that end in what may be the beginning of a character.
    pending: Vec<String>,
    /// Length of their text that has been given: what comes before that character.
    given: usize,
    at_start: bool,
}

impl<'t> DecodeStream<'t> {
    /// Decodes as [`Tokenizer::decode`] does: a text of its own, without the space that
    /// sentencepiece puts before it.
    pub fn new(tokenizer: &'t Tokenizer) -> Self {
        Self { tokenizer, pending: Vec::new(), given: 0, at_start: true }
    }

    /// Decodes as [`Tokenizer::decode_continuation`] does: what follows other text, with its
    /// leading space.
    pub fn continuation(tokenizer: &'t Tokenizer) -> Self {
        Self { at_start: false, ..Self::new(tokenizer) }
    }

    /// Takes the next token and gives the characters that are complete now, if any. While bytes
    /// come that end in no character, all of them wait.
    pub fn push(&mut self, id: u32) -> Option<String> {
        self.pending.push(self.tokenizer.spelled(id)?);
        let text = self.tokenizer.text(self.pending.clone());
        let complete = text.trim_end_matches(char::REPLACEMENT_CHARACTER);
        let new = complete[self.given..].to_owned();
        self.given = complete.len();
        if complete.len() == text.len() {
            self.pending.clear();
            self.given = 0;
        }
        self.give(new)
    }

    /// Gives what is left when no token follows: the replacement character for a character that was
    /// cut off.
    pub fn finish(mut self) -> Option<String> {
        let text = self.tokenizer.text(std::mem::take(&mut self.pending));
        let left = text[self.given..].to_owned();
        self.give(left)
    }

    fn give(&mut self, text: String) -> Option<String> {
        if text.is_empty() {
            return None;
        }
        let text = match std::mem::take(&mut self.at_start) {
            true => self.tokenizer.without_prefix(&text).to_owned(),
            false => text,
        };
        (!text.is_empty()).then_some(text)
    }
}
