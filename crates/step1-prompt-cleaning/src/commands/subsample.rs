use std::borrow::Cow;
use std::collections::{BTreeMap, BinaryHeap};
use std::path::PathBuf;
use std::sync::Arc;

use dromedary_command::required;
use dromedary_records::RowWriter;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::settings::{
    JudgeArgs, JudgeConfig, SharedArgs, SharedConfig, positive, refuse_overwriting,
};
use super::{Outcome, Run, Session, make_report_folder, on_threads};
use crate::buckets::{Entry, KeyedBuckets, Spilled};
use crate::explain::{Explanation, Search};
use crate::report::{Ledger, Report, RowName};
use crate::sources::{Fault, OpenOrcaQuestion, Stratum, found_files, one_or_many};
use crate::{
    Draft, DropReason, Dropped, Fingerprint, Judged, KeyedOrder, LengthRule, NliRule, NotEmpty,
    Pipeline, Result, Rules, Source, Strip, TokenCounter,
};

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
    order: KeyedOrder,
    /// Counts tokens for the report.
    counter: Option<Arc<TokenCounter>>,
    /// Whether a question is remembered as it was read.
    keeps_originals: bool,
}

struct JudgedQuestion {
    stratum: Stratum,
    judged: Judged,
    original: Option<Draft>,
    /// What waits for the comparison, unless a rule has left the question out.
    spilled: Option<serde_json::Result<Spilled>>,
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
            order: KeyedOrder::new(config.judge.seed),
            counter: reports.then_some(counter),
            keeps_originals: reports || config.shared.explain.is_some(),
        })
    }

    fn judge(&self, row: OpenOrcaQuestion) -> JudgedQuestion {
        let draft = Draft::new(Source::OpenOrca, row.question);
        let original = self.keeps_originals.then(|| draft.clone());
        let judged = self.pipeline.judge(draft);
        // Dromedary compares first and filters what is left; the rows are the same.
        let waits = judged.dropped.is_none() || self.rules == Rules::Dromedary;
        let spilled = waits.then(|| self.spilled(row.stratum, &judged));
        JudgedQuestion { stratum: row.stratum, judged, original, spilled }
    }

    fn spilled(&self, stratum: Stratum, judged: &Judged) -> serde_json::Result<Spilled> {
        let question = &judged.draft.instruction;
        let fingerprint = Fingerprint::of(self.rules, question);
        let (sample_key, output_key) = self.order.keys(&fingerprint);
        let counter = self.counter.as_ref().filter(|_| judged.dropped.is_none());
        let waiting = Waiting {
            stratum: place(&Stratum::ALL, &stratum),
            drop: judged.dropped.as_ref().map(|drop| place(&DropReason::ALL, &drop.reason)),
            sample_key: ((sample_key >> 64) as u64, sample_key as u64),
            tokens: counter.map(|counter| counter.count(question) as u32),
            question: Cow::Borrowed(question.as_str()),
        };
        Spilled::new(output_key, &waiting, question.len())
    }
}

/// A question that waits on disk.
#[derive(Serialize, Deserialize)]
struct Waiting<'q> {
    /// Its place in [`Stratum::ALL`].
    stratum: usize,
    /// The place in [`DropReason::ALL`] of why it is dropped, unless it is a duplicate.
    drop: Option<usize>,
    /// The halves of the key that says whether it is in the sample.
    sample_key: (u64, u64),
    tokens: Option<u32>,
    question: Cow<'q, str>,
}

impl Waiting<'_> {
    fn stratum(&self) -> Stratum {
        Stratum::ALL[self.stratum]
    }

    fn drop(&self) -> Option<DropReason> {
        self.drop.map(|place| DropReason::ALL[place])
    }
}

/// Where a value stands among all there are.
fn place<T: PartialEq>(all: &[T], value: &T) -> usize {
    all.iter().position(|other| other == value).unwrap_or_default()
}

/// Keeps one of equal questions, of those a sample, and of that the order.
struct Sampler<'j> {
    judge: &'j Judge,
    rows: u64,
    buckets: KeyedBuckets<Waiting<'static>>,
    ledger: Ledger,
    search: Search,
}

