use std::path::Path;

use super::{Fault, Row, Value, rows};
use crate::{DropReason, Result};

/// The categories whose prompts need nothing but themselves.
const CATEGORIES: [&str; 5] =
    ["creative_writing", "brainstorming", "open_qa", "general_qa", "classification"];

/// A row of Dolly, or why it is no prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DollyPrompt {
    /// The instruction.
    Prompt(String),
    /// The instruction cannot stand alone.
    Unfit(DropReason),
}

impl DollyPrompt {
    /// The rows of a file with `instruction`, `context` and `category`.
    ///
    /// # Errors
    /// As [`rows`].
    pub fn open(path: &Path) -> Result<impl Iterator<Item = Result<Row<DollyPrompt>>> + use<>> {
        let rows = rows(path, &["instruction", "context", "category"])?;
        Ok(rows.map(|row| Ok(row?.read(DollyPrompt::read))))
    }

    fn read(mut row: Value) -> std::result::Result<DollyPrompt, Fault> {
        let instruction = row.take_text("instruction")?;
        let category = row.take_text("category")?;
        let context = row.take_optional_text("context")?.unwrap_or_default();
        Ok(if !CATEGORIES.contains(&category.as_str()) {
            DollyPrompt::Unfit(DropReason::OtherCategory)
        } else if !context.is_empty() {
            DollyPrompt::Unfit(DropReason::HasContext)
        } else {
            DollyPrompt::Prompt(instruction)
        })
    }
}
