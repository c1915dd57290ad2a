mod ledger;
mod page;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use dromedary_command::grouped;
use serde::{Deserialize, Serialize};

use crate::explain::Explanation;
use crate::{DropReason, Edit, Error, Result};
pub(crate) use ledger::{Entries, Ledger, RowName};

/// The drawn lengths are put into no more classes than this.
const CLASSES: u32 = 40;

/// What a command did to its rows: the content of `report.json`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The subcommand.
    pub command: String,
    /// The version of this crate.
    pub version: String,
    /// The resolved settings.
    pub settings: serde_json::Value,
    /// The files that were read, in order.
    pub inputs: Vec<InputFile>,
    /// The other files that the result depends on: tokenizer, lists, benchmarks.
    pub references: Vec<HashedFile>,
    /// The file that was written.
    pub output: PathBuf,
    /// The rows in it.
    pub rows_out: u64,
    /// What happened to the rows, by source (in `subsample-openorca` by stratum).
    pub sources: BTreeMap<String, SourceCounts>,
    /// How long the rows are that were written; only with `--report` and a command that counts
    /// tokens.
    pub token_lengths: TokenLengths,
    /// Some rows of every source and reason; only with `--report`.
    pub samples: Vec<Sample>,
    /// What happened to the row of `--explain`.
    #[serde(skip)]
    pub explanation: Option<Explanation>,
}

/// Rows by their number of tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenLengths {
    /// Lengths from `i * width` to below `(i + 1) * width` are counted in place `i`.
    pub width: u32,
    /// The rows of each source, in places up to the longest of all.
    pub sources: BTreeMap<String, Vec<u64>>,
}

impl TokenLengths {
    fn of(lengths: &BTreeMap<String, BTreeMap<u32, u64>>) -> TokenLengths {
        let longest = lengths.values().filter_map(|rows| rows.keys().next_back()).max();
        let width = longest.map_or(1, |longest| (longest + 1).div_ceil(CLASSES));
        let classes = longest.map_or(0, |longest| longest / width + 1);
        let classed = |rows: &BTreeMap<u32, u64>| {
            let mut counts = vec![0; classes as usize];
            for (len, rows) in rows {
                counts[(len / width) as usize] += rows;
            }
            counts
        };
        let sources = lengths.iter().map(|(source, rows)| (source.clone(), classed(rows)));
        TokenLengths { width, sources: sources.collect() }
    }
}

/// A row that was changed or left out, shown as an example.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    /// The source (or stratum) that it is counted under.
    pub source: String,
    /// Its name, which `--explain` takes: the source and the number of the row in it.
    pub row: String,
    /// Why it was changed.
    pub edit: Option<String>,
    /// Why it was left out.
    pub drop: Option<String>,
    /// What in it gave the reason.
    pub detail: String,
    /// The text; cut in its middle if it is long.
    pub before: String,
    /// The text behind the edit.
    pub after: Option<String>,
}

/// A file and the hash of its content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HashedFile {
    /// As given.
    pub path: PathBuf,
    /// The BLAKE3 hash; none of what is no file.
    pub blake3: Option<String>,
}

impl HashedFile {
    /// The file, not yet hashed.
    pub(crate) fn of(path: PathBuf) -> HashedFile {
        HashedFile { path, blake3: None }
    }
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
    /// The BLAKE3 hash of its content; only with `--report`, and none of what is no file.
    pub blake3: Option<String>,
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

    fn add(&mut self, other: &SourceCounts) {
        self.rows += other.rows;
        self.edited += other.edited;
        self.kept += other.kept;
        for (reason, rows) in &other.edits {
            *self.edits.entry(reason.clone()).or_default() += rows;
        }
        for (reason, rows) in &other.dropped {
            *self.dropped.entry(reason.clone()).or_default() += rows;
        }
    }

    /// The rows left out for any reason.
    pub fn dropped_rows(&self) -> u64 {
        self.dropped.values().sum()
    }
}

impl Report {
    /// Takes over what the ledger counted and kept.
    pub(crate) fn enter(&mut self, entries: Entries) {
        self.rows_out = entries.counts.values().map(|counts| counts.kept).sum();
        self.sources = entries.counts;
        self.token_lengths = TokenLengths::of(&entries.lengths);
        self.samples = entries.samples;
    }

    /// Notes the hashes of all files.
    pub(crate) fn hash_files(&mut self) -> Result<()> {
        for input in &mut self.inputs {
            input.blake3 = hash(&input.path)?;
        }
        for file in &mut self.references {
            file.blake3 = hash(&file.path)?;
        }
        Ok(())
    }

    /// Logs one line a source.
    pub(crate) fn log(&self) {
        for (source, counts) in &self.sources {
            let (rows, kept) = (grouped(counts.rows), grouped(counts.kept));
            let (dropped, edited) = (listed(&counts.dropped), listed(&counts.edits));
            tracing::info!(
                "{source}: {rows} rows, {kept} kept; dropped: {dropped}; edited: {edited}"
            );
        }
        let rows = grouped(self.rows_out);
        tracing::info!("{rows} rows written to {}", self.output.display());
    }

    /// The error of a command that nothing came out of.
    pub(crate) fn none_left(&self) -> Error {
        let all = self.all();
        let (dropped, output) = (listed(&all.dropped), self.output.clone());
        Error::NoneLeft { rows: all.rows, dropped, output }
    }

    /// The counts of all sources together.
    fn all(&self) -> SourceCounts {
        let mut all = SourceCounts::default();
        self.sources.values().for_each(|counts| all.add(counts));
        all
    }

    /// Writes `report.json` and `report.html` into the folder.
    pub(crate) fn write(&self, folder: &Path) -> Result<()> {
        let page = self.page().render().map_err(|source| Error::Page { source })?;
        dromedary_files::write_atomic(folder.join("report.html"), page.as_bytes())?;
        let path = folder.join("report.json");
        let mut text =
            serde_json::to_string_pretty(self).map_err(|source| Error::EncodeReport { source })?;
        text.push('\n');
        dromedary_files::write_atomic(&path, text.as_bytes())?;
        Ok(())
    }
}

/// The hash of a file; a pipe cannot be read again, a folder has none.
fn hash(path: &Path) -> Result<Option<String>> {
    if !path.is_file() {
        return Ok(None);
    }
    Ok(Some(dromedary_files::hash_file(path)?))
}

fn listed(counts: &BTreeMap<String, u64>) -> String {
    if counts.is_empty() {
        return "none".to_owned();
    }
    let entries: Vec<String> =
        counts.iter().map(|(reason, rows)| format!("{} {reason}", grouped(*rows))).collect();
    entries.join(", ")
}
