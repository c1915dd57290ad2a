//! What can go wrong while the base model is fine-tuned.

use std::path::PathBuf;

use crate::{formats::DatasetFormat, trainer::StepMetrics};

/// `Result` with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Why a fine-tuning run cannot start, or had to end.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting contradicts another one, or is out of its range.
    #[error("{setting}: {message}")]
    Setting {
        /// The flag, in the spelling of `--help`.
        setting: &'static str,
        /// What is wrong with its value.
        message: String,
    },
    /// The data set could not be read.
    #[error("data set {path}: {source}")]
    Dataset {
        /// The file.
        path: PathBuf,
        /// The reason, with the row.
        source: dromedary_records::Error,
    },
    /// The data set holds no row to train on.
    #[error("data set {path} holds no row to train on")]
    EmptyDataset {
        /// The file.
        path: PathBuf,
    },
    /// Rows have no token to learn from: their targets are empty.
    #[error(
        "data set {path}: {count} rows have no target token to learn, the first of them row {row} \
         (example_id {example_id}); --drop-empty leaves them out"
    )]
    NoTarget {
        /// The file.
        path: PathBuf,
        /// How many rows.
        count: usize,
        /// The first row's number in the file, from 1.
        row: usize,
        /// The row's own id.
        example_id: u64,
    },
    /// The fields of a file's first row are those of no format.
    #[error(
        "data set {path}: the first row's fields ({fields}) are those of no format; --dataset-format names one"
    )]
    UnknownFormat {
        /// The file.
        path: PathBuf,
        /// The fields that were found.
        fields: String,
    },
    /// A row is not of the format of its data set.
    #[error("data set {path}: row {row} is no {format} row: {problem}")]
    BadRow {
        /// The file.
        path: PathBuf,
        /// The row's number in the file, from 1.
        row: usize,
        /// What it should be.
        format: DatasetFormat,
        /// Why it is not, with the fields that it has.
        problem: String,
    },
    /// A chat template cannot write a conversation.
    #[error("data set {path}: row {row}: {source}")]
    Refused {
        /// The file.
        path: PathBuf,
        /// The row's number in the file, from 1.
        row: usize,
        /// What the template says.
        source: dromedary_tokenizer::Error,
    },
    /// A data set is stored in columns.
    #[error(
        "data set {path} is parquet; rows are read from a JSON array or JSONL, which \
         pandas.read_parquet(..).to_json(.., orient=\"records\", lines=True) writes"
    )]
    Parquet {
        /// The file.
        path: PathBuf,
    },
    /// A row brings no meta prompt, and there are no files of them.
    #[error(
        "data set {path}: row {row} (example_id {example_id}) brings no meta_prompt: give \
         --meta-prompt-pattern"
    )]
    NoMetaPromptForRow {
        /// The file.
        path: PathBuf,
        /// The row's number in the file, from 1.
        row: usize,
        /// The row's own id.
        example_id: u64,
    },
    /// No file matches the pattern of the meta prompts.
    #[error("no file matches --meta-prompt-pattern {pattern}")]
    NoMetaPrompt {
        /// The pattern as given.
        pattern: String,
    },
    /// A pattern is not a valid glob.
    #[error("--meta-prompt-pattern {pattern}: {message}")]
    BadPattern {
        /// The pattern as given.
        pattern: String,
        /// What the glob parser says.
        message: String,
    },
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// A training checkpoint is damaged, or belongs to another run.
    #[error("checkpoint {path}: {message}")]
    Checkpoint {
        /// The checkpoint folder or file.
        path: PathBuf,
        /// What does not fit.
        message: String,
    },
    /// The plan of the ranks knows no trained tensor of this module.
    #[error("{module} cannot be trained")]
    NotTrained {
        /// The module.
        module: String,
    },
    /// The loss or a gradient was not finite for several steps in a row.
    #[error(
        "loss or gradients were not finite in {} steps in a row, up to step {}, whose example_ids are {example_ids:?}",
        example_ids.len(),
        last.step
    )]
    NotFinite {
        /// The rows of each of these steps.
        example_ids: Vec<Vec<u64>>,
        /// What the last of them did.
        last: Box<StepMetrics>,
    },
    /// The run was asked to stop; a checkpoint was written before.
    #[error(
        "stopped after step {step}; {} {checkpoint}",
        match goes_on {
            true => "the next run goes on from",
            false => "the same flags would start elsewhere: --resume auto, as a job that Slurm requeues has it, goes on from",
        }
    )]
    Stopped {
        /// The last finished step.
        step: u64,
        /// Where the run can be taken up.
        checkpoint: PathBuf,
        /// The same settings do so.
        goes_on: bool,
    },
    /// The model, its checkpoint or an adapter was refused.
    #[error(transparent)]
    Llama(#[from] dromedary_llama::Error),
    /// The tokenizer was refused.
    #[error(transparent)]
    Tokenizer(#[from] dromedary_tokenizer::Error),
    /// A rank failed inside a collective.
    #[error(transparent)]
    Parallel(#[from] dromedary_parallel::Error),
    /// A file operation failed.
    #[error(transparent)]
    Files(#[from] dromedary_files::Error),
    /// An operation of torch-ext failed.
    #[error(transparent)]
    TorchExt(#[from] dromedary_torch_ext::Error),
    /// libtorch refused an operation (out of memory, for the most part).
    #[error(transparent)]
    Torch(#[from] tch::TchError),
}
