//! Integration tests of the LLaMA core.

#![allow(clippy::unwrap_used, reason = "clippy exempts test functions, but not their helpers")]

use std::path::PathBuf;

mod adapter; // PEFT adapter folders
mod checkpoint; // checkpoint folders: read right, refused by name
mod collectives; // what ranks exchange
mod complete; // `llama complete`
mod config; // config.json
mod convert; // Meta's layout in and out
mod engine; // batch generation
mod faults; // jobs of `llama complete` that fail
mod four_bits; // generation from weights that stay in NF4
mod given; // what the environment gives tests
mod gradients; // training over several ranks
mod hostile; // safetensors files made to do harm
mod hostile_torch; // PyTorch files made to do harm
mod independence; // the same row in other company
mod inspect; // `llama inspect`
mod interrupted; // tools that are stopped, killed, out of room
#[path = "../../../parallel/tests/it/job.rs"]
#[allow(dead_code, reason = "the crate it belongs to uses all of it")]
mod job; // starts and watches jobs
mod memory; // what generation takes, against what is planned
mod merge; // adapters into their base, `llama merge`
mod model; // parts of the model, adapters in place
mod not_finite; // rows without finite logits, beside others
mod parity; // logits against golden values
mod plan; // the split over ranks
mod plan_command; // `llama plan`
mod prefix_cache; // prefixes on the disk
mod quantize; // NF4, `llama quantize`
mod saving; // a split model saved as one checkpoint
mod score; // log-probabilities of given texts
mod shard; // a file a rank, `llama shard`
mod shared_queue; // rows for several groups
mod streaming; // memory of the tools at two sizes
mod support; // models run in short
mod tensor_parallel; // several ranks against one
mod tiny; // checkpoints for the above

#[path = "../same/mod.rs"]
mod same; // what ranks must agree in, also for the program that is started under mpirun

/// Models and golden values that are part of the checkout.
fn data() -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests", "data"].iter().collect()
}

/// A real LLaMA with its tokenizer.
fn stories260k() -> PathBuf {
    data().join("stories260k")
}
