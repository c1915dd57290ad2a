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
use dromedary_llama::{Adapter, Dtype, SafetensorsWriter, TensorSpec};
use dromedary_parallel::fault_point;
use safetensors::SafeTensors;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::{
    error::{Error, Result},
    optimizer::Entry,
    publish::ADAPTER_DIR,
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
/// PyTorch's names for the first and the second moment.
const MOMENTS: [&str; 2] = ["exp_avg", "exp_avg_sq"];

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

/// Reads a checkpoint into `trained`, of which each rank takes its part, and returns where the run stood.
///
/// # Errors
/// If a file is missing, damaged or of another run; the file or the difference is named.
pub(crate) fn load(
    path: &Path,
    trained: &mut Trained,
    config_hash: &str,
    ranks: &Ranks<'_>,
) -> Result<Position> {
    verify(path)?;
    let state = read_state(path)?;
    check_run(path, &state, config_hash, ranks)?;
    let adapter = if trained.trains_weights() { None } else { Some(Adapter::open(path)?) };
    let bytes = read(&path.join(OPTIMIZER_FILE))?;
    let file = SafeTensors::deserialize(&bytes)
        .map_err(|error| damaged(path, format!("{OPTIMIZER_FILE}: {error}")))?;
    let states = trained
        .optimizer
        .entries()
        .iter()
        .map(|entry| {
            let value = match &adapter {
                Some(adapter) => value_of(adapter, &entry.name)
                    .ok_or_else(|| damaged(path, format!("the adapter lacks {}", entry.name)))?,
                None => read_tensor(&file, &entry.name, path)?,
            };
            let moment = |kind: &str| read_tensor(&file, &format!("{}.{kind}", entry.name), path);
            Ok([value, moment(MOMENTS[0])?, moment(MOMENTS[1])?])
        })
        .collect::<Result<Vec<_>>>()?;
    trained.restore(&states, state.updates)?;
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
    let hint = match written == now {
        true => String::new(),
        false => format!(
            "; it was written at {}, and at {} the rows of a step, --per-device-train-batch-size x \
             --gradient-accumulation-steps x dp, must be as many",
            layout(written),
            layout(now)
        ),
    };
    Err(damaged(
        path,
        format!(
            "it belongs to a run with other settings or data (hash {}, this run has {config_hash}); \
             give another --output-dir, or --resume never{hint}",
            state.config_hash
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

/// Removes what killed runs left: checkpoints and adapters that were never complete, and complete
/// ones that were on their way out. The caller holds the folder's lock.
///
/// # Errors
/// If a folder cannot be removed.
pub(crate) fn sweep(output_dir: &Path) -> Result<()> {
    let io = |source| Error::Io { path: output_dir.to_owned(), source };
    for entry in fs::read_dir(output_dir).map_err(io)? {
        let entry = entry.map_err(io)?;
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        let torn = name.strip_prefix('.').is_some_and(|name| {
            (name.starts_with(PREFIX) || name.starts_with(ADAPTER_DIR)) && name.ends_with(".tmp")
        });
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

fn verify(path: &Path) -> Result<()> {
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

/// The value of an optimizer's entry in an adapter.
pub(crate) fn value_of(adapter: &Adapter, entry: &str) -> Option<Tensor> {
    let (module, matrix) = entry.rsplit_once('.')?;
    let pair = adapter.tensors.get(module)?;
    let value = if matrix == "lora_A" { &pair.lora_a } else { &pair.lora_b };
    Some(value.shallow_clone())
}

/// Writes the moments of all entries, and their values where weights are trained, on the rank that has
/// a folder and the name that it will have. Every rank must call this.
fn write_states(
    folder: Option<(&Path, &Path)>,
    trained: &Trained,
    ranks: &Ranks<'_>,
) -> Result<()> {
    let kinds = ["", MOMENTS[0], MOMENTS[1]];
    // An adapter has the values in a file of its own.
    let written = usize::from(!trained.trains_weights())..kinds.len();
    let name = |entry: &Entry, kind: usize| match kinds[kind] {
        "" => entry.name.clone(),
        kind => format!("{}.{kind}", entry.name),
    };
    let entries = trained.optimizer.entries();
    let specs = entries.iter().enumerate().flat_map(|(index, entry)| {
        written.clone().map(move |kind| TensorSpec {
            name: name(entry, kind),
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
        for kind in written.clone() {
            writer.append(&name(entry, kind), &state[kind])?;
        }
    }
    writer.map_or(Ok(()), |writer| Ok(writer.finish().map(drop)?))
}

fn read_tensor(file: &SafeTensors<'_>, name: &str, path: &Path) -> Result<Tensor> {
    let view =
        file.tensor(name).map_err(|error| damaged(path, format!("{OPTIMIZER_FILE}: {error}")))?;
    if view.dtype() != safetensors::Dtype::F32 {
        return Err(damaged(path, format!("{OPTIMIZER_FILE}: {name} is {:?}", view.dtype())));
    }
    let shape: Vec<i64> = view.shape().iter().map(|&size| size as i64).collect();
    Ok(Tensor::f_from_data_size(view.data(), &shape, Kind::Float)?)
}
