use std::{
    fs,
    io::{self, IsTerminal, Write},
    num::NonZeroUsize,
    ops::ControlFlow,
    path::PathBuf,
    thread,
};

use anyhow::{Context, anyhow, bail};
use dromedary_command::{Common, Error, StopFlag, init_logging, layered, print_config, required};
use dromedary_parallel::{Communicator, Launch, check_agreements, launch, select_device};
use dromedary_tokenizer::Tokenizer;
use serde::{Deserialize, Serialize};

use super::{SUBCOMMANDS, SamplingArgs, stop_strings};
use crate::{
    AdapterFile, Checkpoint, Llama, LoadOptions, check_tokenizer, eos_token_ids,
    generation::{Engine, EngineConfig, Event, Request, Statistics},
    select_kind, select_nf4,
};

/// Continue a prompt, and print the continuation alone to stdout while it is written.
///
/// It ends at an end-of-text token of the model, behind a --stop text, or after --max-gen-len
/// tokens. Under mpirun or srun the model is split over all processes, and the first one prints.
#[derive(Debug, Default, clap::Args, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct CompleteArgs {
    /// Folder of the checkpoint: config.json, safetensors files, tokenizer.
    #[arg(long, value_name = "DIR", aliases = ["ckpt-dir", "model-name-or-path"])]
    checkpoint: Option<PathBuf>,
    /// Folder of a PEFT adapter, which is not merged: adapter_config.json, adapter_model.safetensors.
    #[arg(long, value_name = "DIR", alias = "lora-weights")]
    adapter: Option<PathBuf>,
    /// tokenizer.json, tokenizer.model, or the folder that holds it [default: the checkpoint's].
    #[arg(long, value_name = "PATH", aliases = ["tokenizer-path", "tokenizer-name"])]
    tokenizer: Option<PathBuf>,
    /// Text to continue.
    #[arg(long, value_name = "TEXT", conflicts_with = "prompt_file")]
    prompt: Option<String>,
    /// File with the text to continue, taken as it is, with its last line break.
    #[arg(long, value_name = "FILE")]
    prompt_file: Option<PathBuf>,
    /// Tokens to write at most [default: 128].
    #[arg(long, value_name = "TOKENS", alias = "generate-max-len")]
    max_gen_len: Option<usize>,
    #[command(flatten)]
    #[serde(flatten)]
    sampling: SamplingArgs,
    /// Seed of the random numbers; the same seed gives the same text [default: 0].
    #[arg(long, value_name = "NUMBER")]
    seed: Option<u64>,
    /// Text that ends the continuation, and is its last part, \n for a newline; may be given more than
    /// once.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    stop: Vec<String>,
    /// auto, cpu, cuda or cuda:N; auto is a GPU where there is one [default: auto].
    #[arg(long)]
    device: Option<String>,
    /// Kind to compute in: auto, f32, bf16 or f16; auto is f32 on a CPU and the stored one on a GPU
    /// [default: auto].
    #[arg(long)]
    dtype: Option<String>,
    /// Bits of the linear layers: 4 keeps those that `llama quantize` has stored in NF4 as they are, in
    /// an eighth of the memory of f32, and 16 dequantises them into --dtype when they are loaded
    /// [default: as the checkpoint is stored; 16 on a GPU].
    #[arg(long, value_name = "BITS")]
    bits: Option<u8>,
    /// Threads of each process [default: the cores of the node, dealt out to its processes].
    #[arg(long, value_name = "COUNT")]
    threads: Option<NonZeroUsize>,
    /// Processes that the model is split over; must be all of them [default: all].
    #[arg(long, value_name = "COUNT")]
    tp: Option<usize>,
}

#[derive(Debug, Serialize)]
struct CompleteConfig {
    checkpoint: PathBuf,
    #[serde(skip_serializing_if = "Option::is_none")]
    adapter: Option<PathBuf>,
    tokenizer: PathBuf,
    prompt: String,
    max_gen_len: usize,
    #[serde(flatten)]
    sampling: SamplingArgs,
    seed: u64,
    stop: Vec<String>,
    device: String,
    dtype: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    bits: Option<u8>,
    #[serde(skip_serializing_if = "Option::is_none")]
    threads: Option<NonZeroUsize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tp: Option<usize>,
}

