//! The file of one group: locked, continued by id, finished with a mark.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use dromedary_files::{JsonlAppender, Lock, LockOptions, read_jsonl, write_atomic};
use dromedary_records::{AlignedResponse, FinishReason};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::shards::{Done, beside, metrics_path};
use crate::{Error, Result};

/// What the text of a row depends on besides its prompt. Rows that were made with other settings
/// are not mixed into one file.
#[derive(Clone, Debug, Serialize)]
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
}

/// The rows of a group on the disk, held by this process alone.
#[derive(Debug)]
pub(crate) struct Output {
    path: PathBuf,
    rows: JsonlAppender,
    metrics: JsonlAppender,
    count: u64,
    rejected: u64,
    done: BTreeSet<String>,
    _lock: Lock,
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

/// A line of `metrics.jsonl`: what depends on how the run went and not on the row alone.
#[derive(Debug, Serialize)]
pub(crate) struct RowMetrics<'a> {
    pub(crate) id: &'a str,
    pub(crate) group_rank: usize,
    pub(crate) group_size: usize,
    pub(crate) prompt_tokens: u32,
    pub(crate) output_tokens: u32,
    pub(crate) finish_reason: FinishReason,
    pub(crate) seconds: f64,
    /// Seconds since 1970.
    pub(crate) finished_at: u64,
}

/// The last line of a run in `metrics.jsonl`.
#[derive(Debug, Serialize)]
pub(crate) struct RunMetrics {
    pub(crate) run: &'static str,
    pub(crate) rows: u64,
    /// Of these, made to begin with `--force-prefix`.
    pub(crate) forced: u64,
    pub(crate) output_tokens: u64,
    pub(crate) decode_steps: u64,
    pub(crate) prefill_seconds: f64,
    pub(crate) decode_seconds: f64,
    pub(crate) finished_at: u64,
}

/// What is read of a row that is there.
#[derive(Deserialize)]
struct RowHead {
    id: String,
    finish_reason: FinishReason,
}

impl Output {
    /// Locks a group's file, cuts a torn tail, and finds out which rows it has.
    pub(crate) fn open(path: PathBuf, settings: &Settings, break_lock: bool) -> Result<Self> {
        let lock = Lock::acquire(&path, &LockOptions::from_env(break_lock))?;
        let (rows, recovered) = JsonlAppender::open(&path)?;
        if recovered.cut_bytes > 0 {
            tracing::warn!(
                "{}: the last row was cut in the middle, {} bytes are dropped",
                path.display(),
                recovered.cut_bytes
            );
        }
        let (metrics, _) = JsonlAppender::open(metrics_path(&path))?;
        let mut output =
            Self { rows, metrics, count: 0, rejected: 0, done: BTreeSet::new(), path, _lock: lock };
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
        let path = beside(&self.path, ".settings.json");
        let encoded =
            |error: serde_json::Error| Error::Write { path: path.clone(), source: error.into() };
        let ours = serde_json::to_value(settings).map_err(encoded)?;
        let theirs: Option<Value> =
            fs::read(&path).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        match theirs {
            Some(theirs) if self.count > 0 => {
                let difference = difference(&theirs, &ours);
                if difference.is_empty() {
                    return Ok(());
                }
                Err(Error::OtherSettings { path: self.path.clone(), difference })
            }
            _ => {
                let text = serde_json::to_vec_pretty(&ours).map_err(encoded)?;
                Ok(write_atomic(&path, &text)?)
            }
        }
    }

    /// Whether the file has a row for this prompt.
    pub(crate) fn has(&self, id: &str) -> bool {
        self.done.contains(id)
    }

    /// The file is to get more rows: it is not finished any more.
    pub(crate) fn reopen(&self) -> Result<()> {
        let path = Done::path(&self.path);
        match fs::remove_file(&path) {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::Write { path, source })
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn append(&mut self, stored: &StoredRow) -> Result<()> {
        self.rows.append(stored)?;
        self.count += 1;
        self.rejected += u64::from(stored.row.finish_reason == FinishReason::Rejected);
        Ok(())
    }

    pub(crate) fn measure(&mut self, line: &impl Serialize) -> Result<()> {
        Ok(self.metrics.append(line)?)
    }

    /// Makes the rows survive whatever comes, without the mark of a finished file.
    pub(crate) fn close(mut self) -> Result<()> {
        self.rows.sync()?;
        Ok(self.metrics.sync()?)
    }

    /// Closes the file and marks it as finished.
    pub(crate) fn finish(mut self) -> Result<()> {
        self.rows.sync()?;
        self.metrics.sync()?;
        Done::write(&self.path, self.count, self.rejected)
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

pub(crate) fn seconds_since_1970() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |duration| duration.as_secs())
}
