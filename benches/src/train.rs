//! LoRA training on one fixed random batch, half of the labels masked.

use anyhow::Result;
use clap::Args;
use dromedary_llama::{Checkpoint, Llama, LoadOptions, LoraConfig};
use dromedary_parallel::SingleProcess;
use dromedary_principle_engraving::{
    AdamWConfig, BatchConfig, Batches, Example, Keep, Schedule, ScheduleType, Trained, Trainer,
    TrainerParts,
};
use rand::{Rng, SeedableRng, rngs::StdRng};

use crate::{ModelArgs, machine};

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
    /// Rank of the adapters.
    #[arg(long, default_value_t = 64)]
    r: i64,
    /// Steps; the first is not counted.
    #[arg(long, default_value_t = 5)]
    steps: usize,
    /// Keep activations instead of computing them twice.
    #[arg(long)]
    keep: bool,
}

pub(crate) fn run(args: &TrainArgs) -> Result<()> {
    tch::set_num_threads(args.model.threads);
    let checkpoint = Checkpoint::open(&args.model.checkpoint)?;
    let options = LoadOptions { pack: false, ..LoadOptions::default() };
    let mut model = Llama::load(&checkpoint, &options)?;
    let loaded = machine::rss_mb()?.0;
    let lora = LoraConfig { r: args.r, ..LoraConfig::default() };
    let trained = Trained::attach(&mut model, &lora, AdamWConfig::default(), 0)?;
    let examples = examples(args, model.config().vocab_size as u32);
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
        batches: Batches::new(batches, vec![args.length; args.batch]),
        schedule: Schedule::new(ScheduleType::Constant, 1e-4, 0.0, args.steps as u64),
        keep: if args.keep { Keep::Graph } else { Keep::Input },
        comm: &SingleProcess,
    });
    let mut seconds = Vec::new();
    for step in 0..args.steps {
        let metrics = trainer.train_step()?;
        if step > 0 {
            seconds.push(metrics.seconds);
        }
    }
    seconds.sort_by(f64::total_cmp);
    let median = seconds[seconds.len() / 2];
    let peak = machine::rss_mb()?.1;
    println!(
        "| training, {} | {:.1} tokens/s | {median:.2} s a step | peak {peak} MB, {} MB above the loaded weights |",
        if args.keep { "activations kept" } else { "recomputed" },
        (args.batch * args.length) as f64 / median,
        peak.saturating_sub(loaded)
    );
    Ok(())
}

fn examples(args: &TrainArgs, vocab_size: u32) -> Vec<Example> {
    let mut rng = StdRng::seed_from_u64(0);
    (0..args.batch as u64)
        .map(|example_id| Example {
            example_id,
            input_ids: (0..args.length).map(|_| rng.random_range(3..vocab_size)).collect(),
            learn_from: args.length / 2,
            truncated_left: 0,
            truncated_right: 0,
        })
        .collect()
}
