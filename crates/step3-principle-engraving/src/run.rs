//! A whole run: data, model, training loop, checkpoints, adapter.

use std::{fs, path::PathBuf};

use dromedary_command::{Progress, StopFlag};
use dromedary_files::{AtomicDir, Lock, LockOptions, Manifest, write_atomic};
use dromedary_llama::{
    Adapter, AdapterFile, Checkpoint, Llama, LlamaConfig, LoadOptions, LoraConfig, SaveOptions,
    check_tokenizer, select_kind,
};
use dromedary_parallel::{Communicator, select_device};
use dromedary_tokenizer::Tokenizer;

use tch::{Kind, no_grad};

use crate::{
    activations::peak_memory,
    batches::Batches,
    checkpoint::{self, TrainerState},
    collate::Example,
    config::{Resume, TrainConfig},
    curves,
    dataset::Dataset,
    error::{Error, Result},
    held_out::{self, held_out_loss},
    metrics::{CURVES_FILE, Journal, Line, METRICS_FILE, Older},
    model_card::{Inputs, ModelCard},
    plan::{MemoryPlan, PlanInput, PlannedTraining},
    schedule::Schedule,
    trained::Trained,
    trainer::{StepMetrics, Trainer, TrainerParts},
};

/// Name of the folder under the output folder that holds the finished adapter.
pub const ADAPTER_DIR: &str = "adapter";
const CARD_FILE: &str = "README.md";
/// Name of the folder under the output folder that holds the trained model, where weights are trained.
pub const MODEL_DIR: &str = "model";

/// What a finished run says.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// The adapter, in PEFT's format; where weights are trained, the model.
    pub output: PathBuf,
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
    let tokenizer = Tokenizer::open(&config.data.tokenizer)?;
    let data = &config.data;
    let Dataset { examples, audit, .. } = read_dataset(config, &tokenizer)?;
    let (examples, held_out) = match &config.eval {
        Some(eval) => held_out::split(examples, eval, data, config.seed, &tokenizer)?,
        None => (examples, Vec::new()),
    };
    let base = Checkpoint::open(&config.checkpoint)?;
    check_tokenizer(base.config(), &tokenizer)?;
    let inputs = Inputs::of(config, base.fingerprint()?, tokenizer.fingerprint())?;

    let batches = Batches::new(
        config.batches.clone(),
        examples.iter().map(|example| example.input_ids.len()).collect(),
    );
    let steps_per_epoch = batches.steps_per_epoch();
    let total_steps = config
        .max_steps
        .unwrap_or_else(|| (config.num_train_epochs * steps_per_epoch as f64).ceil() as u64);
    let schedule = config.schedule.over(total_steps)?;
    let device = select_device(&config.device, comm.rank(), comm)?;
    let kind = select_kind(&config.dtype, device, base.dtype())?;
    let config_hash =
        config_hash(config, &schedule, &format!("{:?} {kind:?}", inputs.fingerprints()), &examples);
    // The trainer packs what it multiplies for the moment, as weights may change.
    let load = LoadOptions { device, kind, pack: false, ..LoadOptions::default() };
    let mut model = Llama::load(&base, &load)?;
    let kept_layers = kept_layers(config, base.config(), kind, &examples)?;
    let adamw = config.adamw.clone();
    let mut trained = match config.full_finetune {
        true => Trained::take_weights(&mut model, adamw)?,
        false => Trained::attach(&mut model, &config.lora, adamw, config.seed)?,
    };
    if let Some(path) = &config.adapter {
        AdapterFile::open(path)?.check_fits(model.config())?;
        start_from(&Adapter::open(path)?, &mut trained)?;
    }
    tracing::info!(
        rows = examples.len(),
        held_out = held_out.len(),
        steps = total_steps,
        trained = trained.optimizer.num_parameters(),
        "training"
    );
    let examples = examples.as_slice();
    let parts = TrainerParts {
        model: &model,
        trained,
        examples,
        batches,
        schedule: schedule.clone(),
        kept_layers,
        comm,
    };
    let mut trainer = Trainer::new(parts);
    if let Some(path) = resume_from(config)? {
        let load = |trained: &mut Trained| checkpoint::load(&path, trained, &config_hash);
        trainer.resume(load)?;
        tracing::info!("going on behind step {} from {}", trainer.steps_done(), path.display());
    }
    checkpoint::set_aside(&config.output_dir, trainer.steps_done())?;
    let held_out = HeldOut { model: &model, examples: &held_out, steps_per_epoch, comm };
    let journal = Loop { config, config_hash, stop, held_out }.run(&mut trainer)?;
    let card = ModelCard {
        config,
        schedule: &schedule,
        audit: &audit,
        inputs: &inputs,
        rows: [examples.len(), held_out.examples.len()],
        kind: format!("{kind:?}").to_lowercase(),
        num_parameters: trainer.trained().optimizer.num_parameters(),
        lines: journal.lines(),
    };
    let output = match config.full_finetune {
        true => publish_model(config, &base, &model, &card, comm)?,
        false => publish_adapter(config, trainer.trained(), &card)?,
    };
    tracing::info!(megabytes = peak_memory().map(|bytes| bytes >> 20), "peak memory");
    let last = journal.lines().last().map(|line| line.step.clone());
    Ok(Summary { output, steps: total_steps, rows: examples.len(), last })
}

