//! Settings of a run, resolved and checked.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use dromedary_command::{Error as CommandError, required};
use dromedary_llama::{AdapterFile, LoraConfig};
use dromedary_tokenizer::ChatOptions;

use crate::{
    activations::ActivationsMode,
    args::{EvaluationStrategy, ReportTo, TrainArgs},
    batches::BatchConfig,
    collate::CollateConfig,
    dataset::DataConfig,
    held_out::{EvalConfig, EvalEvery, EvalRows},
    optimizer::AdamWConfig,
    schedule::{Schedule, ScheduleConfig, ScheduleType, Span},
};

/// Dropout above this leaves nothing to learn from.
const MAX_DROPOUT: f64 = 0.99;

/// Where a run starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resume {
    /// At the newest complete checkpoint of the output folder, or at the beginning.
    Auto,
    /// At the beginning.
    Never,
    /// At this checkpoint.
    From(PathBuf),
    /// At the newest complete checkpoint of the output folder, or at this one where none is newer.
    NewestOr(PathBuf),
}

impl Resume {
    /// Where a job goes on that the batch system has started so many times again: wherever the user had it
    /// start, it is to go on from what it has done.
    pub fn after_restarts(self, count: u32) -> Self {
        match self {
            resume if count == 0 => resume,
            Self::Auto | Self::Never => Self::Auto,
            Self::From(path) | Self::NewestOr(path) => Self::NewestOr(path),
        }
    }

    /// Whether a run that is started once more with this setting goes on from its own checkpoints.
    pub(crate) fn goes_on(&self) -> bool {
        matches!(self, Self::Auto | Self::NewestOr(_))
    }
}

/// Settings of a run without a missing value. Relations between them have been checked.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainConfig {
    /// Folder of the base model.
    pub checkpoint: PathBuf,
    /// Rows, and how they become tokens.
    pub data: DataConfig,
    /// Rows that are held out, where there are any.
    pub eval: Option<EvalConfig>,
    /// Folder for everything that is written.
    pub output_dir: PathBuf,
    /// Where to start.
    pub resume: Resume,
    /// Take the output folder over from another job.
    pub break_lock: bool,
    /// The adapters.
    pub lora: LoraConfig,
    /// The adapter that training starts from, in PEFT's format.
    pub adapter: Option<PathBuf>,
    /// Ranks that hold one model together; all where absent.
    pub tp: Option<usize>,
    /// Divide the optimizer's moments, and the f32 values behind 16-bit weights, over the replicas.
    pub shard_optimizer: bool,
    /// Batches of one replica and their order.
    pub batches: BatchConfig,
    /// Passes over the rows.
    pub num_train_epochs: f64,
    /// Optimizer steps, where given.
    pub max_steps: Option<u64>,
    /// The learning rate.
    pub schedule: ScheduleConfig,
    /// The optimizer.
    pub adamw: AdamWConfig,
    /// Bits of the frozen weights, where given; as the base is stored otherwise.
    pub bits: Option<u8>,
    /// Train all weights instead of adapters.
    pub full_finetune: bool,
    /// What forward keeps for backward.
    pub activations: ActivationsMode,
    /// Bytes that `ActivationsMode::Auto` fits into.
    pub max_memory: Option<u64>,
    /// Seed of the adapters and of the order.
    pub seed: u64,
    /// Steps between log lines.
    pub logging_steps: u64,
    /// Steps between checkpoints.
    pub save_steps: u64,
    /// Checkpoints that are kept.
    pub save_total_limit: usize,
    /// Write events for TensorBoard.
    pub tensorboard: bool,
    /// `auto`, `cpu`, `cuda` or `cuda:N`.
    pub device: String,
    /// `auto`, `f32`, `bf16` or `f16`.
    pub dtype: String,
    /// Threads of libtorch; all cores where absent.
    pub threads: Option<usize>,
}

