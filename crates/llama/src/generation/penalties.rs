//! What bias and penalties change in a row's logits.

// Shapes: B = rows, W = this rank's rows of the vocabulary.

use std::{collections::BTreeMap, ops::Range};

use dromedary_tokenizer::Tokenizer;
use tch::Tensor;

use super::{Sampling, sampler::RowKey};
use crate::Result;

/// Changes logits as a [`Sampling`] asks for.
#[derive(Debug)]
pub(super) struct Penalties {
    sampling: Sampling,
    /// By token id, whether a frequency penalty applies to it.
    punishable: Vec<bool>,
}

/// What happens to one logit.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Change {
    bias: f64,
    generated: bool,
    penalty: f64,
}

impl Penalties {
    pub(super) fn new(sampling: &Sampling, tokenizer: &Tokenizer) -> Self {
        let frequency = sampling.frequency_penalty;
        let punishable = |id: u32| {
            !frequency.starts_only
                || (id > frequency.min_range && tokenizer.token(id).is_some_and(begins_word))
        };
        let ids = if frequency.is_off() { 0 } else { tokenizer.vocab_size() as u32 };
        Self { sampling: sampling.clone(), punishable: (0..ids).map(punishable).collect() }
    }

    /// Changes the logits of each row where it must, in place.
    ///
    /// # Shapes
    /// logits: `(B, W)` of the vocabulary's `rows`.
    pub(super) fn apply(
        &self,
        logits: &mut Tensor,
        rows: &Range<i64>,
        keys: &[RowKey<'_>],
    ) -> Result<()> {
        if self.sampling.changes_no_logit() {
            return Ok(());
        }
        let (mut at, mut columns, mut changes) = (Vec::new(), Vec::new(), Vec::new());
        for (row, key) in (0i64..).zip(keys) {
            for (id, change) in self.changes(key.generated) {
                if rows.contains(&i64::from(id)) {
                    at.push(row);
                    columns.push(i64::from(id) - rows.start);
                    changes.push(change);
                }
            }
        }
        let device = logits.device();
        let index = [at, columns].map(|index| Some(Tensor::from_slice(&index).to_device(device)));
        let mut values = Vec::<f32>::try_from(logits.f_index(&index)?)?;
        for (value, change) in values.iter_mut().zip(&changes) {
            *value = self.changed(*value, change);
        }
        let values = Tensor::from_slice(&values).to_device(device);
        let _ = logits.f_index_put_(&index, &values, false)?;
        Ok(())
    }

    fn changed(&self, logit: f32, change: &Change) -> f32 {
        let mut logit = f64::from(logit) + change.bias;
        if change.generated {
            let factor = self.sampling.repetition_penalty;
            logit = if logit > 0.0 { logit / factor } else { logit * factor };
        }
        (logit - change.penalty) as f32
    }

    /// What changes behind these tokens of the row's own, by token id.
    fn changes(&self, generated: &[u32]) -> BTreeMap<u32, Change> {
        let mut changes: BTreeMap<u32, Change> = BTreeMap::new();
        for (&id, &bias) in &self.sampling.logit_bias {
            changes.entry(id).or_default().bias = bias;
        }
        let Sampling { presence_penalty, repetition_penalty, .. } = self.sampling;
        if presence_penalty != 0.0 || repetition_penalty != 1.0 {
            for &id in generated {
                let change = changes.entry(id).or_default();
                if !change.generated {
                    change.generated = true;
                    change.penalty += presence_penalty;
                }
            }
        }
        // Dromedary does not count the first token of a row.
        let counted = generated.get(1..).unwrap_or_default();
        for (context, penalty) in
            self.sampling.frequency_penalty.by_context().into_iter().enumerate()
        {
            if penalty == 0.0 || counted.len() < context {
                continue;
            }
            let last = &counted[counted.len() - context..];
            for ngram in counted.windows(context + 1).filter(|ngram| ngram[..context] == *last) {
                let id = ngram[context];
                if self.punishable.get(id as usize) == Some(&true) {
                    changes.entry(id).or_default().penalty += penalty;
                }
            }
        }
        changes
    }
}

/// Whether a piece begins a word and holds a part of it: sentencepiece marks the space before a
/// word by U+2581, byte-level BPE by U+0120.
fn begins_word(piece: &str) -> bool {
    ['\u{2581}', '\u{120}'].iter().any(|&mark| piece.starts_with(mark) && !piece.ends_with(mark))
}

#[cfg(test)]
mod tests {
    use super::super::FrequencyPenalty;
    use super::*;
    use proptest::prelude::*;

    fn penalties(sampling: Sampling, punishable: Vec<bool>) -> Penalties {
        Penalties { sampling, punishable }
    }