/// Rows as tokens. Rows that teach nothing are refused by name, or left out where asked for.
fn read_dataset(config: &TrainConfig, tokenizer: &Tokenizer) -> Result<Dataset> {
    let data = &config.data;
    let dataset = Dataset::read(&data.dataset, data.max_train_samples, data, tokenizer)?;
    dataset.audit.log("data set");
    dataset.check(data.drop_empty)?;
    Ok(dataset)
}

/// Puts the adapter's values in the place of random ones.
fn start_from(adapter: &Adapter, trained: &mut Trained) -> Result<()> {
    let optimizer = &trained.optimizer;
    let states = (0..optimizer.entries().len())
        .map(|index| {
            let [value, m, v] = optimizer.state(index);
            let name = &optimizer.entries()[index].name;
            [checkpoint::value_of(adapter, name).unwrap_or(value), m, v]
        })
        .collect::<Vec<_>>();
    trained.restore(&states, 0)
}

/// Hash of what the steps depend on, the hashes of all inputs among it: a checkpoint of another hash cannot be
/// gone on from.
fn config_hash(
    config: &TrainConfig,
    schedule: &Schedule,
    inputs: &str,
    examples: &[Example],
) -> String {
    let mut hasher = blake3::Hasher::new();
    // The base's path is for people; its fingerprint is among the inputs.
    let lora = LoraConfig { base_model_name_or_path: None, ..config.lora.clone() };
    let settings = format!(
        "{:?}",
        (
            (lora, config.full_finetune),
            (&config.batches, schedule, &config.adamw, config.seed),
            inputs,
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

/// The layers whose activations are kept, for the longest rows.
fn kept_layers(
    config: &TrainConfig,
    model: &LlamaConfig,
    kind: Kind,
    examples: &[Example],
) -> Result<usize> {
    let mut longest: Vec<_> =
        examples.iter().map(|row| (row.input_ids.len(), row.num_targets())).collect();
    longest.sort_unstable_by(|a, b| b.cmp(a));
    longest.truncate(config.batches.batch_size);
    let training = match config.full_finetune {
        true => PlannedTraining::Weights,
        false => PlannedTraining::Adapters(config.lora.clone()),
    };
    let input = PlanInput {
        config: model,
        kind,
        training,
        tokens: longest.iter().map(|&(tokens, _)| tokens as u64).sum(),
        targets: longest.iter().map(|&(_, targets)| targets as u64).sum(),
        kept_layers: 0,
    };
    let kept_layers = config.activations.kept_layers(&input, config.max_memory)?;
    let plan = MemoryPlan::new(&PlanInput { kept_layers, ..input })?;
    tracing::info!(kept_layers, megabytes = plan.total() >> 20, "planned memory");
    Ok(kept_layers)
}

/// Writes the trained model as a checkpoint of its own, in the kinds of the base's tensors.
fn publish_model(
    config: &TrainConfig,
    base: &Checkpoint,
    model: &Llama,
    card: &ModelCard<'_>,
    comm: &dyn Communicator,
) -> Result<PathBuf> {
    let path = config.output_dir.join(MODEL_DIR);
    let options = SaveOptions { replace: true, ..SaveOptions::new(&path, &config.checkpoint) };
    no_grad(|| model.save(base.specs()?, &options, comm))?;
    // Beside it: the folder's manifest is of what `llama` reads.
    write_atomic(config.output_dir.join(CARD_FILE), card.to_string().as_bytes())?;
    Ok(path)
}

fn publish_adapter(
    config: &TrainConfig,
    trained: &Trained,
    card: &ModelCard<'_>,
) -> Result<PathBuf> {
    let path = config.output_dir.join(ADAPTER_DIR);
    let dir = AtomicDir::replace_existing(&path)?;
    if let Some(adapter) = trained.adapter() {
        adapter.write_into(dir.path())?;
    }
    write_atomic(dir.path().join(CARD_FILE), card.to_string().as_bytes())?;
    write_atomic(dir.path().join(CURVES_FILE), curves::draw(card.lines).as_bytes())?;
    let manifest = Manifest::of_dir(dir.path())?;
    dir.commit(&manifest)?;
    Ok(path)
}

/// Rows whose loss is computed between steps.
#[derive(Clone, Copy)]
struct HeldOut<'a> {
    model: &'a Llama,
    examples: &'a [Example],
    steps_per_epoch: u64,
    comm: &'a dyn Communicator,
}

impl HeldOut<'_> {
    /// The loss, where it is due behind `step`.
    fn loss_behind(&self, step: u64, config: &TrainConfig, total: u64) -> Result<Option<f64>> {
        let Some(eval) = &config.eval else { return Ok(None) };
        if !eval.every.is_due(step, total, self.steps_per_epoch) {
            return Ok(None);
        }
        let loss = held_out_loss(self.model, self.examples, eval.batch_size, self.comm)?;
        tracing::info!(step, eval_loss = format_args!("{loss:.4}"), "held-out rows");
        Ok(Some(loss))
    }
}

struct Loop<'a> {
    config: &'a TrainConfig,
    config_hash: String,
    stop: &'a StopFlag,
    held_out: HeldOut<'a>,
}

