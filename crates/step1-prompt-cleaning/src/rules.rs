use std::fmt;

use serde::{Deserialize, Serialize};

/// Whose rules of taste apply where ours and the original's differ.
///
/// Crashes and hangs of the original are nobody's rules: those are gone in both.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rules {
    /// Page chrome is removed from ShareGPT prompts only and only where it is chrome; rows are
    /// filtered before they are compared; keywords stand on word borders; prompts that differ in
    /// case or white space alone are the same.
    #[default]
    Corrected,
    /// The rows that Dromedary gives, as a set (its own order is unseeded).
    Dromedary,
}

/// `--compat`: whose rules to follow instead of the corrected ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Compat {
    /// The original's rules, for results that can be compared with it.
    Dromedary,
}

impl From<Option<Compat>> for Rules {
    fn from(compat: Option<Compat>) -> Rules {
        match compat {
            None => Rules::Corrected,
            Some(Compat::Dromedary) => Rules::Dromedary,
        }
    }
}

/// Where a prompt comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Source {
    /// Databricks' Dolly-15k.
    Dolly,
    /// OpenAssistant's oasst1.
    Oasst1,
    /// Conversations shared on ShareGPT pages.
    ShareGpt,
    /// OpenOrca, FLAN tasks among them.
    OpenOrca,
}

impl Source {
    /// Every source, in the order in which `clean-and-merge` reads them.
    pub const ALL: [Source; 4] =
        [Source::Dolly, Source::Oasst1, Source::ShareGpt, Source::OpenOrca];

    /// The name in rows and reports.
    pub fn name(self) -> &'static str {
        match self {
            Source::Dolly => "dolly",
            Source::Oasst1 => "oasst1",
            Source::ShareGpt => "sharegpt",
            Source::OpenOrca => "openorca",
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
