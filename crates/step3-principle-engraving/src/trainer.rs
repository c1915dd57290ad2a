//! The training loop.
//!
//! Legend: `T` tokens of a micro-batch, `C` hidden_size.

use std::time::Instant;

use dromedary_llama::{ClosedForm, Llama};
use dromedary_parallel::fault_point;
use dromedary_torch_ext::release_free_memory;
use serde::{Deserialize, Serialize};
use tch::{Tensor, no_grad};

use crate::{
    batches::Batches,
    collate::{BatchLimits, Example, MicroBatch},
    error::{Error, Result},
    half_block::{Half, HalfBlock, Keep},
    held_out::held_out_loss,
    loss::{Head, head_loss},
    metrics::not_finite,
    ranks::Ranks,
    schedule::Schedule,
    trained::Trained,
};

/// Steps with a loss or gradient that is not finite, one behind the other, after which a run ends:
/// such a run does not recover by itself.
const MAX_NOT_FINITE: u32 = 5;

/// Bits of a dropout mask's number that tell the micro-batches of a step apart.
const MICRO_BATCH_BITS: u32 = 24;

/// What one optimizer step did; a line of `metrics.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// Number of the step, from 1.
    pub step: u64,
    /// Passes over the rows so far.
    pub epoch: f64,
    /// Mean of `-ln p` over all learned tokens of the step's rows.
    #[serde(with = "not_finite")]
    pub loss: f64,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Global norm of the gradients before clipping.
    #[serde(with = "not_finite")]
    pub grad_norm: f64,
    /// Tokens read.
    pub tokens: usize,
    /// Tokens learned.
    pub targets: usize,
    /// Wall time, in seconds.
    pub seconds: f64,
    /// The update was left out since loss or gradients were not finite.
    pub skipped: bool,
    /// The rows, in their order.
    pub example_ids: Vec<u64>,
}

impl StepMetrics {
    /// Tokens read in a second.
    pub fn tokens_per_second(&self) -> f64 {
        self.tokens as f64 / self.seconds
    }
}

/// Where a run stands: by what the next step finds its rows, its learning rate and its random
/// numbers. They go together, and a checkpoint holds each, as none may be lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// Optimizer steps done, skipped ones included.
    pub step: u64,
    /// Steps whose rows have been read, over all epochs.
    pub data: u64,
    /// Steps of the learning rate's schedule.
    pub schedule: u64,
    /// Steps whose random numbers have been drawn.
    pub rng: u64,
    /// Steps in a row up to now with a loss or gradient that is not finite.
    pub not_finite: u32,
}

/// What forward and backward of one optimizer step say.
#[derive(Clone, Debug, PartialEq)]
pub struct StepLoss {
    /// Mean of `-ln p` over all learned tokens of the step's rows.
    pub loss: f64,
    /// Tokens read.
    pub tokens: usize,
    /// Tokens learned.
    pub targets: usize,
    /// The rows.
    pub example_ids: Vec<u64>,
}

impl Position {
    /// One step further.
    fn advance(&mut self) {
        for steps in [&mut self.step, &mut self.data, &mut self.schedule, &mut self.rng] {
            *steps += 1;
        }
    }
}

/// A model under training, its rows and its schedule.
pub struct Trainer<'a> {
    model: &'a Llama,
    trained: Trained,
    /// Leaves of each half-block, in the order of forward.
    leaves: Vec<Vec<usize>>,
    examples: &'a [Example],
    batches: Batches,
    schedule: Schedule,
    kept_layers: usize,
    closed_form: Option<ClosedForm>,
    ranks: Ranks<'a>,
    position: Position,
}

/// The parts that a [`Trainer`] puts together.
pub struct TrainerParts<'a> {
    /// The base model with `trained` attached.
    pub model: &'a Llama,
    /// Its adapters.
    pub trained: Trained,
    /// All rows; must not be empty.
    pub examples: &'a [Example],
    /// Their order.
    pub batches: Batches,
    /// Learning rates.
    pub schedule: Schedule,
    /// The layers whose activations forward keeps, the first ones; the others are computed twice.
    pub kept_layers: usize,
    /// The ranks of the run.
    pub ranks: Ranks<'a>,
}

impl<'a> Trainer<'a> {
    /// A trainer before its first step.
    pub fn new(parts: TrainerParts<'a>) -> Self {
        let TrainerParts { model, trained, examples, batches, schedule, kept_layers, ranks } =
            parts;
        let leaves = (0..model.layers().len())
            .flat_map(|layer| [Half::Attention, Half::Mlp].map(|half| (layer, half)))
            .map(|(layer, half)| trained.leaves_of(layer, half))
            .collect();
        Self {
            model,
            closed_form: ClosedForm::of(model, trained.trains_weights()),
            trained,
            leaves,
            examples,
            batches,
            schedule,
            kept_layers,
            ranks,
            position: Position::default(),
        }
    }

