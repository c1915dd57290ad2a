//! Trained tensors of a tensor-parallel group: gradients that are partial sums added up, their norm, and
//! whole tensors out of the parts.

use dromedary_parallel::Communicator;
use tch::{Kind, Tensor, no_grad};

use crate::{Error, Result, Shard, plan::TrainedPart};

/// Replaces this rank's gradients, each with its part of the plan, by complete ones: what is a partial
/// sum is added up over the ranks that hold it, the rest stays as it is.
///
/// Every rank of the group must call this with the same tensors in the same order. One all-reduce
/// serves all of them; it needs a copy, in f32, of what is summed. Afterwards all copies of a
/// parameter have the same gradient.
///
/// # Errors
/// The group is not the one of the plan, a gradient is not of what the rank holds, or the exchange
/// failed.
pub fn sum_gradients(gradients: &[(&TrainedPart, &Tensor)], comm: &dyn Communicator) -> Result<()> {
    check_group(gradients, comm)?;
    let places: Vec<i64> =
        gradients.iter().map(|(part, gradient)| summed(part, gradient)).collect();
    let all: i64 = places.iter().sum();
    // The same on all ranks: the plan decides it.
    if comm.world_size() == 1 || all == 0 {
        return Ok(());
    }
    no_grad(|| {
        let mut sums = Tensor::f_zeros([all], (Kind::Float, gradients[0].1.device()))?;
        let pieces = sums.f_split_with_sizes(&places, 0)?;
        for ((part, gradient), piece) in gradients.iter().zip(&pieces) {
            for (mut there, here) in pairs(part, gradient, piece) {
                there.f_copy_(&here)?;
            }
        }
        comm.all_reduce_sum(&mut sums)?;
        for ((part, gradient), piece) in gradients.iter().zip(&pieces) {
            for (there, mut here) in pairs(part, gradient, piece) {
                here.f_copy_(&there)?;
            }
        }
        Ok(())
    })
}

/// Euclidean norm of the gradients of all parameters of the group, each counted once: by its owner.
///
/// Every rank of the group must call this, behind [`sum_gradients`]; all get the same.
///
/// # Errors
/// As [`sum_gradients`].
pub fn global_norm(gradients: &[(&TrainedPart, &Tensor)], comm: &dyn Communicator) -> Result<f64> {
    check_group(gradients, comm)?;
    let mut squares = 0.0;
    for owned in gradients.iter().filter_map(|(part, gradient)| part.owned_of(gradient)) {
        let norm = no_grad(|| owned.f_norm_scalaropt_dtype(2.0, Kind::Double))?;
        squares += norm.f_double_value(&[])?.powi(2);
    }
    let mut sum = Tensor::from_slice(&[squares]);
    if comm.world_size() > 1 {
        comm.all_reduce_sum(&mut sum)?;
    }
    Ok(sum.f_double_value(&[0])?.sqrt())
}

/// The whole of a trained tensor from each rank's part of it: what several ranks hold is its owner's.
///
/// Every rank of the group must call this; all get the same.
///
/// # Errors
/// The group is not the one of the plan, or the exchange failed.
pub fn gather_trained(
    part: &TrainedPart,
    local: &Tensor,
    comm: &dyn Communicator,
) -> Result<Tensor> {
    check_group(&[(part, local)], comm)?;
    if comm.world_size() == 1 {
        return Ok(local.shallow_clone());
    }
    let by_columns = matches!(part.shard(), Shard::Columns(_));
    let turned = |tensor: &Tensor| if by_columns { tensor.tr() } else { tensor.shallow_clone() };
    no_grad(|| {
        let owned = match part.owned_of(local) {
            Some(owned) => turned(&owned),
            None => turned(local).f_narrow(0, 0, 0)?,
        };
        Ok(turned(&comm.all_gather(&owned.f_contiguous()?)?).f_contiguous()?)
    })
}

fn check_group(gradients: &[(&TrainedPart, &Tensor)], comm: &dyn Communicator) -> Result<()> {
    let got = comm.world_size();
    if let Some((part, _)) = gradients.iter().find(|(part, _)| part.tp() != got) {
        return Err(Error::GroupSize { expected: part.tp(), got });
    }
    gradients.iter().try_for_each(|(part, gradient)| fits(part.shard(), gradient))
}

/// What the plan says of a gradient's shape.
fn fits(shard: &Shard, gradient: &Tensor) -> Result<()> {
    let (dim, held) = match shard {
        Shard::Rows(rows) => (0, rows.range()),
        Shard::Columns(columns) => (1, columns.range()),
        Shard::Replicated => return Ok(()),
    };
    let (expected, got) = (held.end - held.start, gradient.size());
    if got.get(dim) == Some(&expected) {
        return Ok(());
    }
    Err(Error::GradientShape { dim, expected, got })
}

/// Numbers of a tensor that are summed, on whichever rank.
fn summed(part: &TrainedPart, gradient: &Tensor) -> i64 {
    if part.is_replicated() {
        return gradient.numel() as i64;
    }
    part.shared().iter().map(|rows| rows.end - rows.start).sum::<i64>() * row_size(gradient)
}

fn row_size(gradient: &Tensor) -> i64 {
    gradient.size().iter().skip(1).product()
}

/// Views of a tensor's place in the sums and of this rank's numbers that belong there.
fn pairs(part: &TrainedPart, gradient: &Tensor, place: &Tensor) -> Vec<(Tensor, Tensor)> {
    if part.is_replicated() {
        return vec![(place.view(&gradient.size()[..]), gradient.shallow_clone())];
    }
    let row = row_size(gradient);
    let pair = |(among, held): (std::ops::Range<i64>, std::ops::Range<i64>)| {
        let rows = held.end - held.start;
        let there = place.narrow(0, among.start * row, rows * row);
        let here = gradient.narrow(0, held.start, rows);
        (there.view(&here.size()[..]), here)
    };
    part.shared_here().into_iter().map(pair).collect()
}
