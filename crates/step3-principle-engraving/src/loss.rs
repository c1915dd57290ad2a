//! Head and cross-entropy in closed form.
//!
//! Only positions whose next token is learned go through the head, a chunk at a time: logits of a
//! whole sequence never exist, and neither does a graph through the softmax, whose gradient is
//! `softmax(z) - onehot(target)`.
//!
//! Legend: `T` tokens of the micro-batch, `N` learned positions, `n` those of one chunk, `C`
//! hidden_size, `V` vocabulary rows of this rank.

use dromedary_llama::{ClosedForm, Llama};
use dromedary_parallel::Communicator;
use tch::{Kind, Tensor, no_grad};

use crate::{collate::MicroBatch, error::Result};

/// Logits that exist at a time: 128 MiB in f32.
const LOGITS_PER_CHUNK: i64 = 1 << 25;

/// Rows of logits that exist at a time.
pub(crate) fn logits_rows(vocab_size: i64) -> i64 {
    (LOGITS_PER_CHUNK / vocab_size).max(1)
}

/// What the head says of one micro-batch.
#[derive(Debug)]
pub struct HeadLoss {
    /// Sum of `-ln p(target)` over the learned positions.
    pub loss_sum: f64,
    /// Gradient of `scale x loss_sum` with respect to the last layer's output, (T, C).
    pub grad_hidden: Tensor,
    /// Those of the final norm's weight and of the head's, where they are trained.
    pub grad_weights: Option<[Tensor; 2]>,
}

/// What computes the head.
#[derive(Clone, Copy, Debug)]
pub struct Head<'a> {
    /// The model.
    pub model: &'a Llama,
    /// Its products; autograd, where there is none.
    pub closed_form: Option<&'a ClosedForm>,
    /// Leaves of the final norm's weight and of the head's, where they are trained; a tied head's is the
    /// embedding.
    pub leaves: Option<[&'a Tensor; 2]>,
}

/// Final norm, head and cross-entropy of `hidden` (T, C), and their gradient times `scale`.
/// Every rank of `comm` must call this with the same `hidden`; all get the same result, but for the
/// head's weight, of which each has the gradient of its own rows of the vocabulary.
///
/// # Errors
/// If a rank fails in a collective, or memory runs out.
pub fn head_loss(
    head: Head<'_>,
    hidden: &Tensor,
    batch: &MicroBatch,
    scale: f64,
    comm: &dyn Communicator,
) -> Result<HeadLoss> {
    let device = hidden.device();
    let model = head.model;
    let predict_at = Tensor::from_slice(&batch.predict_at).to_device(device); // (N)
    let targets = Tensor::from_slice(&batch.targets).to_device(device); // (N)
    let learned = hidden.index_select(0, &predict_at).detach().set_requires_grad(true); // (N, C)
    let normed = model.final_norm(&learned); // (N, C)
    let mut grad_normed = Tensor::f_zeros(normed.size(), (normed.kind(), device))?; // (N, C)
    // In f32 whatever the weight's kind: most of a head's gradient is less than f16 can tell from 0, and
    // chunks are summed.
    let zeros = |[_, weight]: [&Tensor; 2]| Tensor::f_zeros(weight.size(), (Kind::Float, device));
    let mut grad_head = head.leaves.map(zeros).transpose()?; // (V, C)

    let chunk = logits_rows(model.config().vocab_size);
    let num_targets = batch.num_targets() as i64;
    let mut loss_sum = 0.0;
    for start in (0..num_targets).step_by(chunk as usize) {
        let length = chunk.min(num_targets - start);
        let x = normed.narrow(0, start, length).detach(); // (n, C)
        let target = targets.narrow(0, start, length); // (n)
        let entropy = |logits| cross_entropy(model, logits, &target, scale, comm);
        let (loss, grad) = match head.closed_form {
            Some(form) => no_grad(|| head.chunk(form, &x, entropy, grad_head.as_mut()))?,
            None => head.chunk_by_graph(x, entropy, grad_head.as_mut())?,
        };
        loss_sum += loss;
        no_grad(|| grad_normed.narrow(0, start, length).f_copy_(&grad))?;
    }
    // Each rank's head knows its vocabulary rows only.
    comm.all_reduce_sum(&mut grad_normed)?;

    let mut inputs = vec![&learned];
    inputs.extend(head.leaves.map(|[norm, _]| norm));
    let gradients = dromedary_torch_ext::run_backward(&[&normed], &[&grad_normed], &inputs, false)?;
    let mut gradients = gradients.into_iter();
    let mut grad_hidden = hidden.f_zeros_like()?; // (T, C)
    if let Some(Some(grad_learned)) = gradients.next() {
        let _ = no_grad(|| grad_hidden.index_add_(0, &predict_at, &grad_learned));
    }
    let grad_weights = gradients.next().flatten().zip(grad_head).map(<[Tensor; 2]>::from);
    Ok(HeadLoss { loss_sum, grad_hidden, grad_weights })
}

