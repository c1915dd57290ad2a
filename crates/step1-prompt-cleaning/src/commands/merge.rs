use std::path::PathBuf;
use std::sync::Arc;

use dromedary_command::{Error, required};
use dromedary_records::RowWriter;
use serde::{Deserialize, Serialize};

use super::merger::{Judge, Merger};
use super::optional::{OptionalArgs, OptionalConfig};
use super::settings::{JudgeArgs, JudgeConfig, SharedArgs, SharedConfig, refuse_overwriting};
use super::{Outcome, Run, Session, make_report_folder, on_threads};
use crate::report::Report;
use crate::sources::{AnsweredMessages, dolly, found_files, oasst_part, one_or_many, prompts};
use crate::{LanguageRule, Result, Source};

const COMMAND: &str = "clean-and-merge";

/// Flags of `clean-and-merge`.
#[derive(Clone, Debug, Default, PartialEq, clap::Args, Serialize, Deserialize)]
#[serde(default)]
pub struct MergeArgs {
    /// Output of aggregate-sharegpt; as for the others: files, folders or patterns, separated by
    /// commas.
    #[arg(long, value_name = "FILES", value_delimiter = ',')]
    #[serde(deserialize_with = "one_or_many")]
    pub sharegpt_prompt_path: Vec<PathBuf>,
    /// Output of subsample-openorca.
    #[arg(long, value_name = "FILES", value_delimiter = ',')]
    #[serde(deserialize_with = "one_or_many")]
    pub openorca_prompt_path: Vec<PathBuf>,
    /// databricks-dolly-15k.jsonl, which the original downloads.
    #[arg(long, value_name = "FILES", value_delimiter = ',')]
    #[serde(deserialize_with = "one_or_many")]
    pub dolly: Vec<PathBuf>,
    /// oasst1 as JSON lines, flat messages or trees, which the original downloads.
    #[arg(long, value_name = "FILES", value_delimiter = ',')]
    #[serde(deserialize_with = "one_or_many")]
    pub oasst: Vec<PathBuf>,
    /// Where the prompts go: a JSON array, or JSON lines if it ends in .jsonl (.gz and .zst too).
    #[arg(long, value_name = "FILE", alias = "output-path")]
    pub output_file: Option<PathBuf>,
    /// Tokens of the shortest prompt that is kept, BOS counted [default: 2].
    #[arg(long, value_name = "TOKENS")]
    pub min_prompt_len: Option<usize>,
    /// Flags of the commands that measure, judge and order prompts.
    #[command(flatten)]
    #[serde(flatten)]
    pub judge: JudgeArgs,
    /// Flags of the rules that are off unless they are asked for.
    #[command(flatten)]
    #[serde(flatten)]
    pub optional: OptionalArgs,
    /// Flags that every command has.
    #[command(flatten)]
    #[serde(flatten)]
    pub shared: SharedArgs,
}

/// Settings of [`clean_and_merge`].
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MergeConfig {
    /// Output of [`aggregate_sharegpt`](super::aggregate_sharegpt).
    pub sharegpt_prompt_path: Vec<PathBuf>,
    /// Output of [`subsample_openorca`](super::subsample_openorca).
    pub openorca_prompt_path: Vec<PathBuf>,
    /// Dolly-15k.
    pub dolly: Vec<PathBuf>,
    /// oasst1.
    pub oasst: Vec<PathBuf>,
    /// Where the prompts go.
    pub output_file: PathBuf,
    /// Tokens of the shortest prompt.
    pub min_prompt_len: usize,
    /// Settings of the commands that measure, judge and order prompts.
    #[serde(flatten)]
    pub judge: JudgeConfig,
    /// Settings of the rules that are off unless they are asked for.
    #[serde(flatten)]
    pub optional: OptionalConfig,
    /// Settings that every command has.
    #[serde(flatten)]
    pub shared: SharedConfig,
}

impl TryFrom<MergeArgs> for MergeConfig {
    type Error = Error;

