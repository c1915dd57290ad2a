//! Choosing a token of a vocabulary that may be split over ranks.

// Shapes: B = rows, V = vocab_size, W = this rank's rows of the vocabulary, K = candidates of a rank.

use std::{mem, ops::Range};

use dromedary_parallel::Communicator;
use dromedary_tokenizer::Tokenizer;
use dromedary_torch_ext::Rows;
use rand::Rng;
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use tch::{Device, Kind, Tensor};

use super::{
    Sampling,
    candidates::{CANDIDATES, Candidate, Known, best_of, draw, draw_by_mass, sort},
    penalties::Penalties,
};
use crate::{
    Result,
    kernels::{Kernels, tasks},
};

/// Of a row's gathered logits so many are sorted, and then so many, before all are looked at.
const SORTED: [usize; 2] = [8 * CANDIDATES, 64 * CANDIDATES];

/// Stands for the largest logit of a shard that has none above -inf.
const NO_LOGIT: f32 = -1e30;

/// What a row's choice depends on besides its logits, and nothing else: not the batch, the slot or
/// the rank.
#[derive(Debug, Clone, Copy)]
pub(super) struct RowKey<'a> {
    pub(super) seed: u64,
    pub(super) id: &'a str,
    /// The number of tokens that the row has generated so far.
    pub(super) position: u64,
    /// These tokens.
    pub(super) generated: &'a [u32],
}

impl RowKey<'_> {
    /// Uniform in `[0, 1)`.
    fn uniform(&self) -> f64 {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.seed.to_le_bytes()).update(self.id.as_bytes());
        let mut random = ChaCha8Rng::from_seed(*hasher.finalize().as_bytes());
        // A block of the stream for each position.
        random.set_word_pos(u128::from(self.position) * 16);
        random.random()
    }
}

/// A vocabulary as this rank sees it.
pub(super) struct Vocabulary<'a> {
    pub(super) comm: &'a dyn Communicator,
    /// The rows of this rank.
    pub(super) rows: Range<i64>,
    /// From each rank's `(B, W)` the whole `(B, V)`; every rank must call it.
    pub(super) gather: &'a dyn Fn(Tensor) -> Result<Tensor>,
}

impl Vocabulary<'_> {
    fn is_split(&self) -> bool {
        self.comm.world_size() > 1
    }
}

/// Chooses tokens; keeps its buffers.
#[derive(Debug)]
pub(super) struct Sampler {
    sampling: Sampling,
    penalties: Penalties,
    kernels: Kernels,
    gathered_rows: u64,
}

/// The candidates of all ranks for one row.
#[derive(Debug, Clone, Default)]
struct Offer {
    max: f32,
    total: f64,
    best: Vec<Candidate>,
    complete: bool,
}

impl Sampler {
    pub(super) fn new(sampling: Sampling, tokenizer: &Tokenizer) -> Self {
        Self {
            penalties: Penalties::new(&sampling, tokenizer),
            sampling,
            kernels: Kernels::detect(),
            gathered_rows: 0,
        }
    }

    /// Rows since the last call whose candidates did not tell the token, so that all their logits were
    /// looked at.
    pub(super) fn take_gathered_rows(&mut self) -> u64 {
        mem::take(&mut self.gathered_rows)
    }

