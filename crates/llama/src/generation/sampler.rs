//! Choosing a token from logits.

// Shapes: B = rows, V = vocab_size.

use rand::Rng;
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use tch::{Kind, Tensor};

use crate::{Error, Result};

/// How tokens are chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Logits are divided by it; 0 chooses the best token always.
    pub temperature: f64,
    /// Nucleus: the likeliest tokens are kept while the probability of those before is at most this.
    pub top_p: f64,
}

impl Default for Sampling {
    /// The best token always.
    fn default() -> Self {
        Self { temperature: 0.0, top_p: 1.0 }
    }
}

impl Sampling {
    /// Whether the best token is chosen always.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }

    /// # Errors
    /// A temperature that is negative or not finite, a `top_p` outside of 0 to 1.
    pub(crate) fn validate(&self) -> Result<()> {
        let Self { temperature, top_p } = *self;
        if !temperature.is_finite() || temperature < 0.0 {
            return Err(Error::Setting {
                name: "temperature",
                expected: "at least 0",
                got: temperature,
            });
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            let expected = "above 0 and at most 1";
            return Err(Error::Setting { name: "top_p", expected, got: top_p });
        }
        Ok(())
    }
}

/// What a row's random numbers depend on, and nothing else: not the batch, the slot or the rank.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RowKey<'a> {
    pub(crate) seed: u64,
    pub(crate) id: &'a str,
    /// The number of tokens that the row has generated so far.
    pub(crate) position: u64,
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

/// Chooses tokens; keeps its buffers.
#[derive(Debug)]
pub(crate) struct Sampler {
    sampling: Sampling,
    probabilities: Vec<f32>,
    candidates: Vec<(f32, u32)>,
}

impl Sampler {
    pub(crate) fn new(sampling: Sampling) -> Self {
        Self { sampling, probabilities: Vec::new(), candidates: Vec::new() }
    }

