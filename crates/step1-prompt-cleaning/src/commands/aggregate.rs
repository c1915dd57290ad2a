use std::collections::BTreeMap;
use std::path::PathBuf;

use dromedary_command::required;
use dromedary_records::RowWriter;
use serde::{Deserialize, Serialize};

use super::notes::Notes;
use super::settings::{SharedArgs, SharedConfig, refuse_overwriting};
use super::{Outcome, Run, Session, make_report_folder, on_threads};
use crate::report::{Report, RowName};
use crate::sources::{Fault, Offer, found_files, one_or_many, sharegpt};
use crate::text::strip;
use crate::{
    Draft, DropReason, Dropped, Effect, Fingerprint, Judged, Pipeline, Result, Rule, Rules, Source,
};

const COMMAND: &str = "aggregate-sharegpt";

/// Flags of `aggregate-sharegpt`.
#[derive(Clone, Debug, Default, PartialEq, clap::Args, Serialize, Deserialize)]
#[serde(default)]
pub struct AggregateArgs {
    /// ShareGPT files, folders or patterns, separated by commas: arrays (.json), JSON lines or
    /// parquet of `conversations`, or JSON lines with `text`; .gz and .zst too.
    #[arg(long, value_name = "FILES", value_delimiter = ',')]
    #[serde(deserialize_with = "one_or_many")]
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
        let data_files = found_files(&required(data_files, "data_files")?, "--data-files")?;
        let output_file = required(args.output_file, "output_file")?;
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
    // Dromedary drops empty prompts in the next step.
    let not_blank = (rules == Rules::Corrected).then_some(NotBlank);
    let mut collector = Collector {
        pipeline: Pipeline::new().with_some(not_blank),
        keeps_originals: config.shared.keeps_originals(),
        seen: BTreeMap::new(),
        notes: Notes::new(&config.shared),
        writer: RowWriter::create(&config.output_file)?,
    };
    collector.notes.ledger.open(Source::ShareGpt.name());
    let mut run = Run::new(session, config.shared.max_bad_rows, &config.data_files);
    for file in &config.data_files {
        run.read(file, sharegpt(file)?, |offer| judge(rules, offer), |row| collector.admit(row))?;
    }
    run.publish(Outcome {
        command: COMMAND,
        settings: serde_json::to_value(config),
        shared: &config.shared,
        output: &config.output_file,
        references: Vec::new(),
        notes: collector.notes,
        writer: collector.writer,
    })
}

/// Leaves out prompts of nothing but white space.
struct NotBlank;

impl Rule for NotBlank {
    fn name(&self) -> &'static str {
        "not blank"
    }

    fn apply(&self, draft: &mut Draft) -> Effect {
        strip(&draft.instruction).is_empty().then(|| Dropped::plain(DropReason::Empty)).into()
    }
}

/// The draft with its fingerprint, or the text that is none and why.
type Opening = std::result::Result<(Fingerprint, Draft), (DropReason, String)>;

fn judge(rules: Rules, offer: Offer) -> Opening {
    match offer {
        Offer::Draft(draft) => Ok((Fingerprint::of(rules, &draft.instruction), draft)),
        Offer::Unfit { reason, text } => Err((reason, text)),
    }
}

/// Keeps the first of equal questions.
struct Collector {
    pipeline: Pipeline,
    /// Whether a row is remembered as it was read.
    keeps_originals: bool,
    seen: BTreeMap<Fingerprint, u64>,
    notes: Notes,
    writer: RowWriter,
}

impl Collector {
    fn admit(&mut self, row: std::result::Result<Opening, Fault>) -> Result<()> {
        let source = Source::ShareGpt;
        let number = self.notes.ledger.row(source.name());
        let name = RowName { source: source.name(), number };
        match row {
            Err(fault) => self.notes.bad(name, source, fault),
            Ok(Err((reason, text))) => {
                self.notes.unfit(name, Draft::new(source, text), &Dropped::plain(reason));
            }
            Ok(Ok((fingerprint, draft))) => self.admit_opening(name, fingerprint, draft)?,
        }
        Ok(())
    }

    fn admit_opening(
        &mut self,
        name: RowName<'_>,
        fingerprint: Fingerprint,
        draft: Draft,
    ) -> Result<()> {
        let original = self.keeps_originals.then(|| draft.clone());
        let judged = self.pipeline.judge(draft);
        self.notes.judged(name.source, name, &self.pipeline, original.as_ref(), &judged);
        let Judged { draft, dropped, .. } = judged;
        match dropped.or_else(|| self.equal(name, fingerprint)) {
            Some(dropped) => {
                self.notes.ledger.dropped(name.source, name, &dropped, || draft.instruction);
            }
            None => {
                self.notes.ledger.kept(name.source, None);
                self.writer.write(&draft.into_prompt())?;
            }
        }
        Ok(())
    }

    fn equal(&mut self, name: RowName<'_>, fingerprint: Fingerprint) -> Option<Dropped> {
        let first = *self.seen.entry(fingerprint).or_insert(name.number);
        let dropped = (first != name.number).then(|| {
            let first = RowName { number: first, ..name };
            Dropped::with(DropReason::Duplicate, format!("of {first}"))
        });
        self.notes.step(name, "duplicates", dropped.clone());
        dropped
    }
}
