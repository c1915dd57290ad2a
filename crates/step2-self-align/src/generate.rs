//! Answers prompts behind the principles and appends them to a file as they finish.

use std::collections::BTreeMap;
use std::path::PathBuf;

use dromedary_command::{Error as CommandError, Progress, StopFlag};
use dromedary_llama::cli::SamplingArgs;
use dromedary_llama::generation::{Engine, EngineConfig, PrefixCache, PrefixUse, Statistics};
use dromedary_llama::{
    Checkpoint, Llama, LoadOptions, check_tokenizer, eos_token_ids, select_kind,
};
use dromedary_parallel::{Communicator, check_agreements, select_device};
use dromedary_records::{Prompt, read_prompts};
use dromedary_tokenizer::Tokenizer;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::output::{Fixed, Output, Settings};
use crate::rows::Rows;
use crate::shards::shard_path;
use crate::{Error, MetaPrompt, Result, Template};

/// Settings of [`generate`].
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct GenerateConfig {
    /// Folder of the model.
    pub checkpoint: PathBuf,
    /// Tokenizer file or folder.
    pub tokenizer: PathBuf,
    /// Prompts.
    pub input_file: PathBuf,
    /// Rows; see [`shard_path`] for the name of a group's file.
    pub output_file: PathBuf,
    /// Principles or text of the prompt; the built-in principles where absent.
    pub meta_prompt_file: Option<PathBuf>,
    /// Use the first prompts of the input only.
    pub limit: Option<usize>,
    /// This group.
    pub group_rank: usize,
    /// Groups that share the input.
    pub group_size: usize,
    /// Tokens of a row behind the shared prefix.
    pub max_seq_len: usize,
    /// Tokens of the shared prefix at most.
    pub max_shared_seq_len: usize,
    /// Tokens that are generated for a row at most.
    pub max_gen_len: usize,
    /// Rows that are generated at once.
    pub max_batch_size: usize,
    /// Tokens of all rows whose keys and values are held at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_kv_tokens: Option<usize>,
    /// Folder that keeps the shared prefix's keys and values.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefix_cache: Option<PathBuf>,
    /// Make a row's text depend on no other row.
    pub deterministic: bool,
    /// How tokens are chosen.
    #[serde(flatten)]
    pub sampling: SamplingArgs,
    /// Text that each answer is made to begin with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub force_prefix: Option<String>,
    /// Texts that end a row; those of the principles where empty.
    pub stop: Vec<String>,
    /// Seed of the random numbers.
    pub seed: u64,
    /// `auto`, `cpu`, `cuda` or `cuda:N`.
    pub device: String,
    /// `auto`, `f32`, `bf16` or `f16`.
    pub dtype: String,
    /// Threads of libtorch; all cores where absent.
    pub threads: Option<usize>,
    /// Take over the output although another process seems to write it.
    pub break_lock: bool,
}

impl GenerateConfig {
    /// Whether the settings agree with each other.
    pub(crate) fn check(&self) -> std::result::Result<(), CommandError> {
        let usage = |message: String| Err(CommandError::usage(message));
        let Self { group_rank, group_size, max_seq_len, max_gen_len, .. } = *self;
        if group_rank >= group_size {
            return usage(format!(
                "--group-rank {group_rank} is not below --group-size {group_size}"
            ));
        }
        for (flag, value) in [
            ("max-batch-size", self.max_batch_size),
            ("max-gen-len", max_gen_len),
            ("limit", self.limit.unwrap_or(1)),
            ("threads", self.threads.unwrap_or(1)),
        ] {
            if value == 0 {
                return usage(format!("--{flag} is 0, it must be at least 1"));
            }
        }
        if max_gen_len >= max_seq_len {
            return usage(format!(
                "--max-gen-len {max_gen_len} leaves no room for a prompt in --max-seq-len \
                 {max_seq_len}"
            ));
        }
        let needed = self.max_batch_size.saturating_mul(max_seq_len);
        match self.max_kv_tokens {
            Some(tokens) if tokens <= max_gen_len => usage(format!(
                "--max-kv-tokens {tokens} leaves no room for a prompt with --max-gen-len \
                 {max_gen_len}"
            )),
            Some(tokens) if self.deterministic && tokens < needed => usage(format!(
                "--max-kv-tokens {tokens} is too few for --deterministic, which computes all \
                 {} slots of --max-seq-len {max_seq_len}: {needed}",
                self.max_batch_size
            )),
            _ => Ok(()),
        }
    }
}

