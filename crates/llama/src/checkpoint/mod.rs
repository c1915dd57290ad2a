//! Checkpoint folders: Hugging Face's (`config.json` and safetensors files) and Meta's (`params.json` and
//! `consolidated.NN.pth`).

mod dtype;
mod file;
mod header;
mod index;
mod meta;
mod nf4;
mod output;
mod params;
mod pieces;
mod rank_files;
mod reader;
mod tensor_memory;
mod tensors;
mod torch_file;
mod writer;

pub use dtype::Dtype;
pub use file::{ReadCounters, TensorFile};
pub use output::{SafetensorsWriter, TensorSpec, Written};
pub use reader::{Checkpoint, Outline};
pub use writer::{CheckpointWriter, DEFAULT_MAX_SHARD_SIZE};

pub(crate) use meta::{MetaCheckpoint, MetaOptions, meta_name, row_unit, to_meta_order};
pub(crate) use nf4::{BLOCK_SIZE, LEVELS, NESTED_BLOCK_SIZE, Quantiser, nested_levels};
pub(crate) use params::{PARAMS, Params};
pub(crate) use rank_files::RankFiles;
pub(crate) use tensor_memory::return_large_blocks;
pub(crate) use torch_file::TorchWriter;
pub(crate) use writer::{FolderWriter, TOKENIZER_FILES, put_in_order};

pub(crate) use tensors::{EMBEDDING, HEAD, blocks, linear_shapes, shape_of, tensor_shapes};
