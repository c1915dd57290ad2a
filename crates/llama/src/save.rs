//! One checkpoint folder out of the slices of a tensor-parallel group.

// Shapes: R = rows of a block, I = columns of a tensor, W = those of them that a rank holds.

use std::{ops::Range, path::PathBuf};

use dromedary_parallel::{Communicator, check_agreement};
use tch::Tensor;

use crate::{
    checkpoint::{CheckpointWriter, DEFAULT_MAX_SHARD_SIZE, TensorSpec, put_in_order},
    config::plain_config,
    error::{Error, Result},
    model::{Llama, join_columns},
    plan::{Plan, Shard},
};

/// Bytes of a tensor that are on their way at once.
const BLOCK: u64 = 8 << 20;

/// Where a checkpoint goes, and what goes with it.
#[derive(Debug, Clone)]
pub struct SaveOptions {
    /// Folder that is to be written.
    pub output: PathBuf,
    /// An older folder of that name stays until the new one is complete, and then makes room for it;
    /// otherwise it is an error.
    pub replace: bool,
    /// Folder of a checkpoint whose configuration, tokenizer and licence are copied.
    pub companions: PathBuf,
    /// The tokenizer, a file or a folder, where it is not the one of that checkpoint.
    pub tokenizer: Option<PathBuf>,
    /// Largest weight file in bytes.
    pub max_shard_size: u64,
}

impl SaveOptions {
    /// Files as large as Hugging Face's tools write them.
    pub fn new(output: impl Into<PathBuf>, companions: impl Into<PathBuf>) -> Self {
        let (output, companions) = (output.into(), companions.into());
        let max_shard_size = DEFAULT_MAX_SHARD_SIZE;
        Self { output, replace: false, companions, tokenizer: None, max_shard_size }
    }

    fn begin(&self, tensors: &[TensorSpec]) -> Result<CheckpointWriter> {
        let (output, tensors) = (&self.output, tensors.to_vec());
        let mut writer = match self.replace {
            true => CheckpointWriter::replace_existing(output, tensors, self.max_shard_size)?,
            false => CheckpointWriter::create(output, tensors, self.max_shard_size)?,
        };
        writer.copy_companions(&self.companions)?;
        self.tokenizer.as_ref().map_or(Ok(()), |path| writer.copy_tokenizer(path))?;
        if self.companions.join("config.json").is_file() {
            writer.add_file("config.json", &plain_config(&self.companions)?)?;
        }
        Ok(writer)
    }
}

impl Llama {
    /// Writes the whole model as one Hugging Face checkpoint: the same bytes whatever the size of the
    /// group. `tensors` are mostly the [`specs`](crate::Checkpoint::specs) of the checkpoint that the
    /// model was loaded from.
    ///
    /// Every rank of the group must call this; see [`save_slices`].
    ///
    /// # Errors
    /// As [`save_slices`]; [`Error::Write`] for a tensor that the model does not have, and for a model
    /// with adapters, which such a checkpoint has no place for.
    pub fn save(
        &self,
        tensors: Vec<TensorSpec>,
        options: &SaveOptions,
        comm: &dyn Communicator,
    ) -> Result<()> {
        let refused = |message| Err(Error::Write { path: options.output.clone(), message });
        let mut slice_of = |name: &str| {
            if let Some(part) = self.adapted_part() {
                return refused(format!(
                    "{part} has an adapter, which a checkpoint does not hold: merge it into the \
                     weight, or save it by itself"
                ));
            }
            match self.slice(name)? {
                Some(slice) => Ok(slice),
                None => refused(format!("the model has no tensor {name}")),
            }
        };
        save_slices(self.plan(), tensors, &mut slice_of, options, comm)
    }
}

/// Writes one Hugging Face checkpoint out of the slices that the ranks of a group hold: `slice_of`
/// gives this rank's slice of the named tensor, as the plan cuts it, in any kind. What several ranks
/// hold is taken from its owner.
///
/// Every rank of the group must call this, with the same tensors. Rank 0 writes; beside the slice of
/// one tensor, each rank holds a few blocks of 8 MB. The folder appears when it is complete, before any
/// rank returns.
///
/// # Errors
/// On every rank of the group, if any of them cannot do its part: [`Error::OnRank`] names it on the
/// others. A folder that exists and is not to be replaced, a full disk, a number that is not finite, a slice of another shape, a
/// group of another size than the plan's.
pub fn save_slices(
    plan: &Plan,
    mut tensors: Vec<TensorSpec>,
    slice_of: &mut dyn FnMut(&str) -> Result<Tensor>,
    options: &SaveOptions,
    comm: &dyn Communicator,
) -> Result<()> {
    let (expected, got) = (plan.tp(), comm.world_size());
    if expected != got {
        return Err(Error::GroupSize { expected, got });
    }
    put_in_order(&mut tensors);
    let digest = blake3::hash(format!("{tensors:?}").as_bytes());
    check_agreement(comm, "the tensors to save", digest.to_hex().as_str())?;
    let writer = (comm.rank() == 0).then(|| options.begin(&tensors)).transpose();
    let mut saver = Saver { plan, comm, writer: agree(comm, writer)? };
    for spec in &tensors {
        let slice = slice_of(&spec.name).and_then(|slice| saver.checked(spec, slice, options));
        let slice = agree(comm, slice)?;
        let written = saver.exchange(spec, &slice)?;
        agree(comm, written)?;
    }
    agree(comm, saver.writer.map_or(Ok(()), CheckpointWriter::finish))
}

