use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use dromedary_records::{Prompt, RowWriter};
use serde::{Deserialize, Serialize};

use super::Run;
use super::merge::MergeConfig;
use super::notes::{Fate, Notes};
use crate::buckets::{Entry, KeyedBuckets, Spilled, folder_of};
use crate::report::RowName;
use crate::selection::Selection;
use crate::sources::{Fault, Offer};
use crate::{
    Cleaner, DecontaminationRule, Draft, DropReason, Dropped, Fingerprint, Judged, KeyedOrder,
    LanguageRule, LengthRule, Lists, NearDuplicates, NotEmpty, Pipeline, Result, Rules, Sketch,
    Sketcher, Source, TokenCounter,
};

/// What looks at one row alone, on any thread.
pub(super) struct Judge {
    rules: Rules,
    order: KeyedOrder,
    pipeline: Pipeline,
    sketcher: Option<Sketcher>,
    /// Counts tokens for the report.
    counter: Option<Arc<TokenCounter>>,
    /// Whether a row is remembered as it was read.
    keeps_originals: bool,
}

/// What the judge says of a row.
pub(super) enum Verdict {
    /// The source has no prompt in the row.
    Unfit(Dropped, Draft),
    /// The rules were shown the prompt.
    Judged(Box<JudgedRow>),
}

pub(super) struct JudgedRow {
    judged: Judged,
    original: Option<Draft>,
    /// What comes after the rules, unless one of them has left the row out.
    clean: Option<Clean>,
}

/// A prompt that the rules have kept.
struct Clean {
    fingerprint: Fingerprint,
    sketch: Option<Sketch>,
    choice_key: u64,
    /// What waits on disk if no other prompt is in its way.
    spilled: postcard::Result<Spilled>,
}

impl Judge {
    pub(super) fn open(config: &MergeConfig, lists: &Arc<Lists>) -> Result<Judge> {
        let counter = config.judge.counter()?;
        let optional = &config.optional;
        let length = LengthRule {
            counter: counter.clone(),
            min: config.min_prompt_len,
            max: config.judge.max_prompt_len,
            suffix: "",
        };
        let languages = (!optional.languages.is_empty())
            .then(|| LanguageRule::new(&optional.languages, lists))
            .transpose()?;
        let benchmarks = (!optional.decontaminate.is_empty())
            .then(|| DecontaminationRule::open(&optional.decontaminate))
            .transpose()?;
        let pipeline = Pipeline::new()
            .with(Cleaner::new(config.shared.compat.into(), lists.clone()))
            .with(NotEmpty)
            .with(length)
            .with_some(languages)
            .with_some(benchmarks);
        Ok(Judge {
            rules: config.shared.compat.into(),
            order: KeyedOrder::new(config.judge.seed),
            pipeline,
            sketcher: optional.near_duplicates.map(Sketcher::new),
            counter: config.shared.report.is_some().then_some(counter),
            keeps_originals: config.shared.keeps_originals(),
        })
    }

    pub(super) fn judge(&self, source: Source, offer: Offer) -> Verdict {
        let draft = match offer {
            Offer::Draft(draft) => draft,
            Offer::Unfit { reason, text } => {
                return Verdict::Unfit(Dropped::plain(reason), Draft::new(source, text));
            }
        };
        let original = self.keeps_originals.then(|| draft.clone());
        let judged = self.pipeline.judge(draft);
        let clean = judged.dropped.is_none().then(|| self.clean(&judged.draft));
        Verdict::Judged(Box::new(JudgedRow { judged, original, clean }))
    }

    fn clean(&self, draft: &Draft) -> Clean {
        let whole = draft.whole();
        let fingerprint = Fingerprint::of(self.rules, &whole);
        let id = draft.id();
        let choice_key = self.order.choice_key(&id);
        let waiting = Waiting {
            tokens: self.counter.as_ref().map(|counter| counter.count(&whole) as u32),
            choice_key,
            id: Cow::Owned(id),
            instruction: Cow::Borrowed(&draft.instruction),
            input: Cow::Borrowed(&draft.input),
        };
        let key = self.order.output_key(&fingerprint);
        Clean {
            fingerprint,
            sketch: self.sketcher.as_ref().map(|sketcher| sketcher.sketch(&whole)),
            choice_key,
            spilled: Spilled::new(key, &waiting, whole.len() + waiting.id.len()),
        }
    }
}

