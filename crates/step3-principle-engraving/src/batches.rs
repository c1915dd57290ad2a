//! Which rows an optimizer step sees: a function of seed and step alone, so that a resumed run
//! needs no other cursor than its step.

use rand::{SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;

/// Optimizer steps among whose rows `--group-by-length` sorts: enough to find rows of a length,
/// few enough to leave the order random.
const STEPS_PER_GROUP: usize = 50;

/// How rows become batches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchConfig {
    /// Rows of a micro-batch.
    pub batch_size: usize,
    /// Micro-batches of an optimizer step.
    pub accumulation_steps: usize,
    /// Put rows of similar length into a micro-batch.
    pub group_by_length: bool,
    /// Seed of the order.
    pub seed: u64,
}

impl BatchConfig {
    fn rows_per_step(&self) -> usize {
        self.batch_size * self.accumulation_steps
    }
}

/// The rows of each optimizer step. Every row comes once an epoch; the last step of an epoch may
/// hold fewer rows.
#[derive(Clone, Debug)]
pub struct Batches {
    config: BatchConfig,
    lengths: Vec<usize>,
    order: Vec<usize>,
    epoch: u64,
}

impl Batches {
    /// Batches of rows with these lengths in tokens. `lengths` must not be empty.
    pub fn new(config: BatchConfig, lengths: Vec<usize>) -> Self {
        let order = epoch_order(&config, &lengths, 0);
        Self { config, lengths, order, epoch: 0 }
    }

    /// Optimizer steps of one epoch.
    pub fn steps_per_epoch(&self) -> u64 {
        self.lengths.len().div_ceil(self.config.rows_per_step()) as u64
    }

    /// Indices of the rows of optimizer step `step` (from 0, over all epochs), by micro-batch.
    pub fn step(&mut self, step: u64) -> Vec<Vec<usize>> {
        let epoch = step / self.steps_per_epoch();
        if epoch != self.epoch {
            self.order = epoch_order(&self.config, &self.lengths, epoch);
            self.epoch = epoch;
        }
        let start = (step % self.steps_per_epoch()) as usize * self.config.rows_per_step();
        let end = (start + self.config.rows_per_step()).min(self.order.len());
        self.order[start..end].chunks(self.config.batch_size).map(<[usize]>::to_vec).collect()
    }
}

fn epoch_order(config: &BatchConfig, lengths: &[usize], epoch: u64) -> Vec<usize> {
    let mut rng = ChaCha8Rng::seed_from_u64(config.seed);
    rng.set_stream(epoch);
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.shuffle(&mut rng);
    if config.group_by_length {
        for group in order.chunks_mut(config.rows_per_step() * STEPS_PER_GROUP) {
            // Longest first: a batch that does not fit into memory fails at the start.
            group.sort_by_key(|&row| std::cmp::Reverse(lengths[row]));
        }
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn config(batch_size: usize, accumulation_steps: usize, group_by_length: bool) -> BatchConfig {
        BatchConfig { batch_size, accumulation_steps, group_by_length, seed: 42 }
    }

    fn epoch(batches: &mut Batches, epoch: u64) -> Vec<usize> {
        let steps = batches.steps_per_epoch();
        (epoch * steps..(epoch + 1) * steps).flat_map(|step| batches.step(step).concat()).collect()
    }

    proptest! {
        #[test]
        fn every_row_comes_once_an_epoch(
            lengths in prop::collection::vec(1usize..50, 1..90),
            batch_size in 1usize..5,
            accumulation_steps in 1usize..4,
            group_by_length: bool,
        ) {
            let config = config(batch_size, accumulation_steps, group_by_length);
            let mut batches = Batches::new(config, lengths.clone());
            for number in [0, 1, 0] {
                let mut rows = epoch(&mut batches, number);
                rows.sort_unstable();
                prop_assert_eq!(rows, (0..lengths.len()).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn epochs_differ_and_steps_do_not_depend_on_what_was_asked_before() {
        let mut batches = Batches::new(config(2, 2, false), vec![1; 40]);
        let (first, second) = (epoch(&mut batches, 0), epoch(&mut batches, 1));
        assert_ne!(first, second);
        let mut fresh = Batches::new(config(2, 2, false), vec![1; 40]);
        assert_eq!(fresh.step(13).concat(), batches.step(13).concat());
    }

    #[test]
    fn another_seed_is_another_order() {
        let mut other = config(1, 1, false);
        other.seed = 43;
        let order = |config| epoch(&mut Batches::new(config, vec![1; 40]), 0);
        assert_ne!(order(config(1, 1, false)), order(other));
    }

    #[test]
    fn grouping_puts_similar_lengths_together() {
        let lengths: Vec<usize> = (0..64).map(|row| (row * 37) % 64 + 1).collect();
        let mut batches = Batches::new(config(4, 1, true), lengths.clone());
        let spread = |rows: &[usize]| {
            let lengths = rows.iter().map(|&row| lengths[row]);
            lengths.clone().max().unwrap() - lengths.min().unwrap()
        };
        assert!((0..16).all(|step| spread(&batches.step(step).concat()) <= 3));
    }
}
