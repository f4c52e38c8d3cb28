//! Distinct pictures and prompts of a data set on their way to latents and text states.
//!
//! Both stay where the data set folder holds them (`latents/<picture's stem>.safetensors` with `latents` `[C, H, W]` and
//! `text` `[S, J]`, and where the model has pooled states `pooled` `[P]`, as `generate` writes them); otherwise they are
//! encoded here, once.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::{Tensor, TensorData};
use fewstep_data::check_inside;
use fewstep_models::{Condition, Extent, Model, WeightFiles};
use sha2::{Digest, Sha256};

use crate::dataset::Preparation;
use crate::host::{HostTensor, to_vec};
use crate::place::Place;
use crate::shelf::Shelf;
use crate::source::PictureSource;
use crate::workers::{Reading, Workers};
use crate::{TrainError, hash};

/// Prompts encoded per call. Always the same prompts together, whatever was encoded before: their numbers may depend on
/// it in the last bit.
pub(crate) const PROMPTS_PER_BATCH: usize = 32;

/// What a data set folder stores beside a picture.
pub(crate) struct Stored {
    path: PathBuf,
    files: WeightFiles,
}

impl Stored {
    /// Opens the file stored beside a picture, if there is one.
    pub(crate) fn beside(picture: Option<&PictureSource>, base: &Path) -> Result<Option<Self>, TrainError> {
        let Some(picture) = picture.and_then(PictureSource::path) else { return Ok(None) };
        let Some(stem) = picture.file_stem() else { return Ok(None) };
        // Not `with_extension`, which would cut a stem with a dot in it.
        let path = base.join("latents").join(format!("{}.safetensors", stem.to_string_lossy()));
        match path.is_file() {
            true => {
                check_inside(base, &path)?;
                Ok(Some(Self { files: WeightFiles::open(&path)?, path }))
            }
            false => Ok(None),
        }
    }

    fn latents(&self, expected: [usize; 3]) -> Result<Place, TrainError> {
        self.check("latents", self.files.shape("latents")?.to_vec(), &expected)?;
        Ok(self.place("latents"))
    }

    /// Text states, and pooled ones where the model has any, if the file holds all of them.
    fn text(&self, widths: TextWidths) -> Result<Option<TextPlaces>, TrainError> {
        if self.text_tokens(widths)?.is_none() {
            return Ok(None);
        }
        let pooled = widths.pooled.map(|_| self.place("pooled"));
        Ok(Some(TextPlaces { states: self.place("text"), pooled }))
    }

    /// How many text states the file holds, at least one; `None` where it does not hold all that a model reads.
    ///
    /// # Errors
    /// If they have other widths, or the header is damaged.
    pub(crate) fn text_tokens(&self, widths: TextWidths) -> Result<Option<usize>, TrainError> {
        let Some(shape) = self.shape("text")? else { return Ok(None) };
        let tokens = shape.first().copied().unwrap_or(0).max(1);
        self.check("text", shape, &[tokens, widths.states])?;
        let Some(width) = widths.pooled else { return Ok(Some(tokens)) };
        let Some(shape) = self.shape("pooled")? else { return Ok(None) };
        self.check("pooled", shape, &[width])?;
        Ok(Some(tokens))
    }

    fn place(&self, key: &'static str) -> Place {
        Place::File { path: self.path.clone(), key }
    }

    /// Shape of a stored tensor, from the file's header; `None` where there is none of that name.
    ///
    /// # Errors
    /// If the header is damaged.
    pub(crate) fn shape(&self, key: &str) -> Result<Option<Vec<usize>>, TrainError> {
        let there = self.files.contains(key).then(|| self.files.shape(key));
        Ok(there.transpose()?.map(<[usize]>::to_vec))
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
}

/// Distinct pictures.
pub(crate) struct PictureTable<'a> {
    with: Preparation<'a>,
    index: HashMap<String, usize>,
    entries: Vec<Entry>,
}

