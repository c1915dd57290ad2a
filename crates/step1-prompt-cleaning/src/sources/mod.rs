//! The four sources of prompts as iterators of one schema.
//!
//! Reading has two steps. [`rows`] gives the rows of a file, whatever its format, as [`Value`]s with
//! their numbers; a source then reads an [`Offer`] out of each, the one schema of all. So each format
//! is read in one place, and a row of the wrong shape is a [`Fault`] of that row, not of the file.

mod bad_rows;
mod dolly;
mod hub;
mod json;
mod oasst;
mod offer;
mod openorca;
mod parquet;
mod sharegpt;
mod value;

use std::path::Path;

pub(crate) use bad_rows::BadRows;
pub use dolly::dolly;
pub(crate) use hub::refuse_hub_name;
pub use oasst::oasst;
pub use offer::{Offer, Offers, openorca, prompts};
pub use openorca::{OpenOrcaQuestion, Stratum};
pub use sharegpt::sharegpt;
pub use value::Value;

use crate::Result;

/// Why a row cannot be read; "row 7 of FILE" goes before it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault(pub String);

/// A row of a file.
#[derive(Clone, Debug, PartialEq)]
pub struct Row<T> {
    /// Its number in the file, from 1; blank lines do not count.
    pub number: u64,
    /// Its content, or why it has none.
    pub content: std::result::Result<T, Fault>,
}

impl<T> Row<T> {
    /// The row with its content changed.
    pub fn map<U>(self, change: impl FnOnce(T) -> U) -> Row<U> {
        Row { number: self.number, content: self.content.map(change) }
    }
}

impl Row<Value> {
    /// Reads a source's prompt out of the row.
    pub fn read<T>(self, prompt: impl FnOnce(Value) -> std::result::Result<T, Fault>) -> Row<T> {
        Row { number: self.number, content: self.content.and_then(prompt) }
    }
}

/// The rows of a file, in its order.
pub type Rows = Box<dyn Iterator<Item = Result<Row<Value>>>>;

/// The rows of a `.parquet` file (of these columns alone), a JSON array, or JSON lines.
///
/// # Errors
/// A file that cannot be opened, is damaged, or is a parquet file without one of the columns.
pub fn rows(path: &Path, columns: &[&'static str]) -> Result<Rows> {
    if is_parquet(path) { parquet::rows(path, columns) } else { json::rows(path) }
}

fn is_parquet(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("parquet"))
}
