use std::path::Path;

use super::{Fault, OpenOrcaQuestion, SourceRows, Value, rows};
use crate::{Draft, DropReason, Result, Source};

/// What a row offers, whatever its source: a prompt, or why it is none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Offer {
    /// A prompt, as it stands in the row.
    Draft(Draft),
    /// The row is well-formed but no prompt.
    Unfit {
        /// Why not.
        reason: DropReason,
        /// The text that would have been the prompt; empty if there is none.
        text: String,
    },
}

impl Offer {
    pub(super) fn prompt(source: Source, text: String) -> Offer {
        Offer::Draft(Draft::new(source, text))
    }

    pub(super) fn unfit(reason: DropReason, text: impl Into<String>) -> Offer {
        Offer::Unfit { reason, text: text.into() }
    }
}

/// The rows of a source, in the order of its file.
pub type Offers = SourceRows<Offer>;

/// The questions of OpenOrca.
///
/// # Errors
/// As [`rows`].
pub fn openorca(path: &Path) -> Result<Offers> {
    let offer = |row: OpenOrcaQuestion| Offer::prompt(Source::OpenOrca, row.question);
    Ok(OpenOrcaQuestion::open(path)?.map_contents(offer))
}

/// The prompts of a file that step 1 wrote: `instruction` and, for some, `input`.
///
/// # Errors
/// As [`rows`].
pub fn prompts(path: &Path, source: Source) -> Result<Offers> {
    let read = move |mut row: Value| -> std::result::Result<Offer, Fault> {
        let instruction = row.take_text("instruction")?;
        let input = row.take_optional_text("input")?.unwrap_or_default();
        Ok(Offer::Draft(Draft { source, instruction, input }))
    };
    Ok(SourceRows::new(rows(path, &["instruction"])?, read))
}
