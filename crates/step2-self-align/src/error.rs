use std::path::PathBuf;

use crate::report::Report;

/// What can go wrong in this step.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file of prompts, principles or settings cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why it cannot be read.
        source: std::io::Error,
    },
    /// A file cannot be written.
    #[error("cannot write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why it cannot be written.
        source: std::io::Error,
    },
    /// The principles are no TOML, have an unknown key, or break a rule of their form.
    #[error("{}: {message}", path.display())]
    Principles {
        /// The file of principles.
        path: PathBuf,
        /// What is wrong, with the key or the number of the rule or exemplar.
        message: String,
    },
    /// The meta prompt of a text file does not end in the mark of the user's turn.
    #[error("{}: a meta prompt must end in {cue:?}, this one ends in {end:?}", path.display())]
    MetaPrompt {
        /// The text file.
        path: PathBuf,
        /// The mark that was expected.
        cue: String,
        /// The last characters of the file.
        end: String,
    },
    /// The shared prefix is longer than `max_shared_seq_len` allows.
    #[error(
        "the prompt before the user's text has {tokens} tokens, max_shared_seq_len allows {limit}"
    )]
    PrefixTooLong {
        /// Its length with this tokenizer.
        tokens: usize,
        /// The limit.
        limit: usize,
    },
    /// Behind the shared prefix the model's context has no room for a prompt and an answer.
    #[error(
        "the prompt before the user's text has {tokens} tokens, which leaves no room for a row in the \
         model's context of {context}"
    )]
    PrefixFillsContext {
        /// Its length with this tokenizer.
        tokens: usize,
        /// `max_position_embeddings`.
        context: usize,
    },
    /// The input file holds no prompt, or none falls to this group.
    #[error("{}: {message}", path.display())]
    NoPrompts {
        /// The input file.
        path: PathBuf,
        /// Whether the file or the group's part of it is empty.
        message: String,
    },
    /// An output that is to be continued was begun with other settings.
    #[error(
        "{}: the rows there were made with other settings ({difference}); \
         name another --output-file or remove it",
        path.display()
    )]
    OtherSettings {
        /// The output file.
        path: PathBuf,
        /// The settings that differ, with both values.
        difference: String,
    },
    /// Another job, which shares the prompts among another number of groups, is writing rows of the
    /// same generation: both would answer the same prompts.
    #[error(
        "{}: a run whose prompts are shared among {theirs} groups is writing it ({holder}), this one \
         shares them among {ours}; wait for its end",
        path.display()
    )]
    OtherGroups {
        /// The other job's file.
        path: PathBuf,
        /// Who writes it.
        holder: Box<dromedary_files::Holder>,
        /// Its `group_size`.
        theirs: usize,
        /// Ours.
        ours: usize,
    },
    /// More rows of the input file are no prompts than may be.
    #[error(
        "{}: {bad} of {rows} rows are no prompts, --max-bad-rows allows a share of {limit}; the \
         first is {first}",
        path.display()
    )]
    BadRows {
        /// The input file.
        path: PathBuf,
        /// How many are none.
        bad: usize,
        /// Rows of the file.
        rows: usize,
        /// The limit.
        limit: f64,
        /// Which one is the first, and what is wrong with it.
        first: String,
    },
    /// Row after row got logits that are not finite.
    #[error(
        "the logits of {} rows in a row are not finite, with no answer between: {}; check the \
         checkpoint, the adapter and --dtype",
        ids.len(),
        ids.join(", ")
    )]
    NotFinite {
        /// The rows, each of which has its record.
        ids: Vec<String>,
    },
    /// A file that is to tell the speed of a run has no finished row.
    #[error("{}: tells no speed, it has no finished rows", path.display())]
    NoMetrics {
        /// The file.
        path: PathBuf,
    },
    /// No file matches the pattern of the merge.
    #[error("no file matches {pattern:?}")]
    NoShards {
        /// The pattern, as it was given.
        pattern: String,
    },
    /// The pattern of the merge is not a pattern.
    #[error("{pattern:?} is no file pattern: {message}")]
    Pattern {
        /// The pattern, as it was given.
        pattern: String,
        /// What the parser said.
        message: String,
    },
    /// Generation has not finished a file that is to be merged.
    #[error(
        "{}: {message}; finish its generation, or merge what is there with --allow-unfinished",
        path.display()
    )]
    Unfinished {
        /// The file, or the pattern where a whole shard is missing.
        path: PathBuf,
        /// What is missing or does not agree.
        message: String,
    },
    /// A row of identity conversations has no question and answer.
    #[error("{}: conversation {row}: {message}", path.display())]
    Identity {
        /// The file.
        path: PathBuf,
        /// Its place in the file, from 1.
        row: usize,
        /// What is missing.
        message: String,
    },
    /// The filter kept no row.
    #[error("no row is left to train on: {report}; see {}", dropped_file.display())]
    NothingLeft {
        /// The dropped rows with their rules.
        dropped_file: PathBuf,
        /// How many rows each rule dropped.
        report: Box<Report>,
    },
    /// A row file cannot be read or written.
    #[error(transparent)]
    Records(#[from] dromedary_records::Error),
    /// A file cannot be written, continued or locked.
    #[error(transparent)]
    Files(#[from] dromedary_files::Error),
    /// The tokenizer cannot be read.
    #[error(transparent)]
    Tokenizer(#[from] dromedary_tokenizer::Error),
    /// The model cannot be loaded or run.
    #[error(transparent)]
    Llama(#[from] dromedary_llama::Error),
    /// What rank 0 tells the other ranks cannot be written or read.
    #[error("ranks cannot exchange the prompts: {0}")]
    Exchange(#[source] serde_json::Error),
    /// The processes cannot work together.
    #[error(transparent)]
    Parallel(#[from] dromedary_parallel::Error),
    /// A setting is missing or wrong, or a signal stopped the run.
    #[error(transparent)]
    Command(#[from] dromedary_command::Error),
}

/// The result of this crate's functions.
pub type Result<T> = std::result::Result<T, Error>;
