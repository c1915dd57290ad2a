//! Opens a checkpoint, reads one tensor's slice, and writes all slices of one rank as a file of its own.
//!
//! ```text
//! cargo run --release --example write_shard -- models/llama-2-7b 8 3 rank3
//! ```

use std::{env, error::Error, path::Path};

use dromedary_llama::{
    Checkpoint, CheckpointWriter, DEFAULT_MAX_SHARD_SIZE, Plan, Result, TensorSpec,
};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [checkpoint, tp, rank, output] = arguments.as_slice() else {
        return Err("usage: write_shard CHECKPOINT RANKS RANK OUTPUT".into());
    };
    let report = write_shard(checkpoint.as_ref(), tp.parse()?, rank.parse()?, output.as_ref())?;
    #[allow(clippy::print_stdout, reason = "it is a program")]
    {
        println!("{report}");
    }
    Ok(())
}

/// Writes what one of `tp` ranks needs of a checkpoint; nothing larger than a slice is in memory.
pub fn write_shard(checkpoint: &Path, tp: usize, rank: usize, output: &Path) -> Result<String> {
    let checkpoint = Checkpoint::open(checkpoint)?;
    let plan = Plan::new(checkpoint.config(), tp)?;
    let owned = plan.rank(rank);

    // One tensor's slice; of a column-parallel weight, no byte of the other ranks is read.
    let name = "model.layers.0.mlp.up_proj.weight";
    let slice = checkpoint.read_slice(name, &owned.shard(name))?;
    let report = format!("{name}: {:?} of {:?}", slice.size(), checkpoint.shape(name)?);

    // All of them. The folder appears when it is complete.
    let specs = checkpoint
        .specs()?
        .into_iter()
        .map(|spec| TensorSpec { shape: owned.shard(&spec.name).local_shape(&spec.shape), ..spec });
    let mut writer = CheckpointWriter::create(output, specs.collect(), DEFAULT_MAX_SHARD_SIZE)?;
    for TensorSpec { name, .. } in writer.order().to_vec() {
        writer.append(&name, &checkpoint.read_slice(&name, &owned.shard(&name))?)?;
    }
    writer.finish()?;
    Ok(report)
}
