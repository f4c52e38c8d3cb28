//! The official `scheduler_config.json` of `FlowMatchEulerDiscreteScheduler`.
//!
//! What the published flow-matching models do not use (Karras, exponential and beta spacing, inverted sigmas,
//! stochastic sampling, linear time shift) is refused by name, not ignored.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{GridRequest, MuLine, Schedule, Shift, Spacing};
use crate::{FlowError, SigmaGrid};

/// A `scheduler_config.json`; absent keys have diffusers' defaults.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct FlowMatchConfig {
    /// Number of noise levels in training; only the lowest of them enters, in
    /// [`Self::training_range_schedule`].
    pub num_train_timesteps: u32,
    /// Shift s' = shift·s / (1 + (shift − 1)·s) of a schedule that does not depend on the size of the
    /// picture.
    pub shift: f64,
    /// Whether the shift depends on the size of the picture: s' = e^μ / (e^μ + 1/s − 1), μ linear in the
    /// image tokens.
    pub use_dynamic_shifting: bool,
    /// μ at `base_image_seq_len` image tokens.
    pub base_shift: f64,
    /// μ at `max_image_seq_len` image tokens; the line goes on beyond.
    pub max_shift: f64,
    /// Image tokens of the smaller reference picture.
    pub base_image_seq_len: usize,
    /// Image tokens of the larger reference picture.
    pub max_image_seq_len: usize,
    /// The sigma at which the last step starts: the schedule is stretched to it.
    pub shift_terminal: Option<f64>,
    /// All other keys, kept for writing the file again.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

impl Default for FlowMatchConfig {
    fn default() -> Self {
        Self {
            num_train_timesteps: 1000,
            shift: 1.0,
            use_dynamic_shifting: false,
            base_shift: 0.5,
            max_shift: 1.15,
            base_image_seq_len: 256,
            max_image_seq_len: 4096,
            shift_terminal: None,
            other: Map::new(),
        }
    }
}

impl FlowMatchConfig {
    /// Reads a config and checks that it can be followed.
    ///
    /// # Errors
    /// When it is no such object, or a field asks for what is not implemented or is out of its range.
    pub(super) fn from_value(value: Value) -> Result<Self, FlowError> {
        let config: Self = serde_json::from_value(value)?;
        config.check()?;
        Ok(config)
    }

    /// The grid of the published pipelines.
    ///
    /// # Errors
    /// As [`Self::schedule`] and [`Schedule::grid`].
    pub fn grid(&self, request: &GridRequest) -> Result<SigmaGrid, FlowError> {
        self.schedule()?.grid(request)
    }

    /// The schedule of the published pipelines: 1, 1 − 1/n, …, 1/n, shifted and stretched as configured.
    ///
    /// # Errors
    /// When a field is unsupported or out of range.
    pub fn schedule(&self) -> Result<Schedule, FlowError> {
        self.check()?;
        Ok(Schedule {
            spacing: Spacing::ToZero,
            shift: self.configured_shift(),
            terminal: self.shift_terminal,
        })
    }

    /// The schedule of a diffusers scheduler left to itself: equal steps down to the lowest training level.
    ///
    /// A static shift is applied twice at that end, as diffusers does: once to the level, once to the grid.
    ///
    /// # Errors
    /// As [`Self::schedule`].
    pub fn training_range_schedule(&self) -> Result<Schedule, FlowError> {
        let schedule = self.schedule()?;
        let lowest = 1.0 / f64::from(self.num_train_timesteps);
        let lowest = match schedule.shift {
            Shift::Factor(factor) => factor * lowest / (1.0 + (factor - 1.0) * lowest),
            _ => lowest,
        };
        Ok(Schedule { spacing: Spacing::To(lowest), ..schedule })
    }

    fn configured_shift(&self) -> Shift {
        if !self.use_dynamic_shifting {
            return Shift::Factor(self.shift);
        }
        Shift::Linear(MuLine {
            base: (self.base_image_seq_len, self.base_shift),
            max: (self.max_image_seq_len, self.max_shift),
        })
    }

