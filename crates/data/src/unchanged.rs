//! Whether distillation data is trained on as the teacher made it.

use std::path::Path;

use crate::DataError;
use crate::image::{Picture, Resize};
use crate::metadata::{Media, Row};
use crate::video::{Clip, Video};

/// Checks that a row's picture or video already has its training size, and that all frames of a video are trained on.
///
/// It is what the teacher made of a known noise; resized or cut, it is no longer the end of that path. `clip` is the run's;
/// a row's own `num_frames` goes before. Of a picture, only the file's header is read; the frames of a video are counted.
///
/// # Errors
/// If it would be resized or cut, is missing or is unreadable.
pub fn refuse_changes(row: &Row, base: &Path, resize: Resize, clip: Clip) -> Result<(), DataError> {
    let (media, file) = row.media_file(base)?;
    let clip = Clip { num_frames: row.num_frames()?.unwrap_or(clip.num_frames), ..clip };
    let (size, frames) = match media {
        Media::Image => (Picture::size_of(&file)?, None),
        Media::Video => {
            // One more than are taken tells a longer video.
            let header = Video::header(&file, clip.num_frames.saturating_add(1))?;
            (header.size, Some(header.num_frames))
        }
    };
    let (path, number) = (row.path().to_path_buf(), row.number);
    let expected = resize.target_size(size).map_err(|fault| fault.at_row(&path, number))?;
    if size != expected {
        return Err(DataError::WouldResize { path, row: number, file, found: size, expected });
    }
    let Some((frames, expected)) = frames.map(|found| (found, clip.frames_of(found))) else { return Ok(()) };
    if frames == expected {
        return Ok(());
    }
    let found = if frames > clip.num_frames { format!("more than {expected}") } else { frames.to_string() };
    Err(DataError::WouldCut { path, row: number, file, found, expected })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::metadata::Metadata;

    /// What is said of a row of a video of 7 frames of 16x8 px.
    fn refused(columns: &str, values: &str, resize: Resize, num_frames: usize) -> Result<(), String> {
        let folder = tempfile::tempdir().unwrap();
        let frame = Picture { width: 16, height: 8, rgb: vec![100; 3 * 16 * 8] };
        Video::new(vec![frame; 7], None).save(&folder.path().join("a.webp")).unwrap();
        let path = folder.path().join("m.csv");
        fs::write(&path, format!("video,prompt{columns}\na.webp,x{values}\n")).unwrap();
        let row = &Metadata::read(&path).unwrap().rows[0];
        refuse_changes(row, folder.path(), resize, Clip { num_frames, division: 4, remainder: 1 })
            .map_err(|error| error.to_string().replace(&folder.path().display().to_string(), "."))
    }

    #[test]
    fn distillation_refuses_a_video_that_would_be_cut_or_resized() {
        let own = Resize::Exact { height: 8, width: 16 };
        refused("", "", own, 7).unwrap();
        assert_eq!(
            refused("", "", own, 5).unwrap_err(),
            "./m.csv, row 1: ./a.webp has more than 5 frames, but this run trains on 5 and would cut it; distillation \
             needs all of the teacher's frames\nhint: generate videos of 5 frames, or pass their number as --num-frames"
        );
        // Fewer than asked, and no number that the autoencoder takes.
        assert!(refused("", "", own, 9).unwrap_err().contains("has 7 frames, but this run trains on 5"));
        refused(",num_frames", ",7", own, 5).unwrap();
        let resized = refused("", "", Resize::Exact { height: 16, width: 16 }, 7).unwrap_err();
        assert!(
            resized.starts_with("./m.csv, row 1: ./a.webp is 16x8 px, but this run trains at 16x16 px"),
            "{resized}"
        );
    }
}
