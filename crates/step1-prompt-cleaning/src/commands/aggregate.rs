use std::collections::BTreeMap;
use std::path::PathBuf;

use dromedary_command::required;
use dromedary_records::RowWriter;
use serde::{Deserialize, Serialize};

use super::settings::{SharedArgs, SharedConfig, refuse_overwriting};
use super::{Outcome, Run, Session, make_report_folder, on_threads};
use crate::explain::{Explanation, Search};
use crate::report::{Ledger, Report, RowName};
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
        seen: BTreeMap::new(),
        ledger: Ledger::new(config.shared.report.is_some()),
        search: Search::new(config.shared.explain.as_deref()),
        writer: RowWriter::create(&config.output_file)?,
    };
    collector.ledger.open(Source::ShareGpt.name());
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
        ledger: collector.ledger,
        search: collector.search,
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
    seen: BTreeMap<Fingerprint, u64>,
    ledger: Ledger,
    search: Search,
    writer: RowWriter,
}

impl Collector {
    fn admit(&mut self, row: std::result::Result<Opening, Fault>) -> Result<()> {
        let source = Source::ShareGpt;
        let number = self.ledger.row(source.name());
        let name = RowName { source: source.name(), number };
        let (fingerprint, draft) = match row {
            Ok(Ok(opening)) => opening,
            Ok(Err((reason, text))) => {
                self.leave_out(name, Draft::new(source, text), Dropped::plain(reason));
                return Ok(());
            }
            Err(Fault(fault)) => {
                let dropped = Dropped::with(DropReason::BadRow, fault);
                self.leave_out(name, Draft::new(source, ""), dropped);
                return Ok(());
            }
        };
        if self.search.is_wanted(name, [&draft]) {
            self.search.found(Explanation::judged(name, draft.clone(), &self.pipeline));
        }
        let Judged { draft, dropped, .. } = self.pipeline.judge(draft);
        let dropped = dropped.or_else(|| self.equal(name, fingerprint));
        match dropped {
            Some(dropped) => {
                self.ledger.dropped(source.name(), name, &dropped, || draft.instruction);
            }
            None => {
                self.ledger.kept(source.name(), None);
                self.writer.write(&draft.into_prompt())?;
            }
        }
        Ok(())
    }

    fn leave_out(&mut self, name: RowName<'_>, draft: Draft, dropped: Dropped) {
        if self.search.is_wanted(name, [&draft]) {
            let text = draft.instruction.clone();
            self.search.found(Explanation::unfit(name, text, dropped.clone()));
        }
        self.ledger.dropped(name.source, name, &dropped, || draft.instruction);
    }

    fn equal(&mut self, name: RowName<'_>, fingerprint: Fingerprint) -> Option<Dropped> {
        let first = *self.seen.entry(fingerprint).or_insert(name.number);
        let dropped = (first != name.number).then(|| {
            let first = RowName { number: first, ..name };
            Dropped::with(DropReason::Duplicate, format!("of {first}"))
        });
        self.search.step(name, "duplicates", dropped.clone());
        dropped
    }
}
