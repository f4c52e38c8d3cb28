//! How pictures look, in numbers that see the failures of few-step students: saturation, contrast, sharpness, and how
//! far apart the pictures of one prompt are.
//!
//! Levels are taken as 0 to 1. Nothing here knows of a reference: a caller compares the student's numbers with the
//! teacher's.

use fewstep_data::image::Picture;

/// What a set of pictures looks like on average.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Appearance {
    /// Mean over the pixels of largest less smallest channel: 0 is grey, 1 a pure colour.
    pub saturation: f64,
    /// Standard deviation of the brightness within a picture.
    pub contrast: f64,
    /// Root mean square of the brightness's second difference (four neighbours less four times the pixel). Blur takes
    /// it away first, noise raises it.
    pub sharpness: f64,
}

impl Appearance {
    /// The mean over pictures; `None` without any.
    pub fn of(pictures: &[Picture]) -> Option<Self> {
        let mean =
            |measure: fn(&Picture) -> f64| pictures.iter().map(measure).sum::<f64>() / pictures.len() as f64;
        (!pictures.is_empty()).then(|| Self {
            saturation: mean(saturation),
            contrast: mean(contrast),
            sharpness: mean(sharpness),
        })
    }
}

/// The distance of two pictures, averaged over all pairs within each group and then over the groups; `None` where no
/// group has two.
///
/// # Panics
/// When two pictures of a group differ in size, or a group names a picture that is not there.
pub fn diversity(pictures: &[Picture], groups: &[Vec<usize>]) -> Option<f64> {
    let within = |group: &Vec<usize>| {
        let pairs: Vec<f64> = group
            .iter()
            .enumerate()
            .flat_map(|(at, first)| group[at + 1..].iter().map(move |second| (*first, *second)))
            .map(|(first, second)| distance(&pictures[first], &pictures[second]))
            .collect();
        (!pairs.is_empty()).then(|| pairs.iter().sum::<f64>() / pairs.len() as f64)
    };
    let groups: Vec<f64> = groups.iter().filter_map(within).collect();
    (!groups.is_empty()).then(|| groups.iter().sum::<f64>() / groups.len() as f64)
}

/// Root mean square difference of two pictures' levels.
fn distance(a: &Picture, b: &Picture) -> f64 {
    assert_eq!(a.size(), b.size(), "sizes of two pictures to compare");
    let squares: u64 = a.rgb.iter().zip(&b.rgb).map(|(a, b)| u64::from(a.abs_diff(*b)).pow(2)).sum();
    (squares as f64 / a.rgb.len() as f64).sqrt() / WHITE
}

fn saturation(picture: &Picture) -> f64 {
    let chroma = |pixel: &[u8]| {
        let (low, high) =
            pixel.iter().fold((u8::MAX, 0), |(low, high), level| (low.min(*level), high.max(*level)));
        f64::from(high - low)
    };
    let sum: f64 = picture.rgb.chunks_exact(3).map(chroma).sum();
    sum / (picture.width * picture.height) as f64 / WHITE
}

fn contrast(picture: &Picture) -> f64 {
    let brightness = brightness(picture);
    let count = brightness.len() as f64;
    let mean = brightness.iter().sum::<f64>() / count;
    (brightness.iter().map(|level| (level - mean).powi(2)).sum::<f64>() / count).sqrt()
}

/// 0 for pictures that have no pixel with four neighbours.
fn sharpness(picture: &Picture) -> f64 {
    let (width, height) = (picture.width, picture.height);
    if width < 3 || height < 3 {
        return 0.0;
    }
    let brightness = brightness(picture);
    let second_difference = |row: usize, column: usize| {
        let at = row * width + column;
        let neighbours =
            brightness[at - width] + brightness[at + width] + brightness[at - 1] + brightness[at + 1];
        neighbours - 4.0 * brightness[at]
    };
    let inner = (1..height - 1).flat_map(|row| (1..width - 1).map(move |column| (row, column)));
    let squares: f64 = inner.map(|(row, column)| second_difference(row, column).powi(2)).sum();
    (squares / ((width - 2) * (height - 2)) as f64).sqrt()
}

