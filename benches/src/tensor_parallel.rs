//! One model over two processes against the same model in one.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Stdio,
};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use dromedary_llama::{
    Checkpoint, CheckpointWriter, DEFAULT_MAX_SHARD_SIZE, Dtype, Footprint, Llama, LlamaConfig,
    LoadOptions, Plan, Slowest, TensorSpec, generation::Statistics,
};
use dromedary_parallel::{Communicator, launch};
use dromedary_tokenizer::Tokenizer;
use tch::{Device, Kind, Tensor};

use crate::{
    decode::{Shape, decode},
    machine::on_ranks,
};

/// Name of the random model's folder beside the model that gives its other sizes.
const BALANCED: &str = "random-8-heads-4-kv-heads";
const HEADS: i64 = 8;
const KV_HEADS: i64 = 4;
const HEAD_DIM: i64 = 64;

/// The ranks of a group, and the threads of the process that they are compared with.
const TP: usize = 2;

/// Begins the line of a rank that says what it has measured.
const RESULT: &str = "result";

/// Arguments of the bench.
#[derive(Args)]
pub(crate) struct TpArgs {
    /// Model folder; the balanced random model is made beside it once.
    #[arg(long, env = "DROMEDARY_SMOLLM2", value_name = "DIR")]
    checkpoint: PathBuf,
    /// Runs of each.
    #[arg(long, default_value_t = 3)]
    runs: usize,
    #[command(flatten)]
    shape: Shape,
    /// Rows at once.
    #[arg(long, default_value_t = 32)]
    batch: usize,
}

/// Arguments of one rank.
#[derive(Args)]
pub(crate) struct RankArgs {
    #[arg(long)]
    checkpoint: PathBuf,
    #[arg(long)]
    threads: i32,
    #[arg(long)]
    batch: usize,
    #[command(flatten)]
    shape: Shape,
}

/// What a run of all ranks of a group gave.
struct Measured {
    tokens_per_second: f64,
    /// Share of the decoding time that ranks spend in collectives: the one with the most work, which
    /// waits for nobody, and the one with the least.
    in_collectives: (f64, f64),
}

pub(crate) fn run(args: &TpArgs) -> Result<()> {
    let balanced = balanced_model(&args.checkpoint)?;
    for checkpoint in [&args.checkpoint, &balanced] {
        compare(args, checkpoint)?;
    }
    Ok(())
}

fn compare(args: &TpArgs, checkpoint: &Path) -> Result<()> {
    let name = checkpoint.file_name().unwrap_or_default().to_string_lossy();
    let allowed = allowed(&Checkpoint::open(checkpoint)?, args)?;
    let (mut one, mut two) = (Vec::new(), Vec::new());
    for _ in 0..args.runs {
        one.push(measure(args, checkpoint, 1)?);
        two.push(measure(args, checkpoint, TP)?);
    }
    let best = |runs: &[Measured]| {
        runs.iter().map(|run| run.tokens_per_second).fold(f64::NEG_INFINITY, f64::max)
    };
    let all = |runs: &[Measured]| {
        let runs = runs.iter().map(|run| format!("{:.1}", run.tokens_per_second));
        runs.collect::<Vec<_>>().join(", ")
    };
    let ratio = best(&two) / best(&one);
    let batch = args.batch;
    println!(
        "| {name}, batch {batch}, tp 1, 2 threads | {:.1} tokens/s | {} |",
        best(&one),
        all(&one)
    );
    println!(
        "| {name}, batch {batch}, tp 2, 1 thread each | {:.1} tokens/s | {} | {} of the time in \
         collectives |",
        best(&two),
        all(&two),
        two.iter()
            .map(|run| {
                let (least, most) = run.in_collectives;
                format!("{:.0} to {:.0} %", least * 100.0, most * 100.0)
            })
            .collect::<Vec<_>>()
            .join(", ")
    );
    println!(
        "| {name}, ratio | {ratio:.3} | the plan allows {allowed:.3}, {:.3} of that |",
        ratio / allowed
    );
    Ok(())
}

/// The share of an even split's speed that the plan allows in the middle of the run.
fn allowed(checkpoint: &Checkpoint, args: &TpArgs) -> Result<f64> {
    let config = checkpoint.config();
    let plan = Plan::new(config, TP)?;
    let ranks: Vec<Footprint> = (0..TP)
        .map(|tp_rank| {
            let options = LoadOptions { tp_rank, tp: TP, ..LoadOptions::default() };
            Footprint::new(config, &plan, &options)
        })
        .collect();
    let context = args.shape.prefix + args.shape.suffix + args.shape.new / 2;
    let slowest = Slowest::of(&ranks, context as u64).context("a plan of no ranks")?;
    Ok(1.0 / slowest.work_over_mean)
}

