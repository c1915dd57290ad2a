use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::{Error, Prompt, Result, RowIds, Rows, UNKNOWN_SOURCE, read_rows};

/// The prompts of a file; see [`read_prompts`].
#[derive(Debug)]
pub struct Prompts {
    path: PathBuf,
    rows: Rows<PromptRow>,
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

/// Reads prompts as [`read_rows`] does, and completes those of other programs: the source is
/// [`UNKNOWN_SOURCE`] and the id is the [`row_id`](crate::row_id) where they have none.
///
/// Ids are unique within the file: [`Error::SameId`] where it gives one twice.
///
/// # Errors
/// As [`read_rows`].
pub fn read_prompts(path: impl AsRef<Path>) -> Result<Prompts> {
    Ok(Prompts {
        path: path.as_ref().to_owned(),
        rows: read_rows(path)?,
        ids: RowIds::default(),
        seen: BTreeMap::new(),
        row: 0,
    })
}

impl Prompts {
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
        let row = self.rows.next()?;
        self.row += 1;
        Some(row.and_then(|row| self.complete(row)))
    }
}
