use std::collections::BTreeMap;
use std::path::PathBuf;

use dromedary_command::{Error, Result};
use serde::{Deserialize, Serialize};

use crate::{PerSource, Selection, Source};

/// Flags of the rules that are off unless they are asked for.
#[derive(Clone, Debug, Default, PartialEq, clap::Args, Serialize, Deserialize)]
#[serde(default)]
pub struct OptionalArgs {
    /// Leave out prompts that share this part of their five-character pieces with an earlier one
    /// (Jaccard similarity, 0.8 for example) [default: off].
    #[arg(long, value_name = "SIMILARITY")]
    pub near_duplicates: Option<f64>,
    /// Leave out prompts that are surely in another language than these (codes such as en,de)
    /// [default: off].
    #[arg(long, value_name = "CODES", value_delimiter = ',')]
    pub languages: Vec<String>,
    /// Leave out prompts that share 13 words in a row with these benchmarks (JSON of any layout,
    /// JSON lines, text), or a whole shorter question [default: off].
    #[arg(long, value_name = "FILE", value_delimiter = ',', num_args = 1..)]
    pub decontaminate: Vec<PathBuf>,
    /// Keep this share of the prompts: each by a hash of the seed and its id, so that it stays when
    /// rows are added elsewhere [default: off].
    #[arg(long, value_name = "SHARE")]
    pub sample: Option<f64>,
    /// Keep no more prompts of a source, such as dolly=5000,openorca=20000 [default: off].
    #[arg(long, value_name = "SOURCE=ROWS", value_delimiter = ',')]
    pub max_per_source: Vec<PerSource<u64>>,
    /// Keep as many prompts as a ratio of the sources allows, such as dolly=1,openorca=3
    /// [default: off].
    #[arg(long, value_name = "SOURCE=RATIO", value_delimiter = ',')]
    pub mix: Vec<PerSource<f64>>,
}

/// Settings of the rules that are off unless they are asked for.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct OptionalConfig {
    /// The similarity from which on two prompts are near-duplicates.
    pub near_duplicates: Option<f64>,
    /// Codes of the languages that are kept; all if there are none.
    pub languages: Vec<String>,
    /// Benchmarks that no prompt may hold a part of.
    pub decontaminate: Vec<PathBuf>,
    /// The share of the prompts that is kept.
    pub sample: Option<f64>,
    /// The most that is kept of each source.
    pub max_per_source: Vec<PerSource<u64>>,
    /// The ratio of the sources.
    pub mix: Vec<PerSource<f64>>,
}

impl OptionalConfig {
    /// The settings of the flags, for a merge of these sources.
    pub(crate) fn resolve(args: OptionalArgs, sources: &[Source]) -> Result<OptionalConfig> {
        for (share, flag) in
            [(args.near_duplicates, "--near-duplicates"), (args.sample, "--sample")]
        {
            if let Some(share) = share.filter(|&share| !(share > 0.0 && share <= 1.0)) {
                return Err(Error::usage(format!(
                    "{flag} {share}: expected a share above 0, up to 1"
                )));
            }
        }
        check_sources(&args.max_per_source, sources, "--max-per-source")?;
        check_sources(&args.mix, sources, "--mix")?;
        check_mix(&args.mix, sources)?;
        Ok(OptionalConfig {
            near_duplicates: args.near_duplicates,
            languages: args.languages,
            decontaminate: args.decontaminate,
            sample: args.sample,
            max_per_source: args.max_per_source,
            mix: args.mix,
        })
    }

    /// Which of the clean prompts are taken.
    pub(crate) fn selection(&self) -> Selection {
        Selection {
            sample: self.sample,
            max: by_source(&self.max_per_source),
            mix: by_source(&self.mix),
        }
    }
}

fn by_source<N: Copy>(entries: &[PerSource<N>]) -> BTreeMap<Source, N> {
    entries.iter().map(|entry| (entry.source, entry.number)).collect()
}

/// Each source once, and only those that are merged.
fn check_sources<N>(entries: &[PerSource<N>], sources: &[Source], flag: &str) -> Result<()> {
    for (index, PerSource { source, .. }) in entries.iter().enumerate() {
        if entries[..index].iter().any(|entry| entry.source == *source) {
            return Err(Error::usage(format!("{flag} names {source} twice")));
        }
        if !sources.contains(source) {
            return Err(Error::usage(format!("{flag} names {source}, which has no file here")));
        }
    }
    Ok(())
}

fn check_mix(mix: &[PerSource<f64>], sources: &[Source]) -> Result<()> {
    if mix.is_empty() {
        return Ok(());
    }
    for PerSource { source, number } in mix {
        if !(number.is_finite() && *number >= 0.0) {
            return Err(Error::usage(format!("--mix {source}={number}: expected a ratio")));
        }
    }
    if mix.iter().all(|entry| entry.number == 0.0) {
        return Err(Error::usage("--mix: all ratios are 0, so nothing would be left"));
    }
    match sources.iter().find(|&source| mix.iter().all(|entry| entry.source != *source)) {
        Some(left_out) => Err(Error::usage(format!(
            "--mix does not name {left_out}; give every source a ratio, 0 to leave it out"
        ))),
        None => Ok(()),
    }
}
