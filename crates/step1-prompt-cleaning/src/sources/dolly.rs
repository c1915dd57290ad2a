use std::path::Path;
use std::sync::Arc;

use super::{Fault, Offer, Offers, SourceRows, Value, rows};
use crate::{DropReason, Lists, Result, Source};

/// The rows of a file of Dolly with `instruction`, `context` and `category`; the lists say of which
/// categories.
///
/// # Errors
/// As [`rows`].
pub fn dolly(path: &Path, lists: Arc<Lists>) -> Result<Offers> {
    let rows = rows(path, &["instruction", "context", "category"])?;
    Ok(SourceRows::new(rows, move |row| read(row, &lists)))
}

fn read(mut row: Value, lists: &Lists) -> std::result::Result<Offer, Fault> {
    let instruction = row.take_text("instruction")?;
    let category = row.take_text("category")?;
    let context = row.take_optional_text("context")?.unwrap_or_default();
    Ok(if !lists.dolly_categories.contains(&category) {
        Offer::unfit(DropReason::OtherCategory, instruction)
    } else if !context.is_empty() {
        Offer::unfit(DropReason::HasContext, instruction)
    } else {
        Offer::prompt(Source::Dolly, instruction)
    })
}
