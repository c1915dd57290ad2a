use dromedary_llama::{ClosedForm, Llama, block};
use dromedary_parallel::SingleProcess;
use dromedary_principle_engraving::{
    Example, Half, HalfBlock, Head, Keep, MicroBatch, Trained, head_loss,
};
use tch::{Kind, Tensor, no_grad};

use crate::support;

fn rows() -> MicroBatch {
    let row = |example_id, input_ids: Vec<u32>, learn_from| Example {
        example_id,
        input_ids,
        learn_from,
        truncated_left: 0,
        truncated_right: 0,
    };
    MicroBatch::new(&[
        row(1, vec![1, 403, 407, 261, 378, 432, 17, 80], 3),
        row(2, vec![1, 300, 12, 55, 400], 2),
    ])
}

/// Loss and gradients of all entries, half-block by half-block.
fn by_half_blocks(
    model: &Llama,
    trained: &Trained,
    keep: Keep,
    closed_form: Option<&ClosedForm>,
) -> (f64, Vec<Tensor>) {
    let batch = rows();
    let rotary_at = model.rotary_at(&batch.positions()).unwrap();
    let mut blocks = Vec::new();
    for (index, layer) in model.layers().iter().enumerate() {
        for half in [Half::Attention, Half::Mlp] {
            let lengths = &batch.lengths;
            let block = HalfBlock { layer, half, rotary_at: &rotary_at, lengths, closed_form };
            blocks.push((block, trained.leaves_of(index, half)));
        }
    }
    let mut hidden = no_grad(|| model.embed(&batch.input_ids)).unwrap();
    let mut saved = Vec::new();
    for (block, _) in &blocks {
        let (output, left) = block.forward(&hidden, keep, &SingleProcess).unwrap();
        hidden = output;
        saved.push(left);
    }
    let scale = 1.0 / batch.num_targets() as f64;
    let head = head_loss(
        Head { model, closed_form, leaves: None },
        &hidden,
        &batch,
        scale,
        &SingleProcess,
    )
    .unwrap();
    let mut gradient = head.grad_hidden;
    let mut gradients: Vec<Option<Tensor>> = Vec::new();
    gradients.resize_with(trained.optimizer.entries().len(), || None);
    for ((block, entries), saved) in blocks.iter().zip(saved).rev() {
        let leaves: Vec<_> = entries.iter().map(|&entry| trained.leaf(entry)).collect();
        let (grad_input, parts) =
            block.backward(saved, &gradient, &leaves, &SingleProcess).unwrap();
        gradient = grad_input;
        for (&entry, part) in entries.iter().zip(parts) {
            gradients[entry] = part;
        }
    }
    (head.loss_sum * scale, gradients.into_iter().map(Option::unwrap).collect())
}

/// The same by libtorch's autograd through one graph and its own cross-entropy.
fn by_one_graph(model: &Llama, trained: &Trained) -> (f64, Vec<Tensor>) {
    let batch = rows();
    let rotary_at = model.rotary_at(&batch.positions()).unwrap();
    let mut x = model.embed(&batch.input_ids).unwrap();
    for layer in model.layers() {
        let mut attend = |q: &Tensor, k: &Tensor, v: &Tensor| {
            block::causal_attention(&layer.heads, q, k, v, &batch.lengths)
        };
        x = &x + block::attention_partial(layer, &x, &rotary_at, &mut attend).unwrap();
        x = &x + block::mlp_partial(layer, &x).unwrap();
    }
    let logits = model.head(&model.final_norm(&x)).unwrap();
    let logits = logits.index_select(0, &Tensor::from_slice(&batch.predict_at));
    let loss = logits.cross_entropy_for_logits(&Tensor::from_slice(&batch.targets));
    let leaves: Vec<_> =
        (0..trained.optimizer.entries().len()).map(|entry| trained.leaf(entry)).collect();
    let gradients = Tensor::run_backward(&[&loss], &leaves, false, false);
    (loss.double_value(&[]), gradients)
}

fn largest_relative_difference(got: &[Tensor], want: &[Tensor]) -> f64 {
    let relative = |(got, want): (&Tensor, &Tensor)| {
        let largest = want.abs().max().double_value(&[]);
        assert!(largest > 0.0);
        (got - want).abs().max().double_value(&[]) / largest
    };
    got.iter().zip(want).map(relative).fold(0.0, f64::max)
}

/// Autograd and the kernels.
fn ways(model: &Llama) -> [Option<ClosedForm>; 2] {
    let form = ClosedForm::of(model, false);
    assert!(form.is_some());
    [None, form]
}

#[test]
fn half_blocks_give_the_gradients_of_one_graph() {
    let mut model = support::load(&support::stories260k());
    let trained = support::attach_random(&mut model, 4);
    let (want_loss, want) = by_one_graph(&model, &trained);
    for form in ways(&model) {
        let (loss, got) = by_half_blocks(&model, &trained, Keep::Input, form.as_ref());
        assert!((loss - want_loss).abs() < 1e-5 * want_loss, "{form:?} {loss} {want_loss}");
        let difference = largest_relative_difference(&got, &want);
        assert!(difference < 1e-5, "{form:?} {difference}");
    }
}

#[test]
fn kept_and_recomputed_graphs_agree_to_the_bit() {
    let mut model = support::load(&support::stories260k());
    let trained = support::attach_random(&mut model, 4);
    for form in ways(&model) {
        let (loss, kept) = by_half_blocks(&model, &trained, Keep::Graph, form.as_ref());
        let (loss_again, recomputed) = by_half_blocks(&model, &trained, Keep::Input, form.as_ref());
        assert_eq!(loss, loss_again);
        assert!(kept.iter().zip(&recomputed).all(|(one, other)| one == other));
    }
}

#[test]
fn rows_do_not_see_each_other() {
    let mut model = support::load(&support::stories260k());
    let _trained = support::attach_random(&mut model, 4);
    let logits = |ids: &[u32], lengths: &[i64], closed_form: Option<&ClosedForm>| {
        let positions: Vec<i64> = lengths.iter().flat_map(|&length| 0..length).collect();
        let rotary_at = model.rotary_at(&positions).unwrap();
        let mut x = model.embed(ids).unwrap();
        for layer in model.layers() {
            for half in [Half::Attention, Half::Mlp] {
                let block = HalfBlock { layer, half, rotary_at: &rotary_at, lengths, closed_form };
                x = block.forward(&x, Keep::Input, &SingleProcess).unwrap().0;
            }
        }
        no_grad(|| model.head(&model.final_norm(&x))).unwrap()
    };
    let batch = rows();
    for form in ways(&model) {
        let together = logits(&batch.input_ids, &batch.lengths, form.as_ref());
        let alone = logits(&batch.input_ids[8..], &[5], form.as_ref());
        let difference = (together.narrow(0, 8, 5) - alone).abs().max();
        assert!(difference.to_kind(Kind::Double).double_value(&[]) < 1e-4);
    }
}
