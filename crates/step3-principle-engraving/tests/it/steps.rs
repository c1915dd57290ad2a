use dromedary_llama::LoraConfig;
use dromedary_principle_engraving::{
    AdamWConfig, BatchConfig, Batches, Error, Example, Ranks, Schedule, ScheduleType, Trained,
    Trainer, TrainerParts,
};
use serde::Deserialize;
use tch::{Kind, Tensor, no_grad};

use crate::support;

#[derive(Deserialize)]
struct Golden {
    rows: Vec<Row>,
    r: i64,
    lora_alpha: f64,
    learning_rate: f64,
    max_grad_norm: f64,
    weight_decay: f64,
    losses: Vec<f64>,
    grad_norms: Vec<f64>,
}

#[derive(Deserialize)]
struct Row {
    ids: Vec<u32>,
    learn_from: usize,
}

/// The formula of `make_smollm2_golden.py`.
fn initial_a(module: usize, [r, columns]: [i64; 2]) -> Tensor {
    let value =
        |i: i64, j: i64| (0.03 * ((1 + 37 * i + 11 * j + 101 * module as i64) as f64).sin()) as f32;
    let values: Vec<f32> = (0..r).flat_map(|i| (0..columns).map(move |j| value(i, j))).collect();
    Tensor::from_slice(&values).view([r, columns])
}

#[test]
fn five_steps_on_smollm2_follow_peft() {
    let Some(dir) = crate::given::smollm2() else { return };
    let golden: Golden = serde_json::from_str(include_str!("../data/smollm2_golden.json")).unwrap();
    let examples: Vec<_> = golden
        .rows
        .into_iter()
        .enumerate()
        .map(|(id, row)| Example::learned_from(id as u64, row.ids, row.learn_from))
        .collect();
    let mut model = support::load(&dir);
    let lora = LoraConfig { r: golden.r, lora_alpha: golden.lora_alpha, ..LoraConfig::default() };
    let adamw = AdamWConfig {
        weight_decay: golden.weight_decay,
        max_grad_norm: golden.max_grad_norm,
        ..AdamWConfig::default()
    };
    let trained = Trained::attach(&mut model, &lora, adamw, 0).unwrap();
    for leaf in (0..trained.num_leaves()).step_by(2) {
        let a = trained.leaf(leaf);
        let (r, columns) = a.size2().unwrap();
        no_grad(|| a.detach().copy_(&initial_a(leaf / 2, [r, columns])));
    }
    let mut trainer = Trainer::new(TrainerParts {
        model: &model,
        trained,
        examples: &examples,
        batches: Batches::new(batches(1, 2), vec![1; 2]),
        schedule: Schedule::new(ScheduleType::Constant, golden.learning_rate, 0.0, 5),
        kept_layers: 10,
        ranks: Ranks::single(),
    });
    for (want_loss, want_norm) in golden.losses.iter().zip(&golden.grad_norms) {
        let step = trainer.train_step().unwrap();
        let off = |got: f64, want: f64| (got - want).abs() / want;
        assert!(off(step.loss, *want_loss) < 1e-3, "{} {want_loss}", step.loss);
        assert!(off(step.grad_norm, *want_norm) < 1e-2, "{} {want_norm}", step.grad_norm);
    }
}

fn batches(batch_size: usize, accumulation_steps: usize) -> BatchConfig {
    BatchConfig { batch_size, accumulation_steps, group_by_length: false, seed: 0 }
}

/// Rows of different lengths and shares of learned tokens.
fn rows() -> Vec<Example> {
    (0..4u64)
        .map(|id| {
            let length = 7 + 13 * id;
            let ids = (0..length).map(|at| ((at * 29 + id * 17) % 500 + 3) as u32).collect();
            Example::learned_from(id, ids, 2 + 3 * id as usize)
        })
        .collect()
}

#[test]
fn accumulated_micro_batches_are_one_big_batch() {
    let examples = rows();
    let run = |batch_size, accumulation_steps| {
        let mut model = support::load(&support::stories260k());
        let trained = support::attach_random(&mut model, 4);
        let mut trainer = Trainer::new(TrainerParts {
            model: &model,
            trained,
            examples: &examples,
            batches: Batches::new(batches(batch_size, accumulation_steps), vec![1; 4]),
            schedule: Schedule::new(ScheduleType::Constant, 1e-3, 0.0, 3),
            kept_layers: 0,
            ranks: Ranks::single(),
        });
        let step = trainer.forward_backward().unwrap();
        let optimizer = &trainer.trained().optimizer;
        let gradients: Vec<_> =
            (0..optimizer.entries().len()).map(|entry| optimizer.gradient(entry).copy()).collect();
        (step.loss, step.targets, gradients)
    };
    let (loss, targets, gradients) = run(4, 1);
    for (batch_size, accumulation_steps) in [(2, 2), (1, 4)] {
        let (other_loss, other_targets, others) = run(batch_size, accumulation_steps);
        assert_eq!(targets, other_targets);
        assert!((loss - other_loss).abs() < 1e-6 * loss, "{loss} {other_loss}");
        for (one, other) in gradients.iter().zip(&others) {
            let largest = one.abs().max().double_value(&[]);
            let off = (one - other).abs().max().double_value(&[]);
            assert!(off < 2e-5 * largest, "{off} of {largest}");
        }
    }
}

