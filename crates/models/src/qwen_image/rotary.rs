//! Positions of text and image tokens in the joint sequence.

use fewstep_kernels::RotaryTable;

use crate::parts::rotary::table;

const THETA: f32 = 10_000.0;

/// Angles of `text` text tokens followed by `rows × columns` image tokens over the axes (frame, row,
/// column).
///
/// Image rows and columns are centred: −(n − n/2) … n/2 − 1. Text starts where the larger half ends
/// and has the same index on all axes (diffusers' `QwenEmbedRope` with `scale_rope`).
pub(super) fn joint_table(text: usize, [rows, columns]: [usize; 2], axes: [usize; 3]) -> RotaryTable {
    let start = (rows / 2).max(columns / 2);
    let text = (start..start + text).map(|index| [index as f32; 3]);
    let centred = |index: usize, count: usize| index as f32 - (count - count / 2) as f32;
    let image = (0..rows)
        .flat_map(|row| (0..columns).map(move |column| [0.0, centred(row, rows), centred(column, columns)]));
    table(text.chain(image), axes, THETA)
}
