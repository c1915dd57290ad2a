//! Answers prompts behind the principles and appends them to a file as they finish.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::PathBuf;

use dromedary_command::{Error as CommandError, Progress, StopFlag};
use dromedary_llama::cli::SamplingArgs;
use dromedary_llama::generation::{Engine, EngineConfig, PrefixCache, PrefixUse, Statistics};
use dromedary_llama::{
    Checkpoint, Dtype, Llama, LlamaConfig, LoadOptions, check_tokenizer, eos_token_ids,
    select_kind, select_nf4,
};
use dromedary_parallel::{
    Communicator, Error as ParallelError, ParallelDims, WorkQueue, check_agreements, select_device,
};
use dromedary_tokenizer::Tokenizer;
use serde::Serialize;
use serde_json::Value;
use tch::Tensor;

use crate::live::{Live, Pulse};
use crate::metrics::Follower;
use crate::output::{Fixed, Output, Settings};
use crate::rows::{RowCounts, Rows, Source};
use crate::shards::metrics_path;
use crate::work::{Place, Task, Work};
use crate::{Error, Form, MetaPrompt, Result, Template};

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
    /// Rows; see [`shard_path`](crate::shard_path) for the name of a group's file.
    pub output_file: PathBuf,
    /// What the model is asked with.
    pub template: Form,
    /// Principles or text of the prompt; the built-in one of the template where absent.
    pub meta_prompt_file: Option<PathBuf>,
    /// Use the first prompts of the input only.
    pub limit: Option<usize>,
    /// This job's part of the input.
    pub group_rank: usize,
    /// Jobs that share the input.
    pub group_size: usize,
    /// Ranks that hold one model together; all of them where absent. More ranks are more groups.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tp: Option<usize>,
    /// Share of the input's rows that may be no prompts.
    pub max_bad_rows: f64,
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
    /// 4 keeps linear layers that are stored in NF4 as they are, 16 dequantises them; as stored where
    /// absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bits: Option<u8>,
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
            ("tp", self.tp.unwrap_or(1)),
        ] {
            if value == 0 {
                return usage(format!("--{flag} is 0, it must be at least 1"));
            }
        }
        if !(0.0..=1.0).contains(&self.max_bad_rows) {
            return usage(format!("--max-bad-rows {} is no share from 0 to 1", self.max_bad_rows));
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

    /// Tokens that a row may have behind a prefix of so many.
    ///
    /// # Errors
    /// [`Error::PrefixTooLong`] and [`Error::PrefixFillsContext`].
    pub(crate) fn room_behind(&self, prefix: usize, model: &LlamaConfig) -> Result<usize> {
        let (tokens, limit) = (prefix, self.max_shared_seq_len);
        if tokens > limit {
            return Err(Error::PrefixTooLong { tokens, limit });
        }
        let context = model.max_position_embeddings as usize;
        let left = context.saturating_sub(prefix);
        // A token of the prompt, and one of the answer.
        if left < 2 {
            return Err(Error::PrefixFillsContext { tokens, context });
        }
        if left < self.max_seq_len {
            tracing::warn!(
                "rows get up to {left} tokens, not --max-seq-len {}: the prompt before the user's text has \
                 {prefix} and the model's context {context}",
                self.max_seq_len
            );
        }
        Ok(left.min(self.max_seq_len).min(self.max_kv_tokens.unwrap_or(usize::MAX)))
    }
}

/// What a run of [`generate`] did, on all ranks together; the same on all of them.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct GenerateReport {
    /// The rows of the first group; see [`shard_path`](crate::shard_path) for those of the others.
    pub output_file: PathBuf,
    /// Groups that shared the work.
    pub groups: usize,
    /// Prompts of this job.
    pub prompts: usize,
    /// Those that had a row when the run began.
    pub done_before: usize,
    /// Rows that were answered now.
    pub answered: usize,
    /// Rows that were rejected now.
    pub rejected: usize,
    /// Rows that were answered now and made to begin with `force_prefix`.
    pub forced: usize,
    /// A signal ended the run before the last row; the same call continues.
    pub stopped: bool,
    /// What the engine of this rank's group counted; absent where nothing was left to do.
    pub statistics: Option<Statistics>,
}

