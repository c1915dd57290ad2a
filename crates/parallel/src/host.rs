//! The machine of a rank: its name, and dense copies of tensors in its memory or in that of one of
//! its devices, which is what ranks exchange.

use tch::{Device, Kind, Tensor};

use crate::{Error, Result};

/// The name that tells whether two ranks share a machine.
pub(crate) fn name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// The kind in which tensors of `kind` are summed: neither MPI nor a sum of many terms is at home
/// in 16 bits.
pub(crate) fn reduction_kind(operation: &'static str, kind: Kind) -> Result<Kind> {
    match kind {
        Kind::Float | Kind::Half | Kind::BFloat16 => Ok(Kind::Float),
        Kind::Double | Kind::Int64 => Ok(kind),
        _ => Err(Error::UnsupportedKind { operation, kind }),
    }
}

pub(crate) fn kind_of(operation: &'static str, tensor: &Tensor) -> Result<Kind> {
    tensor.f_kind().map_err(Error::torch(operation))
}

/// `collective` on a dense host tensor of the kind it is reduced in; the result is copied back.
pub(crate) fn reduce(
    operation: &'static str,
    tensor: &mut Tensor,
    collective: impl FnOnce(&mut Tensor) -> Result<()>,
) -> Result<()> {
    let kind = reduction_kind(operation, kind_of(operation, tensor)?)?;
    staged(operation, tensor, Device::Cpu, kind, collective)
}

/// `collective` on a dense host tensor of the same kind; the result is copied back.
pub(crate) fn update(
    operation: &'static str,
    tensor: &mut Tensor,
    collective: impl FnOnce(&mut Tensor) -> Result<()>,
) -> Result<()> {
    let kind = kind_of(operation, tensor)?;
    staged(operation, tensor, Device::Cpu, kind, collective)
}

/// `collective` on a dense tensor of this kind in the memory of `device`; the result is copied back.
pub(crate) fn staged(
    operation: &'static str,
    tensor: &mut Tensor,
    device: Device,
    kind: Kind,
    collective: impl FnOnce(&mut Tensor) -> Result<()>,
) -> Result<()> {
    check_writable(operation, tensor)?;
    if is_dense_on(tensor, device) && tensor.f_kind().is_ok_and(|own| own == kind) {
        return collective(tensor);
    }
    let mut copy = tch::no_grad(|| dense(tensor, device, kind)).map_err(Error::torch(operation))?;
    collective(&mut copy)?;
    tch::no_grad(|| tensor.f_copy_(&copy)).map_err(Error::torch(operation))
}

/// Refuses a tensor whose change autograd would not see.
pub(crate) fn check_writable(operation: &'static str, tensor: &Tensor) -> Result<()> {
    if tensor.requires_grad() && !tensor.is_leaf() {
        return Err(Error::Recorded { operation });
    }
    Ok(())
}

/// What a reduction refuses, for the group of one that has nothing to reduce.
pub(crate) fn check_reduction(operation: &'static str, tensor: &Tensor) -> Result<()> {
    reduction_kind(operation, kind_of(operation, tensor)?)?;
    check_writable(operation, tensor)
}

fn dense(
    tensor: &Tensor,
    device: Device,
    kind: Kind,
) -> std::result::Result<Tensor, tch::TchError> {
    tensor.f_detach()?.f_to_device(device)?.f_to_kind(kind)?.f_contiguous()
}

/// `collective` makes the gathered rows from a dense host tensor of at least one dimension; they go
/// to the device of `tensor`.
pub(crate) fn gathered(
    operation: &'static str,
    tensor: &Tensor,
    collective: impl FnOnce(&Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    gathered_on(Device::Cpu, operation, tensor, collective)
}

/// The same in the memory of `device`.
pub(crate) fn gathered_on(
    device: Device,
    operation: &'static str,
    tensor: &Tensor,
    collective: impl FnOnce(&Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let kind = kind_of(operation, tensor)?;
    let rows = tch::no_grad(|| {
        let rows = dense(tensor, device, kind)?;
        if rows.dim() == 0 { rows.f_unsqueeze(0) } else { Ok(rows) }
    })
    .map_err(Error::torch(operation))?;
    collective(&rows)?.f_to_device(tensor.device()).map_err(Error::torch(operation))
}

pub(crate) fn is_dense_host(tensor: &Tensor) -> bool {
    is_dense_on(tensor, Device::Cpu)
}

fn is_dense_on(tensor: &Tensor, device: Device) -> bool {
    tensor.defined()
        && tensor.device() == device
        && !tensor.is_sparse()
        && !tensor.is_mkldnn()
        && tensor.is_contiguous()
}

/// How a collective is named when ranks do not match.
pub(crate) fn describe(operation: &'static str, tensor: &Tensor) -> Result<String> {
    Ok(format!("{operation} {:?} {:?}", kind_of(operation, tensor)?, tensor.size()))
}

/// The same for an operation that lets dimension 0 differ.
pub(crate) fn describe_rows(operation: &'static str, tensor: &Tensor) -> Result<String> {
    let size = tensor.size();
    let row = size.get(1..).unwrap_or_default();
    Ok(format!("{operation} {:?} rows of {row:?}", kind_of(operation, tensor)?))
}

/// Bytes of a row of `tensor`, of which dimension 0 counts the rows.
pub(crate) fn row_bytes(tensor: &Tensor) -> usize {
    let elements: i64 = tensor.size().get(1..).unwrap_or_default().iter().product();
    elements.unsigned_abs() as usize * tensor.kind().elt_size_in_bytes()
}
