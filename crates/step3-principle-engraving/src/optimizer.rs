//! AdamW over one flat buffer.
//!
//! All trained matrices are views of one f32 vector, their gradients of a second, and the two
//! moments of a third and fourth: a step is one pass over these vectors, however many matrices
//! there are. tch's own optimizers step tensor by tensor and cannot save
//! their state.
//!
//! Replicas can divide these vectors: each keeps and updates its share alone. Moments can always be
//! divided, values where the model computes with copies of them in 16 bits.
//!
//! Legend: `P` trained numbers of all matrices.

use std::ops::Range;

use dromedary_parallel::Communicator;
use dromedary_torch_ext::{AdamW, AdamWState, fused_adamw, release_free_memory};
use tch::{Device, Kind, Tensor, no_grad};

use crate::error::Result;

/// Numbers that replicas exchange at once: 16 MiB, which Open MPI moves twice as fast as all of a large
/// buffer at once.
pub(crate) const BUCKET: i64 = 4 << 20;

/// Settings of AdamW (Loshchilov and Hutter, arXiv 1711.05101), with PyTorch's meanings.
#[derive(Clone, Debug, PartialEq)]
pub struct AdamWConfig {
    /// Decay rate of the first moment.
    pub beta1: f64,
    /// Decay rate of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay of matrices, times the learning rate; vectors, which are the weights of norms,
    /// do not decay, as in Hugging Face's `Trainer`.
    pub weight_decay: f64,
    /// Gradients are scaled down to this global norm; 0 leaves them as they are.
    pub max_grad_norm: f64,
}

impl Default for AdamWConfig {
    /// Betas 0.9 and 0.999, eps 1e-8, no decay, norm 0.3: the settings of Dromedary's QLoRA runs.
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0, max_grad_norm: 0.3 }
    }
}

/// One of `ranks` equal shares of the trained numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Its number.
    pub rank: usize,
    /// Number of shares.
    pub ranks: usize,
}

impl Share {
    /// Everything, on one rank.
    pub const ALL: Self = Self { rank: 0, ranks: 1 };

    /// Its numbers of `count`.
    pub(crate) fn of(self, count: i64) -> Range<i64> {
        let border = |rank: usize| count * rank as i64 / self.ranks as i64;
        border(self.rank)..border(self.rank + 1)
    }
}

/// Settings of AdamW, and what replicas divide and exchange of it.
#[derive(Clone, Debug, PartialEq)]
pub struct OptimizerConfig {
    /// AdamW.
    pub adamw: AdamWConfig,
    /// What this replica keeps and updates of what can be divided; the ranks of the replicas' group hold the
    /// shares of their numbers.
    pub share: Share,
    /// Numbers that replicas exchange at once.
    pub bucket: i64,
}

impl From<AdamWConfig> for OptimizerConfig {
    /// Nothing is divided; buckets of 16 MiB.
    fn from(adamw: AdamWConfig) -> Self {
        Self { adamw, share: Share::ALL, bucket: BUCKET }
    }
}

/// What an optimizer holds of a matrix, in PyTorch's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    /// Its value.
    Value,
    /// The first moment.
    ExpAvg,
    /// The second moment.
    ExpAvgSq,
}

impl Held {
    /// In the order of [`FlatAdamW::state`].
    pub const ALL: [Self; 3] = [Self::Value, Self::ExpAvg, Self::ExpAvgSq];
}

/// Where one matrix lives in the flat vectors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Name in checkpoints, such as `model.layers.0.self_attn.q_proj.lora_A`.
    pub name: String,
    /// Shape of the matrix.
    pub shape: Vec<i64>,
    /// Its numbers in the flat vectors.
    pub range: Range<i64>,
}

/// Those numbers of a flat vector that are here.
#[derive(Debug)]
struct Part {
    range: Range<i64>,
    numbers: Tensor, // (numbers of the range)
}

impl Part {
    fn zeros(range: Range<i64>, device: Device) -> Result<Self> {
        let numbers = Tensor::f_zeros([length(&range)], (Kind::Float, device))?;
        Ok(Self { range, numbers })
    }

