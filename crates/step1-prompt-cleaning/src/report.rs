use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{DropReason, Edit, Error, Result};

/// What a command did to its rows: the content of `report.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The subcommand.
    pub command: String,
    /// The version of this crate.
    pub version: String,
    /// The resolved settings.
    pub settings: serde_json::Value,
    /// The files that were read, in order.
    pub inputs: Vec<InputFile>,
    /// The file that was written.
    pub output: PathBuf,
    /// The rows in it.
    pub rows_out: u64,
    /// What happened to the rows, by source (in `subsample-openorca` by stratum).
    pub sources: BTreeMap<String, SourceCounts>,
}

/// A file that was read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InputFile {
    /// As given.
    pub path: PathBuf,
    /// The rows in it, bad ones counted.
    pub rows: u64,
    /// The rows that could not be read.
    pub bad_rows: u64,
}

/// What happened to the rows of a source; `rows` is `kept` plus all of `dropped`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceCounts {
    /// Rows read.
    pub rows: u64,
    /// Rows that at least one rule changed, dropped ones included.
    pub edited: u64,
    /// Rows changed, by reason; a row may have several.
    pub edits: BTreeMap<String, u64>,
    /// Rows left out, by reason; a row has one.
    pub dropped: BTreeMap<String, u64>,
    /// Rows written.
    pub kept: u64,
}

impl SourceCounts {
    /// Counts the edits of one row.
    pub(crate) fn count_edits(&mut self, edits: &[Edit]) {
        self.edited += u64::from(!edits.is_empty());
        for edit in edits {
            *self.edits.entry(edit.name().to_owned()).or_default() += 1;
        }
    }

    /// Counts `rows` more rows as left out.
    pub(crate) fn count_drops(&mut self, reason: DropReason, rows: u64) {
        if rows > 0 {
            *self.dropped.entry(reason.name().to_owned()).or_default() += rows;
        }
    }

    /// One row that was counted as left out has another fate.
    pub(crate) fn take_back(&mut self, reason: DropReason) {
        if let Some(rows) = self.dropped.get_mut(reason.name()) {
            *rows -= 1;
            if *rows == 0 {
                self.dropped.remove(reason.name());
            }
        }
    }

    /// The rows left out for any reason.
    pub fn dropped_rows(&self) -> u64 {
        self.dropped.values().sum()
    }
}

impl Report {
    /// Logs one line a source.
    pub(crate) fn log(&self) {
        for (source, counts) in &self.sources {
            tracing::info!(
                "{source}: {} rows, {} kept; dropped: {}; edited: {}",
                counts.rows,
                counts.kept,
                listed(&counts.dropped),
                listed(&counts.edits),
            );
        }
        tracing::info!("{} rows written to {}", self.rows_out, self.output.display());
    }

    /// The error of a command that nothing came out of.
    pub(crate) fn none_left(&self) -> Error {
        let mut dropped = BTreeMap::new();
        for (reason, rows) in self.sources.values().flat_map(|counts| &counts.dropped) {
            *dropped.entry(reason.clone()).or_default() += rows;
        }
        Error::NoneLeft {
            rows: self.sources.values().map(|counts| counts.rows).sum(),
            dropped: listed(&dropped),
            output: self.output.clone(),
        }
    }

    /// Writes `report.json` into the folder.
    pub(crate) fn write(&self, folder: &Path) -> Result<()> {
        let path = folder.join("report.json");
        let mut text =
            serde_json::to_string_pretty(self).map_err(|source| Error::EncodeReport { source })?;
        text.push('\n');
        dromedary_files::write_atomic(&path, text.as_bytes())?;
        Ok(())
    }
}

fn listed(counts: &BTreeMap<String, u64>) -> String {
    if counts.is_empty() {
        return "none".to_owned();
    }
    let entries: Vec<String> =
        counts.iter().map(|(reason, rows)| format!("{rows} {reason}")).collect();
    entries.join(", ")
}
