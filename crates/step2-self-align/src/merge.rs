//! From the files of all groups to the rows that step 3 trains on.

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use dromedary_files::Error as FilesError;
use dromedary_records::{
    AlignedResponse, Error as RecordsError, RowWriter, TrainingRow, read_rows,
};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::filter::{Compat, Filter, Kept, Rule, Verdict};
use crate::output::StoredRow;
use crate::report::{Report, Tally};
use crate::shards::{check_complete, write_json};
use crate::{Error, Form, MetaPrompt, Result, identity, report_page};

/// Settings of [`merge_and_filter`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct MergeConfig {
    /// Pattern of the files to merge; they are taken in the order of their names.
    pub data_file_pattern: String,
    /// Identity conversations to add.
    pub dummy_data_file: Option<PathBuf>,
    /// The training rows.
    pub output_file: PathBuf,
    /// Every dropped row with the rule that dropped it.
    pub dropped_file: PathBuf,
    /// Counts by rule and source.
    pub report_file: PathBuf,
    /// The same and more as a page for people.
    pub page_file: PathBuf,
    /// How many identity rows are added at most.
    pub max_identity_rows: IdentityLimit,
    /// What the rows were generated with.
    pub template: Form,
    /// The meta prompt that the rows were generated behind; the built-in one where absent.
    pub meta_prompt_file: Option<PathBuf>,
    /// Whose rules to follow instead of the corrected ones.
    pub compat: Option<Compat>,
    /// Merge files that generation has not finished.
    pub allow_unfinished: bool,
    /// Seed of the shuffle and of the choice of identity rows.
    pub seed: u64,
}

/// How many identity rows are added at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum IdentityLimit {
    /// This many.
    Rows(u64),
    /// What the word says.
    Word(IdentityWord),
}

/// Limits that depend on the rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum IdentityWord {
    /// No limit.
    All,
    /// As many as rows passed the filter.
    Survivors,
}

impl IdentityLimit {
    fn rows(self, survivors: usize) -> usize {
        match self {
            IdentityLimit::Rows(rows) => usize::try_from(rows).unwrap_or(usize::MAX),
            IdentityLimit::Word(IdentityWord::Survivors) => survivors,
            IdentityLimit::Word(IdentityWord::All) => usize::MAX,
        }
    }
}

impl fmt::Display for IdentityLimit {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            IdentityLimit::Rows(rows) => write!(formatter, "{rows}"),
            IdentityLimit::Word(IdentityWord::All) => formatter.write_str("all"),
            IdentityLimit::Word(IdentityWord::Survivors) => formatter.write_str("survivors"),
        }
    }
}

impl FromStr for IdentityLimit {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "all" => Ok(IdentityLimit::Word(IdentityWord::All)),
            "survivors" => Ok(IdentityLimit::Word(IdentityWord::Survivors)),
            number => number
                .parse()
                .map(IdentityLimit::Rows)
                .map_err(|_| "expected a number of rows, `survivors` or `all`".to_owned()),
        }
    }
}

/// A line of the file of dropped rows.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[non_exhaustive]
pub struct DroppedRow {
    /// The rule that dropped it.
    pub rule: Rule,
    /// Why generation rejected the prompt, where it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The row as generation left it.
    #[serde(flatten)]
    pub row: AlignedResponse,
}

/// Filters the rows of all groups, adds identity rows, numbers all from 1, shuffles, and writes
/// `output_file`, `dropped_file` and `report_file`.
///
/// Numbers are given in the order of files and lines, identity rows last, before the shuffle: an
/// `example_id` does not depend on the seed. Dromedary leaves the identity rows without one, where
/// its own step 3 then stops.
///
/// # Errors
/// [`Error::NoShards`] where no file matches, [`Error::Unfinished`] where one is not finished,
/// [`Error::NothingLeft`] where no row passes the filter (the dropped rows are written, the
/// training rows are not), [`Error::Records`] naming file and line of a row that cannot be read.
pub fn merge_and_filter(config: &MergeConfig) -> Result<Report> {
    let meta_prompt = MetaPrompt::open_as(config.template, config.meta_prompt_file.as_deref())?;
    let paths = matching_files(&config.data_file_pattern)?;
    if !config.allow_unfinished {
        check_complete(&paths, &config.data_file_pattern)?;
    }
    let identity = match &config.dummy_data_file {
        Some(path) => identity::read(path, &meta_prompt.principles.names, config.compat)?,
        None => Vec::new(),
    };
    let mut sieve = Sieve::new(config, &meta_prompt)?;
    for path in &paths {
        for row in read_rows::<StoredRow>(path)? {
            match row {
                // A run was killed here; another one has answered that prompt, or will.
                Err(RecordsError::File(FilesError::TornTail { path, line })) => {
                    tracing::warn!("{}, line {line}: a row cut off is left out", path.display());
                }
                row => sieve.take(row?)?,
            }
        }
    }
    let Sieve { mut tally, kept, dropped, .. } = sieve;
    dropped.finish()?;
    let mut random = ChaCha8Rng::seed_from_u64(config.seed);
    let identity = chosen(identity, config.max_identity_rows.rows(kept.len()), &mut random);
    tally.report.identity = if kept.is_empty() { 0 } else { identity.len() as u64 };
    report_page::write(&tally, config, &paths)?;
    let report = tally.report;
    if kept.is_empty() {
        return Err(Error::NothingLeft {
            dropped_file: config.dropped_file.clone(),
            report: Box::new(report),
        });
    }
    write_rows(&config.output_file, kept, identity, &mut random)?;
    write_json(&config.report_file, &report)?;
    Ok(report)
}

