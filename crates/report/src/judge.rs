//! The judge: a fixed network whose features say how alike two pictures look.
//!
//! Features are MobileNetV2's (see [`Judge`] for the exact preparation of a picture); what is computed from them is in
//! [`crate::metrics`]. They are on the CPU and have no gradient: nothing is trained towards them.

use std::path::Path;

use fewstep_data::image::Picture;
use rayon::prelude::*;

use crate::ReportError;
use crate::mobilenet::{FEATURES, Maps, MobileNet};

/// Side in pixels of the pictures that the network sees.
const SIDE: usize = 128;
/// ImageNet's mean of red, green and blue in [0, 1].
const MEAN: [f32; 3] = [0.485, 0.456, 0.406];
/// ImageNet's standard deviation of red, green and blue.
const DEVIATION: [f32; 3] = [0.229, 0.224, 0.225];
/// Pictures that go through the network together: the late layers have 16 pixels a picture, too few rows for a fast
/// product. Measured on two busy cores: about 160 pictures/s one by one, about 200 from two on.
const BATCH: usize = 4;

/// MobileNetV2 features of pictures.
///
/// A picture is resized to 128 × 128 px, whatever its proportions, by bilinear interpolation between the four nearest
/// pixel centres (half-pixel centres, edges repeated, no antialiasing, not rounded back to 8 bits; torch's
/// `interpolate(mode="bilinear", align_corners=False)`), then brought to ImageNet's mean and deviation. Made for small
/// pictures: from more than 256 px on, pixels are skipped.
pub struct Judge {
    network: MobileNet,
}

/// Features of several pictures, one row each.
#[derive(Debug, Clone, PartialEq)]
pub struct Features {
    values: Vec<f32>,
    width: usize,
}

impl Judge {
    /// Name of the bundled weights, in `assets/judge`.
    pub const FILE: &str = "mobilenet_v2_features_bnfold_f16.safetensors";

    /// Reads the weights, a safetensors file with torchvision's names and batch norm folded in.
    ///
    /// # Errors
    /// When the file cannot be read or is not exactly this network.
    pub fn load(path: &Path) -> Result<Self, ReportError> {
        let bytes =
            std::fs::read(path).map_err(|reason| ReportError::Read { path: path.to_owned(), reason })?;
        Ok(Self { network: MobileNet::load(path, &bytes)? })
    }

    /// The features of each picture, on all threads.
    ///
    /// # Panics
    /// When a picture's bytes are not three for each of its pixels.
    pub fn features(&self, pictures: &[Picture]) -> Features {
        let values =
            pictures.par_chunks(BATCH).flat_map(|batch| self.network.features(prepare(batch))).collect();
        Features { values, width: FEATURES }
    }
}

impl Features {
    /// Features from elsewhere: `values` holds rows of `width` numbers.
    ///
    /// # Panics
    /// When `values` is no whole number of rows.
    pub fn new(values: Vec<f32>, width: usize) -> Self {
        assert!(
            width > 0 && values.len().is_multiple_of(width),
            "{} values in rows of {width}",
            values.len()
        );
        Self { values, width }
    }

    /// Number of pictures.
    pub fn count(&self) -> usize {
        self.values.len() / self.width
    }

    /// Numbers per picture.
    pub fn width(&self) -> usize {
        self.width
    }

    /// All rows, one after the other.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// The rows at these indices, in this order.
    pub fn select(&self, indices: &[usize]) -> Self {
        let rows = indices.iter().flat_map(|index| &self.values[index * self.width..][..self.width]);
        Self { values: rows.copied().collect(), width: self.width }
    }
}

/// The network's input, `[B, H, W, C]`.
fn prepare(pictures: &[Picture]) -> Maps {
    let mut values = vec![0.0; pictures.len() * SIDE * SIDE * 3];
    for (picture, output) in pictures.iter().zip(values.chunks_exact_mut(SIDE * SIDE * 3)) {
        resize(picture, output);
        for pixel in output.chunks_exact_mut(3) {
            (0..3).for_each(|c| pixel[c] = (pixel[c] / 255.0 - MEAN[c]) / DEVIATION[c]);
        }
    }
    Maps { values, side: SIDE, channels: 3 }
}

