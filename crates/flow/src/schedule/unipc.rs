//! The official `scheduler_config.json` of `UniPCMultistepScheduler`, as flow-matching models use it.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::config::{TRAINING_TIMESTEPS, refused};
use super::{GridRequest, Schedule, Shift, SigmaRounding, Spacing};
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
        let grid = schedule.grid(request)?;
        let is_own = request.shift.is_none() && request.denoising_strength == 1.0;
        match is_own && request.rounding == SigmaRounding::Diffusers {
            true => Ok(grid.with_told(self.told(lowest, request.num_inference_steps))),
            false => Ok(grid),
        }
    }

    /// The whole timesteps that the peer hands on, in its arithmetic, as thousandths: what f64 leaves below a whole number
    /// is rounded down too.
    fn told(&self, lowest: f64, steps: usize) -> Vec<f32> {
        let distance = (lowest - 1.0) / steps as f64;
        let shifted = |step: usize| {
            let level = step as f64 * distance + 1.0;
            self.flow_shift * level / (1.0 + (self.flow_shift - 1.0) * level)
        };
        let last = 1.0 - shifted(steps - 1);
        let stretched = |level: f64| match self.shift_terminal {
            Some(terminal) if last > 0.0 => 1.0 - (1.0 - level) / (last / (1.0 - terminal)),
            _ => level,
        };
        let below_one = |level: f64| if (level - 1.0).abs() < 1e-6 { level - 1e-6 } else { level };
        let all = f64::from(self.num_train_timesteps);
        (0..steps).map(|step| ((below_one(stretched(shifted(step))) * all).floor() / all) as f32).collect()
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
        if self.num_train_timesteps != TRAINING_TIMESTEPS {
            let found = self.num_train_timesteps;
            return Err(refused("num_train_timesteps", found, "1000 (networks are told thousandths)"));
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
    fn networks_are_told_the_whole_timesteps_of_the_peer() {
        // diffusers 0.42: f64 has 333.99999999999994 and 99.99999999999998 where f32 has 334 and 100.
        for (shift, terminal, expected) in [
            (1.0, Value::Null, vec![999.0, 833.0, 667.0, 500.0, 333.0, 167.0]),
            (3.0, json!(0.1), vec![999.0, 819.0, 549.0, 99.0]),
        ] {
            let mut config = published(shift);
            config["shift_terminal"] = terminal;
            let config = UniPcConfig::from_value(config).unwrap();
            let grid = config.grid(&GridRequest::new(expected.len(), 77)).unwrap();
            let told = |sigma: &f32| crate::Solver::UniPc.told(&grid, *sigma) * 1000.0;
            let found: Vec<f32> = grid.as_slice()[..expected.len()].iter().map(told).collect();
            assert_close(&found, &expected, 1e-4);
        }
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
            ("num_train_timesteps", json!(500), "num_train_timesteps: found 500, expected 1000"),
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
