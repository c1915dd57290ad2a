//! Learning rate by step.

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The shape of the learning rate after warm-up (`--lr-scheduler-type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum ScheduleType {
    /// Half a cosine down to 0 at the last step.
    Cosine,
    /// A straight line down to 0 at the last step.
    Linear,
    /// The full rate to the end.
    #[value(alias = "constant_with_warmup")]
    #[serde(alias = "constant_with_warmup")]
    Constant,
    /// Warm-up, stable, decay: the full rate, and half a cosine down to 0 over the last steps.
    #[value(alias = "warmup_stable_decay")]
    #[serde(alias = "warmup_stable_decay")]
    Wsd,
}

/// A part of a run, in steps or as a share of all.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Span {
    /// A share, rounded up to whole steps.
    Ratio(f64),
    /// So many steps, whatever the run's length.
    Steps(u64),
}

impl Span {
    fn steps_of(self, total_steps: u64) -> u64 {
        match self {
            Self::Ratio(ratio) => (ratio * total_steps as f64).ceil() as u64,
            Self::Steps(steps) => steps,
        }
    }
}

/// A [`Schedule`] whose number of steps is not known yet.
#[derive(Clone, Debug, PartialEq)]
pub struct ScheduleConfig {
    /// Shape after warm-up.
    pub schedule_type: ScheduleType,
    /// Highest learning rate.
    pub learning_rate: f64,
    /// Linear warm-up from 0.
    pub warmup: Span,
    /// The last part of [`ScheduleType::Wsd`]; the others have none.
    pub decay: Span,
}

impl ScheduleConfig {
    /// The schedule of a run of `total_steps`.
    ///
    /// # Errors
    /// [`Error::Setting`] where warm-up and decay are longer than the run.
    pub fn over(&self, total_steps: u64) -> Result<Schedule> {
        let schedule = self.unchecked(total_steps);
        let Schedule { warmup_steps, decay_steps, .. } = schedule;
        if warmup_steps.saturating_add(decay_steps) > total_steps {
            return Err(Error::Setting {
                setting: "--warmup-steps",
                message: format!(
                    "warm-up over {warmup_steps} and decay over {decay_steps} steps do not fit into \
                     {total_steps} steps"
                ),
            });
        }
        Ok(schedule)
    }

    fn unchecked(&self, total_steps: u64) -> Schedule {
        let Self { schedule_type, learning_rate, .. } = *self;
        let warmup_steps = self.warmup.steps_of(total_steps);
        let left = total_steps.saturating_sub(warmup_steps);
        let decay_steps = match (schedule_type, self.decay) {
            (ScheduleType::Wsd, Span::Steps(steps)) => steps,
            // Both shares are rounded up: in a short run they may be a step more than there are.
            (ScheduleType::Wsd, ratio @ Span::Ratio(_)) => ratio.steps_of(total_steps).min(left),
            _ => 0,
        };
        Schedule { schedule_type, learning_rate, warmup_steps, decay_steps, total_steps }
    }
}

/// Learning rate as a function of the optimizer step.
///
/// The numbers are those of HF transformers' `get_scheduler`: step `s` of `S` (from 0) has the
/// factor `s / W` in the first `W` steps, afterwards that of the [`ScheduleType`] at
/// `(s - W) / (S - W)`; for [`ScheduleType::Wsd`] it is 1 up to the last `D` steps and half a cosine
/// over these.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    /// Shape after warm-up.
    pub schedule_type: ScheduleType,
    /// Highest learning rate.
    pub learning_rate: f64,
    /// Steps `W` of linear warm-up.
    pub warmup_steps: u64,
    /// Steps `D` of the decay at the end; 0 for all shapes but [`ScheduleType::Wsd`].
    pub decay_steps: u64,
    /// Steps `S` of the whole run.
    pub total_steps: u64,
}

impl Schedule {
    /// The share of the steps that [`ScheduleType::Wsd`] decays over where nothing else is said.
    pub const DECAY_RATIO: f64 = 0.1;

    /// A schedule whose warm-up takes `ceil(warmup_ratio x total_steps)` steps.
    pub fn new(
        schedule_type: ScheduleType,
        learning_rate: f64,
        warmup_ratio: f64,
        total_steps: u64,
    ) -> Self {
        let (warmup, decay) = (Span::Ratio(warmup_ratio), Span::Ratio(Self::DECAY_RATIO));
        ScheduleConfig { schedule_type, learning_rate, warmup, decay }.unchecked(total_steps)
    }

    /// The rate that the optimizer step number `step` (from 0) uses.
    pub fn learning_rate_at(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return self.learning_rate * step as f64 / self.warmup_steps as f64;
        }
        let progress = |start: u64| {
            let length = self.total_steps.saturating_sub(start).max(1);
            step.saturating_sub(start) as f64 / length as f64
        };
        let half_cosine = |progress: f64| 0.5 * (1.0 + (PI * progress).cos());
        let factor = match self.schedule_type {
            ScheduleType::Cosine => half_cosine(progress(self.warmup_steps)),
            ScheduleType::Linear => 1.0 - progress(self.warmup_steps),
            ScheduleType::Constant => 1.0,
            ScheduleType::Wsd if self.decay_steps == 0 => 1.0,
            ScheduleType::Wsd => half_cosine(progress(self.total_steps - self.decay_steps)),
        };
        self.learning_rate * factor.max(0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [ScheduleType; 4] =
        [ScheduleType::Cosine, ScheduleType::Linear, ScheduleType::Constant, ScheduleType::Wsd];

    fn rates(schedule_type: ScheduleType, steps: u64) -> Vec<f64> {
        let schedule = Schedule::new(schedule_type, 1e-3, 0.03, steps);
        (0..steps).map(|step| schedule.learning_rate_at(step)).collect()
    }

    fn wsd(warmup: Span, decay: Span) -> ScheduleConfig {
        ScheduleConfig { schedule_type: ScheduleType::Wsd, learning_rate: 2.0, warmup, decay }
    }

    #[derive(Deserialize)]
    struct Golden {
        schedule_type: ScheduleType,
        warmup_steps: u64,
        decay_steps: u64,
        learning_rate: f64,
        rates: Vec<f64>,
    }

    #[test]
    fn every_shape_has_the_rates_of_transformers() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/schedules.json");
        let goldens: Vec<Golden> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        assert!(ALL.iter().all(|shape| goldens.iter().any(|of| of.schedule_type == *shape)));
        for golden in goldens {
            let config = ScheduleConfig {
                schedule_type: golden.schedule_type,
                learning_rate: golden.learning_rate,
                warmup: Span::Steps(golden.warmup_steps),
                decay: Span::Steps(golden.decay_steps),
            };
            let schedule = config.over(golden.rates.len() as u64).unwrap();
            for (step, want) in golden.rates.iter().enumerate() {
                let got = schedule.learning_rate_at(step as u64);
                let name = format!("{schedule:?} at {step}: {got}, not {want}");
                assert!((got - want).abs() <= 1e-12 * golden.learning_rate, "{name}");
            }
        }
    }

    #[test]
    fn warm_up_rounds_up_and_starts_at_zero() {
        let schedule = Schedule::new(ScheduleType::Cosine, 1e-3, 0.03, 100);
        assert_eq!(schedule.warmup_steps, 3);
        assert_eq!(schedule.learning_rate_at(0), 0.0);
        assert!((schedule.learning_rate_at(1) - 1e-3 / 3.0).abs() < 1e-12);
        assert_eq!(schedule.learning_rate_at(3), 1e-3);
        let in_steps = ScheduleConfig {
            schedule_type: ScheduleType::Cosine,
            learning_rate: 1e-3,
            warmup: Span::Steps(3),
            decay: Span::Ratio(0.1),
        };
        assert_eq!(in_steps.over(100).unwrap(), schedule);
    }

    #[test]
    fn all_shapes_but_the_constant_one_end_at_zero() {
        for schedule_type in [ScheduleType::Cosine, ScheduleType::Linear, ScheduleType::Wsd] {
            let schedule = Schedule::new(schedule_type, 1e-3, 0.03, 100);
            assert!(schedule.learning_rate_at(100).abs() < 1e-9, "{schedule_type:?}");
        }
        assert_eq!(rates(ScheduleType::Constant, 100)[99], 1e-3);
    }

    #[test]
    fn half_way_down_the_cosine_is_half_the_rate() {
        let schedule = Schedule::new(ScheduleType::Cosine, 2.0, 0.0, 10);
        assert!((schedule.learning_rate_at(5) - 1.0).abs() < 1e-12);
        let schedule = wsd(Span::Steps(0), Span::Steps(4)).over(10).unwrap();
        assert_eq!(schedule.learning_rate_at(6), 2.0);
        assert!((schedule.learning_rate_at(8) - 1.0).abs() < 1e-12);
    }

    #[test]
    fn the_rate_never_rises_after_warm_up() {
        for schedule_type in ALL {
            let rates = rates(schedule_type, 200);
            assert!(rates[6..].windows(2).all(|pair| pair[1] <= pair[0]));
        }
    }

    #[test]
    fn spans_that_do_not_fit_are_refused_with_their_numbers() {
        let error = wsd(Span::Steps(15), Span::Steps(6)).over(20).unwrap_err().to_string();
        assert!(["15", "6", "20"].iter().all(|number| error.contains(number)), "{error}");
        wsd(Span::Steps(14), Span::Steps(6)).over(20).unwrap();
        wsd(Span::Ratio(0.9), Span::Ratio(0.9)).over(20).unwrap();
    }

    #[test]
    fn a_run_of_one_step_has_a_rate() {
        for schedule_type in ALL {
            assert!(rates(schedule_type, 1)[0].is_finite());
        }
    }
}
