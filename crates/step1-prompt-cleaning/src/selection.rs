use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{DropReason, Dropped, Source};

/// A number for a source, `dolly=5000`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(
    try_from = "String",
    into = "String",
    bound(serialize = "N: Clone + fmt::Display", deserialize = "N: FromStr")
)]
pub struct PerSource<N> {
    /// The source.
    pub source: Source,
    /// Its number.
    pub number: N,
}

impl<N: FromStr> FromStr for PerSource<N> {
    type Err = String;

    fn from_str(text: &str) -> Result<PerSource<N>, String> {
        let (name, number) =
            text.split_once('=').ok_or_else(|| format!("{text:?} is not SOURCE=NUMBER"))?;
        let source = Source::ALL.into_iter().find(|source| source.name() == name);
        let source = source.ok_or_else(|| {
            let names = Source::ALL.map(Source::name).join(", ");
            format!("{name:?} is no source; sources are {names}")
        })?;
        let number = number.parse().map_err(|_| format!("{number:?} is not such a number"))?;
        Ok(PerSource { source, number })
    }
}

impl<N: FromStr> TryFrom<String> for PerSource<N> {
    type Error = String;

    fn try_from(text: String) -> Result<PerSource<N>, String> {
        text.parse()
    }
}

impl<N: fmt::Display> From<PerSource<N>> for String {
    fn from(entry: PerSource<N>) -> String {
        format!("{}={}", entry.source, entry.number)
    }
}

/// Which of the clean prompts are taken; all of them by default.
///
/// Each prompt has a key, a hash of the seed and its id, and the smallest keys are taken. So a
/// prompt stays in the sample whatever rows are added elsewhere, and a smaller sample is a part of
/// a larger one.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Selection {
    /// The share of all prompts to take; 1 if there is none.
    pub sample: Option<f64>,
    /// The most that are taken of a source.
    pub max: BTreeMap<Source, u64>,
    /// The ratio of the sources; as many rows are taken as it allows.
    pub mix: BTreeMap<Source, f64>,
}

impl Selection {
    /// Whether it depends on how many prompts there are.
    pub(crate) fn counts_prompts(&self) -> bool {
        !self.max.is_empty() || !self.mix.is_empty()
    }

    /// Why the sample is drawn without the prompt of this key, if it is.
    pub(crate) fn sample(&self, key: u64) -> Option<Dropped> {
        let share = self.sample?;
        // 53 bits, which a float holds exactly.
        let place = (key >> 11) as f64 / (1_u64 << 53) as f64;
        let detail = || format!("its place is {place:.4} of 1, the sample ends at {share}");
        (place >= share).then(|| Dropped::with(DropReason::NotSampled, detail()))
    }

    /// The limits that follow from the keys of all sampled prompts.
    pub(crate) fn limits(&self, keys: BTreeMap<Source, Vec<u64>>) -> Limits {
        let mut capped = BTreeMap::new();
        for (&source, keys) in &keys {
            let max = self.max.get(&source).copied().unwrap_or(u64::MAX);
            capped.insert(source, (keys.len() as u64).min(max));
        }
        let mixed = self.mixed(&capped);
        let limits = keys.into_iter().map(|(source, mut keys)| {
            let limit = Limit {
                cap: last_key(&mut keys, capped[&source]),
                mix: last_key(&mut keys, mixed[&source]),
            };
            (source, limit)
        });
        Limits(limits.collect())
    }

    /// The largest numbers in the ratio that no source lacks prompts for.
    fn mixed(&self, available: &BTreeMap<Source, u64>) -> BTreeMap<Source, u64> {
        if self.mix.is_empty() {
            return available.clone();
        }
        let of = |source: &Source| available.get(source).copied().unwrap_or(0);
        let scarce = self.mix.iter().filter(|&(_, &ratio)| ratio > 0.0).min_by(
            |(a, a_ratio), (b, b_ratio)| {
                (of(a) as f64 / *a_ratio).total_cmp(&(of(b) as f64 / *b_ratio))
            },
        );
        let Some((scarcest, scarcest_ratio)) = scarce else {
            return available.clone();
        };
        let share = |source: &Source| {
            let ratio = self.mix.get(source).copied().unwrap_or(0.0) / scarcest_ratio;
            // A third of three times as many is all of them, whatever the division makes of it.
            ((of(scarcest) as f64 * ratio + 1e-6) as u64).min(of(source))
        };
        available.keys().map(|source| (*source, share(source))).collect()
    }
}

