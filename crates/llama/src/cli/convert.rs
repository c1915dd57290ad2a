use std::path::PathBuf;

use anyhow::Context;
use dromedary_command::{ByteSize, Common, Error, boolean, ignored_flags, required};
use serde::{Deserialize, Serialize};

use super::{settings, watched::Watched};
use crate::{
    CheckpointFormat, ConvertOptions, checkpoint::DEFAULT_MAX_SHARD_SIZE, convert::convert,
};

/// Turn a checkpoint of Meta's layout into Hugging Face's, or the other way.
///
/// A folder with params.json and consolidated.NN.pth becomes one with config.json and safetensors
/// files, and the reverse; any number of files, padded checkpoints of Dromedary too. Weights keep their
/// data type and pass in blocks: memory stays small. At the end both sides compute the logits of a
/// fixed prompt; the output folder appears when they agree.
#[derive(Debug, Default, clap::Args, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct ConvertArgs {
    /// Folder of the checkpoint, in either layout.
    #[arg(long, value_name = "DIR", aliases = ["ckpt-dir", "model-name-or-path", "base-model", "input-dir"])]
    checkpoint: Option<PathBuf>,
    /// Folder to write; must not exist.
    #[arg(long, value_name = "DIR", alias = "output-dir")]
    output: Option<PathBuf>,
    /// Files consolidated.NN.pth to write for Meta's layout; must divide heads and widths [default: 1].
    #[arg(long, value_name = "COUNT", alias = "total-ranks")]
    num_shards: Option<usize>,
    /// Largest safetensors file, in bytes or with a unit [default: 5GB].
    #[arg(long, value_name = "SIZE")]
    max_shard_size: Option<ByteSize>,
    /// Tokenizer of a checkpoint of Meta's layout, file or folder [default: the checkpoint's].
    #[arg(long, value_name = "PATH", aliases = ["tokenizer-path", "tokenizer-name"])]
    tokenizer: Option<PathBuf>,
    /// Context of a checkpoint of Meta's layout, which its files do not say [default: that of Meta's
    /// models with these constants].
    #[arg(long, value_name = "TOKENS")]
    max_position_embeddings: Option<i64>,
    /// Do not compare the logits of input and output.
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_parser = boolean)]
    no_verify: Option<bool>,
    #[command(flatten)]
    #[serde(flatten)]
    ignored: IgnoredConvertArgs,
}

/// Flags of Dromedary's converters that say what is known here: sizes come from the configuration, every
/// file is a safetensors file, and no model needs padding to be split.
#[derive(Debug, Default, clap::Args, Serialize, Deserialize)]
#[serde(default)]
struct IgnoredConvertArgs {
    #[arg(long, hide = true)]
    model_size: Option<String>,
    #[arg(long, hide = true, num_args = 0..=1, default_missing_value = "true")]
    safe_serialization: Option<String>,
    #[arg(long, hide = true)]
    write_mode: Option<String>,
    #[arg(long, hide = true)]
    expanded_att_dim: Option<String>,
    #[arg(long, hide = true)]
    expanded_ffn_dim: Option<String>,
    #[arg(long, hide = true)]
    expanded_vocab_size: Option<String>,
}

#[derive(Debug, Serialize)]
struct ConvertConfig {
    checkpoint: PathBuf,
    output: PathBuf,
    num_shards: usize,
    max_shard_size: ByteSize,
    #[serde(skip_serializing_if = "Option::is_none")]
    tokenizer: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_position_embeddings: Option<i64>,
    no_verify: bool,
}

impl TryFrom<ConvertArgs> for ConvertConfig {
    type Error = Error;

    fn try_from(args: ConvertArgs) -> Result<Self, Error> {
        ignored_flags(&args.ignored)?;
        Ok(Self {
            checkpoint: required(args.checkpoint, "checkpoint")?,
            output: required(args.output, "output")?,
            num_shards: args.num_shards.unwrap_or(1),
            max_shard_size: args.max_shard_size.unwrap_or(ByteSize(DEFAULT_MAX_SHARD_SIZE)),
            tokenizer: args.tokenizer,
            max_position_embeddings: args.max_position_embeddings,
            no_verify: args.no_verify.unwrap_or(false),
        })
    }
}

pub(super) fn run(args: ConvertArgs, common: &Common) -> anyhow::Result<()> {
    let Some(config) = settings::<_, ConvertConfig>("convert", args, common)? else {
        return Ok(());
    };
    let watched = Watched::new("convert", common)?;
    let options = ConvertOptions {
        checkpoint: config.checkpoint,
        output: config.output,
        num_shards: config.num_shards,
        max_shard_size: config.max_shard_size.0,
        tokenizer: config.tokenizer,
        max_position_embeddings: config.max_position_embeddings,
        verify: !config.no_verify,
    };
    if CheckpointFormat::of(&options.checkpoint)? == CheckpointFormat::HuggingFace
        && (options.tokenizer.is_some() || options.max_position_embeddings.is_some())
    {
        let message = "tokenizer and max_position_embeddings are for checkpoints of Meta's layout";
        return Err(Error::usage(message)).context(options.checkpoint.display().to_string());
    }
    let report = watched.run(|progress| convert(&options, progress))?;
    let layout = match report.format {
        CheckpointFormat::Meta => "Meta's layout",
        CheckpointFormat::HuggingFace => "Hugging Face's layout",
    };
    tracing::info!(
        "{}: {layout}, {} tensors, {} bytes",
        options.output.display(),
        report.tensors,
        report.bytes
    );
    watched.print_difference(report.difference)
}
