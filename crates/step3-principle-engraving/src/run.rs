//! A whole run: data, model, training loop, checkpoints, adapter.

use std::{ffi::OsString, fs, os::unix::ffi::OsStringExt, path::PathBuf};

use dromedary_command::{Progress, StopFlag};
use dromedary_files::{AtomicDir, Lock, LockOptions, Manifest, write_atomic};
use dromedary_llama::{
    Adapter, AdapterFile, Checkpoint, Llama, LlamaConfig, LoadOptions, LoraConfig, SaveOptions,
    check_tokenizer, select_kind, select_nf4,
};
use dromedary_parallel::{Communicator, check_agreements, select_device};
use dromedary_tokenizer::Tokenizer;

use tch::{Device, Kind, no_grad};

use crate::{
    activations::peak_memory,
    batches::{BatchConfig, Batches},
    checkpoint::{self, TrainerState},
    collate::Example,
    config::{Resume, TrainConfig},
    curves,
    dataset::Dataset,
    error::{Error, Result},
    held_out::{self, held_out_loss},
    metrics::{CURVES_FILE, Journal, Line, METRICS_FILE, Older},
    model_card::{Inputs, ModelCard},
    optimizer::{OptimizerConfig, Share},
    plan::{MemoryPlan, PlanInput, PlannedRank, PlannedTraining},
    ranks::Ranks,
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
    /// The last step of this call, where it made one.
    pub last: Option<StepMetrics>,
}

/// Trains as `config` says, going on from a checkpoint where there is one.
///
/// Every rank of `world` must call this: `tp` of them hold a replica of the model together, and the
/// replicas share the rows of a step. The first rank writes; `local_rank` chooses a rank's device among
/// those of its node. A stop that `stop` announces on any rank is obeyed between two steps, behind a
/// checkpoint.
///
/// # Errors
/// See [`Error`]; [`Error::Stopped`] after such a stop, on all ranks.
pub fn train(
    config: &TrainConfig,
    world: &dyn Communicator,
    local_rank: usize,
    stop: &StopFlag,
) -> Result<Summary> {
    let device = select_device(&config.device, local_rank, world)?;
    let world = world.for_device(device)?;
    let world = world.as_ref();
    let ranks = Ranks::new(world, config.tp.unwrap_or(world.world_size()))?;
    // A step has the micro-batches of all replicas, so it sees the same rows wherever they are computed.
    let accumulation_steps = config.batches.accumulation_steps * ranks.dims().dp;
    let batches = BatchConfig { accumulation_steps, ..config.batches.clone() };
    let config = &TrainConfig { batches, ..config.clone() };
    let _lock = match ranks.is_first() {
        true => Some(prepare_folder(config)?),
        false => None,
    };
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
    let kind = select_kind(&config.dtype, device, base.dtype())?;
    let nf4 = keeps_nf4(config, &base, device)?;
    let hashed = format!("{:?} {kind:?}{}", inputs.fingerprints(), if nf4 { " nf4" } else { "" });
    let config_hash = config_hash(config, &schedule, &hashed, &examples);
    agree(config, &inputs, &config_hash, world)?;
    // The trainer packs what it multiplies for the moment, as weights may change.
    let (tp_rank, tp) = (ranks.tp().rank(), ranks.dims().tp);
    let load = LoadOptions { device, kind, pack: false, nf4, tp_rank, tp };
    let mut model = Llama::load(&base, &load)?;
    let share = match config.shard_optimizer {
        true => Share { rank: ranks.dp().rank(), ranks: ranks.dims().dp },
        false => Share::ALL,
    };
    let rank = PlannedRank { tp_rank, tp, optimizer_shares: share.ranks, nf4 };
    let kept_layers = kept_layers(config, (base.config(), rank), kind, &examples)?;
    let optimizer = OptimizerConfig { share, ..config.adamw.clone().into() };
    let mut trained = match config.full_finetune {
        true => Trained::take_weights(&mut model, optimizer)?,
        false => Trained::attach(&mut model, &config.lora, optimizer, config.seed)?,
    };
    if let Some(path) = &config.adapter {
        AdapterFile::open(path)?.check_fits(model.config())?;
        start_from(&Adapter::open(path)?, &mut trained)?;
    }
    if model.keeps_nf4() {
        tracing::info!(megabytes = model.nf4_bytes() >> 20, "frozen weights stay in four bits");
    }
    tracing::info!(
        rows = examples.len(),
        held_out = held_out.len(),
        steps = total_steps,
        trained = trained.num_parameters(),
        dp = ranks.dims().dp,
        tp,
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
        ranks: ranks.clone(),
    };
    let mut trainer = Trainer::new(parts);
    if let Some(path) = resume_from(config, &ranks)? {
        let load = |trained: &mut Trained| checkpoint::load(&path, trained, &config_hash, &ranks);
        trainer.resume(load)?;
        tracing::info!("going on behind step {} from {}", trainer.steps_done(), path.display());
    }
    if ranks.is_first() {
        checkpoint::set_aside(&config.output_dir, trainer.steps_done())?;
    }
    let held_out = HeldOut { model: &model, examples: &held_out, steps_per_epoch, ranks: &ranks };
    let ended = Loop { config, config_hash, stop, held_out }.run(&mut trainer)?;
    let card = ended.journal.as_ref().map(|journal| ModelCard {
        config,
        schedule: &schedule,
        audit: &audit,
        inputs: &inputs,
        rows: [examples.len(), held_out.examples.len()],
        kind: format!("{kind:?}").to_lowercase(),
        num_parameters: trainer.trained().num_parameters(),
        lines: journal.lines(),
    });
    let output = match config.full_finetune {
        true => publish_model(config, &base, &model, card.as_ref(), &ranks)?,
        false => publish_adapter(config, trainer.trained(), card.as_ref(), &ranks)?,
    };
    tracing::info!(megabytes = peak_memory().map(|bytes| bytes >> 20), "peak memory");
    Ok(Summary { output, steps: total_steps, rows: examples.len(), last: ended.last })
}

