//! PIL's antialiased bilinear resampling, to the bit.
//!
//! PIL (`src/libImaging/Resample.c`) filters one axis, rounds to 8 bits, then filters the other. Weights are computed in f64,
//! normalised and rounded to [`PRECISION_BITS`] fractional bits; sums are integers. Every step is repeated here, since a
//! float filter differs by a level here and there.

use super::{Picture, Size};

/// 32 bits less 8 for the level and 2 for sums that overshoot.
const PRECISION_BITS: u32 = 32 - 8 - 2;

/// The weights of the input samples that one output sample is made of.
struct Window {
    start: usize,
    weights: Vec<i32>,
}

/// Scales a picture to exactly `target`; a side that fits already is left untouched.
pub(super) fn bilinear(picture: &Picture, target: Size) -> Picture {
    if columns_first(picture.size(), target) {
        return filter_rows(&filter_columns(picture, target.height), target.width);
    }
    let mut picture = picture.clone();
    if target.width != picture.width {
        picture = filter_rows(&picture, target.width);
    }
    if target.height != picture.height {
        picture = filter_columns(&picture, target.height);
    }
    picture
}

/// Whether PIL filters columns before rows, which rounds otherwise: read off Pillow 13.0, where it holds for each of 391
/// random pairs of sizes. Earlier versions always filter rows first.
fn columns_first(from: Size, to: Size) -> bool {
    let shrinks = |from: usize, to: usize| from as i64 - to as i64;
    let (by_height, by_width) = (shrinks(from.height, to.height), shrinks(from.width, to.width));
    from.width != to.width && by_height > 0 && by_height > 2 * by_width
}

fn filter_rows(picture: &Picture, width: usize) -> Picture {
    let windows = windows(picture.width, width);
    let rows = picture.rgb.chunks_exact(3 * picture.width);
    let pixels = rows.flat_map(|row| {
        windows.iter().flat_map(|window| [0, 1, 2].map(|channel| window.apply(|at| row[3 * at + channel])))
    });
    Picture { width, height: picture.height, rgb: pixels.collect() }
}

fn filter_columns(picture: &Picture, height: usize) -> Picture {
    let stride = 3 * picture.width;
    let windows = windows(picture.height, height);
    let rows = windows
        .iter()
        .flat_map(|window| (0..stride).map(|x| window.apply(|at| picture.rgb[at * stride + x])));
    Picture { width: picture.width, height, rgb: rows.collect() }
}

/// One window for each of `output` samples along a side of `input` samples.
fn windows(input: usize, output: usize) -> Vec<Window> {
    let scale = input as f64 / output as f64;
    // Enlarging, the triangle spans one input sample to each side; shrinking, one output sample.
    let stretch = scale.max(1.0);
    (0..output)
        .map(|at| {
            let centre = (at as f64 + 0.5) * scale;
            let start = (centre - stretch + 0.5).max(0.0) as usize;
            let end = ((centre + stretch + 0.5) as usize).min(input);
            let triangle = |x: usize| (1.0 - ((x as f64 - centre + 0.5) * (1.0 / stretch)).abs()).max(0.0);
            Window { start, weights: fixed_point((start..end).map(triangle).collect()) }
        })
        .collect()
}

fn fixed_point(weights: Vec<f64>) -> Vec<i32> {
    let total: f64 = weights.iter().sum();
    let one = f64::from(1 << PRECISION_BITS);
    weights.iter().map(|weight| (0.5 + weight / total * one) as i32).collect()
}

impl Window {
    fn apply(&self, sample: impl Fn(usize) -> u8) -> u8 {
        let half = 1 << (PRECISION_BITS - 1);
        let terms =
            self.weights.iter().enumerate().map(|(at, weight)| weight * i32::from(sample(self.start + at)));
        ((half + terms.sum::<i32>()) >> PRECISION_BITS).clamp(0, 255) as u8
    }
}
