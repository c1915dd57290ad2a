//! Training checkpoints: a folder that exists under its name is complete.
//!
//! `checkpoint-<step>/` holds the adapter in PEFT's format (the values, in f32), `optimizer.safetensors`
//! (both moments, one entry a matrix; where weights are trained their values too, in f32), `trainer_state.json` with the run's position in its data, its
//! schedule and its random numbers, and, written last, a manifest with sizes and hashes. These three
//! are functions of the position and of the settings, whose hash must be the same.

use std::{
    fs,
    path::{Path, PathBuf},
};

use dromedary_files::{AtomicDir, Manifest};
use dromedary_llama::{AdapterFile, Dtype, SafetensorsWriter, Shard, TensorFile, TensorSpec};
use dromedary_parallel::fault_point;
use dromedary_torch_ext::release_free_memory;
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::{
    error::{Error, Result},
    optimizer::{Entry, Held},
    publish::{ADAPTER_DIR, MODEL_DIR},
    ranks::Ranks,
    trained::Trained,
    trainer::Position,
};

const PREFIX: &str = "checkpoint-";
const TRASH: &str = ".trash";
/// Checkpoints that rotation leaves at least, damaged ones not counted: one may yet prove bad.
const LEAST_GOOD: usize = 2;
const OPTIMIZER_FILE: &str = "optimizer.safetensors";
const STATE_FILE: &str = "trainer_state.json";

/// What a checkpoint says of the run besides tensors.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TrainerState {
    /// Where the run stood.
    pub position: Position,
    /// Seed of the random numbers and of the order of the rows.
    pub seed: u64,
    /// Updates done.
    pub updates: u64,
    /// Hash of everything that the following steps depend on.
    pub config_hash: String,
    /// Replicas that the run had, and ranks of each.
    #[serde(default = "one_rank")]
    pub dp_and_tp: [usize; 2],
}

/// What runs had before they could have more.
fn one_rank() -> [usize; 2] {
    [1, 1]
}

/// `dp 2 x tp 1`
fn layout([dp, tp]: [usize; 2]) -> String {
    format!("dp {dp} x tp {tp}")
}

/// Writes `checkpoint-<step>` under `output_dir`: the first rank does, out of the parts of its replica.
/// Every rank must call this.
///
/// # Errors
/// If the disk is full or not writable; nothing is left under the checkpoint's name then.
pub(crate) fn save(
    output_dir: &Path,
    trained: &Trained,
    state: &TrainerState,
    ranks: &Ranks<'_>,
) -> Result<PathBuf> {
    let step = state.position.step;
    let path = output_dir.join(format!("{PREFIX}{step}"));
    write(&path, trained, state, ranks)?;
    ranks.world().barrier()?;
    Ok(path)
}

/// Every rank must call this; the first writes. What the others hold comes to it an entry at a time, so that
/// it never has the whole model's numbers.
fn write(path: &Path, trained: &Trained, state: &TrainerState, ranks: &Ranks<'_>) -> Result<()> {
    let step = state.position.step;
    let dir = ranks.is_first().then(|| AtomicDir::replace_existing(path)).transpose()?;
    let folder = dir.as_ref().map(AtomicDir::path);
    let fault = |point: &str| fault_point(point, step as usize);
    if ranks.is_of_first_replica() {
        trained.write_adapter(folder, ranks.tp())?;
    }
    if folder.is_some() {
        fault("after-shard")?;
    }
    write_states(folder.zip(Some(path)), trained, ranks)?;
    let Some(dir) = dir else { return Ok(()) };
    let text = serde_json::to_vec_pretty(state)
        .map_err(|error| damaged(path, format!("state: {error}")))?;
    dromedary_files::write_atomic(dir.path().join(STATE_FILE), &text)?;
    fault("before-manifest")?;
    let manifest = Manifest::of_dir(dir.path())?;
    let sealed = dir.seal(&manifest)?;
    fault("before-rename")?;
    sealed.publish()?;
    fault("after-rename")?;
    Ok(())
}

/// Reads a checkpoint that one rank has verified into `trained`, and returns where the run stood. Each rank
/// reads its part, a tensor at a time: it holds nothing twice.
///
/// # Errors
/// If a file is missing or of another run; the file or the difference is named.
pub(crate) fn load(
    path: &Path,
    trained: &mut Trained,
    config_hash: &str,
    ranks: &Ranks<'_>,
) -> Result<Position> {
    let state = read_state(path)?;
    check_run(path, &state, config_hash, ranks)?;
    let adapter = (!trained.trains_weights()).then(|| AdapterFile::open(path)).transpose()?;
    let file = TensorFile::open(&path.join(OPTIMIZER_FILE))?;
    trained.restore(state.updates, |entry, held, shard| match (held, &adapter) {
        (Held::Value, Some(adapter)) => value_of(adapter, &entry.name, shard)?
            .ok_or_else(|| damaged(path, format!("the adapter lacks {}", entry.name))),
        _ => Ok(file.read_slice(&name_of(entry, held), shard)?),
    })?;
    release_free_memory();
    Ok(state.position)
}

