//! Tokenizers of the LLaMA family, without libtorch.
//!
//! # Brief overview
//!
//! [`Tokenizer`] reads Hugging Face's `tokenizer.json`, in the two forms that LLaMA models come
//! with (sentencepiece's pieces with byte fallback, and byte-level pieces), and gives the ids that
//! HF's `tokenizers` gives for ordinary text. Where training and generation need more, it differs
//! on purpose:
//!
//! - `</s>` or `<|im_end|>` in a text is text: control tokens are never made from what users write;
//! - [`Tokenizer::encode_continuation`] encodes a target so that source and target ids together
//!   decode to source and target text;
//! - [`DecodeStream`] never splits a character;
//! - [`Tokenizer::fits`] bounds a length exactly, mostly without encoding;
//! - no text takes more than `O(n log n)` time, and none can make encoding fail.
//!
//! ```no_run
//! # fn main() -> dromedary_tokenizer::Result<()> {
//! let tokenizer = dromedary_tokenizer::Tokenizer::open("models/llama-2-7b")?;
//! let ids = tokenizer.encode_with_bos("Hello world!");
//! assert_eq!(tokenizer.decode(&ids), "Hello world!");
//! # Ok(()) }
//! ```

mod bpe;
mod build;
mod byte_level;
mod error;
mod format;
mod metaspace;
mod stream;
mod tokenizer;
mod vocabulary;

pub use error::{Error, Result};
pub use stream::DecodeStream;
pub use tokenizer::Tokenizer;
