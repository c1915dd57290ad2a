//! Products and gradients at every level that this CPU has, against libtorch's autograd.

use dromedary_torch_ext::{F32Buffer, Rows};
use tch::{Device, Kind, Tensor};

use super::*;
use crate::{attention::causal_attention, heads::HeadRun};

const F: (Kind, Device) = (Kind::Float, Device::Cpu);

fn off(got: &Tensor, want: &Tensor) -> f64 {
    assert_eq!(got.size(), want.size());
    let largest = |t: &Tensor| f64::try_from(t.abs().max()).unwrap();
    largest(&(got - want)) / largest(want).max(1e-30)
}

fn values(tensor: &Tensor) -> &[f32] {
    Rows::of(tensor).unwrap().values()
}

/// A buffer that starts with these values.
fn buffer(tensor: &Tensor) -> F32Buffer {
    let mut buffer = F32Buffer::zeros(&tensor.size()).unwrap();
    buffer.values_mut().copy_from_slice(values(tensor));
    buffer
}

fn gradients(of: &Tensor, grad: &Tensor, inputs: &[&Tensor]) -> Vec<Tensor> {
    let gradients = dromedary_torch_ext::run_backward(&[of], &[grad], inputs, false).unwrap();
    gradients.into_iter().map(Option::unwrap).collect()
}

#[test]
fn products_of_matrices_and_their_transposes_equal_matmul() {
    tch::manual_seed(1);
    let mut panels = Panels::default();
    for kernels in Kernels::all() {
        for [m, k, n] in
            [[1, 1, 1], [7, 5, 3], [13, 300, 70], [250, 33, 129], [6, 16, 64], [600, 400, 97]]
        {
            for (turn_a, turn_b) in [(false, false), (false, true), (true, false), (true, true)] {
                let (a, b) = (Tensor::randn([m, k], F), Tensor::randn([k, n], F));
                let stored = |of: &Tensor, turned| if turned { of.tr() } else { of.copy() };
                let (a_stored, b_stored) = (stored(&a, turn_a), stored(&b, turn_b));
                let (a_stored, b_stored) = (a_stored.contiguous(), b_stored.contiguous());
                let matrix = |of: &'static str, turned| {
                    let of = if of == "a" { &a_stored } else { &b_stored };
                    let rows = Rows::of(of).unwrap();
                    let matrix =
                        Matrix::new(rows.values(), [rows.len(), rows.width()], rows.width());
                    if turned { matrix.t() } else { matrix }
                };
                let before = Tensor::randn([m, n + 5], F);
                for accumulate in [false, true] {
                    let mut out = buffer(&before);
                    let target = Target {
                        values: out.values_mut(),
                        row: n as usize + 5,
                        columns: 2..n as usize + 2,
                        accumulate,
                    };
                    let factors = (matrix("a", turn_a), matrix("b", turn_b), 0.5);
                    kernels.multiply(factors, target, &mut panels).unwrap();
                    let out = out.into_tensor();
                    let there = before.narrow(1, 2, n) * f64::from(u8::from(accumulate));
                    let want = there + a.matmul(&b) * 0.5;
                    assert!(off(&out.narrow(1, 2, n), &want) < 1e-5, "{kernels:?} {m} {k} {n}");
                    for (start, length) in [(0, 2), (n + 2, 3)] {
                        let [got, want] =
                            [&out, &before].map(|t| t.narrow(1, start, length).contiguous());
                        assert_eq!(got, want);
                    }
                }
            }
        }
    }
}

#[test]
fn products_larger_than_what_is_packed_at_a_time() {
    tch::manual_seed(2);
    let (a, b) = (Tensor::randn([5, 9000], F), Tensor::randn([9000, 1200], F));
    let mut out = F32Buffer::zeros(&[5, 1200]).unwrap();
    let target =
        Target { values: out.values_mut(), row: 1200, columns: 0..1200, accumulate: false };
    let factors = (
        Matrix::new(values(&a), [5, 9000], 9000),
        Matrix::new(values(&b), [9000, 1200], 1200),
        1.0,
    );
    Kernels::detect().multiply(factors, target, &mut Panels::default()).unwrap();
    assert!(off(&out.into_tensor(), &a.matmul(&b)) < 1e-5);
}