/// Answers the prompts of this job that have no row yet in any file of the generation.
///
/// Rows are appended as they finish, each a whole line; a run that ends early, by a signal or by a
/// crash, is continued by the same call or by one with another number of groups. When all are there
/// a `.done` file with count and hash is written beside each file. Every rank of `world` must call
/// this: `tp` of them run one model together, and such groups take prompts from one queue. Rank 0
/// reads, and the first rank of each group writes; `local_rank` chooses a rank's device among those of
/// its node.
///
/// # Errors
/// What cannot be read or written by name; [`Error::PrefixTooLong`]; [`Error::PrefixFillsContext`];
/// [`Error::OtherSettings`] where the output was begun with others; [`Error::OtherGroups`]. Neither a prompt that cannot be
/// answered is an error (it gets a row that says why) nor a stop, which is the same on all ranks.
pub fn generate(
    config: &GenerateConfig,
    world: &dyn Communicator,
    local_rank: usize,
    stop: &StopFlag,
    show_progress: bool,
) -> Result<GenerateReport> {
    let tp = config.tp.unwrap_or(world.world_size());
    let place = Place { world, dims: ParallelDims::new(world.world_size(), tp)? };
    let meta_prompt = MetaPrompt::open_as(config.template, config.meta_prompt_file.as_deref())?;
    let template = Template::new(&meta_prompt);
    let tokenizer = Tokenizer::open(&config.tokenizer)?;
    let prefix = template.shared_prefix(&tokenizer);
    let checkpoint = Checkpoint::open(&config.checkpoint)?;
    check_tokenizer(checkpoint.config(), &tokenizer)?;
    config.room_behind(prefix.len(), checkpoint.config())?;
    let load = load_options(config, &checkpoint, &place, local_rank)?;
    let settings = settings_of(config, &meta_prompt, &checkpoint, &tokenizer, &load)?;
    agree(config, &settings, world)?;
    let Work { prompts, left, mut output } = Work::shared(config, &settings, &place)?;
    let mut report = GenerateReport {
        output_file: config.shard(&place, 0),
        groups: place.dims.dp,
        prompts,
        done_before: prompts - left.len(),
        answered: 0,
        rejected: 0,
        forced: 0,
        stopped: false,
        statistics: None,
    };
    if !left.is_empty() {
        let path = report.output_file.display();
        let (count, tokens) = (left.len(), prefix.len());
        tracing::info!("{count} of {prompts} prompts to answer behind {tokens} tokens -> {path}");
        let model = Llama::load(&checkpoint, &load)?;
        if model.keeps_nf4() {
            tracing::info!(megabytes = model.nf4_bytes() >> 20, "linear layers stay in four bits");
        }
        let run = Run { config, template, tokenizer, settings, prefix, place, model };
        let answered = run.answer(&left, output, stop, show_progress)?;
        output = answered.output;
        report.add(&answered.counts, &place)?;
        report.statistics = Some(answered.statistics);
        report.stopped = report.done_before + report.answered + report.rejected < report.prompts;
    }
    if let Some(output) = output.filter(|_| !report.stopped) {
        // The prompts of all groups stand in the file of the first one.
        output.finish(if world.rank() == 0 { prompts } else { 0 })?;
    }
    Ok(report)
}

/// All that answering takes.
struct Run<'a> {
    config: &'a GenerateConfig,
    template: Template,
    tokenizer: Tokenizer,
    settings: Settings,
    prefix: Vec<u32>,
    place: Place<'a>,
    model: Llama,
}

/// What this rank's group did; its rows are on the disk.
struct Answered {
    output: Option<Output>,
    counts: RowCounts,
    statistics: Statistics,
}

impl Run<'_> {
    /// Takes prompts from the queue of all groups and answers them, until none is left or the group
    /// stops. Every rank must call this.
    fn answer(
        &self,
        left: &[Task],
        output: Option<Output>,
        stop: &StopFlag,
        show_progress: bool,
    ) -> Result<Answered> {
        let Self { config, place, .. } = self;
        let group = place.dims.tp_group(place.world)?.for_device(self.model.device())?;
        let group = group.as_ref();
        let queue = RefCell::new(WorkQueue::new(place.world, group, left.len())?);
        let pulse = Pulse::default();
        let source = Source {
            config,
            template: &self.template,
            tokenizer: &self.tokenizer,
            tasks: left,
            queue: &queue,
            pulse: &pulse,
        };
        let engine_config = engine_config(config, &self.settings, &self.tokenizer, left.len())?;
        let live = live(config, place, &pulse, left.len(), &engine_config, show_progress);
        let mut engine = Engine::new(&self.model, &self.tokenizer, group, engine_config)?;
        pin(&mut engine, &self.prefix, config, &self.settings)?;
        engine.on_step(|| on_step(&pulse, &queue, group, stop));
        let mut rows = Rows::new(source, output, live);
        let statistics = rows.run(&mut engine)?;
        let (output, counts) = rows.end(&statistics)?;
        drop(engine);
        finish_queue(queue, pulse.stop.get())?;
        Ok(Answered { output, counts, statistics })
    }
}

