//! Pictures inside the page: few and small enough that it stays a file one can send.

use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use fewstep_data::image::{Picture, Size};

use super::samples::{SampleSet, Samples, picture_path};

/// Longest side of a picture in the page, in px.
const MAX_SIDE_PX: usize = 256;
/// Pixels of all pictures of the page together; an eight-bit png has up to three bytes for each.
const MAX_PIXELS: usize = 8 << 20;

/// The pictures of a run as they go into its page.
pub(super) struct Embedded {
    run: PathBuf,
    /// Drawings that there is room for.
    room: usize,
}

impl Embedded {
    /// The pictures of a run folder.
    pub(super) fn new(run: &Path, samples: &Samples) -> Self {
        let sets = || samples.steps.iter().map(|(_, set)| set).chain(&samples.teacher);
        let largest = sets().map(pixels).max().unwrap_or(0);
        let room = (MAX_PIXELS / largest.max(1)).saturating_sub(usize::from(samples.teacher.is_some()));
        Self { run: run.to_owned(), room: room.max(2) }
    }

    /// As many of the drawings as there is room for, the first and the last among them.
    pub(super) fn chosen<'a>(&self, steps: &'a [(u64, SampleSet)]) -> Vec<&'a (u64, SampleSet)> {
        let (count, room) = (steps.len(), self.room);
        if count <= room {
            return steps.iter().collect();
        }
        (0..room).map(|index| &steps[index * (count - 1) / (room - 1)]).collect()
    }

    /// A picture as a data address; `None` where it cannot be read.
    pub(super) fn picture(&self, set: &str, index: usize) -> Option<String> {
        let path = self.run.join(picture_path(set, &super::picture_file(index))?);
        let picture = Picture::load(&path).ok()?;
        let size = shown(picture.size());
        let picture = if size == picture.size() { picture } else { picture.crop_and_resize(size) };
        Some(format!("data:image/png;base64,{}", STANDARD.encode(picture.to_png())))
    }
}

/// Pixels that a drawing adds to the page.
fn pixels(set: &SampleSet) -> usize {
    let size = shown(Size { height: set.height, width: set.width });
    size.height * size.width * set.samples.len()
}

/// The size a picture has in the page.
fn shown(size: Size) -> Size {
    let longest = size.height.max(size.width);
    if longest <= MAX_SIDE_PX {
        return size;
    }
    let scaled = |side: usize| (side * MAX_SIDE_PX / longest).max(1);
    Size { height: scaled(size.height), width: scaled(size.width) }
}

#[cfg(test)]
mod tests {
    use super::super::samples::Sample;
    use super::*;

    fn set(side: usize, count: usize) -> SampleSet {
        let samples = vec![Sample { prompt: String::new(), seed: 0 }; count];
        SampleSet { num_inference_steps: 4, cfg_scale: 1.0, height: side, width: side, samples }
    }

    #[test]
    fn the_first_and_the_last_drawing_stay_when_there_is_no_room_for_all() {
        let steps = |side| (0..1000).map(|step| (step, set(side, 9))).collect::<Vec<_>>();
        let chosen = |side: usize| -> Vec<u64> {
            let samples = Samples { steps: steps(side), teacher: Some(set(side, 9)) };
            let embedded = Embedded::new(Path::new("."), &samples);
            embedded.chosen(&samples.steps).iter().map(|(step, _)| *step).collect()
        };
        for side in [64, 1024] {
            let found = chosen(side);
            let room = MAX_PIXELS / (9 * side.min(MAX_SIDE_PX).pow(2)) - 1;
            assert_eq!((found.len(), found[0], found[room - 1]), (room, 0, 999));
            assert!(found.is_sorted());
        }
    }

    #[test]
    fn large_pictures_shrink_and_keep_their_shape() {
        let size = |height, width| Size { height, width };
        assert_eq!(shown(size(64, 200)), size(64, 200));
        assert_eq!(shown(size(1024, 512)), size(256, 128));
        assert_eq!(shown(size(1, 16_384)), size(1, 256));
    }
}