    fn try_from(args: MergeArgs) -> dromedary_command::Result<MergeConfig> {
        let shared = SharedConfig::try_from(args.shared)?;
        let judge = JudgeConfig::resolve(args.judge, &shared)?;
        let given = [
            (Source::Dolly, &args.dolly),
            (Source::Oasst1, &args.oasst),
            (Source::ShareGpt, &args.sharegpt_prompt_path),
            (Source::OpenOrca, &args.openorca_prompt_path),
        ];
        let given = given.into_iter().filter(|(_, files)| !files.is_empty());
        let sources: Vec<Source> = given.map(|(source, _)| source).collect();
        let found = |source: Source, given: &[PathBuf]| found_files(given, flag(source));
        let config = MergeConfig {
            sharegpt_prompt_path: found(Source::ShareGpt, &args.sharegpt_prompt_path)?,
            openorca_prompt_path: found(Source::OpenOrca, &args.openorca_prompt_path)?,
            dolly: found(Source::Dolly, &args.dolly)?,
            oasst: found(Source::Oasst1, &args.oasst)?,
            output_file: required(args.output_file, "output_file")?,
            min_prompt_len: args.min_prompt_len.unwrap_or(2),
            judge,
            optional: OptionalConfig::resolve(args.optional, &sources)?,
            shared,
        };
        config.check()?;
        Ok(config)
    }
}

impl MergeConfig {
    fn check(&self) -> dromedary_command::Result<()> {
        let files: Vec<_> = Source::ALL.into_iter().flat_map(|source| self.files(source)).collect();
        if files.is_empty() {
            return Err(Error::usage(
                "nothing to merge: give --sharegpt-prompt-path, --openorca-prompt-path, --dolly or \
                 --oasst",
            ));
        }
        if self.min_prompt_len > self.judge.max_prompt_len {
            return Err(Error::usage(format!(
                "--min-prompt-len {} is more than --max-prompt-len {}",
                self.min_prompt_len, self.judge.max_prompt_len
            )));
        }
        if !self.optional.languages.is_empty() {
            let lists = self.judge.open_lists().map_err(|error| Error::usage(error.to_string()))?;
            LanguageRule::new(&self.optional.languages, &lists)
                .map_err(|error| Error::usage(format!("--languages: {error}")))?;
        }
        refuse_overwriting(&self.output_file, files.into_iter().chain(&self.references()))
    }

    fn files(&self, source: Source) -> &[PathBuf] {
        match source {
            Source::Dolly => &self.dolly,
            Source::Oasst1 => &self.oasst,
            Source::ShareGpt => &self.sharegpt_prompt_path,
            Source::OpenOrca => &self.openorca_prompt_path,
        }
    }
}

fn flag(source: Source) -> &'static str {
    match source {
        Source::Dolly => "--dolly",
        Source::Oasst1 => "--oasst",
        Source::ShareGpt => "--sharegpt-prompt-path",
        Source::OpenOrca => "--openorca-prompt-path",
    }
}

/// Cleans the prompts of all sources and writes each once, shuffled by the seed.
///
/// Where prompts are equal, the first wins in the order of [`Source::ALL`]. (Dromedary writes the
/// sources one after the other; shuffled, every part of the file is a fair sample.)
///
/// # Errors
/// A file that cannot be read or written, too many bad rows, no row left, a stop. Nothing is
/// written then.
pub fn clean_and_merge(config: &MergeConfig, session: &Session) -> Result<Report> {
    on_threads(config.shared.threads, || merge(config, session))
}

fn merge(config: &MergeConfig, session: &Session) -> Result<Report> {
    make_report_folder(config.shared.report.as_deref())?;
    let lists = config.judge.open_lists()?;
    let judge = Judge::open(config, &lists)?;
    let mut writer = RowWriter::create(&config.output_file)?;
    let files = Source::ALL.into_iter().flat_map(|source| config.files(source));
    let mut run = Run::new(session, config.shared.max_bad_rows, files);
    let answered = Arc::new(AnsweredMessages::of(&config.oasst)?);
    let mut merger = Merger::new(config, &judge)?;
    for source in Source::ALL {
        let files = config.files(source);
        if files.is_empty() {
            tracing::warn!("no {}: the output has no prompts of {source}", flag(source));
            continue;
        }
        merger.begin(source);
        for file in files {
            let offers = match source {
                Source::Dolly => dolly(file, lists.clone()),
                Source::Oasst1 => oasst_part(file, answered.clone()),
                Source::ShareGpt | Source::OpenOrca => prompts(file, source),
            };
            run.read(
                file,
                offers?,
                |offer| judge.judge(source, offer),
                |verdict| merger.admit(source, verdict),
            )?;
        }
    }
    let notes = merger.write(&mut run, &mut writer)?;
    run.publish(Outcome {
        command: COMMAND,
        settings: serde_json::to_value(config),
        shared: &config.shared,
        output: &config.output_file,
        references: config.references(),
        notes,
        writer,
    })
}
