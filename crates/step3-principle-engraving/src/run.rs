//! A whole run: data, model, training loop, checkpoints, adapter.

use std::{fs, path::PathBuf};

use dromedary_command::{Progress, StopFlag};
use dromedary_files::{
    AtomicDir, JsonlAppender, Lock, LockOptions, Manifest, read_jsonl, write_atomic,
};
use dromedary_llama::{Checkpoint, Llama, LoadOptions, check_tokenizer, select_kind};
use dromedary_parallel::{Communicator, select_device};
use dromedary_tokenizer::Tokenizer;

use crate::{
    batches::Batches,
    checkpoint::{self, TrainerState},
    collate::{self, Example},
    config::{Resume, TrainConfig},
    dataset::{self, MetaPrompts},
    error::{Error, Result},
    schedule::Schedule,
    trained::Trained,
    trainer::{StepMetrics, Trainer, TrainerParts},
};

/// Name of the folder under the output folder that holds the finished adapter.
pub const ADAPTER_DIR: &str = "adapter";
const METRICS_FILE: &str = "metrics.jsonl";

/// What a finished run says.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// The adapter, in PEFT's format.
    pub adapter: PathBuf,
    /// Optimizer steps of the whole run.
    pub steps: u64,
    /// Rows that were trained on.
    pub rows: usize,
    /// The last step, where this process made one.
    pub last: Option<StepMetrics>,
}

/// Trains as `config` says on one process, going on from a checkpoint where there is one.
///
/// A stop that `stop` announces is obeyed between two steps, behind a checkpoint.
///
/// # Errors
/// See [`Error`]; [`Error::Stopped`] after such a stop.
pub fn train(config: &TrainConfig, comm: &dyn Communicator, stop: &StopFlag) -> Result<Summary> {
    let io = |source| Error::Io { path: config.output_dir.clone(), source };
    fs::create_dir_all(&config.output_dir).map_err(io)?;
    let metrics = config.output_dir.join(METRICS_FILE);
    let _lock = Lock::acquire(&metrics, &LockOptions::from_env(config.break_lock))?;
    checkpoint::sweep(&config.output_dir)?;
    let tokenizer = Tokenizer::open(&config.tokenizer)?;
    let examples = read_examples(config, &tokenizer)?;
    let base = Checkpoint::open(&config.checkpoint)?;
    check_tokenizer(base.config(), &tokenizer)?;

    let batches = Batches::new(
        config.batches.clone(),
        examples.iter().map(|example| example.input_ids.len()).collect(),
    );
    let total_steps = config.max_steps.unwrap_or_else(|| {
        (config.num_train_epochs * batches.steps_per_epoch() as f64).ceil() as u64
    });
    let schedule = Schedule::new(
        config.lr_scheduler_type,
        config.learning_rate,
        config.warmup_ratio,
        total_steps,
    );
    let device = select_device(&config.device, comm.rank(), comm)?;
    let kind = select_kind(&config.dtype, device, base.dtype())?;
    let fingerprints = format!("{} {} {kind:?}", base.fingerprint()?, tokenizer.fingerprint());
    let config_hash = config_hash(config, &fingerprints, &examples, total_steps);
    // Packed weights do not pay for the many tokens of a training batch.
    let load = LoadOptions { device, kind, pack: false, ..LoadOptions::default() };
    let mut model = Llama::load(&base, &load)?;
    let trained = Trained::attach(&mut model, &config.lora, config.adamw.clone(), config.seed)?;
    tracing::info!(
        rows = examples.len(),
        steps = total_steps,
        trained = trained.optimizer.num_parameters(),
        "training"
    );
    let (keep, examples) = (config.keep, examples.as_slice());
    let parts = TrainerParts { model: &model, trained, examples, batches, schedule, keep, comm };
    let mut trainer = Trainer::new(parts);
    if let Some(path) = resume_from(config)? {
        let load = |trained: &mut Trained| checkpoint::load(&path, trained, &config_hash);
        trainer.resume(load)?;
        tracing::info!("going on behind step {} from {}", trainer.steps_done(), path.display());
    }
    checkpoint::set_aside(&config.output_dir, trainer.steps_done())?;
    let last = Loop { config, config_hash, stop }.run(&mut trainer)?;
    let adapter = publish_adapter(config, trainer.trained())?;
    Ok(Summary { adapter, steps: total_steps, rows: examples.len(), last })
}

/// Rows as tokens. Rows that teach nothing are refused by name, or left out where asked for.
fn read_examples(config: &TrainConfig, tokenizer: &Tokenizer) -> Result<Vec<Example>> {
    let meta_prompts = MetaPrompts::open(&config.meta_prompt_pattern)?;
    let rows = dataset::read_rows(&config.dataset, config.max_train_samples)?;
    let mut examples = Vec::with_capacity(rows.len());
    let mut dropped = 0;
    for (index, row) in rows.iter().enumerate() {
        let text = dataset::source_target(row, &meta_prompts);
        let example = collate::encode(&text, tokenizer, &config.collate);
        if !row.output.trim().is_empty() && example.num_targets() > 0 {
            examples.push(example);
        } else if config.drop_empty {
            dropped += 1;
        } else {
            let (path, example_id) = (config.dataset.clone(), row.example_id);
            return Err(Error::NoTarget { path, row: index + 1, example_id });
        }
    }
    if examples.is_empty() {
        return Err(Error::EmptyDataset { path: config.dataset.clone() });
    }
    let truncated = |of: fn(&Example) -> usize| examples.iter().filter(|row| of(row) > 0).count();
    tracing::info!(
        rows = examples.len(),
        dropped,
        truncated_left = truncated(|row| row.truncated_left),
        truncated_right = truncated(|row| row.truncated_right),
        "data set"
    );
    Ok(examples)
}

