use dromedary_tokenizer::Tokenizer;

use crate::{Form, MetaPrompt};

/// Instructions that begin in as different ways as instructions do: what the tokens of all of
/// them share does not depend on the user's text.
const PROBES: [&str; 6] = ["a", "7", "\u{4f60}", "\u{1f642}", "\"", "\t"];

/// From a prompt to the text that the model continues.
///
/// Behind the principles: `{meta prompt} {instruction}\n\n{thoughts cue}`, with `{input}\n\n` before the
/// cue where there is an input. Behind a verbose prompt the instruction stands on a line of its own, and
/// so does the cue.
#[derive(Clone, Debug)]
pub struct Template {
    /// The meta prompt and what parts it from the instruction.
    before: String,
    /// The cue and what parts it from the model's text.
    cue: String,
}

impl Template {
    /// The template of a meta prompt.
    pub fn new(meta_prompt: &MetaPrompt) -> Self {
        let MetaPrompt { text, principles, form, .. } = meta_prompt;
        match form {
            Form::SelfAlign => {
                Self { before: format!("{text} "), cue: principles.cues.thoughts.clone() }
            }
            Form::Verbose => {
                Self { before: format!("{text}\n"), cue: format!("{}\n", principles.cues.answer) }
            }
        }
    }

    /// The whole text for one prompt.
    pub fn fill(&self, instruction: &str, input: &str) -> String {
        let Self { before, cue } = self;
        let gap = if input.is_empty() { "" } else { "\n\n" };
        format!("{before}{instruction}{gap}{input}\n\n{cue}")
    }

    /// The tokens that come before the user's text whatever it is: a function of template and
    /// tokenizer alone.
    ///
    /// Dromedary takes what the rows of a batch happen to share, which moves with the rows: here a
    /// run that continues another has the same prefix and therefore the same numerics.
    pub fn shared_prefix(&self, tokenizer: &Tokenizer) -> Vec<u32> {
        let mut prefix: Option<Vec<u32>> = None;
        for probe in PROBES {
            let tokens = tokenizer.encode_with_bos(&self.fill(probe, ""));
            match &mut prefix {
                None => prefix = Some(tokens),
                Some(prefix) => prefix.truncate(common_len(prefix, &tokens)),
            }
        }
        prefix.unwrap_or_default()
    }
}

/// Length of what two rows of tokens begin with alike.
pub(crate) fn common_len(one: &[u32], other: &[u32]) -> usize {
    one.iter().zip(other).take_while(|(left, right)| left == right).count()
}
