//! The subcommands: settings, run, what is said at the end.

use std::io::Write as _;

use anyhow::Context as _;
use dromedary_command::{Common, Error, StopFlag, init_logging, layered, print_config};
use dromedary_parallel::launch;
use dromedary_self_align::{
    self as self_align, GenerateArgs, GenerateConfig, GenerateReport, MergeArgs, MergeConfig,
    MetaPrompt, RenderArgs, SUBCOMMANDS, Template,
};
use dromedary_tokenizer::Tokenizer;

pub(crate) fn generate(args: GenerateArgs, common: &Common) -> anyhow::Result<()> {
    let config = GenerateConfig::try_from(layered("generate", &SUBCOMMANDS, args, common)?)?;
    if common.print_config {
        return Ok(print_config("generate", &config)?);
    }
    // Before any other call of libtorch: oneDNN asks for the number once.
    tch::set_num_threads(threads(config.threads)?);
    let stop = StopFlag::install()?;
    let report = launch()?.run(|launch| -> anyhow::Result<GenerateReport> {
        let world = launch.world();
        init_logging(world.rank(), world.world_size(), common.verbosity());
        let local_rank = launch.local_rank();
        let report = self_align::generate(&config, world, local_rank, &stop, !common.quiet);
        report.map_err(with_exit_code)
    })?;
    say(&report);
    if report.stopped {
        let rows = report.done_before + report.answered + report.rejected;
        return Err(Error::stopped(format!(
            "{rows} of {} rows are in {}; the same command continues",
            report.prompts,
            report.output_file.display()
        ))
        .into());
    }
    Ok(())
}

fn threads(wanted: Option<usize>) -> anyhow::Result<i32> {
    let threads = match wanted {
        Some(threads) => threads,
        None => std::thread::available_parallelism().context("counting cores")?.get(),
    };
    Ok(i32::try_from(threads)?)
}

fn say(report: &GenerateReport) {
    let GenerateReport { prompts, done_before, answered, rejected, .. } = report;
    tracing::info!(
        "{answered} answered, {rejected} rejected, {done_before} done before, of {prompts} prompts"
    );
    if report.forced > 0 {
        tracing::info!("{} of these answers were made to begin with --force-prefix", report.forced);
    }
    if let Some(statistics) = &report.statistics {
        let seconds = statistics.prefill_seconds + statistics.decode_seconds;
        tracing::info!(
            "{} tokens in {seconds:.1} s ({:.1} tokens/s), {} steps, {:.1} s of it in prefill",
            statistics.output_tokens,
            statistics.output_tokens as f64 / seconds.max(f64::MIN_POSITIVE),
            statistics.decode_steps,
            statistics.prefill_seconds
        );
    }
}

pub(crate) fn merge_and_filter(args: MergeArgs, common: &Common) -> anyhow::Result<()> {
    let config = MergeConfig::try_from(layered("merge-and-filter", &SUBCOMMANDS, args, common)?)?;
    if common.print_config {
        return Ok(print_config("merge-and-filter", &config)?);
    }
    init_logging(0, 1, common.verbosity());
    let report = self_align::merge_and_filter(&config).map_err(with_exit_code)?;
    tracing::info!("{report}");
    for (source, rows) in &report.sources {
        tracing::info!("{source}: kept {}, dropped {}", rows.kept, rows.dropped);
    }
    tracing::info!("-> {}", config.output_file.display());
    Ok(())
}

pub(crate) fn render(args: RenderArgs, common: &Common) -> anyhow::Result<()> {
    let args = layered("render", &SUBCOMMANDS, args, common)?;
    if common.print_config {
        return Ok(print_config("render", &args)?);
    }
    init_logging(0, 1, common.verbosity());
    let meta_prompt = MetaPrompt::open(args.meta_prompt_file.as_deref())?;
    if let Some(path) = args.tokenizer {
        let tokenizer = Tokenizer::open(&path)?;
        let shared = Template::new(&meta_prompt).shared_prefix(&tokenizer).len();
        tracing::info!(
            "{} tokens, {shared} of them before any prompt",
            tokenizer.len_with_bos(&meta_prompt.text)
        );
    }
    writeln!(std::io::stdout(), "{}", meta_prompt.text).context("cannot write to stdout")
}

/// The exit code is told by the error of `dromedary-command`, which stands inside the library's.
fn with_exit_code(error: self_align::Error) -> anyhow::Error {
    match error {
        self_align::Error::Command(error) => error.into(),
        error => error.into(),
    }
}
