//! AdamW over one flat buffer.
//!
//! All trained matrices are views of one f32 vector, their gradients of a second, and the two
//! moments of a third and fourth: a step is one pass over these vectors, however many matrices
//! there are. tch's own optimizers step tensor by tensor and cannot save
//! their state.
//!
//! Legend: `P` trained numbers of all matrices.

use std::ops::Range;

use dromedary_parallel::Communicator;
use dromedary_torch_ext::{AdamW, AdamWState, fused_adamw};
use tch::{Device, Kind, Tensor, no_grad};

use crate::error::Result;

/// Gradients that are summed over replicas at once: 16 MiB, which Open MPI moves twice as fast as all of
/// a large buffer at once.
const BUCKET: i64 = 4 << 20;

/// Settings of AdamW (Loshchilov and Hutter, arXiv 1711.05101), with PyTorch's meanings.
#[derive(Clone, Debug, PartialEq)]
pub struct AdamWConfig {
    /// Decay rate of the first moment.
    pub beta1: f64,
    /// Decay rate of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay, times the learning rate.
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

impl Entry {
    fn view(&self, flat: &Tensor) -> Tensor {
        flat.narrow(0, self.range.start, self.range.end - self.range.start).view(&self.shape[..])
    }
}

/// Trained matrices, their gradients and moments, each kind in one vector of `P` f32 numbers.
#[derive(Debug)]
pub struct FlatAdamW {
    config: AdamWConfig,
    entries: Vec<Entry>,
    parameters: Tensor, // (P)
    gradients: Tensor,  // (P)
    /// Numbers whose moments are here, and which this rank updates: all, unless the moments are divided.
    own: Range<i64>,
    m: Tensor, // (own numbers)
    v: Tensor, // (own numbers)
    /// Updates done so far, for the bias correction.
    updates: u64,
}

impl FlatAdamW {
    /// Copies `initial` (name and value) into the flat vector; moments and gradients start at 0.
    ///
    /// # Errors
    /// If the vectors do not fit into the device's memory.
    pub fn new(config: AdamWConfig, initial: &[(String, Tensor)], device: Device) -> Result<Self> {
        let mut entries = Vec::with_capacity(initial.len());
        let mut end = 0;
        for (name, value) in initial {
            let start = end;
            end += value.numel() as i64;
            entries.push(Entry { name: name.clone(), shape: value.size(), range: start..end });
        }
        let zeros = || Tensor::f_zeros([end], (Kind::Float, device));
        let optimizer = Self {
            config,
            entries,
            parameters: zeros()?,
            gradients: zeros()?,
            own: 0..end,
            m: zeros()?,
            v: zeros()?,
            updates: 0,
        };
        for (entry, (_, value)) in optimizer.entries.iter().zip(initial) {
            no_grad(|| entry.view(&optimizer.parameters).f_copy_(value))?;
        }
        Ok(optimizer)
    }

    /// Divides the moments over the ranks of `comm`, which hold the same parameters: each keeps those of an
    /// equal share of the numbers, updates these, and gets the others' updates by
    /// [`FlatAdamW::share_updates`]. To be called before the first step.
    ///
    /// # Errors
    /// No memory.
    pub fn divide_moments(&mut self, comm: &dyn Communicator) -> Result<()> {
        self.own = share(self.num_parameters(), comm.rank(), comm.world_size());
        let options = (Kind::Float, self.parameters.device());
        self.m = Tensor::f_zeros([self.own.end - self.own.start], options)?;
        self.v = self.m.f_zeros_like()?;
        Ok(())
    }

    /// Brings every rank's updates to the others, a bucket at a time, where moments are divided over the
    /// ranks of `comm`. Every rank must call this behind a step; all get the same.
    ///
    /// # Errors
    /// If a rank is gone.
    pub fn share_updates(&mut self, comm: &dyn Communicator) -> Result<()> {
        if self.own == (0..self.num_parameters()) {
            return Ok(());
        }
        for rank in 0..comm.world_size() {
            let numbers = share(self.num_parameters(), rank, comm.world_size());
            let updated =
                self.parameters.f_narrow(0, numbers.start, numbers.end - numbers.start)?;
            for mut bucket in updated.f_split(BUCKET, 0)? {
                comm.broadcast(&mut bucket, rank)?;
            }
        }
        Ok(())
    }

    /// Both moments of all numbers, (P) each. Every rank of `comm`, over which they may be divided, must
    /// call this; all get the same.
    ///
    /// # Errors
    /// If a rank is gone, or memory runs out.
    pub fn moments(&self, comm: &dyn Communicator) -> Result<[Tensor; 2]> {
        if self.own == (0..self.num_parameters()) {
            return Ok([self.m.shallow_clone(), self.v.shallow_clone()]);
        }
        Ok([comm.all_gather(&self.m)?, comm.all_gather(&self.v)?])
    }

    /// The part of a vector of all numbers that belongs to matrix `index`, in its shape.
    pub fn view(&self, index: usize, flat: &Tensor) -> Tensor {
        self.entries[index].view(flat)
    }

    /// The value of matrix `index`, sharing the optimizer's memory.
    pub fn value(&self, index: usize) -> Tensor {
        self.view(index, &self.parameters)
    }

    /// The matrices in their order.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Number of trained numbers, P.
    pub fn num_parameters(&self) -> i64 {
        self.parameters.numel() as i64
    }

    /// A leaf of the autograd graph that shares the matrix's memory: [`Self::step`] changes it.
    pub fn parameter(&self, index: usize) -> Tensor {
        self.entries[index].view(&self.parameters).detach().set_requires_grad(true)
    }