    /// The numbers of `range` that are here.
    fn overlap(&self, range: &Range<i64>) -> Range<i64> {
        overlap(&self.range, range)
    }

    /// Numbers that are here, as a view.
    fn narrow(&self, range: &Range<i64>) -> Result<Tensor> {
        Ok(self.numbers.f_narrow(0, range.start - self.range.start, length(range))?)
    }

    /// Takes over what is here of a matrix.
    fn put(&self, entry: &Entry, whole: &Tensor) -> Result<()> {
        let here = self.overlap(&entry.range);
        if here.is_empty() {
            return Ok(());
        }
        let whole = whole.f_expand(&entry.shape[..], false)?.f_reshape([-1])?;
        let value = whole.f_narrow(0, here.start - entry.range.start, length(&here))?;
        let mut place = self.narrow(&here)?;
        no_grad(|| place.f_copy_(&value))?;
        Ok(())
    }
}

/// Values of trained matrices in one vector of `P` f32 numbers, or in the share of one that is this
/// replica's: what an optimizer begins with. It takes the rest of its memory when whoever gave the values has
/// let go of them.
#[derive(Debug)]
pub(crate) struct FlatValues {
    config: OptimizerConfig,
    entries: Vec<Entry>,
    numbers: Part,
}

impl FlatValues {
    /// Copies `initial` (name and value); with `divides` only what is of the share of `config`: the model
    /// computes with copies then, which [`FlatAdamW::copy_joined_to`] brings up to date.
    pub(crate) fn new(
        config: OptimizerConfig,
        initial: &[(String, Tensor)],
        device: Device,
        divides: bool,
    ) -> Result<Self> {
        let mut entries = Vec::with_capacity(initial.len());
        let mut end = 0;
        for (name, value) in initial {
            let start = end;
            end += value.numel() as i64;
            entries.push(Entry { name: name.clone(), shape: value.size(), range: start..end });
        }
        let numbers = Part::zeros(if divides { config.share.of(end) } else { 0..end }, device)?;
        for (entry, (_, value)) in entries.iter().zip(initial) {
            numbers.put(entry, value)?;
        }
        Ok(Self { config, entries, numbers })
    }

    /// See [`FlatAdamW::joined`].
    pub(crate) fn joined(&self, entries: Range<usize>, shape: &[i64]) -> Tensor {
        let Range { start, end } = self.span(&entries);
        let Part { range, numbers } = &self.numbers;
        numbers.narrow(0, start - range.start, end - start).view(shape)
    }

    /// Number of all matrices' numbers, P.
    fn count(&self) -> i64 {
        self.entries.last().map_or(0, |entry| entry.range.end)
    }

    /// The numbers of matrices that lie one behind the other.
    fn span(&self, entries: &Range<usize>) -> Range<i64> {
        self.entries[entries.start].range.start..self.entries[entries.end - 1].range.end
    }

    /// Those of the numbers in `own` that lie one behind the other and decay alike, with their decay.
    fn runs_of_decay(&self, own: &Range<i64>, weight_decay: f64) -> Vec<(Range<i64>, f64)> {
        let mut runs: Vec<(Range<i64>, f64)> = Vec::new();
        for entry in &self.entries {
            let here = overlap(own, &entry.range);
            let decay = if entry.shape.len() > 1 { weight_decay } else { 0.0 };
            match runs.last_mut() {
                _ if here.is_empty() => {}
                Some((run, of_run)) if *of_run == decay => run.end = here.end,
                _ => runs.push((here, decay)),
            }
        }
        runs
    }

    /// The optimizer of these values.
    pub(crate) fn into_optimizer(self) -> Result<FlatAdamW> {
        // Many small pieces have been freed, in whose places large vectors have no room.
        release_free_memory();
        let device = self.numbers.numbers.device();
        let own = self.config.share.of(self.count());
        let gradients = Tensor::f_zeros([self.count()], (Kind::Float, device))?;
        let (m, v) = (Part::zeros(own.clone(), device)?, Part::zeros(own, device)?);
        Ok(FlatAdamW { values: self, gradients, m, v, updates: 0 })
    }
}

