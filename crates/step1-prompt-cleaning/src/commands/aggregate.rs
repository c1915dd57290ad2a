use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use dromedary_command::required;
use dromedary_records::RowWriter;
use serde::{Deserialize, Serialize};

use super::settings::{MAX_BAD_ROWS, refuse_overwriting, share};
use super::{Run, Session, make_report_folder, on_threads, prompt, publish};
use crate::report::{Report, SourceCounts};
use crate::sources::{ShareGptOpening, refuse_hub_name};
use crate::{Compat, DropReason, Fingerprint, Result, Rules, Source, text::strip};

const COMMAND: &str = "aggregate-sharegpt";

/// Flags of `aggregate-sharegpt`.
#[derive(Clone, Debug, Default, PartialEq, clap::Args, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AggregateArgs {
    /// ShareGPT files, separated by commas: arrays (.json) or parquet of `conversations`, or .jsonl
    /// with `text`.
    #[arg(long, value_name = "FILES", value_delimiter = ',')]
    pub data_files: Vec<PathBuf>,
    /// Where the prompts go: a JSON array, or JSON lines if it ends in .jsonl (.gz and .zst too).
    #[arg(long, value_name = "FILE", alias = "output-path")]
    pub output_file: Option<PathBuf>,
    /// Follow the original's rules instead of the corrected ones.
    #[arg(long, value_name = "WHOSE")]
    pub compat: Option<Compat>,
    /// Share of rows that may be unreadable before a file is refused [default: 0.001].
    #[arg(long, value_name = "SHARE")]
    pub max_bad_rows: Option<f64>,
    /// Folder that gets report.json: counts by reason [default: none].
    #[arg(long, value_name = "DIR")]
    pub report: Option<PathBuf>,
    /// Threads [default: one a core].
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
}

/// Settings of [`aggregate_sharegpt`].
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct AggregateConfig {
    /// ShareGPT files; of equal prompts the first wins.
    pub data_files: Vec<PathBuf>,
    /// Where the prompts go.
    pub output_file: PathBuf,
    /// Whose rules, if not the corrected ones.
    pub compat: Option<Compat>,
    /// Share of rows that may be unreadable.
    pub max_bad_rows: f64,
    /// Folder of the report.
    pub report: Option<PathBuf>,
    /// Threads; 0 is one a core.
    pub threads: usize,
}

impl TryFrom<AggregateArgs> for AggregateConfig {
    type Error = dromedary_command::Error;

    fn try_from(args: AggregateArgs) -> dromedary_command::Result<AggregateConfig> {
        let data_files = Some(args.data_files).filter(|files| !files.is_empty());
        let data_files = required(data_files, "data_files")?;
        let output_file = required(args.output_file, "output_file")?;
        for file in &data_files {
            refuse_hub_name(file, "--data-files")?;
        }
        refuse_overwriting(&output_file, &data_files)?;
        Ok(AggregateConfig {
            data_files,
            output_file,
            compat: args.compat,
            max_bad_rows: share(args.max_bad_rows, MAX_BAD_ROWS, "--max-bad-rows")?,
            report: args.report,
            threads: args.threads.unwrap_or(0),
        })
    }
}

/// Collects the first question of each ShareGPT conversation that got an answer, each question
/// once, in the order of the files.
///
/// The questions keep their page chrome, which [`clean_and_merge`](super::clean_and_merge) removes.
///
/// # Errors
/// A file that cannot be read or written, too many bad rows, no row left, a stop. Nothing is
/// written then.
pub fn aggregate_sharegpt(config: &AggregateConfig, session: &Session) -> Result<Report> {
    on_threads(config.threads, || aggregate(config, session))
}

fn aggregate(config: &AggregateConfig, session: &Session) -> Result<Report> {
    make_report_folder(config.report.as_deref())?;
    let rules = Rules::from(config.compat);
    let mut writer = RowWriter::create(&config.output_file)?;
    let mut run = Run::new(session, config.max_bad_rows);
    let mut counts = SourceCounts::default();
    let mut seen = BTreeSet::new();
    for file in &config.data_files {
        run.read(
            file,
            ShareGptOpening::open(file)?,
            |opening| judge(rules, opening),
            |judged| {
                counts.rows += 1;
                match judged.unwrap_or(Err(DropReason::BadRow)) {
                    Ok((fingerprint, question)) if seen.insert(fingerprint) => {
                        counts.kept += 1;
                        writer.write(&prompt(Source::ShareGpt, question, String::new()))?;
                    }
                    Ok(_) => counts.count_drops(DropReason::Duplicate, 1),
                    Err(reason) => counts.count_drops(reason, 1),
                }
                Ok(())
            },
        )?;
    }
    let sources = BTreeMap::from([(Source::ShareGpt.to_string(), counts)]);
    let report = run.report(COMMAND, config, &config.output_file, sources)?;
    publish(report, writer, config.report.as_deref())
}

fn judge(
    rules: Rules,
    opening: ShareGptOpening,
) -> std::result::Result<(Fingerprint, String), DropReason> {
    match opening {
        ShareGptOpening::Unfit(reason) => Err(reason),
        // Dromedary drops empty prompts in the next step.
        ShareGptOpening::Prompt(question)
            if rules == Rules::Corrected && strip(&question).is_empty() =>
        {
            Err(DropReason::Empty)
        }
        ShareGptOpening::Prompt(question) => Ok((Fingerprint::of(rules, &question), question)),
    }
}
