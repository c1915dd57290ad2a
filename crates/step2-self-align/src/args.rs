//! What the user types.

use std::path::PathBuf;

use dromedary_command::{Error as CommandError, boolean, required};
use dromedary_llama::cli::SamplingArgs;
use serde::{Deserialize, Serialize};

use crate::filter::Compat;
use crate::generate::GenerateConfig;
use crate::merge::{IdentityLimit, IdentityWord, MergeConfig};

/// Tables that a configuration file of this step may have.
pub const SUBCOMMANDS: [&str; 3] = ["generate", "merge-and-filter", "render"];

/// Answer prompts behind the principles, one line of JSON per prompt.
///
/// Run it again after an interruption and it goes on with the prompts that have no line yet. A
/// prompt that cannot be answered (empty, too long) gets a line with the reason.
#[derive(Clone, Debug, Default, clap::Args, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GenerateArgs {
    /// Model: a folder with config.json, safetensors and tokenizer.
    #[arg(long, alias = "ckpt-dir", alias = "model-name-or-path", value_name = "DIR")]
    pub checkpoint: Option<PathBuf>,
    /// Tokenizer file or folder [default: the checkpoint's].
    #[arg(long, alias = "tokenizer-path", alias = "tokenizer-name", value_name = "PATH")]
    pub tokenizer: Option<PathBuf>,
    /// Prompts: JSON array or JSONL of instruction and input, also .gz and .zst.
    #[arg(long, value_name = "FILE")]
    pub input_file: Option<PathBuf>,
    /// Rows (JSONL); with several groups, or a name in .json, `_{G}shards_{R}` is added.
    #[arg(long, value_name = "FILE")]
    pub output_file: Option<PathBuf>,
    /// Principles (.toml), or the text of the prompt itself, which must end in `User:`
    /// [default: the built-in principles].
    #[arg(long, value_name = "FILE")]
    pub meta_prompt_file: Option<PathBuf>,
    /// Use the first prompts of the file only.
    #[arg(long, value_name = "PROMPTS")]
    pub limit: Option<usize>,
    /// This group: it answers prompts R, R + G, R + 2G, ... [default: 0].
    #[arg(long, value_name = "R")]
    pub group_rank: Option<usize>,
    /// Number of groups G that share the input file [default: 1].
    #[arg(long, value_name = "G")]
    pub group_size: Option<usize>,

    /// Tokens that a row may have behind the shared prefix: user's text and answer [default: 768].
    #[arg(long, value_name = "TOKENS")]
    pub max_seq_len: Option<usize>,
    /// Tokens that the shared prefix may have [default: 2816].
    #[arg(long, value_name = "TOKENS")]
    pub max_shared_seq_len: Option<usize>,
    /// Tokens of thoughts and answer together [default: 512].
    #[arg(long, alias = "generate-max-len", value_name = "TOKENS")]
    pub max_gen_len: Option<usize>,
    /// Rows that are generated at once [default: 32].
    #[arg(long, value_name = "ROWS")]
    pub max_batch_size: Option<usize>,

    /// Keys and values of this many tokens are held for all rows together: rows wait for them, and
    /// more short ones than long ones are generated at once [default: max-batch-size x max-seq-len].
    #[arg(long, value_name = "TOKENS")]
    pub max_kv_tokens: Option<usize>,
    /// Keep the shared prefix's keys and values in this folder, and take them from there when model
    /// and prefix are the same [default: run it each time].
    #[arg(long, value_name = "DIR")]
    pub prefix_cache: Option<PathBuf>,
    /// Make every row equal to the last bit in whatever company it is generated: with the same
    /// --max-batch-size, --threads and number of processes a run that was interrupted or split into
    /// groups gives the same rows. Costs speed [default: false].
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_parser = boolean)]
    pub deterministic: Option<bool>,

    #[command(flatten)]
    #[serde(flatten)]
    #[allow(missing_docs, reason = "its doc comment would become the subcommand's")]
    pub sampling: SamplingArgs,
    /// Begin each answer with this text instead of leaving it to the model; the model goes on behind
    /// it. Without a value: " I am a helpful, ethical, and reliable assistant." [default: off].
    #[arg(long, num_args = 0..=1, value_name = "TEXT",
        default_missing_value = " I am a helpful, ethical, and reliable assistant.")]
    pub force_prefix: Option<String>,
    /// Text that ends a row, \n for a newline; may be given several times [default: those of the
    /// principles].
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub stop: Vec<String>,
    /// Seed; a row's text depends on it, the row's id and the model alone [default: 1].
    #[arg(long, value_name = "SEED")]
    pub seed: Option<u64>,

    /// Where to compute: auto, cpu, cuda or cuda:N [default: auto].
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<String>,
    /// Kind of the weights: auto, f32, bf16 or f16; a CPU computes in f32 by itself
    /// [default: auto].
    #[arg(long, value_name = "KIND")]
    pub dtype: Option<String>,
    /// Threads of libtorch [default: all cores].
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    /// Take over the output although another process seems to write it.
    #[arg(long, num_args = 0..=1, default_missing_value = "true",
        value_parser = boolean)]
    pub break_lock: Option<bool>,
}

