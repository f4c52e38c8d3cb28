//! Where rows come from: a metadata file, or the bundled emoji set.

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fewstep_data::DataError;
use fewstep_data::emoji::{CONCEPTS_FILE, EmojiSet, Item};
use fewstep_data::image::{Picture, Resize};
use fewstep_data::metadata::{Media, Metadata, RandDevice, Row};
use fewstep_data::refuse_changes;
use fewstep_data::video::{Clip, MAX_FRAMES, Video};
use fewstep_models::{Extent, Model};

use crate::TrainError;
use crate::recipe::{Objective, Recipe, ResizedTargets};

/// How pictures and videos are brought to their training size.
#[derive(Clone, Copy)]
pub(crate) struct Fit {
    /// Of pictures, and of a video's frames.
    pub(crate) resize: Resize,
    /// Frames of videos whose rows do not say how many.
    pub(crate) clip: Clip,
}

/// The most frames that supervised training takes of a video where nobody says: the peer's.
const USUAL_FRAMES: usize = 81;

impl Fit {
    /// A recipe's. Without a model only the sizes that a recipe fixes are known.
    pub(crate) fn of(recipe: &Recipe, model: Option<&Model>) -> Self {
        let division = model.map_or(1, Model::division_factor);
        let resize = match (recipe.height, recipe.width) {
            (Some(height), Some(width)) => Resize::Exact { height, width },
            _ => Resize::MaxPixels { max_pixels: recipe.max_pixels, division },
        };
        let usual = match recipe.task.objective() {
            Objective::FlowMatching => USUAL_FRAMES,
            Objective::Distillation => MAX_FRAMES, // all that the teacher drew
        };
        let (division, remainder) = match model.and_then(Model::frames_per_latent) {
            Some(step) => (step, 1 % step),
            None => (1, 0),
        };
        let num_frames = recipe.num_frames.unwrap_or(usual);
        Self { resize, clip: Clip { num_frames, division, remainder } }
    }
}

/// A row before anything of it is loaded.
#[derive(Clone)]
pub(crate) struct SourceRow {
    /// Absent where the teacher's picture is made during training.
    pub(crate) picture: Option<PictureSource>,
    /// The caption.
    pub(crate) prompt: String,
    /// Seed of the initial noise, where the row has one.
    pub(crate) seed: Option<u64>,
    /// The generator of that noise.
    pub(crate) rand_device: RandDevice,
    /// The student's sampling steps; 0 where the task has none.
    pub(crate) num_inference_steps: usize,
    /// The student's guidance; 1 is off.
    pub(crate) cfg_scale: f32,
    /// The guidance scale that the denoiser is told, where it takes one; `None` leaves it to the model.
    pub(crate) embedded_guidance: Option<f32>,
    /// Size of what rows without a picture stand for.
    pub(crate) extent: Option<Extent>,
}

/// A picture or a video that is not loaded yet, or that the data set holds in memory.
#[derive(Clone)]
pub(crate) enum PictureSource {
    /// A file.
    File(PathBuf),
    /// A video, and how many of its frames its row takes, where it says so.
    Video(PathBuf, Option<usize>),
    /// A picture of the bundled set, with a name of its own.
    Bundled(String, Arc<Picture>),
}

