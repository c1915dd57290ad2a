//! Tokenizers of the LLaMA family, without libtorch.
//!
//! # Brief overview
//!
//! [`Tokenizer`] reads Hugging Face's `tokenizer.json`, in the two forms that LLaMA models come
//! with (sentencepiece's pieces with byte fallback, and byte-level pieces), and sentencepiece's own
//! `tokenizer.model`. Texts are encoded and
//! decoded by HF's `tokenizers`; this crate checks the file, and puts the parts together so that
//! training and generation can rely on them:
//!
//! - `</s>` or `<|im_end|>` in a text is text: control tokens are never made from what users write;
//! - [`Tokenizer::encode_continuation`] encodes a target so that source and target ids together
//!   decode to source and target text;
//! - [`DecodeStream`] never splits a character;
//! - a [`ChatTemplate`] writes conversations as transformers does, and tells which tokens are the
//!   assistant's;
//! - [`Tokenizer::fits`] bounds a length exactly, mostly without encoding;
//! - no text takes more than `O(n log n)` time to encode, and none can make encoding fail.
//!
//! ```no_run
//! # fn main() -> dromedary_tokenizer::Result<()> {
//! let tokenizer = dromedary_tokenizer::Tokenizer::open("models/llama-2-7b")?;
//! let ids = tokenizer.encode_with_bos("Hello world!");
//! assert_eq!(tokenizer.decode(&ids), "Hello world!");
//! # Ok(()) }
//! ```

mod build;
mod chat;
mod count;
mod error;
mod format;
mod jinja;
mod sentencepiece;
mod spans;
mod split;
mod stream;
mod tokenizer;

pub use chat::{ChatMessage, ChatOptions, ChatTemplate, ChatTokens, ChatTurns, ChatValue};
pub use error::{Error, Result};
pub use stream::DecodeStream;
pub use tokenizer::Tokenizer;
