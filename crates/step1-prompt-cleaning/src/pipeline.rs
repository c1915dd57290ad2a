use std::borrow::Cow;
use std::fmt;

use dromedary_records::{Prompt, row_id};

use crate::text::strip;
use crate::{Cleaner, DropReason, Edit, LengthRule, NliRule, Source};

/// A prompt on its way through the rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Draft {
    /// Where it comes from.
    pub source: Source,
    /// The question or task.
    pub instruction: String,
    /// What the instruction is about; empty for most.
    pub input: String,
}

impl Draft {
    /// A prompt without an input.
    pub fn new(source: Source, instruction: impl Into<String>) -> Draft {
        Draft { source, instruction: instruction.into(), input: String::new() }
    }

    /// Instruction and input in one text, as the model gets them.
    pub fn whole(&self) -> Cow<'_, str> {
        match self.input.as_str() {
            "" => Cow::Borrowed(&self.instruction),
            input => Cow::Owned(format!("{}\n\n{input}", self.instruction)),
        }
    }

    /// The row of an output.
    pub fn into_prompt(self) -> Prompt {
        let (id, source) = (self.id(), self.source.to_string());
        Prompt { id, source, instruction: self.instruction, input: self.input }
    }

    /// The id of the row, as the text stands now.
    pub fn id(&self) -> String {
        // The rows of an output differ, so every one is the first of its kind.
        row_id(self.source.name(), &self.instruction, &self.input, 0)
    }
}

/// Why a row is left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dropped {
    /// The reason that is counted.
    pub reason: DropReason,
    /// What in the row gave the reason, for people; may be empty.
    pub detail: String,
}

impl Dropped {
    /// A reason that explains itself.
    pub fn plain(reason: DropReason) -> Dropped {
        Dropped { reason, detail: String::new() }
    }

    /// A reason and what gave it.
    pub fn with(reason: DropReason, detail: impl Into<String>) -> Dropped {
        Dropped { reason, detail: detail.into() }
    }
}

impl fmt::Display for Dropped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.reason.name())?;
        if self.detail.is_empty() { Ok(()) } else { write!(f, ": {}", self.detail) }
    }
}

/// What a rule did to a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Effect {
    /// Nothing.
    Untouched,
    /// It changed the text, for these reasons.
    Edited(Vec<Edit>),
    /// It left the row out.
    Dropped(Dropped),
}

impl From<Option<Dropped>> for Effect {
    fn from(dropped: Option<Dropped>) -> Effect {
        dropped.map_or(Effect::Untouched, Effect::Dropped)
    }
}

/// A rule that looks at one prompt alone.
pub trait Rule: Send + Sync {
    /// The name in explanations.
    fn name(&self) -> &'static str;

    /// Judges the prompt, and may change it.
    fn apply(&self, draft: &mut Draft) -> Effect;
}

impl Rule for Cleaner {
    fn name(&self) -> &'static str {
        "clean"
    }

    fn apply(&self, draft: &mut Draft) -> Effect {
        let cleaned = self.clean(draft.source, &draft.instruction);
        if cleaned.edits.is_empty() {
            return Effect::Untouched;
        }
        let (text, edits) = (cleaned.text.to_owned(), cleaned.edits);
        draft.instruction = text;
        Effect::Edited(edits)
    }
}

/// Removes white space at the ends, and no page chrome.
#[derive(Clone, Copy, Debug)]
pub struct Strip;

impl Rule for Strip {
    fn name(&self) -> &'static str {
        "strip"
    }

    fn apply(&self, draft: &mut Draft) -> Effect {
        let stripped = strip(&draft.instruction);
        if stripped.len() == draft.instruction.len() {
            return Effect::Untouched;
        }
        draft.instruction = stripped.to_owned();
        Effect::Edited(vec![Edit::Whitespace])
    }
}

/// Leaves out prompts without an instruction.
#[derive(Clone, Copy, Debug)]
pub struct NotEmpty;

impl Rule for NotEmpty {
    fn name(&self) -> &'static str {
        "not empty"
    }

    fn apply(&self, draft: &mut Draft) -> Effect {
        draft.instruction.is_empty().then(|| Dropped::plain(DropReason::Empty)).into()
    }
}

