use std::collections::BTreeMap;

use super::{Sample, SourceCounts};
use crate::{Dropped, Edit};

/// So many samples are kept of each source and reason.
const SAMPLES: usize = 3;
/// A longer text is cut in its middle, because most edits are at its ends.
const MAX_EXCERPT: usize = 600;

/// A row, as people name it: `dolly:17`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RowName<'s> {
    /// The source.
    pub(crate) source: &'s str,
    /// The number of the row in all files of the source, from 1.
    pub(crate) number: u64,
}

impl std::fmt::Display for RowName<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.source, self.number)
    }
}

/// Counts what happens to rows, and keeps samples where a report is asked for.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    counts: BTreeMap<String, SourceCounts>,
    notes: Option<Notes>,
}

#[derive(Debug, Default)]
struct Notes {
    /// By source and reason; of each those with the smallest keys.
    samples: BTreeMap<(String, &'static str), Vec<(u64, Sample)>>,
    /// Rows by their number of tokens.
    lengths: BTreeMap<String, BTreeMap<u32, u64>>,
}

/// What a ledger has at the end.
#[derive(Debug, Default)]
pub(crate) struct Entries {
    pub(crate) counts: BTreeMap<String, SourceCounts>,
    pub(crate) samples: Vec<Sample>,
    pub(crate) lengths: BTreeMap<String, BTreeMap<u32, u64>>,
}

impl Ledger {
    /// An empty ledger; with `samples` it keeps texts and lengths too.
    pub(crate) fn new(samples: bool) -> Ledger {
        Ledger { counts: BTreeMap::new(), notes: samples.then(Notes::default) }
    }

    /// Makes sure that the source is in the report.
    pub(crate) fn open(&mut self, source: &str) {
        self.counts(source);
    }

    /// Another row of the source; gives its number.
    pub(crate) fn row(&mut self, source: &str) -> u64 {
        let counts = self.counts(source);
        counts.rows += 1;
        counts.rows
    }

    /// The row was changed; `texts` gives what it was and what it is.
    pub(crate) fn edited(
        &mut self,
        source: &str,
        row: RowName<'_>,
        edits: &[Edit],
        texts: impl Fn() -> (String, String),
    ) {
        if edits.is_empty() {
            return;
        }
        self.counts(source).count_edits(edits);
        for edit in edits {
            self.sample(source, row, edit.name(), || {
                let (before, after) = texts();
                Sample::edit(source, row, *edit, &before, &after)
            });
        }
    }

    /// The row was left out; `text` gives what it is.
    pub(crate) fn dropped(
        &mut self,
        source: &str,
        row: RowName<'_>,
        dropped: &Dropped,
        text: impl FnOnce() -> String,
    ) {
        self.counts(source).count_drops(dropped.reason, 1);
        self.sample(source, row, dropped.reason.name(), || {
            Sample::drop(source, row, dropped, &text())
        });
    }

    /// The row was written.
    pub(crate) fn kept(&mut self, source: &str, tokens: Option<u32>) {
        self.counts(source).kept += 1;
        if let (Some(notes), Some(tokens)) = (&mut self.notes, tokens) {
            let lengths = notes.lengths.entry(source.to_owned()).or_default();
            *lengths.entry(tokens).or_default() += 1;
        }
    }

    /// What was counted and kept.
    pub(crate) fn finish(self) -> Entries {
        let Notes { samples, lengths } = self.notes.unwrap_or_default();
        let samples = samples.into_values().flatten().map(|(_, sample)| sample).collect();
        Entries { counts: self.counts, samples, lengths }
    }

    fn counts(&mut self, source: &str) -> &mut SourceCounts {
        if !self.counts.contains_key(source) {
            self.counts.insert(source.to_owned(), SourceCounts::default());
        }
        self.counts.get_mut(source).expect("it was inserted")
    }

    /// Keeps the sample if its key is among the smallest: a hash of the row's name, so that samples
    /// come from all over the file and two runs show the same.
    fn sample(
        &mut self,
        source: &str,
        row: RowName<'_>,
        reason: &'static str,
        sample: impl FnOnce() -> Sample,
    ) {
        let Some(notes) = &mut self.notes else {
            return;
        };
        let key = blake3::hash(row.to_string().as_bytes());
        let key = key.as_bytes()[..8].iter().fold(0, |key, &byte| key << 8 | u64::from(byte));
        let kept = notes.samples.entry((source.to_owned(), reason)).or_default();
        let place = kept.partition_point(|&(other, _)| other < key);
        if place < SAMPLES {
            kept.insert(place, (key, sample()));
            kept.truncate(SAMPLES);
        }
    }
}

impl Sample {
    fn edit(source: &str, row: RowName<'_>, edit: Edit, before: &str, after: &str) -> Sample {
        Sample {
            source: source.to_owned(),
            row: row.to_string(),
            edit: Some(edit.name().to_owned()),
            drop: None,
            detail: String::new(),
            before: excerpt(before),
            after: Some(excerpt(after)),
        }
    }

    fn drop(source: &str, row: RowName<'_>, dropped: &Dropped, text: &str) -> Sample {
        Sample {
            source: source.to_owned(),
            row: row.to_string(),
            edit: None,
            drop: Some(dropped.reason.name().to_owned()),
            detail: dropped.detail.clone(),
            before: excerpt(text),
            after: None,
        }
    }
}

/// The text, without its middle if it is long.
fn excerpt(text: &str) -> String {
    let chars = text.chars().count();
    if chars <= MAX_EXCERPT {
        return text.to_owned();
    }
    let half = MAX_EXCERPT / 2;
    let cut = chars - 2 * half;
    let head: String = text.chars().take(half).collect();
    let tail: String = text.chars().skip(half + cut).collect();
    format!("{head} [... {cut} characters ...] {tail}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DropReason;

    #[test]
    fn few_samples_are_kept_and_the_order_of_rows_does_not_matter() {
        let samples = |numbers: &mut dyn Iterator<Item = u64>| {
            let mut ledger = Ledger::new(true);
            for number in numbers {
                let row = RowName { source: "dolly", number };
                let dropped = Dropped::plain(DropReason::Empty);
                ledger.dropped("dolly", row, &dropped, || number.to_string());
            }
            ledger.finish().samples
        };
        let forward = samples(&mut (1..100));
        assert_eq!(forward.len(), SAMPLES);
        assert_eq!(forward, samples(&mut (1..100).rev()));
    }

    #[test]
    fn a_long_text_keeps_its_ends() {
        let text = format!("start{}end", "x".repeat(5000));
        let excerpt = excerpt(&text);
        assert!(excerpt.starts_with("startx") && excerpt.ends_with("xend"), "{excerpt}");
        assert!(excerpt.len() < 700 && excerpt.contains("[... 4408 characters ...]"), "{excerpt}");
    }
}
