//! Distinct pictures and prompts of a data set on their way to latents and text states.
//!
//! Both are read from the data set folder where it holds them (`latents/<picture's stem>.safetensors` with `latents`
//! `[C, H, W]` and `text` `[S, J]`, as `generate` writes them); otherwise they are computed here, once.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor, TensorData};
use fewstep_data::buckets::batches;
use fewstep_data::image::{Picture, Size};
use fewstep_models::{Condition, Model, WeightFiles};

use crate::TrainError;
use crate::dataset::Preparation;
use crate::host::{HostTensor, to_vec};
use crate::source::PictureSource;

/// Pictures encoded per call.
pub(crate) const PICTURES_PER_BATCH: usize = 8;
/// Prompts encoded per call.
pub(crate) const PROMPTS_PER_BATCH: usize = 32;

/// What a data set folder stores beside a picture.
pub(crate) struct Stored {
    path: PathBuf,
    files: WeightFiles,
}

impl Stored {
    /// Opens the file stored beside a picture, if there is one.
    pub(crate) fn beside(picture: Option<&PictureSource>, base: &Path) -> Result<Option<Self>, TrainError> {
        let Some(PictureSource::File(picture)) = picture else { return Ok(None) };
        let Some(stem) = picture.file_stem() else { return Ok(None) };
        // Not `with_extension`, which would cut a stem with a dot in it.
        let path = base.join("latents").join(format!("{}.safetensors", stem.to_string_lossy()));
        match path.is_file() {
            true => Ok(Some(Self { files: WeightFiles::open(&path)?, path })),
            false => Ok(None),
        }
    }

    /// Shape of a stored tensor, from the file's header; `None` where there is none of that name.
    ///
    /// # Errors
    /// If the header is damaged.
    pub(crate) fn shape(&self, key: &str) -> Result<Option<Vec<usize>>, TrainError> {
        let entries = self.files.entries()?;
        Ok(entries.into_iter().find(|entry| entry.key == key).map(|entry| entry.shape))
    }

    /// Checks that stored latents or text states have a shape.
    ///
    /// # Errors
    /// If they have another one.
    pub(crate) fn check(
        &self,
        what: &'static str,
        found: Vec<usize>,
        expected: &[usize],
    ) -> Result<(), TrainError> {
        match found == expected {
            true => Ok(()),
            false => {
                Err(TrainError::Shape { path: self.path.clone(), what, found, expected: expected.to_vec() })
            }
        }
    }

    fn read(&self, key: &str) -> Result<HostTensor, TrainError> {
        let (shape, values) = self.files.read(key)?;
        Ok(HostTensor { shape, values })
    }
}

/// Distinct pictures.
pub(crate) struct PictureTable<'a> {
    with: Preparation<'a>,
    index: HashMap<String, usize>,
    entries: Vec<Encoding>,
    sizes: Vec<Size>,
}

/// A picture on its way to latents.
enum Encoding {
    Done(HostTensor),
    Waiting(Picture),
}

impl<'a> PictureTable<'a> {
    /// An empty table.
    pub(crate) fn new(with: Preparation<'a>) -> Self {
        Self { with, index: HashMap::new(), entries: Vec::new(), sizes: Vec::new() }
    }

    /// Index and size of a picture, loaded when it is new.
    pub(crate) fn add(
        &mut self,
        source: &PictureSource,
        stored: Option<&Stored>,
    ) -> Result<(usize, Size), TrainError> {
        if let Some(index) = self.index.get(source.name().as_ref()) {
            return Ok((*index, self.sizes[*index]));
        }
        let (entry, size) = match stored {
            Some(stored) => self.read_latents(source, stored)?,
            None => self.read_picture(source)?,
        };
        let index = self.entries.len();
        self.index.insert(source.name().into_owned(), index);
        self.entries.push(entry);
        self.sizes.push(size);
        Ok((index, size))
    }

    fn read_picture(&self, source: &PictureSource) -> Result<(Encoding, Size), TrainError> {
        let picture = source.load()?;
        let size = self.with.resize.target_size(picture.size())?;
        let picture = if size == picture.size() { picture } else { picture.crop_and_resize(size) };
        Ok((Encoding::Waiting(picture), size))
    }

