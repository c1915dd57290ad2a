//! Dropout before adapters, whose masks are functions of keys: the same in forward and backward, after a
//! resumption, and on any number of ranks.

// Shapes: T = tokens of the micro-batch, I = in features of this rank.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use tch::Tensor;

use crate::Result;

/// Stands for no draw.
const OFF: u64 = u64::MAX;

/// Which masks are drawn: a number for each micro-batch of a run, shared by all adapters of a model.
#[derive(Debug, Clone)]
pub struct DropoutDraw(Arc<AtomicU64>);

impl Default for DropoutDraw {
    /// None: nothing is dropped, as in evaluation.
    fn default() -> Self {
        Self(Arc::new(AtomicU64::new(OFF)))
    }
}

impl DropoutDraw {
    /// From now on masks of this number, or none.
    pub fn set(&self, number: Option<u64>) {
        self.0.store(number.unwrap_or(OFF), Ordering::Relaxed);
    }

    fn get(&self) -> Option<u64> {
        Some(self.0.load(Ordering::Relaxed)).filter(|&number| number != OFF)
    }
}

/// Dropout on the input of one adapter: a value is 0 with probability `p`, else divided by `1 - p`.
#[derive(Debug, Clone)]
pub struct LoraDropout {
    p: f64,
    key: u64,
    first_column: i64,
    draw: DropoutDraw,
}

impl LoraDropout {
    /// Masks for the named module, whose columns on this rank begin with `first_column`; `p` is below 1.
    pub fn new(p: f64, seed: u64, module: &str, first_column: i64, draw: DropoutDraw) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&seed.to_le_bytes());
        hasher.update(module.as_bytes());
        let mut key = [0; 8];
        key.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
        Self { p, key: u64::from_le_bytes(key), first_column, draw }
    }

    /// The mask that is drawn now; none where nothing is dropped.
    pub(crate) fn mask(&self) -> Option<Mask> {
        let draw = self.draw.get()?;
        Some(Mask {
            key: mixed(self.key ^ mixed(draw)),
            first_column: self.first_column as u32,
            threshold: (self.p * 2f64.powi(32)) as u32,
            kept: (1.0 / (1.0 - self.p)) as f32,
        })
    }

    /// What the input is multiplied by, 0 or `1 / (1 - p)`: `(T, I)`.
    pub(crate) fn factors(&self, x: &Tensor) -> Result<Option<Tensor>> {
        let Some(mask) = self.mask() else { return Ok(None) };
        let (tokens, columns) = x.size2()?;
        let mut factors = vec![1.0; (tokens * columns) as usize];
        for (token, row) in factors.chunks_mut(columns.max(1) as usize).enumerate() {
            mask.apply(token, row);
        }
        let factors = Tensor::f_from_slice(&factors)?.f_to_device(x.device())?;
        Ok(Some(factors.f_view([tokens, columns])?.f_to_kind(x.kind())?))
    }
}

/// A drawn mask.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Mask {
    key: u64,
    first_column: u32,
    threshold: u32,
    kept: f32,
}

impl Mask {
    /// Multiplies the row of a token by the mask.
    #[inline(always)]
    pub(crate) fn apply(&self, token: usize, row: &mut [f32]) {
        let of_row = mixed(self.key ^ token as u64);
        let (low, high) = (of_row as u32, (of_row >> 32) as u32);
        for (column, value) in row.iter_mut().enumerate() {
            let column = self.first_column.wrapping_add(column as u32);
            // MurmurHash3's finalizer, in 32 bits so that compilers compute sixteen at a time.
            let mut hash = column.wrapping_mul(0x9e37_79b9) ^ low;
            hash = (hash ^ (hash >> 16)).wrapping_mul(0x85eb_ca6b) ^ high;
            hash = (hash ^ (hash >> 13)).wrapping_mul(0xc2b2_ae35);
            hash ^= hash >> 16;
            *value *= if hash >= self.threshold { self.kept } else { 0.0 };
        }
    }
}

/// The finalizer of `SplitMix64`.
fn mixed(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    fn factors(dropout: &LoraDropout) -> Vec<f32> {
        let x = Tensor::ones([300, 200], (Kind::Float, Device::Cpu));
        Vec::try_from(dropout.factors(&x).unwrap().unwrap().view(-1)).unwrap()
    }

    #[test]
    fn as_many_are_dropped_as_asked_and_the_rest_makes_up_for_them() {
        let draw = DropoutDraw::default();
        for p in [0.05, 0.5, 0.9] {
            let dropout = LoraDropout::new(p, 1, "q_proj", 0, draw.clone());
            draw.set(Some(3));
            let got = factors(&dropout);
            let dropped = got.iter().filter(|&&factor| factor == 0.0).count() as f64;
            assert!((dropped / got.len() as f64 - p).abs() < 0.01, "{p} {dropped}");
            let kept = (1.0 / (1.0 - p)) as f32;
            assert!(got.iter().all(|&factor| factor == 0.0 || factor == kept));
            // Neither rows nor columns are alike.
            let row = |row: usize| &got[row * 200..][..200];
            assert!((1..300).all(|other| row(other) != row(0)));
            let column = |column: usize| (0..300).map(move |row| row * 200 + column);
            assert!(
                (1..200).all(|other| column(other).zip(column(0)).any(|(a, b)| got[a] != got[b]))
            );
        }
    }

    #[test]
    fn masks_are_functions_of_seed_module_draw_and_place() {
        let draw = DropoutDraw::default();
        let dropout =
            |seed, module, first| LoraDropout::new(0.5, seed, module, first, draw.clone());
        let x = Tensor::ones([2, 2], (Kind::Float, Device::Cpu));
        assert!(dropout(1, "q_proj", 0).factors(&x).unwrap().is_none());
        draw.set(Some(7));
        let first = factors(&dropout(1, "q_proj", 0));
        assert_eq!(first, factors(&dropout(1, "q_proj", 0)));
        assert_ne!(first, factors(&dropout(2, "q_proj", 0)));
        assert_ne!(first, factors(&dropout(1, "k_proj", 0)));
        // The columns of a rank are those of the whole.
        let slice = factors(&dropout(1, "q_proj", 50));
        let rows = first.chunks(200).zip(slice.chunks(200));
        assert!(rows.into_iter().all(|(whole, slice)| whole[50..] == slice[..150]));
        draw.set(Some(8));
        assert_ne!(first, factors(&dropout(1, "q_proj", 0)));
    }
}
