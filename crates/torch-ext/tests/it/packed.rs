use dromedary_torch_ext::{PackedWeight, frozen_linear, packing_supported, run_backward};
use tch::{Kind, Tensor};

use crate::{FLOAT, assert_close, message};

/// A few times the rounding of sums of some hundred f32 products.
const TOLERANCE: f64 = 5e-6;

fn dense_and_packed(out: i64, inn: i64) -> (Tensor, PackedWeight) {
    let weight = Tensor::randn([out, inn], FLOAT);
    let packed = PackedWeight::pack(&weight).unwrap();
    (weight, packed)
}

#[test]
fn packing_is_supported_where_libtorch_comes_with_onednn() {
    assert!(packing_supported() || !cfg!(target_arch = "x86_64"));
}

#[test]
fn a_packed_linear_equals_matmul_at_any_number_of_rows() {
    for (out, inn) in [(96, 64), (7, 5), (1, 1), (33, 130)] {
        let (weight, packed) = dense_and_packed(out, inn);
        assert_eq!(packed.size(), (out, inn));
        for rows in [1, 2, 7, 32, 100] {
            let x = Tensor::randn([rows, inn], FLOAT);
            assert_close(&packed.linear(&x).unwrap(), &x.matmul(&weight.tr()), TOLERANCE);
        }
    }
}

#[test]
fn inputs_of_any_layout_are_taken() {
    let (weight, packed) = dense_and_packed(48, 24);
    let inputs = [
        Tensor::randn([24], FLOAT),
        Tensor::randn([3, 5, 24], FLOAT),
        Tensor::randn([2, 3, 5, 24], FLOAT),
        Tensor::randn([24, 6], FLOAT).tr(),
        Tensor::randn([6, 40], FLOAT).narrow(1, 3, 24),
        Tensor::randn([1, 24], FLOAT).expand([9, 24], false),
    ];
    for x in inputs {
        assert_close(&packed.linear(&x).unwrap(), &x.matmul(&weight.tr()), TOLERANCE);
    }
    assert_eq!(packed.linear(&Tensor::zeros([0, 24], FLOAT)).unwrap().size(), [0, 48]);
}

#[test]
fn a_packed_weight_is_a_copy() {
    let (mut weight, packed) = dense_and_packed(40, 30);
    let before = weight.copy();
    let _ = weight.zero_();
    assert_eq!(packed.unpack().unwrap(), before);
    drop(weight);
    let x = Tensor::randn([4, 30], FLOAT);
    assert_close(&packed.linear(&x).unwrap(), &x.matmul(&before.tr()), TOLERANCE);
}

#[test]
fn the_gradient_of_the_input_equals_the_dense_one() {
    let (weight, packed) = dense_and_packed(70, 50);
    for shape in [vec![50], vec![6, 50], vec![2, 3, 50], vec![0, 50]] {
        let x = Tensor::randn(&shape[..], FLOAT).set_requires_grad(true);
        let want_y = x.matmul(&weight.tr());
        let y = frozen_linear(&x, &packed).unwrap();
        assert!(y.requires_grad());
        let grad_y = Tensor::randn_like(&want_y);
        let want = run_backward(&[want_y], &[&grad_y], &[&x], false).unwrap();
        let got = run_backward(&[y], &[&grad_y], &[&x], false).unwrap();
        let (want, got) = (want[0].as_ref().unwrap(), got[0].as_ref().unwrap());
        assert_eq!(got.size(), shape);
        if got.numel() > 0 {
            assert_close(got, want, TOLERANCE);
        }
    }
}

