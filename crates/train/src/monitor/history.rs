//! What the monitor saw so far, and what follows from it: which weights are best, and whether to stop.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::recipe::{InitialWeights, Recipe};

/// One look at the held-out prompts. Ratios are to the reference: the teacher's pictures, or real ones.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Check {
    /// Optimiser steps done.
    pub step: u64,
    /// Mean squared error: of the final latents to the teacher's from the same noise, or, without a teacher, of the
    /// velocity.
    pub paired_error: f32,
    /// Mean spread of a pixel's channels.
    pub saturation_ratio: f32,
    /// Standard deviation of brightness within a picture.
    pub contrast_ratio: f32,
    /// Brightness's second difference.
    pub sharpness_ratio: f32,
    /// Distance of pictures that differ in their seed, or, without a teacher, in their prompt; absent where nothing has
    /// two pictures.
    pub diversity_ratio: Option<f32>,
}

/// Looks in a row beyond a limit that end a run: one alone may be chance.
const LOOKS_IN_A_ROW: usize = 2;

/// A measure must also be this much worse than before the first step: few steps without guidance draw blurred and
/// similar pictures until they are trained, and a little more so in a run's first steps.
const START_SLACK: f32 = 0.75;

/// The best look so far. The first, before any step, is no candidate.
pub(crate) fn best(checks: &[Check]) -> Option<&Check> {
    checks.iter().zip(bests(checks)).filter_map(|(check, best)| best.then_some(check)).next_back()
}

/// Whether each look was the best when it was made.
pub(super) fn bests(checks: &[Check]) -> Vec<bool> {
    let mut lowest = None;
    let mut is_new = |check: &Check| {
        let new = lowest.is_none_or(|lowest| check.paired_error < lowest);
        lowest = if new { Some(check.paired_error) } else { lowest };
        new
    };
    checks.iter().enumerate().map(|(at, check)| at > 0 && is_new(check)).collect()
}

/// When a run ends before its last step.
pub(crate) struct Limits {
    min_diversity: f32,
    min_sharpness: f32,
    max_drift: f32,
    patience: usize,
}

/// Something watched, its value in a look, and what it is a sign of below and above its limits.
struct Measure {
    name: &'static str,
    ratio: fn(&Check) -> Option<f32>,
    low: &'static str,
    high: &'static str,
}

const SATURATION: Measure = Measure {
    name: "saturation",
    ratio: |check| Some(check.saturation_ratio),
    low: "colours fade",
    high: "colours are over-saturated",
};
const CONTRAST: Measure = Measure {
    name: "contrast",
    ratio: |check| Some(check.contrast_ratio),
    low: "pictures turn flat",
    high: "pictures turn harsh",
};
const SHARPNESS: Measure = Measure {
    name: "sharpness",
    ratio: |check| Some(check.sharpness_ratio),
    low: "pictures are blurred",
    high: "",
};
const DIVERSITY: Measure = Measure {
    name: "diversity",
    ratio: |check| check.diversity_ratio,
    low: "pictures collapse into one",
    high: "",
};

impl Measure {
    fn describe(&self, sign: &str, looks: &[Check], limit: f32) -> String {
        let found = looks
            .iter()
            .map(|look| format!("{:.2} at step {}", (self.ratio)(look).unwrap_or_default(), look.step));
        let found = found.collect::<Vec<_>>().join(" and ");
        format!("{sign}: {}, as a multiple of the reference's, is {found}, limit {limit:.2}", self.name)
    }
}

impl Limits {
    /// A recipe's limits. A run from random weights draws no pictures at first, so that only its patience counts.
    pub(crate) fn new(recipe: &Recipe) -> Self {
        let watched = recipe.initial_weights == InitialWeights::Pretrained;
        let limit = |value: f64| if watched { value as f32 } else { 0.0 };
        Self {
            min_diversity: limit(recipe.monitor_min_diversity),
            min_sharpness: limit(recipe.monitor_min_sharpness),
            max_drift: limit(recipe.monitor_max_drift),
            patience: recipe.monitor_patience,
        }
    }

