//! The file of one group: locked, continued by id, finished with a mark.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use dromedary_files::{JsonlAppender, Lock, LockOptions, read_jsonl};
use dromedary_parallel::fault_point;
use dromedary_records::{AlignedResponse, FinishReason};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::run_file::RunFile;
use crate::shards::{Done, RowHead, Shard, beside, metrics_path, write_json};
use crate::{Error, Result};

/// What the text of a row depends on besides its prompt. Rows that were made with other settings
/// are not mixed into one file.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Settings {
    pub(crate) checkpoint: String,
    pub(crate) tokenizer: String,
    pub(crate) meta_prompt: String,
    pub(crate) thoughts: String,
    pub(crate) stop: Vec<String>,
    #[serde(flatten)]
    pub(crate) sampling: BTreeMap<String, Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) force_prefix: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) deterministic: Option<Fixed>,
    /// Kind of the weights, whatever `auto` meant where the file was begun.
    pub(crate) dtype: Option<String>,
    /// Linear layers are in four bits.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(crate) nf4: bool,
    pub(crate) max_seq_len: usize,
    pub(crate) max_gen_len: usize,
    pub(crate) seed: u64,
}

/// What must stay the same for rows to be equal to the last bit.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Fixed {
    pub(crate) max_batch_size: usize,
    pub(crate) threads: i32,
    pub(crate) tp: usize,
    pub(crate) is_cuda: bool,
}

/// The rows of a group on the disk, held by this process alone.
#[derive(Debug)]
pub(crate) struct Output {
    path: PathBuf,
    shard: Shard,
    rows: JsonlAppender,
    metrics: JsonlAppender,
    count: u64,
    rejected: u64,
    done: BTreeSet<String>,
    lock: Lock,
}

/// A line of a group's file: a row, or why there is none.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct StoredRow {
    #[serde(flatten)]
    pub(crate) row: AlignedResponse,
    /// Why the prompt was rejected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) reason: Option<String>,
}

impl Output {
    /// Locks a group's file, says whose it is, cuts a torn tail, and finds out which rows it has.
    pub(crate) fn open(
        path: PathBuf,
        settings: &Settings,
        run: &RunFile,
        break_lock: bool,
    ) -> Result<Self> {
        let lock = Lock::acquire(&path, &LockOptions::from_env(break_lock))?;
        fault_point("locked", 0)?;
        run.write(&path)?;
        fault_point("run-written", 0)?;
        let (rows, recovered) = JsonlAppender::open(&path)?;
        if recovered.cut_bytes > 0 {
            tracing::warn!(
                "{}: the last row was cut in the middle, {} bytes are dropped",
                path.display(),
                recovered.cut_bytes
            );
        }
        fault_point("rows-opened", 0)?;
        let (metrics, _) = JsonlAppender::open(metrics_path(&path))?;
        let shard = Shard::of(&path);
        let mut output =
            Self { rows, metrics, count: 0, rejected: 0, done: BTreeSet::new(), shard, path, lock };
        output.find_rows()?;
        output.check_settings(settings)?;
        Ok(output)
    }

    fn find_rows(&mut self) -> Result<()> {
        for row in read_jsonl::<RowHead>(&self.path)? {
            let (_, row) = row?;
            self.count += 1;
            self.rejected += u64::from(row.finish_reason == FinishReason::Rejected);
            self.done.insert(row.id);
        }
        Ok(())
    }

    /// Compares with the settings of the run that began the file, or writes them down.
    fn check_settings(&self, settings: &Settings) -> Result<()> {
        if self.count > 0 && settings.check(&self.path)? {
            return Ok(());
        }
        fault_point("settings-begun", 0)?;
        write_json(&Settings::path(&self.path), settings)?;
        Ok(fault_point("settings-written", 0)?)
    }

    /// The prompts that have a row here; none from now on, the list goes to whoever asks.
    pub(crate) fn take_done(&mut self) -> BTreeSet<String> {
        std::mem::take(&mut self.done)
    }

    /// The file of rows.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Whose file it is.
    pub(crate) fn shard(&self) -> &Shard {
        &self.shard
    }

    /// The file is to get more rows: it is not finished any more.
    pub(crate) fn reopen(&self) -> Result<()> {
        let path = Done::path(&self.path);
        match fs::remove_file(&path) {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::Write { path, source })
            }
            _ => Ok(fault_point("unmarked", 0)?),
        }
    }

    pub(crate) fn append(&mut self, stored: &StoredRow) -> Result<()> {
        let number = self.count as usize + 1;
        self.lock.check()?;
        fault_point("row-begun", number)?;
        self.rows.append(stored)?;
        fault_point("row-written", number)?;
        self.count += 1;
        self.rejected += u64::from(stored.row.finish_reason == FinishReason::Rejected);
        Ok(())
    }

    pub(crate) fn measure(&mut self, line: &impl Serialize) -> Result<()> {
        self.metrics.append(line)?;
        Ok(fault_point("row-measured", self.count as usize)?)
    }

    /// Makes the rows survive whatever comes.
    pub(crate) fn sync(&mut self) -> Result<()> {
        self.rows.sync()?;
        fault_point("rows-synced", 0)?;
        self.metrics.sync()?;
        Ok(fault_point("metrics-synced", 0)?)
    }

    /// Closes the file, whose rows are on the disk, and marks it as finished.
    pub(crate) fn finish(self, prompts: usize) -> Result<()> {
        Done::write(&self.path, self.count, self.rejected, prompts as u64)?;
        Ok(fault_point("marked", 0)?)
    }
}

impl Settings {
    fn path(shard: &Path) -> PathBuf {
        beside(shard, ".settings.json")
    }

    /// Whether the rows of a file were made with these settings; false where nobody has written down
    /// with which.
    ///
    /// # Errors
    /// [`Error::OtherSettings`] where they were made with others.
    pub(crate) fn check(&self, shard: &Path) -> Result<bool> {
        let path = Self::path(shard);
        let theirs = fs::read(&path).ok();
        let theirs = theirs.and_then(|bytes| serde_json::from_slice::<Value>(&bytes).ok());
        let Some(theirs) = theirs else { return Ok(false) };
        let ours = serde_json::to_value(self).map_err(Error::Exchange)?;
        let difference = difference(&theirs, &ours);
        if difference.is_empty() {
            return Ok(true);
        }
        Err(Error::OtherSettings { path: shard.to_owned(), difference })
    }
}

/// Keys with different values, as `key: theirs -> ours`.
fn difference(theirs: &Value, ours: &Value) -> String {
    let empty = Map::new();
    let [theirs, ours] = [theirs, ours].map(|value| value.as_object().unwrap_or(&empty));
    let keys: BTreeSet<&String> = theirs.keys().chain(ours.keys()).collect();
    let value = |map: &Map<String, Value>, key: &str| {
        map.get(key).map_or_else(|| "none".to_owned(), Value::to_string)
    };
    let differing = keys.into_iter().filter(|&key| theirs.get(key) != ours.get(key));
    let texts: Vec<String> = differing
        .map(|key| format!("{key}: {} -> {}", value(theirs, key), value(ours, key)))
        .collect();
    texts.join(", ")
}
