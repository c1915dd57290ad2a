use std::path::PathBuf;

use dromedary_command::{ByteSize, Common, Error, boolean, required};
use serde::{Deserialize, Serialize};

use super::{settings, watched::Watched};
use crate::{
    checkpoint::DEFAULT_MAX_SHARD_SIZE,
    merge::{MergeOptions, merge},
};

/// Add a LoRA adapter into its base and write a checkpoint of its own.
///
/// Weights are added in f32 and stored in the base's data type, block by block: memory stays small
/// whatever the model's size. A base in NF4 is dequantised: an adapter that was trained on it belongs to
/// these weights. At the end both sides compute the logits of a fixed prompt; the output folder appears
/// when they agree.
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
    /// Do not compare the logits of base and adapter with those of the output.
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_parser = boolean)]
    no_verify: Option<bool>,
}

#[derive(Debug, Serialize)]
struct MergeConfig {
    checkpoint: PathBuf,
    adapter: PathBuf,
    output: PathBuf,
    max_shard_size: ByteSize,
    no_verify: bool,
}

impl TryFrom<MergeArgs> for MergeConfig {
    type Error = Error;

    fn try_from(args: MergeArgs) -> Result<Self, Error> {
        Ok(Self {
            checkpoint: required(args.checkpoint, "checkpoint")?,
            adapter: required(args.adapter, "adapter")?,
            output: required(args.output, "output")?,
            max_shard_size: args.max_shard_size.unwrap_or(ByteSize(DEFAULT_MAX_SHARD_SIZE)),
            no_verify: args.no_verify.unwrap_or(false),
        })
    }
}

pub(super) fn run(args: MergeArgs, common: &Common) -> anyhow::Result<()> {
    let Some(config) = settings::<_, MergeConfig>("merge", args, common)? else { return Ok(()) };
    let watched = Watched::new("merge", common)?;
    let options = MergeOptions {
        checkpoint: config.checkpoint,
        adapter: config.adapter,
        output: config.output,
        max_shard_size: config.max_shard_size.0,
        verify: !config.no_verify,
    };
    let report = watched.run(|progress| merge(&options, progress))?;
    tracing::info!(
        "{}: {} tensors, {} of them changed, {} bytes",
        options.output.display(),
        report.tensors,
        report.merged,
        report.bytes
    );
    watched.print_difference(report.difference)
}
