//! Training rows as text, which words the model reads and which it learns, and as tokens.

use std::path::{Path, PathBuf};

use dromedary_records::TrainingRow;
use dromedary_tokenizer::Tokenizer;
use rayon::prelude::*;

use crate::{
    audit::Audit,
    collate::{CollateConfig, Example, Sides},
    error::{Error, Result},
};

/// The turn mark under which the model answers.
const ANSWER_MARK: &str = "### Dromedary";
/// The turn mark that ends a complete answer.
const NEXT_TURN: &str = "### User";

/// How the rows of a data set become tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct DataConfig {
    /// Tokenizer file or folder.
    pub tokenizer: PathBuf,
    /// File of rows.
    pub dataset: PathBuf,
    /// Rows to use, from the first on.
    pub max_train_samples: Option<usize>,
    /// Leave rows without a target token out instead of refusing them.
    pub drop_empty: bool,
    /// Glob of the short system prompts; rows may bring their own.
    pub meta_prompt_pattern: Option<String>,
    /// Truncation and labels.
    pub collate: CollateConfig,
}

/// The rows of a file that have something to learn, as tokens, and what is to be known of all.
#[derive(Clone, Debug)]
pub struct Dataset {
    /// Rows with a target, in the order of the file.
    pub examples: Vec<Example>,
    /// Counts over all rows.
    pub audit: Audit,
    path: PathBuf,
}

impl Dataset {
    /// Reads the first `limit` rows of `path` as `config` says; its own data set and limit are not
    /// looked at.
    ///
    /// # Errors
    /// If the file or the meta prompts cannot be read, a row is malformed or has no meta prompt.
    pub fn read(
        path: &Path,
        limit: Option<usize>,
        config: &DataConfig,
        tokenizer: &Tokenizer,
    ) -> Result<Self> {
        let meta_prompts = match &config.meta_prompt_pattern {
            Some(pattern) => MetaPrompts::open(pattern)?,
            None => MetaPrompts::default(),
        };
        let rows = read_rows(path, limit)?;
        let encode = |(index, row): (usize, &TrainingRow)| {
            let text =
                meta_prompts.source_target(row).ok_or_else(|| Error::NoMetaPromptForRow {
                    path: path.to_owned(),
                    row: index + 1,
                    example_id: row.example_id,
                })?;
            Ok(Sides::encode(&text, tokenizer, &config.collate))
        };
        let sides = rows.par_iter().enumerate().map(encode).collect::<Result<Vec<_>>>()?;

        let mut examples = Vec::with_capacity(rows.len());
        let mut audit = Audit::new(&config.collate);
        for (index, (row, sides)) in rows.iter().zip(sides).enumerate() {
            let lengths = [sides.source.len(), sides.target.len()];
            let example = sides.joined(row.example_id, &config.collate);
            if row.output.trim().is_empty() || example.num_targets() == 0 {
                audit.add_without_target(index + 1, row.example_id);
                continue;
            }
            let ends = ends_in_stop_mark(row, &example, tokenizer, &config.collate);
            audit.add(&example, lengths, ends, meta_prompts.name_for(row));
            examples.push(example);
        }
        Ok(Self { examples, audit, path: path.to_owned() })
    }

    /// Refuses what cannot be trained on: no row at all, or rows without a target unless these are
    /// to be dropped.
    ///
    /// # Errors
    /// [`Error::NoTarget`] and [`Error::EmptyDataset`].
    pub fn check(&self, drop_empty: bool) -> Result<()> {
        let path = self.path.clone();
        if let (false, Some(&(row, example_id))) = (drop_empty, self.audit.without_target.first()) {
            let count = self.audit.without_target.len();
            return Err(Error::NoTarget { path, count, row, example_id });
        }
        if self.examples.is_empty() {
            return Err(Error::EmptyDataset { path });
        }
        Ok(())
    }
}

