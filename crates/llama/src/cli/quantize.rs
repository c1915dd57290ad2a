use std::path::PathBuf;

use dromedary_command::{ByteSize, Common, Error, boolean, required};
use serde::{Deserialize, Serialize};

use super::{settings, watched::Watched};
use crate::{QuantizeOptions, checkpoint::DEFAULT_MAX_SHARD_SIZE, quantize::quantize};

/// Store a checkpoint's linear layers in four bits: NF4 with double quantisation.
///
/// The tensors are those that transformers saves of a model that bitsandbytes quantised, with the same
/// numbers. Embedding, head and norms stay as they are. Weights pass in blocks: memory stays small. At
/// the end both sides compute the logits of a fixed prompt, and the difference is printed: it is that of
/// four bits, so that no bound decides.
#[derive(Debug, Default, clap::Args, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct QuantizeArgs {
    /// Folder of the checkpoint: config.json, safetensors files, tokenizer.
    #[arg(long, value_name = "DIR", aliases = ["ckpt-dir", "model-name-or-path", "base-model"])]
    checkpoint: Option<PathBuf>,
    /// Folder to write; must not exist.
    #[arg(long, value_name = "DIR", alias = "output-dir")]
    output: Option<PathBuf>,
    /// Quantise to NF4, blocks of 64, scales in 8 bits; there is no other way yet.
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_parser = boolean)]
    nf4: Option<bool>,
    /// Largest weight file, in bytes or with a unit [default: 5GB].
    #[arg(long, value_name = "SIZE")]
    max_shard_size: Option<ByteSize>,
    /// Do not compare the logits of input and output.
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_parser = boolean)]
    no_verify: Option<bool>,
}

#[derive(Debug, Serialize)]
struct QuantizeConfig {
    checkpoint: PathBuf,
    output: PathBuf,
    nf4: bool,
    max_shard_size: ByteSize,
    no_verify: bool,
}

impl TryFrom<QuantizeArgs> for QuantizeConfig {
    type Error = Error;

    fn try_from(args: QuantizeArgs) -> Result<Self, Error> {
        if args.nf4 != Some(true) {
            return Err(Error::usage("say how to quantise: --nf4"));
        }
        Ok(Self {
            checkpoint: required(args.checkpoint, "checkpoint")?,
            output: required(args.output, "output")?,
            nf4: true,
            max_shard_size: args.max_shard_size.unwrap_or(ByteSize(DEFAULT_MAX_SHARD_SIZE)),
            no_verify: args.no_verify.unwrap_or(false),
        })
    }
}

pub(super) fn run(args: QuantizeArgs, common: &Common) -> anyhow::Result<()> {
    let Some(config) = settings::<_, QuantizeConfig>("quantize", args, common)? else {
        return Ok(());
    };
    let watched = Watched::new("quantize", common)?;
    let options = QuantizeOptions {
        checkpoint: config.checkpoint,
        output: config.output,
        max_shard_size: config.max_shard_size.0,
        verify: !config.no_verify,
    };
    let report = watched.run(|progress| quantize(&options, progress))?;
    tracing::info!(
        "{}: {} weights in NF4, {:.3} bits a parameter of theirs, {} bytes in all",
        options.output.display(),
        report.quantised,
        report.quantised_bytes as f64 * 8.0 / report.parameters.max(1) as f64,
        report.bytes
    );
    watched.print_difference(report.difference)
}