    fn check(&self) -> Result<(), FlowError> {
        for (field, allowed) in FIXED {
            if let Some(found) = self.other.get(field)
                && *found != Value::from(allowed)
            {
                return Err(refused(field, found, allowed.expectation()));
            }
        }
        for (field, found, valid, expected) in self.ranges() {
            if !valid {
                return Err(refused(field, found, expected));
            }
        }
        Ok(())
    }

    fn ranges(&self) -> [(&'static str, String, bool, &'static str); 4] {
        let terminal = self.shift_terminal.unwrap_or(0.5);
        let lengths_rise = self.base_image_seq_len < self.max_image_seq_len;
        [
            ("shift", self.shift.to_string(), self.shift > 0.0, "a positive number"),
            (
                "num_train_timesteps",
                self.num_train_timesteps.to_string(),
                self.num_train_timesteps == TRAINING_TIMESTEPS,
                "1000 (networks are told thousandths)",
            ),
            (
                "shift_terminal",
                terminal.to_string(),
                terminal > 0.0 && terminal < 1.0,
                "null or a number between 0 and 1",
            ),
            (
                "max_image_seq_len",
                self.max_image_seq_len.to_string(),
                lengths_rise || !self.use_dynamic_shifting,
                "more than base_image_seq_len",
            ),
        ]
    }
}

/// The one value that can be followed, for keys that select something not implemented.
#[derive(Clone, Copy)]
enum Allowed {
    False,
    Name(&'static str),
}

impl Allowed {
    fn expectation(self) -> &'static str {
        match self {
            Self::False => "false (anything else is not implemented)",
            Self::Name(name) => name,
        }
    }
}

impl From<Allowed> for Value {
    fn from(allowed: Allowed) -> Self {
        match allowed {
            Allowed::False => Value::Bool(false),
            Allowed::Name(name) => Value::from(name),
        }
    }
}

/// Training timesteps of every flow-matching model that is published: networks are told sigma times as many.
pub(super) const TRAINING_TIMESTEPS: u32 = 1000;

/// The class that is read.
pub(super) const CLASS: &str = "FlowMatchEulerDiscreteScheduler";

const FIXED: [(&str, Allowed); 7] = [
    ("_class_name", Allowed::Name(CLASS)),
    ("time_shift_type", Allowed::Name("exponential")),
    ("use_karras_sigmas", Allowed::False),
    ("use_exponential_sigmas", Allowed::False),
    ("use_beta_sigmas", Allowed::False),
    ("invert_sigmas", Allowed::False),
    ("stochastic_sampling", Allowed::False),
];

pub(super) fn refused(field: &str, found: impl ToString, expected: &str) -> FlowError {
    FlowError::Field { field: field.to_string(), found: found.to_string(), expected: expected.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(field: &str, value: Value) -> String {
        let mut json = Map::new();
        json.insert("use_dynamic_shifting".into(), true.into());
        json.insert(field.into(), value);
        FlowMatchConfig::from_value(Value::Object(json)).unwrap_err().to_string()
    }

    #[test]
    fn what_cannot_be_followed_is_refused_by_name() {
        for field in [
            "use_karras_sigmas",
            "use_exponential_sigmas",
            "use_beta_sigmas",
            "invert_sigmas",
            "stochastic_sampling",
        ] {
            let message = refusal(field, true.into());
            assert!(message.starts_with(&format!("scheduler config: {field}: found true")), "{message}");
        }
        assert!(
            refusal("time_shift_type", "linear".into())
                .contains("time_shift_type: found \"linear\", expected exponential")
        );
        assert!(refusal("shift", (-1.0).into()).contains("shift: found -1, expected a positive number"));
        assert!(refusal("shift_terminal", 1.0.into()).contains("shift_terminal: found 1"));
        assert!(refusal("max_image_seq_len", 256.into()).contains("max_image_seq_len: found 256"));
        assert!(
            refusal("num_train_timesteps", 500.into())
                .contains("num_train_timesteps: found 500, expected 1000")
        );
        assert!(refusal("num_train_timesteps", "many".into()).contains("invalid type: string \"many\""));
    }
}