impl TryFrom<CompleteArgs> for CompleteConfig {
    type Error = Error;

    fn try_from(args: CompleteArgs) -> Result<Self, Error> {
        let checkpoint = required(args.checkpoint, "checkpoint")?;
        let prompt = match (args.prompt, args.prompt_file) {
            (Some(_), Some(_)) => {
                return Err(Error::usage("give prompt or prompt_file, not both"));
            }
            (prompt, None) => required(prompt, "prompt")?,
            (None, Some(path)) => fs::read_to_string(&path)
                .map_err(|error| Error::usage(format!("{}: {error}", path.display())))?,
        };
        Ok(Self {
            tokenizer: args.tokenizer.unwrap_or_else(|| checkpoint.clone()),
            checkpoint,
            adapter: args.adapter,
            prompt,
            max_gen_len: args.max_gen_len.unwrap_or(128),
            sampling: args.sampling.resolved()?,
            seed: args.seed.unwrap_or(0),
            stop: stop_strings(&args.stop),
            device: args.device.unwrap_or_else(|| "auto".into()),
            dtype: args.dtype.unwrap_or_else(|| "auto".into()),
            bits: args.bits,
            threads: args.threads,
            tp: args.tp,
        })
    }
}

pub(super) fn run(args: CompleteArgs, common: &Common) -> anyhow::Result<()> {
    let launch = launch()?;
    let world = launch.world();
    init_logging(world.rank(), world.world_size(), common.verbosity());
    let done = launch.run(|launch| -> anyhow::Result<Done> {
        let config = CompleteConfig::try_from(layered("complete", &SUBCOMMANDS, args, common)?)?;
        if common.print_config {
            if launch.world().rank() == 0 {
                print_config("complete", &config)?;
            }
            return Ok(Done::All);
        }
        complete(&config, launch)
    })?;
    match done {
        Done::All => Ok(()),
        Done::Stopped(tokens) => {
            Err(Error::stopped(format!("stopped after {tokens} tokens")).into())
        }
    }
}

/// How a run ended, the same on all ranks.
enum Done {
    All,
    Stopped(u64),
}

fn complete(config: &CompleteConfig, launch: &Launch) -> anyhow::Result<Done> {
    let world = launch.world();
    let tp = config.tp.unwrap_or(world.world_size());
    if tp != world.world_size() {
        bail!("--tp {tp}, but {} processes were started", world.world_size());
    }
    tch::set_num_threads(threads(config.threads, launch)?);
    let stop = StopFlag::install()?;

    let checkpoint = Checkpoint::open(&config.checkpoint)?;
    let tokenizer = Tokenizer::open(&config.tokenizer)?;
    check_tokenizer(checkpoint.config(), &tokenizer)
        .with_context(|| config.tokenizer.display().to_string())?;
    let adapter = config.adapter.as_ref().map(AdapterFile::open).transpose()?;
    agree(config, &checkpoint, adapter.as_ref(), &tokenizer, world)?;
    let tokens = tokenizer.encode_with_bos(&config.prompt);
    if tokens.is_empty() {
        bail!("the prompt is empty");
    }
    let device = select_device(&config.device, launch.local_rank(), world)?;
    let kind = select_kind(&config.dtype, device, checkpoint.dtype())?;
    let nf4 = select_nf4(config.bits, device, checkpoint.stores_nf4())?;
    let options = LoadOptions { device, kind, pack: true, nf4, tp_rank: world.rank(), tp };
    let mut model = Llama::load(&checkpoint, &options)?;
    if let Some(adapter) = &adapter {
        model.attach(adapter)?;
    }
    tracing::info!(
        tokens = tokens.len(),
        ?device,
        ?kind,
        nf4,
        tp,
        "{} is loaded",
        config.checkpoint.display()
    );
    let context = usize::try_from(checkpoint.config().max_position_embeddings)?;
    let engine_config = EngineConfig {
        max_batch_size: 1,
        max_seq_len: context.min(tokens.len().saturating_add(config.max_gen_len)).max(2),
        max_gen_len: config.max_gen_len,
        sampling: config.sampling.sampling()?,
        stop_strings: config.stop.clone(),
        eos_token_ids: eos_token_ids(&config.checkpoint, &tokenizer)?,
        ..EngineConfig::default()
    };
    let group = world.for_device(device)?;
    let mut engine = Engine::new(&model, &tokenizer, group.as_ref(), engine_config)?;
    let request = Request { id: "prompt".into(), tokens, seed: config.seed };
    let statistics = print(&mut engine, request, &stop, world)?;
    tracing::info!(
        "{} tokens, {:.1} a second behind the prompt, which took {:.2} s",
        statistics.output_tokens,
        statistics.decode_tokens as f64 / statistics.decode_seconds.max(1e-9),
        statistics.prefill_seconds
    );
    Ok(if stop.is_set() || (statistics.stopped && world.rank() > 0) {
        Done::Stopped(statistics.output_tokens)
    } else {
        Done::All
    })
}