/// The run that is to go on must be the one that was interrupted; its ranks may be others.
fn check_run(
    path: &Path,
    state: &TrainerState,
    config_hash: &str,
    ranks: &Ranks<'_>,
) -> Result<()> {
    let (written, now) = (state.dp_and_tp, [ranks.dims().dp, ranks.dims().tp]);
    if state.config_hash == config_hash {
        if written != now {
            let (path, written, now) = (path.display(), layout(written), layout(now));
            tracing::info!("{path} was written at {written} and is read at {now}");
        }
        return Ok(());
    }
    Err(damaged(
        path,
        format!(
            "it belongs to a run with other settings or data (hash {}, this run has {config_hash}); \
             give another --output-dir, or --resume never; it was written at {}, and this run is at {}: \
             --per-device-train-batch-size must be the same, and --gradient-accumulation-steps x dp",
            state.config_hash,
            layout(written),
            layout(now)
        ),
    ))
}

/// The newest checkpoint of `output_dir` that is whole. Damaged ones are reported and passed over.
///
/// # Errors
/// If there are checkpoints and none is whole: starting anew would hide the loss.
pub(crate) fn newest(output_dir: &Path) -> Result<Option<PathBuf>> {
    let mut last_error = None;
    for path in list(output_dir)?.into_iter().rev() {
        match verify(&path) {
            Ok(()) => return Ok(Some(path)),
            Err(error) => {
                tracing::warn!("{error}; trying the one before");
                last_error = Some(error);
            }
        }
    }
    last_error.map_or(Ok(None), Err)
}

/// The newest checkpoint of `output_dir` that is whole, or `other`, where that is of a later step or the
/// folder has none.
///
/// # Errors
/// As [`newest`], or if `other` is damaged.
pub(crate) fn newest_or(output_dir: &Path, other: &Path) -> Result<PathBuf> {
    let newest = newest(output_dir)?;
    // Rotation may have removed it.
    let of_other = read_state(other).map_or(0, |state| state.position.step);
    match newest {
        Some(newest) if read_state(&newest)?.position.step >= of_other => Ok(newest),
        _ => verify(other).map(|()| other.to_owned()),
    }
}

/// Removes the oldest checkpoints until `keep` are left. Where fewer than two of these are whole,
/// whole ones among the older stay.
///
/// # Errors
/// If a folder cannot be removed.
pub(crate) fn rotate(output_dir: &Path, keep: usize) -> Result<()> {
    let steps = steps(output_dir)?;
    let (old, kept) = steps.split_at(steps.len().saturating_sub(keep));
    if old.is_empty() {
        return Ok(());
    }
    let is_good = |path: &Path| verify(path).map_err(|error| tracing::warn!("{error}")).is_ok();
    let mut good = kept.iter().rev().filter(|(_, path)| is_good(path)).take(LEAST_GOOD).count();
    for (step, path) in old.iter().rev() {
        if good < LEAST_GOOD && is_good(path) {
            good += 1;
        } else {
            discard(*step, path)?;
        }
    }
    Ok(())
}

/// Renamed first: a kill in the middle must not leave half a checkpoint under its name.
fn discard(step: u64, path: &Path) -> Result<()> {
    let trash = path.with_extension(&TRASH[1..]);
    let io = |source| Error::Io { path: path.to_owned(), source };
    fs::rename(path, &trash).map_err(io)?;
    fault_point("in-rotation", step as usize)?;
    fs::remove_dir_all(&trash).map_err(io)
}

/// Removes what killed runs left: checkpoints, adapters and models that were never complete, and
/// checkpoints that were on their way out. The caller holds the folder's lock.
///
/// # Errors
/// If a folder cannot be removed.
pub(crate) fn sweep(output_dir: &Path) -> Result<()> {
    let io = |source| Error::Io { path: output_dir.to_owned(), source };
    for entry in fs::read_dir(output_dir).map_err(io)? {
        let entry = entry.map_err(io)?;
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        let is_ours = |name: &str| {
            let (target, _) = name.split_once('.').unwrap_or_default();
            target.starts_with(PREFIX) || [ADAPTER_DIR, MODEL_DIR].contains(&target)
        };
        let torn = name.ends_with(".tmp") && name.strip_prefix('.').is_some_and(is_ours);
        let rotated = name.starts_with(PREFIX) && name.ends_with(TRASH);
        if torn {
            tracing::warn!("{} was never complete: removed", entry.path().display());
        }
        if torn || rotated {
            fs::remove_dir_all(entry.path()).map_err(io)?;
        }
    }
    Ok(())
}

