use dromedary_llama::{ClosedForm, Llama, LoraConfig, block};
use dromedary_parallel::SingleProcess;
use dromedary_principle_engraving::{
    AdamWConfig, Example, Half, HalfBlock, Head, Keep, MicroBatch, Trained, head_loss,
};
use tch::{Kind, Tensor, no_grad};

use crate::support;

/// Of the largest gradient of a matrix: some roundings of f32 through five layers.
const TOLERANCE: f64 = 5e-5;

fn rows() -> MicroBatch {
    let row = Example::learned_from;
    MicroBatch::new(&[
        row(1, vec![1, 403, 407, 261, 378, 432, 17, 80], 3),
        row(2, vec![1, 300, 12, 55, 400], 2),
    ])
}

/// Rows long enough that adapters are added to the weights for the moment.
fn long_rows() -> MicroBatch {
    let row = |example_id: u64, length: u64| {
        let ids = (0..length).map(|at| ((at * 37 + example_id * 11) % 500 + 3) as u32).collect();
        Example::learned_from(example_id, ids, 5)
    };
    MicroBatch::new(&[row(1, 130), row(2, 200), row(3, 90)])
}

/// Loss and gradients of all leaves, half-block by half-block.
fn by_half_blocks(
    (model, trained): (&Llama, &Trained),
    batch: &MicroBatch,
    keep: Keep,
    closed_form: Option<&ClosedForm>,
) -> (f64, Vec<Tensor>) {
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
    let head =
        head_loss(Head { model, closed_form, leaves: None }, &hidden, batch, scale, &SingleProcess)
            .unwrap();
    let mut gradient = head.grad_hidden;
    let mut gradients: Vec<Option<Tensor>> = Vec::new();
    gradients.resize_with(trained.num_leaves(), || None);
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

/// Logits of all positions, (T, V), through one graph.
pub(crate) fn logits_by_one_graph(model: &Llama, batch: &MicroBatch) -> Tensor {
    let rotary_at = model.rotary_at(&batch.positions()).unwrap();
    let mut x = model.embed(&batch.input_ids).unwrap();
    for layer in model.layers() {
        let mut attend = |q: &Tensor, k: &Tensor, v: &Tensor| {
            block::causal_attention(&layer.heads, q, k, v, &batch.lengths)
        };
        x = &x + block::attention_partial(layer, &x, &rotary_at, &mut attend).unwrap();
        x = &x + block::mlp_partial(layer, &x).unwrap();
    }
    model.head(&model.final_norm(&x)).unwrap()
}

/// The same by libtorch's autograd through one graph and its own cross-entropy.
fn by_one_graph(model: &Llama, trained: &Trained, batch: &MicroBatch) -> (f64, Vec<Tensor>) {
    let logits = logits_by_one_graph(model, batch);
    let logits = logits.index_select(0, &Tensor::from_slice(&batch.predict_at));
    let loss = logits.cross_entropy_for_logits(&Tensor::from_slice(&batch.targets));
    let leaves: Vec<_> = (0..trained.num_leaves()).map(|leaf| trained.leaf(leaf)).collect();
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

fn same_gradients(model: &Llama, trained: &Trained, batch: &MicroBatch) {
    let (want_loss, want) = by_one_graph(model, trained, batch);
    for form in ways(model) {
        let (loss, got) = by_half_blocks((model, trained), batch, Keep::Input, form.as_ref());
        let way = form.is_some();
        assert!((loss - want_loss).abs() < 1e-5 * want_loss, "{way} {loss} {want_loss}");
        let difference = largest_relative_difference(&got, &want);
        assert!(difference < TOLERANCE, "{way} {difference}");
    }
}

#[test]
fn adapters_added_to_the_weights_for_the_moment_give_the_same_gradients() {
    let mut model = support::load(&support::stories260k());
    let trained = support::attach_random(&mut model, 4);
    same_gradients(&model, &trained, &long_rows());
}

#[test]
fn dropout_draws_the_same_masks_forward_backward_and_in_one_graph() {
    let mut model = support::load(&support::stories260k());
    let config = LoraConfig { lora_dropout: 0.3, ..support::lora_config(4) };
    let trained = Trained::attach(&mut model, &config, AdamWConfig::default(), 7).unwrap();
    support::add_noise(&trained);
    let loss = |number| {
        trained.set_draw(number);
        same_gradients(&model, &trained, &rows());
        by_one_graph(&model, &trained, &rows()).0
    };
    let losses = [None, Some(1), Some(2), Some(1)].map(loss);
    assert!(losses[0] != losses[1] && losses[1] != losses[2], "{losses:?}");
    assert_eq!(losses[1], losses[3]);
}

#[test]
fn a_few_target_modules_get_their_gradients() {
    let mut model = support::load(&support::stories260k());
    let target_modules = ["v_proj", "up_proj"].map(String::from).into();
    let config = LoraConfig { target_modules, use_rslora: true, ..support::lora_config(4) };
    let trained = Trained::attach(&mut model, &config, AdamWConfig::default(), 7).unwrap();
    support::add_noise(&trained);
    assert_eq!(trained.num_leaves(), 2 * 2 * model.layers().len());
    same_gradients(&model, &trained, &rows());
    same_gradients(&model, &trained, &long_rows());
}

#[test]
fn all_weights_get_the_gradients_of_one_graph() {
    for kept_layers in [0, 2, usize::MAX] {
        let mut model = support::load(&support::stories260k());
        let trained = Trained::take_weights(&mut model, AdamWConfig::default()).unwrap();
        let want = by_one_graph(&model, &trained, &long_rows());
        trains_with((&model, trained), kept_layers, want);
    }
}

/// A trainer's loss of the long rows, and its gradients of all weights.
#[track_caller]
fn trains_with(
    (model, trained): (&Llama, Trained),
    kept_layers: usize,
    (want_loss, want): (f64, Vec<Tensor>),
) {
    let examples = batch_examples(&long_rows());
    let mut trainer = support::trainer(model, trained, &examples, kept_layers);
    let got = trainer.forward_backward().unwrap();
    assert!((got.loss - want_loss).abs() < 1e-5 * want_loss, "{} {want_loss}", got.loss);
    let trained = trainer.trained();
    let got: Vec<_> = (0..trained.num_leaves()).map(|leaf| trained.gradient(leaf)).collect();
    let difference = largest_relative_difference(&got, &want);
    assert!(difference < TOLERANCE, "{difference}");
}

/// Nothing is rounded on the way: they are those of a model that has the same numbers in f32.
#[test]
fn weights_in_sixteen_bits_get_gradients_in_f32() {
    for kind in [Kind::Half, Kind::BFloat16] {
        let mut model = support::load_as(&support::stories260k(), kind);
        let trained = Trained::take_weights(&mut model, AdamWConfig::default()).unwrap();
        let mut same = support::load(&support::stories260k());
        let of_same = Trained::take_weights(&mut same, AdamWConfig::default()).unwrap();
        for leaf in 0..trained.num_leaves() {
            no_grad(|| of_same.leaf(leaf).detach().copy_(trained.leaf(leaf)));
        }
        trains_with((&model, trained), 0, by_one_graph(&same, &of_same, &long_rows()));
    }
}

/// The rows of a micro-batch in which all but the first five tokens are learned.
fn batch_examples(batch: &MicroBatch) -> Vec<Example> {
    let mut ids = &batch.input_ids[..];
    let rows = batch.lengths.iter().zip(&batch.example_ids);
    rows.map(|(&length, &example_id)| {
        let (row, rest) = ids.split_at(length as usize);
        ids = rest;
        let input_ids = row.to_vec();
        Example::learned_from(example_id, input_ids, 5)
    })
    .collect()
}

#[test]
fn half_blocks_give_the_gradients_of_one_graph() {
    let mut model = support::load(&support::stories260k());
    let trained = support::attach_random(&mut model, 4);
    same_gradients(&model, &trained, &rows());
}

#[test]
fn kept_and_recomputed_graphs_agree_to_the_bit() {
    let mut model = support::load(&support::stories260k());
    let trained = support::attach_random(&mut model, 4);
    for form in ways(&model) {
        let (loss, kept) = by_half_blocks((&model, &trained), &rows(), Keep::Graph, form.as_ref());
        let (loss_again, recomputed) =
            by_half_blocks((&model, &trained), &rows(), Keep::Input, form.as_ref());
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
