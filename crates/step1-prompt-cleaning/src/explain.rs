use std::fmt;

use crate::report::RowName;
use crate::{Draft, Dropped, Effect, Pipeline, Step};

/// What each rule did to one row; its text is for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explanation {
    /// The name of the row: its source and its number there.
    pub row: String,
    /// The text as it was read.
    pub text: String,
    /// The rules that it was shown to, in their order.
    pub steps: Vec<Step>,
}

impl Explanation {
    /// A row that its source already leaves out, or that cannot be read.
    pub(crate) fn unfit(row: RowName<'_>, text: String, dropped: Dropped) -> Explanation {
        let mut explanation = Explanation::of(row, text);
        explanation.step("source", Effect::Dropped(dropped));
        explanation
    }

    /// A row as the rules of the pipeline see it.
    pub(crate) fn judged(row: RowName<'_>, draft: Draft, pipeline: &Pipeline) -> Explanation {
        let mut explanation = Explanation::of(row, draft.instruction.clone());
        explanation.steps.extend(pipeline.explain(draft));
        explanation
    }

    fn of(row: RowName<'_>, text: String) -> Explanation {
        let read = Step { rule: "read".to_owned(), effect: Effect::Untouched, text: text.clone() };
        Explanation { row: row.to_string(), text, steps: vec![read] }
    }

    /// Another rule that the row was shown to.
    pub(crate) fn step(&mut self, rule: &str, effect: Effect) {
        let text = self.steps.last().map(|step| step.text.clone()).unwrap_or_default();
        self.steps.push(Step { rule: rule.to_owned(), effect, text });
    }

    /// Why the row is left out; `None` if it is kept.
    pub fn dropped(&self) -> Option<&Dropped> {
        self.steps.iter().find_map(|step| match &step.effect {
            Effect::Dropped(dropped) => Some(dropped),
            _ => None,
        })
    }
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}: {:?}", self.row, self.text)?;
        for step in &self.steps {
            write!(f, "  {:<16} ", step.rule)?;
            match &step.effect {
                Effect::Untouched => writeln!(f, "passes")?,
                Effect::Edited(edits) => {
                    let names: Vec<&str> = edits.iter().map(|edit| edit.name()).collect();
                    writeln!(f, "edits ({}): {:?}", names.join(", "), step.text)?;
                }
                Effect::Dropped(dropped) => writeln!(f, "leaves out: {dropped}")?,
            }
        }
        match self.dropped() {
            Some(dropped) => writeln!(f, "left out: {}", dropped.reason.name()),
            None => writeln!(f, "kept"),
        }
    }
}

/// Looks for the row of `--explain` among those that pass.
#[derive(Debug, Default)]
pub(crate) struct Search {
    name: Option<String>,
    found: Option<Explanation>,
}

impl Search {
    pub(crate) fn new(name: Option<&str>) -> Search {
        Search { name: name.map(str::to_owned), found: None }
    }

    /// Whether it is this row, by its name, its id as it was read or its id behind the rules.
    pub(crate) fn is_wanted<'d>(
        &self,
        row: RowName<'_>,
        drafts: impl IntoIterator<Item = &'d Draft>,
    ) -> bool {
        let Some(name) = self.name.as_ref().filter(|_| self.found.is_none()) else {
            return false;
        };
        row.to_string() == *name || drafts.into_iter().any(|draft| draft.id() == *name)
    }

    /// It is the row that was looked for.
    pub(crate) fn found(&mut self, explanation: Explanation) {
        self.found = Some(explanation);
    }

    /// Another rule was applied to the row, should that be the one looked for.
    pub(crate) fn step(&mut self, row: RowName<'_>, rule: &str, effect: impl Into<Effect>) {
        if let Some(explanation) = self.found.as_mut().filter(|e| e.row == row.to_string()) {
            explanation.step(rule, effect.into());
        }
    }

    /// What was found, if something was looked for.
    ///
    /// # Errors
    /// [`Error::NoSuchRow`](crate::Error::NoSuchRow).
    pub(crate) fn finish(self) -> crate::Result<Option<Explanation>> {
        match (self.name, self.found) {
            (Some(name), None) => Err(crate::Error::NoSuchRow { name }),
            (_, found) => Ok(found),
        }
    }
}
