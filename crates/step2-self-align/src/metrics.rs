//! The lines of `metrics.jsonl`: what depends on how a run went and not on its rows alone.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use dromedary_records::FinishReason;
use serde::{Deserialize, Serialize};

/// A line of `metrics.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum Line {
    Row(RowMetrics),
    Beat(Beat),
    Run(RunMetrics),
    /// Of a later version.
    Unknown(serde_json::Value),
}

/// How a row went.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct RowMetrics {
    pub(crate) id: String,
    pub(crate) group_rank: usize,
    pub(crate) group_size: usize,
    /// The lowest number that no other row under way had when the row was admitted; none where it
    /// was not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) slot: Option<usize>,
    pub(crate) prompt_tokens: u32,
    pub(crate) output_tokens: u32,
    pub(crate) finish_reason: FinishReason,
    /// From admission to the end.
    pub(crate) seconds: f64,
    /// Seconds since 1970.
    pub(crate) finished_at: u64,
}

/// What happened since the last beat.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Beat {
    /// Seconds since the run began.
    pub(crate) beat: f64,
    /// Since the last beat.
    pub(crate) seconds: f64,
    pub(crate) rows: u64,
    pub(crate) tokens: u64,
    /// Slots that had a row, on average over the steps.
    pub(crate) slots_in_use: f64,
    pub(crate) slots: usize,
    /// Seconds since 1970.
    pub(crate) at: u64,
}

/// The last line of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct RunMetrics {
    /// `finished` or `stopped`.
    pub(crate) run: String,
    pub(crate) rows: u64,
    /// Of these, made to begin with `--force-prefix`.
    pub(crate) forced: u64,
    pub(crate) output_tokens: u64,
    pub(crate) decode_steps: u64,
    pub(crate) prefill_seconds: f64,
    pub(crate) decode_seconds: f64,
    /// Seconds since 1970.
    pub(crate) finished_at: u64,
}

pub(crate) fn seconds_since_1970() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |duration| duration.as_secs())
}

/// Reads what others append to a file of metrics, from its present end on.
#[derive(Debug)]
pub(crate) struct Follower {
    path: PathBuf,
    read: u64,
}

impl Follower {
    pub(crate) fn at_end(path: PathBuf) -> Self {
        let read = std::fs::metadata(&path).map_or(0, |metadata| metadata.len());
        Self { path, read }
    }

    /// The lines since the last call. What cannot be read now is read the next time: they are for
    /// show alone.
    pub(crate) fn lines(&mut self) -> Vec<Line> {
        let mut bytes = Vec::new();
        let read = File::open(&self.path).and_then(|mut file| {
            file.seek(SeekFrom::Start(self.read))?;
            file.read_to_end(&mut bytes)
        });
        let whole = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |last| last + 1);
        if read.is_err() {
            return Vec::new();
        }
        self.read += whole as u64;
        let lines = bytes[..whole].split(|&byte| byte == b'\n');
        lines.filter_map(|line| serde_json::from_slice(line).ok()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_follower_reads_whole_lines_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut follower = Follower::at_end(path.clone());
        assert!(follower.lines().is_empty());
        let beat = Beat {
            beat: 1.5,
            seconds: 1.5,
            rows: 2,
            tokens: 30,
            slots_in_use: 3.5,
            slots: 4,
            at: 7,
        };
        let text = serde_json::to_string(&beat).unwrap();
        fs::write(&path, format!("{text}\n{{\"new\":1}}\n{text}")).unwrap();
        let lines = follower.lines();
        assert!(matches!(&lines[..], [Line::Beat(one), Line::Unknown(_)] if *one == beat));
        fs::write(&path, format!("{text}\n{{\"new\":1}}\n{text}\n")).unwrap();
        assert_eq!(follower.lines(), [Line::Beat(beat)]);
        assert!(follower.lines().is_empty());
    }
}