impl TrainArgs {
    /// Puts the default into each setting that has one and was not given.
    pub fn with_defaults(mut self) -> Self {
        macro_rules! default {
            ($($field:ident = $value:expr),* $(,)?) => {
                $(self.$field.get_or_insert($value);)*
            };
        }
        default!(
            break_lock = false,
            source_max_len = 1024,
            target_max_len = 256,
            train_on_source = false,
            add_eos_to_target = true,
            drop_empty = false,
            lora_dropout = 0.0,
            full_finetune = false,
            shard_optimizer = false,
            per_device_train_batch_size = 1,
            gradient_accumulation_steps = 16,
            num_train_epochs = 1.0,
            group_by_length = false,
            learning_rate = 1e-4,
            lr_scheduler_type = ScheduleType::Cosine,
            weight_decay = 0.0,
            max_grad_norm = 0.3,
            seed = 42,
            logging_steps = 5,
            save_steps = 500,
            save_total_limit = 3,
            report_to = ReportTo::Tensorboard,
            per_device_eval_batch_size = 8,
            device = "auto".to_owned(),
        );
        let activations = match self.gradient_checkpointing {
            Some(false) => ActivationsMode::Keep,
            _ => ActivationsMode::Recompute,
        };
        self.activations.get_or_insert(activations);
        let dtype = match (self.bf16, self.fp16) {
            (Some(true), _) => "bf16",
            (_, Some(true)) => "f16",
            _ => "auto",
        };
        self.dtype.get_or_insert(dtype.to_owned());
        let resume = if self.resume_from_training == Some(false) { "never" } else { "auto" };
        self.resume.get_or_insert(resume.to_owned());
        if self.warmup_steps.is_none() {
            default!(warmup_ratio = 0.03);
        }
        if self.lr_scheduler_type == Some(ScheduleType::Wsd) && self.decay_steps.is_none() {
            default!(decay_ratio = Schedule::DECAY_RATIO);
        }
        if self.evaluation_strategy.is_none() {
            let held_out = self.eval_dataset.is_some() || self.eval_dataset_size.is_some();
            let strategy =
                if held_out { EvaluationStrategy::Steps } else { EvaluationStrategy::No };
            default!(evaluation_strategy = strategy);
        }
        if self.evaluation_strategy == Some(EvaluationStrategy::Steps) {
            default!(eval_steps = 500);
        }
        // An adapter to start from brings its own, and weights need none.
        if self.adapter.is_none() && self.full_finetune != Some(true) {
            default!(lora_r = 64, lora_alpha = 16.0);
            if self.lora_modules.is_empty() {
                self.lora_modules.push("all".to_owned());
            }
        }
        if self.tokenizer.is_none() {
            self.tokenizer = self.checkpoint.clone();
        }
        self
    }
}

impl TryFrom<TrainArgs> for TrainConfig {
    type Error = CommandError;

    fn try_from(args: TrainArgs) -> Result<Self, CommandError> {
        let args = args.with_defaults();
        check_switches(&args)?;
        let seed = required(args.seed, "seed")?;
        let checkpoint = required(args.checkpoint.clone(), "checkpoint")?;
        let config = Self {
            data: DataConfig::try_from(&args)?,
            eval: eval_config(&args)?,
            output_dir: required(args.output_dir.clone(), "output-dir")?,
            resume: match required(args.resume.clone(), "resume")?.as_str() {
                "auto" => Resume::Auto,
                "never" => Resume::Never,
                path => Resume::From(path.into()),
            },
            break_lock: required(args.break_lock, "break-lock")?,
            lora: lora_config(&args, &checkpoint)?,
            adapter: args.adapter.clone(),
            tp: args.tp,
            shard_optimizer: required(args.shard_optimizer, "shard-optimizer")?,
            batches: BatchConfig {
                batch_size: positive(
                    args.per_device_train_batch_size,
                    "per-device-train-batch-size",
                )?,
                accumulation_steps: positive(
                    args.gradient_accumulation_steps,
                    "gradient-accumulation-steps",
                )?,
                group_by_length: required(args.group_by_length, "group-by-length")?,
                seed,
            },
            num_train_epochs: in_range(args.num_train_epochs, "num-train-epochs", 1e-9, 1e9)?,
            // HF's default of -1 means that the epochs decide.
            max_steps: args.max_steps.and_then(|steps| steps.try_into().ok()).filter(|&n| n > 0),
            schedule: schedule_config(&args)?,
            adamw: AdamWConfig {
                weight_decay: in_range(args.weight_decay, "weight-decay", 0.0, 1e3)?,
                max_grad_norm: in_range(args.max_grad_norm, "max-grad-norm", 0.0, 1e9)?,
                ..AdamWConfig::default()
            },
            bits: args.bits,
            full_finetune: required(args.full_finetune, "full-finetune")?,
            activations: required(args.activations, "activations")?,
            max_memory: args.max_memory.map(|size| size.0),
            seed,
            logging_steps: positive(args.logging_steps, "logging-steps")?,
            save_steps: positive(args.save_steps, "save-steps")?,
            save_total_limit: required(args.save_total_limit, "save-total-limit")?,
            tensorboard: required(args.report_to, "report-to")? == ReportTo::Tensorboard,
            device: required(args.device.clone(), "device")?,
            dtype: required(args.dtype.clone(), "dtype")?,
            threads: args.threads,
            checkpoint,
        };
        if config.save_total_limit < 2 {
            return Err(CommandError::usage(format!(
                "--save-total-limit {} is less than 2: a torn newest checkpoint would leave none",
                config.save_total_limit
            )));
        }
        Ok(config)
    }
}

