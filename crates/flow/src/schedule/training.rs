//! The discrete noise levels that DiffSynth trains on, and the weight of the loss at each.

use half::bf16;

use crate::SigmaGrid;

/// The levels of a long grid (the peer has 1000) and their loss weights.
///
/// The weight is DiffSynth's bell exp(−2·(s − ½)²) over the levels, lowered to 0 at its smallest and scaled to
/// a mean of 1. The loss of a level drawn at random is multiplied by it.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainingLevels {
    sigmas: Vec<f32>,
    weights: Vec<f32>,
}

/// The peer's number of levels, and the scale of its timesteps.
const PEER_LEVELS: usize = 1000;

impl TrainingLevels {
    /// The levels at which the steps of `grid` start.
    ///
    /// Weights of other than 1000 levels are scaled and raised as the peer does. Where all levels are equally
    /// far from ½, so that the bell has no height (the peer gives NaN there), every weight is 1.
    pub fn of(grid: &SigmaGrid) -> Self {
        let sigmas = grid.as_slice()[..grid.steps()].to_vec();
        let weights = weights(&sigmas);
        Self { sigmas, weights }
    }

    /// Levels that weigh alike, falling.
    pub(crate) fn alike(sigmas: Vec<f32>) -> Self {
        Self { weights: vec![1.0; sigmas.len()], sigmas }
    }

    /// Noise levels in [0, 1], falling.
    pub fn sigmas(&self) -> &[f32] {
        &self.sigmas
    }

    /// Loss weights, one per level.
    pub fn weights(&self) -> &[f32] {
        &self.weights
    }

    /// The index of the level nearest to `sigma`; the higher level of two equally near ones.
    pub fn nearest(&self, sigma: f32) -> usize {
        self.nearest_to_timestep(timestep(sigma))
    }

    /// The index of the level that the peer trains on when it has drawn level `index` in bf16: it rounds the
    /// timestep to bf16 and then looks for the nearest level.
    ///
    /// # Panics
    /// When there is no level `index`.
    pub fn after_bf16(&self, index: usize) -> usize {
        self.nearest_to_timestep(bf16::from_f32(timestep(self.sigmas[index])).to_f32())
    }

    fn nearest_to_timestep(&self, wanted: f32) -> usize {
        let distance = |index: &usize| (timestep(self.sigmas[*index]) - wanted).abs();
        let indices = 0..self.sigmas.len();
        indices.min_by(|a, b| distance(a).total_cmp(&distance(b))).expect("a grid has at least one step")
    }
}

/// In f32, as the peer has it: its choice of the nearest level can hang on the last bit.
fn timestep(sigma: f32) -> f32 {
    sigma * PEER_LEVELS as f32
}

/// In f32 in the peer's order: near pure noise the weight is a difference of heights as small as 2e-4, of which
/// the last bit of a height is 2e-4 again.
fn weights(sigmas: &[f32]) -> Vec<f32> {
    let height = |&sigma: &f32| {
        let from_middle = (timestep(sigma) - 500.0) / PEER_LEVELS as f32;
        f64::from(-2.0 * (from_middle * from_middle)).exp() as f32
    };
    let heights: Vec<f32> = sigmas.iter().map(height).collect();
    let lowest = heights.iter().copied().fold(f32::INFINITY, f32::min);
    let raised: Vec<f32> = heights.into_iter().map(|height| height - lowest).collect();
    let area: f64 = raised.iter().copied().map(f64::from).sum();
    if area == 0.0 {
        return vec![1.0; sigmas.len()];
    }
    let scale = 1.0 / area as f32 * PEER_LEVELS as f32;
    let weights = raised.into_iter().map(|height| height * scale);
    if sigmas.len() == PEER_LEVELS {
        return weights.collect();
    }
    let weights: Vec<f32> =
        weights.map(|weight| weight * (sigmas.len() as f32 / PEER_LEVELS as f32)).collect();
    weights.iter().map(|weight| weight + weights[1]).collect()
}

#[cfg(test)]
mod tests {
    use super::super::{GridRequest, Schedule, ShiftOverride, SigmaRounding, templates::DIFFSYNTH};
    use super::*;
    use burn::tensor::{Device, Tensor};
    use fewstep_testkit::{Golden, assert_close, assert_tensors_close, golden, values};

    use crate::path;

    fn goldens() -> Golden {
        Golden::open(golden("schedulers/schedulers.safetensors"))
    }

