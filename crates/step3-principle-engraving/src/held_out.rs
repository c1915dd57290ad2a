//! Rows that are not trained on, and the model's loss on them.

use std::path::PathBuf;

use dromedary_llama::{ClosedForm, Llama};
use dromedary_parallel::Communicator;
use dromedary_tokenizer::Tokenizer;
use rand::{SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;
use tch::{Tensor, no_grad};

use crate::{
    collate::{BatchLimits, Example, MicroBatch},
    dataset::{DataConfig, Dataset},
    error::{Error, Result},
    half_block::{HalfBlock, Keep},
    loss::{Head, head_loss},
    ranks::Ranks,
};

/// The stream of the seed that draws held-out rows; epochs of training have the small numbers.
const STREAM: u64 = u64::MAX;

/// Which rows are held out, and when their loss is computed.
#[derive(Clone, Debug, PartialEq)]
pub struct EvalConfig {
    /// Where the rows come from.
    pub rows: EvalRows,
    /// Rows at most.
    pub max_samples: Option<usize>,
    /// Rows of a batch at most, which has no more tokens than one of training; the loss does not depend on
    /// it but for rounding.
    pub batch_size: usize,
    /// When.
    pub every: EvalEvery,
}

/// Where held-out rows come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EvalRows {
    /// A file of their own.
    File(PathBuf),
    /// So many rows, drawn from the data set by the seed and not trained on.
    Drawn(usize),
}

/// When the held-out loss is computed; behind the last step it always is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EvalEvery {
    /// Behind each step whose number is a multiple.
    Steps(u64),
    /// Behind the last step of each epoch.
    Epoch,
}

impl EvalEvery {
    /// Whether it is due behind step `step` (from 1) of `total`.
    pub(crate) fn is_due(self, step: u64, total: u64, steps_per_epoch: u64) -> bool {
        let every = match self {
            Self::Steps(every) => every,
            Self::Epoch => steps_per_epoch,
        };
        step.is_multiple_of(every) || step == total
    }
}

/// Splits off or reads the held-out rows: those to train on, and those held out.
///
/// # Errors
/// If the file cannot be read, or no row would be left to train on.
pub(crate) fn split(
    examples: Vec<Example>,
    eval: &EvalConfig,
    data: &DataConfig,
    seed: u64,
    tokenizer: &Tokenizer,
) -> Result<(Vec<Example>, Vec<Example>)> {
    match &eval.rows {
        EvalRows::File(path) => {
            let held_out = Dataset::read(path, eval.max_samples, data, tokenizer)?;
            held_out.audit.log("held-out rows");
            held_out.check(data.drop_empty)?;
            Ok((examples, held_out.examples))
        }
        EvalRows::Drawn(count) => draw(examples, *count, seed).map(|(train, mut held_out)| {
            held_out.truncate(eval.max_samples.unwrap_or(usize::MAX));
            (train, held_out)
        }),
    }
}

/// Draws `count` rows; both parts stay in the order of the file.
fn draw(examples: Vec<Example>, count: usize, seed: u64) -> Result<(Vec<Example>, Vec<Example>)> {
    let rows = examples.len();
    if count >= rows {
        return Err(Error::Setting {
            setting: "--eval-dataset-size",
            message: format!("{count} held-out rows leave none of {rows} to train on"),
        });
    }
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(STREAM);
    let mut is_held_out = vec![false; rows];
    is_held_out[..count].fill(true);
    is_held_out.shuffle(&mut rng);
    let (held_out, train): (Vec<_>, Vec<_>) =
        examples.into_iter().zip(is_held_out).partition(|(_, is_held_out)| *is_held_out);
    let rows = |part: Vec<(Example, bool)>| part.into_iter().map(|(example, _)| example).collect();
    Ok((rows(train), rows(held_out)))
}

/// Mean of `-ln p` over all learned tokens of `examples`, without dropout and without a trace in
/// the run: no random number is drawn, no gradient added. It needs no memory of its own where
/// `closed_form` is that of the training, and the micro-batches are as large at most. Replicas share the
/// rows. Every rank must call this; all get the same.
///
/// # Errors
/// If memory runs out, or a rank fails.
pub fn held_out_loss(
    model: &Llama,
    closed_form: Option<&ClosedForm>,
    examples: &[Example],
    limits: BatchLimits,
    ranks: &Ranks<'_>,
) -> Result<f64> {
    let dp = ranks.dp();
    let mut sum = 0.0;
    for rows in limits.cut(examples).into_iter().skip(dp.rank()).step_by(dp.world_size()) {
        sum += summed_loss(model, closed_form, &MicroBatch::new(rows), ranks.tp())?;
    }
    let mut sum = Tensor::from_slice(&[sum]);
    dp.all_reduce_sum(&mut sum)?;
    let targets: usize = examples.iter().map(Example::num_targets).sum();
    Ok(sum.f_double_value(&[0])? / targets.max(1) as f64)
}

fn summed_loss(
    model: &Llama,
    closed_form: Option<&ClosedForm>,
    batch: &MicroBatch,
    comm: &dyn Communicator,
) -> Result<f64> {
    let rotary_at = model.rotary_at(&batch.positions())?;
    let mut hidden = no_grad(|| model.embed(&batch.input_ids))?; // (T, C)
    for half_block in HalfBlock::of_layers(model, &rotary_at, &batch.lengths, closed_form) {
        (hidden, _) = half_block.forward(&hidden, Keep::Input, comm)?;
    }
    let head = Head { model, closed_form, leaves: None };
    Ok(head_loss(head, &hidden, batch, 0.0, comm)?.loss_sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn examples(count: u64) -> Vec<Example> {
        (1..=count).map(|example_id| Example::learned_from(example_id, vec![1, 2, 3], 1)).collect()
    }

    fn ids(examples: &[Example]) -> Vec<u64> {
        examples.iter().map(|example| example.example_id).collect()
    }

    #[test]
    fn drawn_rows_are_not_trained_on_and_depend_on_the_seed_alone() {
        let (train, held_out) = draw(examples(50), 7, 1).unwrap();
        assert_eq!((train.len(), held_out.len()), (43, 7));
        let mut all = [ids(&train), ids(&held_out)].concat();
        all.sort_unstable();
        assert_eq!(all, ids(&examples(50)));
        assert_eq!(ids(&draw(examples(50), 7, 1).unwrap().1), ids(&held_out));
        assert_ne!(ids(&draw(examples(50), 7, 2).unwrap().1), ids(&held_out));
    }

    #[test]
    fn more_held_out_rows_than_there_are_are_refused_with_both_numbers() {
        let error = draw(examples(5), 5, 1).unwrap_err().to_string();
        assert!(error.contains("5 held-out rows") && error.contains("none of 5"), "{error}");
    }

    #[test]
    fn it_is_due_every_so_many_steps_and_at_the_end() {
        let due = |every: EvalEvery| -> Vec<u64> {
            (1..=10).filter(|&step| every.is_due(step, 10, 3)).collect()
        };
        assert_eq!(due(EvalEvery::Steps(4)), [4, 8, 10]);
        assert_eq!(due(EvalEvery::Epoch), [3, 6, 9, 10]);
    }
}
