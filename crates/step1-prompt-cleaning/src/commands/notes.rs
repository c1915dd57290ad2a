use super::settings::SharedConfig;
use crate::explain::{Explanation, Search};
use crate::report::{Ledger, RowName};
use crate::sources::Fault;
use crate::{Draft, DropReason, Dropped, Effect, Judged, Pipeline, Source};

/// What is noted of the rows of a command: counts and samples for the report, and the way of the
/// row that is to be explained.
pub(super) struct Notes {
    pub(super) ledger: Ledger,
    pub(super) search: Search,
}

/// What became of a row in the end.
pub(super) struct Fate {
    pub(super) name: RowName<'static>,
    /// What it is counted under.
    pub(super) source: &'static str,
    pub(super) tokens: Option<u32>,
    /// Why it is left out, if it is.
    pub(super) dropped: Option<Dropped>,
    /// Its text, if it is left out and the report shows texts.
    pub(super) text: String,
}

impl Notes {
    pub(super) fn new(shared: &SharedConfig) -> Notes {
        Notes {
            ledger: Ledger::new(shared.report.is_some()),
            search: Search::new(shared.explain.as_deref()),
        }
    }

    /// A row that cannot be read.
    pub(super) fn bad(&mut self, name: RowName<'_>, source: Source, fault: Fault) {
        let dropped = Dropped::with(DropReason::BadRow, fault.0);
        self.unfit(name, Draft::new(source, ""), &dropped);
    }

    /// A row in which its source has no prompt.
    pub(super) fn unfit(&mut self, name: RowName<'_>, draft: Draft, dropped: &Dropped) {
        if self.search.is_wanted(name, [&draft]) {
            let text = draft.instruction.clone();
            self.search.found(Explanation::unfit(name, text, dropped.clone()));
        }
        self.ledger.dropped(name.source, name, dropped, || draft.instruction);
    }

    /// A row that the rules were shown, counted under `source`; `original` is how it was read, where
    /// that is remembered.
    pub(super) fn judged(
        &mut self,
        source: &str,
        name: RowName<'_>,
        pipeline: &Pipeline,
        original: Option<&Draft>,
        judged: &Judged,
    ) {
        if let Some(original) = original
            && self.search.is_wanted(name, [original, &judged.draft])
        {
            self.search.found(Explanation::judged(name, original.clone(), pipeline));
        }
        let before = || original.map_or_else(String::new, |draft| draft.instruction.clone());
        let texts = || (before(), judged.draft.instruction.clone());
        self.ledger.edited(source, name, &judged.edits, texts);
    }

    /// Another rule was applied to the row.
    pub(super) fn step(&mut self, name: RowName<'_>, rule: &str, effect: impl Into<Effect>) {
        self.search.step(name, rule, effect);
    }

    /// The row is written or left out.
    pub(super) fn enter(&mut self, fate: Fate) {
        let Fate { name, source, tokens, dropped, text } = fate;
        match dropped {
            Some(dropped) => self.ledger.dropped(source, name, &dropped, || text),
            None => self.ledger.kept(source, tokens),
        }
    }
}