    /// Why the run should end now, for a person.
    pub(crate) fn reason_to_stop(&self, checks: &[Check]) -> Option<String> {
        self.beyond(checks).or_else(|| self.impatience(checks))
    }

    /// All that was beyond its limit in the last looks.
    fn beyond(&self, checks: &[Check]) -> Option<String> {
        let start = checks.first()?;
        let looks = checks[1..].last_chunk::<LOOKS_IN_A_ROW>()?;
        let found = self.ranges().into_iter().filter_map(|(measure, low, high)| {
            let start = (measure.ratio)(start)?;
            let (low, high) = (low.min(START_SLACK * start), high.max(start / START_SLACK));
            let ratios = looks.iter().map(measure.ratio).collect::<Option<Vec<f32>>>()?;
            if ratios.iter().all(|ratio| *ratio < low) {
                Some(measure.describe(measure.low, looks, low))
            } else if ratios.iter().all(|ratio| *ratio > high) {
                Some(measure.describe(measure.high, looks, high))
            } else {
                None
            }
        });
        let found: Vec<String> = found.collect();
        (!found.is_empty()).then(|| found.join("; "))
    }

    /// Every measure with the range that its ratio may be in.
    fn ranges(&self) -> [(&'static Measure, f32, f32); 4] {
        let (low, high) = match self.max_drift {
            0.0 => (0.0, f32::INFINITY),
            drift => (1.0 / drift, drift),
        };
        [
            (&DIVERSITY, self.min_diversity, f32::INFINITY),
            (&SHARPNESS, self.min_sharpness, f32::INFINITY),
            (&SATURATION, low, high),
            (&CONTRAST, low, high),
        ]
    }

    fn impatience(&self, checks: &[Check]) -> Option<String> {
        let (best, last) = (best(checks)?, checks.last()?);
        let since = checks.iter().filter(|check| check.step > best.step).count();
        (self.patience > 0 && since >= self.patience).then(|| {
            format!(
                "no better pictures for {since} looks: the paired error was {:.5} at step {}, {:.5} at step {}",
                best.paired_error, best.step, last.paired_error, last.step
            )
        })
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { step, paired_error, saturation_ratio, contrast_ratio, sharpness_ratio, .. } = self;
        write!(
            f,
            "monitor at step {step}: paired error {paired_error:.5}; of the reference's saturation \
             {saturation_ratio:.2}, contrast {contrast_ratio:.2}, sharpness {sharpness_ratio:.2}"
        )?;
        self.diversity_ratio.map_or(Ok(()), |ratio| write!(f, ", diversity {ratio:.2}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FINE: Check = Check {
        step: 0,
        paired_error: 0.5,
        saturation_ratio: 0.92,
        contrast_ratio: 1.1,
        sharpness_ratio: 0.8,
        diversity_ratio: Some(1.0),
    };

    /// Looks every ten steps.
    fn looks(changes: &[&dyn Fn(&mut Check)]) -> Vec<Check> {
        let steps = (0..).step_by(10);
        let look = |(change, step): (&&dyn Fn(&mut Check), u64)| {
            let mut check = Check { step, ..FINE };
            change(&mut check);
            check
        };
        changes.iter().zip(steps).map(look).collect()
    }

    fn fine(_: &mut Check) {}

    fn limits() -> Limits {
        Limits::new(&Recipe { monitor_patience: 3, ..Recipe::default() })
    }

    #[track_caller]
    fn assert_stops(change: impl Fn(&mut Check), saying: [&str; 2]) {
        let reason = limits().reason_to_stop(&looks(&[&fine, &fine, &change, &change])).unwrap();
        for part in saying {
            assert!(reason.contains(part), "{reason:?} does not say {part:?}");
        }
        // Neither one look alone nor a start that is as bad ends a run.
        assert_eq!(limits().reason_to_stop(&looks(&[&fine, &change, &fine, &change])), None);
        assert_eq!(limits().reason_to_stop(&looks(&[&change, &change, &change])), None);
    }

    #[test]
    fn every_measure_has_its_side_on_which_a_run_ends() {
        assert_stops(
            |look| look.diversity_ratio = Some(0.3),
            ["collapse into one", "0.30 at step 20 and 0.30 at step 30"],
        );
        assert_stops(|look| look.sharpness_ratio = 0.3, ["blurred", "limit 0.50"]);
        assert_stops(|look| look.saturation_ratio = 2.0, ["over-saturated", "limit 1.30"]);
        assert_stops(|look| look.saturation_ratio = 0.4, ["fade", "limit 0.69"]);
        assert_stops(|look| look.contrast_ratio = 2.0, ["harsh", "contrast"]);
        assert_stops(|look| look.contrast_ratio = 0.4, ["flat", "contrast"]);
        let sharper: &dyn Fn(&mut Check) = &|look| {
            look.sharpness_ratio = 9.0;
            look.diversity_ratio = Some(9.0);
        };
        assert_eq!(limits().reason_to_stop(&looks(&[&fine, sharper, sharper])), None);
    }

    #[test]
    fn a_bad_start_may_not_become_much_worse() {
        let blurred = |ratio: f32| move |look: &mut Check| look.sharpness_ratio = ratio;
        let run =
            |ratio: f32| limits().reason_to_stop(&looks(&[&blurred(0.4), &blurred(ratio), &blurred(ratio)]));
        assert_eq!(run(0.31), None);
        assert!(run(0.29).unwrap().contains("limit 0.30"));
    }

    #[test]
    fn a_limit_of_zero_is_off_and_so_are_all_for_random_weights() {
        let broken: &dyn Fn(&mut Check) = &|look| {
            (look.saturation_ratio, look.contrast_ratio, look.sharpness_ratio) = (9.0, 0.0, 0.0);
            look.diversity_ratio = Some(0.0);
        };
        let checks = looks(&[&fine, broken, broken]);
        let off = Recipe {
            monitor_max_drift: 0.0,
            monitor_min_sharpness: 0.0,
            monitor_min_diversity: 0.0,
            ..Recipe::default()
        };
        let random = Recipe { initial_weights: InitialWeights::Random, ..Recipe::default() };
        assert!(Limits::new(&Recipe::default()).reason_to_stop(&checks).is_some());
        assert_eq!(Limits::new(&off).reason_to_stop(&checks), None);
        assert_eq!(Limits::new(&random).reason_to_stop(&checks), None);
    }

    #[test]
    fn patience_counts_looks_since_the_best() {
        let error = |error: f32| move |look: &mut Check| look.paired_error = error;
        let checks = looks(&[&error(0.1), &error(0.4), &error(0.3), &error(0.5), &error(0.3), &error(0.35)]);
        assert_eq!(limits().reason_to_stop(&checks[..5]), None);
        let reason = limits().reason_to_stop(&checks).unwrap();
        assert!(reason.contains("for 3 looks") && reason.contains("0.30000 at step 20"), "{reason}");
        let patient = Limits::new(&Recipe { monitor_patience: 0, ..Recipe::default() });
        assert_eq!(patient.reason_to_stop(&checks), None);
    }

    #[test]
    fn the_best_look_is_the_first_with_the_lowest_error_after_the_start() {
        let error = |error: f32| move |look: &mut Check| look.paired_error = error;
        let checks = looks(&[&error(0.1), &error(0.4), &error(0.3), &error(0.3), &error(0.5)]);
        assert_eq!(best(&checks).unwrap().step, 20);
        assert_eq!(bests(&checks), [false, true, true, false, false]);
        assert_eq!(best(&checks[..1]), None);
    }

    #[test]
    fn a_look_survives_json_to_the_bit() {
        let look =
            Check { paired_error: 1.0 / 3.0, saturation_ratio: f32::MAX, diversity_ratio: None, ..FINE };
        let json = serde_json::to_string(&look).unwrap();
        assert_eq!(serde_json::from_str::<Check>(&json).unwrap(), look);
    }
}