    /// A token for each row; none where its logits are not finite, of which the best would be token 0.
    /// Every rank must call this with the same keys; all get the same.
    ///
    /// # Shapes
    /// logits: `(B, W)` in f32.
    ///
    /// # Errors
    /// A failed exchange between ranks, or no memory.
    pub(super) fn choose(
        &mut self,
        mut logits: Tensor,
        vocabulary: &Vocabulary<'_>,
        keys: &[RowKey<'_>],
    ) -> Result<Vec<Option<u32>>> {
        self.penalties.apply(&mut logits, &vocabulary.rows, keys)?;
        if self.sampling.is_greedy() {
            return best(&logits, vocabulary);
        }
        let offers = self.offers(&logits, vocabulary)?;
        let mut chosen = Vec::with_capacity(keys.len());
        let mut open = Vec::new();
        for (row, (offer, key)) in (0i64..).zip(offers.iter().zip(keys)) {
            if !offer.max.is_finite() {
                chosen.push(None);
                continue;
            }
            let known = Known { best: &offer.best, complete: offer.complete, total: offer.total };
            let token = draw(&known, &self.sampling, key.uniform());
            if token.is_none() {
                open.push(row);
            }
            chosen.push(token);
        }
        if !open.is_empty() {
            let rows = Tensor::from_slice(&open).to_device(logits.device());
            let whole = (vocabulary.gather)(logits.f_index_select(0, &rows)?)?; // (rows, V)
            self.gathered_rows += open.len() as u64;
            let whole = whole.f_to_device(Device::Cpu)?;
            let whole = Rows::of(&whole)?;
            let mut tokens = vec![None; open.len()];
            tasks::run(
                tokens.iter_mut().zip(&open).enumerate().collect(),
                Vec::new,
                |candidates, (index, (token, &row))| {
                    let (total, key) = (offers[row as usize].total, &keys[row as usize]);
                    let logits = whole.row(index);
                    *token =
                        draw_from_all(logits, total, &self.sampling, key.uniform(), candidates);
                },
            )?;
            for (row, token) in open.into_iter().zip(tokens) {
                chosen[row as usize] = token;
            }
        }
        Ok(chosen)
    }

    /// Each row's candidates, from all ranks.
    fn offers(&mut self, logits: &Tensor, vocabulary: &Vocabulary<'_>) -> Result<Vec<Offer>> {
        let logits = logits.f_to_device(Device::Cpu)?;
        let logits = Rows::of(&logits)?;
        let first = vocabulary.rows.start as u32;
        let mut offers = vec![Offer::default(); logits.len()];
        let (kernels, temperature) = (self.kernels, self.sampling.temperature);
        tasks::run(
            offers.iter_mut().enumerate().collect(),
            Vec::new,
            |candidates, (row, offer)| {
                let row = logits.row(row);
                let (max, total) = kernels.weigh(row, temperature, NO_LOGIT);
                best_of(row, first, CANDIDATES, candidates);
                *offer = Offer {
                    max: if total.is_nan() { f32::NAN } else { max },
                    total,
                    complete: candidates.len() == row.len(),
                    best: candidates.clone(),
                };
            },
        )?;
        if vocabulary.is_split() { self.exchange(&offers, vocabulary) } else { Ok(offers) }
    }

    /// Joins the candidates of all ranks.
    fn exchange(&self, own: &[Offer], vocabulary: &Vocabulary<'_>) -> Result<Vec<Offer>> {
        // Of each row: max, sum, number of candidates, whether these are all, then logits and ids,
        // which an f64 holds as they are.
        const WIDTH: usize = 4 + 2 * CANDIDATES;
        let mut message = vec![0f64; own.len() * WIDTH];
        for (row, offer) in message.chunks_exact_mut(WIDTH).zip(own) {
            let complete = f64::from(u8::from(offer.complete));
            row[..4].copy_from_slice(&[
                f64::from(offer.max),
                offer.total,
                offer.best.len() as f64,
                complete,
            ]);
            for (index, &(logit, id)) in offer.best.iter().enumerate() {
                row[4 + index] = f64::from(logit);
                row[4 + CANDIDATES + index] = f64::from(id);
            }
        }
        let all = Vec::<f64>::try_from(vocabulary.comm.all_gather(&Tensor::from_slice(&message))?)?;
        let of_row = |row: usize| all.chunks_exact(WIDTH).skip(row).step_by(own.len());
        Ok((0..own.len()).map(|row| self.joined(of_row(row))).collect())
    }

    /// The candidates of a row, from what each rank sent of it.
    fn joined<'m>(&self, ranks: impl Iterator<Item = &'m [f64]> + Clone) -> Offer {
        // A NaN is never the larger one: it is looked for by itself.
        let max = ranks.clone().map(|rank| rank[0]).fold(f64::NEG_INFINITY, |max, of_rank| {
            if max.is_nan() || of_rank.is_nan() { f64::NAN } else { max.max(of_rank) }
        });
        let (mut total, mut complete) = (0.0, true);
        let mut best = Vec::new();
        // Below a rank's last candidate that rank may have tokens that nobody has told of.
        let mut floor = f64::NEG_INFINITY;
        for rank in ranks {
            let of_rank = rank[0].max(f64::from(NO_LOGIT));
            total += rank[1] * ((of_rank - max) / self.sampling.temperature).exp();
            let count = rank[2] as usize;
            let logits = &rank[4..4 + count];
            let ids = &rank[4 + CANDIDATES..][..count];
            best.extend(logits.iter().zip(ids).map(|(&logit, &id)| (logit as f32, id as u32)));
            if rank[3] == 0.0 {
                complete = false;
                floor = floor.max(logits.last().copied().unwrap_or(f64::INFINITY));
            }
        }
        best.retain(|&(logit, _)| complete || f64::from(logit) > floor);
        sort(&mut best);
        Offer { max: max as f32, total, best, complete }
    }
}

/// Sorts more of a row's logits where that is likely to tell the token, and takes all of them, without
/// sorting them, where it does not; `None` where not even all tell it, because some are not finite.
fn draw_from_all(
    logits: &[f32],
    total: f64,
    sampling: &Sampling,
    uniform: f64,
    candidates: &mut Vec<Candidate>,
) -> Option<u32> {
    for count in SORTED.into_iter().filter(|&count| count < logits.len()) {
        best_of(logits, 0, count, candidates);
        let known = Known { best: candidates, complete: false, total };
        let token = draw(&known, sampling, uniform);
        if token.is_some() {
            return token;
        }
    }
    candidates.clear();
    candidates.extend(logits.iter().copied().zip(0..));
    draw_by_mass(candidates, total, sampling, uniform)
}

/// The best token of each row, from each rank's best of its own rows of the vocabulary; none where
/// logits are not finite.
fn best(logits: &Tensor, vocabulary: &Vocabulary<'_>) -> Result<Vec<Option<u32>>> {
    let (rows, _) = logits.size2()?;
    let (mut max, mut index) = logits.max_dim(-1, true); // (B, 1)
    if vocabulary.is_split() {
        let own = index + vocabulary.rows.start;
        // In f64, which holds an f32 and a token id alike.
        let own = Tensor::f_cat(&[max.to_kind(Kind::Double), own.to_kind(Kind::Double)], 1)?;
        let all = vocabulary.comm.all_gather(&own)?.view([-1, rows, 2]); // (tp, B, 2)
        let (largest, rank) = all.select(2, 0).max_dim(0, false); // (B)
        max = largest.to_kind(Kind::Float);
        index = all.select(2, 1).gather(0, &rank.unsqueeze(0), false).to_kind(Kind::Int64); // (1, B)
    }
    let max = Vec::<f32>::try_from(max.view(-1))?;
    let index = Vec::<i64>::try_from(index.view(-1))?;
    let token = |(max, id): (f32, i64)| max.is_finite().then_some(id as u32);
    Ok(max.into_iter().zip(index).map(token).collect())
}

#[cfg(test)]
mod tests;
