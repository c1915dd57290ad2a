//! Training rows as text, which words the model reads and which it learns, and as tokens.

use std::{
    borrow::Borrow,
    fs::File,
    io::Read,
    iter,
    path::{Path, PathBuf},
};

use dromedary_records::{RawRow, TrainingRow, read_raw_rows};
use dromedary_tokenizer::{ChatOptions, ChatTemplate, Tokenizer};
use rayon::prelude::*;

use crate::{
    args::LearnedTurns,
    audit::Audit,
    collate::{CollateConfig, Encoded, Example, Sides},
    conversation::Conversation,
    error::{Error, Result},
    formats::{DatasetFormat, Row, RowText},
};

/// The turn mark under which the model answers.
const ANSWER_MARK: &str = "### Dromedary";
/// The first bytes of a parquet file.
const PARQUET: &[u8] = b"PAR1";
/// So many rows are read, then encoded by all threads.
const CHUNK_ROWS: usize = 4096;
/// A chunk ends with the row that reaches so many bytes.
const CHUNK_BYTES: usize = 8 << 20;

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
    /// Form of the rows, where it is given; the fields of the first row tell it otherwise.
    pub format: Option<DatasetFormat>,
    /// Glob of the short system prompts of dromedary rows, which may bring their own.
    pub meta_prompt_pattern: Option<String>,
    /// What writes sharegpt and chat rows.
    pub chat: ChatOptions,
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
    /// If the file, the meta prompts or the chat template cannot be read, a row is malformed or not of its format,
    /// has no meta prompt, or is refused by the template.
    pub fn read(
        path: &Path,
        limit: Option<usize>,
        config: &DataConfig,
        tokenizer: &Tokenizer,
    ) -> Result<Self> {
        Self::of_rows(path, raw_rows(path, limit)?, config, tokenizer)
    }

    /// The rows of `path`, of which there must be one. Those of one chunk exist as text at a time.
    fn of_rows<R: Borrow<RawRow> + Send>(
        path: &Path,
        mut rows: impl Iterator<Item = Result<R>>,
        config: &DataConfig,
        tokenizer: &Tokenizer,
    ) -> Result<Self> {
        let first = rows.next().ok_or_else(|| Error::EmptyDataset { path: path.to_owned() })??;
        let reader = Reader::new(path, first.borrow(), config, tokenizer)?;
        let audit = Audit::new(reader.format, &config.collate);
        let mut dataset = Self { examples: Vec::new(), audit, path: path.to_owned() };
        let mut number = 0;
        for chunk in chunks(iter::once(Ok(first)).chain(rows)) {
            let read = |(at, raw): (usize, Result<R>)| reader.read(raw?.borrow(), number + at + 1);
            // All of them, so that the error is that of the first bad row, whichever is found first.
            let read: Vec<Result<_>> = chunk.into_par_iter().enumerate().map(read).collect();
            for row in read {
                number += 1;
                dataset.add(number, row?);
            }
        }
        dataset.examples.shrink_to_fit();
        Ok(dataset)
    }

    /// Adds row `number` of the file.
    fn add(&mut self, number: usize, row: ReadRow) {
        let ReadRow { example_id, meta_prompt, encoded } = row;
        match encoded {
            Some(encoded) => {
                self.audit.add(&encoded, meta_prompt);
                self.examples.push(encoded.example);
            }
            None => self.audit.add_without_target(number, example_id),
        }
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

/// A row that has been read.
struct ReadRow {
    example_id: u64,
    /// Name of the meta prompt, where it has one.
    meta_prompt: Option<String>,
    /// Its tokens, where something is left to be learned.
    encoded: Option<Encoded>,
}

/// What turns the rows of one file into tokens.
struct Reader<'a> {
    path: &'a Path,
    format: DatasetFormat,
    meta_prompts: MetaPrompts,
    template: Option<ChatTemplate<'a>>,
    tokenizer: &'a Tokenizer,
    collate: &'a CollateConfig,
}

impl<'a> Reader<'a> {
    /// For a file that begins with the row `first`.
    fn new(
        path: &'a Path,
        first: &RawRow,
        config: &'a DataConfig,
        tokenizer: &'a Tokenizer,
    ) -> Result<Self> {
        let format = match config.format {
            Some(format) => format,
            None => DatasetFormat::of_first_row(path, first)?,
        };
        check_settings(format, config)?;
        let meta_prompts = match &config.meta_prompt_pattern {
            Some(pattern) => MetaPrompts::open(pattern)?,
            None => MetaPrompts::default(),
        };
        let template = match format.has_chat_template() {
            true => Some(ChatTemplate::open(tokenizer, &config.tokenizer, &config.chat)?),
            false => None,
        };
        let collate = &config.collate;
        Ok(Self { path, format, meta_prompts, template, tokenizer, collate })
    }

    fn read(&self, raw: &RawRow, number: usize) -> Result<ReadRow> {
        let row = self.format.row(self.path, raw, number, &self.meta_prompts)?;
        let encoded = self.encode(&row, number)?;
        Ok(ReadRow { example_id: row.example_id, meta_prompt: row.meta_prompt, encoded })
    }