impl TryFrom<&TrainArgs> for DataConfig {
    type Error = CommandError;

    /// `args` with their defaults.
    fn try_from(args: &TrainArgs) -> Result<Self, CommandError> {
        Ok(Self {
            tokenizer: required(args.tokenizer.clone(), "tokenizer")?,
            dataset: required(args.dataset.clone(), "dataset")?,
            max_train_samples: args.max_train_samples,
            drop_empty: required(args.drop_empty, "drop-empty")?,
            format: args.dataset_format,
            meta_prompt_pattern: args.meta_prompt_pattern.clone(),
            chat: ChatOptions {
                template: args.chat_template.clone(),
                date: args.chat_date.clone(),
            },
            collate: CollateConfig {
                source_max_len: positive(args.source_max_len, "source-max-len")?,
                target_max_len: positive(args.target_max_len, "target-max-len")?,
                train_on_source: required(args.train_on_source, "train-on-source")?,
                add_eos_to_target: required(args.add_eos_to_target, "add-eos-to-target")?,
                learned_turns: args.learned_turns.unwrap_or_default(),
            },
        })
    }
}

fn eval_config(args: &TrainArgs) -> Result<Option<EvalConfig>, CommandError> {
    let strategy = required(args.evaluation_strategy, "evaluation-strategy")?;
    let rows = match (&args.eval_dataset, args.eval_dataset_size) {
        (Some(path), None) => Some(EvalRows::File(path.clone())),
        (None, Some(_)) => {
            Some(EvalRows::Drawn(positive(args.eval_dataset_size, "eval-dataset-size")?))
        }
        (None, None) => None,
        (Some(_), Some(_)) => {
            return Err(CommandError::usage(
                "--eval-dataset and --eval-dataset-size: held-out rows come from one of them",
            ));
        }
    };
    let every = match (strategy, &rows) {
        (EvaluationStrategy::No, rows) => {
            if rows.is_some() || args.eval_steps.is_some() {
                tracing::warn!("--evaluation-strategy no: settings of held-out rows are ignored");
            }
            return Ok(None);
        }
        (_, None) => {
            return Err(CommandError::usage(
                "--evaluation-strategy needs rows: give --eval-dataset or --eval-dataset-size",
            ));
        }
        (EvaluationStrategy::Steps, _) => {
            EvalEvery::Steps(positive(args.eval_steps, "eval-steps")?)
        }
        (EvaluationStrategy::Epoch, _) => EvalEvery::Epoch,
    };
    let batch_size = positive(args.per_device_eval_batch_size, "per-device-eval-batch-size")?;
    let max_samples = args.max_eval_samples;
    if max_samples.is_some() {
        positive(max_samples, "max-eval-samples")?;
    }
    Ok(rows.map(|rows| EvalConfig { rows, max_samples, batch_size, every }))
}