/// What a run of [`generate`] did.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct GenerateReport {
    /// The rows.
    pub output_file: PathBuf,
    /// Prompts of this group.
    pub prompts: usize,
    /// Rows that were there when the run began.
    pub done_before: usize,
    /// Rows that were answered now.
    pub answered: usize,
    /// Rows that were rejected now.
    pub rejected: usize,
    /// Rows that were answered now and made to begin with `force_prefix`.
    pub forced: usize,
    /// A signal ended the run before the last row; the same call continues.
    pub stopped: bool,
    /// What the engine counted; absent where nothing was left to do.
    pub statistics: Option<Statistics>,
}

/// Answers the prompts of this group that have no row yet.
///
/// Rows are appended as they finish, each a whole line; a run that ends early, by a signal or by a
/// crash, is continued by the same call. When all are there a `.done` file with count and hash is
/// written. Every rank of `comm` must call this: they run one model together, and rank 0 reads
/// and writes; `local_rank` chooses a rank's device among those of its node.
///
/// # Errors
/// What cannot be read or written by name; [`Error::PrefixTooLong`]; [`Error::OtherSettings`]
/// where the output was begun with others. Neither a prompt that cannot be answered is an error (it
/// gets a row that says why) nor a stop, which is the same on all ranks.
pub fn generate(
    config: &GenerateConfig,
    comm: &dyn Communicator,
    local_rank: usize,
    stop: &StopFlag,
    show_progress: bool,
) -> Result<GenerateReport> {
    let meta_prompt = MetaPrompt::open(config.meta_prompt_file.as_deref())?;
    let template = Template::new(&meta_prompt);
    let tokenizer = Tokenizer::open(&config.tokenizer)?;
    let prefix = template.shared_prefix(&tokenizer);
    if prefix.len() > config.max_shared_seq_len {
        return Err(Error::PrefixTooLong {
            tokens: prefix.len(),
            limit: config.max_shared_seq_len,
        });
    }
    let checkpoint = Checkpoint::open(&config.checkpoint)?;
    check_tokenizer(checkpoint.config(), &tokenizer)?;
    let stop_strings = match config.stop.as_slice() {
        [] => meta_prompt.principles.stop_strings.clone(),
        given => given.to_vec(),
    };
    let settings = Settings {
        checkpoint: checkpoint.fingerprint()?,
        tokenizer: tokenizer.fingerprint().to_owned(),
        meta_prompt: blake3_of(&meta_prompt.text),
        thoughts: meta_prompt.principles.cues.thoughts.clone(),
        stop: stop_strings.clone(),
        sampling: changed(&config.sampling)?,
        force_prefix: config.force_prefix.clone(),
        deterministic: config.deterministic.then(|| Fixed {
            max_batch_size: config.max_batch_size,
            threads: tch::get_num_threads(),
            tp: comm.world_size(),
        }),
        max_seq_len: config.max_seq_len,
        max_gen_len: config.max_gen_len,
        seed: config.seed,
    };
    agree(config, &settings, comm)?;
    let mut work = Work::shared(config, &settings, comm)?;
    let mut report = GenerateReport {
        output_file: shard_path(&config.output_file, config.group_rank, config.group_size),
        prompts: work.prompts,
        done_before: work.prompts - work.left.len(),
        answered: 0,
        rejected: 0,
        forced: 0,
        stopped: false,
        statistics: None,
    };
    if !work.left.is_empty() {
        tracing::info!(
            "{} of {} prompts to answer behind a shared prefix of {} tokens -> {}",
            work.left.len(),
            work.prompts,
            prefix.len(),
            report.output_file.display()
        );
        let progress =
            Progress::new(Some(work.left.len() as u64), "rows", show_progress && comm.rank() == 0);
        let model = load(config, &checkpoint, comm, local_rank)?;
        let engine_config = EngineConfig {
            max_batch_size: if config.deterministic {
                config.max_batch_size
            } else {
                config.max_batch_size.min(work.left.len())
            },
            max_kv_tokens: config.max_kv_tokens,
            prefix_use: PrefixUse::Shared,
            deterministic: config.deterministic,
            max_seq_len: config.max_seq_len,
            max_gen_len: config.max_gen_len,
            sampling: config.sampling.sampling()?,
            stop_strings,
            eos_token_ids: eos_token_ids(&config.checkpoint, &tokenizer)?,
        };
        let mut engine = Engine::new(&model, &tokenizer, comm, engine_config)?;
        pin(&mut engine, &prefix, config, &settings)?;
        let mut rows = Rows::new(config, &template, &tokenizer, work.left, work.output.take());
        let statistics = rows.run(&mut engine, stop, &progress)?;
        progress.finish();
        report.answered = rows.answered;
        report.rejected = rows.rejected;
        report.forced = rows.forced;
        report.statistics = Some(statistics);
        report.stopped = statistics.stopped;
        work.output = rows.output;
    }
    match work.output {
        Some(output) if report.stopped => output.close()?,
        Some(output) => output.finish()?,
        None => {}
    }
    Ok(report)
}

