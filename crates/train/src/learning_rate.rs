//! The learning rate as a function of the optimiser step.

use std::f64::consts::PI;

use crate::recipe::{Recipe, Schedule};

/// torch's defaults of `ConstantLR`: this many steps at a third of the rate.
const REDUCED_STEPS: u64 = 5;

/// Linear warm-up, then a schedule.
#[derive(Clone, Copy, Debug)]
pub struct LearningRate {
    peak: f64,
    /// What a falling schedule falls to.
    end: f64,
    warmup_steps: u64,
    total_steps: u64,
    schedule: Schedule,
}

impl LearningRate {
    /// The course a recipe asks for over `total_steps` optimiser steps.
    pub fn new(recipe: &Recipe, total_steps: u64) -> Self {
        Self {
            peak: recipe.learning_rate,
            end: recipe.lr_end,
            warmup_steps: recipe.warmup_steps,
            total_steps,
            schedule: recipe.lr_schedule,
        }
    }

    /// The rate of optimiser step `step`, counted from 0.
    ///
    /// The warm-up's first step has 1 / warmup_steps of the peak (not zero, which would waste it); a falling schedule
    /// would reach its end one step after the last.
    pub fn at(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return self.peak * (step + 1) as f64 / self.warmup_steps as f64;
        }
        let falling_steps = self.total_steps.saturating_sub(self.warmup_steps).max(1);
        let progress = ((step - self.warmup_steps) as f64 / falling_steps as f64).min(1.0);
        let falling = |share: f64| self.end + (self.peak - self.end) * share;
        match self.schedule {
            Schedule::Constant => self.peak,
            Schedule::ConstantLr if step < self.warmup_steps + REDUCED_STEPS => self.peak * (1.0 / 3.0),
            Schedule::ConstantLr => self.peak,
            Schedule::Linear => falling(1.0 - progress),
            Schedule::Cosine => falling(0.5 * (1.0 + (PI * progress).cos())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(schedule: Schedule) -> Vec<f64> {
        let rate = LearningRate { peak: 2.0, end: 0.0, warmup_steps: 2, total_steps: 6, schedule };
        (0..6).map(|step| rate.at(step)).collect()
    }

    #[track_caller]
    fn assert_rates(schedule: Schedule, expected: [f64; 6]) {
        for (found, expected) in rates(schedule).into_iter().zip(expected) {
            assert!((found - expected).abs() < 1e-12, "found {found}, expected {expected}");
        }
    }

    #[test]
    fn warm_up_rises_in_equal_parts_to_a_constant() {
        assert_rates(Schedule::Constant, [1.0, 2.0, 2.0, 2.0, 2.0, 2.0]);
    }

    #[test]
    fn a_line_falls_in_equal_parts() {
        assert_rates(Schedule::Linear, [1.0, 2.0, 2.0, 1.5, 1.0, 0.5]);
    }

    #[test]
    fn a_cosine_is_half_way_down_in_the_middle() {
        let quarter = 1.0 + std::f64::consts::FRAC_1_SQRT_2;
        assert_rates(Schedule::Cosine, [1.0, 2.0, 2.0, quarter, 1.0, 2.0 - quarter]);
    }

    /// A quarter and a half of the way from 2 down to 1.
    #[test]
    fn falling_schedules_end_where_they_are_told_to() {
        let at = |schedule, step| {
            LearningRate { peak: 2.0, end: 1.0, warmup_steps: 2, total_steps: 6, schedule }.at(step)
        };
        assert_eq!([at(Schedule::Linear, 3), at(Schedule::Linear, 4)], [1.75, 1.5]);
        assert!((at(Schedule::Cosine, 3) - (1.5 + 0.5 * std::f64::consts::FRAC_1_SQRT_2)).abs() < 1e-12);
        assert!((at(Schedule::Cosine, 4) - 1.5).abs() < 1e-12);
        assert_eq!([at(Schedule::Linear, 0), at(Schedule::Constant, 5)], [1.0, 2.0]);
    }

    #[test]
    fn constant_lr_is_a_third_for_five_steps() {
        let rate = LearningRate {
            peak: 3.0,
            end: 0.0,
            warmup_steps: 0,
            total_steps: 9,
            schedule: Schedule::ConstantLr,
        };
        assert_eq!((rate.at(0), rate.at(4), rate.at(5), rate.at(8)), (1.0, 1.0, 3.0, 3.0));
    }

    #[test]
    fn steps_past_the_end_stay_at_the_end() {
        let rate =
            LearningRate { peak: 2.0, end: 0.5, warmup_steps: 0, total_steps: 4, schedule: Schedule::Linear };
        assert_eq!(rate.at(9), 0.5);
    }
}