fn schedule_config(args: &TrainArgs) -> Result<ScheduleConfig, CommandError> {
    let schedule_type = required(args.lr_scheduler_type, "lr-scheduler-type")?;
    let span = |steps: Option<u64>, ratio: Option<f64>, name: &str| match steps {
        Some(steps) => Ok(Span::Steps(steps)),
        None => Ok(Span::Ratio(in_range(ratio, name, 0.0, 1.0)?)),
    };
    let decay = match schedule_type {
        ScheduleType::Wsd => span(args.decay_steps, args.decay_ratio, "decay-ratio")?,
        _ if args.decay_steps.is_some() || args.decay_ratio.is_some() => {
            return Err(CommandError::usage(
                "--decay-ratio and --decay-steps belong to --lr-scheduler-type wsd",
            ));
        }
        _ => Span::Steps(0),
    };
    Ok(ScheduleConfig {
        schedule_type,
        learning_rate: in_range(args.learning_rate, "learning-rate", 0.0, 1e3)?,
        warmup: span(args.warmup_steps, args.warmup_ratio, "warmup-ratio")?,
        decay,
    })
}

/// Refuses what is not built in, and warns of what changes nothing.
fn check_switches(args: &TrainArgs) -> Result<(), CommandError> {
    if args.full_finetune == Some(true) && args.lora_dropout.is_some_and(|dropout| dropout > 0.0) {
        return Err(CommandError::usage("--lora-dropout: --full-finetune true trains no adapters"));
    }
    if args.full_finetune == Some(true) && args.adapter.is_some() {
        return Err(CommandError::usage("--adapter: --full-finetune true trains no adapters"));
    }
    if args.max_memory.is_some() && args.activations != Some(ActivationsMode::Auto) {
        return Err(CommandError::usage("--max-memory belongs to --activations auto"));
    }
    check_contradictions(args)?;
    let lora = [
        ("--lora-r", args.lora_r.is_some()),
        ("--lora-alpha", args.lora_alpha.is_some()),
        ("--use-rslora", args.use_rslora.is_some()),
        ("--lora-modules", !args.lora_modules.is_empty()),
    ];
    for (flag, _) in lora.iter().filter(|(_, given)| *given && args.full_finetune == Some(true)) {
        tracing::warn!("{flag} is ignored: --full-finetune true trains no adapters");
    }
    match args.bits {
        Some(4) if args.full_finetune == Some(true) => Err(CommandError::usage(
            "--bits 4: --full-finetune true trains all weights, and none stays in four bits",
        )),
        Some(4 | 16 | 32) | None => Ok(()),
        Some(8) => {
            tracing::warn!(
                "--bits 8: the frozen weights are not quantised, they are held in --dtype"
            );
            Ok(())
        }
        Some(bits) => Err(CommandError::usage(format!("--bits {bits}: give 4, 8, 16 or 32"))),
    }
}

/// Dromedary's switches must not say otherwise than our own flags, wherever each of them was given.
fn check_contradictions(args: &TrainArgs) -> Result<(), CommandError> {
    if (args.bf16, args.fp16) == (Some(true), Some(true)) {
        return Err(CommandError::usage("--bf16 true and --fp16 true: give one of them"));
    }
    let dtype = args.dtype.as_deref().unwrap_or_default();
    let activations = args.activations;
    let starts_anew = args.resume.as_deref() == Some("never");
    let contradictions = [
        ("bf16", args.bf16 == Some(true) && dtype != "bf16", "dtype", dtype.to_owned()),
        ("fp16", args.fp16 == Some(true) && dtype != "f16", "dtype", dtype.to_owned()),
        (
            "gradient-checkpointing",
            args.gradient_checkpointing.is_some_and(|recomputes| match activations {
                Some(ActivationsMode::Recompute) => !recomputes,
                _ => recomputes || activations != Some(ActivationsMode::Keep),
            }),
            "activations",
            format!("{activations:?}").to_lowercase(),
        ),
        (
            "resume-from-training",
            args.resume_from_training.is_some_and(|resumes| resumes == starts_anew),
            "resume",
            args.resume.clone().unwrap_or_default(),
        ),
    ];
    match contradictions.into_iter().find(|(_, contradicts, ..)| *contradicts) {
        None => Ok(()),
        Some((switch, _, flag, value)) => Err(CommandError::usage(format!(
            "--{switch} says otherwise than --{flag} {value}: give one of them, here or in the file"
        ))),
    }
}