/// Hash of what the steps depend on, `fingerprints` of model, tokenizer and kind among it: a checkpoint of another hash cannot be gone on from.
fn config_hash(
    config: &TrainConfig,
    fingerprints: &str,
    examples: &[Example],
    total_steps: u64,
) -> String {
    let mut hasher = blake3::Hasher::new();
    let settings = format!(
        "{:?}",
        (
            (&config.lora.r, config.lora.lora_alpha, &config.lora.target_modules),
            (&config.batches, config.learning_rate, config.lr_scheduler_type),
            (config.warmup_ratio, &config.adamw, config.seed, total_steps),
            fingerprints,
        )
    );
    hasher.update(settings.as_bytes());
    for example in examples {
        hasher.update(&(example.learn_from as u64).to_le_bytes());
        hasher.update(&(example.input_ids.len() as u64).to_le_bytes());
        for id in &example.input_ids {
            hasher.update(&id.to_le_bytes());
        }
    }
    hasher.finalize().to_hex()[..32].to_owned()
}

fn resume_from(config: &TrainConfig) -> Result<Option<PathBuf>> {
    match &config.resume {
        Resume::Auto => checkpoint::newest(&config.output_dir),
        Resume::Never => Ok(None),
        Resume::From(path) => Ok(Some(path.clone())),
    }
}

fn publish_adapter(config: &TrainConfig, trained: &Trained) -> Result<PathBuf> {
    let path = config.output_dir.join(ADAPTER_DIR);
    let dir = AtomicDir::replace_existing(&path)?;
    if let Some(adapter) = trained.adapter() {
        adapter.write_into(dir.path())?;
    }
    let manifest = Manifest::of_dir(dir.path())?;
    dir.commit(&manifest)?;
    Ok(path)
}

struct Loop<'a> {
    config: &'a TrainConfig,
    config_hash: String,
    stop: &'a StopFlag,
}

impl Loop<'_> {
    fn run(&self, trainer: &mut Trainer<'_>) -> Result<Option<StepMetrics>> {
        let mut metrics = self.open_metrics(trainer.steps_done())?;
        let total = trainer.total_steps();
        let progress = Progress::new(Some(total), "steps", true);
        progress.inc(trainer.steps_done());
        let mut last = None;
        while trainer.steps_done() < total {
            let step = trainer.train_step()?;
            metrics.append(&step)?;
            progress.inc(1);
            progress.message(format!(
                "loss {:.4}, {:.0} tokens/s",
                step.loss,
                step.tokens as f64 / step.seconds
            ));
            if step.step % self.config.logging_steps == 0 || step.step == total {
                log(&step);
            }
            let due = step.step % self.config.save_steps == 0 || step.step == total;
            if due || self.stop.is_set() {
                metrics.sync()?;
                let checkpoint = self.save(trainer)?;
                // A signal that came while the checkpoint was written needs no second one.
                if self.stop.is_set() && step.step < total {
                    return Err(Error::Stopped { step: step.step, checkpoint });
                }
            }
            last = Some(step);
        }
        progress.finish();
        Ok(last)
    }

    fn save(&self, trainer: &Trainer<'_>) -> Result<PathBuf> {
        let _saving = self.stop.critical();
        let state = TrainerState {
            position: trainer.position(),
            seed: self.config.seed,
            updates: trainer.trained().optimizer.updates(),
            config_hash: self.config_hash.clone(),
        };
        let path = checkpoint::save(&self.config.output_dir, trainer.trained(), &state)?;
        checkpoint::rotate(&self.config.output_dir, self.config.save_total_limit)?;
        Ok(path)
    }

    /// The metrics of the steps that the run goes on from; those that a killed run made behind its
    /// last checkpoint will be made again.
    fn open_metrics(&self, steps_done: u64) -> Result<JsonlAppender> {
        let path = self.config.output_dir.join(METRICS_FILE);
        let mut kept = Vec::new();
        if path.exists() {
            for line in read_jsonl::<StepMetrics>(&path)? {
                // A torn last line is a step behind the checkpoint.
                let Ok((_, step)) = line else { break };
                if step.step <= steps_done {
                    serde_json::to_writer(&mut kept, &step)
                        .map_err(|error| Error::Io { path: path.clone(), source: error.into() })?;
                    kept.push(b'\n');
                }
            }
        }
        write_atomic(&path, &kept)?;
        Ok(JsonlAppender::open(&path)?.0)
    }
}

fn log(step: &StepMetrics) {
    tracing::info!(
        step = step.step,
        epoch = format_args!("{:.3}", step.epoch),
        loss = format_args!("{:.4}", step.loss),
        learning_rate = format_args!("{:.3e}", step.learning_rate),
        grad_norm = format_args!("{:.3}", step.grad_norm),
        tokens_per_second = format_args!("{:.0}", step.tokens as f64 / step.seconds),
        "step"
    );
}