/// The files of a pattern in the order of their names: Dromedary's order is that of the folder,
/// and with it the numbers of its rows.
fn matching_files(pattern: &str) -> Result<Vec<PathBuf>> {
    let matches = glob::glob(pattern).map_err(|error| Error::Pattern {
        pattern: pattern.to_owned(),
        message: error.to_string(),
    })?;
    let mut paths = Vec::new();
    for path in matches {
        let path = path
            .map_err(|error| Error::Read { path: error.path().to_owned(), source: error.into() })?;
        if path.is_file() {
            paths.push(path);
        }
    }
    paths.sort();
    if paths.is_empty() {
        return Err(Error::NoShards { pattern: pattern.to_owned() });
    }
    Ok(paths)
}

/// Takes rows, keeps what passes and writes down what does not.
struct Sieve {
    filter: Filter,
    ids: BTreeSet<String>,
    kept: Vec<Kept>,
    dropped: RowWriter,
    tally: Tally,
}

impl Sieve {
    fn new(config: &MergeConfig, meta_prompt: &MetaPrompt) -> Result<Self> {
        Ok(Self {
            filter: Filter::new(config.compat, meta_prompt),
            ids: BTreeSet::new(),
            kept: Vec::new(),
            dropped: RowWriter::jsonl(&config.dropped_file)?,
            tally: Tally::new(meta_prompt),
        })
    }

    fn take(&mut self, stored: StoredRow) -> Result<()> {
        let StoredRow { row, reason } = stored;
        let verdict = if self.ids.insert(row.id.clone()) {
            self.filter.judge(&row)
        } else {
            Verdict::Dropped(Rule::SameId)
        };
        self.tally.count(&row, reason.as_deref(), &verdict);
        match verdict {
            Verdict::Kept(kept) => self.kept.push(kept),
            Verdict::Dropped(rule) => self.dropped.write(&DroppedRow { rule, reason, row })?,
        }
        Ok(())
    }
}

/// At most `limit` of the rows, chosen at random where there are more, in their old order.
fn chosen(rows: Vec<Kept>, limit: usize, random: &mut ChaCha8Rng) -> Vec<Kept> {
    if rows.len() <= limit {
        return rows;
    }
    let mut places: Vec<usize> = (0..rows.len()).collect();
    places.shuffle(random);
    let places: BTreeSet<usize> = places.into_iter().take(limit).collect();
    let rows = rows.into_iter().enumerate().filter(|(place, _)| places.contains(place));
    rows.map(|(_, row)| row).collect()
}

fn write_rows(
    path: &Path,
    kept: Vec<Kept>,
    identity: Vec<Kept>,
    random: &mut ChaCha8Rng,
) -> Result<()> {
    let mut rows: Vec<TrainingRow> = kept
        .into_iter()
        .chain(identity)
        .zip(1..)
        .map(|(Kept { instruction, input, output }, example_id)| TrainingRow {
            example_id,
            instruction,
            input,
            output,
            meta_prompt: None,
        })
        .collect();
    rows.shuffle(random);
    let mut writer = RowWriter::create(path)?;
    for row in &rows {
        writer.write(row)?;
    }
    writer.finish()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(count: usize) -> Vec<Kept> {
        let row = |index: usize| Kept {
            instruction: index.to_string(),
            input: String::new(),
            output: String::new(),
        };
        (0..count).map(row).collect()
    }

    #[test]
    fn limits_of_identity_rows_are_read_as_they_are_printed() {
        for text in ["all", "survivors", "0", "32"] {
            assert_eq!(text.parse::<IdentityLimit>().unwrap().to_string(), text);
        }
        assert!("many".parse::<IdentityLimit>().is_err());
        assert_eq!("survivors".parse::<IdentityLimit>().unwrap().rows(7), 7);
        assert_eq!("9".parse::<IdentityLimit>().unwrap().rows(7), 9);
    }

    #[test]
    fn identity_rows_are_chosen_from_all_and_keep_their_order() {
        let mut random = ChaCha8Rng::seed_from_u64(1);
        let rows = chosen(kept(100), 10, &mut random);
        let places: Vec<usize> = rows.iter().map(|row| row.instruction.parse().unwrap()).collect();
        assert_eq!(places.len(), 10);
        assert!(places.is_sorted());
        assert!(places[9] > 20, "{places:?}");
        assert_eq!(chosen(kept(3), 10, &mut random).len(), 3);
    }
}