fn lora_config(args: &TrainArgs, checkpoint: &Path) -> Result<LoraConfig, CommandError> {
    if args.full_finetune == Some(true) {
        return Ok(LoraConfig::default());
    }
    let lora_dropout = in_range(args.lora_dropout, "lora-dropout", 0.0, MAX_DROPOUT)?;
    let base_model_name_or_path = Some(checkpoint.display().to_string());
    if let Some(path) = &args.adapter {
        let brought = brought_config(path, args)?;
        return Ok(LoraConfig { lora_dropout, base_model_name_or_path, ..brought });
    }
    Ok(LoraConfig {
        r: positive(args.lora_r, "lora-r")?,
        lora_alpha: in_range(args.lora_alpha, "lora-alpha", 1e-9, 1e9)?,
        lora_dropout,
        target_modules: target_modules(&args.lora_modules)?,
        use_rslora: args.use_rslora.unwrap_or(false),
        base_model_name_or_path,
    })
}

/// Settings of the adapter that training starts from; flags must not say otherwise.
fn brought_config(path: &Path, args: &TrainArgs) -> Result<LoraConfig, CommandError> {
    let adapter = AdapterFile::open(path)
        .map_err(|error| CommandError::usage(format!("--adapter {}: {error}", path.display())))?;
    let brought = adapter.config().clone();
    let contradicts = |flag: &str, given: String, brought: String| {
        let path = path.display();
        CommandError::usage(format!("--{flag} {given}: the adapter {path} has {brought}"))
    };
    if let Some(r) = args.lora_r.filter(|&r| r != brought.r) {
        return Err(contradicts("lora-r", r.to_string(), brought.r.to_string()));
    }
    if let Some(alpha) = args.lora_alpha.filter(|&alpha| alpha != brought.lora_alpha) {
        let brought = brought.lora_alpha.to_string();
        return Err(contradicts("lora-alpha", alpha.to_string(), brought));
    }
    if let Some(rslora) = args.use_rslora.filter(|&rslora| rslora != brought.use_rslora) {
        let brought = brought.use_rslora.to_string();
        return Err(contradicts("use-rslora", rslora.to_string(), brought));
    }
    let modules = &args.lora_modules;
    if !modules.is_empty() && target_modules(modules)? != brought.target_modules {
        let brought: Vec<_> = brought.target_modules.into_iter().collect();
        return Err(contradicts("lora-modules", modules.join(","), brought.join(",")));
    }
    Ok(brought)
}

/// The layers that `--lora-modules` names.
pub(crate) fn target_modules(names: &[String]) -> Result<BTreeSet<String>, CommandError> {
    let known = LoraConfig::default().target_modules;
    if names == ["all"] {
        return Ok(known);
    }
    if let Some(name) = names.iter().find(|name| !known.contains(*name)) {
        let known: Vec<_> = known.into_iter().collect();
        return Err(CommandError::usage(format!(
            "--lora-modules {name}: no such layer; choose from all, {}",
            known.join(", ")
        )));
    }
    Ok(names.iter().cloned().collect())
}

fn positive<T: PartialOrd + Default + std::fmt::Display>(
    value: Option<T>,
    name: &str,
) -> Result<T, CommandError> {
    let value = required(value, name)?;
    if value <= T::default() {
        return Err(CommandError::usage(format!("--{name} {value}: must be at least 1")));
    }
    Ok(value)
}

fn in_range(value: Option<f64>, name: &str, low: f64, high: f64) -> Result<f64, CommandError> {
    let value = required(value, name)?;
    if !(low..=high).contains(&value) {
        return Err(CommandError::usage(format!("--{name} {value}: must be in {low}..={high}")));
    }
    Ok(value)
}
