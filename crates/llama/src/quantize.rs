//! A checkpoint's linear layers in four bits, block by block.

use std::{
    fs,
    ops::ControlFlow,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};

use crate::{
    checkpoint::{Checkpoint, CheckpointWriter, Quantiser, TensorSpec, put_in_order},
    error::{Error, Result},
    logit_check::{self, LogitDifference},
    meter::Meter,
};

/// Bytes of a weight in memory at once.
const BLOCK: usize = 4 << 20;

/// What is quantised, and where to.
#[derive(Debug, Clone)]
pub struct QuantizeOptions {
    /// Folder of the checkpoint.
    pub checkpoint: PathBuf,
    /// Folder that is to be written; must not exist.
    pub output: PathBuf,
    /// Largest weight file in bytes.
    pub max_shard_size: u64,
    /// Compare the logits of both when the output is written.
    pub verify: bool,
}

/// What a quantisation did.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantizeReport {
    /// Weights in four bits.
    pub quantised: usize,
    /// Parameters of these weights.
    pub parameters: u64,
    /// Bytes of these weights, scales and all that belongs to them included.
    pub quantised_bytes: u64,
    /// Bytes of all tensors.
    pub bytes: u64,
    /// How far the logits of both are apart.
    pub difference: Option<LogitDifference>,
}

/// Writes a checkpoint with its linear layers in NF4 with double quantisation, in the tensors in which
/// transformers saves and loads what bitsandbytes made: codes, scales and offset are bitsandbytes'. The
/// embedding, the head and the norms stay as they are. `progress` gets the number of bytes after each
/// block, and may stop it.
///
/// Each weight is read once. The output folder appears when it is complete; memory stays small whatever
/// the model's size.
///
/// # Errors
/// A checkpoint that is quantised already; [`Error::Interrupted`] where `progress` says so; what reading,
/// writing and publishing can meet.
pub fn quantize(
    options: &QuantizeOptions,
    progress: &mut dyn FnMut(u64) -> ControlFlow<()>,
) -> Result<QuantizeReport> {
    let base = Checkpoint::open(&options.checkpoint)?;
    if let Some(name) = base.names().find(|name| base.is_quantised(name)) {
        let message = format!("{name} is quantised already");
        return Err(Error::NoCheckpoint { path: options.checkpoint.clone(), message });
    }
    let mut weights = base.specs()?;
    put_in_order(&mut weights);
    let (quantised, mut plain): (Vec<_>, Vec<_>) =
        weights.into_iter().partition(|spec| is_linear(&spec.name));
    let mut specs = plain.clone();
    specs.extend(quantised.iter().flat_map(|spec| Quantiser::new(spec.clone()).specs()));
    let mut writer =
        CheckpointWriter::create_in_order(&options.output, specs, options.max_shard_size)?;
    writer.copy_companions(&options.checkpoint)?;
    writer.add_file("config.json", &quantised_config(&options.checkpoint)?)?;
    let meter = Meter::new(progress);
    for spec in plain.drain(..) {
        for rows in spec.blocks(1, BLOCK) {
            let block = base.read_rows(&spec.name, rows)?;
            writer.append(&spec.name, &block)?;
            meter.written(&block)?;
        }
    }
    let plain_bytes = meter.bytes();
    for spec in &quantised {
        quantise(&base, spec, &mut writer, &meter)?;
    }
    let bytes = meter.bytes();
    let difference = writer.finish_checked(|dir| {
        let check = || logit_check::difference(&base, &Checkpoint::open(dir)?, &meter);
        options.verify.then(check).transpose()
    })?;
    Ok(QuantizeReport {
        quantised: quantised.len(),
        parameters: quantised.iter().map(|spec| spec.size() / spec.dtype.size() as u64).sum(),
        quantised_bytes: bytes - plain_bytes,
        bytes,
        difference,
    })
}

fn quantise(
    base: &Checkpoint,
    spec: &TensorSpec,
    writer: &mut CheckpointWriter,
    meter: &Meter<'_>,
) -> Result<()> {
    let mut quantiser = Quantiser::new(spec.clone());
    for rows in spec.blocks(quantiser.unit(), BLOCK) {
        let codes = quantiser.codes(&base.read_rows(&spec.name, rows)?)?;
        writer.append(&spec.name, &codes)?;
        meter.written(&codes)?;
    }
    for (name, tensor) in quantiser.finish()? {
        writer.append(&name, &tensor)?;
        meter.written(&tensor)?;
    }
    Ok(())
}

/// Whether a tensor is one of those that become NF4.
pub(crate) fn is_linear(name: &str) -> bool {
    name.ends_with("_proj.weight")
}

/// `config.json` with the settings by which transformers loads the weights.
fn quantised_config(dir: &Path) -> Result<Vec<u8>> {
    let path = dir.join("config.json");
    let bytes = fs::read(&path).map_err(Error::io(&path))?;
    let mut config: Value = serde_json::from_slice(&bytes)
        .map_err(|source| Error::Json { path: path.clone(), source })?;
    config["quantization_config"] = json!({
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": true,
        "llm_int8_enable_fp32_cpu_offload": false,
        "llm_int8_has_fp16_weight": false,
        "llm_int8_skip_modules": ["lm_head"],
        "llm_int8_threshold": 6.0,
        "load_in_4bit": true,
        "load_in_8bit": false,
        "quant_method": "bitsandbytes",
    });
    Ok(format!("{config:#}\n").into_bytes())
}
