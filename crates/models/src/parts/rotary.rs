//! Angles of rotary position embeddings; the rotation itself happens in the kernels.

use fewstep_kernels::RotaryTable;

/// Inverse frequencies `theta^(−2i/dim)` in f32, rounded as torch rounds them.
pub(crate) fn frequencies(dim: usize, theta: f32) -> impl Iterator<Item = f32> {
    (0..dim / 2).map(move |i| 1.0 / theta.powf((2 * i) as f32 / dim as f32))
}

/// A table with one row of angles per position over several axes side by side. Angles are rounded to f32 as in some
/// peers; their sines and cosines are exact to f32.
///
/// - `positions`: one row per token, one coordinate per axis
/// - `axes`: head dims of each axis; they add up to the head dim
pub(crate) fn table<const AXES: usize>(
    positions: impl Iterator<Item = [f32; AXES]>,
    axes: [usize; AXES],
    theta: f32,
) -> RotaryTable {
    let per_axis = axes.map(|dim| frequencies(dim, theta).collect());
    of_angles(positions, &per_axis, |coordinate, frequency: &f32| f64::from(coordinate * frequency))
}

/// The same of angles that are not rounded, as other peers compute them.
pub(crate) fn exact_table<const AXES: usize>(
    positions: impl Iterator<Item = [usize; AXES]>,
    axes: [usize; AXES],
    theta: f64,
) -> RotaryTable {
    let per_axis = axes.map(|dim| exact_frequencies(dim, theta));
    of_angles(positions, &per_axis, |coordinate, frequency: &f64| coordinate as f64 * frequency)
}

/// The same of angles that are rounded to f32 at the end.
pub(crate) fn rounded_table<const AXES: usize>(
    positions: impl Iterator<Item = [usize; AXES]>,
    axes: [usize; AXES],
    theta: f64,
) -> RotaryTable {
    let per_axis = axes.map(|dim| exact_frequencies(dim, theta));
    let rounded = |coordinate, frequency: &f64| f64::from((coordinate as f64 * frequency) as f32);
    of_angles(positions, &per_axis, rounded)
}

fn exact_frequencies(dim: usize, theta: f64) -> Vec<f64> {
    (0..dim / 2).map(|i| theta.powf((2 * i) as f64 / dim as f64).recip()).collect()
}

fn of_angles<const AXES: usize, P, F>(
    positions: impl Iterator<Item = [P; AXES]>,
    frequencies: &[Vec<F>; AXES],
    angle: impl Fn(P, &F) -> f64,
) -> RotaryTable
where
    P: Copy,
{
    let pairs = frequencies.iter().map(Vec::len).sum();
    let (mut cos, mut sin) = (Vec::new(), Vec::new());
    for position in positions {
        for (coordinate, frequencies) in position.into_iter().zip(frequencies) {
            for frequency in frequencies {
                let angle = angle(coordinate, frequency);
                cos.push(angle.cos() as f32);
                sin.push(angle.sin() as f32);
            }
        }
    }
    RotaryTable::new(cos, sin, pairs)
}
