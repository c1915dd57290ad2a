//! A whole queue of prompts behind the principles, as step 2 answers it.

use std::{env, fs, ops::ControlFlow, path::Path, time::Instant};

use anyhow::{Context, Result, ensure};
use clap::Args;
use dromedary_llama::{
    Checkpoint, Llama, LoadOptions, eos_token_ids,
    generation::{Engine, EngineConfig, Event, PrefixUse, Request, Sampling, Statistics},
};
use dromedary_parallel::SingleProcess;
use dromedary_self_align::{MetaPrompt, Template};
use dromedary_tokenizer::Tokenizer;
use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom};
use serde_json::Value;

use crate::{ModelArgs, machine};

/// Arguments of the bench.
#[derive(Args)]
pub(crate) struct EndToEndArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Prompts in the queue.
    #[arg(long, default_value_t = 1024)]
    prompts: usize,
    /// Rows at once.
    #[arg(long, default_value_t = 32)]
    batch: usize,
    /// Tokens that a row generates at most.
    #[arg(long, default_value_t = 128)]
    max_gen_len: usize,
    /// Tokens that a row may have behind the shared prefix; longer prompts are left out.
    #[arg(long, default_value_t = 512)]
    max_seq_len: usize,
    /// Seed of the choice and order of the prompts.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Wait for all rows of a batch before the next batch is admitted.
    #[arg(long)]
    static_batches: bool,
    /// Give each row a copy of the prefix, as systems without a shared one do.
    #[arg(long)]
    copied_prefix: bool,
}

pub(crate) fn run(args: &EndToEndArgs) -> Result<()> {
    tch::set_num_threads(args.model.threads);
    let checkpoint = &args.model.checkpoint;
    let tokenizer = Tokenizer::open(checkpoint)?;
    let model = Llama::load(&Checkpoint::open(checkpoint)?, &LoadOptions::default())?;
    let meta_prompt = MetaPrompt::open(None)?;
    let template = Template::new(&meta_prompt);
    let prefix = template.shared_prefix(&tokenizer);
    let (prefix_use, copied) =
        if args.copied_prefix { (PrefixUse::Copied, prefix.len()) } else { (PrefixUse::Shared, 0) };
    let config = EngineConfig {
        max_batch_size: args.batch,
        max_seq_len: copied + args.max_seq_len,
        prefix_use,
        max_gen_len: args.max_gen_len,
        sampling: Sampling::nucleus(0.7, 0.95),
        stop_strings: meta_prompt.principles.stop_strings.clone(),
        eos_token_ids: eos_token_ids(checkpoint, &tokenizer)?,
        ..EngineConfig::default()
    };
    let mut engine = Engine::new(&model, &tokenizer, &SingleProcess, config)?;
    let start = Instant::now();
    engine.pin_prefix(&prefix)?;
    println!("prefix of {} tokens: {:.1} s", prefix.len(), start.elapsed().as_secs_f64());

    let texts = texts(args, &tokenizer)?;
    let mut queue = texts.iter().enumerate().map(|(row, text)| Request {
        id: row.to_string(),
        tokens: tokenizer.encode_with_bos(&template.fill(text, "")),
        seed: args.seed,
    });
    let mut total = Total::default();
    let start = Instant::now();
    let at_once = if args.static_batches { args.batch } else { usize::MAX };
    for first in (0..args.prompts).step_by(at_once) {
        let mut batch = queue.by_ref().take(at_once);
        let statistics = engine.run(&mut || batch.next(), &mut |event| {
            if let Event::Finished(row) = event {
                total.prompt_tokens += row.prompt_tokens - prefix.len();
            }
            ControlFlow::Continue(())
        })?;
        total.add(&statistics, first + at_once.min(args.prompts) < args.prompts);
    }
    ensure!(total.rows == args.prompts as u64, "{} rows of {}", total.rows, args.prompts);
    total.report(args, start.elapsed().as_secs_f64())
}