fn blake3_of(text: &str) -> String {
    blake3::hash(text.as_bytes()).to_hex().to_string()
}

fn pin(
    engine: &mut Engine<'_>,
    prefix: &[u32],
    config: &GenerateConfig,
    settings: &Settings,
) -> Result<()> {
    let Some(dir) = &config.prefix_cache else { return Ok(engine.pin_prefix(prefix)?) };
    let model = format!("{} {}", settings.checkpoint, settings.tokenizer);
    let taken = engine.pin_prefix_cached(prefix, &PrefixCache { dir: dir.clone(), model })?;
    if taken {
        tracing::info!("the shared prefix was taken from {}", dir.display());
    }
    Ok(())
}

/// Temperature and nucleus, and what else differs from the default: rows that were made before
/// there was a setting had its default.
fn changed(sampling: &SamplingArgs) -> Result<BTreeMap<String, Value>> {
    let object = |args: &SamplingArgs| -> Result<BTreeMap<String, Value>> {
        let value = serde_json::to_value(args).map_err(Error::Exchange)?;
        serde_json::from_value(value).map_err(Error::Exchange)
    };
    let default = object(&SamplingArgs::default().resolved()?)?;
    let always = ["temperature", "top_p"];
    let mut settings = object(sampling)?;
    settings.retain(|name, value| always.contains(&&**name) || default.get(name) != Some(value));
    Ok(settings)
}

/// Settings in which ranks may differ: where each has its files, whose contents are compared, and
/// on what it computes.
const OWN: [&str; 6] =
    ["break_lock", "checkpoint", "device", "meta_prompt_file", "threads", "tokenizer"];