/// Makes the third adapter's A infinite.
fn poison(trained: &Trained) {
    let _ = no_grad(|| trained.leaf(4).detach().fill_(f64::INFINITY));
}

#[test]
fn a_step_that_is_not_finite_changes_nothing_and_too_many_of_them_end_the_run() {
    let examples = rows();
    let mut model = support::load(&support::stories260k());
    let trained = support::attach_random(&mut model, 4);
    let mut trainer = support::trainer(&model, trained, &examples, 0);
    let values = |trainer: &Trainer<'_>| support::numbers(&trainer.trained().optimizer);
    assert!(!trainer.train_step().unwrap().skipped);

    let mended = trainer.trained().leaf(4).detach().copy();
    poison(trainer.trained());
    let before = values(&trainer);
    let updates = trainer.trained().optimizer.updates();
    for count in 1..5 {
        let step = trainer.train_step().unwrap();
        assert!(step.skipped && !(step.loss.is_finite() && step.grad_norm.is_finite()));
        assert_eq!(trainer.position().not_finite, count);
    }
    assert_eq!(trainer.trained().optimizer.updates(), updates);
    assert!(before.iter().zip(values(&trainer)).all(|(one, other)| *one == other));

    // A finite step in between, and the count starts anew.
    no_grad(|| trainer.trained().leaf(4).detach().copy_(&mended));
    assert!(!trainer.train_step().unwrap().skipped);
    assert_eq!(trainer.position().not_finite, 0);
    poison(trainer.trained());
    for _ in 1..5 {
        assert!(trainer.train_step().unwrap().skipped);
    }
    let Err(Error::NotFinite { mut example_ids, last }) = trainer.train_step() else {
        panic!("the run goes on")
    };
    assert_eq!(example_ids.last(), Some(&last.example_ids));
    assert_eq!((last.step, last.skipped), (trainer.steps_done(), true));
    example_ids.iter_mut().for_each(|ids| ids.sort_unstable());
    assert_eq!(example_ids, vec![vec![0, 1, 2, 3]; 5]);
}

#[test]
fn dropout_masks_belong_to_the_step_and_go_on_after_a_restart() {
    let examples = rows();
    let losses = |steps: usize| {
        let mut model = support::load(&support::stories260k());
        let config = LoraConfig { lora_dropout: 0.5, ..support::lora_config(4) };
        let trained = Trained::attach(&mut model, &config, AdamWConfig::default(), 7).unwrap();
        support::add_noise(&trained);
        let mut trainer = support::trainer(&model, trained, &examples, 2);
        (0..steps).map(|_| trainer.forward_backward().unwrap().loss).collect::<Vec<_>>()
    };
    // The same step again draws the same masks; the position alone tells them apart.
    let first = losses(2);
    assert_eq!(first[0], first[1]);
    assert_eq!(first, losses(2));
}

#[test]
fn sixteen_bit_weights_follow_their_f32_values() {
    let examples = rows();
    let mut model = support::load_as(&support::stories260k(), Kind::BFloat16);
    let trained = Trained::take_weights(&mut model, AdamWConfig::default()).unwrap();
    let mut trainer = support::trainer(&model, trained, &examples, 0);
    let losses: Vec<_> = (0..8).map(|_| trainer.train_step().unwrap().loss).collect();
    assert!(losses[7] < 0.97 * losses[0], "{losses:?}");
    let trained = trainer.trained();
    for leaf in 0..trained.num_leaves() {
        let (value, computed) = (trained.value(leaf), trained.leaf(leaf).detach());
        assert_eq!(value.kind(), Kind::Float);
        assert_eq!(value.to_kind(computed.kind()), computed);
    }
    // The values behind them are finer than 16 bits.
    let rounded = trained.leaf(2).detach();
    assert_eq!(rounded.kind(), Kind::BFloat16);
    assert_ne!(trained.value(2), rounded.to_kind(Kind::Float));
}
