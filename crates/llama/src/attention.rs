//! Attention: causal over whole sequences, and split over several stores of keys and values.

// Shapes: T = tokens, H = query heads, KV = K/V heads, G = query heads per K/V head, D = head_dim,
// N = independent products (K/V heads, or rows x K/V heads), M = queries of one product, S = keys.

use tch::{Kind, Tensor};

use crate::{Result, heads::Heads};

/// Stands for the largest score of a query that sees no key: finite, so that no `inf - inf` arises,
/// and below every score that can be.
const NO_KEY: f64 = -1e30;

/// Causal attention within each of several sequences that lie one behind the other, without padding.
///
/// Differentiable.
///
/// # Shapes
/// q: `(T, H, D)`, k and v: `(T, KV, D)`, `lengths` sums to T, result: `(T, H, D)`.
///
/// # Errors
/// libtorch refused an operation, as when memory ends or `lengths` do not sum to T.
pub fn causal_attention(
    heads: &Heads,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    lengths: &[i64],
) -> Result<Tensor> {
    let (q, k, v) = (
        q.f_split_with_sizes(lengths, 0)?,
        k.f_split_with_sizes(lengths, 0)?,
        v.f_split_with_sizes(lengths, 0)?,
    );
    let mut sequences = Vec::with_capacity(lengths.len());
    for ((q, k), v) in q.iter().zip(&k).zip(&v) {
        let mut runs = Vec::with_capacity(heads.runs.len());
        for run in &heads.runs {
            let q = q.narrow(1, run.q.start, run.n_q()).transpose(0, 1).unsqueeze(0); // (1, H, T, D)
            let k = k.narrow(1, run.kv.start, run.n_kv()).transpose(0, 1).unsqueeze(0); // (1, KV, T, D)
            let v = v.narrow(1, run.kv.start, run.n_kv()).transpose(0, 1).unsqueeze(0); // (1, KV, T, D)
            let gqa = run.group() > 1;
            let out = Tensor::f_scaled_dot_product_attention::<Tensor>(
                &q, &k, &v, None, 0.0, true, None, gqa,
            )?;
            runs.push(out.squeeze_dim(0).transpose(0, 1)); // (T, H, D)
        }
        sequences.push(one_or_cat(runs, 1)?);
    }
    one_or_cat(sequences, 0)
}

/// Joins tensors; a single one is not copied.
pub(crate) fn one_or_cat(tensors: Vec<Tensor>, dim: i64) -> Result<Tensor> {
    Ok(match <[Tensor; 1]>::try_from(tensors) {
        Ok([tensor]) => tensor,
        Err(tensors) => Tensor::f_cat(&tensors, dim)?,
    })
}

/// Attention over a part of the keys: enough to join it with the attention over the rest.
///
/// The largest score and the sum stand in place of a logsumexp, because libtorch's flash kernel
/// gives the logsumexp 0 to a query that sees no key, which counts as a key of score 0 when joined.
#[derive(Debug)]
pub(crate) struct Partial {
    max: Tensor, // (N, M, 1)
    sum: Tensor, // (N, M, 1)
    out: Tensor, // (N, M, D), not divided by the sum
}

impl Partial {
    /// Attention of queries, already scaled, to `k` and `v`; `hidden` is true where a query must not
    /// see a key.
    ///
    /// # Shapes
    /// q: `(N, M, D)`, k and v: `(N, S, D)`, hidden: broadcast to `(N, M, S)`.
    pub(crate) fn new(q: &Tensor, k: &Tensor, v: &Tensor, hidden: Option<&Tensor>) -> Result<Self> {
        let scores = q.f_matmul(&k.transpose(-2, -1))?; // (N, M, S)
        Self::from_scores(scores, hidden, |p| Ok(p.to_kind(v.kind()).f_matmul(v)?))
    }

    /// As [`Partial::new`] from the scores; `mix` multiplies the probabilities with the values.
    pub(crate) fn from_scores(
        scores: Tensor,
        hidden: Option<&Tensor>,
        mix: impl FnOnce(&Tensor) -> Result<Tensor>,
    ) -> Result<Self> {
        let mut scores = scores.to_kind(Kind::Float);
        if let Some(hidden) = hidden {
            let _ = scores.f_masked_fill_(hidden, f64::NEG_INFINITY)?;
        }
        let max = scores.amax([-1], true).clamp_min(NO_KEY); // (N, M, 1)
        let _ = scores.f_sub_(&max)?;
        let _ = scores.f_exp_()?;
        let sum = scores.sum_dim_intlist(-1, true, Kind::Float); // (N, M, 1)
        let out = mix(&scores)?.to_kind(Kind::Float); // (N, M, D)
        Ok(Self { max, sum, out })
    }

    /// The same in another arrangement: `f` is applied to each of the three tensors, none of which
    /// it may mix along the last dimension.
    pub(crate) fn map(&self, f: impl Fn(&Tensor) -> Tensor) -> Self {
        Self { max: f(&self.max), sum: f(&self.sum), out: f(&self.out) }
    }

