//! An adapter added into its base, block by block.

use std::{
    ops::{ControlFlow, Range},
    path::PathBuf,
};

use tch::{Kind, Tensor};

use crate::{
    adapter::{AdapterFile, LoraPair},
    checkpoint::{Checkpoint, CheckpointWriter, Dtype, TensorSpec},
    config::plain_config,
    error::Result,
    logit_check::{Adapted, LogitDifference, compare},
    meter::Meter,
};

/// Bytes of a weight in memory at once; for 16-bit weights the f32 sum beside it has twice as many.
const BLOCK: usize = 8 << 20;

/// Logits may differ by so much where sums are rounded to f32: some models blow it up a thousandfold.
const F32_ROUNDING: f64 = 1e-3;
/// Where sums are rounded to 16 bits, logits of models that were trained differ by less than this. A
/// model may be as sensitive as it likes, so that more is no error.
const USUAL_ROUNDING: f64 = 3e-2;

/// What is merged, and where to.
#[derive(Debug, Clone)]
pub struct MergeOptions {
    /// Folder of the base checkpoint.
    pub checkpoint: PathBuf,
    /// Folder of the PEFT adapter.
    pub adapter: PathBuf,
    /// Folder that is to be written; must not exist.
    pub output: PathBuf,
    /// Largest weight file in bytes.
    pub max_shard_size: u64,
    /// Compare the logits of base and adapter with those of the output when it is written.
    pub verify: bool,
}

/// What a merge did.
#[derive(Debug, Clone, PartialEq)]
pub struct MergeReport {
    /// Tensors written.
    pub tensors: usize,
    /// Tensors among them that the adapter changed.
    pub merged: usize,
    /// Bytes of all tensors.
    pub bytes: u64,
    /// How far the logits of both are apart.
    pub difference: Option<LogitDifference>,
}

/// Writes the base with `W + scaling * B A` in place of each adapted weight `W`: added in f32,
/// stored in the base's type. A base in NF4 is dequantised: the adapter is added to what it was trained
/// on. `progress` gets the number of bytes after each block, and may stop
/// the merge.
///
/// The output folder appears when it is complete. Memory stays small whatever the model's size.
///
/// # Errors
/// An adapter that does not fit the base, before anything is written
/// ([`AdapterShape`](crate::Error::AdapterShape) names both shapes);
/// [`LogitsDiffer`](crate::Error::LogitsDiffer); [`Interrupted`](crate::Error::Interrupted) where
/// `progress` says so; what reading, writing and publishing can meet.
pub fn merge(
    options: &MergeOptions,
    progress: &mut dyn FnMut(u64) -> ControlFlow<()>,
) -> Result<MergeReport> {
    let base = Checkpoint::open(&options.checkpoint)?;
    let adapter = AdapterFile::open(&options.adapter)?;
    adapter.check_fits(base.config())?;
    let mut writer =
        CheckpointWriter::create(&options.output, base.specs()?, options.max_shard_size)?;
    writer.copy_companions(&options.checkpoint)?;
    writer.add_file("config.json", &plain_config(&options.checkpoint)?)?;
    let order = writer.order().to_vec();
    let mut merged = 0;
    let meter = Meter::new(progress);
    for TensorSpec { name, .. } in &order {
        let module = name.strip_suffix(".weight").filter(|module| adapter.has(module));
        let lora = module.map(|module| adapter.read(module)).transpose()?;
        for block in base.read_blocks(name, BLOCK)? {
            let (rows, weight) = block?;
            let block = match &lora {
                Some(lora) => add(&weight, lora, &rows, adapter.config().scaling())?,
                None => weight,
            };
            writer.append(name, &block)?;
            meter.written(&block)?;
        }
        merged += usize::from(lora.is_some());
    }
    let tolerance = if base.dtype() == Dtype::F32 { F32_ROUNDING } else { f64::INFINITY };
    let difference = writer.finish_checked(|dir| {
        let adapted = Adapted { base: &base, adapter: &adapter };
        let check =
            || compare(&adapted, &Checkpoint::open(dir)?, &options.output, tolerance, &meter);
        options.verify.then(check).transpose()
    })?;
    if let Some(difference) = difference.filter(|found| found.largest > USUAL_ROUNDING) {
        tracing::warn!(
            "{}: rounding the sums to {} moved the logits by {difference}",
            options.output.display(),
            base.dtype()
        );
    }
    Ok(MergeReport { tensors: order.len(), merged, bytes: meter.bytes(), difference })
}

/// Rows of a weight with the adapter's product added, in the kind in which they are stored.
fn add(weight: &Tensor, lora: &LoraPair, rows: &Range<i64>, scaling: f64) -> Result<Tensor> {
    let lora_b = lora.lora_b.f_narrow(0, rows.start, rows.end - rows.start)?; // (rows, r)
    let lora_b = lora_b.f_to_kind(Kind::Float)?.f_mul_scalar(scaling)?;
    let mut sum = lora_b.f_matmul(&lora.lora_a.f_to_kind(Kind::Float)?)?; // (rows, in)
    Ok(sum.f_add_(weight)?.f_to_kind(weight.f_kind()?)?)
}