/// Where a prompt was read: the place of its source in [`Source::ALL`] in the first byte, behind it
/// the number of the row. One is held for every prompt.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Place(u64);

impl Place {
    const NUMBER_BITS: u32 = 56;

    fn new(source: Source, number: u64) -> Place {
        Place((source as u64) << Place::NUMBER_BITS | number)
    }

    fn source(self) -> Source {
        Source::ALL[(self.0 >> Place::NUMBER_BITS) as usize]
    }

    fn name(self) -> RowName<'static> {
        let number = self.0 & ((1 << Place::NUMBER_BITS) - 1);
        RowName { source: self.source().name(), number }
    }
}

/// A clean prompt that waits on disk, under the number of its [`Place`].
#[derive(Serialize, Deserialize)]
struct Waiting<'p> {
    tokens: Option<u32>,
    choice_key: u64,
    #[serde(borrow)]
    id: Cow<'p, str>,
    #[serde(borrow)]
    instruction: Cow<'p, str>,
    #[serde(borrow)]
    input: Cow<'p, str>,
}

/// Compares the clean prompts, keeps the first of equal ones and chooses among the others.
pub(super) struct Merger<'j> {
    judge: &'j Judge,
    seen: BTreeMap<Fingerprint, Place>,
    near: Option<(NearDuplicates, Vec<Place>)>,
    selection: Selection,
    keys: BTreeMap<Source, Vec<u64>>,
    buckets: KeyedBuckets,
    notes: Notes,
}

