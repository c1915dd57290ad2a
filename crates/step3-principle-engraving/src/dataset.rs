//! Training rows as text: which words the model reads, and which it learns.

use std::path::{Path, PathBuf};

use dromedary_records::TrainingRow;

use crate::error::{Error, Result};

/// The turn mark under which the model answers.
const ANSWER_MARK: &str = "### Dromedary";

/// One row as text: `source` is read, `target` is learned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceTarget {
    /// The row's id, from 1.
    pub example_id: u64,
    /// Meta prompt, instruction, input and the answer's turn mark.
    pub source: String,
    /// A newline and the answer.
    pub target: String,
}

/// The short system prompts that take the place of the principles, in sorted order of their files.
///
/// A row reads the `example_id mod n`-th of them, as `finetune_qlora` of Dromedary has it; there the
/// order came from an unsorted glob.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetaPrompts {
    /// The files, sorted.
    pub paths: Vec<PathBuf>,
    texts: Vec<String>,
}

impl MetaPrompts {
    /// Reads all files that match the glob `pattern`.
    ///
    /// # Errors
    /// If the pattern is malformed, matches nothing, or a file cannot be read as UTF-8.
    pub fn open(pattern: &str) -> Result<Self> {
        let bad = |message: String| Error::BadPattern { pattern: pattern.to_owned(), message };
        let mut paths = glob::glob(pattern)
            .map_err(|error| bad(error.to_string()))?
            .collect::<std::result::Result<Vec<_>, _>>()
            .map_err(|error| bad(error.to_string()))?;
        if paths.is_empty() {
            return Err(Error::NoMetaPrompt { pattern: pattern.to_owned() });
        }
        paths.sort();
        let texts = paths.iter().map(|path| read_text(path)).collect::<Result<Vec<_>>>()?;
        Ok(Self { paths, texts })
    }

    /// The text for one row, without white space around it.
    fn for_example(&self, example_id: u64) -> &str {
        self.texts[(example_id % self.texts.len() as u64) as usize].trim()
    }
}

fn read_text(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).map_err(|source| Error::Io { path: path.to_owned(), source })
}

/// Puts a row into Dromedary's form: `{meta prompt}\n{instruction}\n\n### Dromedary` and
/// `\n{output}`; an input stands between instruction and mark, with a blank line on both sides.
pub fn source_target(row: &TrainingRow, meta_prompts: &MetaPrompts) -> SourceTarget {
    let meta_prompt = meta_prompts.for_example(row.example_id);
    let TrainingRow { instruction, input, output, .. } = row;
    let source = if input.is_empty() {
        format!("{meta_prompt}\n{instruction}\n\n{ANSWER_MARK}")
    } else {
        format!("{meta_prompt}\n{instruction}\n\n{input}\n\n{ANSWER_MARK}")
    };
    SourceTarget { example_id: row.example_id, source, target: format!("\n{output}") }
}

/// Reads the rows of a data set (JSON array or JSONL, also compressed), `limit` at most.
///
/// # Errors
/// If the file cannot be read, a row is malformed (the row is named), or there is none.
pub fn read_rows(path: &Path, limit: Option<usize>) -> Result<Vec<TrainingRow>> {
    let dataset = |source| Error::Dataset { path: path.to_owned(), source };
    let rows = dromedary_records::read_rows::<TrainingRow>(path)
        .map_err(dataset)?
        .take(limit.unwrap_or(usize::MAX))
        .collect::<std::result::Result<Vec<_>, _>>()
        .map_err(dataset)?;
    if rows.is_empty() {
        return Err(Error::EmptyDataset { path: path.to_owned() });
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(example_id: u64, input: &str) -> TrainingRow {
        TrainingRow {
            example_id,
            instruction: "Name a river.".into(),
            input: input.into(),
            output: "The Rhine.\n\n### User\n".into(),
        }
    }

    fn meta_prompts(texts: &[&str]) -> (tempfile::TempDir, MetaPrompts) {
        let dir = tempfile::tempdir().unwrap();
        // Written in reverse, so that directory order is unlikely to be the sorted one.
        for (index, text) in texts.iter().enumerate().rev() {
            std::fs::write(dir.path().join(format!("m{index}_prompt.txt")), text).unwrap();
        }
        let pattern = dir.path().join("m*_prompt.txt");
        let meta_prompts = MetaPrompts::open(pattern.to_str().unwrap()).unwrap();
        (dir, meta_prompts)
    }

    #[test]
    fn a_row_has_the_form_of_the_original() {
        let (_dir, meta_prompts) = meta_prompts(&["# D\n\n### User\n"]);
        let plain = source_target(&row(1, ""), &meta_prompts);
        assert_eq!(plain.source, "# D\n\n### User\nName a river.\n\n### Dromedary");
        assert_eq!(plain.target, "\nThe Rhine.\n\n### User\n");
        let with_input = source_target(&row(1, "In Asia."), &meta_prompts);
        assert_eq!(
            with_input.source,
            "# D\n\n### User\nName a river.\n\nIn Asia.\n\n### Dromedary"
        );
    }

    #[test]
    fn the_example_id_chooses_among_sorted_files() {
        let (_dir, meta_prompts) = meta_prompts(&["zero", "one", "two"]);
        for (example_id, start) in [(1, "one\n"), (3, "zero\n"), (5, "two\n")] {
            assert!(source_target(&row(example_id, ""), &meta_prompts).source.starts_with(start));
        }
    }

    #[test]
    fn a_pattern_without_files_is_named() {
        let error = MetaPrompts::open("/nonexistent/*_prompt.txt").unwrap_err();
        assert!(error.to_string().contains("/nonexistent/*_prompt.txt"));
    }
}
