use std::path::Path;
use std::sync::Arc;

use super::{Fault, Row, Value, rows};
use crate::{DropReason, Lists, Result};

/// A row of Dolly, or why it is no prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DollyPrompt {
    /// The instruction.
    Prompt(String),
    /// The instruction cannot stand alone.
    Unfit(DropReason),
}

impl DollyPrompt {
    /// The rows of a file with `instruction`, `context` and `category`; of the categories in the
    /// lists.
    ///
    /// # Errors
    /// As [`rows`].
    pub fn open(
        path: &Path,
        lists: Arc<Lists>,
    ) -> Result<impl Iterator<Item = Result<Row<DollyPrompt>>> + use<>> {
        let rows = rows(path, &["instruction", "context", "category"])?;
        Ok(rows.map(move |row| Ok(row?.read(|row| DollyPrompt::read(row, &lists)))))
    }

    fn read(mut row: Value, lists: &Lists) -> std::result::Result<DollyPrompt, Fault> {
        let instruction = row.take_text("instruction")?;
        let category = row.take_text("category")?;
        let context = row.take_optional_text("context")?.unwrap_or_default();
        Ok(if !lists.dolly_categories.contains(&category) {
            DollyPrompt::Unfit(DropReason::OtherCategory)
        } else if !context.is_empty() {
            DollyPrompt::Unfit(DropReason::HasContext)
        } else {
            DollyPrompt::Prompt(instruction)
        })
    }
}