struct Entry {
    /// After resizing.
    extent: Extent,
    latents: Latents,
}

/// Where a picture's latents come from.
enum Latents {
    Stored(Place),
    Encoded(PictureSource),
}

impl<'a> PictureTable<'a> {
    /// An empty table.
    pub(crate) fn new(with: Preparation<'a>) -> Self {
        Self { with, index: HashMap::new(), entries: Vec::new() }
    }

    /// Index and size of a picture; of a new one the header is read.
    pub(crate) fn add(
        &mut self,
        source: &PictureSource,
        stored: Option<&Stored>,
    ) -> Result<(usize, Extent), TrainError> {
        if let Some(index) = self.index.get(source.name().as_ref()) {
            return Ok((*index, self.entries[*index].extent));
        }
        let entry = self.entry(source, stored)?;
        let (index, extent) = (self.entries.len(), entry.extent);
        self.index.insert(source.name().into_owned(), index);
        self.entries.push(entry);
        Ok((index, extent))
    }

    fn entry(&self, source: &PictureSource, stored: Option<&Stored>) -> Result<Entry, TrainError> {
        let Some(stored) = stored else {
            let extent = source.target(self.with.fit)?;
            return Ok(Entry { extent, latents: Latents::Encoded(source.clone()) });
        };
        let extent = source.extent()?;
        let expected = self.with.model.latent_shape(extent)?;
        Ok(Entry { extent, latents: Latents::Stored(stored.latents(expected)?) })
    }

    /// The latents of every picture; those not stored go through the VAE. `None` when asked to stop.
    ///
    /// One picture at a time, so that no number depends on what was encoded before.
    pub(crate) fn encode(self) -> Result<Option<Vec<Place>>, TrainError> {
        let shelf = self.shelf()?;
        let place = |(at, entry): (usize, &Entry)| match &entry.latents {
            Latents::Stored(place) => Some(place.clone()),
            Latents::Encoded(_) => shelf.find(at),
        };
        let mut places: Vec<Option<Place>> = self.entries.iter().enumerate().map(place).collect();
        let missing: Vec<usize> = (0..places.len()).filter(|at| places[*at].is_none()).collect();
        let mut readings = missing.iter().filter_map(|at| self.entries[*at].reading());
        let mut workers = Workers::new(self.with.workers.min(missing.len()));
        for at in &missing {
            if self.with.is_stopped() {
                return Ok(None);
            }
            workers.fill(&mut readings);
            let latents = self.latents(&workers.take()?[0], self.entries[*at].extent.frames);
            places[*at] = Some(shelf.put(*at, latents)?);
        }
        Ok(places.into_iter().collect())
    }

    fn latents(&self, pixels: &HostTensor, frames: usize) -> HostTensor {
        let [channels, rows, width] = [pixels.shape[0], pixels.shape[1], pixels.shape[2]];
        let data = TensorData::new(pixels.values.clone(), [1, channels, rows, width]);
        let latents = self.with.model.encode_images(Tensor::from_data(data, self.with.device), frames);
        HostTensor { shape: latents.dims()[1..].to_vec(), values: to_vec(latents) }
    }

    /// Where encoded pictures go.
    fn shelf(&self) -> Result<Shelf, TrainError> {
        let encoded = self.entries.iter().filter_map(|entry| match &entry.latents {
            Latents::Stored(_) => None,
            Latents::Encoded(source) => Some((source, entry.extent)),
        });
        let mut values = 0;
        for (_, extent) in encoded.clone() {
            values += self.with.model.latent_shape(extent)?.iter().product::<usize>();
        }
        shelf(self.with, "latents", values, &mut |key| {
            encoded.clone().for_each(|(source, extent)| key.add_picture(source, extent));
        })
    }
}

