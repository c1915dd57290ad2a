use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use dromedary_records::{Prompt, RowWriter};
use serde::{Deserialize, Serialize};

use super::merge::MergeConfig;
use crate::buckets::{Entry, KeyedBuckets, Spilled, folder_of};
use crate::explain::{Explanation, Search};
use crate::report::{Ledger, RowName};
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
        let reports = config.shared.report.is_some();
        Ok(Judge {
            rules: config.shared.compat.into(),
            order: KeyedOrder::new(config.judge.seed),
            pipeline,
            sketcher: optional.near_duplicates.map(Sketcher::new),
            counter: reports.then_some(counter),
            keeps_originals: reports || config.shared.explain.is_some(),
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
    ledger: Ledger,
    search: Search,
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
            ledger: Ledger::new(config.shared.report.is_some()),
            search: Search::new(config.shared.explain.as_deref()),
        })
    }

    /// The rows of a source follow.
    pub(super) fn begin(&mut self, source: Source) {
        self.ledger.open(source.name());
        if self.selection.counts_prompts() {
            self.keys.insert(source, Vec::new());
        }
    }

    pub(super) fn admit(
        &mut self,
        source: Source,
        verdict: std::result::Result<Verdict, Fault>,
    ) -> Result<()> {
        let place = Place::new(source, self.ledger.row(source.name()));
        match verdict {
            Err(Fault(fault)) => {
                let dropped = Dropped::with(DropReason::BadRow, fault);
                self.leave_out_unread(place, dropped, Draft::new(source, ""));
                Ok(())
            }
            Ok(Verdict::Unfit(dropped, draft)) => {
                self.leave_out_unread(place, dropped, draft);
                Ok(())
            }
            Ok(Verdict::Judged(row)) => self.admit_judged(place, *row),
        }
    }

    fn leave_out_unread(&mut self, place: Place, dropped: Dropped, draft: Draft) {
        if self.search.is_wanted(place.name(), [&draft]) {
            let text = draft.instruction.clone();
            self.search.found(Explanation::unfit(place.name(), text, dropped.clone()));
        }
        self.ledger.dropped(place.source().name(), place.name(), &dropped, || draft.instruction);
    }

    fn admit_judged(&mut self, place: Place, row: JudgedRow) -> Result<()> {
        let JudgedRow { judged, original, clean } = row;
        let Judged { draft, edits, dropped } = judged;
        let name = place.name();
        if let Some(original) = &original
            && self.search.is_wanted(name, [original, &draft])
        {
            let pipeline = &self.judge.pipeline;
            self.search.found(Explanation::judged(name, original.clone(), pipeline));
        }
        let before = || original.as_ref().map_or_else(String::new, |o| o.instruction.clone());
        let texts = || (before(), draft.instruction.clone());
        self.ledger.edited(place.source().name(), name, &edits, texts);
        let left_out = match (dropped, clean) {
            (Some(dropped), _) => Some(dropped),
            (None, Some(clean)) => self.admit_clean(place, clean)?,
            (None, None) => None,
        };
        if let Some(dropped) = left_out {
            self.ledger.dropped(place.source().name(), name, &dropped, || draft.instruction);
        }
        Ok(())
    }

    /// The rules that look at several prompts.
    fn admit_clean(&mut self, place: Place, clean: Clean) -> Result<Option<Dropped>> {
        let Clean { fingerprint, sketch, choice_key, spilled } = clean;
        let equal = self.equal(place, fingerprint);
        self.search.step(place.name(), "duplicates", equal.clone());
        if equal.is_some() {
            return Ok(equal);
        }
        if let Some(sketch) = sketch {
            let similar = self.similar(place, sketch)?;
            self.search.step(place.name(), "near-duplicates", similar.clone());
            if similar.is_some() {
                return Ok(similar);
            }
        }
        if self.selection.sample.is_some() {
            let left_out = self.selection.sample(choice_key);
            self.search.step(place.name(), "sample", left_out.clone());
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
    pub(super) fn write(self, writer: &mut RowWriter) -> Result<(Ledger, Search)> {
        let Merger { judge, selection, keys, mut buckets, mut ledger, mut search, .. } = self;
        let limited = selection.counts_prompts();
        let limits = selection.limits(keys);
        let encoder = writer.encoder();
        let keeps_texts = judge.keeps_originals;
        buckets.for_each_in_order(
            |bucket| {
                let (mut rows, mut fates) = (encoder.rows(), Vec::new());
                for Entry { number, row, .. } in bucket.rows::<Waiting<'_>>() {
                    let place = Place(number);
                    let dropped = limits.check(place.source(), row.choice_key);
                    let text = match &dropped {
                        Some(_) if keeps_texts => row.instruction.clone().into_owned(),
                        _ => String::new(),
                    };
                    fates.push(Fate { place, tokens: row.tokens, dropped, text });
                    if fates.last().is_some_and(|fate| fate.dropped.is_none()) {
                        rows.push(&row.into_prompt(place.source()))?;
                    }
                }
                Ok((rows, fates))
            },
            |(rows, fates)| {
                for fate in fates {
                    fate.enter(limited, &mut ledger, &mut search);
                }
                Ok(writer.write_encoded(&rows)?)
            },
        )?;
        Ok((ledger, search))
    }
}

/// What became of a clean prompt.
struct Fate {
    place: Place,
    tokens: Option<u32>,
    /// Why it is left out, if it is.
    dropped: Option<Dropped>,
    /// Its text, if it is left out and the report shows texts.
    text: String,
}

impl Fate {
    fn enter(self, limited: bool, ledger: &mut Ledger, search: &mut Search) {
        let Fate { place, tokens, dropped, text } = self;
        let (name, source) = (place.name(), place.source().name());
        if limited {
            search.step(name, "cap and mix", dropped.clone());
        }
        match dropped {
            Some(dropped) => ledger.dropped(source, name, &dropped, || text),
            None => ledger.kept(source, tokens),
        }
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
