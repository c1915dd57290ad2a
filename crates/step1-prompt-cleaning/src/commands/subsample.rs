#![expect(
    clippy::disallowed_types,
    reason = "the order of the map cannot be seen: it is only asked"
)]

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::collections::hash_map::{Entry, HashMap};
use std::path::PathBuf;
use std::sync::Arc;

use dromedary_command::required;
use dromedary_records::RowWriter;
use serde::{Deserialize, Serialize};

use super::settings::{
    JudgeArgs, JudgeConfig, SharedArgs, SharedConfig, positive, refuse_overwriting,
};
use super::{Outcome, Run, Session, make_report_folder, on_threads};
use crate::buckets::KeyedBuckets;
use crate::explain::{Explanation, Search};
use crate::report::{Ledger, Report, RowName};
use crate::sources::{Fault, OpenOrcaQuestion, Stratum, refuse_hub_name};
use crate::{
    Draft, DropReason, Dropped, Fingerprint, Judged, KeyedOrder, LengthRule, NliRule, NotEmpty,
    Pipeline, Result, Rules, Source, Strip, TokenCounter,
};

const COMMAND: &str = "subsample-openorca";

/// Flags of `subsample-openorca`.
#[derive(Clone, Debug, Default, PartialEq, clap::Args, Serialize, Deserialize)]
#[serde(default)]
pub struct SubsampleArgs {
    /// OpenOrca as .parquet (or JSON lines, or a JSON array) with the columns `id` and `question`.
    #[arg(long, value_name = "FILE")]
    pub train_data_path: Option<PathBuf>,
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
    pub train_data_path: PathBuf,
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
        let train_data_path = required(args.train_data_path, "train_data_path")?;
        let output_path = required(args.output_path, "output_path")?;
        refuse_hub_name(&train_data_path, "--train-data-path")?;
        refuse_overwriting(&output_path, [&train_data_path])?;
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
/// Texts wait on disk and not in memory; what is held is some 40 to 80 bytes for each question.
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
    let mut run = Run::new(session, config.shared.max_bad_rows);
    let mut sampler = Sampler::new(config, &judge);
    let questions = OpenOrcaQuestion::open(&config.train_data_path)?;
    run.read(
        &config.train_data_path,
        questions,
        |question| judge.judge(question),
        |judged| sampler.admit(judged),
    )?;
    let (ledger, search) = sampler.write(config.max_samples_per_dataset, &mut writer)?;
    run.publish(Outcome {
        command: COMMAND,
        settings: serde_json::to_value(config),
        shared: &config.shared,
        output: &config.output_path,
        references: config.judge.files(),
        ledger,
        search,
        writer,
    })
}

/// The rules that look at one question.
struct Judge {
    rules: Rules,
    pipeline: Pipeline,
    /// Counts tokens for the report.
    counter: Option<Arc<TokenCounter>>,
    /// Whether a question is remembered as it was read.
    keeps_originals: bool,
}

struct JudgedQuestion {
    stratum: Stratum,
    judged: Judged,
    original: Option<Draft>,
    fingerprint: Fingerprint,
    tokens: Option<u32>,
}

impl Judge {
    fn open(config: &SubsampleConfig) -> Result<Judge> {
        let rules = config.shared.compat.into();
        let counter = config.judge.counter()?;
        let length = LengthRule {
            counter: counter.clone(),
            min: 0,
            max: config.judge.max_prompt_len,
            suffix: "\n\n",
        };
        // Dromedary has no such rule and keeps one empty question.
        let not_empty = (rules == Rules::Corrected).then_some(NotEmpty);
        let pipeline = Pipeline::new()
            .with(Strip)
            .with_some(not_empty)
            .with(NliRule::new(rules, config.judge.open_lists()?))
            .with(length);
        let reports = config.shared.report.is_some();
        Ok(Judge {
            rules,
            pipeline,
            counter: reports.then_some(counter),
            keeps_originals: reports || config.shared.explain.is_some(),
        })
    }

