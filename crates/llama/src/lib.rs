//! The LLaMA core: checkpoints, shard plan, model, generation.
//!
//! # Brief overview
//!
//! A [`Checkpoint`] is a Hugging Face folder that has been checked: its tensors are exactly those
//! that its [`LlamaConfig`] asks for. A [`Plan`] says which part of each tensor a tensor-parallel
//! rank owns, and [`Checkpoint::read_slice`] reads that part and no more.
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

mod checkpoint;
mod config;
mod error;
mod plan;

pub use checkpoint::{Checkpoint, Dtype};
pub use config::{LlamaConfig, RopeScaling, eos_token_ids};
pub use error::{Error, Result, TensorProblems};
pub use plan::{HeadGroup, Plan, RankPlan, Shard, Slice};
