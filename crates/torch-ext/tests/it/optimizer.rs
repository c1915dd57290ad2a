use dromedary_torch_ext::{AdamW, AdamWState, fused_adamw};
use tch::{Device, Kind, Tensor};

use crate::{FLOAT, assert_close, message};

/// Decoupled weight decay as in its paper, in f64.
fn reference(p: &mut Tensor, g: &Tensor, moments: &mut [Tensor; 2], step: i32, c: &AdamW) {
    moments[0] = &moments[0] * c.beta1 + g * (1.0 - c.beta1);
    moments[1] = &moments[1] * c.beta2 + g * g * (1.0 - c.beta2);
    let mean = &moments[0] / (1.0 - c.beta1.powi(step));
    let variance = &moments[1] / (1.0 - c.beta2.powi(step));
    *p = &*p * (1.0 - c.lr * c.weight_decay) - mean / (variance.sqrt() + c.eps) * c.lr;
}

#[test]
fn a_fused_step_is_adamw() {
    let config = AdamW { lr: 3e-2, beta1: 0.8, beta2: 0.95, eps: 1e-6, weight_decay: 0.1 };
    // Not a multiple of any vector width.
    let shape = [1037];
    let mut parameter = Tensor::randn(shape, FLOAT);
    let (mut exp_avg, mut exp_avg_sq) = (Tensor::zeros(shape, FLOAT), Tensor::zeros(shape, FLOAT));
    let double = (Kind::Double, Device::Cpu);
    let mut want = parameter.to_kind(Kind::Double);
    let mut moments = [Tensor::zeros(shape, double), Tensor::zeros(shape, double)];
    for step in 1..=5 {
        let grad = Tensor::randn(shape, FLOAT);
        reference(&mut want, &grad.to_kind(Kind::Double), &mut moments, step, &config);
        let state = AdamWState {
            parameter: &mut parameter,
            grad: &grad,
            exp_avg: &mut exp_avg,
            exp_avg_sq: &mut exp_avg_sq,
        };
        fused_adamw(state, step as u64, &config).unwrap();
    }
    assert_close(&parameter.to_kind(Kind::Double), &want, 1e-6);
    assert_close(&exp_avg.to_kind(Kind::Double), &moments[0], 1e-6);
    assert_close(&exp_avg_sq.to_kind(Kind::Double), &moments[1], 1e-6);
}

#[test]
fn a_parameter_that_requires_a_gradient_is_changed_in_place() {
    let mut parameter = Tensor::ones([3], FLOAT).set_requires_grad(true);
    let grad = Tensor::ones([3], FLOAT);
    let (mut exp_avg, mut exp_avg_sq) = (Tensor::zeros([3], FLOAT), Tensor::zeros([3], FLOAT));
    let state = AdamWState {
        parameter: &mut parameter,
        grad: &grad,
        exp_avg: &mut exp_avg,
        exp_avg_sq: &mut exp_avg_sq,
    };
    fused_adamw(state, 1, &AdamW { lr: 0.5, ..AdamW::default() }).unwrap();
    assert!(parameter.requires_grad() && parameter.is_leaf());
    assert_close(&parameter.detach(), &(Tensor::ones([3], FLOAT) * 0.5), 1e-6);
}

#[test]
fn a_step_that_makes_no_sense_is_refused() {
    let mut parameter = Tensor::ones([3], FLOAT);
    let (mut exp_avg, mut exp_avg_sq) = (Tensor::zeros([3], FLOAT), Tensor::zeros([3], FLOAT));
    let mut step = |grad: Tensor, step| {
        let state = AdamWState {
            parameter: &mut parameter,
            grad: &grad,
            exp_avg: &mut exp_avg,
            exp_avg_sq: &mut exp_avg_sq,
        };
        message(fused_adamw(state, step, &AdamW::default()))
    };
    assert!(step(Tensor::ones([3], FLOAT), 0).contains("counted from 1"));
    assert!(step(Tensor::ones([4], FLOAT), 1).contains("[4]"));
    assert!(step(Tensor::ones([3], (Kind::Double, Device::Cpu)), 1).contains("Double"));
    assert_eq!(parameter, Tensor::ones([3], FLOAT));
}