/// Trained matrices, their gradients and moments, each kind in one vector of `P` f32 numbers, or in the
/// share of one that is this replica's.
#[derive(Debug)]
pub struct FlatAdamW {
    values: FlatValues,
    gradients: Tensor, // (P)
    /// Of this replica's share, which it updates.
    m: Part,
    v: Part,
    /// Updates done so far, for the bias correction.
    updates: u64,
}

impl FlatAdamW {
    /// Copies `initial` (name and value) into the flat vector; moments and gradients start at 0. Moments
    /// are those of the share of `config`, values are all here.
    ///
    /// # Errors
    /// If the vectors do not fit into the device's memory.
    pub fn new(
        config: impl Into<OptimizerConfig>,
        initial: &[(String, Tensor)],
        device: Device,
    ) -> Result<Self> {
        FlatValues::new(config.into(), initial, device, false)?.into_optimizer()
    }

    /// The numbers that a rank of the replicas' group keeps and updates.
    fn share_of(&self, rank: usize) -> Range<i64> {
        Share { rank, ..self.values.config.share }.of(self.num_parameters())
    }

    fn is_whole(&self, part: &Part) -> bool {
        part.range == (0..self.num_parameters())
    }

    /// Brings every rank's updates to the others, a bucket at a time, where values are all here but their
    /// moments are divided over the ranks of `comm`. Every rank must call this behind a step; all get the
    /// same.
    ///
    /// # Errors
    /// If a rank is gone.
    pub fn share_updates(&mut self, comm: &dyn Communicator) -> Result<()> {
        if self.is_whole(&self.m) || !self.is_whole(&self.values.numbers) {
            return Ok(());
        }
        for rank in 0..comm.world_size() {
            let updated = self.values.numbers.narrow(&self.share_of(rank))?;
            for mut bucket in updated.f_split(self.values.config.bucket, 0)? {
                comm.broadcast(&mut bucket, rank)?;
            }
        }
        Ok(())
    }

    /// Copies the values of matrices that lie one behind the other to `target`, in its kind. Where values
    /// are divided over the ranks of `comm`, each rank's come from there, a bucket at a time in the kind of
    /// `target`. Every rank must call this; all get the same.
    ///
    /// # Errors
    /// If a rank is gone, or `target` has another size.
    pub fn copy_joined_to(
        &self,
        entries: Range<usize>,
        target: &Tensor,
        comm: &dyn Communicator,
    ) -> Result<()> {
        let numbers = self.values.span(&entries);
        let mut target = target.f_view([length(&numbers)])?;
        if self.is_whole(&self.values.numbers) {
            let values = self.values.numbers.narrow(&numbers)?;
            no_grad(|| target.f_copy_(&values))?;
            return Ok(());
        }
        for rank in 0..comm.world_size() {
            let theirs = overlap(&self.share_of(rank), &numbers);
            if theirs.is_empty() {
                continue;
            }
            let mut place = target.f_narrow(0, theirs.start - numbers.start, length(&theirs))?;
            if rank == comm.rank() {
                let values = self.values.numbers.narrow(&theirs)?;
                no_grad(|| place.f_copy_(&values))?;
            }
            for mut bucket in place.f_split(self.values.config.bucket, 0)? {
                comm.broadcast(&mut bucket, rank)?;
            }
        }
        Ok(())
    }

    /// Value and both moments of matrix `index`, whole. Every rank of `comm`, over which they may be
    /// divided, must call this; all get the same.
    ///
    /// # Errors
    /// If a rank is gone, or memory runs out.
    pub fn state(&self, index: usize, comm: &dyn Communicator) -> Result<[Tensor; 3]> {
        let entry = &self.values.entries[index];
        let whole = |part: &Part| -> Result<Tensor> {
            let here = part.narrow(&part.overlap(&entry.range))?;
            let all = if self.is_whole(part) { here } else { comm.all_gather(&here)? };
            Ok(all.f_view(&entry.shape[..])?)
        };
        Ok([whole(&self.values.numbers)?, whole(&self.m)?, whole(&self.v)?])
    }

