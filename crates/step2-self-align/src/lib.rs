//! Step 2: principle-driven self-alignment.
//!
//! # Brief overview
//!
//! A base model answers prompts behind a long text of rules and exemplars, first in thoughts, then
//! to the user; what is fit of that is what step 3 trains on, without the rules.
//!
//! [`Principles`] are the source: rules, exemplars, cues, names, stop strings and black list.
//! [`MetaPrompt`] is the text that is made of them, [`Template`] puts a prompt behind it.
//! [`generate`] appends an answer per prompt to a file that any later call continues, whatever number
//! of groups shares the prompts then. [`plan`](fn@plan) tells before what that takes, [`status`](fn@status)
//! how far it is, and [`check`](fn@check) what is wrong with principles.
//! [`Filter`] judges rows, each [`Rule`] with its name and count, and [`merge_and_filter`] makes
//! the training rows out of the files of all groups. [`Form::Verbose`] is the same for a trained model
//! that is asked for thorough answers.
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
mod check;
mod citations;
mod compat;
mod error;
mod filter;
mod generate;
mod identity;
mod live;
mod merge;
mod metrics;
mod output;
mod plan;
mod principles;
#[cfg(doctest)]
mod readme;
mod report;
mod report_page;
mod rows;
mod run_file;
mod shards;
mod status;
mod template;
mod text;
mod work;

pub use args::{
    CheckArgs, CheckConfig, GenerateArgs, MergeArgs, PlanArgs, RenderArgs, SUBCOMMANDS, StatusArgs,
};
pub use check::{BudgetLimits, Finding, TokenBudget, check};
pub use error::{Error, Result};
pub use filter::{Compat, Filter, Kept, Rule, Verdict};
pub use generate::{GenerateConfig, GenerateReport, generate};
pub use merge::{DroppedRow, IdentityLimit, IdentityWord, MergeConfig, merge_and_filter};
pub use plan::{GenerationPlan, Origin, PlanConfig, plan};
pub use principles::{Cues, Exemplar, Form, MetaPrompt, Names, PrincipleRule, Principles};
pub use report::{AnswerWords, CitedRule, Report, SourceReport};
pub use shards::{Done, shard_path};
pub use status::{FileState, FileStatus, GenerationStatus, status};
pub use template::Template;
