//! A whole run: data, model, training loop, checkpoints, adapter.

use std::{ffi::OsString, fs, os::unix::ffi::OsStringExt, path::PathBuf};

use dromedary_command::{Progress, StopFlag};
use dromedary_files::{Lock, LockOptions};
use dromedary_llama::{AdapterFile, Llama, LoadOptions};
use dromedary_parallel::{Communicator, ranks_of_machine, select_device};
use tch::Device;

use crate::{
    activations::{ActivationsMode, available_memory, peak_memory},
    batches::BatchConfig,
    checkpoint::{self, TrainerState},
    collate::BatchLimits,
    config::{Resume, TrainConfig},
    error::{Error, Result},
    metrics::{Journal, Line, METRICS_FILE, Older},
    optimizer::{OptimizerConfig, Share},
    plan::{MemoryPlan, PlanInput, PlannedRank, PlannedTraining},
    prepared::Prepared,
    publish::Finished,
    ranks::Ranks,
    trained::Trained,
    trainer::{StepMetrics, Trainer, TrainerParts},
};

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
    let config = &over_replicas(config, &ranks);
    let _lock = ranks.is_first().then(|| prepare_folder(config)).transpose()?;
    let prepared = Prepared::read(config, device)?;
    prepared.agree(config, world)?;
    let Loaded { model, trained, kept_layers, limits } =
        Loaded::new(config, &prepared, device, &ranks)?;
    log_start(&prepared, &model, &trained, &ranks);
    let mut trainer = Trainer::new(TrainerParts {
        model: &model,
        trained,
        examples: &prepared.examples,
        batches: prepared.batches.clone(),
        schedule: prepared.schedule.clone(),
        kept_layers,
        ranks: ranks.clone(),
    });
    go_on(&mut trainer, config, &prepared.config_hash, &ranks)?;
    let Ended { journal, last } =
        Loop { config, prepared: &prepared, limits, ranks: &ranks, stop }.run(&mut trainer)?;
    let output = Finished {
        config,
        prepared: &prepared,
        model: &model,
        trained: trainer.trained(),
        ranks: &ranks,
        lines: journal.as_ref().map(Journal::lines),
    }
    .publish()?;
    tracing::info!(megabytes = peak_memory().map(|bytes| bytes >> 20), "peak memory");
    let (steps, rows) = (prepared.schedule.total_steps, prepared.examples.len());
    Ok(Summary { output, steps, rows, last })
}

