//! Step 3, principle engraving: the base model is fine-tuned on the answers it gave behind the
//! principles, with the principles pruned away.
//!
//! # Brief overview
//!
//! [`train`] is a whole run as [`TrainConfig`] describes it. Its heart is the [`Trainer`], which is
//! responsible for one optimizer step: it lays rows one behind the other ([`MicroBatch`]), passes
//! them through the layers one [`HalfBlock`] at a time, and back, and lets [`FlatAdamW`] update the
//! LoRA matrices. Rows become text in [`source_target`] and tokens in [`encode`]. A run that was
//! interrupted goes on from its last checkpoint.
//!
//! ```no_run
//! use dromedary_command::StopFlag;
//! use dromedary_parallel::SingleProcess;
//! use dromedary_principle_engraving::{TrainArgs, TrainConfig, train};
//!
//! fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let config = TrainConfig::try_from(TrainArgs {
//!         checkpoint: Some("models/base".into()),
//!         dataset: Some("sft.json".into()),
//!         meta_prompt_pattern: Some("prompts/dromedary_*prompt_distill.txt".into()),
//!         output_dir: Some("engraved".into()),
//!         ..TrainArgs::default()
//!     })?;
//!     let summary = train(&config, &SingleProcess, &StopFlag::default())?;
//!     assert!(summary.adapter.ends_with("adapter"));
//!     Ok(())
//! }
//! ```

mod args;
mod batches;
mod checkpoint;
mod collate;
mod config;
mod dataset;
mod error;
mod half_block;
mod loss;
mod optimizer;
mod run;
mod schedule;
mod trained;
mod trainer;

pub use args::{DatasetFormat, IgnoredTrainArgs, TrainArgs};
pub use batches::{BatchConfig, Batches};
pub use collate::{CollateConfig, Example, MicroBatch, encode};
pub use config::{Resume, TrainConfig};
pub use dataset::{MetaPrompts, SourceTarget, read_rows, source_target};
pub use error::{Error, Result};
pub use half_block::{Half, HalfBlock, Keep, Saved};
pub use loss::{Head, HeadLoss, head_loss};
pub use optimizer::{AdamWConfig, Entry, FlatAdamW};
pub use run::{ADAPTER_DIR, Summary, train};
pub use schedule::{Schedule, ScheduleType};
pub use trained::Trained;
pub use trainer::{Position, StepLoss, StepMetrics, Trainer, TrainerParts};
