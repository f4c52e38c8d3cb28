//! Which frames of a video are trained on.

use super::MAX_FRAMES;

/// The frames that are taken of a video, as DiffSynth's `LoadVideo` and `LoadGIF` do: the first ones at the file's own rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clip {
    /// So many of a video that has them; at most [`MAX_FRAMES`].
    pub num_frames: usize,
    /// Of a shorter video, the largest number that leaves [`Self::remainder`] when it is divided by this, and otherwise 1:
    /// what the family's autoencoder takes (4 and 1 where a latent frame stands for four). At least 1.
    pub division: usize,
    /// See [`Self::division`].
    pub remainder: usize,
}

impl Clip {
    /// Every frame.
    pub const WHOLE: Self = Self { num_frames: MAX_FRAMES, division: 1, remainder: 0 };

    /// How many frames are taken of a video that has so many.
    pub fn frames_of(self, available: usize) -> usize {
        if available >= self.num_frames {
            return self.num_frames;
        }
        let fits = |frames: &usize| frames % self.division == self.remainder;
        (2..=available).rev().find(fits).unwrap_or(available.min(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shorter_video_is_cut_to_what_the_autoencoder_takes() {
        let clip = |num_frames| Clip { num_frames, division: 4, remainder: 1 };
        let taken: Vec<usize> = (0..=12).map(|available| clip(9).frames_of(available)).collect();
        assert_eq!(taken, [0, 1, 1, 1, 1, 5, 5, 5, 5, 9, 9, 9, 9]);
        // A number that does not fit is the caller's, and taken as it is.
        assert_eq!([3, 6, 7, 8].map(|available| clip(7).frames_of(available)), [1, 5, 7, 7]);
        assert_eq!([0, 1, 7].map(|available| Clip::WHOLE.frames_of(available)), [0, 1, 7]);
    }
}