    /// A token for each row.
    ///
    /// # Shapes
    /// logits: `(B, V)` in f32.
    ///
    /// # Errors
    /// Logits that are not finite: the best token of NaN logits would be token 0.
    pub(crate) fn choose(&mut self, logits: &Tensor, keys: &[RowKey<'_>]) -> Result<Vec<u32>> {
        let (max, best) = logits.max_dim(-1, true); // (B, 1)
        check_finite(&max, keys)?;
        if self.sampling.is_greedy() {
            let best = Vec::<i64>::try_from(best.view(-1))?;
            return Ok(best.into_iter().map(|id| id as u32).collect());
        }
        // The largest becomes 0 first, so that a tiny temperature gives -inf and never inf - inf.
        let scaled = (logits - max) / self.sampling.temperature;
        let probabilities = scaled.softmax(-1, Kind::Float); // (B, V)
        let (rows, vocab_size) = probabilities.size2()?;
        self.probabilities.resize((rows * vocab_size) as usize, 0.0);
        probabilities.f_copy_data(&mut self.probabilities, (rows * vocab_size) as usize)?;
        let rows = self.probabilities.chunks_exact(vocab_size as usize);
        let (top_p, candidates) = (self.sampling.top_p, &mut self.candidates);
        Ok(rows
            .zip(keys)
            .map(|(row, key)| nucleus(row, top_p, key.uniform(), candidates))
            .collect())
    }
}

/// # Errors
/// [`Error::NonFiniteLogits`] naming the first row whose largest logit is not finite; a NaN anywhere
/// in a row is its largest.
pub(crate) fn check_finite(max: &Tensor, keys: &[RowKey<'_>]) -> Result<()> {
    let max = Vec::<f32>::try_from(max.view(-1))?;
    match max.iter().zip(keys).find(|(max, _)| !max.is_finite()) {
        Some((_, key)) => {
            Err(Error::NonFiniteLogits { id: key.id.to_owned(), position: key.position })
        }
        None => Ok(()),
    }
}

/// The token at `uniform` of the mass of the kept tokens.
///
/// Dromedary sorts the whole vocabulary. Here only tokens above a floor are sorted, and the floor
/// sinks until they hold more than `top_p`: every token that is kept is then among them.
fn nucleus(row: &[f32], top_p: f64, uniform: f64, candidates: &mut Vec<(f32, u32)>) -> u32 {
    if top_p >= 1.0 {
        return whole(row, uniform);
    }
    let largest = row.iter().copied().fold(0.0f32, f32::max);
    let mut floor = largest / 64.0;
    loop {
        candidates.clear();
        let above = (0u32..).zip(row).filter(|&(_, &p)| p >= floor && p > 0.0);
        candidates.extend(above.map(|(id, &p)| (p, id)));
        let mass: f64 = candidates.iter().map(|&(p, _)| f64::from(p)).sum();
        if mass > top_p || floor == 0.0 {
            break;
        }
        floor = if floor > largest * 1e-6 { floor / 64.0 } else { 0.0 };
    }
    candidates.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    let mut kept_mass = 0.0;
    let mut kept = 0;
    for &(p, _) in candidates.iter() {
        if kept_mass > top_p {
            break;
        }
        kept_mass += f64::from(p);
        kept += 1;
    }
    let kept = candidates[..kept].iter().map(|&(p, id)| (p, id));
    at_mass(kept, uniform * kept_mass)
}

/// Without a nucleus no order is needed but that of the ids.
fn whole(row: &[f32], uniform: f64) -> u32 {
    let mass: f64 = row.iter().map(|&p| f64::from(p)).sum();
    at_mass(row.iter().copied().zip(0..), uniform * mass)
}

/// The token in whose share of the mass `target` lies.
fn at_mass(tokens: impl Iterator<Item = (f32, u32)>, target: f64) -> u32 {
    let mut mass = 0.0;
    let mut last = 0;
    for (p, id) in tokens.filter(|&(p, _)| p > 0.0) {
        last = id;
        mass += f64::from(p);
        if target < mass {
            break;
        }
    }
    last
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tch::Device;

    fn key(position: u64) -> RowKey<'static> {
        RowKey { seed: 7, id: "row", position }
    }

    /// Sort all, cut, draw: as straight as it can be written.
    fn reference(row: &[f32], top_p: f64, uniform: f64) -> u32 {
        let mut sorted: Vec<(f32, u32)> = row.iter().copied().zip(0..).collect();
        if top_p < 1.0 {
            sorted.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        }
        let mut kept = Vec::new();
        let mut before = 0.0f64;
        for (p, id) in sorted {
            if before <= top_p || top_p >= 1.0 {
                kept.push((p, id));
            }
            before += f64::from(p);
        }
        let mass: f64 = kept.iter().map(|&(p, _)| f64::from(p)).sum();
        let mut sum = 0.0;
        for &(p, id) in &kept {
            sum += f64::from(p);
            if uniform * mass < sum {
                return id;
            }
        }
        kept.last().unwrap().1
    }

    proptest! {
        #[test]
        fn nucleus_equals_a_full_sort(
            logits in prop::collection::vec(-12.0f32..12.0, 1..300),
            top_p in 0.01f64..=1.0,
            uniform in 0.0f64..1.0,
        ) {
            let row = Vec::<f32>::try_from(
                Tensor::from_slice(&logits).softmax(-1, Kind::Float)).unwrap();
            let got = nucleus(&row, top_p, uniform, &mut Vec::new());
            prop_assert_eq!(got, reference(&row, top_p, uniform));
        }
    }

    #[test]
    fn frequencies_follow_the_probabilities() {
        let logits = Tensor::from_slice(&[0.0f32, 1.0, 2.0, 3.0]).view([1, 4]);
        let mut sampler = Sampler::new(Sampling { temperature: 0.5, top_p: 1.0 });
        let want = Vec::<f32>::try_from((&logits / 0.5).softmax(-1, Kind::Float).view(-1)).unwrap();
        let draws = 20_000;
        let mut counts = [0usize; 4];
        for position in 0..draws {
            counts[sampler.choose(&logits, &[key(position)]).unwrap()[0] as usize] += 1;
        }
        for (count, want) in counts.iter().zip(want) {
            let share = *count as f32 / draws as f32;
            assert!((share - want).abs() < 0.012, "{counts:?}");
        }
    }

    #[test]
    fn random_numbers_depend_on_seed_row_and_position() {
        let base = key(3).uniform();
        assert_eq!(base, key(3).uniform());
        assert!((0.0..1.0).contains(&base));
        let others = [
            key(4).uniform(),
            RowKey { seed: 8, ..key(3) }.uniform(),
            RowKey { id: "other", ..key(3) }.uniform(),
        ];
        assert!(others.iter().all(|&other| other != base));
    }

    #[test]
    fn extreme_temperatures_and_bad_logits() {
        let logits = Tensor::from_slice(&[-1e4f32, 1e4, 9e3]).view([1, 3]);
        for temperature in [0.0, 1e-30, 1.0] {
            let mut sampler = Sampler::new(Sampling { temperature, top_p: 0.9 });
            assert_eq!(sampler.choose(&logits, &[key(0)]).unwrap(), [1]);
        }
        for bad in [f32::NAN, f32::INFINITY] {
            let logits = Tensor::from_slice(&[0.0f32, bad, 1.0]).view([1, 3]);
            for temperature in [0.0, 1.0] {
                let mut sampler = Sampler::new(Sampling { temperature, top_p: 1.0 });
                let error = sampler.choose(&logits, &[key(5)]).unwrap_err();
                assert!(matches!(error, Error::NonFiniteLogits { position: 5, .. }), "{error}");
            }
        }
        let none = Tensor::full([1, 3], f64::NEG_INFINITY, (Kind::Float, Device::Cpu));
        assert!(Sampler::new(Sampling::default()).choose(&none, &[key(0)]).is_err());
    }

    #[test]
    fn settings_are_checked() {
        let valid = |temperature, top_p| Sampling { temperature, top_p }.validate().is_ok();
        assert!(valid(0.0, 1.0) && valid(2.0, 0.1));
        assert!(!valid(-1.0, 1.0) && !valid(f64::NAN, 1.0) && !valid(1.0, 0.0) && !valid(1.0, 1.1));
    }
}
