//! A picture of pictures, to see at a glance whether the styles were drawn right.

use std::path::Path;

use anyhow::Result;
use fewstep_data::emoji::{EmojiSet, SIDE_PX, Style};
use fewstep_data::image::Picture;

/// Concepts side by side, each with all styles.
const CONCEPTS_PER_ROW: usize = 6;

/// Draws `wanted` concepts, spread evenly over the set, in all styles.
pub(crate) fn draw(emoji: &Path, output: &Path, wanted: usize) -> Result<()> {
    let set = EmojiSet::open(emoji)?;
    let all = set.concepts().len();
    let wanted = wanted.clamp(1, all);
    let items: Vec<_> = set.items().collect();
    let chosen: Vec<_> = (0..wanted)
        .flat_map(|at| &items[Style::ALL.len() * (at * all / wanted)..][..Style::ALL.len()])
        .collect();
    let columns = CONCEPTS_PER_ROW * Style::ALL.len();
    let (width, height) = (columns * SIDE_PX, chosen.len().div_ceil(columns) * SIDE_PX);
    let mut sheet = Picture { width, height, rgb: vec![255; 3 * width * height] };
    for (at, item) in chosen.iter().enumerate() {
        paste(&mut sheet, item.picture, (at % columns * SIDE_PX, at / columns * SIDE_PX));
    }
    Ok(sheet.save_png(output)?)
}

fn paste(sheet: &mut Picture, picture: &Picture, (left, top): (usize, usize)) {
    for (row, pixels) in picture.rgb.chunks_exact(3 * picture.width).enumerate() {
        let start = 3 * ((top + row) * sheet.width + left);
        sheet.rgb[start..start + pixels.len()].copy_from_slice(pixels);
    }
}