    fn levels(schedule: Schedule, count: usize) -> TrainingLevels {
        let (shift, rounding) = (Some(ShiftOverride::DiffsynthTraining), SigmaRounding::Diffsynth);
        let request = GridRequest { shift, rounding, ..GridRequest::new(count, 0) };
        TrainingLevels::of(&schedule.grid(&request).unwrap())
    }

    #[test]
    fn levels_and_weights_equal_diffsynths() {
        let goldens = goldens();
        for (name, schedule) in DIFFSYNTH {
            for count in [1000, 8] {
                let levels = levels(schedule, count);
                let key = format!("ds.{name}.train{count}");
                assert_close(levels.sigmas(), &goldens.f32s(&format!("{key}.sigmas")), 0.0);
                let weights = goldens.f32s(&format!("{key}.weights"));
                // The exponential's last bit (6e-8) and that of the sum, magnified by up to 6.
                assert_close(levels.weights(), &weights, 5e-7);
                // Measured 1e-5, at one level where the exponential is not torch's to the bit. An f64 evaluation
                // would differ by 2e-4 here.
                let ratios = levels.weights().iter().zip(&weights).filter(|pair| *pair.1 > 0.0);
                assert!(ratios.into_iter().all(|(ours, peers)| (ours / peers - 1.0).abs() < 1.5e-5), "{key}");
            }
        }
    }

    #[test]
    fn the_thousand_weights_have_mean_one() {
        let levels = levels(Schedule::QWEN_IMAGE, 1000);
        let sum: f64 = levels.weights().iter().map(|&weight| f64::from(weight)).sum();
        // Of the scale, to f32.
        assert!((sum - 1000.0).abs() < 1e-4, "{sum}");
        assert_eq!(levels.weights()[0], 0.0, "the bell is lowest at pure noise");
    }

    #[test]
    fn a_bell_without_height_weighs_all_levels_alike() {
        for sigmas in [vec![1.0, 0.0], vec![0.75, 0.25, 0.0]] {
            let levels = TrainingLevels::of(&SigmaGrid::new(sigmas).unwrap());
            assert!(levels.weights().iter().all(|&weight| weight == 1.0), "{:?}", levels.weights());
        }
    }

    #[test]
    fn the_nearest_level_gives_diffsynths_state_weight_and_velocity() {
        let (goldens, device) = (goldens(), Device::flex());
        let [clean, noise] = ["query.x0", "query.eps"].map(|key| goldens.tensor::<2>(key, &device));
        for (name, schedule) in DIFFSYNTH {
            let levels = levels(schedule, 1000);
            for query in ["0.0", "3.7", "250.0", "499.5", "777.7", "1000.0"] {
                let golden = |what| format!("ds.{name}.train1000.query{query}.{what}");
                let nearest = levels.nearest(query.parse::<f32>().unwrap() / 1000.0);
                assert_close(&levels.weights()[nearest..=nearest], &goldens.f32s(&golden("weight")), 4e-7);
                let sigma = Tensor::<1>::full([2], levels.sigmas()[nearest], &device);
                let state = path::noisy(clean.clone(), noise.clone(), sigma.clone());
                // The last bit of a number below 4: the peer may fuse the multiply-add.
                assert_tensors_close(state, goldens.tensor(&golden("add_noise"), &device), 2.4e-7);
                let velocity = path::velocity(clean.clone(), noise.clone());
                assert_tensors_close(velocity, goldens.tensor(&golden("target"), &device), 0.0);
                if levels.sigmas()[nearest] >= path::SIGMA_FLOOR {
                    let found = values(path::velocity_of_clean(clean.clone(), noise.clone(), sigma));
                    let expected = goldens.f32s(&golden("return_to_timestep"));
                    // The last bit of a number below 64.
                    assert_close(&found, &expected, 4e-6);
                }
            }
        }
    }

    #[test]
    fn bf16_timesteps_lead_to_the_peers_levels() {
        let goldens = goldens();
        for (name, schedule) in DIFFSYNTH {
            let levels = levels(schedule, 1000);
            let timesteps = goldens.f32s(&format!("ds.{name}.train1000.timesteps"));
            let mut moved = 0;
            for (index, &drawn) in timesteps.iter().enumerate() {
                let rounded = bf16::from_f32(drawn).to_f32();
                let distance = |at: &usize| (timesteps[*at] - rounded).abs();
                let peer = (0..1000).min_by(|a, b| distance(a).total_cmp(&distance(b))).unwrap();
                assert_eq!(levels.after_bf16(index), peer, "{name}: level {index}");
                moved += usize::from(peer != index);
            }
            assert!(moved > 100, "{name}: bf16 moved only {moved} levels");
        }
    }
}