/// Starts the ranks as a user does, and reads what rank 0 says.
fn measure(args: &TpArgs, checkpoint: &Path, tp: usize) -> Result<Measured> {
    let mut command = on_ranks(tp)?;
    let threads = TP / tp;
    let Shape { prefix, suffix, new, copied_prefix } = args.shape;
    command.arg("tp-rank").arg("--checkpoint").arg(checkpoint);
    for (flag, value) in [
        ("--threads", threads),
        ("--batch", args.batch),
        ("--prefix", prefix),
        ("--suffix", suffix),
        ("--new", new),
    ] {
        command.arg(flag).arg(value.to_string());
    }
    command.args(copied_prefix.then_some("--copied-prefix"));
    command.env("OMP_NUM_THREADS", threads.to_string()).stderr(Stdio::inherit());
    let output = command.output().with_context(|| format!("{command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", output.status);
    let text = String::from_utf8(output.stdout)?;
    let numbers = text.lines().find_map(|line| line.strip_prefix(RESULT)).context("no result")?;
    let numbers: Vec<f64> =
        numbers.split_whitespace().map(str::parse).collect::<std::result::Result<_, _>>()?;
    match numbers[..] {
        [tokens_per_second, least, most] => {
            Ok(Measured { tokens_per_second, in_collectives: (least, most) })
        }
        _ => bail!("`{text}` is no result"),
    }
}

pub(crate) fn run_rank(args: &RankArgs) -> Result<()> {
    tch::set_num_threads(args.threads);
    launch()?.run(|launch| {
        let world = launch.world();
        let checkpoint = Checkpoint::open(&args.checkpoint)?;
        let tokenizer = Tokenizer::open(&args.checkpoint)?;
        let (tp_rank, tp) = (world.rank(), world.world_size());
        let model =
            Llama::load(&checkpoint, &LoadOptions { tp_rank, tp, ..LoadOptions::default() })?;
        let decoded = decode(&args.shape, args.batch, &model, &tokenizer, world)?;
        report(world, &decoded.statistics)
    })
}

/// Rank 0 says how fast all were, and the least and the most time of a rank in collectives.
fn report(world: &dyn Communicator, statistics: &Statistics) -> Result<()> {
    let seconds = statistics.prefill_seconds + statistics.decode_seconds;
    let share = statistics.collective_seconds / seconds;
    // The least share is the most of its complement.
    let mut shares = Tensor::from_slice(&[share, 1.0 - share]);
    world.all_reduce_max(&mut shares)?;
    if world.rank() == 0 {
        println!(
            "{RESULT} {} {} {}",
            statistics.decode_tokens as f64 / statistics.decode_seconds,
            1.0 - shares.double_value(&[1]),
            shares.double_value(&[0])
        );
    }
    Ok(())
}

/// A random model of the size of the one in `like`, with heads that two ranks share evenly.
fn balanced_model(like: &Path) -> Result<PathBuf> {
    let folder = like.parent().unwrap_or(Path::new(".")).join(BALANCED);
    if folder.is_dir() {
        return Ok(folder);
    }
    println!("writing {}", folder.display());
    let source = Checkpoint::open(like)?;
    let text = fs::read_to_string(like.join("config.json"))?;
    let mut config: serde_json::Value = serde_json::from_str(&text)?;
    config["num_attention_heads"] = HEADS.into();
    config["num_key_value_heads"] = KV_HEADS.into();
    config["head_dim"] = HEAD_DIM.into();
    let tensors = balanced_tensors(&source, source.config())?;
    let mut writer = CheckpointWriter::create(&folder, tensors, DEFAULT_MAX_SHARD_SIZE)?;
    writer.copy_companions(like)?;
    writer.add_file("config.json", format!("{config:#}\n").as_bytes())?;
    tch::manual_seed(0);
    for tensor in writer.order().to_vec() {
        let options = (Kind::Float, Device::Cpu);
        let values = match tensor.shape.len() {
            1 => Tensor::ones(&tensor.shape[..], options),
            _ => Tensor::randn(&tensor.shape[..], options) * 0.02,
        };
        writer.append(&tensor.name, &values)?;
    }
    writer.finish()?;
    Ok(folder)
}

/// The tensors of `source`, with the attention's widths changed.
fn balanced_tensors(source: &Checkpoint, config: &LlamaConfig) -> Result<Vec<TensorSpec>> {
    source
        .names()
        .map(|name| {
            let mut shape = source.shape(name)?.to_vec();
            let (q, kv) = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM);
            match name.rsplit('.').nth(1) {
                Some("q_proj") => shape = vec![q, config.hidden_size],
                Some("k_proj" | "v_proj") => shape = vec![kv, config.hidden_size],
                Some("o_proj") => shape = vec![config.hidden_size, q],
                _ => {}
            }
            Ok(TensorSpec { name: name.to_owned(), dtype: Dtype::F32, shape })
        })
        .collect()
}
