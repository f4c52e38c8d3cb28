//! Contact sheets: many pictures in one, without captions, as a training draws them on the way.

use std::path::Path;

use fewstep_data::atomic;
use fewstep_data::image::Picture;

use crate::ReportError;

/// Level of red, green and blue between pictures: a light grey on which white and dark pictures both have an edge.
const MARGIN_LEVEL: u8 = 208;

/// Pictures side by side, row by row.
///
/// Every cell is as large as the largest picture; smaller ones sit in its upper left corner. `margin` pixels lie around
/// each cell.
///
/// # Panics
/// Without pictures or columns.
pub fn contact_sheet(pictures: &[Picture], columns: usize, margin: usize) -> Picture {
    assert!(!pictures.is_empty() && columns > 0, "{} pictures in {columns} columns", pictures.len());
    let columns = columns.min(pictures.len());
    let cell_width = pictures.iter().map(|picture| picture.width).max().unwrap_or(0) + margin;
    let cell_height = pictures.iter().map(|picture| picture.height).max().unwrap_or(0) + margin;
    let width = columns * cell_width + margin;
    let height = pictures.len().div_ceil(columns) * cell_height + margin;
    let mut sheet = Picture { width, height, rgb: vec![MARGIN_LEVEL; width * height * 3] };
    for (index, picture) in pictures.iter().enumerate() {
        let (row, column) = (index / columns, index % columns);
        paste(&mut sheet, picture, margin + row * cell_height, margin + column * cell_width);
    }
    sheet
}

/// Writes a [`contact_sheet`] as png, atomically.
///
/// # Errors
/// When the file cannot be written; an older one is then unchanged.
///
/// # Panics
/// As [`contact_sheet`].
pub fn write_contact_sheet(
    path: &Path,
    pictures: &[Picture],
    columns: usize,
    margin: usize,
) -> Result<(), ReportError> {
    let png = contact_sheet(pictures, columns, margin).to_png();
    atomic::write(path, &png).map_err(|reason| ReportError::Write { path: path.to_owned(), reason })
}

fn paste(sheet: &mut Picture, picture: &Picture, top: usize, left: usize) {
    for (y, row) in picture.rgb.chunks_exact(picture.width * 3).enumerate() {
        let start = ((top + y) * sheet.width + left) * 3;
        sheet.rgb[start..start + row.len()].copy_from_slice(row);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(width: usize, height: usize, level: u8) -> Picture {
        Picture { width, height, rgb: vec![level; width * height * 3] }
    }

    #[test]
    fn pictures_run_row_by_row_with_margins_around() {
        let sheet = contact_sheet(&[plain(2, 1, 1), plain(1, 2, 2), plain(2, 2, 3)], 2, 1);
        let m = MARGIN_LEVEL;
        let expected = [
            [m, m, m, m, m, m, m],
            [m, 1, 1, m, 2, m, m],
            [m, m, m, m, 2, m, m],
            [m, m, m, m, m, m, m],
            [m, 3, 3, m, m, m, m],
            [m, 3, 3, m, m, m, m],
            [m, m, m, m, m, m, m],
        ];
        assert_eq!((sheet.width, sheet.height), (7, 7));
        let red: Vec<u8> = sheet.rgb.chunks_exact(3).map(|pixel| pixel[0]).collect();
        assert_eq!(red, expected.concat());
    }

    #[test]
    fn the_file_holds_the_sheet() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("samples/step_10.png");
        let pictures = [plain(3, 3, 9), plain(3, 3, 200)];
        write_contact_sheet(&path, &pictures, 8, 2).unwrap();
        assert_eq!(Picture::load(&path).unwrap(), contact_sheet(&pictures, 2, 2));
    }
}