impl<'j> Merger<'j> {
    pub(super) fn new(config: &MergeConfig, judge: &'j Judge) -> Result<Merger<'j>> {
        let near = config.optional.near_duplicates;
        let near = near.map(|threshold| {
            let texts = NearDuplicates::new(threshold, &folder_of(&config.output_file))?;
            Ok::<_, crate::Error>((texts, Vec::new()))
        });
        Ok(Merger {
            judge,
            seen: BTreeMap::new(),
            near: near.transpose()?,
            selection: config.optional.selection(),
            keys: BTreeMap::new(),
            buckets: KeyedBuckets::beside(&config.output_file),
            notes: Notes::new(&config.shared),
        })
    }

    /// The rows of a source follow.
    pub(super) fn begin(&mut self, source: Source) {
        self.notes.ledger.open(source.name());
        if self.selection.counts_prompts() {
            self.keys.insert(source, Vec::new());
        }
    }

    pub(super) fn admit(
        &mut self,
        source: Source,
        verdict: std::result::Result<Verdict, Fault>,
    ) -> Result<()> {
        let place = Place::new(source, self.notes.ledger.row(source.name()));
        match verdict {
            Err(fault) => self.notes.bad(place.name(), source, fault),
            Ok(Verdict::Unfit(dropped, draft)) => self.notes.unfit(place.name(), draft, &dropped),
            Ok(Verdict::Judged(row)) => self.admit_judged(place, *row)?,
        }
        Ok(())
    }

    fn admit_judged(&mut self, place: Place, row: JudgedRow) -> Result<()> {
        let JudgedRow { judged, original, clean } = row;
        let (name, source) = (place.name(), place.source().name());
        self.notes.judged(source, name, &self.judge.pipeline, original.as_ref(), &judged);
        let left_out = match (judged.dropped, clean) {
            (Some(dropped), _) => Some(dropped),
            (None, Some(clean)) => self.admit_clean(place, clean)?,
            (None, None) => None,
        };
        if let Some(dropped) = left_out {
            self.notes.ledger.dropped(source, name, &dropped, || judged.draft.instruction);
        }
        Ok(())
    }

    /// The rules that look at several prompts.
    fn admit_clean(&mut self, place: Place, clean: Clean) -> Result<Option<Dropped>> {
        let Clean { fingerprint, sketch, choice_key, spilled } = clean;
        let equal = self.equal(place, fingerprint);
        self.notes.step(place.name(), "duplicates", equal.clone());
        if equal.is_some() {
            return Ok(equal);
        }
        if let Some(sketch) = sketch {
            let similar = self.similar(place, sketch)?;
            self.notes.step(place.name(), "near-duplicates", similar.clone());
            if similar.is_some() {
                return Ok(similar);
            }
        }
        if self.selection.sample.is_some() {
            let left_out = self.selection.sample(choice_key);
            self.notes.step(place.name(), "sample", left_out.clone());
            if left_out.is_some() {
                return Ok(left_out);
            }
        }
        if let Some(keys) = self.keys.get_mut(&place.source()) {
            keys.push(choice_key);
        }
        self.buckets.push(place.0, spilled)?;
        Ok(None)
    }

    fn equal(&mut self, place: Place, fingerprint: Fingerprint) -> Option<Dropped> {
        let first = *self.seen.entry(fingerprint).or_insert(place);
        (first != place)
            .then(|| Dropped::with(DropReason::Duplicate, format!("of {}", first.name())))
    }

    fn similar(&mut self, place: Place, sketch: Sketch) -> Result<Option<Dropped>> {
        let Some((texts, places)) = &mut self.near else {
            return Ok(None);
        };
        Ok(match texts.admit(sketch)? {
            None => {
                places.push(place);
                None
            }
            Some(found) => {
                let (similarity, other) = (found.similarity, places[found.index].name());
                let detail = format!("{similarity:.2} like {other}");
                Some(Dropped::with(DropReason::NearDuplicate, detail))
            }
        })
    }

    /// Writes what the caps and the mix leave.
    pub(super) fn write(self, run: &mut Run<'_>, writer: &mut RowWriter) -> Result<Notes> {
        let Merger { judge, selection, keys, mut buckets, mut notes, .. } = self;
        run.begin_writing(buckets.rows());
        let limited = selection.counts_prompts();
        let limits = selection.limits(keys);
        let encoder = writer.encoder();
        buckets.for_each_in_order(
            |bucket| {
                let (mut rows, mut fates) = (encoder.rows(), Vec::new());
                for Entry { number, row, .. } in bucket.rows::<Waiting<'_>>() {
                    let place = Place(number);
                    let dropped = limits.check(place.source(), row.choice_key);
                    let is_shown = dropped.is_some() && judge.keeps_originals;
                    fates.push(Fate {
                        name: place.name(),
                        source: place.source().name(),
                        tokens: row.tokens,
                        text: if is_shown { row.instruction.to_string() } else { String::new() },
                        dropped,
                    });
                    if fates.last().is_some_and(|fate| fate.dropped.is_none()) {
                        rows.push(&row.into_prompt(place.source()))?;
                    }
                }
                Ok((rows, fates))
            },
            |(rows, fates)| {
                run.wrote(fates.len())?;
                for fate in fates {
                    if limited {
                        notes.step(fate.name, "cap and mix", fate.dropped.clone());
                    }
                    notes.enter(fate);
                }
                Ok(writer.write_encoded(&rows)?)
            },
        )?;
        Ok(notes)
    }
}

impl Waiting<'_> {
    fn into_prompt(self, source: Source) -> Prompt {
        Prompt {
            id: self.id.into_owned(),
            source: source.to_string(),
            instruction: self.instruction.into_owned(),
            input: self.input.into_owned(),
        }
    }
}

impl MergeConfig {
    /// The files that are read besides the rows.
    pub(super) fn references(&self) -> Vec<PathBuf> {
        let mut files = self.judge.files();
        files.extend(self.optional.decontaminate.iter().cloned());
        files
    }
}
