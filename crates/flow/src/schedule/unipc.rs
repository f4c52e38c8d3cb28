//! The official `scheduler_config.json` of `UniPCMultistepScheduler`, as flow-matching models use it.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::config::refused;
use super::{GridRequest, Schedule, Shift, Spacing};
use crate::{FlowError, SigmaGrid};

/// The class that is read.
pub(super) const CLASS: &str = "UniPCMultistepScheduler";

/// A `scheduler_config.json`; absent keys have diffusers' defaults, of which those that mean no flow matching are refused.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct UniPcConfig {
    /// Number of noise levels in training.
    pub num_train_timesteps: u32,
    /// Shift s' = shift·s / (1 + (shift − 1)·s).
    pub flow_shift: f64,
    /// The sigma at which the last step starts: the schedule is stretched to it.
    pub shift_terminal: Option<f64>,
    /// All other keys, kept for writing the file again.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

impl Default for UniPcConfig {
    fn default() -> Self {
        Self { num_train_timesteps: 1000, flow_shift: 1.0, shift_terminal: None, other: Map::new() }
    }
}

impl UniPcConfig {
    /// Reads a config and checks that it can be followed.
    ///
    /// # Errors
    /// When it is no such object, or a field asks for what is not implemented or is out of its range.
    pub(super) fn from_value(value: Value) -> Result<Self, FlowError> {
        let config: Self = serde_json::from_value(value)?;
        config.check()?;
        Ok(config)
    }

    /// The grid of the published pipelines: equal steps from 1 towards the lowest training level, shifted, the last of
    /// which goes on to 0. The peer begins a millionth below 1, which [`crate::Solver::UniPc`] does by itself.
    ///
    /// # Errors
    /// As [`Schedule::grid`].
    pub fn grid(&self, request: &GridRequest) -> Result<SigmaGrid, FlowError> {
        let lowest = 1.0 / f64::from(self.num_train_timesteps);
        let schedule = Schedule {
            spacing: Spacing::Towards(lowest),
            shift: Shift::Factor(self.flow_shift),
            terminal: self.shift_terminal,
        };
        schedule.grid(request)
    }

    fn check(&self) -> Result<(), FlowError> {
        for (field, expected, default) in fixed() {
            let found = self.other.get(field).unwrap_or(&default);
            if *found != expected {
                return Err(refused(field, found, &format!("{expected} (anything else is not implemented)")));
            }
        }
        if !(self.flow_shift > 0.0 && self.flow_shift.is_finite()) {
            return Err(refused("flow_shift", self.flow_shift, "a positive number"));
        }
        if self.num_train_timesteps == 0 {
            return Err(refused("num_train_timesteps", 0, "at least 1"));
        }
        match self.shift_terminal {
            Some(terminal) if !(terminal > 0.0 && terminal < 1.0) => {
                Err(refused("shift_terminal", terminal, "null or a number between 0 and 1"))
            }
            _ => Ok(()),
        }
    }
}

/// Fields with the one value that can be followed, and diffusers' default.
fn fixed() -> [(&'static str, Value, Value); 13] {
    [
        ("use_flow_sigmas", json!(true), json!(false)),
        ("prediction_type", json!("flow_prediction"), json!("epsilon")),
        ("solver_order", json!(2), json!(2)),
        ("solver_type", json!("bh2"), json!("bh2")),
        ("predict_x0", json!(true), json!(true)),
        ("lower_order_final", json!(true), json!(true)),
        ("final_sigmas_type", json!("zero"), json!("zero")),
        ("disable_corrector", json!([]), json!([])),
        ("thresholding", json!(false), json!(false)),
        ("use_dynamic_shifting", json!(false), json!(false)),
        ("use_karras_sigmas", json!(false), json!(false)),
        ("use_exponential_sigmas", json!(false), json!(false)),
        ("use_beta_sigmas", json!(false), json!(false)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use fewstep_testkit::assert_close;

    fn published(flow_shift: f64) -> Value {
        json!({
            "_class_name": CLASS, "use_flow_sigmas": true, "prediction_type": "flow_prediction", "flow_shift": flow_shift,
        })
    }

    #[test]
    fn the_grid_is_that_of_the_peer() {
        let config = UniPcConfig::from_value(published(3.0)).unwrap();
        let grid = config.grid(&GridRequest::new(4, 77)).unwrap();
        // diffusers 0.42 at 4 steps, but for the millionth below 1.
        let expected = [1.0, 0.900_119_96, 0.750_374_8, 0.500_999, 0.0];
        // The last bit: the peer shifts in f64.
        assert_close(grid.as_slice(), &expected, 1.2e-7);
    }

    #[test]
    fn what_cannot_be_followed_is_refused_by_name() {
        for (field, value, expected) in [
            ("solver_order", json!(3), "solver_order: found 3, expected 2 (anything else"),
            (
                "prediction_type",
                json!("epsilon"),
                "prediction_type: found \"epsilon\", expected \"flow_prediction\"",
            ),
            ("use_flow_sigmas", json!(false), "use_flow_sigmas: found false, expected true"),
            ("disable_corrector", json!([0]), "disable_corrector: found [0], expected []"),
            ("flow_shift", json!(-1.0), "flow_shift: found -1, expected a positive number"),
            (
                "shift_terminal",
                json!(1.5),
                "shift_terminal: found 1.5, expected null or a number between 0 and 1",
            ),
        ] {
            let mut config = published(3.0);
            config[field] = value;
            let error = UniPcConfig::from_value(config).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        let error = UniPcConfig::from_value(json!({"_class_name": CLASS})).unwrap_err().to_string();
        assert!(error.contains("use_flow_sigmas: found false"), "diffusers' default: {error}");
    }
}