    /// The row as tokens; `None` where nothing is left to be learned.
    fn encode(&self, row: &Row, number: usize) -> Result<Option<Encoded>> {
        let Self { tokenizer, collate, .. } = *self;
        let conversation = match &row.text {
            RowText::Pair(pair) => return Ok(self.encode_pair(pair)),
            RowText::Transcript(transcript) => {
                Conversation::of_transcript(transcript, tokenizer, collate)
            }
            RowText::Chat { messages, tools } => {
                let Some(template) = &self.template else { return Ok(None) };
                let tools = tools.as_ref();
                Conversation::of_chat(messages, tools, template, tokenizer, collate).map_err(
                    |source| Error::Refused { path: self.path.to_owned(), row: number, source },
                )?
            }
        };
        let encoded = conversation.encoded(row.example_id, tokenizer, collate);
        Ok((encoded.example.num_targets() > 0).then_some(encoded))
    }

    fn encode_pair(&self, pair: &SourceTarget) -> Option<Encoded> {
        let Self { tokenizer, collate, .. } = *self;
        let target = pair.target.trim_end();
        let ends = (collate.add_eos_to_target && tokenizer.eos_id().is_some())
            || self.format.stop_mark().is_some_and(|mark| target.ends_with(mark));
        let sides = Sides::encode(pair, tokenizer, collate);
        let encoded = sides.encoded(pair.example_id, usize::MAX, ends, collate);
        (!target.is_empty() && encoded.example.num_targets() > 0).then_some(encoded)
    }
}

/// Refuses settings that rows of this format have no use for.
fn check_settings(format: DatasetFormat, config: &DataConfig) -> Result<()> {
    let is_chat = format.has_chat_template();
    let chosen = config.collate.learned_turns != LearnedTurns::default();
    let useless = [
        (
            "--meta-prompt-pattern",
            config.meta_prompt_pattern.is_some() && format != DatasetFormat::Dromedary,
        ),
        ("--learned-turns", chosen && !format.is_conversation()),
        ("--chat-template", config.chat.template.is_some() && !is_chat),
        ("--chat-date", config.chat.date.is_some() && !is_chat),
    ];
    match useless.into_iter().find(|(_, is_useless)| *is_useless) {
        Some((setting, _)) => Err(Error::Setting {
            setting,
            message: format!("rows of the format {format} have no use for it"),
        }),
        None => Ok(()),
    }
}

/// One row as text: `source` is read, `target` is learned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceTarget {
    /// The row's id, from 1.
    pub example_id: u64,
    /// What is read: of a dromedary row meta prompt, instruction, input and the answer's turn mark.
    pub source: String,
    /// What is learned: of a dromedary row a newline and the answer.
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
    pub(crate) fn name_for(&self, row: &TrainingRow) -> String {
        match (&row.meta_prompt, self.index_for(row.example_id)) {
            (None, Some(index)) => self.paths[index].display().to_string(),
            _ => "the row's own".to_owned(),
        }
    }
}

fn read_text(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).map_err(|source| Error::Io { path: path.to_owned(), source })
}

/// The rows of a file (JSON array or JSONL, also compressed) before they are parsed, `limit` at most.
fn raw_rows(
    path: &Path,
    limit: Option<usize>,
) -> Result<impl Iterator<Item = Result<RawRow>> + use<>> {
    if is_parquet(path) {
        return Err(Error::Parquet { path: path.to_owned() });
    }
    let owned = path.to_owned();
    let dataset = move |source| Error::Dataset { path: owned.clone(), source };
    let rows = read_raw_rows(path).map_err(&dataset)?;
    Ok(rows.take(limit.unwrap_or(usize::MAX)).map(move |row| row.map_err(&dataset)))
}

/// `rows` in chunks of at most [`CHUNK_ROWS`], each of which ends with the row that reaches [`CHUNK_BYTES`].
fn chunks<R: Borrow<RawRow>>(
    rows: impl Iterator<Item = Result<R>>,
) -> impl Iterator<Item = Vec<Result<R>>> {
    let mut rows = rows.fuse();
    iter::from_fn(move || {
        let (mut chunk, mut bytes) = (Vec::new(), 0);
        while chunk.len() < CHUNK_ROWS && bytes < CHUNK_BYTES {
            let Some(row) = rows.next() else { break };
            bytes += row.as_ref().map_or(0, |row| row.borrow().text().len());
            chunk.push(row);
        }
        (!chunk.is_empty()).then_some(chunk)
    })
}