    /// The adapters and the optimizer's state.
    pub fn trained(&self) -> &Trained {
        &self.trained
    }

    /// Optimizer steps done.
    pub fn steps_done(&self) -> u64 {
        self.position.step
    }

    /// Where the run stands.
    pub fn position(&self) -> Position {
        self.position
    }

    /// Optimizer steps of the whole run.
    pub fn total_steps(&self) -> u64 {
        self.schedule.total_steps
    }

    /// Goes on from the state that `restore` puts back; it returns where the run stood.
    ///
    /// # Errors
    /// Those of `restore`.
    pub fn resume(&mut self, restore: impl FnOnce(&mut Trained) -> Result<Position>) -> Result<()> {
        self.position = restore(&mut self.trained)?;
        Ok(())
    }

    /// One optimizer step: all micro-batches, clipping, update.
    ///
    /// The loss is the sum over all learned tokens divided by their number, however the rows are
    /// cut into micro-batches, and whichever replicas these go to. Every rank must call this; all
    /// get the same. Dromedary averaged micro-batches, which gives the tokens of short
    /// rows more weight.
    ///
    /// # Errors
    /// If loss or gradients were not finite for several steps in a row, memory runs out, or a rank
    /// fails.
    pub fn train_step(&mut self) -> Result<StepMetrics> {
        let start = Instant::now();
        let StepLoss { loss, tokens, targets, example_ids } = self.forward_backward()?;
        let grad_norm = self.complete_gradients()?;
        let learning_rate = self.schedule.learning_rate_at(self.position.schedule);
        let skipped = self.ranks.any(!(loss.is_finite() && grad_norm.is_finite()))?;
        self.position.advance();
        if skipped {
            self.skip_update(&example_ids);
        } else {
            self.position.not_finite = 0;
            self.trained.step(learning_rate, grad_norm, &self.ranks)?;
        }
        let metrics = StepMetrics {
            step: self.position.step,
            epoch: self.position.data as f64 / self.batches.steps_per_epoch() as f64,
            loss,
            learning_rate,
            grad_norm,
            tokens,
            targets,
            seconds: start.elapsed().as_secs_f64(),
            skipped,
            example_ids,
        };
        if self.position.not_finite < MAX_NOT_FINITE {
            return Ok(metrics);
        }
        Err(Error::NotFinite { example_ids: self.rows_not_finite(), last: Box::new(metrics) })
    }

    /// Loss of the next step's rows. The gradients of this replica's share of them are added to the
    /// optimizer's; see [`Trained::complete_gradients`]. Every rank must call this; all get the same loss.
    ///
    /// # Errors
    /// If memory runs out, or a rank fails.
    pub fn forward_backward(&mut self) -> Result<StepLoss> {
        fault_point("step", self.position.step as usize + 1)?;
        let batches = self.micro_batches();
        let targets: usize = batches.iter().map(MicroBatch::num_targets).sum();
        let scale = 1.0 / targets.max(1) as f64;
        let mut loss = 0.0;
        let dp = self.ranks.dp();
        let (replica, replicas) = (dp.rank(), dp.world_size());
        for (index, batch) in batches.iter().enumerate().skip(replica).step_by(replicas) {
            // Every micro-batch of the run has masks of its own.
            self.trained.set_draw(Some(self.position.rng << MICRO_BATCH_BITS | index as u64));
            let summed = self.accumulate(batch, scale);
            self.trained.set_draw(None);
            loss += scale * summed?;
        }
        Ok(StepLoss {
            loss: self.sum_over_replicas(loss)?,
            tokens: batches.iter().map(MicroBatch::num_tokens).sum(),
            targets,
            example_ids: batches.into_iter().flat_map(|batch| batch.example_ids).collect(),
        })
    }

    /// Makes the gradients that [`Trainer::forward_backward`] left complete, see
    /// [`Trained::complete_gradients`]; gives their global norm. Every rank must call this.
    ///
    /// # Errors
    /// If a rank fails.
    pub fn complete_gradients(&mut self) -> Result<f64> {
        self.trained.complete_gradients(&self.ranks)
    }

