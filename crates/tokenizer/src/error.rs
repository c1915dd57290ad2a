use std::path::PathBuf;

/// What can go wrong when a tokenizer is opened; encoding and decoding never fail.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file, or the folder that should hold `tokenizer.json` or `tokenizer.model`, cannot be read.
    #[error("cannot read tokenizer {path}: {source}")]
    Open {
        /// The file that was tried.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The file is damaged, or no sentencepiece model at all.
    #[error("{path} is no sentencepiece model, or damaged: {source}")]
    SentencePiece {
        /// The file that was read.
        path: PathBuf,
        /// The decoder's reason.
        source: prost::DecodeError,
    },
    /// The file is not JSON, or has a part that LLaMA's tokenizers do not have.
    #[error("{path} is not a tokenizer of the LLaMA family: {source}")]
    Parse {
        /// The file that was read.
        path: PathBuf,
        /// The parser's reason, with line and column.
        source: serde_json::Error,
    },
    /// A part of the file is of a kind that is not supported.
    #[error("{path}: {part} is not supported: {found}")]
    Unsupported {
        /// The file that was read.
        path: PathBuf,
        /// The part of the file.
        part: &'static str,
        /// What it holds.
        found: String,
    },
    /// There is no template to write conversations with.
    #[error("{path} has no chat_template, and there is no chat_template.jinja beside it")]
    NoChatTemplate {
        /// The file that should have one.
        path: PathBuf,
    },
    /// A chat template has a mistake, or refuses a conversation.
    #[error("chat template of {path}: {message}")]
    ChatTemplate {
        /// The file that the template is in.
        path: PathBuf,
        /// The template's or the engine's reason, with the line.
        message: String,
    },
    /// A chat template writes a turn in another way when others follow it, so that it cannot be told which
    /// tokens are the turn's.
    #[error(
        "chat template of {path}: it does not write turn {turn} in the same way before and after it is \
         answered; {{% generation %}} blocks in the template would say which part is learned"
    )]
    TurnRewritten {
        /// The file that the template is in.
        path: PathBuf,
        /// The message, from 1.
        turn: usize,
    },
    /// The parts of the file contradict each other.
    #[error("{path}: {message}")]
    Inconsistent {
        /// The file that was read.
        path: PathBuf,
        /// Which parts, and how.
        message: String,
    },
}

/// Result of this crate's fallible functions.
pub type Result<T> = std::result::Result<T, Error>;
