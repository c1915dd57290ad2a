//! Rotary position embedding, with the scalings of HF configurations.

// Shapes: T = tokens, N = heads (query and key heads alike), D = head_dim.

use std::f64::consts::PI;

use tch::{Device, Kind, Tensor};

use crate::{LlamaConfig, Result, RopeScaling};

/// The frequencies of the rotations, for any position.
///
/// Angles are rounded to f32 in the order in which HF rounds them: at position 600 one rounding
/// more shows in the fifth digit of the logits.
#[derive(Debug)]
pub struct Rotary {
    inv_freq: Tensor, // (D/2)
}

/// Cosine and sine for the tokens of one forward pass.
#[derive(Debug)]
pub struct RotaryAt {
    cos: Tensor, // (T, 1, D/2)
    sin: Tensor, // (T, 1, D/2)
}

impl Rotary {
    /// The frequencies that the configuration asks for.
    ///
    /// # Errors
    /// libtorch refused an operation.
    pub fn new(config: &LlamaConfig, device: Device) -> Result<Self> {
        let head_dim = config.head_dim;
        let cpu = (Kind::Int64, Device::Cpu);
        let exponent = Tensor::f_arange_start_step(0, head_dim, 2, cpu)?.to_kind(Kind::Float)
            / head_dim as f64;
        let inv_freq = Tensor::f_pow_scalar(config.rope_theta, &exponent)?.reciprocal(); // (D/2)
        let inv_freq = scale(&inv_freq, &config.rope_scaling);
        Ok(Self { inv_freq: inv_freq.f_to_device(device)? })
    }

    /// Cosine and sine at each position.
    ///
    /// # Errors
    /// libtorch refused an operation.
    pub fn at(&self, positions: &[i64]) -> Result<RotaryAt> {
        let positions =
            Tensor::from_slice(positions).f_to_device(self.inv_freq.device())?.to_kind(Kind::Float);
        let angle = (positions.unsqueeze(-1) * &self.inv_freq).unsqueeze(1); // (T, 1, D/2)
        Ok(RotaryAt { cos: angle.cos(), sin: angle.sin() })
    }
}

impl RotaryAt {
    /// Rotates each head by its token's position; computed in f32.
    ///
    /// HF's order of the features: feature `i` turns with feature `i + D/2`.
    ///
    /// # Shapes
    /// x: `(T, N, D)`, result: `(T, N, D)`.
    pub fn rotate(&self, x: &Tensor) -> Tensor {
        let kind = x.kind();
        let x = x.to_kind(Kind::Float);
        let halves = x.chunk(2, -1); // 2 x (T, N, D/2)
        let (first, second) = (&halves[0], &halves[1]);
        let turned =
            [first * &self.cos - second * &self.sin, second * &self.cos + first * &self.sin];
        Tensor::cat(&turned, -1).to_kind(kind) // (T, N, D)
    }

    /// Cosine and sine, `(T, 1, D/2)` each.
    pub(crate) fn parts(&self) -> [&Tensor; 2] {
        [&self.cos, &self.sin]
    }

    /// The rotations of the tokens `start..start + length` alone.
    pub fn narrow(&self, start: i64, length: i64) -> Self {
        Self { cos: self.cos.narrow(0, start, length), sin: self.sin.narrow(0, start, length) }
    }
}

/// Changes the frequencies for contexts longer than the one of the pre-training.
fn scale(inv_freq: &Tensor, scaling: &RopeScaling) -> Tensor {
    match *scaling {
        RopeScaling::None => inv_freq.shallow_clone(),
        RopeScaling::Linear { factor } => inv_freq / factor,
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => {
            let context = original_max_position_embeddings as f64;
            let wavelength = inv_freq.reciprocal() * (2.0 * PI);
            let slow = wavelength.gt(context / low_freq_factor);
            let fast = wavelength.lt(context / high_freq_factor);
            // Between the two the frequencies pass smoothly from kept to divided.
            let smooth = (wavelength.reciprocal() * context - low_freq_factor)
                / (high_freq_factor - low_freq_factor);
            let divided = inv_freq / factor;
            let mixed = (smooth.ones_like() - &smooth) * &divided + smooth * inv_freq;
            divided.where_self(&slow, &inv_freq.where_self(&fast, &mixed))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frequencies(head_dim: i64, theta: f64) -> Tensor {
        let exponent =
            Tensor::arange_start_step(0, head_dim, 2, (Kind::Float, Device::Cpu)) / head_dim as f64;
        Tensor::pow_scalar(theta, &exponent).reciprocal()
    }

    #[test]
    fn llama3_keeps_fast_and_divides_slow_frequencies() {
        let plain = frequencies(64, 500_000.0);
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192,
        };
        let ratio = Vec::<f32>::try_from(scale(&plain, &scaling) / &plain).unwrap();
        assert_eq!(ratio[0], 1.0);
        assert_eq!(ratio[31], 0.125);
        assert!(ratio.windows(2).all(|pair| pair[1] <= pair[0] + 1e-6), "{ratio:?}");
        assert!(ratio.iter().any(|&r| r > 0.2 && r < 0.9), "{ratio:?}");
        let halved = scale(&plain, &RopeScaling::Linear { factor: 2.0 });
        assert_eq!(halved, &plain / 2.0);
    }

    #[test]
    fn scores_depend_on_distance_alone() {
        let rotary = Rotary { inv_freq: frequencies(8, 10_000.0) };
        tch::manual_seed(5);
        let x = Tensor::randn([1, 1, 8], (Kind::Float, Device::Cpu)).expand([4, 1, 8], false);
        let y = rotary.at(&[3, 7, 10, 14]).unwrap().rotate(&x).squeeze_dim(1);
        let scores = y.matmul(&y.tr());
        let (a, b) = (scores.double_value(&[0, 1]), scores.double_value(&[2, 3]));
        assert!((a - b).abs() < 1e-4 && (a - scores.double_value(&[0, 0])).abs() > 1e-3);
    }
}
