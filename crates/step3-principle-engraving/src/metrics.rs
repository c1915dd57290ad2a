//! What a run writes about its steps while it runs: `metrics.jsonl`, TensorBoard's events,
//! `curves.svg`.

use std::{
    fs,
    path::{Path, PathBuf},
};

use dromedary_files::{Error as FilesError, JsonlAppender, read_jsonl, write_atomic};
use serde::{Deserialize, Serialize};

use crate::{
    checkpoint, curves,
    error::{Error, Result},
    tensorboard::Events,
    trainer::StepMetrics,
};

/// Name of the file of steps; the lock of the output folder bears its name too.
pub(crate) const METRICS_FILE: &str = "metrics.jsonl";
/// Name of the drawing.
pub(crate) const CURVES_FILE: &str = "curves.svg";

/// A line of `metrics.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Line {
    #[serde(flatten)]
    pub(crate) step: StepMetrics,
    /// Loss of the held-out rows behind the step, where it was computed.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "not_finite::option")]
    pub(crate) eval_loss: Option<f64>,
}

/// The steps of a run, written as they come.
pub(crate) struct Journal {
    output_dir: PathBuf,
    file: JsonlAppender,
    events: Option<Events>,
    lines: Vec<Line>,
}

/// What becomes of metrics that are there when a run begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Older {
    /// Steps behind the one that the run goes on from are made again.
    GoOn,
    /// As [`Older::GoOn`], and the file is kept under another name: the user has gone back.
    SetAside,
}

impl Journal {
    /// Opens the metrics of a run that has `steps_done` behind it.
    ///
    /// # Errors
    /// If a file cannot be read or written.
    pub(crate) fn open(
        output_dir: &Path,
        steps_done: u64,
        tensorboard: bool,
        older: Older,
    ) -> Result<Self> {
        let path = output_dir.join(METRICS_FILE);
        let lines = lines_up_to(&path, steps_done)?;
        if older == Older::SetAside && path.exists() {
            let target = checkpoint::unused(output_dir, &format!("set-aside-{METRICS_FILE}"));
            fs::rename(&path, target).map_err(|source| Error::Io { path: path.clone(), source })?;
        }
        let mut bytes = Vec::new();
        for line in &lines {
            serde_json::to_writer(&mut bytes, line)
                .map_err(|error| Error::Io { path: path.clone(), source: error.into() })?;
            bytes.push(b'\n');
        }
        write_atomic(&path, &bytes)?;
        let file = JsonlAppender::open(&path)?.0;
        let events = match tensorboard {
            true => Some(Events::of_run(output_dir, &lines)?),
            false => None,
        };
        Ok(Self { output_dir: output_dir.to_owned(), file, events, lines })
    }

    /// Adds a step.
    ///
    /// # Errors
    /// If the disk is full.
    pub(crate) fn append(&mut self, line: Line) -> Result<()> {
        self.file.append(&line)?;
        if let Some(events) = &mut self.events {
            events.append(&line)?;
        }
        self.lines.push(line);
        Ok(())
    }

    /// Makes the steps so far durable, as must be before a checkpoint.
    ///
    /// # Errors
    /// If the disk is full.
    pub(crate) fn sync(&mut self) -> Result<()> {
        Ok(self.file.sync()?)
    }

    /// Draws the steps so far.
    ///
    /// # Errors
    /// If the disk is full.
    pub(crate) fn draw(&self) -> Result<()> {
        Ok(write_atomic(self.output_dir.join(CURVES_FILE), curves::draw(&self.lines).as_bytes())?)
    }

    /// All steps of the run, those before a resumption too.
    pub(crate) fn lines(&self) -> &[Line] {
        &self.lines
    }
}

/// Tokens in a second that a run's metrics have seen, and the steps behind the number: all but the first, in
/// which memory is touched for the first time.
///
/// # Errors
/// A file that cannot be read, or without steps.
pub(crate) fn measured_rate(path: &Path) -> Result<(f64, usize)> {
    // A run has none at its beginning; one that was named is to be there.
    fs::metadata(path).map_err(|source| Error::Io { path: path.to_owned(), source })?;
    let lines = lines_up_to(path, u64::MAX)?;
    let steps = if lines.len() > 1 { &lines[1..] } else { &lines[..] };
    let tokens: usize = steps.iter().map(|line| line.step.tokens).sum();
    let seconds: f64 = steps.iter().map(|line| line.step.seconds).sum();
    if tokens == 0 || seconds <= 0.0 {
        let message = format!("{} holds no step", path.display());
        return Err(Error::Setting { setting: "--measured", message });
    }
    Ok((tokens as f64 / seconds, steps.len()))
}