impl Entry {
    /// Decodes picture or video to pixels `[3, frames · height, width]`, if it is to be encoded.
    fn reading(&self) -> Option<Reading> {
        let (Latents::Encoded(source), extent) = (&self.latents, self.extent) else { return None };
        let source = source.clone();
        Some(Box::new(move || {
            let shape = vec![3, extent.frames * extent.height, extent.width];
            Ok(vec![HostTensor { shape, values: source.load(extent)?.to_pixels() }])
        }))
    }
}

/// Widths of what a model reads of a prompt.
#[derive(Clone, Copy)]
pub(crate) struct TextWidths {
    /// J, of each text state.
    pub(crate) states: usize,
    /// P, of the pooled state, where there is one.
    pub(crate) pooled: Option<usize>,
}

impl TextWidths {
    /// Those of a model.
    pub(crate) fn of(model: &Model) -> Self {
        Self { states: model.text_width(), pooled: model.pooled_width() }
    }

    /// Numbers of a prompt with so many text states.
    pub(crate) fn numbers(self, tokens: usize) -> usize {
        tokens * self.states + self.pooled.unwrap_or(0)
    }
}

/// Where what a model reads of a prompt is.
#[derive(Clone)]
pub(crate) struct TextPlaces {
    /// `[S, J]`
    pub(crate) states: Place,
    /// `[P]`, where the model has pooled states.
    pub(crate) pooled: Option<Place>,
}

/// What a model reads of one prompt.
struct Encoded {
    states: HostTensor,
    pooled: Option<HostTensor>,
}

/// Distinct prompts and, where stored, their text states.
pub(crate) struct PromptTable {
    widths: TextWidths,
    /// The prompts.
    pub(crate) texts: Vec<String>,
    index: HashMap<String, usize>,
    stored: Vec<Option<TextPlaces>>,
}

impl PromptTable {
    /// An empty table of text states of these widths.
    pub(crate) fn new(widths: TextWidths) -> Self {
        Self { widths, texts: Vec::new(), index: HashMap::new(), stored: Vec::new() }
    }

    /// Index of a prompt.
    pub(crate) fn add(&mut self, text: &str, stored: Option<&Stored>) -> Result<usize, TrainError> {
        if let Some(index) = self.index.get(text) {
            return Ok(*index);
        }
        self.stored.push(stored.map(|stored| stored.text(self.widths)).transpose()?.flatten());
        self.index.insert(text.to_owned(), self.texts.len());
        self.texts.push(text.to_owned());
        Ok(self.texts.len() - 1)
    }

    /// Text states of every prompt, one unpadded sample each. `None` when asked to stop.
    pub(crate) fn encode(&self, with: Preparation<'_>) -> Result<Option<Vec<TextPlaces>>, TrainError> {
        let mut places = self.stored.clone();
        let missing: Vec<usize> = (0..places.len()).filter(|at| places[*at].is_none()).collect();
        let mut shelf = TextShelf::in_memory();
        for (number, batch) in missing.chunks(PROMPTS_PER_BATCH).enumerate() {
            if with.is_stopped() {
                return Ok(None);
            }
            let find = |at: &usize| shelf.find(*at, self.widths);
            let found: Option<Vec<TextPlaces>> = batch.iter().map(find).collect();
            let found = match found {
                Some(found) => found,
                None => {
                    let encoded = self.encoded(batch, with.model)?;
                    if number == 0 {
                        shelf = self.shelf(with, &missing, &encoded)?;
                    }
                    let put = batch.iter().zip(encoded).map(|(at, encoded)| shelf.put(*at, encoded));
                    put.collect::<Result<_, _>>()?
                }
            };
            batch.iter().zip(found).for_each(|(at, place)| places[*at] = Some(place));
        }
        Ok(places.into_iter().collect())
    }

    fn encoded(&self, batch: &[usize], model: &Model) -> Result<Vec<Encoded>, TrainError> {
        let texts: Vec<String> = batch.iter().map(|at| self.texts[*at].clone()).collect();
        let condition = model.encode_prompts(&texts)?;
        Ok((0..batch.len()).map(|row| Encoded::of(condition.row(row))).collect())
    }

