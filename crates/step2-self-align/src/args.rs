//! What the user types.

use std::path::PathBuf;

use dromedary_command::{Error as CommandError, boolean, required};
use dromedary_llama::cli::{SamplingArgs, stop_strings};
use serde::{Deserialize, Serialize};

use crate::Form;
use crate::filter::Compat;
use crate::generate::GenerateConfig;
use crate::merge::{IdentityLimit, IdentityWord, MergeConfig};
use crate::plan::PlanConfig;
use crate::report_page::default_path;

/// Tables that a configuration file of this step may have.
pub const SUBCOMMANDS: [&str; 6] =
    ["generate", "merge-and-filter", "render", "check", "plan", "status"];

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
    /// What the model is asked with: `self-align` (principles, then thoughts and answer) or `verbose`
    /// (a prompt that asks a trained model for long answers) [default: self-align].
    #[arg(long, value_enum)]
    pub template: Option<Form>,
    /// Principles (.toml), or the text of the prompt itself, which must end in `User:`
    /// [default: the built-in one of the template].
    #[arg(long, value_name = "FILE")]
    pub meta_prompt_file: Option<PathBuf>,
    /// Use the first prompts of the file only.
    #[arg(long, value_name = "PROMPTS")]
    pub limit: Option<usize>,
    /// This group: it answers those of the prompts R, R + G, R + 2G, ... that have no row yet in any
    /// file of the output's folder and name, whatever G wrote it [default: 0].
    #[arg(long, value_name = "R")]
    pub group_rank: Option<usize>,
    /// Number of groups G that share the input file [default: 1].
    #[arg(long, value_name = "G")]
    pub group_size: Option<usize>,
    /// Processes of mpirun or srun that hold one model together; with more processes there are
    /// several models, which take prompts from one queue [default: all processes].
    #[arg(long, value_name = "COUNT")]
    pub tp: Option<usize>,
    /// Share of the input's rows that may be no prompts (a field of another type, an id that was there
    /// before); each gets a row with the reason [default: 0.5].
    #[arg(long, value_name = "SHARE")]
    pub max_bad_rows: Option<f64>,

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
    /// Text that ends a row, \n for a newline; may be given several times, an empty one for none
    /// [default: those of the principles].
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
    /// Bits of the linear layers: 4 keeps those that `llama quantize` has stored in NF4 as they are, in
    /// an eighth of the memory of f32, and 16 dequantises them into --dtype when they are loaded
    /// [default: as the checkpoint is stored; 16 on a GPU].
    #[arg(long, value_name = "BITS")]
    pub bits: Option<u8>,
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
            template: args.template.unwrap_or_default(),
            meta_prompt_file: args.meta_prompt_file,
            limit: args.limit,
            group_rank: args.group_rank.unwrap_or(0),
            group_size: args.group_size.unwrap_or(1),
            tp: args.tp,
            max_bad_rows: args.max_bad_rows.unwrap_or(0.5),
            max_seq_len: args.max_seq_len.unwrap_or(768),
            max_shared_seq_len: args.max_shared_seq_len.unwrap_or(2816),
            max_gen_len: args.max_gen_len.unwrap_or(512),
            max_batch_size: args.max_batch_size.unwrap_or(32),
            max_kv_tokens: args.max_kv_tokens,
            prefix_cache: args.prefix_cache,
            deterministic: args.deterministic.unwrap_or(false),
            sampling: args.sampling.resolved()?,
            force_prefix: args.force_prefix.filter(|text| !text.is_empty()),
            stop: stop_strings(&args.stop),
            seed: args.seed.unwrap_or(1),
            device: args.device.unwrap_or_else(|| "auto".to_owned()),
            dtype: args.dtype.unwrap_or_else(|| "auto".to_owned()),
            bits: args.bits,
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
    /// What was kept and dropped, with samples, the principles that the thoughts cite, lengths and
    /// speed, as a page for people (HTML) [default: report.html beside the output].
    #[arg(long, value_name = "FILE")]
    pub page_file: Option<PathBuf>,
    /// Identity rows to add at most: a number, `survivors` (as many as rows passed the filter) or
    /// `all` [default: all].
    #[arg(long, value_name = "N|survivors|all")]
    pub max_identity_rows: Option<IdentityLimit>,
    /// What the model is asked with: `self-align` (principles, then thoughts and answer) or `verbose`
    /// (a prompt that asks a trained model for long answers) [default: self-align].
    #[arg(long, value_enum)]
    pub template: Option<Form>,
    /// The meta prompt that the rows were generated behind [default: the built-in one of the template].
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
        let template = args.template.unwrap_or_default();
        if args.compat.is_some() && template != Form::SelfAlign {
            return Err(CommandError::usage(
                "--compat dromedary is about rows of --template self-align, not of verbose ones",
            ));
        }
        Ok(Self {
            data_file_pattern: required(args.data_file_pattern, "data-file-pattern")?,
            dummy_data_file: args.dummy_data_file,
            dropped_file: args
                .dropped_file
                .unwrap_or_else(|| output_file.with_file_name("dropped.jsonl")),
            report_file: args
                .report_file
                .unwrap_or_else(|| output_file.with_file_name("merge_report.json")),
            page_file: args.page_file.unwrap_or_else(|| default_path(&output_file)),
            output_file,
            max_identity_rows: args
                .max_identity_rows
                .unwrap_or(IdentityLimit::Word(IdentityWord::All)),
            template,
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
    /// What the model is asked with: `self-align` (principles, then thoughts and answer) or `verbose`
    /// (a prompt that asks a trained model for long answers) [default: self-align].
    #[arg(long, value_enum)]
    pub template: Option<Form>,
    /// Principles (.toml), or a text [default: the built-in one of the template].
    #[arg(long, value_name = "FILE")]
    pub meta_prompt_file: Option<PathBuf>,
    /// Count the prompt's tokens with this tokenizer, too (to stderr).
    #[arg(long, alias = "tokenizer-path", alias = "tokenizer-name", value_name = "PATH")]
    pub tokenizer: Option<PathBuf>,
}

/// Look for what makes principles fail: too many tokens, exemplars that break the form, rules that no
/// exemplar cites, phrases that the black list lacks.
///
/// Findings that make generation useless are errors, and the exit code is 1.
#[derive(Clone, Debug, Default, clap::Args, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CheckArgs {
    /// Principles (.toml), or a text [default: the built-in principles].
    #[arg(long, value_name = "FILE")]
    pub meta_prompt_file: Option<PathBuf>,
    /// Count tokens with this tokenizer [default: the checkpoint's; without either none are counted].
    #[arg(long, alias = "tokenizer-path", alias = "tokenizer-name", value_name = "PATH")]
    pub tokenizer: Option<PathBuf>,
    /// Model, whose context prefix and row must fit.
    #[arg(long, alias = "ckpt-dir", alias = "model-name-or-path", value_name = "DIR")]
    pub checkpoint: Option<PathBuf>,
    /// Tokens that the shared prefix may have [default: 2816].
    #[arg(long, value_name = "TOKENS")]
    pub max_shared_seq_len: Option<usize>,
    /// Tokens that a row may have behind it [default: 768].
    #[arg(long, value_name = "TOKENS")]
    pub max_seq_len: Option<usize>,
    /// Print JSON [default: false].
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_parser = boolean)]
    pub json: Option<bool>,
}