impl TryFrom<GenerateArgs> for GenerateConfig {
    type Error = CommandError;

    fn try_from(args: GenerateArgs) -> Result<Self, CommandError> {
        let checkpoint = required(args.checkpoint, "checkpoint")?;
        let config = Self {
            tokenizer: args.tokenizer.unwrap_or_else(|| checkpoint.clone()),
            checkpoint,
            input_file: required(args.input_file, "input-file")?,
            output_file: required(args.output_file, "output-file")?,
            meta_prompt_file: args.meta_prompt_file,
            limit: args.limit,
            group_rank: args.group_rank.unwrap_or(0),
            group_size: args.group_size.unwrap_or(1),
            max_seq_len: args.max_seq_len.unwrap_or(768),
            max_shared_seq_len: args.max_shared_seq_len.unwrap_or(2816),
            max_gen_len: args.max_gen_len.unwrap_or(512),
            max_batch_size: args.max_batch_size.unwrap_or(32),
            max_kv_tokens: args.max_kv_tokens,
            prefix_cache: args.prefix_cache,
            deterministic: args.deterministic.unwrap_or(false),
            sampling: args.sampling.resolved()?,
            force_prefix: args.force_prefix.filter(|text| !text.is_empty()),
            stop: args.stop.iter().map(|text| text.replace("\\n", "\n")).collect(),
            seed: args.seed.unwrap_or(1),
            device: args.device.unwrap_or_else(|| "auto".to_owned()),
            dtype: args.dtype.unwrap_or_else(|| "auto".to_owned()),
            threads: args.threads,
            break_lock: args.break_lock.unwrap_or(false),
        };
        config.check()?;
        Ok(config)
    }
}

/// Filter the rows of all groups and write what step 3 trains on.
///
/// Every dropped row is written too, with the rule that dropped it, and all rows are counted by
/// rule and source.
#[derive(Clone, Debug, Default, clap::Args, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MergeArgs {
    /// Files to merge: a path with * and ? (in quotes).
    #[arg(long, value_name = "PATTERN")]
    pub data_file_pattern: Option<String>,
    /// Identity conversations to add, with {product} and {maker} for the names.
    #[arg(long, value_name = "FILE")]
    pub dummy_data_file: Option<PathBuf>,
    /// Training rows (JSON array, or by its ending .jsonl, .gz, .zst).
    #[arg(long, value_name = "FILE")]
    pub output_file: Option<PathBuf>,
    /// Dropped rows (JSONL) [default: dropped.jsonl beside the output].
    #[arg(long, value_name = "FILE")]
    pub dropped_file: Option<PathBuf>,
    /// Counts by rule and source (JSON) [default: merge_report.json beside the output].
    #[arg(long, value_name = "FILE")]
    pub report_file: Option<PathBuf>,
    /// Identity rows to add at most: a number, `survivors` (as many as rows passed the filter) or
    /// `all` [default: all].
    #[arg(long, value_name = "N|survivors|all")]
    pub max_identity_rows: Option<IdentityLimit>,
    /// The meta prompt that the rows were generated behind [default: the built-in principles].
    #[arg(long, value_name = "FILE")]
    pub meta_prompt_file: Option<PathBuf>,
    /// Whose rules to follow instead of the corrected ones.
    #[arg(long, value_enum)]
    pub compat: Option<Compat>,
    /// Merge files that generation has not finished [default: false].
    #[arg(long, num_args = 0..=1, default_missing_value = "true",
        value_parser = boolean)]
    pub allow_unfinished: Option<bool>,
    /// Seed of the shuffle [default: 1].
    #[arg(long, value_name = "SEED")]
    pub seed: Option<u64>,
}

impl TryFrom<MergeArgs> for MergeConfig {
    type Error = CommandError;

    fn try_from(args: MergeArgs) -> Result<Self, CommandError> {
        let output_file = required(args.output_file, "output-file")?;
        Ok(Self {
            data_file_pattern: required(args.data_file_pattern, "data-file-pattern")?,
            dummy_data_file: args.dummy_data_file,
            dropped_file: args
                .dropped_file
                .unwrap_or_else(|| output_file.with_file_name("dropped.jsonl")),
            report_file: args
                .report_file
                .unwrap_or_else(|| output_file.with_file_name("merge_report.json")),
            output_file,
            max_identity_rows: args
                .max_identity_rows
                .unwrap_or(IdentityLimit::Word(IdentityWord::All)),
            meta_prompt_file: args.meta_prompt_file,
            compat: args.compat,
            allow_unfinished: args.allow_unfinished.unwrap_or(false),
            seed: args.seed.unwrap_or(1),
        })
    }
}

/// Print the meta prompt that is made of the principles.
#[derive(Clone, Debug, Default, clap::Args, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RenderArgs {
    /// Principles (.toml), or a text [default: the built-in principles].
    #[arg(long, value_name = "FILE")]
    pub meta_prompt_file: Option<PathBuf>,
    /// Count the prompt's tokens with this tokenizer, too (to stderr).
    #[arg(long, alias = "tokenizer-path", alias = "tokenizer-name", value_name = "PATH")]
    pub tokenizer: Option<PathBuf>,
}
