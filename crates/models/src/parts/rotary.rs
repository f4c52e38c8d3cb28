//! Angles of rotary position embeddings; the rotation itself happens in the kernels.

use fewstep_kernels::RotaryTable;

/// Inverse frequencies `theta^(−2i/dim)` in f32, rounded as torch rounds them.
pub(crate) fn frequencies(dim: usize, theta: f32) -> impl Iterator<Item = f32> {
    (0..dim / 2).map(move |i| 1.0 / theta.powf((2 * i) as f32 / dim as f32))
}

/// A table with one row of angles per position over several axes side by side.
///
/// - `positions`: one row per token, one coordinate per axis
/// - `axes`: head dims of each axis; they add up to the head dim
pub(crate) fn table<const AXES: usize>(
    positions: impl Iterator<Item = [f32; AXES]>,
    axes: [usize; AXES],
    theta: f32,
) -> RotaryTable {
    let per_axis: Vec<Vec<f32>> = axes.iter().map(|dim| frequencies(*dim, theta).collect()).collect();
    let pairs = axes.iter().sum::<usize>() / 2;
    let (mut cos, mut sin) = (Vec::new(), Vec::new());
    for position in positions {
        for (coordinate, frequencies) in position.iter().zip(&per_axis) {
            for frequency in frequencies {
                // The angle is rounded to f32 as in the peers; its sine and cosine are exact to f32.
                let angle = f64::from(coordinate * frequency);
                cos.push(angle.cos() as f32);
                sin.push(angle.sin() as f32);
            }
        }
    }
    RotaryTable::new(cos, sin, pairs)
}
