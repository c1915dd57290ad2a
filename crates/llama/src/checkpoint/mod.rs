//! Hugging Face checkpoint folders: `config.json` and safetensors files.

mod dtype;
mod file;
mod header;
mod index;
mod reader;
mod tensor_memory;
mod tensors;

pub use dtype::Dtype;
pub use reader::Checkpoint;

pub(crate) use tensors::tensor_shapes;
