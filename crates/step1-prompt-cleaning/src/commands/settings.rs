use std::path::{Path, PathBuf};
use std::sync::Arc;

use dromedary_command::{Error, Result};
use dromedary_tokenizer::Tokenizer;
use serde::{Deserialize, Serialize};

use crate::sources::refuse_hub_name;
use crate::{Compat, Lists, TokenCounter};

/// A row in a thousand may be bad.
const MAX_BAD_ROWS: f64 = 0.001;

/// Flags that every command has.
#[derive(Clone, Debug, Default, PartialEq, clap::Args, Serialize, Deserialize)]
#[serde(default)]
pub struct SharedArgs {
    /// Follow the original's rules instead of the corrected ones.
    #[arg(long, value_name = "WHOSE")]
    pub compat: Option<Compat>,
    /// Share of rows that may be unreadable before a file is refused [default: 0.001].
    #[arg(long, value_name = "SHARE")]
    pub max_bad_rows: Option<f64>,
    /// Folder that gets report.json and report.html: counts by source and reason, lengths, samples,
    /// hashes of the inputs [default: none].
    #[arg(long, value_name = "DIR")]
    pub report: Option<PathBuf>,
    /// Threads [default: one a core].
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    /// Print what each rule does to this row, and write nothing: a row as the report names it
    /// (dolly:17 is the 17th row of Dolly) or the id of a prompt [default: none].
    #[arg(long, value_name = "ID")]
    pub explain: Option<String>,
}

/// Settings that every command has.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SharedConfig {
    /// Whose rules, if not the corrected ones.
    pub compat: Option<Compat>,
    /// Share of rows that may be unreadable.
    pub max_bad_rows: f64,
    /// Folder of the report.
    pub report: Option<PathBuf>,
    /// Threads; 0 is one a core.
    pub threads: usize,
    /// The row whose way is printed, in place of any output.
    pub explain: Option<String>,
}

impl SharedConfig {
    /// Whether rows are remembered as they were read, to be shown.
    pub(super) fn keeps_originals(&self) -> bool {
        self.report.is_some() || self.explain.is_some()
    }
}

impl TryFrom<SharedArgs> for SharedConfig {
    type Error = Error;

    fn try_from(args: SharedArgs) -> Result<SharedConfig> {
        Ok(SharedConfig {
            compat: args.compat,
            max_bad_rows: share(args.max_bad_rows, MAX_BAD_ROWS, "--max-bad-rows")?,
            report: args.report,
            threads: args.threads.unwrap_or(0),
            explain: args.explain,
        })
    }
}

/// Flags of the commands that measure, judge and order prompts.
#[derive(Clone, Debug, Default, PartialEq, clap::Args, Serialize, Deserialize)]
#[serde(default)]
pub struct JudgeArgs {
    /// tokenizer.json or tokenizer.model that measures lengths, or a folder with one [default: none,
    /// lengths are estimated].
    #[arg(long, value_name = "PATH", aliases = ["tokenizer-name", "tokenizer-path"])]
    pub tokenizer: Option<PathBuf>,
    /// Tokens of the longest prompt that is kept, BOS counted (for OpenOrca also the two line breaks
    /// behind the question) [default: 256].
    #[arg(long, value_name = "TOKENS")]
    pub max_prompt_len: Option<usize>,
    /// Seed of the order and of every choice [default: 42].
    #[arg(long)]
    pub seed: Option<u64>,
    /// TOML file of phrases, keywords and categories to look for; a list that is left out keeps its
    /// default [default: configs/step1_lists.toml, which is built in].
    #[arg(long, value_name = "FILE")]
    pub lists: Option<PathBuf>,
}

/// Settings of the commands that measure, judge and order prompts.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct JudgeConfig {
    /// What measures lengths; without, they are estimated.
    pub tokenizer: Option<PathBuf>,
    /// Tokens of the longest prompt.
    pub max_prompt_len: usize,
    /// Seed of the order and of every choice.
    pub seed: u64,
    /// Phrases to look for in place of those that are built in.
    pub lists: Option<PathBuf>,
}

impl JudgeConfig {
    /// The settings of the flags, checked against those that every command has.
    pub(crate) fn resolve(args: JudgeArgs, shared: &SharedConfig) -> Result<JudgeConfig> {
        if let Some(tokenizer) = &args.tokenizer {
            refuse_hub_name(tokenizer, "--tokenizer")?;
        }
        // Dromedary's rows cannot be promised where lengths are estimates.
        if shared.compat.is_some() && args.tokenizer.is_none() {
            return Err(Error::usage(
                "--compat dromedary needs --tokenizer (the tokenizer.json or tokenizer.model of LLaMA): the \
                 original's rows depend on exact lengths",
            ));
        }
        if let Err(error) = Lists::open(args.lists.as_deref()) {
            return Err(Error::usage(error.to_string()));
        }
        Ok(JudgeConfig {
            tokenizer: args.tokenizer,
            max_prompt_len: positive(args.max_prompt_len.unwrap_or(256), "--max-prompt-len")?,
            seed: args.seed.unwrap_or(42),
            lists: args.lists,
        })
    }

    /// The phrases to look for.
    pub(crate) fn open_lists(&self) -> crate::Result<Arc<Lists>> {
        Lists::open(self.lists.as_deref())
    }

    /// The files that are read besides the rows.
    pub(crate) fn files(&self) -> Vec<PathBuf> {
        self.tokenizer.iter().map(Tokenizer::file).chain(self.lists.clone()).collect()
    }

    /// What measures lengths.
    pub(crate) fn counter(&self) -> crate::Result<Arc<TokenCounter>> {
        if self.tokenizer.is_none() {
            tracing::warn!(
                "no --tokenizer: lengths are estimates of what LLaMA's would count (most within \
                 20 %)"
            );
        }
        Ok(Arc::new(TokenCounter::open(self.tokenizer.as_deref())?))
    }
}

/// A share between 0 and 1.
fn share(value: Option<f64>, default: f64, flag: &str) -> Result<f64> {
    let share = value.unwrap_or(default);
    if (0.0..=1.0).contains(&share) {
        Ok(share)
    } else {
        Err(Error::usage(format!("{flag} {share}: expected a share from 0 to 1")))
    }
}

/// A number that is at least 1.
pub(crate) fn positive(value: usize, flag: &str) -> Result<usize> {
    if value > 0 {
        Ok(value)
    } else {
        Err(Error::usage(format!("{flag} 0: nothing would be left")))
    }
}

/// Refuses to write over what is read.
pub(crate) fn refuse_overwriting<'p>(
    output: &Path,
    inputs: impl IntoIterator<Item = &'p PathBuf>,
) -> Result<()> {
    let Ok(target) = output.canonicalize() else {
        return Ok(());
    };
    for input in inputs {
        if input.canonicalize().is_ok_and(|input| input == target) {
            return Err(Error::usage(format!(
                "the output {} would replace an input",
                output.display()
            )));
        }
    }
    Ok(())
}