/// The level of white in a picture.
const WHITE: f64 = 255.0;

/// Luma of ITU-R BT.601 of each pixel, row by row.
fn brightness(picture: &Picture) -> Vec<f64> {
    let luma = |pixel: &[u8]| {
        let [red, green, blue] = [0, 1, 2].map(|channel| f64::from(pixel[channel]));
        (0.299 * red + 0.587 * green + 0.114 * blue) / WHITE
    };
    picture.rgb.chunks_exact(3).map(luma).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture(width: usize, pixels: &[[u8; 3]]) -> Picture {
        Picture { width, height: pixels.len() / width, rgb: pixels.concat() }
    }

    fn grey(width: usize, levels: &[u8]) -> Picture {
        picture(width, &levels.iter().map(|level| [*level; 3]).collect::<Vec<_>>())
    }

    #[track_caller]
    fn assert_close(found: f64, expected: f64) {
        assert!((found - expected).abs() < 1e-12, "found {found}, expected {expected}");
    }

    #[test]
    fn saturation_is_the_mean_spread_of_the_channels() {
        let colours = picture(2, &[[255, 0, 0], [10, 61, 20], [7, 7, 7], [255, 255, 204]]);
        assert_close(saturation(&colours), (1.0 + 0.2 + 0.0 + 0.2) / 4.0);
        assert_close(saturation(&grey(2, &[0, 255])), 0.0);
    }

    #[test]
    fn contrast_is_the_standard_deviation_of_brightness() {
        // Mean 1/2, deviations of 1/2 each; three quarters black: mean 1/4, variance 3/16.
        assert_close(contrast(&grey(2, &[0, 255, 255, 0])), 0.5);
        assert_close(contrast(&grey(2, &[0, 0, 0, 255])), 0.1875_f64.sqrt());
        assert_close(contrast(&picture(2, &[[255, 0, 0], [0, 0, 255]])), (0.299 - 0.114) / 2.0);
    }

    #[test]
    fn sharpness_is_the_second_difference_and_does_not_see_ramps() {
        // One white pixel in black: -4 at its place, +1 at two of its neighbours that lie inside.
        let point = grey(4, &[0, 0, 0, 0, 0, 255, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_close(sharpness(&point), ((16.0 + 1.0 + 1.0) / 4.0_f64).sqrt());
        assert_close(sharpness(&grey(3, &[0, 10, 20, 10, 20, 30, 20, 30, 40])), 0.0);
        assert_close(sharpness(&grey(2, &[0, 255, 255, 0])), 0.0);
    }

    #[test]
    fn diversity_averages_pairs_within_groups_and_then_groups() {
        let pictures = [0, 51, 153, 255, 255].map(|level| grey(1, &[level]));
        // Pairs of the first group are 0.2, 0.6 and 0.4 apart, those of the second 0: (0.4 + 0) / 2.
        assert_close(diversity(&pictures, &[vec![0, 1, 2], vec![3, 4]]).unwrap(), 0.2);
        assert_eq!(diversity(&pictures, &[vec![0], vec![1]]), None);
        // Half of the pixels 1 apart: the root of the mean square.
        let halves = [grey(2, &[0, 0]), grey(2, &[0, 255])];
        assert_close(diversity(&halves, &[vec![0, 1]]).unwrap(), 0.5_f64.sqrt());
    }

    #[test]
    fn the_appearance_of_a_set_is_the_mean_over_its_pictures() {
        let set = [picture(2, &[[255, 0, 0], [255, 0, 0]]), grey(2, &[0, 255])];
        let found = Appearance::of(&set).unwrap();
        assert_close(found.saturation, 0.5);
        assert_close(found.contrast, 0.25);
        assert_eq!(Appearance::of(&[]), None);
    }
}