/// Runs one request and prints its text as it comes.
fn print(
    engine: &mut Engine<'_>,
    request: Request,
    stop: &StopFlag,
    world: &dyn Communicator,
) -> anyhow::Result<Statistics> {
    let visible = world.rank() == 0;
    let mut request = Some(request);
    let mut stdout = io::stdout().lock();
    let mut rejected = None;
    let mut written = Ok(());
    let statistics = engine.run(&mut || request.take(), &mut |event| {
        match event {
            Event::Token { text, .. } if visible => {
                written = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
            }
            Event::Rejected { reason, .. } => rejected = Some(reason),
            Event::Failed { id, position } => {
                rejected = Some(crate::Error::NonFiniteLogits { id, position }.to_string());
            }
            Event::Token { .. } | Event::Finished(_) => {}
        }
        if stop.is_set() || written.is_err() {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    })?;
    if let Some(reason) = rejected {
        return Err(anyhow!(reason));
    }
    match written {
        // The reader has seen enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
        written => written.context("stdout")?,
    }
    // Alone, because mpirun makes a pipe look like a terminal.
    if world.world_size() == 1 && stdout.is_terminal() {
        writeln!(stdout)?;
    }
    Ok(statistics)
}

/// Ranks with other settings or weights would compute nonsense together, or wait for ever. Where a
/// rank has its files and on what it computes is its own affair.
///
/// Every rank must call this.
fn agree(
    config: &CompleteConfig,
    checkpoint: &Checkpoint,
    adapter: Option<&AdapterFile>,
    tokenizer: &Tokenizer,
    world: &dyn Communicator,
) -> anyhow::Result<()> {
    if world.world_size() == 1 {
        return Ok(());
    }
    let values = [
        ("version", env!("CARGO_PKG_VERSION").to_owned()),
        ("the checkpoint's fingerprint", checkpoint.fingerprint()?),
        ("the adapter's fingerprint", adapter.map_or(Ok("none".into()), AdapterFile::fingerprint)?),
        ("the tokenizer's fingerprint", tokenizer.fingerprint().to_owned()),
        ("the prompt", config.prompt.clone()),
        ("max_gen_len", config.max_gen_len.to_string()),
        ("sampling", serde_json::to_string(&config.sampling)?),
        ("seed", config.seed.to_string()),
        ("stop", format!("{:?}", config.stop)),
        ("dtype", config.dtype.clone()),
        ("bits", format!("{:?}", config.bits)),
    ];
    Ok(check_agreements(world, &values.map(|(name, value)| (name.to_owned(), value)))?)
}

/// The threads of this process. Every rank must call this.
fn threads(wanted: Option<NonZeroUsize>, launch: &Launch) -> anyhow::Result<i32> {
    let cores = thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let local_rank = u32::try_from(launch.local_rank())?.to_le_bytes();
    let local_ranks = launch.world().all_gather_bytes(&local_rank)?;
    let highest = local_ranks
        .iter()
        .filter_map(|bytes| Some(u32::from_le_bytes(bytes.as_slice().try_into().ok()?)))
        .max()
        .unwrap_or(0);
    let share = (cores / (highest as usize + 1)).max(1);
    Ok(i32::try_from(wanted.map_or(share, NonZeroUsize::get))?)
}
