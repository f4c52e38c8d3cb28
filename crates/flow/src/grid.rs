//! The noise levels a sampler walks through.

use serde::{Deserialize, Serialize};

use crate::FlowError;

/// The most sampling steps of a run: ten for each noise level that published models were trained on.
pub const MAX_STEPS: usize = 10_000;

/// Checks a number of sampling steps, so that nobody allocates for a billion of them.
pub(crate) fn check_steps(found: usize) -> Result<(), FlowError> {
    match (1..=MAX_STEPS).contains(&found) {
        true => Ok(()),
        false => Err(FlowError::Steps { found }),
    }
}

/// The highest end of a grid: more than the 0.03 that diffusion models leave whose last step goes to their first training
/// timestep, and less than any other step.
const MAX_END: f32 = 0.05;

/// Noise levels s_1 > … > s_N > s_{N+1} of a run with N steps; s_1 is at most 1, and s_{N+1} is 0, or the little noise that
/// some diffusion models leave.
///
/// A student is trained for one grid. It is stored with data sets and weights as a plain list of numbers; equality is
/// exact, and [`SigmaGrid::agrees_with`] forgives last bits.
/// Grids of published schedulers may also know what these do beside it; Euler's steps, and so students, have no use for
/// that, and it is neither stored nor compared.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(try_from = "Vec<f32>", into = "Vec<f32>")]
pub struct SigmaGrid {
    levels: Vec<f32>,
    /// Where the steps of [`crate::Solver::Ddim`] end; none where they end at the next level.
    landings: Vec<f32>,
    /// What networks are told at the steps' starts by [`crate::Solver::UniPc`]; none where it follows from the level.
    told: Vec<f32>,
}

impl PartialEq for SigmaGrid {
    fn eq(&self, other: &Self) -> bool {
        self.levels == other.levels
    }
}

impl SigmaGrid {
    /// A grid of given levels, the final one included.
    ///
    /// # Errors
    /// When there are fewer than two, one is not finite, the first is above 1, one does not fall below its
    /// predecessor, or the last is no end.
    pub fn new(sigmas: Vec<f32>) -> Result<Self, FlowError> {
        let length = sigmas.len();
        if length < 2 {
            return Err(FlowError::ShortGrid { length });
        }
        let bad = |index, expected| FlowError::Grid { index, length, found: sigmas[index], expected };
        if let Some(at) = sigmas.iter().position(|sigma| !sigma.is_finite()) {
            return Err(bad(at, "a finite number"));
        }
        if sigmas[0] > 1.0 {
            return Err(bad(0, "at most 1, which is pure noise"));
        }
        if let Some(at) = sigmas.windows(2).position(|pair| pair[1] >= pair[0]) {
            return Err(bad(at + 1, "less than the entry before it"));
        }
        if !(0.0..MAX_END).contains(&sigmas[length - 1]) {
            return Err(bad(length - 1, "0, or at most 0.05, at the end"));
        }
        Ok(Self { levels: sigmas, landings: Vec::new(), told: Vec::new() })
    }

    /// Equal steps from 1 to 0.
    ///
    /// # Errors
    /// When `steps` is 0 or more than [`MAX_STEPS`].
    pub fn uniform(steps: usize) -> Result<Self, FlowError> {
        check_steps(steps)?;
        Self::new((0..=steps).map(|k| 1.0 - k as f32 / steps as f32).collect())
    }

    /// The same with the sigmas that the steps of [`crate::Solver::Ddim`] end at, before the next one takes the state for
    /// one of its own level.
    ///
    /// # Panics
    /// If there are not as many as steps.
    pub(crate) fn with_landings(self, landings: Vec<f32>) -> Self {
        assert_eq!(landings.len(), self.steps(), "a landing for each step");
        Self { landings, ..self }
    }

    /// The same with the sigmas that networks are told by [`crate::Solver::UniPc`].
    ///
    /// # Panics
    /// If there are not as many as steps.
    pub(crate) fn with_told(self, told: Vec<f32>) -> Self {
        assert_eq!(told.len(), self.steps(), "one for each step");
        Self { told, ..self }
    }

    /// Where the step to a level ends, if not there.
    pub(crate) fn landing_before(&self, next: f32) -> Option<f32> {
        let step = self.levels.iter().position(|level| *level == next)?.checked_sub(1)?;
        self.landings.get(step).copied().filter(|landing| *landing != next)
    }

