//! Training on one fixed random batch, half of the labels masked, or on rows of real lengths.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use clap::Args;
use dromedary_llama::{Llama, LoadOptions, LoraConfig};
use dromedary_principle_engraving::{
    ActivationsMode, AdamWConfig, BatchConfig, Batches, Example, MemoryPlan, PlanInput,
    PlannedRank, PlannedTraining, Ranks, Schedule, ScheduleType, Trained, Trainer, TrainerParts,
};
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde::Deserialize;
use tch::Kind;

use crate::{ModelArgs, machine, model};

/// Arguments of the bench.
#[derive(Args)]
pub(crate) struct TrainArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Rows of the batch.
    #[arg(long, default_value_t = 4)]
    batch: usize,
    /// Tokens of each row.
    #[arg(long, default_value_t = 512)]
    length: usize,
    /// Rows of real lengths instead: JSONL of `input_ids` and `learn_from`, the first of them.
    #[arg(long, value_name = "FILE")]
    rows: Option<PathBuf>,
    /// Rank of the adapters.
    #[arg(long, default_value_t = 64)]
    r: i64,
    /// Train all weights instead of adapters.
    #[arg(long)]
    full: bool,
    /// Keep the frozen weights in four bits.
    #[arg(long, conflicts_with = "full")]
    qlora: bool,
    /// Steps; the first is not counted.
    #[arg(long, default_value_t = 5)]
    steps: usize,
    /// Keep activations instead of computing them twice.
    #[arg(long)]
    keep: bool,
}

#[derive(Deserialize)]
struct Row {
    input_ids: Vec<u32>,
    learn_from: usize,
}

pub(crate) fn run(args: &TrainArgs) -> Result<()> {
    tch::set_num_threads(args.model.threads);
    let options = LoadOptions { pack: false, nf4: args.qlora, ..LoadOptions::default() };
    let mut model = model::load(&args.model.checkpoint, &options)?;
    let loaded = machine::rss_mb()?.0;
    let lora = LoraConfig { r: args.r, ..LoraConfig::default() };
    let adamw = AdamWConfig::default();
    let trained = match args.full {
        true => Trained::take_weights(&mut model, adamw)?,
        false => Trained::attach(&mut model, &lora, adamw, 0)?,
    };
    let mut examples = match &args.rows {
        Some(path) => read_rows(path)?,
        None => random_rows(args, model.config().vocab_size as u32),
    };
    let steps = match args.rows {
        Some(_) => args.steps.min(examples.len() / args.batch),
        None => args.steps,
    };
    ensure!(steps > 1, "there are rows for {steps} steps, the first of which is not counted");
    examples.truncate(steps * args.batch);
    let planned = planned(args, &model, &lora, &examples)?;
    let batches = BatchConfig {
        batch_size: args.batch,
        accumulation_steps: 1,
        group_by_length: false,
        seed: 0,
    };
    let mut trainer = Trainer::new(TrainerParts {
        model: &model,
        trained,
        examples: &examples,
        batches: Batches::new(batches, vec![args.length; examples.len()]),
        schedule: Schedule::new(ScheduleType::Constant, 1e-4, 0.0, steps as u64),
        kept_layers: if args.keep { usize::MAX } else { 0 },
        ranks: Ranks::single(),
    });
    let mut measured = Vec::new();
    for step in 0..steps {
        let metrics = trainer.train_step()?;
        if step > 0 {
            measured.push((metrics.tokens, metrics.seconds));
        }
    }
    let rate = match args.rows {
        // Batches differ: all of them together.
        Some(_) => {
            let tokens: usize = measured.iter().map(|&(tokens, _)| tokens).sum();
            tokens as f64 / measured.iter().map(|&(_, seconds)| seconds).sum::<f64>()
        }
        None => median(measured.iter().map(|&(tokens, seconds)| tokens as f64 / seconds).collect()),
    };
    let peak = machine::rss_mb()?.1;
    println!(
        "| training {}, {}{} | {rate:.1} tokens/s | peak {peak} MB, planned {}, {} MB above the loaded weights |",
        match (args.full, args.qlora) {
            (true, _) => "all weights",
            (_, true) => "adapters on four bits",
            _ => "adapters",
        },
        if args.keep { "activations kept" } else { "recomputed" },
        if args.rows.is_some() { ", real lengths" } else { "" },
        planned / 1_000_000,
        peak.saturating_sub(loaded)
    );
    Ok(())
}

/// Bytes that the trainer plans for the largest batch.
fn planned(
    args: &TrainArgs,
    model: &Llama,
    lora: &LoraConfig,
    examples: &[Example],
) -> Result<u64> {
    let batch = |rows: &[Example]| {
        let tokens: usize = rows.iter().map(|row| row.input_ids.len()).sum();
        let targets: usize = rows.iter().map(Example::num_targets).sum();
        (tokens as u64, targets as u64)
    };
    let largest = examples.chunks(args.batch).map(batch).max();
    let (tokens, targets) = largest.context("there are no rows")?;
    let training = match args.full {
        true => PlannedTraining::Weights,
        false => PlannedTraining::Adapters(lora.clone()),
    };
    let (config, kind) = (model.config(), Kind::Float);
    let rank = PlannedRank { nf4: args.qlora, ..PlannedRank::default() };
    let mut input = PlanInput { config, kind, training, tokens, targets, kept_layers: 0, rank };
    let mode = if args.keep { ActivationsMode::Keep } else { ActivationsMode::Recompute };
    input.kept_layers = mode.kept_layers(&input, None)?;
    Ok(MemoryPlan::new(&input)?.total())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn example(example_id: usize, input_ids: Vec<u32>, learn_from: usize) -> Example {
    Example::learned_from(example_id as u64, input_ids, learn_from)
}

fn read_rows(path: &Path) -> Result<Vec<Example>> {
    let text =
        fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let row = |(index, line): (usize, &str)| {
        let Row { input_ids, learn_from } = serde_json::from_str(line)
            .with_context(|| format!("{}, line {}", path.display(), index + 1))?;
        Ok(example(index, input_ids, learn_from))
    };
    text.lines().enumerate().map(row).collect()
}

fn random_rows(args: &TrainArgs, vocab_size: u32) -> Vec<Example> {
    let mut rng = StdRng::seed_from_u64(0);
    let mut ids = || (0..args.length).map(|_| rng.random_range(3..vocab_size)).collect();
    (0..args.batch).map(|row| example(row, ids(), args.length / 2)).collect()
}
