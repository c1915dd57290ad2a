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
//! [`export_parquet`] writes any of the outputs for other tools.
//!
//! [`Rules`] chooses between the corrected rules and Dromedary's. A [`Rule`] is a value that looks
//! at one [`Draft`] of a prompt: [`Cleaner`] cuts page chrome off it, [`NliRule`] and [`LengthRule`]
//! leave prompts out; a [`Pipeline`] combines them with a program's own. [`Fingerprint`] and
//! [`KeyedOrder`] compare and order prompts. The iterators of [`sources`] read prompts out of any
//! of the formats, in bounded memory.
//!
//! ```
//! use dromedary_prompt_cleaning::{Cleaner, Draft, Fingerprint, Lists, NotEmpty, Pipeline};
//! use dromedary_prompt_cleaning::{Rules, Source};
//!
//! let rules = Rules::Corrected;
//! let pipeline = Pipeline::new().with(Cleaner::new(rules, Lists::built_in())).with(NotEmpty);
//! let draft = Draft::new(Source::ShareGpt, " Name three rivers.\n\nShare Prompt ");
//! let prompt = pipeline.judge(draft).draft.instruction;
//! assert_eq!(prompt, "Name three rivers.");
//! let same = "name  three rivers.";
//! assert_eq!(Fingerprint::of(rules, &prompt), Fingerprint::of(rules, same));
//! ```
//!
//! A row that cannot be read is counted, and beyond a stated share of such rows the file is
//! refused. Two runs give identical bytes, whatever the number of threads. Outputs appear whole or
//! not at all.

mod buckets;
mod clean;
mod commands;
mod decontamination;
mod dedup;
mod error;
mod explain;
mod filter;
mod language;
mod length;
mod lists;
mod near_duplicates;
mod pipeline;
#[cfg(doctest)]
mod readme;
mod report;
mod rules;
mod selection;
pub mod sources;
pub mod text;

pub use clean::{Cleaned, Cleaner, Edit};
pub use commands::{
    AggregateArgs, AggregateConfig, ExportArgs, ExportConfig, JudgeArgs, JudgeConfig, MergeArgs,
    MergeConfig, OptionalArgs, OptionalConfig, SUBCOMMANDS, Session, SharedArgs, SharedConfig,
    SubsampleArgs, SubsampleConfig, aggregate_sharegpt, clean_and_merge, export_parquet,
    subsample_openorca,
};
pub use decontamination::DecontaminationRule;
pub use dedup::{Fingerprint, KeyedOrder};
pub use error::{Error, Result};
pub use explain::Explanation;
pub use filter::{DropReason, LengthRule, NliRule};
pub use language::LanguageRule;
pub use length::TokenCounter;
pub use lists::Lists;
pub use near_duplicates::{NearDuplicates, NearMatch, Sketch, Sketcher, similarity};
pub use pipeline::{Draft, Dropped, Effect, Judged, NotEmpty, Pipeline, Rule, Step, Strip};
pub use report::{HashedFile, InputFile, Report, Sample, SourceCounts, TokenLengths};
pub use rules::{Compat, Rules, Source};
pub use selection::{PerSource, Selection};
