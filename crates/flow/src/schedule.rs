//! Sigma schedules from the official `scheduler_config.json` of `FlowMatchEulerDiscreteScheduler`.
//!
//! Equal to diffusers up to its f32 rounding. What the published flow-matching models do not use (Karras,
//! exponential and beta spacing, inverted sigmas, stochastic sampling, linear time shift) is refused by name,
//! not ignored.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{FlowError, SigmaGrid};

/// A `scheduler_config.json`; absent keys have diffusers' defaults.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SchedulerConfig {
    /// Number of noise levels in training; only their lowest enters here, see [`Self::training_range_grid`].
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

impl Default for SchedulerConfig {
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

impl SchedulerConfig {
    /// Reads a config and checks that it can be followed.
    ///
    /// # Errors
    /// When the text is no such object, or a field asks for what is not implemented or is out of its range.
    pub fn from_json(text: &str) -> Result<Self, FlowError> {
        let config: Self = serde_json::from_str(text)?;
        config.check()?;
        Ok(config)
    }

    /// The grid of the published pipelines: 1, 1 − 1/n, …, 1/n, shifted and stretched as configured, then 0.
    ///
    /// One step goes from 1 to 0, where the peers' stretching divides 0 by 0.
    ///
    /// # Errors
    /// When `num_inference_steps` is 0, or a field is unsupported or out of range.
    pub fn grid(&self, num_inference_steps: usize, image_tokens: usize) -> Result<SigmaGrid, FlowError> {
        let last = 1.0 / num_inference_steps as f64;
        self.shifted((1.0, last), num_inference_steps, image_tokens)
    }

    /// The grid of a diffusers scheduler left to itself: it starts from equal steps down to the lowest
    /// training level.
    ///
    /// A static shift is applied twice at that end, as diffusers does: once to the level, once to the grid.
    ///
    /// # Errors
    /// As [`Self::grid`].
    pub fn training_range_grid(
        &self,
        num_inference_steps: usize,
        image_tokens: usize,
    ) -> Result<SigmaGrid, FlowError> {
        let lowest = 1.0 / f64::from(self.num_train_timesteps);
        let last = if self.use_dynamic_shifting { lowest } else { self.static_shift(lowest) };
        self.shifted((1.0, last), num_inference_steps, image_tokens)
    }

    fn shifted(&self, ends: (f64, f64), steps: usize, image_tokens: usize) -> Result<SigmaGrid, FlowError> {
        if steps == 0 {
            return Err(FlowError::NoSteps);
        }
        self.check()?;
        let sigmas: Vec<f64> =
            linspace(ends, steps).map(|sigma| self.shift_one(sigma, image_tokens)).collect();
        let stretched = stretch(sigmas, self.shift_terminal);
        SigmaGrid::new(stretched.into_iter().map(|sigma| sigma as f32).chain([0.0]).collect())
    }

    fn shift_one(&self, sigma: f64, image_tokens: usize) -> f64 {
        if !self.use_dynamic_shifting {
            return self.static_shift(sigma);
        }
        let exp_mu = self.mu(image_tokens).exp();
        exp_mu / (exp_mu + (1.0 / sigma - 1.0))
    }

    fn static_shift(&self, sigma: f64) -> f64 {
        self.shift * sigma / (1.0 + (self.shift - 1.0) * sigma)
    }