/// The settings with the micro-batches of all replicas in a step, so that it sees the same rows wherever they
/// are computed.
fn over_replicas(config: &TrainConfig, ranks: &Ranks<'_>) -> TrainConfig {
    let accumulation_steps = config.batches.accumulation_steps * ranks.dims().dp;
    let batches = BatchConfig { accumulation_steps, ..config.batches.clone() };
    TrainConfig { batches, ..config.clone() }
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

/// The model in memory.
struct Loaded {
    model: Llama,
    /// What training changes of it.
    trained: Trained,
    /// Layers whose activations are kept.
    kept_layers: usize,
    /// What the memory of a micro-batch was planned for.
    limits: BatchLimits,
}

impl Loaded {
    /// Loads this rank's part of the base.
    fn new(
        config: &TrainConfig,
        prepared: &Prepared,
        device: Device,
        ranks: &Ranks<'_>,
    ) -> Result<Self> {
        let &Prepared { ref base, kind, nf4, .. } = prepared;
        // The trainer packs what it multiplies for the moment, as weights may change.
        let (tp_rank, tp) = (ranks.tp().rank(), ranks.dims().tp);
        let load = LoadOptions { device, kind, pack: false, nf4, tp_rank, tp };
        let mut model = Llama::load(base, &load)?;
        let share = match config.shard_optimizer {
            true => Share { rank: ranks.dp().rank(), ranks: ranks.dims().dp },
            false => Share::ALL,
        };
        let rank = PlannedRank { tp_rank, tp, optimizer_shares: share.ranks, nf4 };
        // Held-out rows are read in micro-batches that are no larger, unless a row is by itself.
        let limits = BatchLimits::of_longest(&prepared.examples, config.batches.batch_size)
            .and_each_of(&prepared.held_out);
        let memory = memory(config, ranks)?;
        let kept_layers = kept_layers(config, (prepared, rank), limits, memory)?;
        let optimizer = OptimizerConfig { share, ..config.adamw.clone().into() };
        let trained = take_trained(config, &mut model, optimizer)?;
        Ok(Self { model, trained, kept_layers, limits })
    }
}

/// Takes over the weights of `model`, or attaches adapters to it: those that `config` names, or new ones.
fn take_trained(
    config: &TrainConfig,
    model: &mut Llama,
    optimizer: OptimizerConfig,
) -> Result<Trained> {
    let mut trained = match config.full_finetune {
        true => Trained::take_weights(model, optimizer)?,
        false => Trained::attach(model, &config.lora, optimizer, config.seed)?,
    };
    if let Some(path) = &config.adapter {
        let adapter = AdapterFile::open(path)?;
        adapter.check_fits(model.config())?;
        start_from(&adapter, &mut trained)?;
    }
    Ok(trained)
}

/// Says what is about to be trained.
fn log_start(prepared: &Prepared, model: &Llama, trained: &Trained, ranks: &Ranks<'_>) {
    if model.keeps_nf4() {
        tracing::info!(megabytes = model.nf4_bytes() >> 20, "frozen weights stay in four bits");
    }
    tracing::info!(
        rows = prepared.examples.len(),
        held_out = prepared.held_out.len(),
        steps = prepared.schedule.total_steps,
        trained = trained.num_parameters(),
        dp = ranks.dims().dp,
        tp = ranks.dims().tp,
        "training"
    );
}

/// Puts the adapter's values in the place of random ones.
fn start_from(adapter: &AdapterFile, trained: &mut Trained) -> Result<()> {
    for index in 0..trained.parts().len() {
        let (name, part) = (&trained.optimizer.entries()[index].name, &trained.parts()[index]);
        if let Some(value) = checkpoint::value_of(adapter, name, part.shard())? {
            trained.set_value(index, &value)?;
        }
    }
    Ok(())
}

/// Goes on from a checkpoint where there is one, and puts later ones out of the way. Every rank must call this.
fn go_on(
    trainer: &mut Trainer<'_>,
    config: &TrainConfig,
    config_hash: &str,
    ranks: &Ranks<'_>,
) -> Result<()> {
    if let Some(path) = resume_from(config, ranks)? {
        trainer.resume(|trained| checkpoint::load(&path, trained, config_hash, ranks))?;
        tracing::info!("going on behind step {} from {}", trainer.steps_done(), path.display());
    }
    if ranks.is_first() {
        checkpoint::set_aside(&config.output_dir, trainer.steps_done())?;
    }
    Ok(())
}

/// The checkpoint to go on from. The first rank looks for it and verifies it, for all.
fn resume_from(config: &TrainConfig, ranks: &Ranks<'_>) -> Result<Option<PathBuf>> {
    let verified = match &config.resume {
        _ if !ranks.is_first() => None,
        Resume::Auto => checkpoint::newest(&config.output_dir)?,
        Resume::Never => None,
        Resume::From(path) => {
            checkpoint::verify(path)?;
            Some(path.clone())
        }
        Resume::NewestOr(path) => Some(checkpoint::newest_or(&config.output_dir, path)?),
    };
    let mut path = verified.unwrap_or_default().into_os_string().into_encoded_bytes();
    ranks.world().broadcast_bytes(&mut path, 0)?;
    Ok((!path.is_empty()).then(|| OsString::from_vec(path).into()))
}

/// What `--activations auto` fits into, where it is asked for. Every rank must call this.
fn memory(config: &TrainConfig, ranks: &Ranks<'_>) -> Result<Option<u64>> {
    match (config.activations, config.max_memory) {
        // The ranks of a machine share what it has.
        (ActivationsMode::Auto, None) => Ok(available_memory(ranks_of_machine(ranks.world())?)),
        (_, given) => Ok(given),
    }
}

/// The layers whose activations are kept, for the largest micro-batch.
fn kept_layers(
    config: &TrainConfig,
    (prepared, rank): (&Prepared, PlannedRank),
    largest: BatchLimits,
    max_memory: Option<u64>,
) -> Result<usize> {
    let training = match config.full_finetune {
        true => PlannedTraining::Weights,
        false => PlannedTraining::Adapters(config.lora.clone()),
    };
    let input = PlanInput {
        config: prepared.base.config(),
        kind: prepared.kind,
        training,
        tokens: largest.tokens as u64,
        targets: largest.targets as u64,
        kept_layers: 0,
        rank,
    };
    let kept_layers = config.activations.kept_layers(&input, max_memory)?;
    let plan = MemoryPlan::new(&PlanInput { kept_layers, ..input })?;
    tracing::info!(kept_layers, megabytes = plan.total() >> 20, "planned memory");
    Ok(kept_layers)
}

/// The steps of a run, and what is done between them.
struct Loop<'a> {
    config: &'a TrainConfig,
    prepared: &'a Prepared,
    /// Of a micro-batch.
    limits: BatchLimits,
    ranks: &'a Ranks<'a>,
    stop: &'a StopFlag,
}