/// Two linears in a row with a low-rank part beside the first, an input used twice, and a root
/// that is not contiguous: what a block with an adapter does.
#[test]
fn gradients_pass_through_a_chain_with_trained_parts() {
    let (w1, p1) = dense_and_packed(60, 20);
    let (w2, p2) = dense_and_packed(20, 60);
    let x = Tensor::randn([2, 7, 20], FLOAT).set_requires_grad(true);
    let a = Tensor::randn([4, 20], FLOAT).set_requires_grad(true);
    let b = Tensor::randn([60, 4], FLOAT).set_requires_grad(true);
    let block = |first: &dyn Fn(&Tensor) -> Tensor, second: &dyn Fn(&Tensor) -> Tensor| {
        let hidden = first(&x) + x.matmul(&a.tr()).matmul(&b.tr());
        (second(&hidden.silu()) + &x).transpose(0, 1)
    };
    let dense = block(&|x| x.matmul(&w1.tr()), &|x| x.matmul(&w2.tr()));
    let packed = block(&|x| frozen_linear(x, &p1).unwrap(), &|x| frozen_linear(x, &p2).unwrap());
    assert_close(&packed, &dense, TOLERANCE);
    let seed = Tensor::randn_like(&dense);
    let want = run_backward(&[dense], &[&seed], &[&x, &a, &b], false).unwrap();
    let got = run_backward(&[packed], &[&seed], &[&x, &a, &b], false).unwrap();
    for (got, want) in got.iter().zip(&want) {
        assert_close(got.as_ref().unwrap(), want.as_ref().unwrap(), TOLERANCE);
    }
}

#[test]
fn backward_accumulates_into_leaves_as_for_any_operation() {
    let (weight, packed) = dense_and_packed(9, 8);
    let x = Tensor::randn([3, 8], FLOAT).set_requires_grad(true);
    for _ in 0..2 {
        frozen_linear(&x, &packed).unwrap().sum(Kind::Float).backward();
    }
    let want = Tensor::ones([3, 9], FLOAT).matmul(&weight) * 2.0;
    assert_close(&x.grad(), &want, TOLERANCE);
}

#[test]
fn no_graph_is_recorded_where_no_gradient_is_asked_for() {
    let (_, packed) = dense_and_packed(9, 8);
    let x = Tensor::randn([3, 8], FLOAT);
    assert!(!frozen_linear(&x, &packed).unwrap().requires_grad());
    let x = x.set_requires_grad(true);
    assert!(!tch::no_grad(|| frozen_linear(&x, &packed)).unwrap().requires_grad());
    assert!(!tch::no_grad(|| packed.linear(&x)).unwrap().requires_grad());
}

#[test]
fn raw_operations_are_refused_where_a_gradient_would_be_lost() {
    let (weight, packed) = dense_and_packed(9, 8);
    let x = Tensor::randn([3, 8], FLOAT).set_requires_grad(true);
    assert!(message(packed.linear(&x)).contains("no_grad"));
    assert!(message(packed.linear(&(&x * 2.0))).contains("no_grad"));
    let weight = weight.set_requires_grad(true);
    assert!(message(PackedWeight::pack(&weight)).contains("no_grad"));
    assert!(tch::no_grad(|| PackedWeight::pack(&weight)).is_ok());
}

#[test]
fn what_cannot_be_packed_or_multiplied_says_why() {
    let (_, packed) = dense_and_packed(9, 8);
    assert!(message(PackedWeight::pack(&Tensor::randn([3], FLOAT))).contains("2-d"));
    assert!(message(PackedWeight::pack(&Tensor::zeros([0, 3], FLOAT))).contains("[0, 3]"));
    assert!(message(PackedWeight::pack(&Tensor::new())).contains("2-d"));
    let half = Tensor::randn([9, 8], FLOAT).to_kind(Kind::BFloat16);
    assert!(message(PackedWeight::pack(&half)).contains("f32"));
    assert!(message(packed.linear(&half)).contains("f32"));
    let narrow = message(frozen_linear(&Tensor::randn([5, 7], FLOAT), &packed));
    assert!(narrow.contains("[5, 7]") && narrow.contains("[9, 8]"), "{narrow}");
    assert!(message(packed.linear(&Tensor::new())).starts_with("packed linear"));
}