    /// One behind the other along the first dimension.
    pub(crate) fn cat(partials: &[Self], dim: i64) -> Result<Self> {
        let all = |of: fn(&Self) -> &Tensor| {
            Tensor::f_cat(&partials.iter().map(of).collect::<Vec<_>>(), dim)
        };
        Ok(Self { max: all(|p| &p.max)?, sum: all(|p| &p.sum)?, out: all(|p| &p.out)? })
    }

    /// The attention, if these were all keys: `(N, M, D)`.
    pub(crate) fn finish(&self) -> Tensor {
        &self.out / &self.sum
    }

    /// The part of the keys of both.
    pub(crate) fn merge(&self, other: &Self) -> Self {
        let max = self.max.maximum(&other.max);
        let (own, others) = ((&self.max - &max).exp(), (&other.max - &max).exp());
        Self {
            out: &self.out * &own + &other.out * &others,
            sum: &self.sum * own + &other.sum * others,
            max,
        }
    }

    /// The attention over the keys of both: `(N, M, D)`.
    pub(crate) fn join(&self, other: &Self) -> Tensor {
        self.merge(other).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::heads::HeadRun;
    use tch::Device;

    const F: (Kind, Device) = (Kind::Float, Device::Cpu);

    fn difference(got: &Tensor, want: &Tensor) -> f64 {
        f64::try_from((got - want).abs().max()).unwrap()
    }

    /// Scores, mask, softmax, product, in f64.
    fn reference(q: &Tensor, k: &Tensor, v: &Tensor, hidden: &Tensor) -> Tensor {
        let [q, k, v] = [q, k, v].map(|t| t.to_kind(Kind::Double));
        let scores = q.matmul(&k.transpose(-2, -1)).masked_fill(hidden, f64::NEG_INFINITY);
        scores.softmax(-1, Kind::Double).matmul(&v).to_kind(Kind::Float)
    }

    #[test]
    fn split_attention_equals_the_unsplit_one() {
        tch::manual_seed(6);
        for (prefix, suffix, scale) in [(1, 1, 1.0), (37, 5, 1.0), (2816, 1, 1.0), (50, 9, 1e4)] {
            let q = Tensor::randn([2, 7, 16], F) * scale;
            let k = Tensor::randn([2, prefix + suffix, 16], F);
            let v = Tensor::randn([2, prefix + suffix, 16], F);
            let hidden = Tensor::rand([2, 7, prefix + suffix], F).lt(0.3);
            // The first query of all sees no key of the prefix, the second none of the suffix.
            let _ = hidden.narrow(1, 0, 1).narrow(2, 0, prefix).fill_(1);
            let _ = hidden.narrow(1, 1, 1).narrow(2, prefix, suffix).fill_(1);
            let _ = hidden.narrow(1, 0, 1).narrow(2, prefix, suffix).fill_(0);
            let _ = hidden.narrow(1, 1, 1).narrow(2, 0, prefix).fill_(0);
            let _ = hidden.narrow(1, 2, 5).narrow(2, prefix, suffix).fill_(0);
            let part = |start, length| {
                let [k, v] = [&k, &v].map(|t| t.narrow(1, start, length));
                Partial::new(&q, &k, &v, Some(&hidden.narrow(2, start, length))).unwrap()
            };
            let got = part(0, prefix).join(&part(prefix, suffix));
            let want = reference(&q, &k, &v, &hidden);
            assert!(difference(&got, &want) < 2e-5, "{prefix} {suffix} {scale}");
        }
    }

    #[test]
    fn no_keys_on_one_side_change_nothing() {
        tch::manual_seed(7);
        let [q, k, v] = [(); 3].map(|()| Tensor::randn([1, 4, 8], F));
        let all = Tensor::ones([1, 4, 4], (Kind::Bool, Device::Cpu));
        let none = Partial::new(&q, &k, &v, Some(&all)).unwrap();
        let some = Partial::new(&q, &k, &v, None).unwrap();
        assert_eq!(none.join(&some), some.finish());
        assert_eq!(some.join(&none), some.finish());
    }

    #[test]
    fn causal_attention_is_ragged_and_takes_uneven_groups() {
        tch::manual_seed(8);
        let heads = Heads {
            head_dim: 8,
            runs: vec![HeadRun { kv: 0..1, q: 0..1 }, HeadRun { kv: 1..3, q: 1..7 }],
        };
        let kv_of_q = [0i64, 1, 1, 1, 2, 2, 2];
        let q = Tensor::randn([9, 7, 8], F);
        let [k, v] = [(); 2].map(|()| Tensor::randn([9, 3, 8], F));
        let got = causal_attention(&heads, &q, &k, &v, &[4, 5]).unwrap();
        let index = Tensor::from_slice(&kv_of_q);
        for (start, length) in [(0, 4), (4, 5)] {
            let rows = |t: &Tensor| t.narrow(0, start, length).transpose(0, 1).contiguous();
            let hidden = Tensor::ones([length, length], (Kind::Bool, Device::Cpu)).triu(1);
            let [k, v] = [&k, &v].map(|t| rows(&t.index_select(1, &index)));
            let want = reference(&(rows(&q) / 8f64.sqrt()), &k, &v, &hidden).transpose(0, 1);
            assert!(difference(&got.narrow(0, start, length), &want) < 1e-5);
        }
        assert!(causal_attention(&heads, &q, &k, &v, &[4, 4]).is_err());
    }
}
