use std::path::PathBuf;

use dromedary_command::{Common, Error, boolean, required};
use serde::{Deserialize, Serialize};

use super::{settings, watched::Watched};
use crate::{ShardOptions, shard::shard};

/// Cut a checkpoint into one file a process, which each loads as it is.
///
/// The folder has a manifest with the size and hash of every file: a damaged, exchanged or foreign one
/// is refused by name. --checkpoint of all programs takes the folder, with as many processes as it was
/// cut for; this crate's tools read it as the whole model.
#[derive(Debug, Default, clap::Args, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct ShardArgs {
    /// Folder of the checkpoint: config.json, safetensors files, tokenizer.
    #[arg(long, value_name = "DIR", aliases = ["ckpt-dir", "model-name-or-path", "base-model"])]
    checkpoint: Option<PathBuf>,
    /// Folder to write; must not exist.
    #[arg(long, value_name = "DIR", alias = "output-dir")]
    output: Option<PathBuf>,
    /// Processes that will load it; at most as many as query heads.
    #[arg(long, value_name = "COUNT", alias = "total-ranks")]
    tp: Option<usize>,
    /// Do not compare the logits of input and output.
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_parser = boolean)]
    no_verify: Option<bool>,
}

#[derive(Debug, Serialize)]
struct ShardConfig {
    checkpoint: PathBuf,
    output: PathBuf,
    tp: usize,
    no_verify: bool,
}

impl TryFrom<ShardArgs> for ShardConfig {
    type Error = Error;

    fn try_from(args: ShardArgs) -> Result<Self, Error> {
        Ok(Self {
            checkpoint: required(args.checkpoint, "checkpoint")?,
            output: required(args.output, "output")?,
            tp: required(args.tp, "tp")?,
            no_verify: args.no_verify.unwrap_or(false),
        })
    }
}

pub(super) fn run(args: ShardArgs, common: &Common) -> anyhow::Result<()> {
    let Some(config) = settings::<_, ShardConfig>("shard", args, common)? else { return Ok(()) };
    let watched = Watched::new("shard", common)?;
    let options = ShardOptions {
        checkpoint: config.checkpoint,
        output: config.output,
        tp: config.tp,
        verify: !config.no_verify,
    };
    let report = watched.run(|progress| shard(&options, progress))?;
    tracing::info!("{}: bytes by rank {:?}", options.output.display(), report.rank_bytes);
    watched.print_difference(report.difference)
}
