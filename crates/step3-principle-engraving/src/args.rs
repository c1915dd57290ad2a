//! What the user types.

use std::path::PathBuf;

use dromedary_command::{ByteSize, boolean};
use serde::{Deserialize, Serialize};

use crate::{activations::ActivationsMode, formats::DatasetFormat, schedule::ScheduleType};

/// Fine-tune the base model on the aligned answers, with the principles pruned away.
///
/// Reads the rows that step 2 merged (a JSON array or JSONL of instruction, input, output and
/// example_id), puts a short system prompt before each in place of the principles, and trains LoRA
/// adapters on all linear layers except the head. Rows of other formats are read as --dataset-format says. Writes checkpoints and `adapter/` in PEFT's format
/// under --output-dir; run it again after an interruption and it goes on from the last checkpoint.
#[derive(Clone, Debug, Default, clap::Args, Serialize, Deserialize)]
#[serde(default)]
pub struct TrainArgs {
    /// Base model: a folder with config.json, safetensors and tokenizer.
    #[arg(long, alias = "model-name-or-path", alias = "ckpt-dir", value_name = "DIR")]
    pub checkpoint: Option<PathBuf>,
    /// Tokenizer file or folder [default: the checkpoint's].
    #[arg(long, alias = "tokenizer-path", alias = "tokenizer-name", value_name = "PATH")]
    pub tokenizer: Option<PathBuf>,
    /// Rows to train on: JSON array or JSONL, also .gz and .zst.
    #[arg(long, value_name = "FILE")]
    pub dataset: Option<PathBuf>,
    /// Form of the rows [default: by the fields of the first].
    #[arg(long, value_name = "NAME")]
    pub dataset_format: Option<DatasetFormat>,
    /// What is learned of a conversation (oasst1, hh-rlhf, sharegpt, chat) [default: assistant].
    #[arg(long, value_name = "TURNS")]
    pub learned_turns: Option<LearnedTurns>,
    /// Jinja template of sharegpt and chat rows, or a tokenizer_config.json with one [default: the
    /// tokenizer's].
    #[arg(long, value_name = "FILE")]
    pub chat_template: Option<PathBuf>,
    /// Day that strftime_now of a chat template tells, as 2024-07-26 [default: it is not defined, so that
    /// rows do not depend on the day].
    #[arg(long, value_name = "DATE")]
    pub chat_date: Option<String>,
    /// Glob of the short system prompts, one of which each dromedary row gets by its example_id; a row with a
    /// meta_prompt of its own keeps it.
    #[arg(long, value_name = "GLOB")]
    pub meta_prompt_pattern: Option<String>,
    /// Folder for checkpoints, metrics and the adapter.
    #[arg(long, value_name = "DIR")]
    pub output_dir: Option<PathBuf>,
    /// Where to start: `auto` (the newest checkpoint of --output-dir, else from the beginning),
    /// `never`, or a checkpoint folder [default: auto].
    #[arg(long, alias = "resume-dir", value_name = "auto|never|DIR")]
    pub resume: Option<String>,
    /// Dromedary's switch for --resume: True is `auto`, False is `never`.
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_parser = boolean,
        conflicts_with = "resume")]
    pub resume_from_training: Option<bool>,
    /// Take the output folder over although another job seems to write to it [default: false].
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_parser = boolean)]
    pub break_lock: Option<bool>,

    /// Tokens of a source; longer ones lose their beginning. A conversation may have as many as source and
    /// target together, and loses its end; with --learned-turns last, all before that turn is the source
    /// [default: 1024].
    #[arg(long, value_name = "TOKENS")]
    pub source_max_len: Option<usize>,
    /// Tokens of a target, EOS among them; longer ones lose their end [default: 256].
    #[arg(long, value_name = "TOKENS")]
    pub target_max_len: Option<usize>,
    /// Use the first rows only.
    #[arg(long, value_name = "ROWS")]
    pub max_train_samples: Option<usize>,
    /// Learn the source's tokens too [default: false].
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_parser = boolean)]
    pub train_on_source: Option<bool>,
    /// End each complete target with EOS; a chat template ends its turns itself [default: true].
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_parser = boolean)]
    pub add_eos_to_target: Option<bool>,
    /// Leave rows out that have no target token, instead of refusing them [default: false].
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_parser = boolean)]
    pub drop_empty: Option<bool>,

    /// Rows to compute a held-out loss on, in a file of their own.
    #[arg(long, value_name = "FILE")]
    pub eval_dataset: Option<PathBuf>,
    /// Rows to hold out of --dataset instead, drawn by the seed and not trained on.
    #[arg(long, value_name = "ROWS")]
    pub eval_dataset_size: Option<usize>,
    /// Use so many of the held-out rows.
    #[arg(long, value_name = "ROWS")]
    pub max_eval_samples: Option<usize>,
    /// When to compute the held-out loss [default: steps where rows are held out, else no].
    #[arg(long, alias = "eval-strategy", value_name = "WHEN")]
    pub evaluation_strategy: Option<EvaluationStrategy>,
    /// Steps between held-out losses [default: 500].
    #[arg(long, value_name = "STEPS")]
    pub eval_steps: Option<u64>,
    /// Rows of a held-out batch at most, which has no more tokens than one of training [default: 8].
    #[arg(long, value_name = "ROWS")]
    pub per_device_eval_batch_size: Option<usize>,

    /// Start from this adapter in PEFT's format; it brings rank, alpha and layers.
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// Rank of the adapters [default: 64].
    #[arg(long, value_name = "R")]
    pub lora_r: Option<i64>,
    /// Scale of the adapters: their product is multiplied by alpha / r [default: 16].
    #[arg(long, value_name = "ALPHA")]
    pub lora_alpha: Option<f64>,
    /// Dropout before the adapters [default: 0].
    #[arg(long, value_name = "P")]
    pub lora_dropout: Option<f64>,
    /// Multiply by alpha / sqrt(r) instead [default: false].
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_parser = boolean)]
    pub use_rslora: Option<bool>,
    /// Layers that get adapters: `all`, or names such as q_proj,v_proj [default: all].
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    pub lora_modules: Vec<String>,
    /// Train all weights instead of adapters; `model/` is written then [default: false].
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_parser = boolean)]
    pub full_finetune: Option<bool>,
    /// Bits of the frozen weights: 4 keeps a base that `llama quantize` has stored in NF4 as it is, 16
    /// dequantises it into --dtype. A base that is stored otherwise is held in --dtype, with a warning
    /// where 4 or 8 are asked for [default: as the base is stored].
    #[arg(long, value_name = "BITS")]
    pub bits: Option<u8>,

    /// Ranks that hold one model together; more ranks are more replicas, which share the rows of a
    /// step [default: all ranks].
    #[arg(long, value_name = "N")]
    pub tp: Option<usize>,
    /// Divide the optimizer's moments, and the f32 values behind 16-bit weights, over the replicas: the
    /// same results in less memory [default: false].
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_parser = boolean)]
    pub shard_optimizer: Option<bool>,

    /// Rows of a micro-batch [default: 1].
    #[arg(long, value_name = "ROWS")]
    pub per_device_train_batch_size: Option<usize>,
    /// Micro-batches of an optimizer step, of each replica [default: 16].
    #[arg(long, value_name = "N")]
    pub gradient_accumulation_steps: Option<usize>,
    /// Passes over the rows [default: 1].
    #[arg(long, value_name = "N")]
    pub num_train_epochs: Option<f64>,
    /// Optimizer steps; wins over --num-train-epochs, unless it is 0 or less.
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub max_steps: Option<i64>,
    /// Put rows of similar length into a batch [default: false].
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_parser = boolean)]
    pub group_by_length: Option<bool>,
    /// Highest learning rate [default: 1e-4].
    #[arg(long, value_name = "RATE")]
    pub learning_rate: Option<f64>,
    /// Shape of the learning rate after warm-up [default: cosine].
    #[arg(long, value_name = "SHAPE")]
    pub lr_scheduler_type: Option<ScheduleType>,
    /// Share of the steps that warm up [default: 0.03].
    #[arg(long, value_name = "RATIO")]
    pub warmup_ratio: Option<f64>,
    /// Steps that warm up; wins over --warmup-ratio.
    #[arg(long, value_name = "STEPS")]
    pub warmup_steps: Option<u64>,
    /// Share of the steps at the end over which wsd decays [default: 0.1].
    #[arg(long, value_name = "RATIO")]
    pub decay_ratio: Option<f64>,
    /// Steps at the end over which wsd decays; wins over --decay-ratio.
    #[arg(long, value_name = "STEPS")]
    pub decay_steps: Option<u64>,
    /// Decoupled weight decay of AdamW, of matrices but not of the norms' weights [default: 0].
    #[arg(long, value_name = "DECAY")]
    pub weight_decay: Option<f64>,
    /// Global norm that gradients are clipped to, 0 for no clipping [default: 0.3].
    #[arg(long, value_name = "NORM")]
    pub max_grad_norm: Option<f64>,
    /// What forward keeps for backward: keep, recompute, or auto, which keeps what fits into --max-memory
    /// [default: recompute].
    #[arg(long, value_name = "MODE", conflicts_with = "gradient_checkpointing")]
    pub activations: Option<ActivationsMode>,
    /// Memory that `--activations auto` fits into on each rank, such as 8GB [default: 90 % of what is free,
    /// divided by the ranks of the machine].
    #[arg(long, value_name = "SIZE")]
    pub max_memory: Option<ByteSize>,
    /// Dromedary's switch for --activations: True is `recompute`, False is `keep`.
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_parser = boolean)]
    pub gradient_checkpointing: Option<bool>,
    /// Seed of the adapters and of the order of the rows [default: 42].
    #[arg(long, value_name = "SEED")]
    pub seed: Option<u64>,

    /// Steps between log lines [default: 5].
    #[arg(long, value_name = "STEPS")]
    pub logging_steps: Option<u64>,
    /// Steps between checkpoints [default: 500].
    #[arg(long, value_name = "STEPS")]
    pub save_steps: Option<u64>,
    /// Checkpoints that are kept, at least 2 [default: 3].
    #[arg(long, value_name = "N")]
    pub save_total_limit: Option<usize>,

    /// Who else reads the metrics: tensorboard gets events in --output-dir/tensorboard
    /// [default: tensorboard].
    #[arg(long, value_name = "NAME")]
    pub report_to: Option<ReportTo>,

    /// Where to compute: auto, cpu, cuda or cuda:N [default: auto].
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<String>,
    /// Kind of the frozen weights: auto, f32, bf16 or f16; the adapters are f32 [default: auto].
    #[arg(long, value_name = "KIND")]
    pub dtype: Option<String>,
    /// Dromedary's switch for --dtype bf16; a CPU computes in f32 all the same.
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_parser = boolean)]
    pub bf16: Option<bool>,
    /// Dromedary's switch for --dtype f16; a CPU computes in f32 all the same.
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_parser = boolean)]
    pub fp16: Option<bool>,
    /// Threads of libtorch [default: all cores].
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,

    /// Flags that are accepted and do nothing.
    #[command(flatten)]
    #[serde(flatten)]
    pub ignored: IgnoredTrainArgs,
}

