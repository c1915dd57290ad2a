use dromedary_torch_ext::{PackedWeight, packing_supported};
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
fn raw_operations_are_refused_where_a_gradient_would_be_lost() {
    let (weight, packed) = dense_and_packed(9, 8);
    let x = Tensor::randn([3, 8], FLOAT).set_requires_grad(true);
    assert!(message(packed.linear(&x)).contains("no_grad"));
    assert!(message(packed.linear(&(&x * 2.0))).contains("no_grad"));
    assert!(tch::no_grad(|| packed.linear(&x)).is_ok());
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
    let narrow = message(packed.linear(&Tensor::randn([5, 7], FLOAT)));
    assert!(narrow.contains("[5, 7]") && narrow.contains("[9, 8]"), "{narrow}");
    assert!(message(packed.linear(&Tensor::new())).starts_with("packed linear"));
}
