use dromedary_torch_ext::run_backward;
use tch::{Kind, Tensor};

use crate::{FLOAT, message};

#[test]
fn given_gradients_equal_those_of_the_weighted_sum() {
    let x = Tensor::randn([5, 8], FLOAT);
    let w = Tensor::randn([3, 8], FLOAT).set_requires_grad(true);
    let unused = Tensor::randn([3], FLOAT).set_requires_grad(true);
    let seed = Tensor::randn([5, 3], FLOAT);
    let forward = || x.matmul(&w.tr()).tanh();
    let root = (forward() * &seed).sum(Kind::Float);
    let want = Tensor::run_backward(&[root], &[&w], false, false);
    let got = run_backward(&[forward()], &[&seed], &[&w, &unused], false).unwrap();
    assert_eq!(got[0].as_ref(), Some(&want[0]));
    assert!(got[1].is_none());
    assert!(!w.grad().defined(), "nothing is accumulated");
}

#[test]
fn several_outputs_add_up() {
    let x = Tensor::randn([4], FLOAT).set_requires_grad(true);
    let seed = Tensor::ones([4], FLOAT);
    let outputs = [&x * 2.0, &x * 3.0];
    let got = run_backward(&outputs, &[&seed, &seed], &[&x], false).unwrap();
    assert_eq!(got[0].as_ref(), Some(&(seed * 5.0)));
}

#[test]
fn a_graph_cut_in_two_gives_the_gradients_of_the_whole() {
    let x = Tensor::randn([4, 6], FLOAT).set_requires_grad(true);
    let w = Tensor::randn([6, 6], FLOAT).set_requires_grad(true);
    let seed = Tensor::randn([4, 6], FLOAT);
    let first = |x: &Tensor| x.matmul(&w).gelu("none");
    let second = |h: &Tensor| h.softmax(-1, Kind::Float);
    let whole = run_backward(&[second(&first(&x))], &[&seed], &[&x, &w], false).unwrap();
    let hidden = first(&x);
    let cut = hidden.detach().set_requires_grad(true);
    let grad_cut = run_backward(&[second(&cut)], &[&seed], &[&cut], false).unwrap();
    let grad_hidden = grad_cut[0].as_ref().unwrap();
    let parts = run_backward(&[&hidden], &[grad_hidden], &[&x, &w], false).unwrap();
    assert_eq!(parts, whole);
}

#[test]
fn a_graph_runs_twice_only_when_kept() {
    let x = Tensor::randn([4], FLOAT).set_requires_grad(true);
    let seed = Tensor::ones([4], FLOAT);
    let y = x.exp();
    assert!(run_backward(&[&y], &[&seed], &[&x], true).is_ok());
    assert!(run_backward(&[&y], &[&seed], &[&x], false).is_ok());
    assert!(message(run_backward(&[&y], &[&seed], &[&x], false)).contains("second time"));
}

#[test]
fn misuse_is_an_error() {
    let x = Tensor::randn([4], FLOAT).set_requires_grad(true);
    let y = x.exp();
    let none: [&Tensor; 0] = [];
    let counts = message(run_backward(&[&y], &none, &[&x], false));
    assert_eq!(counts, "run backward: 1 outputs but 0 gradients for them");
    let shape = message(run_backward(&[&y], &[&Tensor::ones([5], FLOAT)], &[&x], false));
    assert!(shape.contains("[5]") && shape.contains("[4]"), "{shape}");
    let plain = Tensor::ones([4], FLOAT);
    assert!(run_backward(&[&plain], &[&plain], &[&x], false).is_err());
}