fn is_parquet(path: &Path) -> bool {
    let mut magic = [0; PARQUET.len()];
    File::open(path).is_ok_and(|mut file| file.read_exact(&mut magic).is_ok()) && magic == PARQUET
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write,
        sync::atomic::{AtomicUsize, Ordering},
    };

    use super::*;
    use crate::collate::tests::tokenizer;

    /// Rows of `input` and `output`, as they are.
    fn pairs() -> DataConfig {
        DataConfig {
            tokenizer: PathBuf::new(),
            dataset: PathBuf::new(),
            max_train_samples: None,
            drop_empty: false,
            format: Some(DatasetFormat::InputOutput),
            meta_prompt_pattern: None,
            chat: ChatOptions::default(),
            collate: CollateConfig {
                source_max_len: 512,
                target_max_len: 64,
                train_on_source: false,
                add_eos_to_target: false,
                learned_turns: LearnedTurns::default(),
            },
        }
    }

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

    /// A raw row that is counted for as long as it exists.
    struct Counted<'a> {
        row: RawRow,
        alive: &'a AtomicUsize,
    }

    impl Borrow<RawRow> for Counted<'_> {
        fn borrow(&self) -> &RawRow {
            &self.row
        }
    }

    impl Drop for Counted<'_> {
        fn drop(&mut self) {
            self.alive.fetch_sub(1, Ordering::Relaxed);
        }
    }

    fn write_rows(texts: impl Iterator<Item = (String, String)>) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        for (input, output) in texts {
            let row = serde_json::json!({"input": input, "output": output});
            writeln!(file, "{row}").unwrap();
        }
        file
    }

    /// Reads a file whose rows are counted: the data set, and the most rows and bytes of them that existed as
    /// text at a time.
    fn read_counted(path: &Path) -> (Dataset, usize, usize) {
        let (alive, mut most, mut most_bytes) = (AtomicUsize::new(0), 0, 0);
        let rows = raw_rows(path, None).unwrap().map(|row| {
            let row = row?;
            let now = alive.fetch_add(1, Ordering::Relaxed) + 1;
            most = most.max(now);
            most_bytes = most_bytes.max(now * row.text().len());
            Ok(Counted { row, alive: &alive })
        });
        let tokenizer = tokenizer();
        let dataset = Dataset::of_rows(path, rows, &pairs(), &tokenizer).unwrap();
        assert_eq!(alive.into_inner(), 0);
        (dataset, most, most_bytes)
    }

    #[test]
    fn rows_exist_as_text_one_chunk_at_a_time_and_stay_in_order() {
        let count = 3 * CHUNK_ROWS + 5;
        let letter = |index: usize| char::from(b'a' + (index % 26) as u8).to_string();
        let file = write_rows((0..count).map(|index| (letter(index), letter(index / 7))));
        let (dataset, most, _) = read_counted(file.path());
        assert_eq!(most, CHUNK_ROWS);
        assert_eq!(dataset.examples.len(), count);
        let tokenizer = tokenizer();
        for (index, example) in dataset.examples.iter().enumerate() {
            assert_eq!(example.example_id, index as u64 + 1);
            let text = tokenizer.decode(&example.input_ids);
            assert_eq!(text, letter(index) + &letter(index / 7), "row {}", index + 1);
        }
        let lengths: Vec<_> = dataset.examples.iter().map(|row| row.input_ids.len()).collect();
        assert_eq!(dataset.audit.lengths, lengths);
    }

    #[test]
    fn long_rows_make_short_chunks_and_leave_their_tokens_alone() {
        let file = write_rows((0..64).map(|_| ("a ".repeat(1 << 18), "b".to_owned())));
        let (dataset, most, most_bytes) = read_counted(file.path());
        assert!((CHUNK_BYTES..CHUNK_BYTES + (1 << 20)).contains(&most_bytes), "{most_bytes}");
        assert!(most < 20, "{most}");
        let held: usize = dataset.examples.iter().map(|row| row.input_ids.capacity()).sum();
        assert!(held <= 64 * 600, "{held}");
    }

    #[test]
    fn the_error_is_that_of_the_first_bad_row_with_its_number_in_the_file() {
        let tokenizer = tokenizer();
        let rows = |count: usize, bad: &[usize]| -> String {
            let row = |number| match bad.contains(&number) {
                true => "{\"input\": 1, \"output\": \"b\"}\n",
                false => "{\"input\": \"a\", \"output\": \"b\"}\n",
            };
            (1..=count).map(row).collect()
        };
        let read = |text: String, limit| {
            let mut file = tempfile::NamedTempFile::new().unwrap();
            file.write_all(text.as_bytes()).unwrap();
            Dataset::read(file.path(), limit, &pairs(), &tokenizer)
        };
        let bad = [CHUNK_ROWS + 17, CHUNK_ROWS + 900, 2 * CHUNK_ROWS + 1];
        let text = rows(3 * CHUNK_ROWS, &bad);
        let error = read(text.clone(), None).unwrap_err().to_string();
        assert!(error.contains(&format!("row {}", bad[0])), "{error}");
        assert_eq!(read(text, Some(bad[0] - 1)).unwrap().examples.len(), bad[0] - 1);

        // A file that is cut off is read up to its last row, whose chunk has a bad row before it.
        let cut_off = "{\"input\": \"a\", ";
        let error = read(rows(9, &[3]) + cut_off, None).unwrap_err().to_string();
        assert!(error.contains("row 3"), "{error}");
        let error = read(rows(9, &[]) + cut_off, None).unwrap_err();
        assert!(matches!(error, Error::Dataset { .. }), "{error}");
        for (text, limit) in [(String::new(), None), (rows(9, &[]), Some(0))] {
            assert!(matches!(read(text, limit), Err(Error::EmptyDataset { .. })));
        }
    }
}