/// The key of the last prompt taken, were only `taken` of them; `None` takes nothing.
fn last_key(keys: &mut [u64], taken: u64) -> Option<u64> {
    let last = usize::try_from(taken).ok()?.checked_sub(1)?;
    if last >= keys.len() {
        return Some(u64::MAX);
    }
    Some(*keys.select_nth_unstable(last).1)
}

/// The last keys of a source's cap and of its place in the mix.
#[derive(Clone, Copy, Debug)]
struct Limit {
    cap: Option<u64>,
    mix: Option<u64>,
}

/// The last keys of each source.
#[derive(Clone, Debug, Default)]
pub(crate) struct Limits(BTreeMap<Source, Limit>);

impl Limits {
    /// Why the prompt of this key is left out, if it is.
    pub(crate) fn check(&self, source: Source, key: u64) -> Option<Dropped> {
        let limit = self.0.get(&source)?;
        if limit.cap.is_none_or(|last| key > last) {
            Some(Dropped::plain(DropReason::OverCap))
        } else if limit.mix.is_none_or(|last| key > last) {
            Some(Dropped::plain(DropReason::OverMix))
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(counts: &[(Source, u64)]) -> BTreeMap<Source, Vec<u64>> {
        counts.iter().map(|&(source, n)| (source, (0..n).map(|i| i * 10).collect())).collect()
    }

    fn taken(selection: &Selection, counts: &[(Source, u64)]) -> Vec<u64> {
        let limits = selection.limits(keys(counts));
        let of = |&(source, n): &(Source, u64)| {
            (0..n).filter(|i| limits.check(source, i * 10).is_none()).count() as u64
        };
        counts.iter().map(of).collect()
    }

    #[test]
    fn a_cap_takes_the_smallest_keys() {
        let max = BTreeMap::from([(Source::Dolly, 3)]);
        let selection = Selection { max, ..Selection::default() };
        assert_eq!(taken(&selection, &[(Source::Dolly, 5), (Source::Oasst1, 7)]), [3, 7]);
        assert_eq!(taken(&selection, &[(Source::Dolly, 2)]), [2]);
    }

    #[test]
    fn a_mix_takes_as_many_as_the_scarcest_allows() {
        let mix = BTreeMap::from([(Source::Dolly, 1.0), (Source::OpenOrca, 3.0)]);
        let selection = Selection { mix, ..Selection::default() };
        let taken =
            |dolly, orca| taken(&selection, &[(Source::Dolly, dolly), (Source::OpenOrca, orca)]);
        assert_eq!(taken(5, 100), [5, 15]);
        assert_eq!(taken(100, 30), [10, 30]);
        assert_eq!(taken(100, 31), [10, 31]);
    }

    #[test]
    fn the_mix_counts_what_the_cap_leaves() {
        let selection = Selection {
            sample: None,
            max: BTreeMap::from([(Source::Dolly, 4)]),
            mix: BTreeMap::from([(Source::Dolly, 0.5), (Source::OpenOrca, 0.5)]),
        };
        assert_eq!(taken(&selection, &[(Source::Dolly, 9), (Source::OpenOrca, 9)]), [4, 4]);
        // Of a source with the ratio 0, or with none, nothing is taken.
        assert_eq!(
            taken(&selection, &[(Source::Dolly, 9), (Source::OpenOrca, 9), (Source::Oasst1, 2)]),
            [4, 4, 0]
        );
    }

    #[test]
    fn entries_are_read_as_they_are_written() {
        let entry: PerSource<u64> = "dolly=5000".parse().unwrap();
        assert_eq!(String::from(entry), "dolly=5000");
        for (text, part) in
            [("dolly", "SOURCE=NUMBER"), ("doly=1", "openorca"), ("dolly=x", "such a number")]
        {
            let message = text.parse::<PerSource<u64>>().unwrap_err();
            assert!(message.contains(part), "{message}");
        }
    }
}