fn resize(picture: &Picture, output: &mut [f32]) {
    let Picture { width, height, ref rgb } = *picture;
    assert_eq!(rgb.len(), width * height * 3, "bytes of a picture of {width}x{height} px");
    let (rows, columns) = (neighbours(height), neighbours(width));
    let at = |y: usize, x: usize, c: usize| f32::from(rgb[(y * width + x) * 3 + c]);
    for (index, value) in output.iter_mut().enumerate() {
        let (below, right, c) = (&rows[index / 3 / SIDE], &columns[index / 3 % SIDE], index % 3);
        let row = |y| at(y, right.low, c) * (1.0 - right.share) + at(y, right.high, c) * right.share;
        *value = row(below.low) * (1.0 - below.share) + row(below.high) * below.share;
    }
}

/// The two pixels along one axis that an output pixel lies between.
struct Between {
    low: usize,
    high: usize,
    /// Weight of `high`, in [0, 1).
    share: f32,
}

/// For each of [`SIDE`] output pixels, its neighbours among `size` pixels.
fn neighbours(size: usize) -> Vec<Between> {
    let position = |index: usize| ((index as f32 + 0.5) * size as f32 / SIDE as f32 - 0.5).max(0.0);
    let between = |at: f32| {
        let low = (at as usize).min(size - 1);
        Between { low, high: (low + 1).min(size - 1), share: at - low as f32 }
    };
    (0..SIDE).map(|index| between(position(index))).collect()
}

#[cfg(test)]
mod tests {
    use fewstep_testkit::{Golden, assert_close, golden};

    use super::*;

    fn judge() -> Judge {
        let assets = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/judge");
        Judge::load(&assets.join(Judge::FILE)).unwrap()
    }

    fn picture(name: &str) -> Picture {
        Picture::load(&golden(&format!("judge/{name}.png"))).unwrap()
    }

    /// f32 against float64 in 53 layers at features up to 6: measured 6e-6.
    const TOLERANCE: f32 = 5e-5;

    #[test]
    fn features_equal_the_float64_reference() {
        let features = judge().features(&[picture("square"), picture("wide")]);
        let reference = Golden::open(golden("judge/judge.safetensors"));
        assert_eq!((features.count(), features.width()), (2, FEATURES));
        assert_close(features.select(&[0]).values(), &reference.f32s("square"), TOLERANCE);
        assert_close(features.select(&[1]).values(), &reference.f32s("wide"), TOLERANCE);
    }

    #[test]
    fn features_do_not_depend_on_the_pictures_beside() {
        let judge = judge();
        let pictures: Vec<Picture> =
            ["square", "wide"].into_iter().cycle().take(2 * BATCH + 1).map(picture).collect();
        let together = judge.features(&pictures);
        for (index, alone) in pictures.iter().enumerate() {
            let alone = judge.features(std::slice::from_ref(alone));
            // Another number of rows may take another kernel of the product.
            assert_close(together.select(&[index]).values(), alone.values(), TOLERANCE);
        }
    }

    #[test]
    fn a_resize_to_twice_the_size_mixes_three_quarters_with_one() {
        let row = |index: usize| neighbours(SIDE / 2)[index].share;
        assert_eq!([row(0), row(1), row(2), row(3)], [0.0, 0.25, 0.75, 0.25]);
        let last = neighbours(SIDE / 2).pop().unwrap();
        assert_eq!((last.low, last.high), (SIDE / 2 - 1, SIDE / 2 - 1));
    }

    #[test]
    fn a_resize_to_the_same_size_changes_nothing() {
        let rgb: Vec<u8> = (0..SIDE * SIDE * 3).map(|index| (index * 7 % 251) as u8).collect();
        let mut output = vec![0.0; rgb.len()];
        resize(&Picture { width: SIDE, height: SIDE, rgb: rgb.clone() }, &mut output);
        assert_eq!(output, rgb.into_iter().map(f32::from).collect::<Vec<_>>());
    }

    #[test]
    fn a_truncated_file_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("judge.safetensors");
        std::fs::write(&path, [9, 0, 0, 0, 0, 0, 0, 0, b'{']).unwrap();
        let message = Judge::load(&path).err().unwrap().to_string();
        assert!(message.contains("judge.safetensors is no whole safetensors file"), "{message}");
    }
}
