#![expect(
    clippy::disallowed_types,
    reason = "the order of the map cannot be seen: it is only asked"
)]

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::collections::hash_map::{Entry, HashMap};
use std::path::PathBuf;

use dromedary_command::required;
use dromedary_records::RowWriter;
use serde::{Deserialize, Serialize};

use super::settings::{
    JudgeArgs, JudgeConfig, SharedArgs, SharedConfig, positive, refuse_overwriting,
};
use super::{Run, Session, make_report_folder, on_threads, publish};
use crate::buckets::KeyedBuckets;
use crate::report::{Report, SourceCounts};
use crate::sources::{OpenOrcaQuestion, Stratum, refuse_hub_name};
use crate::text::strip;
use crate::{
    Draft, DropReason, Edit, Fingerprint, KeyedOrder, LengthRule, Lists, NliRule, Result, Rules,
    Source,
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
    let mut sampler = Sampler::new(config, judge.rules);
    let questions = OpenOrcaQuestion::open(&config.train_data_path)?;
    run.read(
        &config.train_data_path,
        questions,
        |question| judge.judge(question),
        |judged| sampler.admit(judged),
    )?;
    let counts = sampler.write(config.max_samples_per_dataset, &mut writer)?;
    let report = run.report(COMMAND, config, &config.output_path, counts)?;
    publish(report, writer, config.shared.report.as_deref())
}

/// The rules that look at one question.
struct Judge {
    rules: Rules,
    nli: NliRule,
    length: LengthRule,
}

struct Judged {
    stratum: Stratum,
    question: String,
    stripped: bool,
    fingerprint: Fingerprint,
    drop: Option<DropReason>,
}

impl Judge {
    fn open(config: &SubsampleConfig) -> Result<Judge> {
        let rules = config.shared.compat.into();
        let lists = Lists::open(config.judge.lists.as_deref())?;
        let length = LengthRule {
            counter: config.judge.counter()?,
            min: 0,
            max: config.judge.max_prompt_len,
            suffix: "\n\n",
        };
        Ok(Judge { rules, nli: NliRule::new(rules, lists), length })
    }

    fn judge(&self, row: OpenOrcaQuestion) -> Judged {
        let question = strip(&row.question);
        // Dromedary has no such rule and keeps one empty question.
        let drop = if question.is_empty() && self.rules == Rules::Corrected {
            Some(DropReason::Empty)
        } else if self.nli.keyword(question).is_some() {
            Some(DropReason::NliTask)
        } else {
            self.length.check(question)
        };
        Judged {
            stratum: row.stratum,
            stripped: question.len() < row.question.len(),
            fingerprint: Fingerprint::of(self.rules, question),
            question: question.to_owned(),
            drop,
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

/// Keeps one of equal questions, of those a sample, and of that the order.
struct Sampler {
    rules: Rules,
    order: KeyedOrder,
    rows: u64,
    places: HashMap<Fingerprint, Place>,
    /// The number of its row and the question.
    buckets: KeyedBuckets<(u64, String)>,
    counts: BTreeMap<Stratum, SourceCounts>,
    bad_rows: u64,
}

impl Sampler {
    fn new(config: &SubsampleConfig, rules: Rules) -> Sampler {
        Sampler {
            rules,
            order: KeyedOrder::new(config.judge.seed),
            rows: 0,
            places: HashMap::new(),
            buckets: KeyedBuckets::beside(&config.output_path),
            counts: BTreeMap::new(),
            bad_rows: 0,
        }
    }

    fn admit(&mut self, judged: Option<Judged>) -> Result<()> {
        self.rows += 1;
        let Some(judged) = judged else {
            self.bad_rows += 1;
            return Ok(());
        };
        let counts = self.counts.entry(judged.stratum).or_default();
        counts.rows += 1;
        if judged.stripped {
            counts.count_edits(&[Edit::Whitespace]);
        }
        // Dromedary compares first and filters what is left; the rows are the same.
        match judged.drop {
            Some(reason) if self.rules == Rules::Corrected => counts.count_drops(reason, 1),
            drop => {
                let place = Place { stratum: judged.stratum, row: self.rows, drop };
                if self.take_place(&judged.fingerprint, place) && drop.is_none() {
                    let key = self.order.output_key(&judged.fingerprint);
                    self.buckets.push(key, &(self.rows, judged.question))?;
                }
            }
        }
        Ok(())
    }

    /// Whether the place is the best so far for this question; counts what loses.
    fn take_place(&mut self, fingerprint: &Fingerprint, place: Place) -> bool {
        let loser = match self.places.entry(*fingerprint) {
            Entry::Vacant(vacant) => {
                vacant.insert(place);
                None
            }
            Entry::Occupied(mut occupied) => Some(match place.cmp(occupied.get()) {
                Ordering::Less => occupied.insert(place),
                _ => place,
            }),
        };
        let wins = loser != Some(place);
        if let Some(loser) = loser {
            let counts = self.counts.entry(loser.stratum).or_default();
            counts.count_drops(DropReason::Duplicate, 1);
            if let (true, Some(reason)) = (wins, loser.drop) {
                counts.take_back(reason);
            }
        }
        if let (true, Some(reason)) = (wins, place.drop) {
            self.counts.entry(place.stratum).or_default().count_drops(reason, 1);
        }
        wins
    }

    /// Writes the sample in its order.
    fn write(
        mut self,
        cap: usize,
        writer: &mut RowWriter,
    ) -> Result<BTreeMap<String, SourceCounts>> {
        let last_keys = self.last_sample_keys(cap);
        for record in self.buckets.into_ordered() {
            let (row, question) = record?;
            let fingerprint = Fingerprint::of(self.rules, &question);
            let Some(place) = self.places.get(&fingerprint).filter(|place| place.row == row) else {
                continue;
            };
            let counts = self.counts.entry(place.stratum).or_default();
            let last_key = last_keys.get(&place.stratum);
            if last_key.is_some_and(|last| self.order.sample_key(&fingerprint) > *last) {
                counts.count_drops(DropReason::OverCap, 1);
                continue;
            }
            counts.kept += 1;
            writer.write(&Draft::new(Source::OpenOrca, question).into_prompt())?;
        }
        let mut counts: BTreeMap<String, SourceCounts> = BTreeMap::new();
        for (stratum, of_stratum) in self.counts {
            counts.insert(format!("{}/{stratum}", Source::OpenOrca), of_stratum);
        }
        if self.bad_rows > 0 {
            let unknown = counts.entry(Source::OpenOrca.to_string()).or_default();
            unknown.rows = self.bad_rows;
            unknown.count_drops(DropReason::BadRow, self.bad_rows);
        }
        Ok(counts)
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
