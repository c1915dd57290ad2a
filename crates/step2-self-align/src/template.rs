use dromedary_tokenizer::Tokenizer;

use crate::MetaPrompt;

/// Instructions that begin in as different ways as instructions do: what the tokens of all of
/// them share does not depend on the user's text.
const PROBES: [&str; 6] = ["a", "7", "\u{4f60}", "\u{1f642}", "\"", "\t"];

/// From a prompt to the text that the model continues.
///
/// `{meta prompt} {instruction}\n\n{thoughts cue}`, with `{input}\n\n` before the cue where there
/// is an input.
#[derive(Clone, Debug)]
pub struct Template {
    meta_prompt: String,
    thoughts: String,
}

impl Template {
    /// The template of a meta prompt.
    pub fn new(meta_prompt: &MetaPrompt) -> Self {
        Self {
            meta_prompt: meta_prompt.text.clone(),
            thoughts: meta_prompt.principles.cues.thoughts.clone(),
        }
    }

    /// The whole text for one prompt.
    pub fn fill(&self, instruction: &str, input: &str) -> String {
        let Self { meta_prompt, thoughts } = self;
        if input.is_empty() {
            format!("{meta_prompt} {instruction}\n\n{thoughts}")
        } else {
            format!("{meta_prompt} {instruction}\n\n{input}\n\n{thoughts}")
        }
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
