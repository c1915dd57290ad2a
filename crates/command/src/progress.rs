use std::borrow::Cow;
use std::fmt::Write;
use std::io::{self, IsTerminal};
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use indicatif::{HumanDuration, ProgressBar, ProgressState, ProgressStyle};

use crate::grouped;

/// How often a plain line is logged where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(10);
const TICK: Duration = Duration::from_millis(200);

/// How far a stage is: a bar on a terminal, else a line in the log every ten seconds.
///
/// Shared by reference between threads. Dropped or [finished](Progress::finish), the bar
/// disappears.
pub struct Progress {
    display: Display,
}

enum Display {
    Hidden,
    Bar(ProgressBar),
    Lines(Mutex<Lines>),
}

struct Lines {
    total: Option<u64>,
    unit: &'static str,
    done: u64,
    begun_at: u64,
    message: Cow<'static, str>,
    start: Instant,
    last: Instant,
}

impl Progress {
    /// Starts at zero; without a `total` the rate alone is shown.
    ///
    /// `unit` is a plural noun ("rows"); only rank 0 of a run that is not quiet is `visible`.
    pub fn new(total: Option<u64>, unit: &'static str, visible: bool) -> Progress {
        let display = match (visible, io::stderr().is_terminal()) {
            (false, _) => Display::Hidden,
            (true, true) => Display::Bar(bar(total, unit)),
            (true, false) => Display::Lines(Mutex::new(Lines::new(total, unit))),
        };
        Progress { display }
    }

    /// `n` were done by an earlier run: they count, but not for the rate.
    pub fn begin_at(&self, n: u64) {
        match &self.display {
            Display::Hidden => {}
            Display::Bar(bar) => {
                bar.set_position(n);
                bar.reset_eta();
            }
            Display::Lines(lines) => {
                let mut lines = lines.lock().unwrap_or_else(PoisonError::into_inner);
                (lines.done, lines.begun_at) = (n, n);
            }
        }
    }

    /// `n` more are done.
    pub fn inc(&self, n: u64) {
        match &self.display {
            Display::Hidden => {}
            Display::Bar(bar) => bar.inc(n),
            Display::Lines(lines) => {
                let mut lines = lines.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(line) = lines.inc(n, Instant::now()) {
                    tracing::info!("{line}");
                }
            }
        }
    }

    /// The total is known, or estimated better than before.
    pub fn set_total(&self, total: u64) {
        match &self.display {
            Display::Hidden => {}
            Display::Bar(bar) => {
                if bar.length().is_none() {
                    set_style(bar, WITH_TOTAL);
                }
                bar.set_length(total);
            }
            Display::Lines(lines) => {
                lines.lock().unwrap_or_else(PoisonError::into_inner).total = Some(total);
            }
        }
    }

    /// A short remark behind the numbers, such as the last loss.
    pub fn message(&self, message: impl Into<Cow<'static, str>>) {
        match &self.display {
            Display::Hidden => {}
            Display::Bar(bar) => bar.set_message(message),
            Display::Lines(lines) => {
                lines.lock().unwrap_or_else(PoisonError::into_inner).message = message.into();
            }
        }
    }

    /// Removes the bar, or logs the final count.
    pub fn finish(&self) {
        match &self.display {
            Display::Hidden => {}
            Display::Bar(bar) => bar.finish_and_clear(),
            Display::Lines(lines) => {
                let lines = lines.lock().unwrap_or_else(PoisonError::into_inner);
                tracing::info!("{}", lines.line(Instant::now()));
            }
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Display::Bar(bar) = &self.display {
            bar.finish_and_clear();
        }
    }
}

const WITH_TOTAL: &str =
    "{wide_bar} {human_pos}/{human_len} {prefix} {rate} {prefix}/s eta {eta} {msg}";
const WITHOUT_TOTAL: &str = "{spinner} {human_pos} {prefix} {rate} {prefix}/s {elapsed} {msg}";

fn set_style(bar: &ProgressBar, template: &str) {
    let rate = |state: &ProgressState, text: &mut dyn Write| {
        // A text that cannot be written is not drawn.
        let _ = text.write_str(&rate_text(state.per_sec()));
    };
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.with_key("rate", rate));
    }
}

/// Two decimals tell slow things apart, and none are read of fast ones.
fn rate_text(rate: f64) -> String {
    if rate < 100.0 { format!("{rate:.2}") } else { grouped(rate as u64) }
}

fn bar(total: Option<u64>, unit: &'static str) -> ProgressBar {
    let bar =
        crate::logging::bars().add(total.map_or_else(ProgressBar::no_length, ProgressBar::new));
    bar.set_prefix(unit);
    set_style(&bar, if total.is_some() { WITH_TOTAL } else { WITHOUT_TOTAL });
    bar.enable_steady_tick(TICK);
    bar
}