    /// Where the text states go, if all are about as long as the first.
    fn shelf(
        &self,
        with: Preparation<'_>,
        missing: &[usize],
        first: &[Encoded],
    ) -> Result<TextShelf, TrainError> {
        let values: usize = first.iter().map(Encoded::numbers).sum();
        let place = |name| {
            shelf(with, name, values / first.len() * missing.len(), &mut |key| {
                missing.iter().for_each(|at| key.add(&self.texts[*at]));
            })
        };
        Ok(TextShelf { states: place("text")?, pooled: place("pooled")? })
    }
}

impl Encoded {
    /// What is read of a single prompt.
    fn of(condition: Condition) -> Self {
        let text = condition.text.squeeze_dim::<2>(0);
        let states = HostTensor { shape: text.dims().to_vec(), values: to_vec(text) };
        let pooled = condition.pooled.map(|pooled| {
            let [_, width] = pooled.dims();
            HostTensor { shape: vec![width], values: to_vec(pooled) }
        });
        Self { states, pooled }
    }

    fn numbers(&self) -> usize {
        self.states.values.len() + self.pooled.as_ref().map_or(0, |pooled| pooled.values.len())
    }
}

/// Shelves of one key for both kinds of states.
struct TextShelf {
    states: Shelf,
    pooled: Shelf,
}

impl TextShelf {
    fn in_memory() -> Self {
        Self { states: Shelf::in_memory(), pooled: Shelf::in_memory() }
    }

    fn find(&self, number: usize, widths: TextWidths) -> Option<TextPlaces> {
        let pooled = match widths.pooled {
            Some(_) => Some(self.pooled.find(number)?),
            None => None,
        };
        Some(TextPlaces { states: self.states.find(number)?, pooled })
    }

    fn put(&self, number: usize, encoded: Encoded) -> Result<TextPlaces, TrainError> {
        let pooled = encoded.pooled.map(|pooled| self.pooled.put(number, pooled)).transpose()?;
        Ok(TextPlaces { states: self.states.put(number, encoded.states)?, pooled })
    }
}

/// The shelf for so many encoded numbers; `describe` adds to its key what they are of.
fn shelf(
    with: Preparation<'_>,
    name: &str,
    values: usize,
    describe: &mut dyn FnMut(&mut ShelfKey),
) -> Result<Shelf, TrainError> {
    if size_of::<f32>() * values <= with.memory_bytes {
        return Ok(Shelf::in_memory());
    }
    let mut key = ShelfKey::new(with)?;
    describe(&mut key);
    Shelf::in_folder(&with.cache.join(name), &hash::hex(key.0))
}

/// Tells what is encoded and by what: files by name, size and time of change.
struct ShelfKey(Sha256);

impl ShelfKey {
    /// The key of a model and its settings.
    fn new(with: Preparation<'_>) -> Result<Self, TrainError> {
        let mut key = Self(Sha256::new());
        key.add(&format!("{:?} {:?}", with.model.dtype(), with.model.conventions()));
        for (name, path) in with.source.weight_files()? {
            key.add(&name);
            key.add_file(&path);
        }
        Ok(key)
    }

    fn add(&mut self, text: &str) {
        self.0.update(text.len().to_le_bytes());
        self.0.update(text);
    }

    fn add_picture(&mut self, source: &PictureSource, extent: Extent) {
        self.add(&format!("{} {extent:?}", source.name()));
        source.path().into_iter().for_each(|path| self.add_file(path));
    }

    fn add_file(&mut self, path: &Path) {
        let facts = fs::metadata(path).and_then(|facts| Ok((facts.len(), facts.modified()?)));
        // What cannot be looked at cannot be read either, which is said where it is read.
        self.add(&format!("{:?}", facts.ok()));
    }
}
