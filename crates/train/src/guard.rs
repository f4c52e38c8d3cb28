//! What keeps a run alive: which steps must not move the weights, and the way back when too many of them come in a row.
//!
//! A run goes back in its weights, moments and averages, with a lower learning rate. Its step and with it the data go
//! on: the batches that led to the failure are passed by (as arXiv 2204.02311, section 5.1, restarts after a spike),
//! logs have each step once, and no later checkpoint has to be undone.

use std::collections::VecDeque;

use fewstep_models::Model;
use serde::{Deserialize, Serialize};

use crate::TrainError;
use crate::checkpoint::{Checkpoints, Progress};
use crate::observer::{Event, Observer};
use crate::recipe::Recipe;
use crate::state::State;

/// Steps that a spike is measured against.
const WINDOW: usize = 32;
/// With fewer than so many before it, no step is a spike.
const MIN_WINDOW: usize = 16;

/// What the guards remember; part of every checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct GuardState {
    /// Times the run went back.
    pub(crate) rollbacks: u32,
    /// Step of the newest checkpoint of the run's own schedule. Those of an interruption do not count: a run that was
    /// never interrupted would not have them to go back to.
    pub(crate) saved: Option<u64>,
    /// Step of the newest such checkpoint whose weights have given a finite loss and gradient since.
    pub(crate) good: Option<u64>,
    losses: VecDeque<f32>,
    norms: VecDeque<f32>,
}

impl GuardState {
    /// Why a step with this loss and gradient norm must not move the weights; `None` where it may.
    pub(crate) fn objection(&self, loss: f64, norm: f64, max_spike: f64) -> Option<String> {
        if !(loss.is_finite() && norm.is_finite()) {
            return Some(format!("loss {loss}, gradient norm {norm}"));
        }
        let spike = |name: &str, found: f64, recent: &VecDeque<f32>| {
            let times = found / median(recent)?;
            (max_spike > 0.0 && times > max_spike).then(|| {
                format!("{name} {found:.4e}, {times:.0} times the median of the last {}", recent.len())
            })
        };
        spike("loss", loss, &self.losses).or_else(|| spike("gradient norm", norm, &self.norms))
    }

    /// Takes note of a step that moved the weights.
    pub(crate) fn moved(&mut self, loss: f64, norm: f64) {
        self.good = self.saved;
        for (window, value) in [(&mut self.losses, loss), (&mut self.norms, norm)] {
            if window.len() == WINDOW {
                window.pop_front();
            }
            window.push_back(storable(value));
        }
    }
}

/// `None` while there are too few values, or where most are 0.
fn median(values: &VecDeque<f32>) -> Option<f64> {
    let mut sorted: Vec<f32> = values.iter().copied().collect();
    sorted.sort_by(f32::total_cmp);
    let middle = f64::from(*sorted.get(values.len() / 2)?);
    (values.len() >= MIN_WINDOW && middle > 0.0).then_some(middle)
}

/// A number that JSON keeps to the bit: an f32, and none of infinity and NaN.
pub(crate) fn storable(value: f64) -> f32 {
    let largest = f64::from(f32::MAX);
    if value.is_nan() { f32::MAX } else { value.clamp(-largest, largest) as f32 }
}

/// Takes a run back to its last good checkpoint, or where it has none to its `start`.
///
/// # Errors
/// If it has gone back as often as the recipe allows, or the start cannot be loaded.
pub(crate) fn roll_back(
    state: State,
    recipe: &Recipe,
    checkpoints: &Checkpoints,
    start: impl FnOnce() -> Result<Model, TrainError>,
    observer: &mut dyn Observer,
) -> Result<State, TrainError> {
    let reached = state.progress.clone();
    let (step, times) = (reached.step, reached.skipped_in_a_row);
    if reached.guard.rollbacks == recipe.max_rollbacks {
        return Err(TrainError::Diverged { step, times, rollbacks: reached.guard.rollbacks });
    }
    let damaged = |reason: &String| format!("the last good checkpoint is damaged: {reason}");
    let good = reached.guard.good.map(|step| checkpoints.load(step));
    if let Some(Err(reason)) = &good {
        observer.on(Event::Message(damaged(reason)));
    }
    let mut state = match good {
        Some(Ok(snapshot)) => state.restore(snapshot)?,
        _ => {
            drop(state);
            State::new(recipe, start()?)
        }
    };
    let from = state.progress.step;
    state.progress = reached.gone_back_to(state.progress);
    let factor = rate_factor(recipe, &state.progress);
    observer.on(Event::Message(format!(
        "{times} steps in a row did not move the weights: going on at step {step} with those of step {from} and \
         {factor} times the learning rate"
    )));
    Ok(state)
}

/// What the learning rate is multiplied by.
pub(crate) fn rate_factor(recipe: &Recipe, progress: &Progress) -> f64 {
    recipe.rollback_lr_factor.powi(progress.guard.rollbacks as i32)
}

impl Progress {
    /// This position, at the weights of an earlier one.
    fn gone_back_to(self, earlier: Progress) -> Progress {
        let guard = GuardState {
            rollbacks: self.guard.rollbacks + 1,
            // Should these weights fail too, what was saved of them is not good either.
            saved: None,
            good: None,
            ..earlier.guard
        };
        Progress { updates: earlier.updates, skipped_in_a_row: 0, guard, ..self }
    }

    /// Whether the run has just gone back, and nothing of it is saved yet.
    pub(crate) fn has_gone_back(&self) -> bool {
        self.guard.rollbacks > 0 && self.guard.saved.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(steps: usize) -> GuardState {
        let mut state = GuardState::default();
        for step in 0..steps {
            // Losses around 2 and norms around 0.5, with medians of exactly that.
            let wiggle = [0.5, 1.0, 1.5][step % 3];
            state.moved(2.0 * wiggle, 0.5 * wiggle);
        }
        state
    }

    #[test]
    fn what_is_not_finite_is_objected_to_at_once() {
        let fresh = GuardState::default();
        assert!(fresh.objection(f64::NAN, 1.0, 0.0).unwrap().contains("loss NaN"));
        assert!(fresh.objection(1.0, f64::INFINITY, 0.0).unwrap().contains("gradient norm inf"));
        assert_eq!(fresh.objection(1e30, 1e30, 100.0), None);
    }

    #[test]
    fn a_spike_is_a_multiple_of_the_recent_median() {
        let state = after(33);
        assert_eq!(state.objection(199.0, 1.0, 100.0), None);
        assert!(state.objection(201.0, 1.0, 100.0).unwrap().starts_with("loss 2.0100e2"));
        assert!(state.objection(2.0, 51.0, 100.0).unwrap().contains("gradient norm 5.1000e1, 102 times"));
        assert_eq!(state.objection(201.0, 51.0, 0.0), None);
        assert_eq!(after(MIN_WINDOW - 1).objection(1e9, 1e9, 100.0), None);
    }

    #[test]
    fn the_median_follows_the_last_steps_alone() {
        let mut state = after(WINDOW);
        (0..WINDOW).for_each(|_| state.moved(200.0, 0.5));
        assert_eq!(state.objection(201.0, 0.5, 100.0), None);
        assert_eq!(state.losses.len(), WINDOW);
    }

    #[test]
    fn memory_survives_json_to_the_bit() {
        let mut state = after(20);
        state.moved(1e300, f64::MAX);
        state.moved(0.1, 1.0 / 3.0);
        let json = serde_json::to_string(&state).unwrap();
        assert_eq!(serde_json::from_str::<GuardState>(&json).unwrap(), state);
        assert_eq!(storable(f64::NAN), f32::MAX);
    }
}
