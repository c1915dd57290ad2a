use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::sync::LazyLock;

use indicatif::MultiProgress;
use tracing::Level;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};

/// All bars of the process, so that log lines are written above them.
static BARS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

pub(crate) fn bars() -> &'static MultiProgress {
    &BARS
}

/// Runs `write` while the progress bars are hidden.
pub(crate) fn around_progress<T>(write: impl FnOnce() -> T) -> T {
    BARS.suspend(write)
}

/// Sends `tracing` events to stderr, with `rank=N` in each line where the world is larger than one.
///
/// `verbosity` is [`Common::verbosity`](crate::Common::verbosity): -1 warnings, 0 information,
/// 1 debug, 2 trace. Ranks other than 0 start at warnings, else every line would come as often as
/// there are ranks. `RUST_LOG` overrides it on every rank. A subscriber that is already
/// installed stays.
pub fn init_logging(rank: usize, world_size: usize, verbosity: i8) {
    let filter = EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| EnvFilter::new(level(rank, verbosity).as_str()));
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_target(verbosity > 0)
        .with_timer(Stamp { rank: (world_size > 1).then_some(rank) })
        .with_ansi(io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none())
        .with_writer(Stderr)
        .finish();
    // An embedding program's own subscriber wins.
    let _ = tracing::subscriber::set_global_default(subscriber);
}

fn level(rank: usize, verbosity: i8) -> Level {
    match verbosity {
        ..0 => Level::WARN,
        0 if rank > 0 => Level::WARN,
        0 => Level::INFO,
        1 => Level::DEBUG,
        _ => Level::TRACE,
    }
}

/// Time and rank at the head of a line: a span would reach one thread only.
struct Stamp {
    rank: Option<usize>,
}

impl FormatTime for Stamp {
    fn format_time(&self, line: &mut Writer<'_>) -> fmt::Result {
        SystemTime.format_time(line)?;
        self.rank.map_or(Ok(()), |rank| write!(line, " rank={rank}"))
    }
}

struct Stderr;

impl MakeWriter<'_> for Stderr {
    type Writer = AroundProgress;

    fn make_writer(&self) -> AroundProgress {
        AroundProgress
    }
}

struct AroundProgress;

impl Write for AroundProgress {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        around_progress(|| io::stderr().write(line))
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_ranks_warn_only_unless_asked() {
        assert_eq!(level(0, 0), Level::INFO);
        assert_eq!(level(3, 0), Level::WARN);
        assert_eq!(level(3, 1), Level::DEBUG);
        assert_eq!(level(0, -1), Level::WARN);
        assert_eq!(level(0, 9), Level::TRACE);
    }

    #[test]
    fn the_rank_stands_in_the_line() {
        let mut text = String::new();
        Stamp { rank: Some(2) }.format_time(&mut Writer::new(&mut text)).unwrap();
        assert!(text.ends_with("Z rank=2"), "{text}");
    }
}