/// The lines of the steps that a run goes on from; those that a killed run made behind its last
/// checkpoint will be made again.
fn lines_up_to(path: &Path, steps_done: u64) -> Result<Vec<Line>> {
    let mut lines = Vec::new();
    if !path.exists() {
        return Ok(lines);
    }
    for line in read_jsonl::<Line>(path)? {
        match line {
            Ok((_, line)) if line.step.step <= steps_done => lines.push(line),
            // A torn line is the last of a killed run, behind its last checkpoint.
            Ok(_) | Err(FilesError::TornTail { .. }) => {}
            Err(error @ FilesError::Read { .. }) => return Err(error.into()),
            Err(error) => tracing::warn!("{error}: the line is left out"),
        }
    }
    Ok(lines)
}

/// Numbers that need not be finite: JSON writes NaN and infinity as null.
pub(crate) mod not_finite {
    use serde::{Deserialize, Deserializer, Serializer};

    pub(crate) fn serialize<S: Serializer>(value: &f64, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_f64(*value)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
        Ok(Option::<f64>::deserialize(from)?.unwrap_or(f64::NAN))
    }

    /// The same for a number that may be left out.
    pub(crate) mod option {
        use serde::{Deserializer, Serialize, Serializer};

        pub(crate) fn serialize<S: Serializer>(
            value: &Option<f64>,
            to: S,
        ) -> Result<S::Ok, S::Error> {
            value.serialize(to)
        }

        pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
            from: D,
        ) -> Result<Option<f64>, D::Error> {
            super::deserialize(from).map(Some)
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn line(step: u64, loss: f64, eval_loss: Option<f64>) -> Line {
        let step = StepMetrics {
            step,
            epoch: 0.5,
            loss,
            learning_rate: 1e-3,
            grad_norm: loss / 2.0,
            tokens: 10,
            targets: 5,
            seconds: 0.5,
            skipped: !loss.is_finite(),
            example_ids: vec![step],
        };
        Line { step, eval_loss }
    }

    fn steps(journal: &Journal) -> Vec<u64> {
        journal.lines().iter().map(|line| line.step.step).collect()
    }

    fn open(dir: &Path, steps_done: u64) -> Journal {
        Journal::open(dir, steps_done, false, Older::GoOn).unwrap()
    }

    #[test]
    fn steps_behind_the_checkpoint_are_made_again_and_others_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(METRICS_FILE);
        let mut journal = open(dir.path(), 0);
        for step in 1..=4 {
            journal.append(line(step, 2.0, (step == 2).then_some(1.5))).unwrap();
        }
        let whole = fs::read_to_string(&path).unwrap();
        fs::write(&path, format!("{whole}{{\"step\": 5, \"lo")).unwrap();
        let journal = open(dir.path(), 3);
        assert_eq!(steps(&journal), [1, 2, 3]);
        assert_eq!(journal.lines()[1].eval_loss, Some(1.5));
        let kept: Vec<&str> = whole.split_inclusive('\n').take(3).collect();
        assert_eq!(fs::read_to_string(&path).unwrap(), kept.concat());
    }

    #[test]
    fn steps_behind_a_skipped_one_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = open(dir.path(), 0);
        for (step, loss) in [(1, 2.0), (2, f64::NAN), (3, f64::INFINITY), (4, 1.0)] {
            journal.append(line(step, loss, Some(loss))).unwrap();
        }
        let journal = open(dir.path(), 4);
        assert_eq!(steps(&journal), [1, 2, 3, 4]);
        let losses: Vec<f64> = journal.lines().iter().map(|line| line.step.loss).collect();
        assert!(losses[1].is_nan() && losses[2].is_nan() && losses[3] == 1.0);
    }

    #[test]
    fn a_line_that_cannot_be_read_hides_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = open(dir.path(), 0);
        for step in 1..=3 {
            journal.append(line(step, 2.0, None)).unwrap();
        }
        let path = dir.path().join(METRICS_FILE);
        let text = fs::read_to_string(&path).unwrap().replace("\"step\":2", "\"step\":\"\"");
        fs::write(&path, text).unwrap();
        assert_eq!(steps(&open(dir.path(), 3)), [1, 3]);
    }

    #[test]
    fn metrics_of_a_run_that_was_gone_back_behind_are_set_aside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(METRICS_FILE);
        open(dir.path(), 0).append(line(1, 2.0, None)).unwrap();
        let old = fs::read(&path).unwrap();
        let journal = Journal::open(dir.path(), 0, false, Older::SetAside).unwrap();
        assert!(steps(&journal).is_empty() && fs::read(&path).unwrap().is_empty());
        assert_eq!(fs::read(dir.path().join("set-aside-metrics.jsonl")).unwrap(), old);
    }
}
