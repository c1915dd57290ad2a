use std::borrow::Cow;
use std::collections::{BTreeMap, BinaryHeap};
use std::sync::Arc;

use dromedary_records::{EncodedRows, RowWriter};
use serde::{Deserialize, Serialize};

use super::Run;
use super::notes::{Fate, Notes};
use super::subsample::SubsampleConfig;
use crate::buckets::{Bucket, Entry, KeyedBuckets, Spilled};
use crate::report::RowName;
use crate::sources::{Fault, OpenOrcaQuestion, Stratum};
use crate::{
    Draft, DropReason, Dropped, Fingerprint, Judged, KeyedOrder, LengthRule, NliRule, NotEmpty,
    Pipeline, Result, Rules, Source, Strip, TokenCounter,
};

/// The rules that look at one question.
pub(super) struct Judge {
    rules: Rules,
    pipeline: Pipeline,
    order: KeyedOrder,
    /// Counts tokens for the report.
    counter: Option<Arc<TokenCounter>>,
    /// Whether a question is remembered as it was read.
    keeps_originals: bool,
}

pub(super) struct JudgedQuestion {
    stratum: Stratum,
    judged: Judged,
    original: Option<Draft>,
    /// What waits for the comparison, unless a rule has left the question out.
    spilled: Option<postcard::Result<Spilled>>,
}

impl Judge {
    pub(super) fn open(config: &SubsampleConfig) -> Result<Judge> {
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
        Ok(Judge {
            rules,
            pipeline,
            order: KeyedOrder::new(config.judge.seed),
            counter: config.shared.report.is_some().then_some(counter),
            keeps_originals: config.shared.keeps_originals(),
        })
    }

    pub(super) fn judge(&self, row: OpenOrcaQuestion) -> JudgedQuestion {
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
pub(super) struct Sampler<'j> {
    judge: &'j Judge,
    rows: u64,
    buckets: KeyedBuckets,
    notes: Notes,
}

impl<'j> Sampler<'j> {
    pub(super) fn new(config: &SubsampleConfig, judge: &'j Judge) -> Sampler<'j> {
        Sampler {
            judge,
            rows: 0,
            buckets: KeyedBuckets::beside(&config.output_path),
            notes: Notes::new(&config.shared),
        }
    }

    pub(super) fn admit(&mut self, row: std::result::Result<JudgedQuestion, Fault>) -> Result<()> {
        self.rows += 1;
        let name = row_name(self.rows);
        let row = match row {
            Ok(row) => row,
            Err(fault) => {
                self.notes.ledger.row(name.source);
                self.notes.bad(name, Source::OpenOrca, fault);
                return Ok(());
            }
        };
        let JudgedQuestion { stratum, judged, original, spilled } = row;
        let source = stratum.reported_name();
        self.notes.ledger.row(source);
        self.notes.judged(source, name, &self.judge.pipeline, original.as_ref(), &judged);
        match (spilled, judged.dropped) {
            (Some(spilled), _) => self.buckets.push(self.rows, spilled)?,
            (None, Some(dropped)) => {
                self.notes.ledger.dropped(source, name, &dropped, || judged.draft.instruction);
            }
            (None, None) => {}
        }
        Ok(())
    }

    /// Writes the sample in its order.
    pub(super) fn write(
        mut self,
        cap: usize,
        run: &mut Run<'_>,
        writer: &mut RowWriter,
    ) -> Result<Notes> {
        run.begin_writing(self.buckets.rows());
        let last_keys = self.last_sample_keys(cap)?;
        let encoder = writer.encoder();
        let Sampler { judge, mut buckets, mut notes, .. } = self;
        buckets.for_each_in_order(
            |bucket| {
                let (rows, keeps_texts) = (encoder.rows(), judge.keeps_originals);
                let mut sample = Sample { rows, fates: Vec::new(), keeps_texts };
                equals(bucket).try_for_each(|equal| sample.choose(equal, &last_keys))?;
                Ok(sample)
            },
            |sample| {
                run.wrote(sample.fates.len())?;
                for fate in sample.fates {
                    note_steps(&mut notes, &fate);
                    notes.enter(fate);
                }
                Ok(writer.write_encoded(&sample.rows)?)
            },
        )?;
        Ok(notes)
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
        self.fates.push(fate(first.number, &first.row, None, String::new()));
        self.rows.push(&Draft::new(Source::OpenOrca, first.row.question).into_prompt())?;
        Ok(())
    }

    fn leave_out(&mut self, entry: Entry<Waiting<'_>>, dropped: Dropped) {
        let Entry { number, row, .. } = entry;
        let text = if self.keeps_texts { row.question.to_string() } else { String::new() };
        self.fates.push(fate(number, &row, Some(dropped), text));
    }
}

fn fate(number: u64, row: &Waiting<'_>, dropped: Option<Dropped>, text: String) -> Fate {
    let source = row.stratum().reported_name();
    Fate { name: row_name(number), source, tokens: row.tokens, dropped, text }
}

/// What the comparison and the cap did to a row.
fn note_steps(notes: &mut Notes, fate: &Fate) {
    let dropped = fate.dropped.clone();
    match fate.dropped.as_ref().map(|dropped| dropped.reason) {
        Some(DropReason::Duplicate) => notes.step(fate.name, "duplicates", dropped),
        None | Some(DropReason::OverCap) => {
            notes.step(fate.name, "duplicates", None);
            notes.step(fate.name, "cap", dropped);
        }
        // A rule has left it out before.
        Some(_) => {}
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