    /// What is told of a level, if something else.
    pub(crate) fn told_at(&self, sigma: f32) -> Option<f32> {
        let step = self.levels.iter().position(|level| *level == sigma)?;
        self.told.get(step).copied()
    }

    /// Number of steps, one less than of levels.
    pub fn steps(&self) -> usize {
        self.levels.len() - 1
    }

    /// The level that the last step leads to.
    pub fn end(&self) -> f32 {
        self.levels[self.levels.len() - 1]
    }

    /// All levels, the final one included.
    pub fn as_slice(&self) -> &[f32] {
        &self.levels
    }

    /// Whether these are the same levels, however their formula was rounded to f32 (by [`crate::schedule::SigmaRounding`]
    /// or an earlier version).
    pub fn agrees_with(&self, levels: &[f32]) -> bool {
        // A few roundings of numbers below 1, of 6e-8 each.
        const LAST_BITS: f32 = 1e-6;
        let near = |(ours, theirs): (&f32, &f32)| (ours - theirs).abs() <= LAST_BITS;
        self.levels.len() == levels.len() && self.levels.iter().zip(levels).all(near)
    }

    /// Start and end of every step, in order.
    pub fn pairs(&self) -> impl DoubleEndedIterator<Item = (f32, f32)> + ExactSizeIterator + '_ {
        self.levels.windows(2).map(|pair| (pair[0], pair[1]))
    }
}

impl TryFrom<Vec<f32>> for SigmaGrid {
    type Error = FlowError;

    fn try_from(sigmas: Vec<f32>) -> Result<Self, FlowError> {
        Self::new(sigmas)
    }
}

impl From<SigmaGrid> for Vec<f32> {
    fn from(grid: SigmaGrid) -> Self {
        grid.levels
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(sigmas: &[f32]) -> String {
        SigmaGrid::new(sigmas.to_vec()).unwrap_err().to_string()
    }

    #[test]
    fn a_refused_grid_names_the_entry() {
        assert_eq!(
            refusal(&[0.0]),
            "sigma grid: found 1 entries, expected at least 2 (a start and the final 0)"
        );
        assert!(refusal(&[1.5, 0.0]).starts_with("sigma grid: entry 0 of 2: found 1.5,"));
        assert!(refusal(&[1.0, f32::NAN, 0.0]).starts_with("sigma grid: entry 1 of 3: found NaN,"));
        assert!(refusal(&[1.0, 0.5, 0.5, 0.0]).starts_with("sigma grid: entry 2 of 4: found 0.5,"));
        assert!(refusal(&[1.0, 0.1]).starts_with("sigma grid: entry 1 of 2: found 0.1,"));
        assert!(refusal(&[1.0, 0.5, -0.5]).starts_with("sigma grid: entry 2 of 3: found -0.5,"));
    }

    #[test]
    fn grids_agree_up_to_last_bits() {
        let grid = SigmaGrid::new(vec![1.0, 0.5, 0.0]).unwrap();
        assert!(grid.agrees_with(&[1.0 - f32::EPSILON, 0.5 + f32::EPSILON, 0.0]));
        assert!(!grid.agrees_with(&[1.0, 0.5001, 0.0]));
        assert!(!grid.agrees_with(&[1.0, 0.0]) && !grid.agrees_with(&[1.0, 0.5, 0.0, 0.0]));
    }

    #[test]
    fn pairs_walk_from_noise_to_picture() {
        let grid = SigmaGrid::uniform(4).unwrap();
        assert_eq!(grid.pairs().collect::<Vec<_>>(), [(1.0, 0.75), (0.75, 0.5), (0.5, 0.25), (0.25, 0.0)]);
        assert_eq!(grid.steps(), 4);
    }

    #[test]
    fn a_number_of_steps_nobody_takes_is_refused_before_anything_is_allocated() {
        for found in [0, MAX_STEPS + 1, usize::MAX] {
            let error = SigmaGrid::uniform(found).unwrap_err().to_string();
            assert_eq!(error, format!("num_inference_steps: found {found}, expected 1 to 10000"));
        }
    }

    #[test]
    fn json_is_a_list_of_numbers_and_is_checked_when_read() {
        let grid = SigmaGrid::new(vec![1.0, 0.02, 0.0]).unwrap();
        let text = serde_json::to_string(&grid).unwrap();
        assert_eq!(text, "[1.0,0.02,0.0]");
        assert_eq!(serde_json::from_str::<SigmaGrid>(&text).unwrap(), grid);
        assert!(serde_json::from_str::<SigmaGrid>("[0.5, 0.6, 0.0]").is_err());
    }
}
