//! A checkpoint as one file a rank, which a rank loads without slicing.

use std::{ops::ControlFlow, path::PathBuf};

use crate::{
    checkpoint::{
        Checkpoint, FolderWriter, RankFiles, SafetensorsWriter, TOKENIZER_FILES, TensorSpec,
        put_in_order,
    },
    config::plain_config,
    deal::deal,
    error::Result,
    logit_check::{LogitDifference, TOLERANCE, compare},
    meter::Meter,
    plan::Plan,
};

/// Bytes of a weight in memory at once.
const BLOCK: usize = 8 << 20;

/// What is cut, and where to.
#[derive(Debug, Clone)]
pub struct ShardOptions {
    /// Folder of the checkpoint.
    pub checkpoint: PathBuf,
    /// Folder that is to be written; must not exist.
    pub output: PathBuf,
    /// Ranks.
    pub tp: usize,
    /// Compare the logits of both when the output is written.
    pub verify: bool,
}

/// What a cut did.
#[derive(Debug, Clone, PartialEq)]
pub struct ShardReport {
    /// Bytes of the tensors of each rank.
    pub rank_bytes: Vec<u64>,
    /// How far the logits of both are apart.
    pub difference: Option<LogitDifference>,
}

/// Writes what each rank of a tensor-parallel group owns into a file of its own. The folder opens as
/// the checkpoint that it was, and a group of `tp` ranks loads from it; its manifest has the size and
/// the hash of every file. `progress` gets the number of bytes of the checkpoint after each block, and
/// may stop it.
///
/// Each weight is read once. The output folder appears when it is complete; memory stays small whatever
/// the model's size.
///
/// # Errors
/// A model that cannot be cut into so many; [`Error::Interrupted`](crate::Error::Interrupted) where
/// `progress` says so; what reading, writing and publishing can meet.
pub fn shard(
    options: &ShardOptions,
    progress: &mut dyn FnMut(u64) -> ControlFlow<()>,
) -> Result<ShardReport> {
    let base = Checkpoint::open(&options.checkpoint)?;
    let plan = Plan::new(base.config(), options.tp)?;
    let mut tensors = base.specs()?;
    put_in_order(&mut tensors);
    let mut folder = FolderWriter::create(&options.output)?;
    folder.add_file("config.json", &plain_config(&options.checkpoint)?)?;
    folder.copy_companions(&options.checkpoint, &["generation_config.json"])?;
    folder.copy_companions(&options.checkpoint, TOKENIZER_FILES)?;
    folder.add_file(RankFiles::INDEX, &RankFiles::index(options.tp))?;
    let (dir, target) = folder.paths();
    let locals: Vec<Vec<TensorSpec>> =
        (0..options.tp).map(|rank| local_specs(&plan, rank, &tensors)).collect();
    let mut files = locals
        .iter()
        .enumerate()
        .map(|(rank, local)| {
            let name = RankFiles::file_name(rank, options.tp);
            SafetensorsWriter::create(dir, target, &name, local.clone())
        })
        .collect::<Result<Vec<_>>>()?;
    let meter = Meter::new(progress);
    for spec in &tensors {
        let shards: Vec<_> =
            (0..options.tp).map(|rank| plan.rank(rank).shard(&spec.name)).collect();
        for rows in spec.blocks(1, BLOCK) {
            let block = base.read_rows(&spec.name, rows.clone())?;
            deal(&shards, &rows, &block, &mut |rank, part| files[rank].append(&spec.name, part))?;
            meter.written(&block)?;
        }
    }
    for (rank, file) in files.into_iter().enumerate() {
        folder.add_written(RankFiles::file_name(rank, options.tp), file.finish()?);
    }
    let difference = folder.finish_checked(|dir| {
        let check = || compare(&base, &Checkpoint::open(dir)?, &options.output, TOLERANCE, &meter);
        options.verify.then(check).transpose()
    })?;
    let bytes = |local: &Vec<TensorSpec>| local.iter().map(TensorSpec::size).sum();
    Ok(ShardReport { rank_bytes: locals.iter().map(bytes).collect(), difference })
}

/// What a rank has of the tensors.
fn local_specs(plan: &Plan, rank: usize, tensors: &[TensorSpec]) -> Vec<TensorSpec> {
    let local = |spec: &TensorSpec| TensorSpec {
        shape: plan.rank(rank).shard(&spec.name).local_shape(&spec.shape),
        ..spec.clone()
    };
    tensors.iter().map(local).collect()
}
