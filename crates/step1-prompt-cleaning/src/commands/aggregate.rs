use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use dromedary_command::required;
use dromedary_records::RowWriter;
use serde::{Deserialize, Serialize};

use super::settings::{SharedArgs, SharedConfig, refuse_overwriting};
use super::{Run, Session, make_report_folder, on_threads, publish};
use crate::report::{Report, SourceCounts};
use crate::sources::{ShareGptOpening, refuse_hub_name};
use crate::{Draft, DropReason, Fingerprint, Result, Rules, Source, text::strip};

const COMMAND: &str = "aggregate-sharegpt";

/// Flags of `aggregate-sharegpt`.
#[derive(Clone, Debug, Default, PartialEq, clap::Args, Serialize, Deserialize)]
#[serde(default)]
pub struct AggregateArgs {
    /// ShareGPT files, separated by commas: arrays (.json) or parquet of `conversations`, or .jsonl
    /// with `text`.
    #[arg(long, value_name = "FILES", value_delimiter = ',')]
    pub data_files: Vec<PathBuf>,
    /// Where the prompts go: a JSON array, or JSON lines if it ends in .jsonl (.gz and .zst too).
    #[arg(long, value_name = "FILE", alias = "output-path")]
    pub output_file: Option<PathBuf>,
    /// Flags that every command has.
    #[command(flatten)]
    #[serde(flatten)]
    pub shared: SharedArgs,
}

/// Settings of [`aggregate_sharegpt`].
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct AggregateConfig {
    /// ShareGPT files; of equal prompts the first wins.
    pub data_files: Vec<PathBuf>,
    /// Where the prompts go.
    pub output_file: PathBuf,
    /// Settings that every command has.
    #[serde(flatten)]
    pub shared: SharedConfig,
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
        Ok(AggregateConfig { data_files, output_file, shared: args.shared.try_into()? })
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
    on_threads(config.shared.threads, || aggregate(config, session))
}

fn aggregate(config: &AggregateConfig, session: &Session) -> Result<Report> {
    make_report_folder(config.shared.report.as_deref())?;
    let rules = Rules::from(config.shared.compat);
    let mut writer = RowWriter::create(&config.output_file)?;
    let mut run = Run::new(session, config.shared.max_bad_rows);
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
                        writer.write(&Draft::new(Source::ShareGpt, question).into_prompt())?;
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
    publish(report, writer, config.shared.report.as_deref())
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
