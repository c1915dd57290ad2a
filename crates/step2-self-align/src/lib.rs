//! Step 2: principle-driven self-alignment.
//!
//! # Brief overview
//!
//! A base model answers prompts behind a long text of rules and exemplars, first in thoughts, then
//! to the user; what is fit of that is what step 3 trains on, without the rules.
//!
//! [`Principles`] are the source: rules, exemplars, cues, names, stop strings and black list.
//! [`MetaPrompt`] is the text that is made of them, [`Template`] puts a prompt behind it.
//! [`generate`] appends an answer per prompt to a file that any later call continues.
//! [`Filter`] judges rows, each [`Rule`] with its name and count, and [`merge_and_filter`] makes
//! the training rows out of the files of all groups.
//!
//! ```
//! use dromedary_self_align::{MetaPrompt, Template};
//!
//! # fn main() -> dromedary_self_align::Result<()> {
//! let meta_prompt = MetaPrompt::open(None)?;
//! let text = Template::new(&meta_prompt).fill("What is a polygon?", "");
//! assert!(text.ends_with("User: What is a polygon?\n\nWatson (internal thoughts):"));
//! # Ok(())
//! # }
//! ```

mod args;
mod compat;
mod error;
mod filter;
mod generate;
mod identity;
mod merge;
mod output;
mod principles;
#[cfg(doctest)]
mod readme;
mod rows;
mod shards;
mod template;
mod text;

pub use args::{GenerateArgs, MergeArgs, RenderArgs, SUBCOMMANDS};
pub use error::{Error, Result};
pub use filter::{Compat, Filter, Kept, Report, Rule, SourceReport, Verdict};
pub use generate::{GenerateConfig, GenerateReport, generate};
pub use merge::{DroppedRow, IdentityLimit, IdentityWord, MergeConfig, merge_and_filter};
pub use principles::{Cues, Exemplar, MetaPrompt, Names, PrincipleRule, Principles};
pub use shards::{Done, shard_path};
pub use template::Template;