/// Whether the frozen weights stay in four bits, as the base has them.
fn keeps_nf4(config: &TrainConfig, base: &Checkpoint, device: Device) -> Result<bool> {
    let is_stored = base.stores_nf4();
    if config.bits == Some(4) && !is_stored {
        tracing::warn!(
            "--bits 4: {} is not stored in four bits and is held in --dtype; `llama quantize --nf4` \
             makes a base that stays so",
            config.checkpoint.display()
        );
    }
    let may = !config.full_finetune && matches!(config.bits, None | Some(4));
    Ok(may && select_nf4(None, device, is_stored)?)
}

/// Makes the output folder this run's own.
fn prepare_folder(config: &TrainConfig) -> Result<Lock> {
    let io = |source| Error::Io { path: config.output_dir.clone(), source };
    fs::create_dir_all(&config.output_dir).map_err(io)?;
    let metrics = config.output_dir.join(METRICS_FILE);
    let lock = Lock::acquire(&metrics, &LockOptions::from_env(config.break_lock))?;
    checkpoint::sweep(&config.output_dir)?;
    Ok(lock)
}

/// All ranks must have been started with the same settings on the same data.
fn agree(
    config: &TrainConfig,
    inputs: &Inputs,
    config_hash: &str,
    world: &dyn Communicator,
) -> Result<()> {
    // What each rank may have of its own.
    let shared = TrainConfig { device: String::new(), threads: None, ..config.clone() };
    Ok(check_agreements(
        world,
        &[
            ("the settings".to_owned(), format!("{shared:?}")),
            ("the inputs".to_owned(), format!("{:?}", inputs.fingerprints())),
            ("the hash of settings and rows".to_owned(), config_hash.to_owned()),
        ],
    )?)
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
    for index in 0..trained.optimizer.entries().len() {
        let name = &trained.optimizer.entries()[index].name;
        if let Some(value) = checkpoint::value_of(adapter, name) {
            trained.set_value(index, &value)?;
        }
    }
    Ok(())
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
        for range in &example.learned {
            hasher.update(&(range.start as u64).to_le_bytes());
            hasher.update(&(range.end as u64).to_le_bytes());
        }
        hasher.update(&(example.input_ids.len() as u64).to_le_bytes());
        for id in &example.input_ids {
            hasher.update(&id.to_le_bytes());
        }
    }
    hasher.finalize().to_hex()[..32].to_owned()
}

/// The checkpoint to go on from; the first rank looks for it.
fn resume_from(config: &TrainConfig, ranks: &Ranks<'_>) -> Result<Option<PathBuf>> {
    match &config.resume {
        Resume::Auto => {
            let newest = match ranks.is_first() {
                true => checkpoint::newest(&config.output_dir)?,
                false => None,
            };
            let mut path = newest.unwrap_or_default().into_os_string().into_encoded_bytes();
            ranks.world().broadcast_bytes(&mut path, 0)?;
            Ok((!path.is_empty()).then(|| OsString::from_vec(path).into()))
        }
        Resume::Never => Ok(None),
        Resume::From(path) => Ok(Some(path.clone())),
    }
}

/// The layers whose activations are kept, for the longest rows.
fn kept_layers(
    config: &TrainConfig,
    (model, rank): (&LlamaConfig, PlannedRank),
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
        rank,
    };
    let kept_layers = config.activations.kept_layers(&input, config.max_memory)?;
    let plan = MemoryPlan::new(&PlanInput { kept_layers, ..input })?;
    tracing::info!(kept_layers, megabytes = plan.total() >> 20, "planned memory");
    Ok(kept_layers)
}

