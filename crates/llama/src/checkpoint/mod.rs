//! Hugging Face checkpoint folders: `config.json` and safetensors files.

mod dtype;
mod file;
mod header;
mod index;
mod output;
mod reader;
mod tensor_memory;
mod tensors;
mod writer;

pub use dtype::Dtype;
pub use file::ReadCounters;
pub use output::TensorSpec;
pub use reader::Checkpoint;
pub use writer::{CheckpointWriter, DEFAULT_MAX_SHARD_SIZE};

pub(crate) use file::SafetensorsFile;
pub(crate) use output::SafetensorsWriter;
pub(crate) use writer::put_in_order;

pub(crate) use tensors::{EMBEDDING, HEAD, linear_shapes, tensor_shapes};
