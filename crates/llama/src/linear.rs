//! The linear layer of the model: one product for several fused projections, an adapter per part.

// Shapes: T = tokens, I = in features, O = out features of all parts (both of this rank), r = LoRA rank.

use std::ops::Range;

use tch::Tensor;

pub use crate::kernels::PackedWeight;
use crate::{
    LoraDropout, QuantisedWeight, Result, kernels::Kernels, model::ReplaceWeight,
    quantised::Nf4Slice,
};

/// How the frozen weight of a [`Linear`] is stored.
#[derive(Debug)]
pub enum Weight {
    /// `(O, I)` as libtorch multiplies it. Where its kind is not that of the input, it is converted
    /// for the moment of use: 16-bit weights on a CPU that multiplies in f32.
    Dense(Tensor),
    /// `(O, I)` in the layout of the CPU's own kernels; f32 only.
    Packed(PackedWeight),
    /// `(O, I)` in NF4 on the CPU, dequantised for the moment of use. It stays as it is: it cannot be
    /// trained.
    Nf4(QuantisedWeight),
}

impl Weight {
    /// `(O, I)`.
    pub fn size(&self) -> (i64, i64) {
        match self {
            Self::Dense(weight) => (weight.size()[0], weight.size()[1]),
            Self::Packed(weight) => weight.size(),
            Self::Nf4(weight) => weight.size(),
        }
    }

    /// The weight as libtorch multiplies it: a view, or newly allocated where it is kept in another
    /// form.
    pub(crate) fn dense(&self) -> Result<Tensor> {
        match self {
            Self::Dense(weight) => Ok(weight.shallow_clone()),
            Self::Packed(weight) => weight.unpack(),
            Self::Nf4(weight) => weight.dequantise(),
        }
    }

    /// `x W^T`.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Packed(weight) => weight.forward(x),
            Self::Nf4(weight) => weight.forward(x),
            Self::Dense(weight) => Ok(x.f_matmul(&weight.f_to_kind(x.kind())?.tr())?),
        }
    }
}

/// A low-rank addition to a weight: `scaling * b a`.
#[derive(Debug)]
pub struct Lora {
    /// `(r, I)`; this rank's columns of a row-parallel layer.
    pub a: Tensor,
    /// `(O of the part, r)`; this rank's rows of a column-parallel layer.
    pub b: Tensor,
    /// `lora_alpha / r`, or `lora_alpha / sqrt(r)` with rsLoRA.
    pub scaling: f64,
    /// Dropout on the input, in training.
    pub dropout: Option<LoraDropout>,
}

impl Lora {
    /// `scaling * (dropout(x) a^T) b^T`, computed in the kind of the adapter.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut dropped = x.to_kind(self.a.kind()); // (T, I)
        if let Some(factors) =
            self.dropout.as_ref().and_then(|dropout| dropout.factors(&dropped).transpose())
        {
            dropped = dropped.f_mul(&factors?)?;
        }
        let low = dropped.f_matmul(&self.a.tr())?; // (T, r)
        // The scaling goes to the small factor.
        Ok((low * self.scaling).f_matmul(&self.b.tr())?.to_kind(x.kind())) // (T, O of the part)
    }
}

/// One projection inside a fused [`Linear`].
#[derive(Debug)]
pub struct Part {
    /// The projection's name in a checkpoint, as in `q_proj`.
    pub name: &'static str,
    /// Its rows of the fused weight.
    pub rows: Range<i64>,
    /// Its adapter.
    pub lora: Option<Lora>,
}

/// Which part of the whole product a rank's [`Linear`] computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parallel {
    /// The rank owns rows of the weight, its result is a slice of the whole result.
    Column,
    /// The rank owns columns of the weight, its result is a partial sum that awaits an all-reduce.
    Row,
}

/// `y = x W^T`, plus the adapter of each part. No collective is called here.
#[derive(Debug)]
pub struct Linear {
    /// The frozen weight of all parts, `(O, I)`.
    pub weight: Weight,
    /// The fused projections, in the order of their rows; they cover all rows.
    pub parts: Vec<Part>,
    /// How the layer is split over ranks.
    pub parallel: Parallel,
}