/// Writes the trained model as a checkpoint of its own, in the kinds of the base's tensors. Every rank
/// must call this; the first has a card to put beside it.
fn publish_model(
    config: &TrainConfig,
    base: &Checkpoint,
    model: &Llama,
    card: Option<&ModelCard<'_>>,
    ranks: &Ranks<'_>,
) -> Result<PathBuf> {
    let path = config.output_dir.join(MODEL_DIR);
    if ranks.is_of_first_replica() {
        let options = SaveOptions { replace: true, ..SaveOptions::new(&path, &config.checkpoint) };
        no_grad(|| model.save(base.specs()?, &options, ranks.tp()))?;
    }
    if let Some(card) = card {
        // Beside it: the folder's manifest is of what `llama` reads.
        write_atomic(config.output_dir.join(CARD_FILE), card.to_string().as_bytes())?;
    }
    Ok(path)
}

/// Writes the adapter. Every rank must call this; the first has a card to put into the folder.
fn publish_adapter(
    config: &TrainConfig,
    trained: &Trained,
    card: Option<&ModelCard<'_>>,
    ranks: &Ranks<'_>,
) -> Result<PathBuf> {
    let path = config.output_dir.join(ADAPTER_DIR);
    let dir = card.map(|_| AtomicDir::replace_existing(&path)).transpose()?;
    if ranks.is_of_first_replica() {
        trained.write_adapter(dir.as_ref().map(AtomicDir::path), ranks.tp())?;
    }
    let Some((dir, card)) = dir.zip(card) else { return Ok(path) };
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
    ranks: &'a Ranks<'a>,
}

impl HeldOut<'_> {
    /// The loss, where it is due behind `step`.
    fn loss_behind(&self, step: u64, config: &TrainConfig, total: u64) -> Result<Option<f64>> {
        let Some(eval) = &config.eval else { return Ok(None) };
        if !eval.every.is_due(step, total, self.steps_per_epoch) {
            return Ok(None);
        }
        let loss = held_out_loss(self.model, self.examples, eval.batch_size, self.ranks)?;
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

/// What a loop that came to its end leaves.
struct Ended {
    /// On the first rank.
    journal: Option<Journal>,
    last: Option<StepMetrics>,
}

impl Loop<'_> {
    fn run(&self, trainer: &mut Trainer<'_>) -> Result<Ended> {
        let (config, ranks) = (self.config, self.held_out.ranks);
        let done = trainer.steps_done();
        let mut journal = ranks.is_first().then(|| self.journal(done)).transpose()?;
        let mut last = None;
        let total = trainer.total_steps();
        let progress = Progress::new(Some(total), "steps", ranks.is_first());
        progress.begin_at(done);
        while trainer.steps_done() < total {
            let step = trainer.train_step()?;
            progress.inc(1);
            progress.message(format!(
                "loss {:.4}, {:.0} tokens/s",
                step.loss,
                step.tokens_per_second()
            ));
            let number = step.step;
            if ranks.is_first() && (number % config.logging_steps == 0 || number == total) {
                log(&step);
            }
            let eval_loss = self.held_out.loss_behind(number, config, total)?;
            last = Some(step.clone());
            if let Some(journal) = &mut journal {
                journal.append(Line { step, eval_loss })?;
            }
            let due = number % config.save_steps == 0 || number == total;
            // A signal may reach some of the ranks only, or these in different steps.
            if ranks.any(self.stop.is_set())? || due {
                let checkpoint = self.save(trainer, journal.as_mut())?;
                // A signal that came while the checkpoint was written needs no second one.
                if ranks.any(self.stop.is_set())? && number < total {
                    return Err(Error::Stopped { step: number, checkpoint });
                }
            }
        }
        progress.finish();
        Ok(Ended { journal, last })
    }

    fn journal(&self, done: u64) -> Result<Journal> {
        let config = self.config;
        let older = match config.resume {
            Resume::Auto => Older::GoOn,
            Resume::Never | Resume::From(_) => Older::SetAside,
        };
        Journal::open(&config.output_dir, done, config.tensorboard, older)
    }

    /// Every rank must call this; the first has the journal. A second signal is deferred on all of them
    /// until the checkpoint is there.
    fn save(&self, trainer: &Trainer<'_>, mut journal: Option<&mut Journal>) -> Result<PathBuf> {
        let _saving = self.stop.critical();
        let ranks = self.held_out.ranks;
        if let Some(journal) = journal.as_deref_mut() {
            journal.sync()?;
        }
        let state = TrainerState {
            position: trainer.position(),
            seed: self.config.seed,
            updates: trainer.trained().optimizer.updates(),
            config_hash: self.config_hash.clone(),
            dp_and_tp: [ranks.dims().dp, ranks.dims().tp],
        };
        let path = checkpoint::save(&self.config.output_dir, trainer.trained(), &state, ranks)?;
        if let Some(journal) = journal {
            checkpoint::rotate(&self.config.output_dir, self.config.save_total_limit)?;
            journal.draw()?;
        }
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
