//! RMSNorm as LLaMA casts it.

// Shapes: T = tokens, C = hidden_size.

use tch::{Kind, Tensor};

use crate::kernels::Kernels;

/// `y = weight * (x / sqrt(mean(x^2) + eps))`, the statistics in f32.
///
/// The normalised value is rounded to the kind of the weight before it is multiplied with it, as LLaMA
/// and HF do; libtorch's `rms_norm` rounds after it, which is another number in bf16.
#[derive(Debug)]
pub struct RmsNorm {
    /// The weight, `(C)`.
    pub weight: Tensor,
    /// Added to the mean square.
    pub eps: f64,
    /// What computes it where no gradient is asked for; libtorch's operations otherwise.
    pub(crate) kernels: Option<Kernels>,
}

impl RmsNorm {
    /// Normalises each token of `x`.
    ///
    /// # Shapes
    /// x: `(T, C)`, result: `(T, C)` in the kind of the weight.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        let kernels = self.kernels.filter(|_| !x.requires_grad() && !self.weight.requires_grad());
        // What the kernel does not take, as another kind or device, is left to libtorch.
        let fused = kernels.and_then(|kernels| kernels.norm(x, &self.weight, self.eps).ok());
        fused.unwrap_or_else(|| self.portable(x))
    }

    fn portable(&self, x: &Tensor) -> Tensor {
        let x = x.to_kind(Kind::Float);
        let mean_square = x.square().mean_dim(-1, true, Kind::Float); // (T, 1)
        (x * (mean_square + self.eps).rsqrt()).to_kind(self.weight.kind()) * &self.weight // (T, C)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    #[test]
    fn normalises_to_unit_mean_square_times_weight() {
        let x = Tensor::from_slice(&[3.0f32, -4.0, 6.0, 8.0]).reshape([2, 2]);
        let norm = RmsNorm { weight: Tensor::from_slice(&[1.0f32, 2.0]), eps: 0.0, kernels: None };
        let got = Vec::<f32>::try_from(norm.forward(&x).reshape(-1)).unwrap();
        let root = 12.5f32.sqrt();
        let want = [3.0 / root, -8.0 / root, 6.0 / (2.0 * root), 16.0 / (2.0 * root)];
        for (got, want) in got.iter().zip(want) {
            assert!((got - want).abs() < 1e-6, "{got} is not {want}");
        }
    }

    #[test]
    fn bf16_rounds_before_the_weight() {
        let x = Tensor::randn([7, 64], (Kind::Float, Device::Cpu)).to_kind(Kind::BFloat16);
        let weight = Tensor::randn([64], (Kind::Float, Device::Cpu)).to_kind(Kind::BFloat16);
        let wide = x.to_kind(Kind::Float);
        let scale = (wide.square().mean_dim(-1, true, Kind::Float) + 1e-5).rsqrt();
        let want = (wide * scale).to_kind(Kind::BFloat16) * &weight;
        assert_eq!(RmsNorm { weight, eps: 1e-5, kernels: None }.forward(&x), want);
    }
}