impl<'j> Sampler<'j> {
    fn new(config: &SubsampleConfig, judge: &'j Judge) -> Sampler<'j> {
        Sampler {
            judge,
            rows: 0,
            buckets: KeyedBuckets::beside(&config.output_path),
            ledger: Ledger::new(config.shared.report.is_some()),
            search: Search::new(config.shared.explain.as_deref()),
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
        let JudgedQuestion { stratum, judged, original, spilled } = row;
        let source = stratum.reported_name();
        self.ledger.row(source);
        if let Some(original) = original {
            if self.search.is_wanted(name, [&original, &judged.draft]) {
                let pipeline = &self.judge.pipeline;
                self.search.found(Explanation::judged(name, original.clone(), pipeline));
            }
            let texts = || (original.instruction.clone(), judged.draft.instruction.clone());
            self.ledger.edited(source, name, &judged.edits, texts);
        } else {
            self.ledger.edited(source, name, &judged.edits, Default::default);
        }
        match (spilled, judged.dropped) {
            (Some(spilled), _) => self.buckets.push_spilled(self.rows, spilled)?,
            (None, Some(dropped)) => {
                let question = judged.draft.instruction;
                self.ledger.dropped(source, name, &dropped, || question);
            }
            (None, None) => {}
        }
        Ok(())
    }

    /// Writes the sample in its order: one bucket, while the next is read.
    fn write(mut self, cap: usize, writer: &mut RowWriter) -> Result<(Ledger, Search)> {
        let last_keys = self.last_sample_keys(cap)?;
        let encoder = writer.encoder();
        let Sampler { mut buckets, mut ledger, mut search, .. } = self;
        let mut buckets = buckets.ordered();
        let mut next = buckets.next();
        while let Some(bucket) = next {
            let bucket = bucket?;
            let write = || {
                let mut kept = Vec::new();
                for equal in equals(bucket) {
                    kept.extend(choose(equal, &last_keys, &mut ledger, &mut search));
                }
                let encode = |question| {
                    encoder.encode(&Draft::new(Source::OpenOrca, question).into_prompt())
                };
                let rows: Vec<_> = kept.into_par_iter().map(encode).collect();
                rows.into_iter().try_for_each(|row| writer.write_encoded(&row?))
            };
            let (written, read) = rayon::join(write, || buckets.next());
            written?;
            next = read;
        }
        Ok((ledger, search))
    }

    /// The sample key of the last row kept, of each stratum with more than `cap` of them.
    fn last_sample_keys(&mut self, cap: usize) -> Result<LastKeys> {
        if self.rows <= cap as u64 {
            return Ok(BTreeMap::new());
        }
        // One more than the cap, to know of a row that is over it.
        let mut smallest: BTreeMap<Stratum, BinaryHeap<(u64, u64)>> = BTreeMap::new();
        for bucket in self.buckets.ordered() {
            for Equal { first, .. } in equals(bucket?) {
                if first.row.drop.is_none() {
                    let keys = smallest.entry(first.row.stratum()).or_default();
                    keys.push(first.row.sample_key);
                    if keys.len() > cap + 1 {
                        keys.pop();
                    }
                }
            }
        }
        let last_of = |(stratum, mut keys): (Stratum, BinaryHeap<(u64, u64)>)| {
            keys.pop().filter(|_| keys.len() == cap)?;
            Some((stratum, *keys.peek()?))
        };
        Ok(smallest.into_iter().filter_map(last_of).collect())
    }
}

/// The keys of the last rows that are in the sample, for the strata that have more.
type LastKeys = BTreeMap<Stratum, (u64, u64)>;

/// The question that is written of equal ones, if one is.
fn choose(
    equal: Equal,
    last_keys: &LastKeys,
    ledger: &mut Ledger,
    search: &mut Search,
) -> Option<String> {
    let Equal { first, others } = equal;
    for other in others {
        let (name, duplicate) = (row_name(other.number), duplicate_of(first.number));
        search.step(name, "duplicates", Some(duplicate.clone()));
        let source = other.row.stratum().reported_name();
        ledger.dropped(source, name, &duplicate, || other.row.question.into_owned());
    }
    let (name, waiting) = (row_name(first.number), first.row);
    let last_key = last_keys.get(&waiting.stratum());
    let over = last_key.is_some_and(|last| waiting.sample_key > *last);
    let over = over.then(|| Dropped::plain(DropReason::OverCap));
    if waiting.drop.is_none() {
        search.step(name, "duplicates", None);
        search.step(name, "cap", over.clone());
    }
    let source = waiting.stratum().reported_name();
    match waiting.drop().map(Dropped::plain).or(over) {
        Some(dropped) => {
            ledger.dropped(source, name, &dropped, || waiting.question.into_owned());
            None
        }
        None => {
            ledger.kept(source, waiting.tokens);
            Some(waiting.question.into_owned())
        }
    }
}

/// Questions that are the same.
struct Equal {
    /// What is in the first stratum, wherever it stands in the files, and there what came first.
    first: Entry<Waiting<'static>>,
    others: Vec<Entry<Waiting<'static>>>,
}

/// The rows of a bucket, those with the same key together.
fn equals(bucket: Vec<Entry<Waiting<'static>>>) -> impl Iterator<Item = Equal> {
    let mut rows = bucket.into_iter().peekable();
    std::iter::from_fn(move || {
        let mut first = rows.next()?;
        let mut others = Vec::new();
        while let Some(mut other) = rows.next_if(|other| other.key == first.key) {
            if other.row.stratum < first.row.stratum {
                std::mem::swap(&mut first, &mut other);
            }
            others.push(other);
        }
        Some(Equal { first, others })
    })
}

fn row_name(number: u64) -> RowName<'static> {
    RowName { source: Source::OpenOrca.name(), number }
}

fn duplicate_of(row: u64) -> Dropped {
    Dropped::with(DropReason::Duplicate, format!("of {}", row_name(row)))
}
