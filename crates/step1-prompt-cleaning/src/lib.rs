//! Step 1: collect, clean and subsample prompts.
//!
//! # Brief overview
//!
//! Three commands turn the files of four sources into one file of prompts. Each is a `Config`,
//! made and validated from flags or a TOML table, and a function that returns a [`Report`]:
//!
//! | command | reads | writes |
//! |---|---|---|
//! | [`subsample_openorca`] | OpenOrca's parquet | a sample of its questions, by stratum |
//! | [`aggregate_sharegpt`] | ShareGPT conversations | their first questions |
//! | [`clean_and_merge`] | the outputs of both, Dolly, oasst1 | clean prompts, each once, shuffled |
//!
//! [`Rules`] chooses between the corrected rules and Dromedary's. The rules themselves are plain
//! functions: [`clean`] cuts page chrome off a text, [`is_nli_task`] and [`LengthRule`] look at one
//! prompt, [`Fingerprint`] and [`KeyedOrder`] compare and order prompts. The iterators of
//! [`sources`] read prompts out of any of the formats, in bounded memory.
//!
//! ```
//! use dromedary_prompt_cleaning::{Fingerprint, Rules, Source, clean, is_nli_task};
//!
//! let rules = Rules::Corrected;
//! let prompt = clean(rules, Source::ShareGpt, " Name three rivers.\n\nShare Prompt ").text;
//! assert_eq!(prompt, "Name three rivers.");
//! assert!(!is_nli_task(rules, "Who may enter the premises?"));
//! let same = "name  three rivers.";
//! assert_eq!(Fingerprint::of(rules, prompt), Fingerprint::of(rules, same));
//! ```
//!
//! A row that cannot be read is counted, and beyond a stated share of such rows the file is
//! refused. Two runs give identical bytes, whatever the number of threads. Outputs appear whole or
//! not at all.

mod buckets;
mod clean;
mod commands;
mod dedup;
mod error;
mod filter;
mod length;
mod report;
mod rules;
pub mod sources;
pub mod text;

pub use clean::{Cleaned, Edit, LANGUAGES, clean};
pub use commands::{
    AggregateArgs, AggregateConfig, MergeArgs, MergeConfig, SUBCOMMANDS, Session, SharedArgs,
    SharedConfig, SubsampleArgs, SubsampleConfig, aggregate_sharegpt, clean_and_merge,
    subsample_openorca,
};
pub use dedup::{Fingerprint, KeyedOrder};
pub use error::{Error, Result};
pub use filter::{DropReason, LengthRule, is_nli_task};
pub use length::TokenCounter;
pub use report::{InputFile, Report, SourceCounts};
pub use rules::{Compat, Rules, Source};