impl Loop<'_> {
    fn run(&self, trainer: &mut Trainer<'_>) -> Result<Journal> {
        let config = self.config;
        let older = match config.resume {
            Resume::Auto => Older::GoOn,
            Resume::Never | Resume::From(_) => Older::SetAside,
        };
        let done = trainer.steps_done();
        let mut journal = Journal::open(&config.output_dir, done, config.tensorboard, older)?;
        let total = trainer.total_steps();
        let progress = Progress::new(Some(total), "steps", true);
        progress.begin_at(done);
        while trainer.steps_done() < total {
            let step = trainer.train_step()?;
            progress.inc(1);
            progress.message(format!(
                "loss {:.4}, {:.0} tokens/s",
                step.loss,
                step.tokens_per_second()
            ));
            if step.step % config.logging_steps == 0 || step.step == total {
                log(&step);
            }
            let number = step.step;
            let eval_loss = self.held_out.loss_behind(number, config, total)?;
            journal.append(Line { step, eval_loss })?;
            let due = number % config.save_steps == 0 || number == total;
            if due || self.stop.is_set() {
                journal.sync()?;
                let checkpoint = self.save(trainer)?;
                journal.draw()?;
                // A signal that came while the checkpoint was written needs no second one.
                if self.stop.is_set() && number < total {
                    return Err(Error::Stopped { step: number, checkpoint });
                }
            }
        }
        progress.finish();
        Ok(journal)
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
}

fn log(step: &StepMetrics) {
    tracing::info!(
        step = step.step,
        epoch = format_args!("{:.3}", step.epoch),
        loss = format_args!("{:.4}", step.loss),
        learning_rate = format_args!("{:.3e}", step.learning_rate),
        grad_norm = format_args!("{:.3}", step.grad_norm),
        tokens_per_second = format_args!("{:.0}", step.tokens_per_second()),
        "step"
    );
}
