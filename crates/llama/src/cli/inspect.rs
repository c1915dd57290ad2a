use std::{
    collections::BTreeMap,
    fmt::Write as _,
    io::{self, Write as _},
    path::PathBuf,
};

use dromedary_command::{Common, Error, Progress, StopFlag, boolean, required};
use dromedary_tokenizer::Tokenizer;
use serde::{Deserialize, Serialize};

use super::settings;
use crate::{Checkpoint, RopeScaling, check_tokenizer, eos_token_ids};

/// Block in which weights are read for --verify.
const BLOCK: usize = 16 << 20;

/// Show what a checkpoint folder holds: configuration, tensors, tokenizer, fingerprint.
///
/// The folder is checked as strictly as for running it: names, shapes and data types of all
/// tensors, files against index, file lengths against headers.
#[derive(Debug, Default, clap::Args, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct InspectArgs {
    /// Folder of the checkpoint: config.json, safetensors files, tokenizer.
    #[arg(long, value_name = "DIR", aliases = ["ckpt-dir", "model-name-or-path"])]
    checkpoint: Option<PathBuf>,
    /// Read every weight too, and fail on the first that is NaN or infinite [default: false].
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_parser = boolean)]
    verify: Option<bool>,
}

#[derive(Debug, Serialize)]
struct InspectConfig {
    checkpoint: PathBuf,
    verify: bool,
}

impl TryFrom<InspectArgs> for InspectConfig {
    type Error = Error;

    fn try_from(args: InspectArgs) -> Result<Self, Error> {
        let checkpoint = required(args.checkpoint, "checkpoint")?;
        Ok(Self { checkpoint, verify: args.verify.unwrap_or(false) })
    }
}

pub(super) fn run(args: InspectArgs, common: &Common) -> anyhow::Result<()> {
    let Some(config) = settings::<_, InspectConfig>("inspect", args, common)? else {
        return Ok(());
    };
    let checkpoint = Checkpoint::open(&config.checkpoint)?;
    let mut report = describe(&checkpoint)?;
    if config.verify {
        verify(&checkpoint, !common.quiet)?;
        report.push_str("verified       every weight is finite\n");
    }
    io::stdout().write_all(report.as_bytes())?;
    Ok(())
}

fn verify(checkpoint: &Checkpoint, visible: bool) -> anyhow::Result<()> {
    let stop = StopFlag::install()?;
    let progress = Progress::new(Some(checkpoint.bytes_stored()), "bytes", visible);
    for name in checkpoint.names() {
        for block in checkpoint.read_blocks(name, BLOCK)? {
            let (_, rows) = block?;
            progress.inc((rows.numel() * rows.f_kind()?.elt_size_in_bytes()) as u64);
            stop.check(|| format!("stopped at {name}"))?;
        }
    }
    progress.finish();
    Ok(())
}

/// Lines of a name and its value.
fn describe(checkpoint: &Checkpoint) -> anyhow::Result<String> {
    let mut text = String::new();
    let mut line = |name: &str, value: String| writeln!(text, "{name:<15}{value}");
    let config = checkpoint.config();
    line("checkpoint", checkpoint.dir().display().to_string())?;
    line("parameters", config.num_parameters().to_string())?;
    line("layers", config.num_hidden_layers.to_string())?;
    line("hidden", format!("{} (ffn {})", config.hidden_size, config.intermediate_size))?;
    line(
        "heads",
        format!(
            "{} query, {} key/value, {} wide",
            config.num_attention_heads, config.num_key_value_heads, config.head_dim
        ),
    )?;
    line("context", config.max_position_embeddings.to_string())?;
    line("rope", format!("theta {}, {}", config.rope_theta, scaling(config.rope_scaling)))?;
    line("rms norm eps", config.rms_norm_eps.to_string())?;
    let head = if config.tie_word_embeddings { "tied to the embedding" } else { "its own" };
    line("vocabulary", format!("{}, head {head}", config.vocab_size))?;
    for (dtype, [tensors, bytes]) in by_dtype(checkpoint)? {
        line("tensors", format!("{tensors} x {dtype}, {bytes} bytes"))?;
    }
    let files = checkpoint.files().count();
    line("files", format!("{files}, {} bytes", checkpoint.bytes_stored()))?;
    if let Some(ranks) = checkpoint.cut_for() {
        line("cut for", format!("{ranks} ranks"))?;
    }
    line("tokenizer", tokenizer(checkpoint)?)?;
    line("fingerprint", checkpoint.fingerprint()?)?;
    Ok(text)
}

/// Number and bytes of the tensors of each data type.
fn by_dtype(checkpoint: &Checkpoint) -> anyhow::Result<BTreeMap<String, [u64; 2]>> {
    let mut all = BTreeMap::new();
    for name in checkpoint.names() {
        let dtype = checkpoint.dtype_of(name)?;
        let stored = match checkpoint.is_quantised(name) {
            true => format!("{dtype} in NF4"),
            false => dtype.to_string(),
        };
        let [tensors, bytes] = all.entry(stored).or_insert([0, 0]);
        *tensors += 1;
        *bytes += checkpoint.bytes_of(name)?;
    }
    Ok(all)
}

fn scaling(scaling: RopeScaling) -> String {
    match scaling {
        RopeScaling::None => "not scaled".into(),
        RopeScaling::Linear { factor } => format!("linear scaling by {factor}"),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, .. } => {
            format!("llama3 scaling by {factor} ({low_freq_factor} to {high_freq_factor})")
        }
    }
}

fn tokenizer(checkpoint: &Checkpoint) -> anyhow::Result<String> {
    if !Tokenizer::file(checkpoint.dir()).exists() {
        return Ok("none in this folder".into());
    }
    let tokenizer = Tokenizer::open(checkpoint.dir())?;
    check_tokenizer(checkpoint.config(), &tokenizer)?;
    let eos = eos_token_ids(checkpoint.dir(), &tokenizer)?;
    let bos = match (tokenizer.bos_id(), tokenizer.adds_bos()) {
        (None, _) => "no bos".into(),
        (Some(id), true) => format!("bos {id}, put first"),
        (Some(id), false) => format!("bos {id}, not used"),
    };
    Ok(format!("{} tokens, {bos}, eos {eos:?}", tokenizer.vocab_size()))
}
