//! Settings of a run, resolved and checked.

use std::path::PathBuf;

use dromedary_command::{Error as CommandError, required};
use dromedary_llama::LoraConfig;

use crate::{
    args::{DatasetFormat, TrainArgs},
    batches::BatchConfig,
    collate::CollateConfig,
    half_block::Keep,
    optimizer::AdamWConfig,
    schedule::ScheduleType,
};

/// Where a run starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resume {
    /// At the newest complete checkpoint of the output folder, or at the beginning.
    Auto,
    /// At the beginning.
    Never,
    /// At this checkpoint.
    From(PathBuf),
}

/// Settings of a run without a missing value. Relations between them have been checked.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainConfig {
    /// Folder of the base model.
    pub checkpoint: PathBuf,
    /// Tokenizer file or folder.
    pub tokenizer: PathBuf,
    /// File of rows.
    pub dataset: PathBuf,
    /// Rows to use, from the first on.
    pub max_train_samples: Option<usize>,
    /// Leave rows without a target token out instead of refusing them.
    pub drop_empty: bool,
    /// Glob of the short system prompts.
    pub meta_prompt_pattern: String,
    /// Folder for everything that is written.
    pub output_dir: PathBuf,
    /// Where to start.
    pub resume: Resume,
    /// Take the output folder over from another job.
    pub break_lock: bool,
    /// Truncation and labels.
    pub collate: CollateConfig,
    /// The adapters.
    pub lora: LoraConfig,
    /// Batches and their order.
    pub batches: BatchConfig,
    /// Passes over the rows.
    pub num_train_epochs: f64,
    /// Optimizer steps, where given.
    pub max_steps: Option<u64>,
    /// Highest learning rate.
    pub learning_rate: f64,
    /// Shape of the learning rate.
    pub lr_scheduler_type: ScheduleType,
    /// Share of the steps that warm up.
    pub warmup_ratio: f64,
    /// The optimizer.
    pub adamw: AdamWConfig,
    /// What forward keeps for backward.
    pub keep: Keep,
    /// Seed of the adapters and of the order.
    pub seed: u64,
    /// Steps between log lines.
    pub logging_steps: u64,
    /// Steps between checkpoints.
    pub save_steps: u64,
    /// Checkpoints that are kept.
    pub save_total_limit: usize,
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
            dataset_format = DatasetFormat::Dromedary,
            break_lock = false,
            source_max_len = 1024,
            target_max_len = 256,
            train_on_source = false,
            add_eos_to_target = true,
            drop_empty = false,
            lora_r = 64,
            lora_alpha = 16.0,
            lora_dropout = 0.0,
            full_finetune = false,
            bits = 16,
            per_device_train_batch_size = 1,
            gradient_accumulation_steps = 16,
            num_train_epochs = 1.0,
            group_by_length = false,
            learning_rate = 1e-4,
            lr_scheduler_type = ScheduleType::Cosine,
            warmup_ratio = 0.03,
            weight_decay = 0.0,
            max_grad_norm = 0.3,
            gradient_checkpointing = true,
            seed = 42,
            logging_steps = 5,
            save_steps = 500,
            save_total_limit = 3,
            device = "auto".to_owned(),
        );
        let dtype = match (self.bf16, self.fp16) {
            (Some(true), _) => "bf16",
            (_, Some(true)) => "f16",
            _ => "auto",
        };
        self.dtype.get_or_insert(dtype.to_owned());
        let resume = if self.resume_from_training == Some(false) { "never" } else { "auto" };
        self.resume.get_or_insert(resume.to_owned());
        if self.lora_modules.is_empty() {
            self.lora_modules.push("all".to_owned());
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
            tokenizer: required(args.tokenizer.clone(), "tokenizer")?,
            dataset: required(args.dataset.clone(), "dataset")?,
            max_train_samples: args.max_train_samples,
            drop_empty: required(args.drop_empty, "drop-empty")?,
            meta_prompt_pattern: required(args.meta_prompt_pattern.clone(), "meta-prompt-pattern")?,
            output_dir: required(args.output_dir.clone(), "output-dir")?,
            resume: match required(args.resume.clone(), "resume")?.as_str() {
                "auto" => Resume::Auto,
                "never" => Resume::Never,
                path => Resume::From(path.into()),
            },
            break_lock: required(args.break_lock, "break-lock")?,
            collate: CollateConfig {
                source_max_len: positive(args.source_max_len, "source-max-len")?,
                target_max_len: positive(args.target_max_len, "target-max-len")?,
                train_on_source: required(args.train_on_source, "train-on-source")?,
                add_eos_to_target: required(args.add_eos_to_target, "add-eos-to-target")?,
            },
            lora: lora_config(&args, &checkpoint)?,
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
            max_steps: args.max_steps.and_then(|steps| u64::try_from(steps).ok()),
            learning_rate: in_range(args.learning_rate, "learning-rate", 0.0, 1e3)?,
            lr_scheduler_type: required(args.lr_scheduler_type, "lr-scheduler-type")?,
            warmup_ratio: in_range(args.warmup_ratio, "warmup-ratio", 0.0, 1.0)?,
            adamw: AdamWConfig {
                weight_decay: in_range(args.weight_decay, "weight-decay", 0.0, 1e3)?,
                max_grad_norm: in_range(args.max_grad_norm, "max-grad-norm", 0.0, 1e9)?,
                ..AdamWConfig::default()
            },
            keep: match args.gradient_checkpointing {
                Some(false) => Keep::Graph,
                _ => Keep::Input,
            },
            seed,
            logging_steps: positive(args.logging_steps, "logging-steps")?,
            save_steps: positive(args.save_steps, "save-steps")?,
            save_total_limit: required(args.save_total_limit, "save-total-limit")?,
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

/// Refuses what is not built in, and warns of what changes nothing.
fn check_switches(args: &TrainArgs) -> Result<(), CommandError> {
    if args.full_finetune == Some(true) {
        return Err(CommandError::usage(
            "--full-finetune true: only adapters are trained; leave it out or give false",
        ));
    }
    match args.bits {
        Some(16 | 32) | None => Ok(()),
        Some(bits @ (4 | 8)) => {
            tracing::warn!(
                "--bits {bits}: the frozen weights are not quantised, they are held in --dtype"
            );
            Ok(())
        }
        Some(bits) => Err(CommandError::usage(format!("--bits {bits}: give 4, 8, 16 or 32"))),
    }
}

fn lora_config(args: &TrainArgs, checkpoint: &std::path::Path) -> Result<LoraConfig, CommandError> {
    let dropout = required(args.lora_dropout, "lora-dropout")?;
    if dropout != 0.0 {
        return Err(CommandError::usage(format!("--lora-dropout {dropout}: only 0 is built in")));
    }
    let known = LoraConfig::default().target_modules;
    let target_modules = if args.lora_modules == ["all"] {
        known
    } else {
        if let Some(name) = args.lora_modules.iter().find(|name| !known.contains(*name)) {
            let known: Vec<_> = known.into_iter().collect();
            return Err(CommandError::usage(format!(
                "--lora-modules {name}: no such layer; choose from all, {}",
                known.join(", ")
            )));
        }
        args.lora_modules.iter().cloned().collect()
    };
    Ok(LoraConfig {
        r: positive(args.lora_r, "lora-r")?,
        lora_alpha: in_range(args.lora_alpha, "lora-alpha", 1e-9, 1e9)?,
        lora_dropout: 0.0,
        target_modules,
        use_rslora: false,
        base_model_name_or_path: Some(checkpoint.display().to_string()),
    })
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