/// Sums over the runs of the engine.
#[derive(Default)]
struct Total {
    rows: u64,
    prompt_tokens: usize,
    tokens: u64,
    steps: u64,
    full_rows: f64,
    full_seconds: f64,
    prefill_seconds: f64,
    queue_tokens: u64,
    queue_seconds: f64,
}

impl Total {
    /// A static batch that others wait for belongs to the queue from its first to its last row.
    fn add(&mut self, run: &Statistics, others_wait: bool) {
        self.rows += run.finished;
        self.tokens += run.output_tokens;
        self.steps += run.decode_steps;
        self.full_rows += run.full_steps as f64;
        self.full_seconds += run.full_seconds;
        self.prefill_seconds += run.prefill_seconds;
        let all = (run.output_tokens, run.prefill_seconds + run.decode_seconds);
        let (tokens, seconds) =
            if others_wait { all } else { (run.queue_tokens, run.queue_seconds) };
        self.queue_tokens += tokens;
        self.queue_seconds += seconds;
    }

    fn report(&self, args: &EndToEndArgs, seconds: f64) -> Result<()> {
        let EndToEndArgs { prompts, batch, .. } = args;
        let steady = self.full_rows * *batch as f64 / self.full_seconds;
        let useful = self.queue_tokens as f64 / self.queue_seconds;
        let reachable = steady * (1.0 - self.prefill_seconds / self.queue_seconds);
        let mode = match (args.static_batches, args.copied_prefix) {
            (false, false) => "",
            (true, false) => ", static batches",
            (false, true) => ", copied prefix",
            (true, true) => ", static batches, copied prefix",
        };
        println!(
            "{} tokens of output, {} of prompts behind the prefix, {} steps, {seconds:.1} s",
            self.tokens, self.prompt_tokens, self.steps
        );
        println!(
            "| end to end, {prompts} prompts, batch {batch}{mode} | {useful:.1} tokens/s until the \
             queue is empty | steady {steady:.1}, less {:.1} s of prefill {reachable:.1}: {:.2} of it \
             | drain {:.1} s, {} tokens | peak {} MB |",
            self.prefill_seconds,
            useful / reachable,
            seconds - self.queue_seconds,
            self.tokens - self.queue_tokens,
            machine::rss_mb()?.1
        );
        Ok(())
    }
}

/// Prompts of people where the test data is there, the project's own otherwise, in an order of the
/// seed; repeated when there are too few.
fn texts(args: &EndToEndArgs, tokenizer: &Tokenizer) -> Result<Vec<String>> {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("../dummy_data");
    let files = match env::var_os("DROMEDARY_TEST_DATA") {
        Some(data) => {
            let data = Path::new(&data);
            vec![
                data.join("dolly/dolly_exact_45.jsonl"),
                data.join("oasst1/en-validation-400.jsonl"),
            ]
        }
        None => vec![own.join("dolly.jsonl"), own.join("oasst1.jsonl")],
    };
    let mut texts = Vec::new();
    for path in &files {
        let content = fs::read_to_string(path).with_context(|| path.display().to_string())?;
        for line in content.lines().filter(|line| !line.trim().is_empty()) {
            let row: Value = serde_json::from_str(line)?;
            let text = match row["role"].as_str() {
                None => row["instruction"].as_str(),
                Some("prompter") => row["text"].as_str(),
                Some(_) => None,
            };
            texts.extend(text.map(|text| text.trim().to_owned()));
        }
    }
    let room = args.max_seq_len.saturating_sub(args.max_gen_len + 32);
    texts.retain(|text| !text.is_empty() && tokenizer.fits(text, room));
    ensure!(!texts.is_empty(), "no prompt fits {room} tokens");
    let mut rng = StdRng::seed_from_u64(args.seed);
    let mut chosen = Vec::with_capacity(args.prompts);
    while chosen.len() < args.prompts {
        texts.shuffle(&mut rng);
        chosen.extend(texts.iter().take(args.prompts - chosen.len()).cloned());
    }
    Ok(chosen)
}
