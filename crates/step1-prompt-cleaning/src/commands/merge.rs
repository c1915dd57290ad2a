use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dromedary_command::{Error, required};
use dromedary_records::{Prompt, RowWriter};
use serde::{Deserialize, Serialize};

use super::settings::{JudgeArgs, JudgeConfig, SharedArgs, SharedConfig, refuse_overwriting};
use super::{Run, Session, make_report_folder, on_threads, publish};
use crate::buckets::KeyedBuckets;
use crate::report::{Report, SourceCounts};
use crate::sources::{
    AnsweredMessages, DollyPrompt, Fault, OasstMessage, Row, Value, refuse_hub_name, rows,
};
use crate::{
    Cleaner, Draft, DropReason, Fingerprint, Judged, KeyedOrder, LengthRule, Lists, NotEmpty,
    Pipeline, Result, Rules, Source,
};

const COMMAND: &str = "clean-and-merge";

/// Flags of `clean-and-merge`.
#[derive(Clone, Debug, Default, PartialEq, clap::Args, Serialize, Deserialize)]
#[serde(default)]
pub struct MergeArgs {
    /// Output of aggregate-sharegpt.
    #[arg(long, value_name = "FILE")]
    pub sharegpt_prompt_path: Option<PathBuf>,
    /// Output of subsample-openorca.
    #[arg(long, value_name = "FILE")]
    pub openorca_prompt_path: Option<PathBuf>,
    /// databricks-dolly-15k.jsonl, which the original downloads.
    #[arg(long, value_name = "FILE")]
    pub dolly: Option<PathBuf>,
    /// oasst1 as JSON lines, flat messages or trees, which the original downloads.
    #[arg(long, value_name = "FILE")]
    pub oasst: Option<PathBuf>,
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
    /// Flags that every command has.
    #[command(flatten)]
    #[serde(flatten)]
    pub shared: SharedArgs,
}

/// Settings of [`clean_and_merge`].
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MergeConfig {
    /// Output of [`aggregate_sharegpt`](super::aggregate_sharegpt).
    pub sharegpt_prompt_path: Option<PathBuf>,
    /// Output of [`subsample_openorca`](super::subsample_openorca).
    pub openorca_prompt_path: Option<PathBuf>,
    /// Dolly-15k.
    pub dolly: Option<PathBuf>,
    /// oasst1.
    pub oasst: Option<PathBuf>,
    /// Where the prompts go.
    pub output_file: PathBuf,
    /// Tokens of the shortest prompt.
    pub min_prompt_len: usize,
    /// Settings of the commands that measure, judge and order prompts.
    #[serde(flatten)]
    pub judge: JudgeConfig,
    /// Settings that every command has.
    #[serde(flatten)]
    pub shared: SharedConfig,
}

impl TryFrom<MergeArgs> for MergeConfig {
    type Error = Error;

    fn try_from(args: MergeArgs) -> dromedary_command::Result<MergeConfig> {
        let shared = SharedConfig::try_from(args.shared)?;
        let config = MergeConfig {
            sharegpt_prompt_path: args.sharegpt_prompt_path,
            openorca_prompt_path: args.openorca_prompt_path,
            dolly: args.dolly,
            oasst: args.oasst,
            output_file: required(args.output_file, "output_file")?,
            min_prompt_len: args.min_prompt_len.unwrap_or(2),
            judge: JudgeConfig::resolve(args.judge, &shared)?,
            shared,
        };
        config.check()?;
        Ok(config)
    }
}

impl MergeConfig {
    fn check(&self) -> dromedary_command::Result<()> {
        let files: Vec<_> =
            Source::ALL.into_iter().filter_map(|source| self.file(source)).collect();
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
        for source in Source::ALL {
            if let Some(file) = self.file(source) {
                refuse_hub_name(file, flag(source))?;
            }
        }
        refuse_overwriting(&self.output_file, files)
    }

