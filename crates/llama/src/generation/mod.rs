//! Batch generation: slots that are refilled, a prefix that is run once, stopping per row.
//!
//! An [`Engine`] takes [`Request`]s from a closure and gives [`Event`]s to another one. It knows
//! tokens and text, and nothing of files or of what the text is about.

mod candidates;
mod engine;
mod penalties;
mod prefill;
mod prefix;
mod request;
mod row;
mod sampler;
mod sampling;
mod score;
mod stop;

pub(crate) use engine::PREFILL_TOKENS;
pub use engine::{DETERMINISTIC_ENVIRONMENT, Engine, EngineConfig, PrefixUse};
pub use prefix::PrefixCache;
pub use request::{Event, FinishReason, FinishedRow, Request, Statistics};
pub use sampling::{FrequencyPenalty, Sampling};
pub use score::ScoreRequest;
pub use stop::StopRule;
