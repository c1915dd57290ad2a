//! Generation behind a long prefix, as step 2 does it.

use std::{ops::ControlFlow, time::Instant};

use anyhow::{Result, ensure};
use clap::Args;
use dromedary_llama::{
    Footprint, Llama, LoadOptions,
    generation::{Engine, EngineConfig, Event, PrefixUse, Request, Sampling, Statistics},
};
use dromedary_parallel::{Communicator, SingleProcess};
use dromedary_tokenizer::Tokenizer;
use rand::{Rng, SeedableRng, rngs::StdRng};

use crate::{ModelArgs, machine, model};

/// Arguments of the bench.
#[derive(Args)]
pub(crate) struct DecodeArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Rows at once; several values are measured one after the other.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 8, 32])]
    batch: Vec<usize>,
    /// Keep the linear layers in four bits.
    #[arg(long)]
    nf4: bool,
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
    /// Give each row a copy of the prefix, as systems without a shared one do.
    #[arg(long)]
    pub(crate) copied_prefix: bool,
}

impl Shape {
    /// How rows see the prefix, and the tokens of a row's own that this takes.
    pub(crate) fn prefix_use(&self) -> (PrefixUse, usize) {
        if self.copied_prefix { (PrefixUse::Copied, self.prefix) } else { (PrefixUse::Shared, 0) }
    }
}

/// What a run of [`decode`] gave.
pub(crate) struct Decoded {
    prefix_seconds: f64,
    pub(crate) statistics: Statistics,
}

pub(crate) fn run(args: &DecodeArgs) -> Result<()> {
    tch::set_num_threads(args.model.threads);
    let tokenizer = Tokenizer::open(&args.model.checkpoint)?;
    let options = LoadOptions { nf4: args.nf4, ..LoadOptions::default() };
    let model = model::load(&args.model.checkpoint, &options)?;
    let bound = machine::compute_bound()?;
    match bound {
        Some(bound) => println!("compute bound: {bound:.0} GFLOP/s"),
        None => println!("compute bound: unknown, this libtorch does not pack weights"),
    }
    let cost = Footprint::new(model.config(), model.plan(), &options);
    for &batch in &args.batch {
        let decoded = decode(&args.shape, batch, &model, &tokenizer, &SingleProcess)?;
        report(args, batch, &decoded, (&cost, bound))?;
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
    let (prefix_use, copied) = shape.prefix_use();
    let config = EngineConfig {
        max_batch_size: batch,
        max_seq_len: copied + shape.suffix + shape.new,
        prefix_use,
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
        Event::Rejected { .. } | Event::Failed { .. } => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    })?;
    ensure!(statistics.finished == batch as u64, "not all rows ended: {statistics:?}");
    Ok(Decoded { prefix_seconds, statistics })
}

fn report(
    args: &DecodeArgs,
    batch: usize,
    decoded: &Decoded,
    (cost, bound): (&Footprint, Option<f64>),
) -> Result<()> {
    let Decoded { prefix_seconds, statistics: of } = decoded;
    let Shape { prefix, suffix, new, copied_prefix } = args.shape;
    let decode = of.decode_tokens as f64 / of.decode_seconds;
    let prefill = prefix as f64 / prefix_seconds;
    // Each token attends to all before it; only the last one of a prompt has logits.
    let context = prefix + suffix + new / 2;
    let share = |tokens_per_second: f64, multiply_adds: u64| {
        let flops = 2.0 * multiply_adds as f64 * tokens_per_second;
        bound.map_or(String::new(), |bound| format!(" ({:.2} of the bound)", flops / bound / 1e9))
    };
    let mode = if copied_prefix { ", copied prefix" } else { "" };
    let kept = if args.nf4 { ", four bits" } else { "" };
    println!(
        "| decode, batch {batch}{mode}{kept} | {decode:.1} tokens/s{} | prefix {prefill:.0} tokens/s{} | \
         peak {} MB |",
        share(decode, cost.work(context as u64)),
        share(prefill, cost.work(prefix as u64 / 2) - cost.head_work),
        machine::rss_mb()?.1
    );
    Ok(())
}