impl Rule for NliRule {
    fn name(&self) -> &'static str {
        "no NLI task"
    }

    fn apply(&self, draft: &mut Draft) -> Effect {
        let keyword = self.keyword(&draft.instruction);
        keyword.map(|word| Dropped::with(DropReason::NliTask, format!("has {word:?}"))).into()
    }
}

impl Rule for LengthRule {
    fn name(&self) -> &'static str {
        "length"
    }

    fn apply(&self, draft: &mut Draft) -> Effect {
        let bound = |reason| match reason {
            DropReason::TooShort => format!("fewer than {} tokens", self.min),
            _ => format!("more than {} tokens", self.max),
        };
        self.check(&draft.whole()).map(|reason| Dropped::with(reason, bound(reason))).into()
    }
}

/// Rules in their order; a row that one leaves out is not shown to the next.
///
/// ```
/// use dromedary_prompt_cleaning::{Draft, DropReason, Dropped, Effect, Lists, Pipeline, Rule};
/// use dromedary_prompt_cleaning::{Cleaner, NotEmpty, Rules, Source};
///
/// /// Our own rule: no shouting.
/// struct NoShouting;
///
/// impl Rule for NoShouting {
///     fn name(&self) -> &'static str {
///         "no shouting"
///     }
///
///     fn apply(&self, draft: &mut Draft) -> Effect {
///         draft.instruction = draft.instruction.replace("!!!", "!");
///         Effect::Untouched
///     }
/// }
///
/// let pipeline = Pipeline::new()
///     .with(Cleaner::new(Rules::Corrected, Lists::built_in()))
///     .with(NoShouting)
///     .with(NotEmpty);
/// let judged = pipeline.judge(Draft::new(Source::ShareGpt, "Help!!!\nShare Prompt"));
/// assert_eq!(judged.draft.instruction, "Help!");
/// assert_eq!(pipeline.judge(Draft::new(Source::Dolly, " ")).dropped.unwrap().reason, DropReason::Empty);
/// ```
#[derive(Default)]
pub struct Pipeline {
    rules: Vec<Box<dyn Rule>>,
}

impl fmt::Debug for Pipeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.rules.iter().map(|rule| rule.name())).finish()
    }
}

/// What the rules made of a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Judged {
    /// The prompt, as far as it got.
    pub draft: Draft,
    /// Why its text was changed, each reason once.
    pub edits: Vec<Edit>,
    /// Why it is left out, if it is.
    pub dropped: Option<Dropped>,
}

/// What one rule did to a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// The rule's name.
    pub rule: String,
    /// What it did.
    pub effect: Effect,
    /// The instruction behind it.
    pub text: String,
}

impl Pipeline {
    /// No rule: every prompt is kept as it is.
    pub fn new() -> Pipeline {
        Pipeline::default()
    }

    /// The same with one more rule behind the others.
    #[must_use]
    pub fn with(mut self, rule: impl Rule + 'static) -> Pipeline {
        self.rules.push(Box::new(rule));
        self
    }

    /// The same with one more rule, if there is one.
    #[must_use]
    pub fn with_some(self, rule: Option<impl Rule + 'static>) -> Pipeline {
        match rule {
            Some(rule) => self.with(rule),
            None => self,
        }
    }

    /// Shows the prompt to the rules.
    pub fn judge(&self, draft: Draft) -> Judged {
        self.run(draft, |_, _, _| ())
    }

    /// What each rule does to the prompt, up to the one that leaves it out.
    pub fn explain(&self, draft: Draft) -> Vec<Step> {
        let mut steps = Vec::new();
        self.run(draft, |rule, effect, draft| {
            steps.push(Step {
                rule: rule.to_owned(),
                effect: effect.clone(),
                text: draft.instruction.clone(),
            });
        });
        steps
    }

    fn run(&self, draft: Draft, mut observe: impl FnMut(&str, &Effect, &Draft)) -> Judged {
        let mut judged = Judged { draft, edits: Vec::new(), dropped: None };
        for rule in &self.rules {
            let effect = rule.apply(&mut judged.draft);
            observe(rule.name(), &effect, &judged.draft);
            match effect {
                Effect::Untouched => {}
                Effect::Edited(edits) => {
                    let new = |edit: &Edit| !judged.edits.contains(edit);
                    let new: Vec<Edit> = edits.into_iter().filter(new).collect();
                    judged.edits.extend(new);
                }
                Effect::Dropped(dropped) => {
                    judged.dropped = Some(dropped);
                    break;
                }
            }
        }
        judged
    }
}