#[test]
fn norm_backward_is_that_of_autograd() {
    tch::manual_seed(3);
    for kernels in Kernels::all() {
        for width in [5, 16, 48, 577] {
            let x = Tensor::randn([70, width], F).set_requires_grad(true);
            let (weight, grad) = (Tensor::randn([width], F), Tensor::randn([70, width], F));
            let mean_square = x.square().mean_dim(-1, true, Kind::Float);
            let y = &x * (mean_square + 1e-5).rsqrt() * &weight;
            let want = gradients(&y, &grad, &[&x]);
            let mut got = buffer(&grad);
            let norm = (values(&weight), 1e-5);
            kernels.norm_backward(values(&x), norm, got.values_mut()).unwrap();
            assert!(off(&got.into_tensor(), &want[0]) < 1e-5, "{kernels:?} {width}");
        }
    }
}

#[test]
fn silu_mul_backward_is_that_of_autograd() {
    tch::manual_seed(4);
    for kernels in Kernels::all() {
        for width in [3, 16, 88, 1536] {
            let gate_up = (Tensor::randn([40, 2 * width], F) * 4.0).set_requires_grad(true);
            let grad = Tensor::randn([40, width], F);
            let halves = gate_up.chunk(2, -1);
            let want = gradients(&(halves[0].silu() * &halves[1]), &grad, &[&gate_up]);
            let mut got = buffer(&gate_up.detach());
            kernels.silu_mul_backward(values(&grad), width as usize, got.values_mut()).unwrap();
            assert!(off(&got.into_tensor(), &want[0]) < 1e-5, "{kernels:?} {width}");
        }
    }
}

#[test]
fn a_rotation_turned_back_is_none() {
    let heads = heads(&[2, 2], 6);
    let qkv = Tensor::randn([9, 8 * 6], F);
    let angle = Tensor::randn([9, 3], F);
    let (cos, sin) = (angle.cos(), angle.sin());
    let turns = (values(&cos), values(&sin));
    for kernels in Kernels::all() {
        let mut got = buffer(&qkv);
        kernels.rotate_rows(&heads, turns, got.values_mut(), false).unwrap();
        assert!(got.values() != values(&qkv));
        kernels.rotate_rows(&heads, turns, got.values_mut(), true).unwrap();
        assert!(off(&got.into_tensor(), &qkv) < 1e-6);
    }
}

/// Heads of one rank, the query heads of each K/V head given.
fn heads(groups: &[i64], head_dim: i64) -> Heads {
    let mut next = 0;
    let runs = groups.iter().enumerate().map(|(kv, &size)| {
        let q = next..next + size;
        next = q.end;
        HeadRun { kv: kv as i64..kv as i64 + 1, q }
    });
    Heads { head_dim, runs: runs.collect() }
}

#[test]
fn causal_attention_and_its_gradients_are_those_of_autograd() {
    tch::manual_seed(5);
    let cases: [(&[i64], i64, &[i64]); 4] = [
        (&[3, 3], 64, &[130, 1, 77]),
        (&[1, 3, 2], 6, &[5, 40]),
        (&[1], 16, &[1]),
        (&[2], 80, &[200, 16]),
    ];
    for kernels in Kernels::all() {
        for (groups, head_dim, lengths) in cases {
            let heads = heads(groups, head_dim);
            let (h, kv) = (heads.n_local_heads(), heads.n_local_kv_heads());
            let tokens: i64 = lengths.iter().sum();
            let qkv = Tensor::randn([tokens, h + 2 * kv, head_dim], F).set_requires_grad(true);
            let grad = Tensor::randn([tokens, h, head_dim], F);
            let part = |start, length| qkv.narrow(1, start, length);
            let want =
                causal_attention(&heads, &part(0, h), &part(h, kv), &part(h + kv, kv), lengths)
                    .unwrap();
            let want_grad = &gradients(&want, &grad, &[&qkv])[0];

            let of = QkvRows { heads: &heads, values: values(&qkv), lengths };
            let mut out = F32Buffer::zeros(&[tokens, h, head_dim]).unwrap();
            let mut sums = F32Buffer::zeros(&[tokens, h]).unwrap();
            kernels.attend(of, out.values_mut(), sums.values_mut()).unwrap();
            let mut grad_qkv = F32Buffer::zeros(&qkv.size()).unwrap();
            let forward = (out.values(), sums.values());
            kernels.attend_backward(of, forward, values(&grad), grad_qkv.values_mut()).unwrap();
            assert!(off(&out.into_tensor(), &want) < 1e-5, "{kernels:?} {groups:?}");
            assert!(off(&grad_qkv.into_tensor(), want_grad) < 1e-5, "{kernels:?} {groups:?}");
        }
    }
}