    fn file(&self, source: Source) -> Option<&PathBuf> {
        match source {
            Source::Dolly => self.dolly.as_ref(),
            Source::Oasst1 => self.oasst.as_ref(),
            Source::ShareGpt => self.sharegpt_prompt_path.as_ref(),
            Source::OpenOrca => self.openorca_prompt_path.as_ref(),
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
    let lists = Lists::open(config.judge.lists.as_deref())?;
    let pipeline = pipeline(config, &lists)?;
    let mut writer = RowWriter::create(&config.output_file)?;
    let mut run = Run::new(session, config.shared.max_bad_rows);
    let mut merger = Merger::new(config);
    for source in Source::ALL {
        let Some(file) = config.file(source) else {
            tracing::warn!("no {}: the output has no prompts of {source}", flag(source));
            continue;
        };
        merger.counts.insert(source.to_string(), SourceCounts::default());
        run.read(
            file,
            drafts(source, file, &lists)?,
            |draft| draft.map(|draft| pipeline.judge(draft)),
            |judged| merger.admit(source, judged),
        )?;
    }
    for prompt in merger.buckets.into_ordered() {
        writer.write(&prompt?)?;
    }
    let report = run.report(COMMAND, config, &config.output_file, merger.counts)?;
    publish(report, writer, config.shared.report.as_deref())
}

/// The rules that look at one prompt.
fn pipeline(config: &MergeConfig, lists: &Arc<Lists>) -> Result<Pipeline> {
    let length = LengthRule {
        counter: config.judge.counter()?,
        min: config.min_prompt_len,
        max: config.judge.max_prompt_len,
        suffix: "",
    };
    let cleaner = Cleaner::new(config.shared.compat.into(), lists.clone());
    Ok(Pipeline::new().with(cleaner).with(NotEmpty).with(length))
}

/// The prompts of a source, or why its rows are none.
type Drafts = Box<dyn Iterator<Item = Result<Row<std::result::Result<Draft, DropReason>>>>>;

fn drafts(source: Source, file: &Path, lists: &Arc<Lists>) -> Result<Drafts> {
    let alone = move |instruction: String| Ok(Draft::new(source, instruction));
    Ok(match source {
        Source::Dolly => Box::new(DollyPrompt::open(file, lists.clone())?.map(move |row| {
            Ok(row?.map(|prompt| match prompt {
                DollyPrompt::Prompt(instruction) => alone(instruction),
                DollyPrompt::Unfit(reason) => Err(reason),
            }))
        })),
        Source::Oasst1 => {
            let answered = AnsweredMessages::open(file)?;
            Box::new(OasstMessage::open(file, answered)?.map(move |row| {
                Ok(row?.map(|message| match message {
                    OasstMessage::Prompt(text) => alone(text),
                    OasstMessage::Unfit(reason) => Err(reason),
                }))
            }))
        }
        Source::ShareGpt | Source::OpenOrca => Box::new(
            rows(file, &["instruction"])?
                .map(move |row| Ok(row?.read(|row| read_prompt(source, row)))),
        ),
    })
}

fn read_prompt(
    source: Source,
    mut row: Value,
) -> std::result::Result<std::result::Result<Draft, DropReason>, Fault> {
    let instruction = row.take_text("instruction")?;
    let input = row.take_optional_text("input")?.unwrap_or_default();
    Ok(Ok(Draft { source, instruction, input }))
}

/// Keeps the first of equal prompts, in the order of the seed.
struct Merger {
    rules: Rules,
    order: KeyedOrder,
    seen: BTreeSet<Fingerprint>,
    buckets: KeyedBuckets<Prompt>,
    counts: BTreeMap<String, SourceCounts>,
}

impl Merger {
    fn new(config: &MergeConfig) -> Merger {
        Merger {
            rules: config.shared.compat.into(),
            order: KeyedOrder::new(config.judge.seed),
            seen: BTreeSet::new(),
            buckets: KeyedBuckets::beside(&config.output_file),
            counts: BTreeMap::new(),
        }
    }

    fn admit(
        &mut self,
        source: Source,
        judged: Option<std::result::Result<Judged, DropReason>>,
    ) -> Result<()> {
        let counts = self.counts.entry(source.to_string()).or_default();
        counts.rows += 1;
        let Judged { draft, edits, dropped } = match judged {
            None => {
                counts.count_drops(DropReason::BadRow, 1);
                return Ok(());
            }
            Some(Err(reason)) => {
                counts.count_drops(reason, 1);
                return Ok(());
            }
            Some(Ok(judged)) => judged,
        };
        counts.count_edits(&edits);
        if let Some(dropped) = dropped {
            counts.count_drops(dropped.reason, 1);
            return Ok(());
        }
        let fingerprint = Fingerprint::of(self.rules, &draft.whole());
        if self.seen.insert(fingerprint) {
            counts.kept += 1;
            self.buckets.push(self.order.output_key(&fingerprint), &draft.into_prompt())?;
        } else {
            counts.count_drops(DropReason::Duplicate, 1);
        }
        Ok(())
    }
}
