//! How far the generations in a folder are, read from their files alone.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use dromedary_files::{Lock, LockOptions};
use dromedary_records::FinishReason;
use serde::Serialize;

use crate::metrics::{Line, RowMetrics};
use crate::run_file::RunFile;
use crate::shards::{Done, RowHead, Shard, metrics_path, whole_rows};
use crate::{Error, Result};

/// Rates are those of the last ten minutes in which rows were finished.
const RECENT: u64 = 600;

/// How far one generation is: all files of one name, whatever number of groups wrote them.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct GenerationStatus {
    /// The name that its files share, such as `out/aligned`.
    pub name: PathBuf,
    /// Prompts of its input; unknown where no run has said it.
    pub prompts: Option<u64>,
    /// Prompts that have a row.
    pub rows: u64,
    /// Those of them that were rejected.
    pub rejected: u64,
    /// Rows that another file has as well.
    pub doubled: u64,
    /// Each file.
    pub files: Vec<FileStatus>,
    /// Rows a second, of all groups together; absent before the second row.
    pub rows_per_second: Option<f64>,
    /// Tokens a second, likewise.
    pub tokens_per_second: Option<f64>,
    /// Seconds to the end at this rate; absent where nobody is at work or the end is unknown.
    pub seconds_left: Option<f64>,
}

/// How far the file of one group is.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct FileStatus {
    /// The file.
    pub path: PathBuf,
    /// Its rows.
    pub rows: u64,
    /// Whether somebody writes it.
    pub state: FileState,
}

/// What becomes of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum FileState {
    /// Its run has come to its end.
    Done,
    /// A process holds it.
    Running {
        /// Who: host, process, job.
        holder: String,
    },
    /// Nobody holds it: its run was stopped or killed, or rows came behind the end.
    Stopped,
}

/// Reads how far the generations in a folder are. Nothing is changed, and a run that writes there is
/// not disturbed; a row that is just being written does not count yet.
///
/// # Errors
/// [`Error::Read`], [`Error::NoShards`] where there are no rows, [`Error::Files`] naming file and line of
/// a row that cannot be read.
pub fn status(folder: &Path) -> Result<Vec<GenerationStatus>> {
    let unread = |source| Error::Read { path: folder.to_owned(), source };
    let mut generations: BTreeMap<PathBuf, Vec<PathBuf>> = BTreeMap::new();
    for entry in fs::read_dir(folder).map_err(unread)? {
        let path = entry.map_err(unread)?.path();
        // Rows of other programs and of other steps have no such file.
        if path.extension().is_some_and(|ending| ending == "jsonl")
            && RunFile::read(&path).is_some()
        {
            generations.entry(Shard::of(&path).stem).or_default().push(path);
        }
    }
    if generations.is_empty() {
        return Err(Error::NoShards {
            pattern: folder.join("*.jsonl.run.json").display().to_string(),
        });
    }
    generations.into_iter().map(|(name, paths)| generation(name, paths)).collect()
}

fn generation(name: PathBuf, mut paths: Vec<PathBuf>) -> Result<GenerationStatus> {
    paths.sort();
    let mut ids = BTreeSet::new();
    let (mut rejected, mut doubled) = (0, 0);
    let mut files = Vec::new();
    for path in &paths {
        let mut rows = 0;
        for row in whole_rows::<RowHead>(path)? {
            let RowHead { id, finish_reason } = row?;
            rows += 1;
            if ids.insert(id) {
                rejected += u64::from(finish_reason == FinishReason::Rejected);
            } else {
                doubled += 1;
            }
        }
        files.push(FileStatus { path: path.clone(), rows, state: state(path)? });
    }
    let runs = paths.iter().filter_map(|path| RunFile::read(path));
    let last = runs.filter(|run| run.counts.is_some()).max_by_key(|run| run.started_at);
    let prompts = last.and_then(|run| run.counts).map(|counts| counts.input as u64);
    let rate = Rate::of(&paths)?;
    let rows = ids.len() as u64;
    let at_work = files.iter().any(|file| matches!(file.state, FileState::Running { .. }));
    let left = prompts.map(|prompts| prompts.saturating_sub(rows)).filter(|_| at_work);
    let rows_per_second = rate.map(|rate| rate.rows).filter(|&rate| rate > 0.0);
    Ok(GenerationStatus {
        name,
        prompts,
        rows,
        rejected,
        doubled,
        files,
        rows_per_second,
        tokens_per_second: rate.map(|rate| rate.tokens),
        seconds_left: left.zip(rows_per_second).map(|(left, rate)| left as f64 / rate),
    })
}