/// What a loop that came to its end leaves.
struct Ended {
    /// On the first rank.
    journal: Option<Journal>,
    last: Option<StepMetrics>,
}

impl Loop<'_> {
    fn run(&self, trainer: &mut Trainer<'_>) -> Result<Ended> {
        let Self { config, ranks, .. } = *self;
        let done = trainer.steps_done();
        let mut journal = ranks.is_first().then(|| self.journal(done)).transpose()?;
        let mut last = None;
        let total = trainer.total_steps();
        let progress = Progress::new(Some(total), "steps", ranks.is_first());
        progress.begin_at(done);
        while trainer.steps_done() < total {
            let step = trainer.train_step();
            if let Err(Error::NotFinite { last, .. }) = &step {
                self.note_end(journal.as_mut(), last)?;
            }
            let step = step?;
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
            let eval_loss = self.held_out_loss_behind(trainer)?;
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
                    let goes_on = config.resume.goes_on();
                    return Err(Error::Stopped { step: number, checkpoint, goes_on });
                }
            }
        }
        progress.finish();
        Ok(Ended { journal, last })
    }

    /// Writes down the step that ends the run, before any rank's error ends the others. Every rank must call
    /// this; the first has the journal.
    fn note_end(&self, journal: Option<&mut Journal>, last: &StepMetrics) -> Result<()> {
        if let Some(journal) = journal {
            journal.append(Line { step: last.clone(), eval_loss: None })?;
            journal.sync()?;
        }
        Ok(self.ranks.world().barrier()?)
    }

    /// The loss of the rows held out, where it is due. Every rank must call this.
    fn held_out_loss_behind(&self, trainer: &Trainer<'_>) -> Result<Option<f64>> {
        let Some(eval) = &self.config.eval else { return Ok(None) };
        let (step, total) = (trainer.steps_done(), trainer.total_steps());
        if !eval.every.is_due(step, total, self.prepared.batches.steps_per_epoch()) {
            return Ok(None);
        }
        let limits = BatchLimits { rows: eval.batch_size, ..self.limits };
        let loss = trainer.held_out_loss(&self.prepared.held_out, limits)?;
        tracing::info!(step, eval_loss = format_args!("{loss:.4}"), "held-out rows");
        Ok(Some(loss))
    }

    fn journal(&self, done: u64) -> Result<Journal> {
        let config = self.config;
        let older = if config.resume.goes_on() { Older::GoOn } else { Older::SetAside };
        Journal::open(&config.output_dir, done, config.tensorboard, older)
    }

    /// Every rank must call this; the first has the journal. A second signal is deferred on all of them
    /// until the checkpoint is there.
    fn save(&self, trainer: &Trainer<'_>, mut journal: Option<&mut Journal>) -> Result<PathBuf> {
        let _saving = self.stop.critical();
        let ranks = self.ranks;
        if let Some(journal) = journal.as_deref_mut() {
            journal.sync()?;
        }
        let state = TrainerState {
            position: trainer.position(),
            seed: self.config.seed,
            updates: trainer.trained().optimizer.updates(),
            config_hash: self.prepared.config_hash.clone(),
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