impl Lines {
    fn new(total: Option<u64>, unit: &'static str) -> Lines {
        let now = Instant::now();
        let message = Cow::Borrowed("");
        Lines { total, unit, done: 0, begun_at: 0, message, start: now, last: now }
    }

    /// The line to log, where it is time for one.
    fn inc(&mut self, n: u64, now: Instant) -> Option<String> {
        self.done += n;
        if now.duration_since(self.last) < LINE_EVERY {
            return None;
        }
        self.last = now;
        Some(self.line(now))
    }

    fn line(&self, now: Instant) -> String {
        let seconds = now.duration_since(self.start).as_secs_f64();
        let own = (self.done - self.begun_at) as f64;
        let rate = if seconds > 0.0 { own / seconds } else { 0.0 };
        let (done, unit, rate_text) = (grouped(self.done), self.unit, rate_text(rate));
        let mut line = match self.total.map(grouped) {
            Some(total) => format!("{done}/{total} {unit}, {rate_text} {unit}/s"),
            None => format!("{done} {unit}, {rate_text} {unit}/s"),
        };
        if let Some(left) = self.seconds_left(rate) {
            line += &format!(", {} left", HumanDuration(Duration::from_secs(left)));
        }
        if !self.message.is_empty() {
            line += ", ";
            line += &self.message;
        }
        line
    }

    fn seconds_left(&self, rate: f64) -> Option<u64> {
        let left = self.total?.checked_sub(self.done).filter(|&left| left > 0)?;
        // The cast saturates, so a rate near zero is no overflow.
        (rate > 0.0).then(|| (left as f64 / rate) as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(lines: &Lines, seconds: u64) -> Instant {
        lines.start + Duration::from_secs(seconds)
    }

    #[test]
    fn a_line_comes_every_ten_seconds() {
        let mut lines = Lines::new(Some(40), "rows");
        let early = at(&lines, 9);
        assert_eq!(lines.inc(9, early), None);
        let due = at(&lines, 10);
        assert_eq!(lines.inc(1, due).unwrap(), "10/40 rows, 1.00 rows/s, 30 seconds left");
        let soon = at(&lines, 11);
        assert_eq!(lines.inc(1, soon), None);
    }

    #[test]
    fn what_an_earlier_run_did_does_not_make_this_one_faster() {
        let progress =
            Progress { display: Display::Lines(Mutex::new(Lines::new(Some(100), "steps"))) };
        progress.begin_at(80);
        let Display::Lines(lines) = &progress.display else { panic!("lines were asked for") };
        let mut lines = lines.lock().unwrap();
        let due = at(&lines, 10);
        let line = lines.inc(5, due).unwrap();
        assert_eq!(line, "85/100 steps, 0.50 steps/s, 30 seconds left");
    }

    #[test]
    fn without_a_total_the_rate_alone_is_shown() {
        let mut lines = Lines::new(None, "steps");
        lines.message = "loss 1.5".into();
        let due = at(&lines, 20);
        assert_eq!(lines.inc(5, due).unwrap(), "5 steps, 0.25 steps/s, loss 1.5");
    }

    #[test]
    fn a_total_that_comes_later_gives_the_time_left() {
        let progress = Progress { display: Display::Lines(Mutex::new(Lines::new(None, "rows"))) };
        progress.set_total(30);
        let Display::Lines(lines) = &progress.display else { panic!("lines were asked for") };
        let mut lines = lines.lock().unwrap();
        let due = at(&lines, 10);
        assert_eq!(lines.inc(10, due).unwrap(), "10/30 rows, 1.00 rows/s, 20 seconds left");
    }

    #[test]
    fn more_than_the_total_does_no_harm() {
        let mut lines = Lines::new(Some(1), "rows");
        let due = at(&lines, 10);
        assert_eq!(lines.inc(2, due).unwrap(), "2/1 rows, 0.20 rows/s");
    }

    #[test]
    fn large_numbers_are_written_for_people() {
        let mut lines = Lines::new(Some(1_500_000), "rows");
        let due = at(&lines, 10);
        let line = lines.inc(1_234_567, due).unwrap();
        assert_eq!(line, "1,234,567/1,500,000 rows, 123,456 rows/s, 2 seconds left");
    }

    #[test]
    fn hidden_progress_counts_nothing() {
        let progress = Progress::new(Some(3), "rows", false);
        progress.inc(1);
        progress.message("x");
        progress.finish();
        assert!(matches!(progress.display, Display::Hidden));
    }
}