/// Settings of `check`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct CheckConfig {
    /// Principles or text; the built-in principles where absent.
    pub meta_prompt_file: Option<PathBuf>,
    /// Counts tokens.
    pub tokenizer: Option<PathBuf>,
    /// Gives the context.
    pub checkpoint: Option<PathBuf>,
    /// Tokens of the shared prefix at most.
    pub max_shared_seq_len: usize,
    /// Tokens of a row behind it.
    pub max_seq_len: usize,
    /// Whether JSON is printed.
    pub json: bool,
}

impl From<CheckArgs> for CheckConfig {
    fn from(args: CheckArgs) -> Self {
        Self {
            meta_prompt_file: args.meta_prompt_file,
            tokenizer: args.tokenizer.or_else(|| args.checkpoint.clone()),
            checkpoint: args.checkpoint,
            max_shared_seq_len: args.max_shared_seq_len.unwrap_or(2816),
            max_seq_len: args.max_seq_len.unwrap_or(768),
            json: args.json.unwrap_or(false),
        }
    }
}

/// Show what a generation will take before it runs: rows of each group, tokens, memory of each rank,
/// hours.
///
/// It takes the flags of `generate`, and reads the prompts and the model's configuration. Hours need a
/// rate: stated, or measured by an earlier run on the same machine.
#[derive(Clone, Debug, Default, clap::Args, Serialize, Deserialize)]
#[serde(default)]
pub struct PlanArgs {
    #[command(flatten)]
    #[serde(flatten)]
    #[allow(missing_docs, reason = "its doc comment would become the subcommand's")]
    pub generate: GenerateArgs,
    /// Processes of each job [default: 1].
    #[arg(long, value_name = "COUNT")]
    pub ranks: Option<usize>,
    /// Output tokens a second of one group, as you expect them [default: those of --measured].
    #[arg(long, value_name = "RATE")]
    pub tokens_per_second: Option<f64>,
    /// Tokens of an answer on average [default: those of --measured, else half of --max-gen-len].
    #[arg(long, value_name = "TOKENS")]
    pub output_tokens: Option<f64>,
    /// metrics.jsonl of an earlier run of one group.
    #[arg(long, value_name = "FILE")]
    pub measured: Option<PathBuf>,
}

impl TryFrom<PlanArgs> for PlanConfig {
    type Error = CommandError;

    fn try_from(args: PlanArgs) -> Result<Self, CommandError> {
        let PlanArgs { mut generate, ranks, tokens_per_second, output_tokens, measured } = args;
        for (flag, value) in
            [("tokens-per-second", tokens_per_second), ("output-tokens", output_tokens)]
        {
            if value.is_some_and(|value| value.is_nan() || value <= 0.0) {
                return Err(CommandError::usage(format!("--{flag} must be above 0")));
            }
        }
        // Nothing is written.
        generate.output_file.get_or_insert_default();
        let ranks = ranks.unwrap_or(1);
        Ok(Self {
            generate: generate.try_into()?,
            ranks,
            tokens_per_second,
            output_tokens,
            measured,
        })
    }
}

/// Show how far the generations in a folder are, from any machine that sees it.
#[derive(Clone, Debug, Default, clap::Args, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StatusArgs {
    /// Folder of the output files [default: the present one].
    #[arg(value_name = "DIR")]
    pub folder: Option<PathBuf>,
    /// Print JSON [default: false].
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_parser = boolean)]
    pub json: Option<bool>,
}