    /// The original's loop: counts are kept from token to token, and looked up before the next one.
    fn counted_as_dromedary(generated: &[u32], penalty: [f64; 4], punishable: &[bool]) -> Vec<f64> {
        let mut counts: BTreeMap<Vec<u32>, u32> = BTreeMap::new();
        for position in 0..generated.len() {
            for history in 0..4 {
                if position > history {
                    let ngram = generated[position - history..=position].to_vec();
                    *counts.entry(ngram).or_default() += 1;
                }
            }
        }
        let mut taken = vec![0.0; punishable.len()];
        for (history, penalty) in penalty.into_iter().enumerate() {
            if generated.len() > history {
                let prefix = &generated[generated.len() - history..];
                for (ngram, &count) in &counts {
                    let id = ngram[history.min(ngram.len() - 1)] as usize;
                    if ngram.len() == history + 1 && ngram[..history] == *prefix && punishable[id] {
                        taken[id] += penalty * f64::from(count);
                    }
                }
            }
        }
        taken
    }

    proptest! {
        #[test]
        fn frequencies_count_as_in_the_original(
            generated in prop::collection::vec(0u32..5, 0..40),
            punishable in prop::collection::vec(any::<bool>(), 5),
            penalty in prop::array::uniform4(0.0f64..2.0),
        ) {
            let [unitoken, bitoken, tritoken, quadtoken] = penalty;
            let frequency_penalty =
                FrequencyPenalty { unitoken, bitoken, tritoken, quadtoken, ..Default::default() };
            let sampling = Sampling { frequency_penalty, ..Sampling::default() };
            let want = counted_as_dromedary(&generated, penalty, &punishable);
            let changes = penalties(sampling, punishable).changes(&generated);
            for (id, want) in (0u32..).zip(want) {
                let got = changes.get(&id).map_or(0.0, |change| change.penalty);
                prop_assert!((got - want).abs() < 1e-9, "token {}: {} for {}", id, got, want);
            }
        }

        /// Each token that the row has changes once, however often it has it.
        #[test]
        fn tokens_of_the_row_are_divided_and_lowered_once(
            generated in prop::collection::vec(0u32..6, 0..20),
            logits in prop::array::uniform6(-5f32..5.0),
            presence_penalty in -2.0f64..2.0,
            repetition_penalty in 0.25f64..4.0,
        ) {
            let mut want = logits;
            for (id, logit) in (0u32..).zip(&mut want) {
                if generated.contains(&id) {
                    let factor = if *logit > 0.0 { 1.0 / repetition_penalty } else { repetition_penalty };
                    *logit = (f64::from(*logit) * factor - presence_penalty) as f32;
                }
            }
            let sampling = Sampling { presence_penalty, repetition_penalty, ..Sampling::default() };
            let key = RowKey { seed: 0, id: "row", position: 0, generated: &generated };
            let mut got = Tensor::from_slice(&logits).view([1, 6]);
            penalties(sampling, Vec::new()).apply(&mut got, &(0..6), &[key]).unwrap();
            let got = Vec::<f32>::try_from(got.view([6])).unwrap();
            for (got, want) in got.iter().zip(want) {
                prop_assert!((got - want).abs() < 1e-5, "{} for {}", got, want);
            }
        }
    }

    #[test]
    fn changes_come_in_order_and_reach_one_shard_each() {
        let sampling = Sampling {
            logit_bias: [(1, -4.0), (6, 2.5)].into(),
            presence_penalty: 0.25,
            repetition_penalty: 2.0,
            frequency_penalty: FrequencyPenalty { unitoken: 0.5, ..Default::default() },
            ..Sampling::default()
        };
        let penalties = penalties(sampling, vec![true, true, false, true, true, true, true, true]);
        let generated = [3u32, 1, 2, 1];
        let key = |generated| RowKey { seed: 0, id: "row", position: 0, generated };
        let keys = [key(&generated[..]), key(&[])];
        let logits = Tensor::from_slice(&[1f32, 2., 3., 4., 5., 6., -1., 8.]).repeat([2, 1]);
        // (2 - 4) x 2 - 2 x 0.5 - 0.25 ; 3 / 2 - 0.25 and goes free ; the first token: 4 / 2 - 0.25.
        let want = [[1., -5.25, 1.25, 1.75, 5., 6., 1.5, 8.], [1., -2., 3., 4., 5., 6., 1.5, 8.]];
        for (start, end) in [(0, 8), (0, 3), (3, 8)] {
            let mut shard = logits.narrow(1, start, end - start).copy();
            penalties.apply(&mut shard, &(start..end), &keys).unwrap();
            for (row, want) in (0i64..).zip(want) {
                let got = Vec::<f32>::try_from(shard.get(row)).unwrap();
                assert_eq!(got, want[start as usize..end as usize], "{start}..{end}");
            }
        }
    }

    #[test]
    fn words_begin_with_the_mark_of_either_kind_of_tokenizer() {
        assert!(begins_word("\u{2581}dog") && begins_word("\u{120}dog"));
        for piece in ["dog", "\u{2581}", "\u{2581}\u{2581}", "\u{120}", "", "\u{2581}a\u{2581}"] {
            assert!(!begins_word(piece), "{piece:?}");
        }
    }
}