/// Ranks with other settings or weights would write nonsense together, or wait for ever.
///
/// Every rank of `comm` must call this.
fn agree(config: &GenerateConfig, settings: &Settings, comm: &dyn Communicator) -> Result<()> {
    if comm.world_size() == 1 {
        return Ok(());
    }
    let config = serde_json::to_value(config).map_err(Error::Exchange)?;
    let settings = serde_json::to_value(settings).map_err(Error::Exchange)?;
    let shared = config.as_object().into_iter().flatten();
    let shared = shared.filter(|(key, _)| !OWN.contains(&key.as_str()));
    let values: Vec<(String, String)> = settings
        .as_object()
        .into_iter()
        .flatten()
        .chain(shared)
        .map(|(key, value)| (key.clone(), value.to_string()))
        .chain([("version".to_owned(), env!("CARGO_PKG_VERSION").to_owned())])
        .collect();
    Ok(check_agreements(comm, &values)?)
}

/// What is left to do, the same on all ranks; rank 0 alone has the output.
struct Work {
    prompts: usize,
    left: Vec<Prompt>,
    output: Option<Output>,
}

/// What rank 0 tells the others.
#[derive(Serialize)]
struct Tell<'a> {
    prompts: usize,
    left: &'a [Prompt],
}

/// The same as the others read it.
#[derive(Deserialize)]
struct Told {
    prompts: usize,
    left: Vec<Prompt>,
}

impl Work {
    /// Rank 0 reads prompts and rows and tells the others, so that all of them do the same even
    /// where a file changes under their eyes.
    ///
    /// Every rank of `comm` must call this.
    fn shared(
        config: &GenerateConfig,
        settings: &Settings,
        comm: &dyn Communicator,
    ) -> Result<Self> {
        if comm.world_size() == 1 {
            return Self::read(config, settings);
        }
        let mut own = None;
        let mut message = Vec::new();
        if comm.rank() == 0 {
            let work = Self::read(config, settings)?;
            message = serde_json::to_vec(&Tell { prompts: work.prompts, left: &work.left })
                .map_err(Error::Exchange)?;
            own = Some(work);
        }
        comm.broadcast_bytes(&mut message, 0)?;
        match own {
            Some(work) => Ok(work),
            None => {
                let Told { prompts, left } =
                    serde_json::from_slice(&message).map_err(Error::Exchange)?;
                Ok(Self { prompts, left, output: None })
            }
        }
    }

    fn read(config: &GenerateConfig, settings: &Settings) -> Result<Self> {
        let prompts = group_prompts(config)?;
        let path = shard_path(&config.output_file, config.group_rank, config.group_size);
        let output = Output::open(path, settings, config.break_lock)?;
        let count = prompts.len();
        let left: Vec<Prompt> =
            prompts.into_iter().filter(|prompt| !output.has(&prompt.id)).collect();
        if !left.is_empty() {
            output.reopen()?;
        }
        Ok(Self { prompts: count, left, output: Some(output) })
    }
}

/// Prompts `R`, `R + G`, `R + 2G`, ... of the input.
fn group_prompts(config: &GenerateConfig) -> Result<Vec<Prompt>> {
    let none = |message: String| Error::NoPrompts { path: config.input_file.clone(), message };
    let mut prompts = Vec::new();
    let mut total = 0;
    for prompt in read_prompts(&config.input_file)?.take(config.limit.unwrap_or(usize::MAX)) {
        let prompt = prompt?;
        if total % config.group_size == config.group_rank {
            prompts.push(prompt);
        }
        total += 1;
    }
    if total == 0 {
        return Err(none("holds no prompt".to_owned()));
    }
    if prompts.is_empty() {
        return Err(none(format!(
            "its {total} prompts leave none for group {} of {}",
            config.group_rank, config.group_size
        )));
    }
    Ok(prompts)
}

fn load(
    config: &GenerateConfig,
    checkpoint: &Checkpoint,
    comm: &dyn Communicator,
    local_rank: usize,
) -> Result<Llama> {
    let device = select_device(&config.device, local_rank, comm)?;
    let options = LoadOptions {
        device,
        kind: select_kind(&config.dtype, device, checkpoint.dtype())?,
        pack: true,
        tp_rank: comm.rank(),
        tp: comm.world_size(),
    };
    Ok(Llama::load(checkpoint, &options)?)
}