    fn judge(&self, row: OpenOrcaQuestion) -> JudgedQuestion {
        let draft = Draft::new(Source::OpenOrca, row.question);
        let original = self.keeps_originals.then(|| draft.clone());
        let judged = self.pipeline.judge(draft);
        let counter = self.counter.as_ref().filter(|_| judged.dropped.is_none());
        JudgedQuestion {
            stratum: row.stratum,
            original,
            fingerprint: Fingerprint::of(self.rules, &judged.draft.instruction),
            tokens: counter.map(|counter| counter.count(&judged.draft.instruction) as u32),
            judged,
        }
    }
}

/// Where a question stands first: a smaller place wins against equal questions elsewhere.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    stratum: Stratum,
    row: u64,
    drop: Option<DropReason>,
}

/// A question that waits on disk.
#[derive(Serialize, Deserialize)]
struct Waiting {
    row: u64,
    tokens: Option<u32>,
    question: String,
}

/// Keeps one of equal questions, of those a sample, and of that the order.
struct Sampler<'j> {
    judge: &'j Judge,
    order: KeyedOrder,
    rows: u64,
    places: HashMap<Fingerprint, Place>,
    buckets: KeyedBuckets<Waiting>,
    ledger: Ledger,
    search: Search,
    /// The question that is to be explained, unless a rule left it out.
    wanted: Option<(Fingerprint, u64)>,
}

