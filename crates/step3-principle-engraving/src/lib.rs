//! Step 3, principle engraving: the base model is fine-tuned on the answers it gave behind the
//! principles, with the principles pruned away.
//!
//! # Brief overview
//!
//! [`train`] is a whole run as [`TrainConfig`] describes it. Its heart is the [`Trainer`], which is
//! responsible for one optimizer step: it lays rows one behind the other ([`MicroBatch`]), passes
//! them through the layers one [`HalfBlock`] at a time, and back, and lets [`FlatAdamW`] update the
//! LoRA matrices. A [`Dataset`] is rows as tokens, read in one of the forms of [`DatasetFormat`]: dromedary
//! rows get one of the [`MetaPrompts`] and are cut by [`encode`]; an [`Inspection`] shows it to people. A run that was
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
//!     let summary = train(&config, &SingleProcess, 0, &StopFlag::default())?;
//!     assert!(summary.output.ends_with("adapter"));
//!     Ok(())
//! }
//! ```

mod activations;
mod args;
mod audit;
mod batches;
mod checkpoint;
mod collate;
mod config;
mod conversation;
mod curves;
mod dataset;
mod error;
mod formats;
mod half_block;
mod held_out;
mod inspect;
mod loss;
mod metrics;
mod model_card;
mod optimizer;
mod plan;
mod plan_command;
mod planned_rows;
mod prepared;
mod publish;
mod ranks;
mod run;
mod scaling;
mod schedule;
mod tensorboard;
mod traffic;
mod trained;
mod trainer;
mod transcript;

pub use activations::ActivationsMode;
pub use args::{EvaluationStrategy, IgnoredTrainArgs, LearnedTurns, ReportTo, TrainArgs};
pub use audit::{Audit, Side};
pub use batches::{BatchConfig, Batches};
pub use collate::{BatchLimits, CollateConfig, Example, MicroBatch, encode};
pub use config::{Resume, TrainConfig};
pub use dataset::{DataConfig, Dataset, MetaPrompts, SourceTarget};
pub use error::{Error, Result};
pub use formats::DatasetFormat;
pub use half_block::{Half, HalfBlock, Keep, Saved};
pub use held_out::{EvalConfig, EvalEvery, EvalRows, held_out_loss};
pub use inspect::Inspection;
pub use loss::{Head, HeadLoss, head_loss};
pub use optimizer::{AdamWConfig, Entry, FlatAdamW, Held, OptimizerConfig, Share};
pub use plan::{MemoryPlan, PlanInput, PlannedRank, PlannedTraining};
pub use plan_command::{PlanArgs, PlanReport};
pub use publish::{ADAPTER_DIR, MODEL_DIR};
pub use ranks::Ranks;
pub use run::{Summary, train};
pub use scaling::{Link, Network, Rate, Scaling, ScalingInput, ScalingRow, Workload};
pub use schedule::{Schedule, ScheduleConfig, ScheduleType, Span};
pub use traffic::{Exchange, Group, Operation, StepShape, exchanges};
pub use trained::Trained;
pub use trainer::{Position, StepLoss, StepMetrics, Trainer, TrainerParts};
