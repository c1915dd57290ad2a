//! The LLaMA core: checkpoints, shard plan, model, generation.
//!
//! # Brief overview
//!
//! A [`Checkpoint`] is a Hugging Face folder that has been checked: its tensors are exactly those
//! that its [`LlamaConfig`] asks for. A [`Plan`] says which part of each tensor a tensor-parallel
//! rank owns, and [`Checkpoint::read_slice`] reads that part and no more. [`Llama`] is the model, or
//! one rank's share of it; its layers are two local halves ([`block`]), so that generation and
//! training put their own all-reduces around them. [`convert`], [`shard()`], [`quantize`] and [`merge`] write
//! checkpoints in other layouts, in little memory. A [`generation::Engine`] runs many rows behind one
//! shared prefix.
//!
//! ```no_run
//! use dromedary_llama::{Checkpoint, Plan};
//!
//! fn main() -> dromedary_llama::Result<()> {
//!     let checkpoint = Checkpoint::open("models/llama-2-7b")?;
//!     let plan = Plan::new(checkpoint.config(), 2)?;
//!     let name = "model.layers.0.mlp.gate_proj.weight";
//!     let weight = checkpoint.read_slice(name, &plan.rank(0).shard(name))?;
//!     assert_eq!(weight.size(), [5504, 4096]);
//!     Ok(())
//! }
//! ```

mod adapter;
mod attach;
mod attention;
pub mod block;
mod checkpoint;
#[cfg(feature = "cli")]
pub mod cli;
mod closed_form;
mod config;
mod convert;
mod deal;
mod dropout;
mod error;
mod footprint;
pub mod generation;
mod gradients;
mod heads;
mod kernels;
mod kind;
pub mod kv_cache;
mod linear;
mod logit_check;
mod merge;
mod meter;
mod model;
mod norm;
mod plan;
mod quantised;
mod quantize;
#[cfg(doctest)]
mod readme;
mod rotary;
mod save;
mod shard;

pub use adapter::{Adapter, AdapterFile, AdapterWriter, LoraConfig, LoraPair};
pub use checkpoint::{
    Checkpoint, CheckpointWriter, DEFAULT_MAX_SHARD_SIZE, Dtype, Outline, ReadCounters,
    SafetensorsWriter, TensorFile, TensorSpec, Written,
};
pub use closed_form::{AttentionState, ClosedForm, HalfGradients, LayerPass, MlpState};
pub use config::{LlamaConfig, RopeScaling, check_tokenizer, eos_token_ids};
pub use convert::{CheckpointFormat, ConvertOptions, ConvertReport, convert};
pub use dropout::{DropoutDraw, LoraDropout};
pub use error::{Error, Result, TensorProblems};
pub use footprint::{Footprint, Memory, Slowest, Workload};
pub use gradients::{gather_trained, global_norm, sum_gradients};
pub use kind::{select_kind, select_nf4};
pub use linear::{Linear, Lora, PackedWeight, Parallel, Part, Weight};
pub use logit_check::LogitDifference;
pub use merge::{MergeOptions, MergeReport, merge};
pub use model::{AttendInLayer, Llama, LoadOptions, ReplaceWeight};
pub use norm::RmsNorm;
pub use plan::{HeadGroup, Plan, RankPlan, Shard, Slice, TrainedPart, TrainedTensor};
pub use quantised::QuantisedWeight;
pub use quantize::{QuantizeOptions, QuantizeReport, quantize};
pub use rotary::{Rotary, RotaryAt};
pub use save::{SaveOptions, save_slices};
pub use shard::{ShardOptions, ShardReport, shard};