impl<'j> Sampler<'j> {
    fn new(config: &SubsampleConfig, judge: &'j Judge) -> Sampler<'j> {
        Sampler {
            judge,
            order: KeyedOrder::new(config.judge.seed),
            rows: 0,
            places: HashMap::new(),
            buckets: KeyedBuckets::beside(&config.output_path),
            ledger: Ledger::new(config.shared.report.is_some()),
            search: Search::new(config.shared.explain.as_deref()),
            wanted: None,
        }
    }

    fn admit(&mut self, row: std::result::Result<JudgedQuestion, Fault>) -> Result<()> {
        self.rows += 1;
        let name = row_name(self.rows);
        let row = match row {
            Ok(row) => row,
            Err(Fault(fault)) => {
                let dropped = Dropped::with(DropReason::BadRow, fault);
                if self.search.is_wanted(name, []) {
                    let text = String::new();
                    self.search.found(Explanation::unfit(name, text, dropped.clone()));
                }
                self.ledger.row(name.source);
                self.ledger.dropped(name.source, name, &dropped, String::new);
                return Ok(());
            }
        };
        let JudgedQuestion { stratum, judged, original, fingerprint, tokens } = row;
        let source = stratum.reported_name();
        self.ledger.row(source);
        if let Some(original) = original {
            if self.search.is_wanted(name, [&original, &judged.draft]) {
                self.wanted = judged.dropped.is_none().then_some((fingerprint, self.rows));
                let pipeline = &self.judge.pipeline;
                self.search.found(Explanation::judged(name, original.clone(), pipeline));
            }
            let texts = || (original.instruction.clone(), judged.draft.instruction.clone());
            self.ledger.edited(source, name, &judged.edits, texts);
        } else {
            self.ledger.edited(source, name, &judged.edits, Default::default);
        }
        let question = judged.draft.instruction;
        // Dromedary compares first and filters what is left; the rows are the same.
        match judged.dropped {
            Some(dropped) if self.judge.rules == Rules::Corrected => {
                self.ledger.dropped(source, name, &dropped, || question);
            }
            dropped => {
                let drop = dropped.map(|dropped| dropped.reason);
                let place = Place { stratum, row: self.rows, drop };
                if self.take_place(&fingerprint, place, &question) && drop.is_none() {
                    let key = self.order.output_key(&fingerprint);
                    self.buckets.push(key, &Waiting { row: self.rows, tokens, question })?;
                }
            }
        }
        Ok(())
    }

    /// Whether the place is the best so far for this question; counts what loses.
    fn take_place(&mut self, fingerprint: &Fingerprint, place: Place, question: &str) -> bool {
        let loser = match self.places.entry(*fingerprint) {
            Entry::Vacant(vacant) => {
                vacant.insert(place);
                None
            }
            Entry::Occupied(mut occupied) => Some(match place.cmp(occupied.get()) {
                Ordering::Less => (occupied.insert(place), place),
                _ => (place, *occupied.get()),
            }),
        };
        let wins = loser.is_none_or(|(loser, _)| loser != place);
        let text = || question.to_owned();
        if let Some((loser, winner)) = loser {
            let source = loser.stratum.reported_name();
            let duplicate = duplicate_of(winner.row);
            self.ledger.dropped(source, row_name(loser.row), &duplicate, text);
            if let (true, Some(reason)) = (wins, loser.drop) {
                self.ledger.take_back(source, reason);
            }
        }
        if let (true, Some(reason)) = (wins, place.drop) {
            let source = place.stratum.reported_name();
            self.ledger.dropped(source, row_name(place.row), &Dropped::plain(reason), text);
        }
        wins
    }

    /// Writes the sample in its order.
    fn write(mut self, cap: usize, writer: &mut RowWriter) -> Result<(Ledger, Search)> {
        let last_keys = self.last_sample_keys(cap);
        self.explain_place(&last_keys);
        for waiting in self.buckets.into_ordered() {
            let Waiting { row, tokens, question } = waiting?;
            let fingerprint = Fingerprint::of(self.judge.rules, &question);
            let Some(place) = self.places.get(&fingerprint).filter(|place| place.row == row) else {
                continue;
            };
            let source = place.stratum.reported_name();
            let last_key = last_keys.get(&place.stratum);
            if last_key.is_some_and(|last| self.order.sample_key(&fingerprint) > *last) {
                let over_cap = Dropped::plain(DropReason::OverCap);
                self.ledger.dropped(source, row_name(row), &over_cap, || question);
                continue;
            }
            self.ledger.kept(source, tokens);
            writer.write(&Draft::new(Source::OpenOrca, question).into_prompt())?;
        }
        Ok((self.ledger, self.search))
    }

    /// Says what comparison and cap did to the question that is to be explained.
    fn explain_place(&mut self, last_keys: &BTreeMap<Stratum, u128>) {
        let Some((fingerprint, row)) = self.wanted else {
            return;
        };
        let Some(place) = self.places.get(&fingerprint) else {
            return;
        };
        let name = row_name(row);
        let duplicate = (place.row != row).then(|| duplicate_of(place.row));
        let is_first = duplicate.is_none();
        self.search.step(name, "duplicates", duplicate);
        if is_first {
            let last = last_keys.get(&place.stratum);
            let over = last.is_some_and(|last| self.order.sample_key(&fingerprint) > *last);
            self.search.step(name, "cap", over.then(|| Dropped::plain(DropReason::OverCap)));
        }
    }

    /// The sample key of the last row kept, of each stratum with more than `cap` of them.
    fn last_sample_keys(&self, cap: usize) -> BTreeMap<Stratum, u128> {
        let mut last_keys = BTreeMap::new();
        for stratum in Stratum::ALL {
            let of_stratum = |place: &Place| place.stratum == stratum && place.drop.is_none();
            let mut keys: Vec<u128> = self
                .places
                .iter()
                .filter(|(_, place)| of_stratum(place))
                .map(|(fingerprint, _)| self.order.sample_key(fingerprint))
                .collect();
            if keys.len() > cap {
                let (_, last, _) = keys.select_nth_unstable(cap - 1);
                last_keys.insert(stratum, *last);
            }
        }
        last_keys
    }
}

fn row_name(number: u64) -> RowName<'static> {
    RowName { source: Source::OpenOrca.name(), number }
}

fn duplicate_of(row: u64) -> Dropped {
    Dropped::with(DropReason::Duplicate, format!("of {}", row_name(row)))
}
