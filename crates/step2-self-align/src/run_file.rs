//! What a group says of its run where others can read it.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::Result;
use crate::shards::{beside, write_json};

/// The file `<rows>.run.json`: which part of which prompts a group answers, written as soon as it
/// holds the file, for `status` and for other jobs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RunFile {
    pub(crate) input_file: PathBuf,
    /// The job's part of the prompts.
    pub(crate) group_rank: usize,
    pub(crate) group_size: usize,
    /// Groups of this job that share its part.
    pub(crate) groups: usize,
    /// Ranks of each group.
    pub(crate) tp: usize,
    /// Rows that the group generates at once.
    pub(crate) max_batch_size: usize,
    /// Seconds since 1970.
    pub(crate) started_at: u64,
    /// What rank 0 has counted; its group's file alone has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) counts: Option<PromptCounts>,
}

/// Prompts, rows that are none included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PromptCounts {
    /// In the input file, as far as it is used.
    pub(crate) input: usize,
    /// In the job's part of it.
    pub(crate) job: usize,
}

impl RunFile {
    pub(crate) fn write(&self, shard: &Path) -> Result<()> {
        write_json(&beside(shard, ".run.json"), self)
    }

    /// What the last run said; nothing where there is no such file or another program wrote it.
    pub(crate) fn read(shard: &Path) -> Option<Self> {
        let bytes = fs::read(beside(shard, ".run.json")).ok()?;
        serde_json::from_slice(&bytes).ok()
    }
}
