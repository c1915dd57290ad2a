//! Scalars for TensorBoard, under the names that HF's `Trainer` gives them.

use std::{
    fs::{self, File},
    io::{self, BufWriter},
    path::{Path, PathBuf},
};

use syntaxdot_summary::SummaryWriter;

use crate::{
    error::{Error, Result},
    metrics::Line,
};

/// Name of the folder of event files.
const DIR: &str = "tensorboard";

/// The event file of this process.
///
/// It begins with the steps that the run goes on from, and takes the place of the files of earlier
/// processes: these may hold steps that are made again. Wall times of such steps are those of the
/// resumption.
pub(crate) struct Events {
    path: PathBuf,
    writer: SummaryWriter<BufWriter<File>>,
}

impl Events {
    /// Begins a file with `lines`.
    ///
    /// # Errors
    /// If the folder cannot be written to.
    pub(crate) fn of_run(output_dir: &Path, lines: &[Line]) -> Result<Self> {
        let path = output_dir.join(DIR);
        let io = |source| Error::Io { path: path.clone(), source };
        fs::create_dir_all(&path).map_err(io)?;
        let older = event_files(&path).map_err(io)?;
        let writer = SummaryWriter::from_prefix(path.join("events")).map_err(io)?;
        let mut events = Self { path: path.clone(), writer };
        for line in lines {
            events.append(line)?;
        }
        for file in older {
            fs::remove_file(file).map_err(io)?;
        }
        Ok(events)
    }

    /// Adds a step, visible to TensorBoard at once.
    ///
    /// # Errors
    /// If the disk is full.
    pub(crate) fn append(&mut self, line: &Line) -> Result<()> {
        self.write(line).map_err(|source| Error::Io { path: self.path.clone(), source })
    }

    fn write(&mut self, Line { step: metrics, eval_loss }: &Line) -> io::Result<()> {
        let scalars = [
            ("train/loss", metrics.loss),
            ("train/learning_rate", metrics.learning_rate),
            ("train/grad_norm", metrics.grad_norm),
            ("train/epoch", metrics.epoch),
            ("train/tokens_per_second", metrics.tokens_per_second()),
        ];
        let eval_loss = eval_loss.map(|loss| ("eval/loss", loss));
        for (tag, value) in scalars.into_iter().chain(eval_loss) {
            self.writer.write_scalar(tag, metrics.step as i64, value as f32)?;
        }
        Ok(())
    }
}

fn event_files(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let is_of_events = |path: &PathBuf| {
        path.file_name().is_some_and(|name| name.to_string_lossy().contains(".tfevents."))
    };
    let paths =
        fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
    Ok(paths.into_iter().filter(is_of_events).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::tests::line;

    /// How often the file names a scalar; what it says is read back by TensorBoard itself, in
    /// `cargo xtask parity`.
    fn count(dir: &Path, tag: &str) -> usize {
        let files = event_files(&dir.join(DIR)).unwrap();
        assert_eq!(files.len(), 1, "{files:?}");
        let bytes = fs::read(&files[0]).unwrap();
        bytes.windows(tag.len()).filter(|window| *window == tag.as_bytes()).count()
    }

    #[test]
    fn a_resumed_run_has_each_step_once() {
        let dir = tempfile::tempdir().unwrap();
        let lines: Vec<_> =
            (1..=4).map(|step| line(step, 1.0, (step == 2).then_some(3.0))).collect();
        let mut events = Events::of_run(dir.path(), &[]).unwrap();
        lines.iter().for_each(|line| events.append(line).unwrap());
        assert_eq!((count(dir.path(), "train/loss"), count(dir.path(), "eval/loss")), (4, 1));
        let mut events = Events::of_run(dir.path(), &lines[..3]).unwrap();
        events.append(&lines[3]).unwrap();
        assert_eq!((count(dir.path(), "train/loss"), count(dir.path(), "eval/loss")), (4, 1));
    }
}
