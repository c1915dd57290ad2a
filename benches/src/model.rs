//! The model of a bench, as it is stored or quantised for the moment.

use std::{ops::ControlFlow, path::Path};

use anyhow::Result;
use dromedary_llama::{
    Checkpoint, DEFAULT_MAX_SHARD_SIZE, Llama, LoadOptions, QuantizeOptions, quantize,
};

/// Loads a checkpoint. Where `options` ask for four bits, one that is not stored so is quantised into a
/// folder that is gone afterwards.
pub(crate) fn load(checkpoint: &Path, options: &LoadOptions) -> Result<Llama> {
    let stored = Checkpoint::open(checkpoint)?;
    if !options.nf4 || stored.stores_nf4() {
        return Ok(Llama::load(&stored, options)?);
    }
    let folder = tempfile::tempdir()?;
    let quantised = QuantizeOptions {
        checkpoint: checkpoint.to_owned(),
        output: folder.path().join("nf4"),
        max_shard_size: DEFAULT_MAX_SHARD_SIZE,
        verify: false,
    };
    quantize(&quantised, &mut |_| ControlFlow::Continue(()))?;
    Ok(Llama::load(&Checkpoint::open(&quantised.output)?, options)?)
}