/// What each step of the engine begins with, on every rank of the group at once.
fn on_step(
    pulse: &Pulse,
    queue: &RefCell<WorkQueue<'_>>,
    group: &dyn Communicator,
    stop: &StopFlag,
) -> dromedary_llama::Result<()> {
    if pulse.failed.get() {
        // The rows have the reason; the others of the group hear of it when the job ends.
        return Err(ParallelError::Aborted { message: "a row was not written".to_owned() }.into());
    }
    pulse.step();
    queue.borrow_mut().poll()?;
    let mut wish = stop.is_set();
    if group.world_size() > 1 {
        // A rank that admitted a row which another one leaves out would compute something else.
        let mut wishes = Tensor::from_slice(&[i64::from(wish)]);
        group.all_reduce_max(&mut wishes)?;
        wish = i64::try_from(&wishes)? > 0;
    }
    pulse.stop.set(wish);
    Ok(())
}

/// Nobody gets more rows where rank 0 stops.
fn finish_queue(queue: RefCell<WorkQueue<'_>>, stop: bool) -> Result<()> {
    let mut queue = queue.into_inner();
    if stop {
        queue.close();
    }
    Ok(queue.finish()?)
}

impl GenerateReport {
    /// Adds what each group did. Returns when all of them have ended; every rank must call this.
    fn add(&mut self, own: &RowCounts, place: &Place<'_>) -> Result<()> {
        let mut of_groups = vec![*own];
        if place.dims.dp > 1 {
            place.world.wait_for_all()?;
            let own = if place.leads() { *own } else { RowCounts::default() };
            let own = serde_json::to_vec(&own).map_err(Error::Exchange)?;
            of_groups = place
                .world
                .all_gather_bytes(&own)?
                .iter()
                .map(|counts| serde_json::from_slice(counts).map_err(Error::Exchange))
                .collect::<Result<_>>()?;
        }
        for counts in of_groups {
            self.answered += counts.answered;
            self.rejected += counts.rejected;
            self.forced += counts.forced;
        }
        Ok(())
    }
}

fn settings_of(
    config: &GenerateConfig,
    meta_prompt: &MetaPrompt,
    checkpoint: &Checkpoint,
    tokenizer: &Tokenizer,
    load: &LoadOptions,
) -> Result<Settings> {
    let stop = match config.stop.as_slice() {
        [] => meta_prompt.principles.stop_strings.clone(),
        given => given.to_vec(),
    };
    Ok(Settings {
        checkpoint: checkpoint.fingerprint()?,
        tokenizer: tokenizer.fingerprint().to_owned(),
        meta_prompt: blake3_of(&meta_prompt.text),
        thoughts: meta_prompt.principles.cues.thoughts.clone(),
        stop,
        sampling: changed(&config.sampling)?,
        force_prefix: config.force_prefix.clone(),
        deterministic: config.deterministic.then(|| Fixed {
            max_batch_size: config.max_batch_size,
            threads: tch::get_num_threads(),
            tp: load.tp,
            is_cuda: load.device.is_cuda(),
        }),
        dtype: Dtype::of_kind(load.kind).map(|dtype| dtype.to_string()),
        nf4: load.nf4,
        max_seq_len: config.max_seq_len,
        max_gen_len: config.max_gen_len,
        seed: config.seed,
    })
}

fn engine_config(
    config: &GenerateConfig,
    settings: &Settings,
    tokenizer: &Tokenizer,
    rows: usize,
) -> Result<EngineConfig> {
    let most = if config.deterministic { config.max_batch_size } else { rows };
    Ok(EngineConfig {
        max_batch_size: config.max_batch_size.min(most),
        max_kv_tokens: config.max_kv_tokens,
        prefix_use: PrefixUse::Shared,
        deterministic: config.deterministic,
        max_seq_len: config.max_seq_len,
        max_gen_len: config.max_gen_len,
        sampling: config.sampling.sampling()?,
        stop_strings: settings.stop.clone(),
        eos_token_ids: eos_token_ids(&config.checkpoint, tokenizer)?,
    })
}

/// Rank 0 shows the rows of all groups.
fn live<'a>(
    config: &GenerateConfig,
    place: &Place<'_>,
    pulse: &'a Pulse,
    rows: usize,
    engine: &EngineConfig,
    show_progress: bool,
) -> Live<'a> {
    let visible = show_progress && place.world.rank() == 0;
    let progress = Progress::new(Some(rows as u64), "rows", visible);
    let others = if visible { 1..place.dims.dp } else { 0..0 };
    let metrics = |group| Follower::at_end(metrics_path(&config.shard(place, group)));
    Live::new(pulse, progress, engine.max_batch_size, others.map(metrics).collect())
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

fn load_options(
    config: &GenerateConfig,
    checkpoint: &Checkpoint,
    place: &Place<'_>,
    local_rank: usize,
) -> Result<LoadOptions> {
    let device = select_device(&config.device, local_rank, place.world)?;
    Ok(LoadOptions {
        device,
        kind: select_kind(&config.dtype, device, checkpoint.dtype())?,
        pack: true,
        nf4: select_nf4(config.bits, device, checkpoint.stores_nf4())?,
        tp_rank: place.dims.tp_rank(place.world.rank()),
        tp: place.dims.tp,
    })
}