impl Head<'_> {
    /// This rank's rows of a gradient of the head's weight: a tied head's is that of the whole embedding.
    fn own_rows(&self, gradient: &Tensor) -> Result<Tensor> {
        if !self.model.config().tie_word_embeddings {
            return Ok(gradient.shallow_clone());
        }
        let rows = &self.model.rank_plan().vocab;
        Ok(gradient.f_narrow(0, rows.start, rows.end - rows.start)?)
    }

    /// Loss of a chunk, and the gradient of its `x`, (n, C); that of the head is added to `grad_head`.
    fn chunk(
        &self,
        form: &ClosedForm,
        x: &Tensor,
        entropy: impl FnOnce(Tensor) -> Result<(f64, Tensor)>,
        grad_head: Option<&mut Tensor>,
    ) -> Result<(f64, Tensor)> {
        let linear = self.model.lm_head();
        let (loss, grad_logits) = entropy(form.project(linear, x)?)?; // (n, V)
        if let Some(sum) = grad_head {
            form.add_weight_gradient(x, &grad_logits, &mut self.own_rows(sum)?)?;
        }
        Ok((loss, form.project_backward(linear, &grad_logits)?))
    }

    /// As [`Head::chunk`] by autograd.
    fn chunk_by_graph(
        &self,
        x: Tensor,
        entropy: impl FnOnce(Tensor) -> Result<(f64, Tensor)>,
        grad_head: Option<&mut Tensor>,
    ) -> Result<(f64, Tensor)> {
        let x = x.set_requires_grad(true);
        let logits = self.model.head(&x)?; // (n, V)
        let (loss, grad_logits) = entropy(logits.detach().copy())?;
        let mut inputs = vec![&x];
        inputs.extend(self.leaves.map(|[_, weight]| weight));
        let gradients =
            dromedary_torch_ext::run_backward(&[&logits], &[&grad_logits], &inputs, false)?;
        let mut gradients = gradients.into_iter();
        let grad = gradients.next().flatten();
        if let (Some(sum), Some(Some(of_head))) = (grad_head, gradients.next()) {
            let _ = no_grad(|| sum.g_add_(&of_head));
        }
        Ok((loss, grad.map_or_else(|| x.f_zeros_like(), Ok)?))
    }
}

/// Sum of `-ln softmax(z)[target]` over (n) rows of logits `z` (n, V), and `scale` times its
/// gradient (n, V) in the memory of the logits, over a vocabulary that the ranks share.
fn cross_entropy(
    model: &Llama,
    mut logits: Tensor,
    target: &Tensor,
    scale: f64,
    comm: &dyn Communicator,
) -> Result<(f64, Tensor)> {
    let _guard = tch::no_grad_guard();
    let vocab = &model.rank_plan().vocab;
    let mut max = logits.amax([-1], true); // (n, 1)
    comm.all_reduce_max(&mut max)?;
    let _ = logits.g_sub_(&max); // (n, V)

    let mine = target.ge(vocab.start).logical_and(&target.lt(vocab.end)); // (n)
    let mine = mine.to_kind(Kind::Float).unsqueeze(-1); // (n, 1)
    let local = (target - vocab.start).clamp(0, vocab.end - vocab.start - 1).unsqueeze(-1); // (n, 1)
    let target_logit = logits.gather(-1, &local, false) * &mine; // (n, 1)

    let mut exp = logits.exp_(); // (n, V)
    // One small all-reduce carries both sums.
    let sums = [exp.sum_dim_intlist([-1].as_slice(), true, Kind::Float), target_logit];
    let mut sums = Tensor::cat(&sums, -1); // (n, 2)
    comm.all_reduce_sum(&mut sums)?;
    let (denominator, target_logit) = (sums.narrow(-1, 0, 1), sums.narrow(-1, 1, 1)); // (n, 1)
    let loss = (denominator.log() - target_logit).sum(Kind::Double).double_value(&[]);

    let _ = exp.g_mul_(&(scale / denominator)); // scale x softmax
    let _ = exp.scatter_add_(-1, &local, &(mine * -scale));
    Ok((loss, exp))
}
