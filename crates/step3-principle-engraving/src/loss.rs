//! Head and cross-entropy in closed form.
//!
//! Only positions whose next token is learned go through the head, a chunk at a time: logits of a
//! whole sequence never exist, and neither does a graph through the softmax, whose gradient is
//! `softmax(z) - onehot(target)`.
//!
//! Legend: `T` tokens of the micro-batch, `N` learned positions, `n` those of one chunk, `C`
//! hidden_size, `V` vocabulary rows of this rank.

use dromedary_llama::Llama;
use dromedary_parallel::Communicator;
use tch::{Kind, Tensor, no_grad};

use crate::{collate::MicroBatch, error::Result};

/// Logits that exist at a time: 64 MiB in f32.
const LOGITS_PER_CHUNK: i64 = 1 << 24;

/// What the head says of one micro-batch.
#[derive(Debug)]
pub struct HeadLoss {
    /// Sum of `-ln p(target)` over the learned positions.
    pub loss_sum: f64,
    /// Gradient of `scale x loss_sum` with respect to the last layer's output, (T, C).
    pub grad_hidden: Tensor,
}

/// Final norm, head and cross-entropy of `hidden` (T, C), and their gradient times `scale`.
/// Every rank of `comm` must call this with the same `hidden`; all get the same result.
///
/// # Errors
/// If a rank fails in a collective, or memory runs out.
pub fn head_loss(
    model: &Llama,
    hidden: &Tensor,
    batch: &MicroBatch,
    scale: f64,
    comm: &dyn Communicator,
) -> Result<HeadLoss> {
    let device = hidden.device();
    let predict_at = Tensor::from_slice(&batch.predict_at).to_device(device); // (N)
    let targets = Tensor::from_slice(&batch.targets).to_device(device); // (N)
    let learned = hidden.index_select(0, &predict_at).detach().set_requires_grad(true); // (N, C)
    let normed = model.final_norm(&learned); // (N, C)
    let mut grad_normed = Tensor::f_zeros(normed.size(), (normed.kind(), device))?; // (N, C)

    let chunk = (LOGITS_PER_CHUNK / model.config().vocab_size).max(1);
    let num_targets = batch.num_targets() as i64;
    let mut loss_sum = 0.0;
    for start in (0..num_targets).step_by(chunk as usize) {
        let length = chunk.min(num_targets - start);
        let x = normed.narrow(0, start, length).detach().set_requires_grad(true); // (n, C)
        let logits = model.head(&x)?; // (n, V)
        let target = targets.narrow(0, start, length); // (n)
        let (loss, grad_logits) = cross_entropy(model, &logits.detach(), &target, scale, comm)?;
        loss_sum += loss;
        let grad_logits = grad_logits.to_kind(logits.kind());
        let grad = dromedary_torch_ext::run_backward(&[&logits], &[&grad_logits], &[&x], false)?;
        if let Some(Some(grad)) = grad.into_iter().next() {
            no_grad(|| grad_normed.narrow(0, start, length).f_copy_(&grad))?;
        }
    }
    // Each rank's head knows its vocabulary rows only.
    comm.all_reduce_sum(&mut grad_normed)?;

    let grad_learned =
        dromedary_torch_ext::run_backward(&[&normed], &[&grad_normed], &[&learned], false)?;
    let mut grad_hidden = hidden.f_zeros_like()?; // (T, C)
    if let Some(Some(grad_learned)) = grad_learned.into_iter().next() {
        let _ = no_grad(|| grad_hidden.index_add_(0, &predict_at, &grad_learned));
    }
    Ok(HeadLoss { loss_sum, grad_hidden })
}

/// Sum of `-ln softmax(z)[target]` over (n) rows of logits `z` (n, V), and `scale` times its
/// gradient (n, V), over a vocabulary that the ranks share.
fn cross_entropy(
    model: &Llama,
    logits: &Tensor,
    target: &Tensor,
    scale: f64,
    comm: &dyn Communicator,
) -> Result<(f64, Tensor)> {
    let _guard = tch::no_grad_guard();
    let vocab = &model.rank_plan().vocab;
    let logits = logits.to_kind(Kind::Float); // (n, V)
    let mut max = logits.amax([-1], true); // (n, 1)
    comm.all_reduce_max(&mut max)?;
    let shifted = logits - max; // (n, V)

    let mine = target.ge(vocab.start).logical_and(&target.lt(vocab.end)); // (n)
    let mine = mine.to_kind(Kind::Float).unsqueeze(-1); // (n, 1)
    let local = (target - vocab.start).clamp(0, vocab.end - vocab.start - 1).unsqueeze(-1); // (n, 1)
    let target_logit = shifted.gather(-1, &local, false) * &mine; // (n, 1)

    let mut exp = shifted.exp(); // (n, V)
    // One small all-reduce carries both sums.
    let sums = [exp.sum_dim_intlist([-1].as_slice(), true, Kind::Float), target_logit];
    let mut sums = Tensor::cat(&sums, -1); // (n, 2)
    comm.all_reduce_sum(&mut sums)?;
    let (denominator, target_logit) = (sums.narrow(-1, 0, 1), sums.narrow(-1, 1, 1)); // (n, 1)
    let loss = (denominator.log() - target_logit).sum(Kind::Double).double_value(&[]);

    let _ = exp.g_div_(&denominator); // softmax
    let _ = exp.scatter_add_(-1, &local, &(-mine));
    Ok((loss, exp * scale))
}