impl PictureSource {
    /// Tells pictures apart.
    pub(crate) fn name(&self) -> Cow<'_, str> {
        match self {
            Self::File(path) | Self::Video(path, None) => path.to_string_lossy(),
            Self::Video(path, Some(frames)) => format!("{} frames of {}", frames, path.display()).into(),
            Self::Bundled(name, _) => Cow::Borrowed(name),
        }
    }

    /// Its file; none of the bundled set.
    pub(crate) fn path(&self) -> Option<&Path> {
        match self {
            Self::File(path) | Self::Video(path, _) => Some(path),
            Self::Bundled(..) => None,
        }
    }

    /// The picture itself, or the frames of a video below each other, scaled and cut to a size where it has another.
    pub(crate) fn load(&self, extent: Extent) -> Result<Picture, TrainError> {
        let picture = match self {
            Self::File(path) => Picture::load(path)?,
            Self::Video(path, _) => {
                let resize = Resize::Exact { height: extent.height, width: extent.width };
                let clip = Clip { num_frames: extent.frames, ..Clip::WHOLE };
                return Ok(Video::load_resized(path, clip, resize)?.stacked());
            }
            Self::Bundled(_, picture) => Picture::clone(picture),
        };
        let size = extent.size();
        Ok(if size == picture.size() { picture } else { picture.crop_and_resize(size) })
    }

    /// Its size, from the header alone; the frames of a video are counted.
    pub(crate) fn extent(&self) -> Result<Extent, TrainError> {
        match self {
            Self::Video(path, _) => {
                let header = Video::header(path, MAX_FRAMES)?;
                Ok(Extent::of_frames(header.size, header.num_frames))
            }
            Self::File(path) => Ok(Picture::size_of(path)?.into()),
            Self::Bundled(_, picture) => Ok(picture.size().into()),
        }
    }

    /// The size it is trained at.
    pub(crate) fn target(&self, fit: Fit) -> Result<Extent, TrainError> {
        let found = self.extent()?;
        let frames = match self {
            Self::Video(_, own) => {
                Clip { num_frames: own.unwrap_or(fit.clip.num_frames), ..fit.clip }.frames_of(found.frames)
            }
            Self::File(_) | Self::Bundled(..) => 1,
        };
        Ok(Extent::of_frames(fit.resize.target_size(found.size())?, frames))
    }
}

/// The rows a recipe trains on.
///
/// # Errors
/// If the metadata is missing or malformed, a distillation picture would be resized, or there are no rows.
pub(crate) fn rows(recipe: &Recipe, fit: Fit) -> Result<Vec<SourceRow>, TrainError> {
    checked_rows(recipe, fit)?.into_iter().collect()
}

/// Every row of the metadata: what it says, or what is wrong with it.
///
/// # Errors
/// If there is no metadata, it cannot be read at all, or has no rows.
pub(crate) fn checked_rows(
    recipe: &Recipe,
    fit: Fit,
) -> Result<Vec<Result<SourceRow, TrainError>>, TrainError> {
    let base = &recipe.dataset_base_path;
    let rows: Vec<Result<SourceRow, TrainError>> = match (metadata_path(recipe), recipe.task.objective()) {
        (None, Objective::FlowMatching) if is_emoji(base) => emoji_rows(base)?.into_iter().map(Ok).collect(),
        (None, Objective::Distillation) if is_emoji(base) && recipe.online_teacher => emoji_prompts(recipe)?,
        (None, _) => return Err(TrainError::NoMetadata { path: base.clone() }),
        (Some(path), _) => {
            let read = |row: Result<Row, DataError>| read_row(&row?, recipe, fit);
            Metadata::read_rows(&path)?.into_iter().map(read).collect()
        }
    };
    match rows.is_empty() {
        true => Err(TrainError::Empty { path: metadata_path(recipe).unwrap_or(base.clone()) }),
        false => Ok(rows),
    }
}

/// What a row of metadata says in a recipe's task.
fn read_row(row: &Row, recipe: &Recipe, fit: Fit) -> Result<SourceRow, TrainError> {
    let base = &recipe.dataset_base_path;
    match recipe.task.objective() {
        Objective::FlowMatching => picture_row(row, recipe),
        Objective::Distillation if recipe.online_teacher => prompt_row(row, recipe),
        Objective::Distillation => {
            if recipe.resized_targets == ResizedTargets::Refuse {
                refuse_changes(row, base, fit.resize, fit.clip)?;
            }
            distill_row(row, recipe)
        }
    }
}

/// The metadata file named, or the one a data set folder has by custom.
pub(crate) fn metadata_path(recipe: &Recipe) -> Option<PathBuf> {
    let custom = || {
        let names = ["metadata.csv", "metadata.json", "metadata.jsonl"];
        names.iter().map(|name| recipe.dataset_base_path.join(name)).find(|path| path.is_file())
    };
    recipe.dataset_metadata_path.clone().or_else(custom)
}

/// What a denoiser that follows a scale is told in supervised training, as in the peers: pictures were not drawn with
/// guidance.
const UNGUIDED: f32 = 1.0;