impl Linear {
    /// A layer of the named projections, whose weights `(O of the part, I)` are fused in this order.
    ///
    /// # Errors
    /// The weights differ in kind, device or columns.
    pub fn fuse(parts: Vec<(&'static str, Tensor)>, parallel: Parallel) -> Result<Self> {
        let mut rows = Vec::with_capacity(parts.len());
        let mut weights = Vec::with_capacity(parts.len());
        for (name, weight) in parts {
            rows.push((name, weight.size2()?.0));
            weights.push(weight);
        }
        let weight = match <[Tensor; 1]>::try_from(weights) {
            Ok([weight]) => weight,
            Err(weights) => Tensor::f_cat(&weights, 0)?,
        };
        Ok(Self { weight: Weight::Dense(weight), parts: named(rows), parallel })
    }

    /// A layer of the named projections, kept in NF4.
    pub(crate) fn fuse_quantised(
        parts: Vec<(&'static str, Nf4Slice)>,
        parallel: Parallel,
        kernels: Option<Kernels>,
    ) -> Self {
        let rows = parts.iter().map(|(name, slice)| (*name, slice.rows as i64)).collect();
        let slices = parts.into_iter().map(|(_, slice)| slice).collect();
        let weight = Weight::Nf4(QuantisedWeight::new(slices, kernels));
        Self { weight, parts: named(rows), parallel }
    }

    /// The named projection.
    pub(crate) fn part(&self, name: &str) -> Option<&Part> {
        self.parts.iter().find(|part| part.name == name)
    }

    /// The weight of the named projection alone, `(O of the part, I)`; nothing if it is not here.
    pub(crate) fn part_weight(&self, name: &str) -> Result<Option<Tensor>> {
        let Some(part) = self.part(name) else { return Ok(None) };
        let all = self.weight.dense()?;
        Ok(Some(all.f_narrow(0, part.rows.start, part.rows.end - part.rows.start)?))
    }

    /// Stores the weight as [`Weight::Packed`] from now on; one in NF4 stays so.
    ///
    /// # Errors
    /// The weight is not f32 on the CPU, no memory.
    pub fn pack(self) -> Result<Self> {
        let weight = match self.weight {
            Weight::Dense(weight) => {
                Weight::Packed(PackedWeight::pack(Kernels::detect(), &weight)?)
            }
            other => other,
        };
        Ok(Self { weight, ..self })
    }

    /// See [`crate::Llama::replace_weights`]; the parts' names begin with `module`.
    pub(crate) fn replace_weight(
        &mut self,
        module: &str,
        replace: ReplaceWeight<'_>,
    ) -> Result<()> {
        let parts: Vec<_> = self
            .parts
            .iter()
            .map(|part| (format!("{module}{}.weight", part.name), part.rows.end - part.rows.start))
            .collect();
        self.weight = Weight::Dense(replace(&parts, &self.weight.dense()?)?);
        Ok(())
    }

    /// This rank's result: a slice of the features ([`Parallel::Column`]) or a partial sum of all
    /// ([`Parallel::Row`]), base and adapters alike.
    ///
    /// # Shapes
    /// x: `(T, I)`, result: `(T, O)`.
    ///
    /// # Errors
    /// libtorch refused an operation, as when memory ends.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let base = self.weight.forward(x)?; // (T, O)
        if self.parts.iter().all(|part| part.lora.is_none()) {
            return Ok(base);
        }
        let mut results = Vec::with_capacity(self.parts.len());
        for part in &self.parts {
            let base = base.narrow(1, part.rows.start, part.rows.end - part.rows.start);
            results.push(match &part.lora {
                Some(lora) => base + lora.forward(x)?,
                None => base,
            });
        }
        Ok(match <[Tensor; 1]>::try_from(results) {
            Ok([result]) => result,
            Err(results) => Tensor::f_cat(&results, 1)?, // (T, O)
        })
    }
}

/// Parts of so many rows, one below the other.
fn named(parts: Vec<(&'static str, i64)>) -> Vec<Part> {
    let mut next = 0;
    let part = |(name, count): (&'static str, i64)| {
        let rows = next..next + count;
        next = rows.end;
        Part { name, rows, lora: None }
    };
    parts.into_iter().map(part).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    const F: (Kind, Device) = (Kind::Float, Device::Cpu);

    fn near(got: &Tensor, want: &Tensor) {
        let difference = f64::try_from((got - want).abs().max()).unwrap();
        assert!(difference < 1e-4, "differs by {difference}");
    }

    fn lora(out: i64, scaling: f64) -> Lora {
        Lora { a: Tensor::randn([4, 16], F), b: Tensor::randn([out, 4], F), scaling, dropout: None }
    }

    #[test]
    fn fused_parts_equal_single_projections_with_their_adapters() {
        tch::manual_seed(3);
        let (q, k) = (Tensor::randn([8, 16], F), Tensor::randn([5, 16], F));
        let x = Tensor::randn([7, 16], F);
        let mut linear = Linear::fuse(
            vec![("q_proj", q.shallow_clone()), ("k_proj", k.shallow_clone())],
            Parallel::Column,
        )
        .unwrap();
        assert_eq!(linear.parts[1].rows, 8..13);
        let adapter = lora(5, 0.25);
        let k_whole = &k + adapter.b.matmul(&adapter.a) * adapter.scaling;
        linear.parts[1].lora = Some(adapter);
        let want = Tensor::cat(&[x.matmul(&q.tr()), x.matmul(&k_whole.tr())], 1);
        near(&linear.forward(&x).unwrap(), &want);
        near(&linear.pack().unwrap().forward(&x).unwrap(), &want);
    }

    #[test]
    fn row_parallel_partials_sum_to_the_whole() {
        tch::manual_seed(4);
        let whole = Tensor::randn([6, 16], F);
        let adapter = lora(6, 0.5);
        let x = Tensor::randn([3, 16], F);
        let mut sum = Tensor::zeros([3, 6], F);
        for (start, length) in [(0, 5), (5, 11)] {
            let columns = whole.narrow(1, start, length);
            let mut linear = Linear::fuse(vec![("o_proj", columns)], Parallel::Row).unwrap();
            linear.parts[0].lora = Some(Lora {
                a: adapter.a.narrow(1, start, length),
                b: adapter.b.shallow_clone(),
                scaling: adapter.scaling,
                dropout: None,
            });
            sum += linear.forward(&x.narrow(1, start, length)).unwrap();
        }
        let weight = &whole + adapter.b.matmul(&adapter.a) * adapter.scaling;
        near(&sum, &x.matmul(&weight.tr()));
    }
}
