//! What the tools that write checkpoints have in common: progress, stopping, the result of the check.

use std::{
    io::{self, Write},
    ops::ControlFlow,
};

use anyhow::Context;
use dromedary_command::{Common, Error, Progress, StopFlag};

use crate::LogitDifference;

/// A tool under way.
pub(super) struct Watched {
    tool: &'static str,
    stop: StopFlag,
    progress: Progress,
}

impl Watched {
    pub(super) fn new(tool: &'static str, common: &Common) -> anyhow::Result<Self> {
        let stop = StopFlag::install()?;
        let progress = Progress::new(None, "bytes", !common.quiet);
        Ok(Self { tool, stop, progress })
    }

    /// Runs the tool; what it is given takes the bytes of each block.
    pub(super) fn run<R>(
        &self,
        tool: impl FnOnce(&mut dyn FnMut(u64) -> ControlFlow<()>) -> crate::Result<R>,
    ) -> anyhow::Result<R> {
        let mut on_block = |bytes| {
            self.progress.inc(bytes);
            if self.stop.is_set() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let result = match tool(&mut on_block) {
            Err(crate::Error::Interrupted) => {
                let message = format!("{} stopped, nothing was written", self.tool);
                return Err(Error::stopped(message).into());
            }
            result => result.with_context(|| format!("{} failed", self.tool))?,
        };
        self.progress.finish();
        Ok(result)
    }

    /// Prints how far the logits of both sides are apart, if they were compared.
    pub(super) fn print_difference(
        &self,
        difference: Option<LogitDifference>,
    ) -> anyhow::Result<()> {
        if let Some(difference) = difference {
            writeln!(io::stdout(), "logits differ by {difference}").context("stdout")?;
        }
        Ok(())
    }
}