fn picture_row(row: &Row, recipe: &Recipe) -> Result<SourceRow, TrainError> {
    let plain = with_picture(media(row, recipe)?, row.text("prompt")?);
    Ok(SourceRow { embedded_guidance: told(row, recipe)?.or(Some(UNGUIDED)), ..plain })
}

/// The picture or video of a row.
fn media(row: &Row, recipe: &Recipe) -> Result<PictureSource, TrainError> {
    match row.media_file(&recipe.dataset_base_path)? {
        (Media::Image, path) => Ok(PictureSource::File(path)),
        (Media::Video, path) => Ok(PictureSource::Video(path, row.num_frames()?)),
    }
}

/// The scale that the denoiser is told: the row's own, otherwise the recipe's.
fn told(row: &Row, recipe: &Recipe) -> Result<Option<f32>, TrainError> {
    const COLUMN: &str = "embedded_guidance";
    let own = row.optional_number(COLUMN)?;
    Ok(own.or(recipe.embedded_guidance.map(|scale| scale as f32)))
}

fn with_picture(picture: PictureSource, prompt: &str) -> SourceRow {
    let prompt = prompt.to_owned();
    SourceRow {
        picture: Some(picture),
        prompt,
        seed: None,
        rand_device: RandDevice::Cpu,
        num_inference_steps: 0,
        cfg_scale: 1.0,
        embedded_guidance: Some(UNGUIDED),
        extent: None,
    }
}

fn distill_row(row: &Row, recipe: &Recipe) -> Result<SourceRow, TrainError> {
    let picture = media(row, recipe)?;
    let embedded_guidance = told(row, recipe)?;
    let row = row.distill()?;
    Ok(SourceRow {
        picture: Some(picture),
        prompt: row.prompt,
        seed: Some(row.seed),
        rand_device: row.rand_device,
        num_inference_steps: row.num_inference_steps,
        cfg_scale: row.cfg_scale,
        embedded_guidance,
        extent: None,
    })
}

/// Only the prompt is needed; a seed column is used where there is one.
fn prompt_row(row: &Row, recipe: &Recipe) -> Result<SourceRow, TrainError> {
    let seed = row.get("seed").map(|_| row.integer("seed")).transpose()?;
    online_row(row.text("prompt")?.to_owned(), seed, recipe)
}

fn online_row(prompt: String, seed: Option<u64>, recipe: &Recipe) -> Result<SourceRow, TrainError> {
    let (Some(height), Some(width)) = (recipe.height, recipe.width) else {
        return Err(TrainError::Value {
            key: "height",
            found: "unset".into(),
            expected: "the picture size in px, with online_teacher",
        });
    };
    Ok(SourceRow {
        picture: None,
        prompt,
        seed,
        rand_device: RandDevice::Cpu,
        num_inference_steps: recipe.num_inference_steps,
        cfg_scale: recipe.cfg_scale as f32,
        embedded_guidance: recipe.embedded_guidance.map(|scale| scale as f32),
        extent: Some(Extent { frames: recipe.num_frames.unwrap_or(1), height, width }),
    })
}

fn is_emoji(base: &Path) -> bool {
    base.join(CONCEPTS_FILE).is_file()
}

/// Every picture of the bundled set that is not held out, once with each caption.
fn emoji_rows(base: &Path) -> Result<Vec<SourceRow>, TrainError> {
    let set = EmojiSet::open(base)?;
    let rows = |item: Item<'_>| {
        let picture = Arc::new(item.picture.clone());
        let name = format!("{} in style {}", set.concepts()[item.concept].hex, item.style.name());
        let bundled = move || PictureSource::Bundled(name.clone(), picture.clone());
        [item.caption_en, item.caption_zh].map(|caption| with_picture(bundled(), &caption))
    };
    Ok(set.training().flat_map(rows).collect())
}

fn emoji_prompts(recipe: &Recipe) -> Result<Vec<Result<SourceRow, TrainError>>, TrainError> {
    let rows = emoji_rows(&recipe.dataset_base_path)?;
    Ok(rows.into_iter().map(|row| online_row(row.prompt, None, recipe)).collect())
}