/// Goes on where all ranks can; every rank of the group must call this.
fn agree<T>(comm: &dyn Communicator, own: Result<T>) -> Result<T> {
    let message = own.as_ref().err().map(ToString::to_string).unwrap_or_default();
    let messages = comm.all_gather_bytes(message.as_bytes())?;
    let own = own?;
    match messages.iter().position(|message| !message.is_empty()) {
        None => Ok(own),
        Some(rank) => {
            let message = String::from_utf8_lossy(&messages[rank]).into_owned();
            Err(Error::OnRank { rank, message })
        }
    }
}

struct Saver<'a> {
    plan: &'a Plan,
    comm: &'a dyn Communicator,
    /// On rank 0.
    writer: Option<CheckpointWriter>,
}

impl Saver<'_> {
    /// A slice that the exchange cannot fail on.
    fn checked(&self, spec: &TensorSpec, slice: Tensor, options: &SaveOptions) -> Result<Tensor> {
        let shard = self.plan.rank(self.comm.rank()).shard(&spec.name);
        let expected = shard.local_shape(&spec.shape);
        if slice.size() == expected {
            return Ok(slice.detach());
        }
        let message =
            format!("the slice of {} is {:?}, expected {expected:?}", spec.name, slice.size());
        Err(Error::Write { path: options.output.clone(), message })
    }

    /// Brings a tensor to rank 0 in blocks, which writes it. What fails in the exchange itself is the
    /// outer error: there is no agreeing on it.
    fn exchange(&mut self, spec: &TensorSpec, slice: &Tensor) -> Result<Result<()>> {
        match self.plan.rank(self.comm.rank()).shard(&spec.name) {
            Shard::Columns(_) => self.exchange_columns(spec, slice),
            Shard::Rows(held) => self.exchange_rows(spec, slice, held.range().start),
            Shard::Replicated => self.exchange_rows(spec, slice, 0),
        }
    }

    /// `slice` begins at row `first` of the tensor. Each block comes from its owner.
    fn exchange_rows(
        &mut self,
        spec: &TensorSpec,
        slice: &Tensor,
        first: i64,
    ) -> Result<Result<()>> {
        let mut done = Ok(());
        for owner in 0..self.plan.tp() {
            let owned = match self.plan.owned(owner, &spec.name) {
                Some(Shard::Rows(rows)) => rows.range(),
                Some(_) => 0..spec.shape.first().copied().unwrap_or(1),
                None => continue,
            };
            for rows in blocks(spec, owned) {
                let count = rows.end - rows.start;
                let mut block = if owner == self.comm.rank() {
                    slice.f_narrow(0, rows.start - first, count)?.f_to_kind(spec.dtype.kind())?
                } else {
                    let mut shape = spec.shape.clone();
                    shape[0] = count;
                    Tensor::f_empty(&shape, (spec.dtype.kind(), slice.device()))?
                };
                if owner != 0 {
                    self.comm.broadcast(&mut block, owner)?;
                }
                done = done.and_then(|()| self.append(spec, &block));
            }
        }
        Ok(done)
    }

    /// Each rank has some columns of every row.
    fn exchange_columns(&mut self, spec: &TensorSpec, slice: &Tensor) -> Result<Result<()>> {
        let mut done = Ok(());
        for rows in blocks(spec, 0..spec.shape[0]) {
            let count = rows.end - rows.start;
            let own = slice.f_narrow(0, rows.start, count)?.f_to_kind(spec.dtype.kind())?; // (R, W)
            let all = self.comm.all_gather(&own.f_reshape(-1)?)?; // (R x W of rank 0, ..)
            done = done.and_then(|()| {
                let widths = (0..self.plan.tp())
                    .map(|rank| self.plan.rank(rank).shard(&spec.name).local_shape(&spec.shape)[1]);
                self.append(spec, &join_columns(&all, count, widths)?) // (R, I)
            });
        }
        Ok(done)
    }

    fn append(&mut self, spec: &TensorSpec, rows: &Tensor) -> Result<()> {
        self.writer.as_mut().map_or(Ok(()), |writer| writer.append(&spec.name, rows))
    }
}

/// The rows of a range in blocks, one row at least.
fn blocks(spec: &TensorSpec, rows: Range<i64>) -> impl Iterator<Item = Range<i64>> {
    let row = spec.size() / spec.shape.first().map_or(1, |rows| (*rows).max(1) as u64);
    let step = (BLOCK / row.max(1)).max(1) as i64;
    let end = rows.end;
    rows.step_by(step as usize).map(move |start| start..end.min(start + step))
}