/// Whether a model that learned this target would end its answer there.
fn ends_in_stop_mark(
    row: &TrainingRow,
    example: &Example,
    tokenizer: &Tokenizer,
    config: &CollateConfig,
) -> bool {
    let ends_in_eos = config.add_eos_to_target && tokenizer.eos_id().is_some();
    example.truncated_right == 0 && (ends_in_eos || row.output.trim_end().ends_with(NEXT_TURN))
}

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
/// A row that brings none of its own reads the `example_id mod n`-th of them, as `finetune_qlora` of
/// Dromedary has it; there the order came from an unsorted glob.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
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

    /// Puts a row into Dromedary's form: `{meta prompt}\n{instruction}\n\n### Dromedary` and
    /// `\n{output}`; an input stands between instruction and mark, with a blank line on both sides.
    ///
    /// A row that brings a meta prompt keeps it. `None` where it brings none and there are no files.
    pub fn source_target(&self, row: &TrainingRow) -> Option<SourceTarget> {
        let TrainingRow { example_id, instruction, input, output, meta_prompt } = row;
        let meta_prompt = match (meta_prompt, self.index_for(*example_id)) {
            (Some(own), _) => own.trim(),
            (None, index) => self.texts[index?].trim(),
        };
        let source = if input.is_empty() {
            format!("{meta_prompt}\n{instruction}\n\n{ANSWER_MARK}")
        } else {
            format!("{meta_prompt}\n{instruction}\n\n{input}\n\n{ANSWER_MARK}")
        };
        Some(SourceTarget { example_id: *example_id, source, target: format!("\n{output}") })
    }

    /// Which of the files a row reads; `None` where there are none.
    fn index_for(&self, example_id: u64) -> Option<usize> {
        example_id.checked_rem(self.texts.len() as u64).map(|index| index as usize)
    }

    /// Name of the meta prompt that a row reads, for people.
    fn name_for(&self, row: &TrainingRow) -> String {
        match (&row.meta_prompt, self.index_for(row.example_id)) {
            (None, Some(index)) => self.paths[index].display().to_string(),
            _ => "the row's own".to_owned(),
        }
    }
}

fn read_text(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).map_err(|source| Error::Io { path: path.to_owned(), source })
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
            meta_prompt: None,
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
        let plain = meta_prompts.source_target(&row(1, "")).unwrap();
        assert_eq!(plain.source, "# D\n\n### User\nName a river.\n\n### Dromedary");
        assert_eq!(plain.target, "\nThe Rhine.\n\n### User\n");
        let with_input = meta_prompts.source_target(&row(1, "In Asia.")).unwrap();
        assert_eq!(
            with_input.source,
            "# D\n\n### User\nName a river.\n\nIn Asia.\n\n### Dromedary"
        );
    }

    #[test]
    fn the_example_id_chooses_among_sorted_files() {
        let (_dir, meta_prompts) = meta_prompts(&["zero", "one", "two"]);
        for (example_id, start) in [(1, "one\n"), (3, "zero\n"), (5, "two\n")] {
            let text = meta_prompts.source_target(&row(example_id, "")).unwrap();
            assert!(text.source.starts_with(start));
        }
    }

    #[test]
    fn a_row_keeps_the_meta_prompt_it_brings() {
        let (_dir, meta_prompts) = meta_prompts(&["zero", "one"]);
        let own = TrainingRow { meta_prompt: Some(" own\n".into()), ..row(1, "") };
        for meta_prompts in [meta_prompts, MetaPrompts::default()] {
            let text = meta_prompts.source_target(&own).unwrap();
            assert_eq!(text.source, "own\nName a river.\n\n### Dromedary");
            assert_eq!(meta_prompts.name_for(&own), "the row's own");
        }
        assert_eq!(MetaPrompts::default().source_target(&row(1, "")), None);
    }

    #[test]
    fn a_pattern_without_files_is_named() {
        let error = MetaPrompts::open("/nonexistent/*_prompt.txt").unwrap_err();
        assert!(error.to_string().contains("/nonexistent/*_prompt.txt"));
    }
}