    /// The values of matrices that lie one behind the other, in the shape of their rows together;
    /// [`Self::step`] changes them.
    pub fn joined(&self, entries: Range<usize>, shape: &[i64]) -> Tensor {
        self.numbers(&self.parameters, &entries).view(shape)
    }

    /// Adds to the gradients of matrices that lie one behind the other.
    pub fn accumulate_joined(&self, entries: Range<usize>, gradient: &Tensor) {
        let mut sum = self.joined_gradient(entries, &gradient.size());
        let _ = no_grad(|| sum.g_add_(gradient));
    }

    /// The gradients of matrices that lie one behind the other, in the shape of their rows together.
    pub fn joined_gradient(&self, entries: Range<usize>, shape: &[i64]) -> Tensor {
        self.numbers(&self.gradients, &entries).view(shape)
    }

    fn numbers(&self, flat: &Tensor, entries: &Range<usize>) -> Tensor {
        let (start, end) =
            (self.entries[entries.start].range.start, self.entries[entries.end - 1].range.end);
        flat.narrow(0, start, end - start)
    }

    /// Adds to the gradient of matrix `index`.
    pub fn accumulate(&self, index: usize, gradient: &Tensor) {
        no_grad(|| {
            let _ = self.gradient(index).g_add_(gradient);
        });
    }

    /// The gradient of matrix `index`, sharing the optimizer's memory.
    pub fn gradient(&self, index: usize) -> Tensor {
        self.entries[index].view(&self.gradients)
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
            for mut bucket in self.gradients.f_split(BUCKET, 0)? {
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
    /// updates the parameters and forgets the gradients.
    ///
    /// # Errors
    /// If libtorch refuses the update.
    pub fn step(&mut self, learning_rate: f64, grad_norm: f64) -> Result<()> {
        let updates = self.updates + 1;
        let AdamWConfig { beta1, beta2, eps, weight_decay, max_grad_norm } = self.config;
        let config = AdamW { lr: learning_rate, beta1, beta2, eps, weight_decay };
        // As torch.nn.utils.clip_grad_norm_ has it, 1e-6 included.
        let clip = max_grad_norm / (grad_norm + 1e-6);
        if max_grad_norm > 0.0 && clip < 1.0 {
            let _ = no_grad(|| self.gradients.g_mul_scalar_(clip));
        }
        let Self { parameters, gradients, own, m, v, .. } = self;
        let (start, count) = (own.start, own.end - own.start);
        let parameter = &mut parameters.f_narrow(0, start, count)?;
        let grad = &mut gradients.f_narrow(0, start, count)?;
        let state = AdamWState { parameter, grad, exp_avg: m, exp_avg_sq: v };
        no_grad(|| fused_adamw(state, updates, &config))?;
        self.updates = updates;
        self.zero_grad();
        Ok(())
    }

    /// Updates done so far.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// Puts a value in the place of matrix `index`'s.
    ///
    /// # Errors
    /// If the shape differs.
    pub fn set_value(&mut self, index: usize, value: &Tensor) -> Result<()> {
        no_grad(|| self.value(index).f_copy_(value))?;
        Ok(())
    }

    /// Puts what is saved of a moment of matrix `index` into the numbers of it that are here.
    fn restore_moment(&self, index: usize, moment: &Tensor, saved: &Tensor) -> Result<()> {
        let Range { start, end } = self.entries[index].range;
        let (first, last) = (start.max(self.own.start), end.min(self.own.end));
        if first < last {
            let saved = saved.f_reshape(-1)?.f_narrow(0, first - start, last - first)?;
            let mut here = moment.f_narrow(0, first - self.own.start, last - first)?;
            no_grad(|| here.f_copy_(&saved))?;
        }
        Ok(())
    }

    /// Takes over value and moments of every matrix from a checkpoint, in the order of
    /// [`Self::entries`], after `updates` updates.
    ///
    /// # Errors
    /// If a shape differs.
    pub fn restore(&mut self, states: &[[Tensor; 3]], updates: u64) -> Result<()> {
        for (index, [value, m, v]) in states.iter().enumerate() {
            self.set_value(index, value)?;
            for (moment, saved) in [(&self.m, m), (&self.v, v)] {
                self.restore_moment(index, moment, saved)?;
            }
        }
        self.updates = updates;
        Ok(())
    }
}

/// Numbers of a rank's share.
fn share(count: i64, rank: usize, ranks: usize) -> Range<i64> {
    let border = |rank: usize| count * rank as i64 / ranks as i64;
    border(rank)..border(rank + 1)
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
            .map(|(index, value)| (format!("p{index}"), Tensor::from_slice(value)))
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
        let got = optimizer.parameter(1).double_value(&[0]);
        assert!((got - reference(&config, 0.25, &gradients, 0.05)).abs() < 1e-6);
        let untouched = optimizer.parameter(0).double_value(&[0]);
        assert!((untouched - reference(&config, 1.5, &[0.0; 3], 0.05)).abs() < 1e-6);
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
        let moved = |index| optimizer.parameter(index).double_value(&[0]);
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
        assert!((parameter.double_value(&[0]) - 0.9).abs() < 1e-4);
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
        let [m, v] = first.moments(&SingleProcess).unwrap();
        let saved = [first.value(0), m, v].map(|tensor| tensor.copy());
        let updates = first.updates();
        step(&mut first, 0.1);
        let mut second = optimizer(AdamWConfig::default(), &[&[0.0, 0.0]]);
        second.restore(&[saved], updates).unwrap();
        step(&mut second, 0.1);
        assert_eq!(first.parameter(0), second.parameter(0));
    }
}
