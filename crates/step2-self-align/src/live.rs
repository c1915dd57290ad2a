//! How a run goes, while it goes: counted at each step, shown on rank 0, kept in `metrics.jsonl`.

use std::cell::Cell;
use std::time::{Duration, Instant};

use dromedary_command::Progress;

use crate::metrics::{Beat, Follower, Line, seconds_since_1970};

/// Beats come every second at first, so that a short run has some, and later less often.
const EARLY: Duration = Duration::from_secs(60);
const EARLY_BEAT: Duration = Duration::from_secs(1);
const BEAT: Duration = Duration::from_secs(10);

/// What the engine's steps and the rows tell each other.
#[derive(Debug, Default)]
pub(crate) struct Pulse {
    /// Rows under way.
    pub(crate) in_use: Cell<usize>,
    /// The group has agreed to stop.
    pub(crate) stop: Cell<bool>,
    /// A row could not be written: the job is to end.
    pub(crate) failed: Cell<bool>,
    steps: Cell<u64>,
    /// Rows under way, summed over the steps.
    busy: Cell<u64>,
}

impl Pulse {
    /// To be called once a step.
    pub(crate) fn step(&self) {
        self.steps.set(self.steps.get() + 1);
        self.busy.set(self.busy.get() + self.in_use.get() as u64);
    }
}

/// The counts of a moment.
#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    rows: u64,
    tokens: u64,
    steps: u64,
    busy: u64,
}

/// Shows a run's state and makes its beats.
pub(crate) struct Live<'a> {
    pulse: &'a Pulse,
    progress: Progress,
    slots: usize,
    begun: Instant,
    beaten: Instant,
    counts: Counts,
    last: Counts,
    /// The files of the job's other groups, where they are shown here.
    others: Vec<Follower>,
    /// Groups that the rate is of.
    groups: usize,
}

impl<'a> Live<'a> {
    /// `slots` of this group; `others` are the metrics of the groups that `progress` shows too.
    pub(crate) fn new(
        pulse: &'a Pulse,
        progress: Progress,
        slots: usize,
        others: Vec<Follower>,
    ) -> Self {
        let now = Instant::now();
        Self {
            pulse,
            progress,
            slots,
            begun: now,
            beaten: now,
            counts: Counts::default(),
            last: Counts::default(),
            groups: others.len() + 1,
            others,
        }
    }

    /// A row has ended.
    pub(crate) fn row(&mut self) {
        self.counts.rows += 1;
        self.progress.inc(1);
    }

    /// So many more tokens were generated.
    pub(crate) fn tokens(&mut self, tokens: u64) {
        self.counts.tokens += tokens;
    }

    /// So many of the generated tokens are of no row any more.
    pub(crate) fn discard(&mut self, tokens: u64) {
        self.counts.tokens = self.counts.tokens.saturating_sub(tokens);
    }

    /// The next beat, where it is time for one.
    pub(crate) fn due(&mut self) -> Option<Beat> {
        let every = if self.begun.elapsed() < EARLY { EARLY_BEAT } else { BEAT };
        (self.beaten.elapsed() >= every).then(|| self.beat())
    }

    /// The beat of now.
    pub(crate) fn beat(&mut self) -> Beat {
        let seconds = self.beaten.elapsed().as_secs_f64();
        self.beaten = Instant::now();
        let Pulse { steps, busy, .. } = self.pulse;
        self.counts.steps = steps.get();
        self.counts.busy = busy.get();
        let steps = self.counts.steps - self.last.steps;
        let beat = Beat {
            beat: self.begun.elapsed().as_secs_f64(),
            seconds,
            rows: self.counts.rows - self.last.rows,
            // Those of earlier beats may have been discarded, and are made up for by later ones.
            tokens: self.counts.tokens.saturating_sub(self.last.tokens),
            slots_in_use: (self.counts.busy - self.last.busy) as f64 / steps.max(1) as f64,
            slots: self.slots,
            at: seconds_since_1970(),
        };
        let told = self.counts.tokens.max(self.last.tokens);
        self.last = Counts { tokens: told, ..self.counts };
        self.show(&beat);
        beat
    }

    fn show(&mut self, beat: &Beat) {
        let mut tokens = beat.tokens;
        for line in self.others.iter_mut().flat_map(Follower::lines) {
            match line {
                Line::Row(_) => self.progress.inc(1),
                Line::Beat(other) => tokens += other.tokens,
                Line::Run(_) | Line::Unknown(_) => {}
            }
        }
        self.progress.message(self.state(beat, tokens));
    }

    /// What stands behind the rows that are done: `tokens` are those of all groups.
    fn state(&self, beat: &Beat, tokens: u64) -> String {
        let rate = tokens as f64 / beat.seconds.max(f64::MIN_POSITIVE);
        let of =
            if self.groups > 1 { format!(" in {} groups", self.groups) } else { String::new() };
        let (in_use, slots) = (beat.slots_in_use, self.slots);
        format!("{rate:.0} tokens/s{of}, {in_use:.1} of {slots} slots")
    }

    /// The last beat, behind which nothing is shown any more.
    pub(crate) fn end(&mut self) -> Beat {
        let beat = self.beat();
        self.progress.finish();
        beat
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_beat_has_what_happened_since_the_last_one() {
        let pulse = Pulse::default();
        let mut live = Live::new(&pulse, Progress::new(None, "rows", false), 4, Vec::new());
        for in_use in [4, 2] {
            pulse.in_use.set(in_use);
            pulse.step();
        }
        live.tokens(6);
        live.row();
        let beat = live.beat();
        assert_eq!((beat.rows, beat.tokens, beat.slots_in_use, beat.slots), (1, 6, 3.0, 4));
        live.tokens(1);
        pulse.step();
        let beat = live.beat();
        assert_eq!((beat.rows, beat.tokens, beat.slots_in_use), (0, 1, 2.0));
        // Of the seven, five were of a row that failed.
        live.discard(5);
        assert_eq!(live.beat().tokens, 0);
        live.tokens(8);
        assert_eq!(live.end().tokens, 3);
    }

    #[test]
    fn rank_0_shows_the_rate_of_all_groups_and_its_own_slots() {
        let pulse = Pulse::default();
        let beat = Beat {
            beat: 4.0,
            seconds: 2.0,
            rows: 1,
            tokens: 60,
            slots_in_use: 3.25,
            slots: 4,
            at: 0,
        };
        let live = |others| Live::new(&pulse, Progress::new(None, "rows", false), 4, others);
        assert_eq!(live(Vec::new()).state(&beat, 60), "30 tokens/s, 3.2 of 4 slots");
        let other = Follower::at_end("metrics_2shards_1.jsonl".into());
        let state = live(vec![other]).state(&beat, 150);
        assert_eq!(state, "75 tokens/s in 2 groups, 3.2 of 4 slots");
    }
}