    fn read_latents(&self, source: &PictureSource, stored: &Stored) -> Result<(Encoding, Size), TrainError> {
        let latents = stored.read("latents")?;
        let size = source.size()?;
        let expected = self.with.model.latent_shape(size.height, size.width)?.to_vec();
        stored.check("latents", latents.shape.clone(), &expected)?;
        Ok((Encoding::Done(latents), size))
    }

    /// The latents of every picture; those not stored go through the VAE, pictures of one size together.
    pub(crate) fn encode(mut self) -> Vec<HostTensor> {
        let waits = |entry: &Encoding| matches!(entry, Encoding::Waiting(_));
        let waiting: Vec<usize> = (0..self.entries.len()).filter(|at| waits(&self.entries[*at])).collect();
        for batch in batches(&self.sizes, &waiting, PICTURES_PER_BATCH) {
            self.encode_batch(&batch);
        }
        self.entries.into_iter().map(Encoding::latents).collect()
    }

    fn encode_batch(&mut self, batch: &[usize]) {
        let Size { height, width } = self.sizes[batch[0]];
        let pixels: Vec<f32> = batch.iter().flat_map(|at| self.entries[*at].pixels()).collect();
        let pixels =
            Tensor::from_data(TensorData::new(pixels, [batch.len(), 3, height, width]), self.with.device);
        let latents = self.with.model.encode_images(pixels);
        for (at, latents) in batch.iter().zip(latents.chunk(batch.len(), 0)) {
            let shape = latents.dims()[1..].to_vec();
            self.entries[*at] = Encoding::Done(HostTensor { shape, values: to_vec(latents) });
        }
    }
}

impl Encoding {
    fn pixels(&self) -> Vec<f32> {
        match self {
            Encoding::Waiting(picture) => picture.to_pixels(),
            Encoding::Done(_) => unreachable!("only waiting pictures are encoded"),
        }
    }

    fn latents(self) -> HostTensor {
        match self {
            Encoding::Done(latents) => latents,
            Encoding::Waiting(_) => unreachable!("every waiting picture has been encoded"),
        }
    }
}

/// Distinct prompts and, where stored, their text states.
#[derive(Default)]
pub(crate) struct PromptTable {
    /// The prompts.
    pub(crate) texts: Vec<String>,
    index: HashMap<String, usize>,
    stored: Vec<Option<HostTensor>>,
}

impl PromptTable {
    /// Index of a prompt.
    pub(crate) fn add(&mut self, text: &str, stored: Option<&Stored>) -> Result<usize, TrainError> {
        if let Some(index) = self.index.get(text) {
            return Ok(*index);
        }
        let stored = stored.filter(|stored| stored.files.contains("text"));
        self.stored.push(stored.map(|stored| stored.text()).transpose()?);
        self.index.insert(text.to_owned(), self.texts.len());
        self.texts.push(text.to_owned());
        Ok(self.texts.len() - 1)
    }

    /// Text states of every prompt, one unpadded sample each.
    pub(crate) fn encode(&self, model: &Model, device: &Device) -> Result<Vec<Condition>, TrainError> {
        let missing: Vec<usize> = (0..self.texts.len()).filter(|at| self.stored[*at].is_none()).collect();
        let mut encoded = HashMap::new();
        for batch in missing.chunks(PROMPTS_PER_BATCH) {
            let texts: Vec<String> = batch.iter().map(|at| self.texts[*at].clone()).collect();
            let states = model.encode_prompts(&texts)?;
            encoded.extend(batch.iter().enumerate().map(|(row, at)| (*at, states.row(row))));
        }
        let condition = |at: usize| match &self.stored[at] {
            Some(text) => from_host(text, device),
            None => encoded.remove(&at).expect("every prompt without stored states was encoded"),
        };
        Ok((0..self.texts.len()).map(condition).collect())
    }
}

impl Stored {
    fn text(&self) -> Result<HostTensor, TrainError> {
        let text = self.read("text")?;
        if text.shape.len() != 2 {
            let (path, found) = (self.path.clone(), text.shape);
            return Err(TrainError::Shape { path, what: "text", found, expected: vec![0, 0] });
        }
        Ok(text)
    }
}

/// Text states as one unpadded sample.
pub(crate) fn from_host(text: &HostTensor, device: &Device) -> Condition {
    let [tokens, width] = [text.shape[0], text.shape[1]];
    let data = TensorData::new(text.values.clone(), [1, tokens, width]);
    Condition { text: Tensor::from_data(data, device), lengths: vec![tokens] }
}
