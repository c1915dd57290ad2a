//! Learning rate by step.

use serde::{Deserialize, Serialize};

/// The shape of the learning rate after warm-up (`--lr-scheduler-type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum ScheduleType {
    /// Half a cosine down to 0 at the last step.
    Cosine,
    /// A straight line down to 0 at the last step.
    Linear,
    /// The full rate to the end.
    Constant,
}

/// Learning rate as a function of the optimizer step.
///
/// The numbers are those of HF transformers' `get_scheduler`: step `s` of `S` (from 0) has the
/// factor `s / W` in the first `W` steps, afterwards that of the [`ScheduleType`] at
/// `(s - W) / (S - W)`.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    /// Shape after warm-up.
    pub schedule_type: ScheduleType,
    /// Highest learning rate.
    pub learning_rate: f64,
    /// Steps `W` of linear warm-up.
    pub warmup_steps: u64,
    /// Steps `S` of the whole run.
    pub total_steps: u64,
}

impl Schedule {
    /// A schedule whose warm-up takes `ceil(warmup_ratio x total_steps)` steps.
    pub fn new(
        schedule_type: ScheduleType,
        learning_rate: f64,
        warmup_ratio: f64,
        total_steps: u64,
    ) -> Self {
        let warmup_steps = (warmup_ratio * total_steps as f64).ceil() as u64;
        Self { schedule_type, learning_rate, warmup_steps, total_steps }
    }

    /// The rate that the optimizer step number `step` (from 0) uses.
    pub fn learning_rate_at(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return self.learning_rate * step as f64 / self.warmup_steps as f64;
        }
        let decay_steps = self.total_steps.saturating_sub(self.warmup_steps).max(1);
        let progress = (step - self.warmup_steps) as f64 / decay_steps as f64;
        let factor = match self.schedule_type {
            ScheduleType::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
            ScheduleType::Linear => 1.0 - progress,
            ScheduleType::Constant => 1.0,
        };
        self.learning_rate * factor.max(0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(schedule_type: ScheduleType, steps: u64) -> Vec<f64> {
        let schedule = Schedule::new(schedule_type, 1e-3, 0.03, steps);
        (0..steps).map(|step| schedule.learning_rate_at(step)).collect()
    }

    #[test]
    fn warm_up_rounds_up_and_starts_at_zero() {
        let schedule = Schedule::new(ScheduleType::Cosine, 1e-3, 0.03, 100);
        assert_eq!(schedule.warmup_steps, 3);
        assert_eq!(schedule.learning_rate_at(0), 0.0);
        assert!((schedule.learning_rate_at(1) - 1e-3 / 3.0).abs() < 1e-12);
        assert_eq!(schedule.learning_rate_at(3), 1e-3);
    }

    #[test]
    fn cosine_and_linear_end_at_zero_and_constant_stays() {
        for (schedule_type, last) in [(ScheduleType::Cosine, 0.0), (ScheduleType::Linear, 0.0)] {
            let schedule = Schedule::new(schedule_type, 1e-3, 0.03, 100);
            assert!((schedule.learning_rate_at(100) - last).abs() < 1e-9);
        }
        assert_eq!(rates(ScheduleType::Constant, 100)[99], 1e-3);
    }

    #[test]
    fn half_way_down_the_cosine_is_half_the_rate() {
        let schedule = Schedule::new(ScheduleType::Cosine, 2.0, 0.0, 10);
        assert!((schedule.learning_rate_at(5) - 1.0).abs() < 1e-12);
    }

    #[test]
    fn the_rate_never_rises_after_warm_up() {
        for schedule_type in [ScheduleType::Cosine, ScheduleType::Linear, ScheduleType::Constant] {
            let rates = rates(schedule_type, 200);
            assert!(rates[6..].windows(2).all(|pair| pair[1] <= pair[0]));
        }
    }

    #[test]
    fn a_run_of_one_step_has_a_rate() {
        assert!(rates(ScheduleType::Cosine, 1)[0].is_finite());
    }
}