    fn mu(&self, image_tokens: usize) -> f64 {
        let (base, max) = (self.base_image_seq_len as f64, self.max_image_seq_len as f64);
        let slope = (self.max_shift - self.base_shift) / (max - base);
        self.base_shift + slope * (image_tokens as f64 - base)
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
                self.num_train_timesteps > 0,
                "at least 1",
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

const FIXED: [(&str, Allowed); 7] = [
    ("_class_name", Allowed::Name("FlowMatchEulerDiscreteScheduler")),
    ("time_shift_type", Allowed::Name("exponential")),
    ("use_karras_sigmas", Allowed::False),
    ("use_exponential_sigmas", Allowed::False),
    ("use_beta_sigmas", Allowed::False),
    ("invert_sigmas", Allowed::False),
    ("stochastic_sampling", Allowed::False),
];

fn refused(field: &str, found: impl ToString, expected: &'static str) -> FlowError {
    FlowError::Field { field: field.to_string(), found: found.to_string(), expected }
}

fn linspace((first, last): (f64, f64), count: usize) -> impl Iterator<Item = f64> {
    let step = (last - first) / (count.max(2) - 1) as f64;
    (0..count).map(move |k| first + step * k as f64)
}

/// Moves the last of `sigmas` to `terminal` by scaling the distances from 1. A lone 1 has no distance and
/// stays.
fn stretch(sigmas: Vec<f64>, terminal: Option<f64>) -> Vec<f64> {
    let (Some(terminal), [_, .., last]) = (terminal, sigmas.as_slice()) else { return sigmas };
    let scale = (1.0 - terminal) / (1.0 - last);
    sigmas.into_iter().map(|sigma| 1.0 - (1.0 - sigma) * scale).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Solver, noise::latent_noise, trajectory};
    use burn::tensor::{Device, Tensor};
    use fewstep_testkit::{Golden, assert_close, golden, values};

    const STEPS: [usize; 7] = [1, 2, 4, 8, 15, 40, 50];
    const TOKENS: [usize; 4] = [256, 1024, 4096, 6889];
    /// diffusers and DiffSynth round to f32 after each of about five operations on numbers below 1, where a
    /// rounding is at most 3e-8; stretching adds the rounding of its divisor.
    const ROUNDING: f32 = 3e-7;

    fn goldens() -> Golden {
        Golden::open(golden("schedulers/schedulers.safetensors"))
    }

    fn config(name: &str) -> SchedulerConfig {
        let text = std::fs::read_to_string(golden("schedulers/schedulers.json")).unwrap();
        let all: Value = serde_json::from_str(&text).unwrap();
        SchedulerConfig::from_json(&all["configs"][name].to_string()).unwrap()
    }

    /// What the peer gives, or 1 → 0 where it gives NaN.
    fn peer_sigmas(goldens: &Golden, key: &str) -> Vec<f32> {
        let sigmas = goldens.f32s(key);
        if sigmas[0].is_nan() { vec![1.0, 0.0][..sigmas.len()].to_vec() } else { sigmas }
    }

    #[test]
    fn dynamic_schedules_equal_diffusers() {
        let goldens = goldens();
        for name in ["Qwen-Image", "Qwen-Image-Lightning", "FLUX.1-dev"] {
            let config = config(name);
            for (steps, tokens) in STEPS.into_iter().flat_map(|n| TOKENS.map(|tokens| (n, tokens))) {
                let expected = peer_sigmas(&goldens, &format!("df.{name}.n{steps}.len{tokens}.sigmas"));
                assert_close(config.grid(steps, tokens).unwrap().as_slice(), &expected, ROUNDING);
            }
        }
    }

    #[test]
    fn static_schedules_equal_diffusers_at_every_size() {
        let goldens = goldens();
        for steps in STEPS {
            let schnell = config("FLUX.1-schnell").grid(steps, 77).unwrap();
            assert_close(
                schnell.as_slice(),
                &goldens.f32s(&format!("df.FLUX.1-schnell.n{steps}.sigmas")),
                ROUNDING,
            );
            let z_image = config("Z-Image").training_range_grid(steps, 99).unwrap();
            assert_close(z_image.as_slice(), &goldens.f32s(&format!("df.Z-Image.n{steps}.sigmas")), ROUNDING);
        }
    }

    #[test]
    fn schedules_equal_diffsynth_without_its_missing_zero() {
        let goldens = goldens();
        for steps in STEPS {
            for tokens in TOKENS {
                let expected = peer_sigmas(&goldens, &format!("ds.Qwen-Image.n{steps}.len{tokens}.sigmas"));
                let grid = config("Qwen-Image").grid(steps, tokens).unwrap();
                assert_close(&grid.as_slice()[..steps], &expected, ROUNDING);
            }
            let z_image = config("Z-Image").grid(steps, 0).unwrap();
            let expected = goldens.f32s(&format!("ds.Z-Image.n{steps}.sigmas"));
            assert_close(&z_image.as_slice()[..steps], &expected, ROUNDING);
        }
    }

    /// States of diffusers' scheduler fed with velocity k = randn(seed 12 + k) from x = randn(seed 11).
    fn peer_rollout_is_ours(goldens: &Golden, key: &str, grid: &SigmaGrid) {
        let device = Device::flex();
        let shape = [1, 4, 3, 3];
        let mut seed = 11;
        let states = trajectory(Solver::Euler, grid, latent_noise(seed, shape, &device), |_, _| {
            seed += 1;
            latent_noise(seed, shape, &device)
        });
        let expected: Tensor<5> = goldens.tensor(key, &device);
        // Up to 50 additions of numbers below 4, each rounded to 2.4e-7 at most.
        assert_close(&values(Tensor::stack::<5>(states[1..].to_vec(), 0)), &values(expected), 5e-6);
    }

    #[test]
    fn euler_rollouts_equal_diffusers() {
        let goldens = goldens();
        for steps in STEPS {
            for name in ["Qwen-Image", "Qwen-Image-Lightning", "FLUX.1-dev"] {
                if (name, steps) != ("Qwen-Image", 1) {
                    let grid = config(name).grid(steps, 256).unwrap();
                    peer_rollout_is_ours(&goldens, &format!("df.{name}.n{steps}.len256.rollout"), &grid);
                }
            }
            let schnell = config("FLUX.1-schnell").grid(steps, 256).unwrap();
            peer_rollout_is_ours(&goldens, &format!("df.FLUX.1-schnell.n{steps}.rollout"), &schnell);
            let z_image = config("Z-Image").training_range_grid(steps, 256).unwrap();
            peer_rollout_is_ours(&goldens, &format!("df.Z-Image.n{steps}.rollout"), &z_image);
        }
    }

    fn refusal(field: &str, value: Value) -> String {
        let mut json = Map::new();
        json.insert("use_dynamic_shifting".into(), true.into());
        json.insert(field.into(), value);
        SchedulerConfig::from_json(&Value::Object(json).to_string()).unwrap_err().to_string()
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
        assert!(
            refusal("_class_name", "DDIMScheduler".into())
                .contains("expected FlowMatchEulerDiscreteScheduler")
        );
        assert!(refusal("shift", (-1.0).into()).contains("shift: found -1, expected a positive number"));
        assert!(refusal("shift_terminal", 1.0.into()).contains("shift_terminal: found 1"));
        assert!(refusal("max_image_seq_len", 256.into()).contains("max_image_seq_len: found 256"));
        assert!(refusal("num_train_timesteps", "many".into()).contains("invalid type: string \"many\""));
    }

    #[test]
    fn zero_steps_are_refused() {
        assert!(matches!(SchedulerConfig::default().grid(0, 256), Err(FlowError::NoSteps)));
    }

    #[test]
    fn a_file_survives_reading_and_writing() {
        let text = r#"{"_class_name":"FlowMatchEulerDiscreteScheduler","shift_terminal":0.02,
            "_diffusers_version":"0.36.0.dev0"}"#;
        let config = SchedulerConfig::from_json(text).unwrap();
        let written = serde_json::to_string(&config).unwrap();
        assert!(written.contains(r#""_diffusers_version":"0.36.0.dev0""#));
        assert_eq!(SchedulerConfig::from_json(&written).unwrap(), config);
    }
}