    /// The value of matrix `index`, sharing the optimizer's memory.
    ///
    /// # Panics
    /// If values are divided, and not all of it are here.
    pub fn value(&self, index: usize) -> Tensor {
        self.joined(index..index + 1, &self.values.entries[index].shape)
    }

    /// The matrices in their order.
    pub fn entries(&self) -> &[Entry] {
        &self.values.entries
    }

    /// Number of trained numbers, P.
    pub fn num_parameters(&self) -> i64 {
        self.gradients.numel() as i64
    }

    /// A leaf of the autograd graph that shares the matrix's memory: [`Self::step`] changes it.
    ///
    /// # Panics
    /// As [`Self::value`].
    pub fn parameter(&self, index: usize) -> Tensor {
        self.value(index).detach().set_requires_grad(true)
    }

    /// The values of matrices that lie one behind the other, in the shape of their rows together;
    /// [`Self::step`] changes them.
    ///
    /// # Panics
    /// As [`Self::value`].
    pub fn joined(&self, entries: Range<usize>, shape: &[i64]) -> Tensor {
        self.values.joined(entries, shape)
    }

    /// Adds to the gradients of matrices that lie one behind the other.
    pub fn accumulate_joined(&self, entries: Range<usize>, gradient: &Tensor) {
        let mut sum = self.joined_gradient(entries, &gradient.size());
        let _ = no_grad(|| sum.g_add_(gradient));
    }

    /// The gradients of matrices that lie one behind the other, in the shape of their rows together.
    pub fn joined_gradient(&self, entries: Range<usize>, shape: &[i64]) -> Tensor {
        let Range { start, end } = self.values.span(&entries);
        self.gradients.narrow(0, start, end - start).view(shape)
    }

    /// Adds to the gradient of matrix `index`.
    pub fn accumulate(&self, index: usize, gradient: &Tensor) {
        no_grad(|| {
            let _ = self.gradient(index).g_add_(gradient);
        });
    }

    /// The gradient of matrix `index`, sharing the optimizer's memory.
    pub fn gradient(&self, index: usize) -> Tensor {
        self.joined_gradient(index..index + 1, &self.values.entries[index].shape)
    }

    /// Forgets the gradients.
    pub fn zero_grad(&mut self) {
        let _ = self.gradients.zero_();
    }

    /// Replaces the gradients by their sums over the ranks of `comm`, a bucket at a time. Every rank of
    /// `comm` must call this; all get the same.
    ///
    /// # Errors
    /// If a rank is gone.
    pub fn all_reduce_gradients(&mut self, comm: &dyn Communicator) -> Result<()> {
        if comm.world_size() > 1 {
            for mut bucket in self.gradients.f_split(self.values.config.bucket, 0)? {
                comm.all_reduce_sum(&mut bucket)?;
            }
        }
        Ok(())
    }

    /// Euclidean norm of all gradients together.
    pub fn grad_norm(&self) -> f64 {
        self.gradients.norm().double_value(&[])
    }

    /// Scales gradients down to the global norm `max_grad_norm` (`grad_norm` is their norm now),
    /// updates this replica's share of the parameters and forgets the gradients.
    ///
    /// # Errors
    /// If libtorch refuses the update.
    pub fn step(&mut self, learning_rate: f64, grad_norm: f64) -> Result<()> {
        let updates = self.updates + 1;
        let AdamWConfig { beta1, beta2, eps, weight_decay, max_grad_norm } =
            self.values.config.adamw;
        // As torch.nn.utils.clip_grad_norm_ has it, 1e-6 included.
        let clip = max_grad_norm / (grad_norm + 1e-6);
        if max_grad_norm > 0.0 && clip < 1.0 {
            let _ = no_grad(|| self.gradients.g_mul_scalar_(clip));
        }
        let Self { values, gradients, m, v, .. } = self;
        for (run, weight_decay) in values.runs_of_decay(&m.range, weight_decay) {
            let config = AdamW { lr: learning_rate, beta1, beta2, eps, weight_decay };
            let parameter = &mut values.numbers.narrow(&run)?;
            let grad = &gradients.f_narrow(0, run.start, length(&run))?;
            let (exp_avg, exp_avg_sq) = (&mut m.narrow(&run)?, &mut v.narrow(&run)?);
            let state = AdamWState { parameter, grad, exp_avg, exp_avg_sq };
            no_grad(|| fused_adamw(state, updates, &config))?;
        }
        self.updates = updates;
        self.zero_grad();
        Ok(())
    }

