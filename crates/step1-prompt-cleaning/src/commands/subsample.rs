use std::path::PathBuf;

use dromedary_command::required;
use dromedary_records::RowWriter;
use serde::{Deserialize, Serialize};

use super::sampler::{Judge, Sampler};
use super::settings::{
    JudgeArgs, JudgeConfig, SharedArgs, SharedConfig, positive, refuse_overwriting,
};
use super::{Outcome, Run, Session, make_report_folder, on_threads};
use crate::Result;
use crate::report::Report;
use crate::sources::{OpenOrcaQuestion, found_files, one_or_many};

const COMMAND: &str = "subsample-openorca";

/// Flags of `subsample-openorca`.
#[derive(Clone, Debug, Default, PartialEq, clap::Args, Serialize, Deserialize)]
#[serde(default)]
pub struct SubsampleArgs {
    /// OpenOrca as .parquet (or JSON lines, or a JSON array) with the columns `id` and `question`:
    /// files, folders or patterns, separated by commas.
    #[arg(long, value_name = "FILES", value_delimiter = ',')]
    #[serde(deserialize_with = "one_or_many")]
    pub train_data_path: Vec<PathBuf>,
    /// Where the prompts go: a JSON array, or JSON lines if it ends in .jsonl (.gz and .zst too).
    #[arg(long, value_name = "FILE", alias = "output-file")]
    pub output_path: Option<PathBuf>,
    /// Rows kept of each of niv, flan, t0, cot [default: 10000].
    #[arg(long, value_name = "ROWS")]
    pub max_samples_per_dataset: Option<usize>,
    /// Flags of the commands that measure, judge and order prompts.
    #[command(flatten)]
    #[serde(flatten)]
    pub judge: JudgeArgs,
    /// Flags that every command has.
    #[command(flatten)]
    #[serde(flatten)]
    pub shared: SharedArgs,
}

/// Settings of [`subsample_openorca`].
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SubsampleConfig {
    /// OpenOrca.
    pub train_data_path: Vec<PathBuf>,
    /// Where the prompts go.
    pub output_path: PathBuf,
    /// Rows kept of each stratum.
    pub max_samples_per_dataset: usize,
    /// Settings of the commands that measure, judge and order prompts.
    #[serde(flatten)]
    pub judge: JudgeConfig,
    /// Settings that every command has.
    #[serde(flatten)]
    pub shared: SharedConfig,
}

impl TryFrom<SubsampleArgs> for SubsampleConfig {
    type Error = dromedary_command::Error;

    fn try_from(args: SubsampleArgs) -> dromedary_command::Result<SubsampleConfig> {
        let given = Some(args.train_data_path).filter(|files| !files.is_empty());
        let given = required(given, "train_data_path")?;
        let train_data_path = found_files(&given, "--train-data-path")?;
        let output_path = required(args.output_path, "output_path")?;
        refuse_overwriting(&output_path, &train_data_path)?;
        let shared = SharedConfig::try_from(args.shared)?;
        Ok(SubsampleConfig {
            train_data_path,
            output_path,
            max_samples_per_dataset: positive(
                args.max_samples_per_dataset.unwrap_or(10_000),
                "--max-samples-per-dataset",
            )?,
            judge: JudgeConfig::resolve(args.judge, &shared)?,
            shared,
        })
    }
}

/// Draws a sample of OpenOrca's questions: up to `max_samples_per_dataset` of each stratum.
///
/// Nothing of a question stays in memory. All wait on disk in buckets, by a hash that is the same
/// for equal ones; so duplicates are found within a bucket, of which one is in memory at a time.
/// Beside that, a cap that is reached takes 16 bytes for each row of it.
///
/// # Errors
/// A file that cannot be read or written, too many bad rows, no row left, a stop. Nothing is
/// written then.
pub fn subsample_openorca(config: &SubsampleConfig, session: &Session) -> Result<Report> {
    on_threads(config.shared.threads, || subsample(config, session))
}

fn subsample(config: &SubsampleConfig, session: &Session) -> Result<Report> {
    make_report_folder(config.shared.report.as_deref())?;
    let judge = Judge::open(config)?;
    let mut writer = RowWriter::create(&config.output_path)?;
    let mut run = Run::new(session, config.shared.max_bad_rows, &config.train_data_path);
    let mut sampler = Sampler::new(config, &judge);
    for file in &config.train_data_path {
        run.read(
            file,
            OpenOrcaQuestion::open(file)?,
            |question| judge.judge(question),
            |judged| sampler.admit(judged),
        )?;
    }
    let notes = sampler.write(config.max_samples_per_dataset, &mut run, &mut writer)?;
    run.publish(Outcome {
        command: COMMAND,
        settings: serde_json::to_value(config),
        shared: &config.shared,
        output: &config.output_path,
        references: config.judge.files(),
        notes,
        writer,
    })
}
