//! The four sources of prompts as iterators of one schema.
//!
//! Reading has two steps. [`rows`] finds the rows of a file, whatever its format, and numbers them;
//! a source then reads an [`Offer`] out of the [`Value`] of each, the one schema of all. So each
//! format is read in one place, a row of the wrong shape is a [`Fault`] of that row and not of the
//! file, and the second step, which is most of the work, can be done by several threads. A file is
//! never in memory as a whole.

mod bad_rows;
mod dolly;
mod files;
mod hub;
mod json;
mod oasst;
mod offer;
mod openorca;
mod parquet;
mod sharegpt;
mod value;

use std::fmt;
use std::path::Path;
use std::sync::Arc;

pub(crate) use bad_rows::BadRows;
pub use dolly::dolly;
pub(crate) use files::{found_files, one_or_many};
pub(crate) use hub::refuse_hub_name;
pub use oasst::{AnsweredMessages, oasst, oasst_part};
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

/// A row that was found in its file and not looked into yet: that is most of the work of reading,
/// and any thread can do it.
#[derive(Clone, Debug)]
pub struct RawRow {
    number: u64,
    content: RawContent,
}

#[derive(Clone, Debug)]
enum RawContent {
    Json(dromedary_records::RawRow),
    Parquet(Arc<parquet::Slice>, usize),
}

impl RawRow {
    /// Looks into the row.
    pub fn parse(&self) -> Row<Value> {
        let content = match &self.content {
            RawContent::Json(row) => json::parse(row),
            RawContent::Parquet(slice, index) => Ok(slice.row(*index)),
        };
        Row { number: self.number, content }
    }

    /// The bytes that are held for it alone.
    pub(crate) fn bytes(&self) -> usize {
        match &self.content {
            RawContent::Json(row) => row.text().len(),
            RawContent::Parquet(slice, index) => slice.bytes(*index),
        }
    }
}

/// The rows of a file, in its order, not looked into yet.
pub struct RawRows {
    rows: Box<dyn Iterator<Item = Result<RawRow>> + Send>,
    share: Share,
}

/// Tells how much of a file has been read.
type Share = Box<dyn Fn() -> f64 + Send + Sync>;

impl RawRows {
    /// The share of the file that has been read, from 0 to 1.
    pub fn share(&self) -> f64 {
        (self.share)()
    }
}

impl Iterator for RawRows {
    type Item = Result<RawRow>;

    fn next(&mut self) -> Option<Result<RawRow>> {
        self.rows.next()
    }
}

impl fmt::Debug for RawRows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RawRows").field("share", &self.share()).finish_non_exhaustive()
    }
}

/// The rows of a `.parquet` file (of these columns alone), a JSON array, or JSON lines.
///
/// # Errors
/// A file that cannot be opened, is damaged, or is a parquet file without one of the columns.
pub fn rows(path: &Path, columns: &[&'static str]) -> Result<RawRows> {
    if is_parquet(path) { parquet::rows(path, columns) } else { json::rows(path) }
}

/// The rows of a file as a source reads them: an iterator of [`Row`]s.
pub struct SourceRows<T> {
    raw: RawRows,
    read: Read<T>,
}

/// What a source makes of a row.
pub(crate) type Read<T> = Box<dyn Fn(RawRow) -> Row<T> + Send + Sync>;

impl<T: 'static> SourceRows<T> {
    /// Rows out of each of which `prompt` reads something.
    pub fn new(
        raw: RawRows,
        prompt: impl Fn(Value) -> std::result::Result<T, Fault> + Send + Sync + 'static,
    ) -> SourceRows<T> {
        SourceRows { raw, read: Box::new(move |row| row.parse().read(&prompt)) }
    }

    /// The rows with their contents changed.
    pub fn map_contents<U>(self, change: impl Fn(T) -> U + Send + Sync + 'static) -> SourceRows<U> {
        let read = self.read;
        SourceRows { raw: self.raw, read: Box::new(move |row| read(row).map(&change)) }
    }

    /// What finds the rows, and what looks into them on any thread.
    pub(crate) fn into_parts(self) -> (RawRows, Read<T>) {
        (self.raw, self.read)
    }
}

impl<T> Iterator for SourceRows<T> {
    type Item = Result<Row<T>>;

    fn next(&mut self) -> Option<Result<Row<T>>> {
        Some(self.raw.next()?.map(&self.read))
    }
}

impl<T> fmt::Debug for SourceRows<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SourceRows").field("raw", &self.raw).finish_non_exhaustive()
    }
}

fn is_parquet(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("parquet"))
}