    /// Updates done so far.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// Puts the numbers of a checkpoint in the place of matrix `index`'s: as much of them as is here.
    ///
    /// # Errors
    /// If the shape differs.
    pub fn restore(&mut self, index: usize, held: Held, saved: &Tensor) -> Result<()> {
        let part = match held {
            Held::Value => &self.values.numbers,
            Held::ExpAvg => &self.m,
            Held::ExpAvgSq => &self.v,
        };
        part.put(&self.values.entries[index], saved)
    }

    /// Goes on behind so many updates, after everything was restored.
    pub fn go_on_behind(&mut self, updates: u64) {
        self.updates = updates;
    }
}

pub(crate) fn length(range: &Range<i64>) -> i64 {
    range.end - range.start
}

/// What is in both; an empty range within the first where nothing is.
pub(crate) fn overlap(one: &Range<i64>, other: &Range<i64>) -> Range<i64> {
    let start = other.start.clamp(one.start, one.end);
    start..other.end.clamp(start, one.end)
}

#[cfg(test)]
mod tests {
    use dromedary_parallel::SingleProcess;

    use super::*;

    const F32: (Kind, Device) = (Kind::Float, Device::Cpu);

    fn optimizer(config: AdamWConfig, values: &[&[f32]]) -> FlatAdamW {
        let initial: Vec<(String, Tensor)> = values
            .iter()
            .enumerate()
            .map(|(index, value)| (format!("p{index}"), Tensor::from_slice(value).unsqueeze(0)))
            .collect();
        FlatAdamW::new(config, &initial, Device::Cpu).unwrap()
    }

    /// AdamW as its paper writes it, number by number in f64.
    fn reference(config: &AdamWConfig, mut p: f64, gradients: &[f64], learning_rate: f64) -> f64 {
        let (mut m, mut v) = (0.0, 0.0);
        for (index, gradient) in gradients.iter().enumerate() {
            let t = index as i32 + 1;
            p -= learning_rate * config.weight_decay * p;
            m = config.beta1 * m + (1.0 - config.beta1) * gradient;
            v = config.beta2 * v + (1.0 - config.beta2) * gradient * gradient;
            let m_hat = m / (1.0 - config.beta1.powi(t));
            let v_hat = v / (1.0 - config.beta2.powi(t));
            p -= learning_rate * m_hat / (v_hat.sqrt() + config.eps);
        }
        p
    }

    #[test]
    fn updates_follow_the_paper() {
        let config = AdamWConfig { weight_decay: 0.1, max_grad_norm: 0.0, ..Default::default() };
        let mut optimizer = optimizer(config.clone(), &[&[1.5, -2.0], &[0.25]]);
        let gradients = [0.3, -0.7, 0.01];
        for &gradient in &gradients {
            optimizer.accumulate(1, &Tensor::from_slice(&[gradient as f32]));
            let norm = optimizer.grad_norm();
            optimizer.step(0.05, norm).unwrap();
        }
        let got = optimizer.parameter(1).double_value(&[0, 0]);
        assert!((got - reference(&config, 0.25, &gradients, 0.05)).abs() < 1e-6);
        let untouched = optimizer.parameter(0).double_value(&[0, 0]);
        assert!((untouched - reference(&config, 1.5, &[0.0; 3], 0.05)).abs() < 1e-6);
    }