fn state(path: &Path) -> Result<FileState> {
    if let Some(holder) = Lock::live_holder(path, &LockOptions::from_env(false))? {
        return Ok(FileState::Running { holder: holder.to_string() });
    }
    // The hash of a file of gigabytes is the merge's to check.
    Ok(if Done::path(path).exists() { FileState::Done } else { FileState::Stopped })
}

#[derive(Clone, Copy)]
struct Rate {
    rows: f64,
    tokens: f64,
}

impl Rate {
    /// Of the last rows that the groups have finished.
    fn of(shards: &[PathBuf]) -> Result<Option<Self>> {
        let mut rows: Vec<RowMetrics> = Vec::new();
        for path in shards.iter().map(|shard| metrics_path(shard)).filter(|path| path.is_file()) {
            for line in whole_rows::<Line>(&path)? {
                if let Line::Row(row) = line? {
                    rows.push(row);
                }
            }
        }
        let Some(last) = rows.iter().map(|row| row.finished_at).max() else { return Ok(None) };
        rows.retain(|row| row.finished_at + RECENT >= last);
        let begun = |row: &RowMetrics| row.finished_at as f64 - row.seconds;
        let first = rows.iter().map(begun).fold(f64::INFINITY, f64::min);
        let first = first.max(last as f64 - RECENT as f64);
        // Times are whole seconds.
        let seconds = (last as f64 - first).max(1.0);
        let tokens: u64 = rows.iter().map(|row| u64::from(row.output_tokens)).sum();
        Ok(Some(Self { rows: rows.len() as f64 / seconds, tokens: tokens as f64 / seconds }))
    }
}

impl fmt::Display for GenerationStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} ", self.name.display(), self.rows)?;
        match self.prompts {
            Some(prompts) => {
                let percent = 100.0 * self.rows as f64 / prompts.max(1) as f64;
                write!(f, "of {prompts} rows ({percent:.1} %)")?;
            }
            None => write!(f, "rows")?,
        }
        if self.rejected > 0 {
            write!(f, ", {} of them rejected", self.rejected)?;
        }
        if self.doubled > 0 {
            write!(f, ", {} more than once", self.doubled)?;
        }
        if let (Some(rows), Some(tokens)) = (self.rows_per_second, self.tokens_per_second) {
            write!(f, ", {rows:.2} rows/s, {tokens:.0} tokens/s")?;
        }
        if let Some(seconds) = self.seconds_left {
            write!(f, ", {} left", duration(seconds))?;
        }
        for file in &self.files {
            let name = file.path.file_name().unwrap_or_default().to_string_lossy();
            write!(f, "\n  {name:<32} {:>8} rows  ", file.rows)?;
            match &file.state {
                FileState::Done => write!(f, "done")?,
                FileState::Running { holder } => write!(f, "running ({holder})")?,
                FileState::Stopped => write!(f, "stopped")?,
            }
        }
        Ok(())
    }
}

fn duration(seconds: f64) -> String {
    let minutes = (seconds / 60.0).ceil() as u64;
    match (minutes / 60, minutes % 60) {
        (0, minutes) => format!("{minutes} min"),
        (hours, minutes) => format!("{hours} h {minutes} min"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_at_a_glance() {
        assert_eq!(duration(59.0), "1 min");
        assert_eq!(duration(7260.0), "2 h 1 min");
    }
}
