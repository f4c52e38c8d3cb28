//! The noise level of every training timestep.

use burn::tensor::{Tensor, TensorData};
use serde::{Deserialize, Serialize};

/// How betas, the noise that each timestep adds, grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum BetaSchedule {
    /// Linearly.
    Linear,
    /// Their roots do.
    ScaledLinear,
    /// As a squared cosine of the time asks (arXiv 2102.09672, equation 17).
    SquaredcosCapV2,
}

/// σ of every training timestep, rising.
#[derive(Debug, Clone, PartialEq)]
pub struct NoiseTable {
    sigmas: Vec<f32>,
}

impl NoiseTable {
    /// Of the variances of the clean part, a², falling.
    pub(super) fn of_clean_variances(variances: &[f32]) -> Self {
        let sigma = |variance: &f32| {
            let (clean, noise) = (f64::from(*variance).sqrt(), (1.0 - f64::from(*variance)).sqrt());
            (noise / (clean + noise)) as f32
        };
        Self { sigmas: variances.iter().map(sigma).collect() }
    }

    /// σ by timestep.
    pub fn sigmas(&self) -> &[f32] {
        &self.sigmas
    }

    /// σ of the last timestep: a network knows no more noise.
    pub fn highest(&self) -> f32 {
        self.sigmas[self.sigmas.len() - 1]
    }

    /// σ of a timestep, which between two is linear in σ/(1 − σ).
    pub(super) fn sigma(&self, timestep: f64) -> f32 {
        let last = self.sigmas.len() - 1;
        let below = (timestep.max(0.0) as usize).min(last);
        let part = timestep - below as f64;
        if part <= 0.0 || below == last {
            return self.sigmas[below];
        }
        let [below, above] = [below, below + 1].map(|at| {
            let sigma = f64::from(self.sigmas[at]);
            sigma / (1.0 - sigma)
        });
        let ratio = below + (above - below) * part;
        (ratio / (1.0 + ratio)) as f32
    }

    /// The timestep of a σ: exactly t where it is that of timestep t, and within the table.
    ///
    /// # Shapes
    /// `[B]`
    pub fn timestep(&self, sigma: Tensor<1>) -> Tensor<1> {
        // As the sum over all pairs of neighbours of how far σ is from the one to the other.
        let device = sigma.device();
        let row = |values: Vec<f32>| {
            let pairs = values.len();
            Tensor::<2>::from_data(TensorData::new(values, [1, pairs]), &device)
        };
        let pairs = || self.sigmas.windows(2);
        let distances = row(pairs().map(|pair| pair[1] - pair[0]).collect());
        let (lower, upper) =
            (row(pairs().map(|pair| pair[0]).collect()), row(pairs().map(|pair| pair[1]).collect()));
        let sigma = sigma.unsqueeze_dim::<2>(1);
        let clean = |sigma: Tensor<2>| sigma.neg().add_scalar(1.0).clamp_min(f32::EPSILON);
        let ramps = (sigma.clone() - lower) / distances * (clean(upper) / clean(sigma));
        ramps.clamp(0.0, 1.0).sum_dim(1).squeeze_dim(1)
    }
}

/// Running products of 1 − beta, in the arithmetic of torch: each beta in f32, the product in f64, kept as f32.
pub(super) fn clean_variances(schedule: BetaSchedule, [first, last]: [f64; 2], count: usize) -> Vec<f32> {
    let betas: Vec<f32> = match schedule {
        BetaSchedule::Linear => linspace(first, last, count),
        BetaSchedule::ScaledLinear => {
            linspace(first.sqrt(), last.sqrt(), count).into_iter().map(|root| root * root).collect()
        }
        BetaSchedule::SquaredcosCapV2 => {
            let clean = |at: usize| {
                let time = at as f64 / count as f64;
                ((time + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2).cos().powi(2)
            };
            (0..count).map(|at| (1.0 - clean(at + 1) / clean(at)).min(0.999) as f32).collect()
        }
    };
    let mut product = 1.0;
    let variance = |beta: f32| {
        product *= f64::from(1.0 - beta);
        product as f32
    };
    betas.into_iter().map(variance).collect()
}

/// `torch.linspace` of f32.
fn linspace(first: f64, last: f64, count: usize) -> Vec<f32> {
    crate::schedule::linspace(first as f32, last as f32, count).collect()
}

/// Moves the last timestep to nothing but noise and keeps the first (arXiv 2305.08891, algorithm 1).
pub(super) fn to_zero_terminal_snr(variances: &mut [f32]) {
    let [first, last] = [variances[0], variances[variances.len() - 1]].map(f32::sqrt);
    for variance in variances {
        *variance = ((variance.sqrt() - last) * (first / (first - last))).powi(2);
    }
}
