use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::{Error, Prompt, RawRow, RawRows, Result, RowIds, UNKNOWN_SOURCE, read_raw_rows};

/// The prompts of a file; see [`read_prompts`].
#[derive(Debug)]
pub struct Prompts {
    path: PathBuf,
    rows: RawRows,
    ids: RowIds,
    /// From an id to its row.
    seen: BTreeMap<String, u64>,
    row: u64,
}

/// A prompt as files have it; Dromedary's have neither id nor source.
#[derive(Debug, Deserialize)]
struct PromptRow {
    id: Option<String>,
    source: Option<String>,
    instruction: String,
    #[serde(default)]
    input: String,
}

/// A row of a file of prompts, whatever it holds; see [`Prompts::with_bad_rows`].
#[derive(Debug)]
pub enum FoundPrompt {
    /// It is one.
    Good(Prompt),
    /// It is none.
    Bad(BadPrompt),
}

/// A row of a file of prompts that is no prompt.
#[derive(Debug)]
pub struct BadPrompt {
    /// Depends on the row's text and on how many equal ones precede it, as the id of a prompt does.
    pub id: String,
    /// The row as it stands in the file.
    pub text: String,
    /// What is wrong with it, and which one it is.
    pub error: Error,
}

/// Reads prompts as [`read_rows`](crate::read_rows) does, and completes those of other programs: the source is
/// [`UNKNOWN_SOURCE`] and the id is the [`row_id`](crate::row_id) where they have none.
///
/// Ids are unique within the file: [`Error::SameId`] where it gives one twice.
///
/// # Errors
/// As [`read_rows`](crate::read_rows).
pub fn read_prompts(path: impl AsRef<Path>) -> Result<Prompts> {
    Ok(Prompts {
        path: path.as_ref().to_owned(),
        rows: read_raw_rows(path)?,
        ids: RowIds::default(),
        seen: BTreeMap::new(),
        row: 0,
    })
}

impl Prompts {
    /// The same rows where one that is no prompt (another type, a field missing, an id that was
    /// there before) is an item and no error. Errors are left for files that cannot be read on.
    pub fn with_bad_rows(mut self) -> impl Iterator<Item = Result<FoundPrompt>> {
        std::iter::from_fn(move || {
            let raw = match self.next_raw()? {
                Ok(raw) => raw,
                Err(error) => return Some(Err(error)),
            };
            Some(Ok(match self.parse(&raw) {
                Ok(prompt) => FoundPrompt::Good(prompt),
                Err(error) => FoundPrompt::Bad(self.bad(&raw, error)),
            }))
        })
    }

    fn next_raw(&mut self) -> Option<Result<RawRow>> {
        self.row += 1;
        self.rows.next()
    }

    fn parse(&mut self, raw: &RawRow) -> Result<Prompt> {
        raw.parse().and_then(|row| self.complete(row))
    }

    fn bad(&mut self, raw: &RawRow, error: Error) -> BadPrompt {
        let text = String::from_utf8_lossy(raw.text()).trim().to_owned();
        // No prompt has an empty source and its own JSON as instruction.
        BadPrompt { id: self.ids.next_id("", &text, ""), text, error }
    }

    fn complete(&mut self, row: PromptRow) -> Result<Prompt> {
        let PromptRow { id, source, instruction, input } = row;
        let source = source.unwrap_or_else(|| UNKNOWN_SOURCE.to_owned());
        let id = id.unwrap_or_else(|| self.ids.next_id(&source, &instruction, &input));
        match self.seen.insert(id.clone(), self.row) {
            None => Ok(Prompt { id, source, instruction, input }),
            Some(first) => {
                Err(Error::SameId { path: self.path.clone(), id, first, second: self.row })
            }
        }
    }
}

impl Iterator for Prompts {
    type Item = Result<Prompt>;

    fn next(&mut self) -> Option<Result<Prompt>> {
        let raw = self.next_raw()?;
        Some(raw.and_then(|raw| self.parse(&raw)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn found(text: &str) -> Vec<FoundPrompt> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("prompts.json");
        fs::write(&path, text).unwrap();
        read_prompts(path).unwrap().with_bad_rows().map(Result::unwrap).collect()
    }

    #[test]
    fn rows_that_are_no_prompts_are_found_between_the_others() {
        let text = r#"[{"instruction": 5}, {"instruction": "a", "id": "x"}, null, [],
            {"instruction": "b", "id": "x"}, {"input": "c"}, null, {"instruction": "d"}]"#;
        let found = found(text);
        let good = |row: &FoundPrompt| matches!(row, FoundPrompt::Good(_));
        let places: Vec<usize> = (1..9).filter(|&row| good(&found[row - 1])).collect();
        assert_eq!(places, [2, 8]);
        let bad: Vec<&BadPrompt> = found
            .iter()
            .filter_map(|row| match row {
                FoundPrompt::Bad(bad) => Some(bad),
                FoundPrompt::Good(_) => None,
            })
            .collect();
        assert!(bad[0].error.to_string().contains("row 1: invalid type: integer `5`"));
        assert_eq!(bad[0].text, r#"{"instruction": 5}"#);
        assert!(matches!(bad[3].error, Error::SameId { first: 2, second: 5, .. }));
        let ids: std::collections::BTreeSet<&str> = bad.iter().map(|bad| bad.id.as_str()).collect();
        assert_eq!(ids.len(), 6, "two equal bad rows have ids of their own");
    }

    #[test]
    fn a_file_that_ends_within_a_row_is_an_error_all_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("prompts.json");
        fs::write(&path, r#"[{"instruction": "a"}, {"instruc"#).unwrap();
        let last = read_prompts(path).unwrap().with_bad_rows().last().unwrap();
        assert!(matches!(last.unwrap_err(), Error::Array { .. }));
    }
}