    /// Wherever the shares of replicas are cut.
    #[test]
    fn matrices_decay_and_weights_of_norms_do_not() {
        let adamw = AdamWConfig { weight_decay: 0.1, max_grad_norm: 0.0, ..Default::default() };
        let still = AdamWConfig { weight_decay: 0.0, ..adamw.clone() };
        let shapes: [(&str, &[i64]); 4] =
            [("norm", &[3]), ("q_proj", &[2, 2]), ("k_proj", &[1, 2]), ("last_norm", &[2])];
        let initial = shapes.map(|(name, shape)| (name.to_owned(), Tensor::ones(shape, F32)));
        let gradients = [0.3, -0.7];
        for share in (0..3).map(|rank| Share { rank, ranks: 3 }).chain([Share::ALL]) {
            let config = OptimizerConfig { share, ..adamw.clone().into() };
            let mut optimizer = FlatAdamW::new(config, &initial, Device::Cpu).unwrap();
            for gradient in gradients {
                for (index, (_, shape)) in shapes.iter().enumerate() {
                    optimizer.accumulate(index, &Tensor::full(*shape, gradient, F32));
                }
                optimizer.step(0.05, 0.0).unwrap();
            }
            let all = optimizer.joined(0..4, &[11]);
            for place in share.of(11) {
                let decays = (3..9).contains(&place);
                let want = reference(if decays { &adamw } else { &still }, 1.0, &gradients, 0.05);
                let got = all.double_value(&[place]);
                assert!((got - want).abs() < 1e-6, "{share:?} {place}: {got}, not {want}");
            }
        }
    }

    #[test]
    fn clipping_scales_all_matrices_by_the_global_norm() {
        // Plain momentum 0 and a large eps make the update proportional to the gradient.
        let config = AdamWConfig { beta1: 0.0, eps: 1e6, ..Default::default() };
        let mut optimizer = optimizer(config, &[&[0.0], &[0.0]]);
        optimizer.accumulate(0, &Tensor::from_slice(&[3.0f32]));
        optimizer.accumulate(1, &Tensor::from_slice(&[4.0f32]));
        let norm = optimizer.grad_norm();
        assert!((norm - 5.0).abs() < 1e-6);
        optimizer.step(1e6, norm).unwrap();
        let moved = |index| optimizer.parameter(index).double_value(&[0, 0]);
        assert!((moved(0) + 0.3 * 3.0 / 5.0).abs() < 1e-3);
        assert!((moved(1) + 0.3 * 4.0 / 5.0).abs() < 1e-3);
    }

    #[test]
    fn a_parameter_sees_later_steps() {
        let mut optimizer = optimizer(AdamWConfig::default(), &[&[1.0, 1.0]]);
        let parameter = optimizer.parameter(0);
        optimizer.accumulate(0, &Tensor::ones([2], F32));
        let norm = optimizer.grad_norm();
        optimizer.step(0.1, norm).unwrap();
        assert!((parameter.double_value(&[0, 0]) - 0.9).abs() < 1e-4);
        assert_eq!(optimizer.grad_norm(), 0.0);
    }

    #[test]
    fn a_restored_optimizer_goes_on_alike() {
        let step = |optimizer: &mut FlatAdamW, gradient: f32| {
            optimizer.accumulate(0, &Tensor::from_slice(&[gradient, -gradient]));
            let norm = optimizer.grad_norm();
            optimizer.step(0.1, norm).unwrap();
        };
        let mut first = optimizer(AdamWConfig::default(), &[&[1.0, 2.0]]);
        step(&mut first, 0.2);
        let saved = first.state(0, &SingleProcess).unwrap().map(|tensor| tensor.copy());
        let updates = first.updates();
        step(&mut first, 0.1);
        let mut second = optimizer(AdamWConfig::default(), &[&[0.0, 0.0]]);
        for (held, saved) in Held::ALL.into_iter().zip(&saved) {
            second.restore(0, held, saved).unwrap();
        }
        second.go_on_behind(updates);
        step(&mut second, 0.1);
        assert_eq!(first.parameter(0), second.parameter(0));
    }
}