    /// Loss of rows that are not trained on, in the memory of the training; see [`held_out_loss`]. Every rank
    /// must call this; all get the same.
    ///
    /// # Errors
    /// If memory runs out, or a rank fails.
    pub fn held_out_loss(&self, examples: &[Example], limits: BatchLimits) -> Result<f64> {
        held_out_loss(self.model, self.closed_form.as_ref(), examples, limits, &self.ranks)
    }

    fn sum_over_replicas(&self, loss: f64) -> Result<f64> {
        let mut sum = Tensor::from_slice(&[loss]);
        self.ranks.dp().all_reduce_sum(&mut sum)?;
        Ok(sum.f_double_value(&[0])?)
    }

    fn micro_batches(&mut self) -> Vec<MicroBatch> {
        let rows = self.batches.step(self.position.data);
        let micro_batch =
            |rows: &Vec<usize>| MicroBatch::new(rows.iter().map(|&row| &self.examples[row]));
        rows.iter().map(micro_batch).collect()
    }

    fn skip_update(&mut self, example_ids: &[u64]) {
        self.trained.optimizer.zero_grad();
        let Position { step, not_finite, .. } = &mut self.position;
        *not_finite += 1;
        tracing::warn!(step = *step, ?example_ids, "loss or gradients not finite: step skipped");
    }

    /// The rows of each of the last steps that were not finite, also of those before a restart.
    fn rows_not_finite(&mut self) -> Vec<Vec<u64>> {
        let Position { data, not_finite, .. } = self.position;
        let ids = |rows: Vec<Vec<usize>>| {
            rows.iter().flatten().map(|&row| self.examples[row].example_id).collect()
        };
        (data.saturating_sub(not_finite.into())..data)
            .map(|step| ids(self.batches.step(step)))
            .collect()
    }

    /// Forward and backward of one micro-batch; adds `scale` times the gradients of its summed loss
    /// to the optimizer's, and returns the summed loss.
    fn accumulate(&mut self, batch: &MicroBatch, scale: f64) -> Result<f64> {
        let rotary_at = self.model.rotary_at(&batch.positions())?;
        let closed_form = self.closed_form.as_ref();
        let half_blocks = HalfBlock::of_layers(self.model, &rotary_at, &batch.lengths, closed_form);
        let mut hidden = no_grad(|| self.model.embed(&batch.input_ids))?; // (T, C)
        let mut saved = Vec::with_capacity(half_blocks.len());
        for (index, half_block) in half_blocks.iter().enumerate() {
            fault_point("half-block", index)?;
            let keep = if index / 2 < self.kept_layers { Keep::Graph } else { Keep::Input };
            let (output, left) = half_block.forward(&hidden, keep, self.ranks.tp())?;
            hidden = output;
            saved.push(left);
        }
        let leaves = self.trained.head_leaves();
        let head = Head {
            model: self.model,
            closed_form,
            leaves: leaves.map(|leaves| leaves.map(|leaf| self.trained.leaf(leaf))),
        };
        if leaves.is_some() {
            // The peak comes now, and gradients of weights on their way have left holes.
            release_free_memory();
        }
        let head = head_loss(head, &hidden, batch, scale, self.ranks.tp())?;
        drop(hidden);
        // Of what all ranks of the group have whole and alike, one adds the gradient; see `TrainedPart`.
        let adds_common = self.ranks.tp().rank() == 0;
        if let (Some([norm, weight]), Some([of_norm, of_weight])) = (leaves, head.grad_weights) {
            if adds_common {
                self.trained.accumulate(norm, &of_norm);
            }
            self.trained.accumulate(weight, &of_weight);
        }

        let mut gradient = head.grad_hidden; // (T, C)
        for ((half_block, leaves), saved) in half_blocks.iter().zip(&self.leaves).zip(saved).rev() {
            let tensors: Vec<_> = leaves.iter().map(|&leaf| self.trained.leaf(leaf)).collect();
            let (grad_input, gradients) =
                half_block.backward(saved, &gradient, &tensors, self.ranks.tp())?;
            gradient = grad_input;
            for (&leaf, gradient) in leaves.iter().zip(gradients) {
                if let Some(gradient) = gradient {
                    self.trained.accumulate(leaf, &gradient);
                }
            }
        }
        if let Some(leaf) = self.trained.embedding_leaf().filter(|_| adds_common) {
            let ids: Vec<i64> = batch.input_ids.iter().map(|&id| i64::from(id)).collect();
            let ids = Tensor::from_slice(&ids).to_device(gradient.device()); // (T)
            let mut sum = self.trained.gradient(leaf); // (V, C)
            let gradient = gradient.to_kind(sum.kind());
            let _ = no_grad(|| sum.index_add_(0, &ids, &gradient));
        }
        Ok(head.loss_sum)
    }
}
