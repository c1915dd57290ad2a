use std::borrow::Cow;
use std::collections::{BTreeMap, BinaryHeap};
use std::path::PathBuf;
use std::sync::Arc;

use dromedary_command::required;
use dromedary_records::{EncodedRows, RowWriter};
use serde::{Deserialize, Serialize};

use super::settings::{
    JudgeArgs, JudgeConfig, SharedArgs, SharedConfig, positive, refuse_overwriting,
};
use super::{Outcome, Run, Session, make_report_folder, on_threads};
use crate::buckets::{Bucket, Entry, KeyedBuckets, Spilled};
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
    spilled: Option<postcard::Result<Spilled>>,
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

    fn spilled(&self, stratum: Stratum, judged: &Judged) -> postcard::Result<Spilled> {
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
    #[serde(borrow)]
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
    buckets: KeyedBuckets,
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
            (Some(spilled), _) => self.buckets.push(self.rows, spilled)?,
            (None, Some(dropped)) => {
                let question = judged.draft.instruction;
                self.ledger.dropped(source, name, &dropped, || question);
            }
            (None, None) => {}
        }
        Ok(())
    }

    /// Writes the sample in its order.
    fn write(mut self, cap: usize, writer: &mut RowWriter) -> Result<(Ledger, Search)> {
        let last_keys = self.last_sample_keys(cap)?;
        let encoder = writer.encoder();
        let keeps_texts = self.judge.keeps_originals;
        let Sampler { mut buckets, mut ledger, mut search, .. } = self;
        buckets.for_each_in_order(
            |bucket| {
                let mut sample = Sample { rows: encoder.rows(), fates: Vec::new(), keeps_texts };
                equals(bucket).try_for_each(|equal| sample.choose(equal, &last_keys))?;
                Ok(sample)
            },
            |sample| {
                sample.fates.into_iter().for_each(|fate| fate.enter(&mut ledger, &mut search));
                Ok(writer.write_encoded(&sample.rows)?)
            },
        )?;
        Ok((ledger, search))
    }

    /// The sample key of the last row kept, of each stratum with more than `cap` of them.
    fn last_sample_keys(&mut self, cap: usize) -> Result<LastKeys> {
        if self.rows <= cap as u64 {
            return Ok(BTreeMap::new());
        }
        let keys = |bucket: &Bucket| {
            let candidates = equals(bucket).map(|equal| equal.first.row);
            let candidates = candidates.filter(|row| row.drop.is_none());
            Ok(candidates.map(|row| (row.stratum(), row.sample_key)).collect::<Vec<_>>())
        };
        // One more than the cap, to know of a row that is over it.
        let mut smallest: BTreeMap<Stratum, BinaryHeap<(u64, u64)>> = BTreeMap::new();
        self.buckets.for_each_in_order(keys, |keys| {
            for (stratum, key) in keys {
                let keys = smallest.entry(stratum).or_default();
                keys.push(key);
                if keys.len() > cap + 1 {
                    keys.pop();
                }
            }
            Ok(())
        })?;
        let last_of = |(stratum, mut keys): (Stratum, BinaryHeap<(u64, u64)>)| {
            keys.pop().filter(|_| keys.len() == cap)?;
            Some((stratum, *keys.peek()?))
        };
        Ok(smallest.into_iter().filter_map(last_of).collect())
    }
}

/// The keys of the last rows that are in the sample, for the strata that have more.
type LastKeys = BTreeMap<Stratum, (u64, u64)>;

/// What the sample has of one bucket.
struct Sample {
    rows: EncodedRows,
    fates: Vec<Fate>,
    /// Whether the report shows texts.
    keeps_texts: bool,
}

/// What became of a row.
struct Fate {
    number: u64,
    stratum: Stratum,
    tokens: Option<u32>,
    /// Why it is left out, if it is.
    dropped: Option<Dropped>,
    /// Its text, if it is left out and the report shows texts.
    text: String,
}

impl Sample {
    /// Takes one of equal questions, or none.
    fn choose(&mut self, equal: Equal<'_>, last_keys: &LastKeys) -> Result<()> {
        let Equal { first, others } = equal;
        for other in others {
            self.leave_out(other, duplicate_of(first.number));
        }
        let row = &first.row;
        let over = last_keys.get(&row.stratum()).is_some_and(|last| row.sample_key > *last);
        let reason = row.drop().or(over.then_some(DropReason::OverCap));
        if let Some(reason) = reason {
            self.leave_out(first, Dropped::plain(reason));
            return Ok(());
        }
        let Entry { number, row, .. } = first;
        let (stratum, tokens) = (row.stratum(), row.tokens);
        self.fates.push(Fate { number, stratum, tokens, dropped: None, text: String::new() });
        self.rows.push(&Draft::new(Source::OpenOrca, row.question).into_prompt())?;
        Ok(())
    }

    fn leave_out(&mut self, entry: Entry<Waiting<'_>>, dropped: Dropped) {
        let Entry { number, row, .. } = entry;
        let (stratum, tokens) = (row.stratum(), row.tokens);
        let text = if self.keeps_texts { row.question.into_owned() } else { String::new() };
        self.fates.push(Fate { number, stratum, tokens, dropped: Some(dropped), text });
    }
}

impl Fate {
    fn enter(self, ledger: &mut Ledger, search: &mut Search) {
        let Fate { number, stratum, tokens, dropped, text } = self;
        let (name, source) = (row_name(number), stratum.reported_name());
        match dropped.as_ref().map(|dropped| dropped.reason) {
            Some(DropReason::Duplicate) => search.step(name, "duplicates", dropped.clone()),
            None | Some(DropReason::OverCap) => {
                search.step(name, "duplicates", None);
                search.step(name, "cap", dropped.clone());
            }
            // A rule has left it out before.
            Some(_) => {}
        }
        match dropped {
            Some(dropped) => ledger.dropped(source, name, &dropped, || text),
            None => ledger.kept(source, tokens),
        }
    }
}

/// Questions that are the same.
struct Equal<'b> {
    /// What is in the first stratum, wherever it stands in the files, and there what came first.
    first: Entry<Waiting<'b>>,
    others: Vec<Entry<Waiting<'b>>>,
}

/// The rows of a bucket, those with the same key together.
fn equals(bucket: &Bucket) -> impl Iterator<Item = Equal<'_>> {
    let mut rows = bucket.rows::<Waiting<'_>>().peekable();
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
