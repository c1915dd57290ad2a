//! The rows that the stages hand to each other, in the original's formats and ours.
//!
//! # Brief overview
//!
//! Cleaning writes [`Prompt`]s, self-alignment makes [`AlignedResponse`]s of them, the filter
//! makes [`TrainingRow`]s of those. [`read_rows`] reads any of them, row by row, from a JSON array
//! or from JSONL, plain, `.gz` or `.zst`; [`RowWriter`] writes them, and a file appears only when
//! it is whole. [`row_id`] names a row by its content, so that a run can be resumed by id.
//!
//! ```
//! use dromedary_records::{RowWriter, TrainingRow, read_prompts, read_rows};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let folder = tempfile::tempdir()?;
//! # let folder = folder.path();
//! # std::fs::write(folder.join("prompts.json"), r#"[{"instruction": "Name a camel."}]"#)?;
//! let mut writer = RowWriter::create(folder.join("sft.json.gz"))?;
//! for (example_id, prompt) in (1..).zip(read_prompts(folder.join("prompts.json"))?) {
//!     let prompt = prompt?;
//!     writer.write(&TrainingRow {
//!         example_id,
//!         instruction: prompt.instruction,
//!         input: prompt.input,
//!         output: "Alice.".to_owned(),
//!         meta_prompt: None,
//!     })?;
//! }
//! writer.finish()?;
//!
//! let rows: Vec<TrainingRow> =
//!     read_rows(folder.join("sft.json.gz"))?.collect::<Result<_, _>>()?;
//! assert_eq!(rows[0].instruction, "Name a camel.");
//! # Ok(())
//! # }
//! ```

mod elements;
mod error;
mod ids;
mod prompts;
mod read;
#[cfg(doctest)]
mod readme;
mod rows;
mod write;

pub use error::{Error, Result};
pub use ids::{RowIds, row_id};
pub use prompts::{BadPrompt, FoundPrompt, Prompts, read_prompts};
pub use read::{RawRow, RawRows, ReadProgress, Rows, read_raw_rows, read_rows};
pub use rows::{AlignedResponse, FinishReason, Prompt, TrainingRow, UNKNOWN_SOURCE};
pub use write::{EncodedRows, RowEncoder, RowWriter};