/// Flags of Dromedary's launch scripts that belong to libraries we do not use.
#[derive(Clone, Debug, Default, clap::Args, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs, reason = "hidden flags without a meaning")]
pub struct IgnoredTrainArgs {
    #[arg(long, hide = true)]
    pub double_quant: Option<String>,
    #[arg(long, hide = true)]
    pub quant_type: Option<String>,
    #[arg(long, hide = true)]
    pub adam8bit: Option<String>,
    #[arg(long, hide = true)]
    pub optim: Option<String>,
    #[arg(long, hide = true)]
    pub save_strategy: Option<String>,
    #[arg(long, hide = true)]
    pub ddp_backend: Option<String>,
    #[arg(long, hide = true)]
    pub ddp_find_unused_parameters: Option<String>,
}

/// Which turns of a conversation are learned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum LearnedTurns {
    /// Each of the assistant's turns, with what ends it.
    #[default]
    Assistant,
    /// The last of the assistant's turns.
    Last,
    /// All turns, and what stands between them.
    All,
}

/// When the held-out loss is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum EvaluationStrategy {
    /// Never.
    No,
    /// Every --eval-steps steps and behind the last.
    Steps,
    /// Behind each epoch and behind the last step.
    Epoch,
}

/// Programs that the metrics are written for, besides `metrics.jsonl` and `curves.svg`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum ReportTo {
    /// TensorBoard.
    #[value(alias = "all")]
    #[serde(alias = "all")]
    Tensorboard,
    /// None.
    None,
}
