use std::{ops::ControlFlow, path::PathBuf};

use anyhow::Context;
use dromedary_command::{Common, Error, Progress, StopFlag, required};
use serde::{Deserialize, Serialize};

use super::{byte_size::ByteSize, settings};
use crate::{
    checkpoint::DEFAULT_MAX_SHARD_SIZE,
    merge::{MergeOptions, merge},
};

/// Add a LoRA adapter into its base and write a checkpoint of its own.
///
/// Weights are added in f32 and stored in the base's data type, block by block: memory stays small
/// whatever the model's size. The output folder appears when it is complete.
#[derive(Debug, Default, clap::Args, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct MergeArgs {
    /// Folder of the base: config.json, safetensors files, tokenizer.
    #[arg(long, value_name = "DIR", aliases = ["ckpt-dir", "model-name-or-path", "base-model"])]
    checkpoint: Option<PathBuf>,
    /// Folder of the PEFT adapter: adapter_config.json, adapter_model.safetensors.
    #[arg(long, value_name = "DIR", alias = "lora-weights")]
    adapter: Option<PathBuf>,
    /// Folder to write; must not exist.
    #[arg(long, value_name = "DIR", alias = "output-dir")]
    output: Option<PathBuf>,
    /// Largest weight file, in bytes or with a unit [default: 5GB].
    #[arg(long, value_name = "SIZE")]
    max_shard_size: Option<ByteSize>,
}

#[derive(Debug, Serialize)]
struct MergeConfig {
    checkpoint: PathBuf,
    adapter: PathBuf,
    output: PathBuf,
    max_shard_size: ByteSize,
}

impl TryFrom<MergeArgs> for MergeConfig {
    type Error = Error;

    fn try_from(args: MergeArgs) -> Result<Self, Error> {
        Ok(Self {
            checkpoint: required(args.checkpoint, "checkpoint")?,
            adapter: required(args.adapter, "adapter")?,
            output: required(args.output, "output")?,
            max_shard_size: args.max_shard_size.unwrap_or(ByteSize(DEFAULT_MAX_SHARD_SIZE)),
        })
    }
}

pub(super) fn run(args: MergeArgs, common: &Common) -> anyhow::Result<()> {
    let Some(config) = settings::<_, MergeConfig>("merge", args, common)? else { return Ok(()) };
    let stop = StopFlag::install()?;
    let progress = Progress::new(None, "bytes", !common.quiet);
    let mut on_block = |bytes| {
        progress.inc(bytes);
        if stop.is_set() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let options = MergeOptions {
        checkpoint: config.checkpoint,
        adapter: config.adapter,
        output: config.output,
        max_shard_size: config.max_shard_size.0,
    };
    let report = match merge(&options, &mut on_block) {
        Err(crate::Error::Interrupted) => {
            return Err(Error::stopped("merge stopped, nothing was written").into());
        }
        result => result.context("merge failed")?,
    };
    progress.finish();
    tracing::info!(
        "{}: {} tensors, {} of them changed, {} bytes",
        options.output.display(),
        report.tensors,
        report.merged,
        report.bytes
    );
    Ok(())
}
