//! Files that are whole or absent: atomic files and folders, manifests, locks, append-only JSONL.
//!
//! # Brief overview
//!
//! [`AtomicFile`] and [`AtomicDir`] write beside their target and rename at the end, so that a
//! path never names half a result. A folder carries a [`Manifest`] of sizes and hashes.
//! [`JsonlAppender`] adds one whole line per row and cuts what a killed run left behind;
//! [`read_jsonl`] reads such files, and those of others, with line numbers in its errors.
//! A [`Lock`] keeps two jobs from one output, also over network file systems without `flock`.
//!
//! ```
//! use std::collections::BTreeMap;
//!
//! use dromedary_files::{JsonlAppender, read_jsonl, write_atomic};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let folder = tempfile::tempdir()?;
//! # let folder = folder.path();
//! write_atomic(folder.join("settings.json"), b"{}")?;
//!
//! let (mut rows, recovered) = JsonlAppender::open(folder.join("rows.jsonl"))?;
//! assert_eq!(recovered.lines, 0);
//! rows.append(&BTreeMap::from([("score", 42)]))?;
//! rows.sync()?;
//!
//! for row in read_jsonl::<BTreeMap<String, u32>>(folder.join("rows.jsonl"))? {
//!     let (line, row) = row?;
//!     assert_eq!((line, row["score"]), (1, 42));
//! }
//! # Ok(())
//! # }
//! ```

mod atomic_dir;
mod atomic_file;
mod durable;
mod error;
mod jsonl;
mod jsonl_append;
mod lock;
mod manifest;
#[cfg(doctest)]
mod readme;

pub use atomic_dir::{AtomicDir, SealedDir};
pub use atomic_file::{AtomicFile, write_atomic};
pub use error::{Error, Result};
pub use jsonl::{JsonLine, JsonlReader, MAX_LINE_BYTES, read_jsonl};
pub use jsonl_append::{JsonlAppender, Recovered};
pub use lock::{Holder, Lock, LockOptions};
pub use manifest::{FileEntry, MANIFEST_NAME, Manifest, hash_file};
