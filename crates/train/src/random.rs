//! Everything random in a run, as a function of where in the run it is drawn.
//!
//! No generator is carried from step to step, so a resumed run needs no generator state and batches of another size
//! see the same noise.

use fewstep_flow::noise::TorchGenerator;

/// What a draw is for; draws for different purposes are independent.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Purpose {
    /// The order of an epoch.
    Order = 1,
    /// Sigma, noise and caption dropout of one sample.
    Sample = 2,
    /// The initial noise of an online teacher's picture.
    Picture = 3,
    /// Which rows are held out, and the noise of their further pictures.
    HeldOut = 4,
}

/// A position in a run at which something is drawn.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Draw {
    /// Seed of the run.
    pub(crate) seed: u64,
    /// Epoch, from 0.
    pub(crate) epoch: u64,
    /// Row of the data set; 0 where the draw is for the whole epoch.
    pub(crate) row: u64,
}

impl Draw {
    /// A seed of its own for this position and purpose, of 32 bits: all that torch's generator uses of a seed.
    pub(crate) fn seed(self, purpose: Purpose) -> u64 {
        let place = [self.epoch, self.row, purpose as u64];
        place.into_iter().fold(self.seed, |state, next| split_mix(state ^ split_mix(next))) >> 32
    }

    /// A generator of its own for this position and purpose.
    pub(crate) fn generator(self, purpose: Purpose) -> TorchGenerator {
        TorchGenerator::new(self.seed(purpose))
    }
}

/// The finaliser of SplitMix64 (Steele, Lea and Flood 2014): neighbouring numbers become unrelated ones.
fn split_mix(x: u64) -> u64 {
    let z = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_position_and_purpose_has_its_own_seed() {
        let mut seeds = std::collections::BTreeSet::new();
        for (seed, epoch, row) in (0..64).map(|i| (i / 16, i / 4 % 4, i % 4)) {
            for purpose in [Purpose::Order, Purpose::Sample, Purpose::Picture, Purpose::HeldOut] {
                seeds.insert(Draw { seed, epoch, row }.seed(purpose));
            }
        }
        assert_eq!(seeds.len(), 4 * 64);
    }
}
