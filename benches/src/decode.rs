//! Generation behind a long prefix, as step 2 does it.

use std::{ops::ControlFlow, time::Instant};

use anyhow::{Result, ensure};
use clap::Args;
use dromedary_llama::{
    Checkpoint, Llama, LoadOptions,
    generation::{Engine, EngineConfig, Event, Request, Sampling, Statistics},
};
use dromedary_parallel::{Communicator, SingleProcess};
use dromedary_tokenizer::Tokenizer;
use rand::{Rng, SeedableRng, rngs::StdRng};

use crate::{ModelArgs, machine};

/// Arguments of the bench.
#[derive(Args)]
pub(crate) struct DecodeArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Rows at once; several values are measured one after the other.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 8, 32])]
    batch: Vec<usize>,
    #[command(flatten)]
    shape: Shape,
}

/// The lengths of what is generated.
#[derive(Args, Clone, Copy)]
pub(crate) struct Shape {
    /// Tokens of the shared prefix.
    #[arg(long, default_value_t = 2512)]
    pub(crate) prefix: usize,
    /// Tokens of each row behind the prefix.
    #[arg(long, default_value_t = 16)]
    pub(crate) suffix: usize,
    /// Tokens that each row generates.
    #[arg(long, default_value_t = 64)]
    pub(crate) new: usize,
}

/// What a run of [`decode`] gave.
pub(crate) struct Decoded {
    prefix_seconds: f64,
    pub(crate) statistics: Statistics,
}

pub(crate) fn run(args: &DecodeArgs) -> Result<()> {
    tch::set_num_threads(args.model.threads);
    let checkpoint = Checkpoint::open(&args.model.checkpoint)?;
    let tokenizer = Tokenizer::open(&args.model.checkpoint)?;
    let model = Llama::load(&checkpoint, &LoadOptions::default())?;
    match machine::compute_bound()? {
        Some(bound) => println!("compute bound: {bound:.0} GFLOP/s"),
        None => println!("compute bound: unknown, this libtorch does not pack weights"),
    }
    for &batch in &args.batch {
        let decoded = decode(&args.shape, batch, &model, &tokenizer, &SingleProcess)?;
        report(args, batch, &decoded)?;
    }
    Ok(())
}

/// Random rows behind a random prefix, the same on all ranks of `comm`.
pub(crate) fn decode(
    shape: &Shape,
    batch: usize,
    model: &Llama,
    tokenizer: &Tokenizer,
    comm: &dyn Communicator,
) -> Result<Decoded> {
    let config = EngineConfig {
        max_batch_size: batch,
        max_seq_len: shape.suffix + shape.new,
        max_gen_len: shape.new,
        sampling: Sampling::nucleus(0.7, 0.95),
        // Random text would end at random points: without stop strings and end-of-text tokens no row
        // stops early.
        ..EngineConfig::default()
    };
    let mut engine = Engine::new(model, tokenizer, comm, config)?;
    let mut rng = StdRng::seed_from_u64(0);
    let vocab_size = model.config().vocab_size as u32;
    let mut random = |length| (0..length).map(|_| rng.random_range(3..vocab_size)).collect();
    let prefix: Vec<u32> = random(shape.prefix);
    let start = Instant::now();
    engine.pin_prefix(&prefix)?;
    let prefix_seconds = start.elapsed().as_secs_f64();

    let mut requests = (0..batch).map(|row| {
        let suffix: Vec<u32> = random(shape.suffix);
        Request { id: row.to_string(), tokens: [&prefix[..], &suffix].concat(), seed: 0 }
    });
    let statistics = engine.run(&mut || requests.next(), &mut |event| match event {
        Event::Rejected { .. } => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    })?;
    ensure!(statistics.finished == batch as u64, "not all rows ended: {statistics:?}");
    Ok(Decoded { prefix_seconds, statistics })
}

fn report(args: &DecodeArgs, batch: usize, decoded: &Decoded) -> Result<()> {
    let Decoded { prefix_seconds, statistics: of } = decoded;
    println!(
        "| decode, batch {batch} | {:.1} tokens/s | prefix {:.0} tokens/s | peak {} MB |",
        of.decode_tokens as f64 / of.decode_seconds,
        args.shape.prefix as f64 / prefix_seconds,
        machine::rss_mb()?.1
    );
    Ok(())
}
