//! The subcommands: settings, run, what is said at the end.

use std::io::Write as _;
use std::path::Path;

use anyhow::Context as _;
use dromedary_command::{
    Common, StopFlag, init_logging, layered, print_config, stop_or_requeue, with_environment,
};
use dromedary_llama::{LlamaConfig, generation::DETERMINISTIC_ENVIRONMENT};
use dromedary_parallel::launch;
use dromedary_self_align::{
    self as self_align, BudgetLimits, CheckArgs, CheckConfig, Finding, GenerateArgs,
    GenerateConfig, GenerateReport, MergeArgs, MergeConfig, MetaPrompt, PlanArgs, PlanConfig,
    RenderArgs, SUBCOMMANDS, StatusArgs, Template, TokenBudget,
};
use dromedary_tokenizer::Tokenizer;

pub(crate) fn generate(args: GenerateArgs, common: &Common) -> anyhow::Result<()> {
    let config = GenerateConfig::try_from(layered("generate", &SUBCOMMANDS, args, common)?)?;
    if common.print_config {
        return Ok(print_config("generate", &config)?);
    }
    if config.deterministic {
        with_environment(&DETERMINISTIC_ENVIRONMENT)?;
    }
    // Before any other call of libtorch: oneDNN asks for the number once.
    tch::set_num_threads(threads(config.threads)?);
    let stop = StopFlag::install()?;
    let (report, rank) = launch()?.run(|launch| -> anyhow::Result<(GenerateReport, usize)> {
        let world = launch.world();
        init_logging(world.rank(), world.world_size(), common.verbosity());
        if config.deterministic {
            let set = |(name, _)| format!("{name}={}", std::env::var(name).unwrap_or_default());
            tracing::info!("deterministic: {}", DETERMINISTIC_ENVIRONMENT.map(set).join(" "));
        }
        let local_rank = launch.local_rank();
        let report = self_align::generate(&config, world, local_rank, &stop, !common.quiet);
        Ok((report.map_err(with_exit_code)?, world.rank()))
    })?;
    if rank == 0 {
        say(&report);
    }
    if report.stopped {
        let rows = report.done_before + report.answered + report.rejected;
        let folder = report.output_file.parent().unwrap_or(Path::new("."));
        let (prompts, path) = (report.prompts, report.output_file.display());
        let message =
            format!("{rows} of {prompts} rows are there ({path}); the same command continues");
        stop_or_requeue(folder, rank, message)?;
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
    let template = args.template.unwrap_or_default();
    let meta_prompt = MetaPrompt::open_as(template, args.meta_prompt_file.as_deref())?;
    if let Some(path) = args.tokenizer {
        let tokenizer = Tokenizer::open(&path)?;
        let shared = Template::new(&meta_prompt).shared_prefix(&tokenizer).len();
        tracing::info!(
            "{} tokens, {shared} of them before any prompt",
            tokenizer.len_with_bos(&meta_prompt.text)
        );
    }
    print(&meta_prompt.text)
}

pub(crate) fn check(args: CheckArgs, common: &Common) -> anyhow::Result<()> {
    let config = CheckConfig::from(layered("check", &SUBCOMMANDS, args, common)?);
    if common.print_config {
        return Ok(print_config("check", &config)?);
    }
    init_logging(0, 1, common.verbosity());
    let meta_prompt = MetaPrompt::open(config.meta_prompt_file.as_deref())?;
    let context = match &config.checkpoint {
        Some(path) => Some(usize::try_from(LlamaConfig::open(path)?.max_position_embeddings)?),
        None => None,
    };
    let limits = BudgetLimits {
        max_shared_seq_len: config.max_shared_seq_len,
        max_seq_len: config.max_seq_len,
        context,
    };
    let budget = match &config.tokenizer {
        Some(path) => Some(TokenBudget::new(&meta_prompt, &Tokenizer::open(path)?, limits)),
        None => None,
    };
    let findings = self_align::check(&meta_prompt, budget.as_ref());
    let text = if config.json {
        let value = serde_json::json!({ "tokens": budget, "findings": findings });
        serde_json::to_string_pretty(&value)?
    } else {
        check_text(budget.as_ref(), &findings)
    };
    print(&text)?;
    let errors = findings.iter().filter(|finding| finding.is_error()).count();
    anyhow::ensure!(errors == 0, "{}: {errors} errors", meta_prompt.path.display());
    Ok(())
}

fn check_text(budget: Option<&TokenBudget>, findings: &[Finding]) -> String {
    let mut lines = Vec::new();
    if let Some(budget) = budget {
        let (prefix, limit) = (budget.prefix, budget.max_shared_seq_len);
        lines.push(format!("{prefix:>6} of {limit} tokens stand before a prompt"));
        lines.extend(budget.parts.iter().map(|(part, tokens)| format!("{tokens:>6}   {part}")));
    }
    for finding in findings {
        let kind = if finding.is_error() { "error" } else { "warning" };
        lines.push(format!("{kind}: {finding}"));
    }
    if findings.is_empty() {
        lines.push("nothing is wrong with them".to_owned());
    }
    lines.join("\n")
}

pub(crate) fn plan(args: PlanArgs, common: &Common) -> anyhow::Result<()> {
    let config = PlanConfig::try_from(layered("plan", &SUBCOMMANDS, args, common)?)?;
    if common.print_config {
        return Ok(print_config("plan", &config)?);
    }
    init_logging(0, 1, common.verbosity());
    print(&self_align::plan(&config)?.to_string())
}

pub(crate) fn status(args: StatusArgs, common: &Common) -> anyhow::Result<()> {
    let args = layered("status", &SUBCOMMANDS, args, common)?;
    if common.print_config {
        return Ok(print_config("status", &args)?);
    }
    init_logging(0, 1, common.verbosity());
    let generations = self_align::status(&args.folder.unwrap_or_else(|| ".".into()))?;
    if args.json.unwrap_or(false) {
        return print(&serde_json::to_string_pretty(&generations)?);
    }
    let texts: Vec<String> = generations.iter().map(ToString::to_string).collect();
    print(&texts.join("\n"))
}

fn print(text: &str) -> anyhow::Result<()> {
    writeln!(std::io::stdout(), "{text}").context("cannot write to stdout")
}

/// The exit code is told by the error of `dromedary-command`, which stands inside the library's.
fn with_exit_code(error: self_align::Error) -> anyhow::Error {
    match error {
        self_align::Error::Command(error) => error.into(),
        error => error.into(),
    }
}
