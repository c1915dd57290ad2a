//! Conversations that are one text, with a mark before each turn.

use std::ops::Range;

/// The marks before turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Marks {
    pub(crate) human: &'static str,
    pub(crate) assistant: &'static str,
}

/// Guanaco's, of the data set openassistant-guanaco.
pub(crate) const OASST1: Marks = Marks { human: "### Human:", assistant: "### Assistant:" };
/// Anthropic's, of the data set hh-rlhf.
pub(crate) const HH_RLHF: Marks = Marks { human: "\n\nHuman:", assistant: "\n\nAssistant:" };

/// A text and the assistant's turns in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Transcript {
    pub(crate) text: String,
    pub(crate) turns: Vec<Turn>,
}

/// What is learned where an assistant's turn is: what follows its mark, and the human's mark behind it, with
/// which the answer ends as others end with EOS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Turn {
    /// Bytes of the text.
    pub(crate) bytes: Range<usize>,
    /// The human's mark is at its end.
    pub(crate) ends_in_mark: bool,
}

impl Transcript {
    /// Finds the turns; `None` where there is no mark at all. Text before the first mark is read only.
    pub(crate) fn parse(text: String, marks: &Marks) -> Option<Self> {
        let mut found: Vec<(Range<usize>, bool)> = [(marks.human, false), (marks.assistant, true)]
            .into_iter()
            .flat_map(|(mark, is_assistant)| {
                let at = text.match_indices(mark).map(|(at, _)| at);
                at.map(move |at| (at..at + mark.len(), is_assistant)).collect::<Vec<_>>()
            })
            .collect();
        if found.is_empty() {
            return None;
        }
        found.sort_by_key(|(mark, _)| mark.start);
        let mut turns = Vec::new();
        for (index, (mark, is_assistant)) in found.iter().enumerate() {
            if !is_assistant {
                continue;
            }
            let turn = match found.get(index + 1) {
                Some((next, false)) => Turn { bytes: mark.end..next.end, ends_in_mark: true },
                Some((next, true)) => Turn { bytes: mark.end..next.start, ends_in_mark: false },
                None => Turn { bytes: mark.end..text.len(), ends_in_mark: false },
            };
            turns.push(turn);
        }
        Some(Self { text, turns })
    }

    /// Whether the text ends in a turn of the assistant.
    pub(crate) fn ends_in_answer(&self) -> bool {
        self.turns
            .last()
            .is_some_and(|turn| turn.bytes.end == self.text.len() && !turn.ends_in_mark)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn transcript(text: &str, marks: &Marks) -> Transcript {
        Transcript::parse(text.to_owned(), marks).unwrap()
    }

    fn parsed<'t>(text: &'t str, marks: &Marks) -> Vec<(&'t str, bool)> {
        let turns = transcript(text, marks).turns;
        turns.into_iter().map(|turn| (&text[turn.bytes], turn.ends_in_mark)).collect()
    }

    #[test]
    fn answers_are_found_with_the_mark_that_ends_them() {
        let text = "### Human: Hi.### Assistant: Hello!### Human: Bye.### Assistant: See you.";
        assert_eq!(parsed(text, &OASST1), [(" Hello!### Human:", true), (" See you.", false)]);
        assert!(transcript(text, &OASST1).ends_in_answer());
        let text = "\n\nHuman: Hi.\n\nAssistant: Hello!\n\nAssistant: Again.\n\nHuman: Bye.";
        let expected = [(" Hello!", false), (" Again.\n\nHuman:", true)];
        assert_eq!(parsed(text, &HH_RLHF), expected);
        assert!(!transcript(text, &HH_RLHF).ends_in_answer());
    }

    #[test]
    fn a_text_without_marks_is_no_transcript_and_one_without_an_answer_has_no_turns() {
        assert_eq!(Transcript::parse("Hello.".into(), &OASST1), None);
        assert_eq!(parsed("### Human: Hi.", &OASST1), []);
        assert!(!transcript("### Human: Hi.", &OASST1).ends_in_answer());
    }
}
