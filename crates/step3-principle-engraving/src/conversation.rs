//! Conversations as tokens: which turns are learned, and what is cut off where they are too long.

use std::ops::Range;

use dromedary_tokenizer::{ChatMessage, ChatTemplate, ChatTurns, ChatValue, Tokenizer};

use crate::{
    args::LearnedTurns,
    collate::{CollateConfig, Encoded, Example, Lengths, Sides},
    transcript::Transcript,
};

/// Whether the template wrote something behind what was said: a special token, or a mark.
fn has_end(turn: &[u32], said: &[String], tokenizer: &Tokenizer) -> bool {
    let is_last = |text: &str| {
        let spoken = said.iter().map(|said| said.trim_end()).filter(|said| !said.is_empty());
        spoken.into_iter().any(|said| text.ends_with(said))
    };
    turn.iter().any(|&id| tokenizer.is_special(id))
        || !is_last(tokenizer.decode_continuation(turn).trim_end())
}

/// A conversation as tokens, before it is cut.
pub(crate) struct Conversation {
    ids: Vec<u32>,
    /// The assistant's turns, in order.
    turns: Vec<Turn>,
    /// EOS is to follow what is not cut off.
    takes_eos: bool,
}

struct Turn {
    tokens: Range<usize>,
    /// Something at its end tells that it ends.
    ends: bool,
}

impl LearnedTurns {
    /// What of a conversation is learned.
    fn of(config: &CollateConfig) -> Self {
        if config.train_on_source { Self::All } else { config.learned_turns }
    }
}

impl Conversation {
    /// A text with marks between its turns; BOS stands before it where the model has one.
    pub(crate) fn of_transcript(
        transcript: &Transcript,
        tokenizer: &Tokenizer,
        config: &CollateConfig,
    ) -> Self {
        let bytes: Vec<_> = transcript.turns.iter().map(|turn| turn.bytes.clone()).collect();
        let (ids, spans) = tokenizer.encode_spans(&transcript.text, &bytes);
        let bos = tokenizer.bos_id().filter(|_| tokenizer.adds_bos());
        let before = usize::from(bos.is_some());
        let ids = bos.into_iter().chain(ids).collect();
        let turn = |(span, turn): (Range<usize>, &crate::transcript::Turn)| Turn {
            tokens: span.start + before..span.end + before,
            ends: turn.ends_in_mark,
        };
        let turns = spans.into_iter().zip(&transcript.turns).map(turn).collect();
        let takes_eos = config.add_eos_to_target && transcript.ends_in_answer();
        Self { ids, turns, takes_eos }
    }

    /// What a chat template writes; it writes all ends itself.
    ///
    /// # Errors
    /// If the template refuses the conversation, or it cannot be told which part is a turn's.
    pub(crate) fn of_chat(
        messages: &[ChatMessage],
        tools: Option<&ChatValue>,
        template: &ChatTemplate<'_>,
        tokenizer: &Tokenizer,
        config: &CollateConfig,
    ) -> dromedary_tokenizer::Result<Self> {
        let wanted = match LearnedTurns::of(config) {
            LearnedTurns::Assistant => ChatTurns::All,
            LearnedTurns::Last => ChatTurns::Last,
            LearnedTurns::All => ChatTurns::None,
        };
        let written = template.encode(messages, tools, wanted)?;
        let ids = written.ids;
        let said: Vec<String> = messages.iter().filter_map(ChatMessage::content).collect();
        let turn = |tokens: Range<usize>| {
            let ends = has_end(&ids[tokens.clone()], &said, tokenizer);
            Turn { tokens, ends }
        };
        let turns = written.turns.into_iter().map(turn).collect();
        Ok(Self { ids, turns, takes_eos: false })
    }

    /// The row, cut to its length.
    pub(crate) fn encoded(
        self,
        example_id: u64,
        tokenizer: &Tokenizer,
        config: &CollateConfig,
    ) -> Encoded {
        let eos = tokenizer.eos_id().filter(|_| self.takes_eos);
        match LearnedTurns::of(config) {
            LearnedTurns::Last => self.with_last_turn(example_id, eos, tokenizer, config),
            learned => self.cut_on_the_right(example_id, eos, learned, config),
        }
    }

    /// The end is cut off, so that what is left begins as the conversation does.
    fn cut_on_the_right(
        self,
        example_id: u64,
        eos: Option<u32>,
        learned: LearnedTurns,
        config: &CollateConfig,
    ) -> Encoded {
        let Self { mut ids, mut turns, .. } = self;
        if let Some((eos, last)) = eos.zip(turns.last_mut()) {
            ids.push(eos);
            *last = Turn { tokens: last.tokens.start..ids.len(), ends: true };
        }
        let truncated_right = ids.len().saturating_sub(config.conversation_max_len());
        ids.truncate(config.conversation_max_len());
        turns.retain(|turn| turn.tokens.start < ids.len());
        let is_whole = |turn: &Turn| turn.ends && turn.tokens.end <= ids.len();
        let ends_in_stop_mark = turns.last().is_some_and(is_whole);
        let stretches = match learned {
            LearnedTurns::All => {
                let whole = 0..ids.len();
                vec![whole]
            }
            _ => turns.into_iter().map(|turn| turn.tokens).collect(),
        };
        let example = Example { truncated_right, ..Example::new(example_id, ids, stretches) };
        Encoded { example, lengths: Lengths::Conversation, ends_in_stop_mark }
    }

    /// What stands before the last answer is a source, the answer a target.
    fn with_last_turn(
        self,
        example_id: u64,
        eos: Option<u32>,
        tokenizer: &Tokenizer,
        config: &CollateConfig,
    ) -> Encoded {
        let Self { mut ids, turns, .. } = self;
        let (tokens, ends) = match turns.last() {
            Some(turn) => (turn.tokens.clone(), turn.ends),
            None => (ids.len()..ids.len(), false),
        };
        let target = ids.split_off(tokens.start);
        let sides = Sides::cut(ids, target, eos, tokenizer, config);
        let learned_to = if eos.is_some() { usize::MAX } else { tokens.len() };
        sides.encoded(example_id, learned_to, ends || eos.is_some(), config)
    }
}