/// Renames the checkpoints of later steps than `step`, the one that a run goes on from: damaged ones,
/// or those of a run that the user has gone back behind. Left in place they would pass for the newest.
///
/// # Errors
/// If a folder cannot be renamed.
pub(crate) fn set_aside(output_dir: &Path, step: u64) -> Result<()> {
    for (later, path) in steps(output_dir)?.into_iter().filter(|(later, _)| *later > step) {
        let target = unused(output_dir, &format!("set-aside-{PREFIX}{later}"));
        tracing::warn!("{} is behind step {step}: now {}", path.display(), target.display());
        fs::rename(&path, &target).map_err(|source| Error::Io { path, source })?;
    }
    Ok(())
}

/// `name`, or the first of `name-2`, `name-3`, ... that does not exist.
pub(crate) fn unused(dir: &Path, name: &str) -> PathBuf {
    let numbered = (2u32..).map(|number| dir.join(format!("{name}-{number}")));
    std::iter::once(dir.join(name))
        .chain(numbered)
        .find(|path| !path.exists())
        .unwrap_or_else(|| dir.join(name))
}

/// Checkpoint folders by step, oldest first.
fn list(output_dir: &Path) -> Result<Vec<PathBuf>> {
    Ok(steps(output_dir)?.into_iter().map(|(_, path)| path).collect())
}

/// Checkpoint folders with their steps, oldest first.
fn steps(output_dir: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let io = |source| Error::Io { path: output_dir.to_owned(), source };
    let mut found = Vec::new();
    for entry in fs::read_dir(output_dir).map_err(io)? {
        let entry = entry.map_err(io)?;
        let name = entry.file_name();
        let step = name.to_str().and_then(|name| name.strip_prefix(PREFIX)?.parse::<u64>().ok());
        found.extend(step.map(|step| (step, entry.path())));
    }
    found.sort();
    Ok(found)
}

/// Compares all files of a checkpoint with its manifest.
///
/// # Errors
/// If one is missing or damaged; it is named.
pub(crate) fn verify(path: &Path) -> Result<()> {
    let manifest = Manifest::read(path)?;
    Ok(manifest.verify(path)?)
}

fn read_state(path: &Path) -> Result<TrainerState> {
    serde_json::from_slice(&read(&path.join(STATE_FILE))?)
        .map_err(|error| damaged(path, format!("{STATE_FILE}: {error}")))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(|source| Error::Io { path: path.to_owned(), source })
}

fn damaged(path: &Path, message: String) -> Error {
    Error::Checkpoint { path: path.to_owned(), message }
}

/// A rank's part of the value of an optimizer's entry in an adapter, which may not have it.
pub(crate) fn value_of(
    adapter: &AdapterFile,
    entry: &str,
    shard: &Shard,
) -> Result<Option<Tensor>> {
    let factor = entry.rsplit_once('.').filter(|(module, _)| adapter.has(module));
    let read = |(module, factor)| Ok(adapter.read_factor(module, factor, shard)?);
    factor.map(read).transpose()
}

/// A tensor's name in the optimizer's file, with PyTorch's for the moments.
fn name_of(entry: &Entry, held: Held) -> String {
    let name = &entry.name;
    match held {
        Held::Value => name.clone(),
        Held::ExpAvg => format!("{name}.exp_avg"),
        Held::ExpAvgSq => format!("{name}.exp_avg_sq"),
    }
}

/// Writes the moments of all entries, and their values where weights are trained, on the rank that has
/// a folder and the name that it will have. Every rank must call this.
fn write_states(
    folder: Option<(&Path, &Path)>,
    trained: &Trained,
    ranks: &Ranks<'_>,
) -> Result<()> {
    // An adapter has the values in a file of its own.
    let is_written = |held: &Held| trained.trains_weights() || *held != Held::Value;
    let entries = trained.optimizer.entries();
    let specs = entries.iter().enumerate().flat_map(|(index, entry)| {
        Held::ALL.into_iter().filter(is_written).map(move |held| TensorSpec {
            name: name_of(entry, held),
            dtype: Dtype::F32,
            shape: trained.whole_shape(index),
        })
    });
    let mut writer = match folder {
        Some((dir, target)) => {
            Some(SafetensorsWriter::create(dir, target, OPTIMIZER_FILE, specs.collect())?)
        }
        None => None,
    };
    for (index, entry) in entries.iter().enumerate() {
        let state = trained.whole_state(index, ranks)?;
        let Some((writer, state)) = writer.as_mut().zip(state) else { continue };
        for (held, tensor) in Held::ALL.into_iter().zip(&state) {
            if is_written(&held) {
                writer.append(&name_of(entry, held), tensor)?;
            }
        }
    }
    writer.map_or(Ok(()), |writer| Ok(writer.finish().map(drop)?))
}
