//! The parts of a small model of every family: text encoders, denoiser with all of its gradients, its blocks kept and
//! recomputed, autoencoder.

use std::path::Path;

use anyhow::{Context, Result};
use burn::module::Module;
use burn::tensor::{Device, Tensor, TensorData};
use fewstep_kernels::with_plain_twins;
use fewstep_models::{
    Components, Condition, Denoiser, Extent, Footprint, LoadOptions, Model, ModelSource, Workload,
    trial_classes, write_trial_model,
};
use tempfile::TempDir;

use super::check::{Check, Inputs, Run, numbers};

/// Pictures at once, and their sides in px.
const BATCH: usize = 2;
const SIDE: usize = 128;

/// Noise levels of the pictures.
const SIGMAS: [f32; BATCH] = [0.8, 0.3];

/// Roundings of a few dozen operations one after the other; norms and softmaxes between them carry on what differs.
const FORWARD: f64 = 1e-4;
/// The same, there and back.
const BACKWARD: f64 = 5e-4;

/// The folders of small models, removed when it goes.
pub(super) struct SmallModels {
    folders: Vec<(&'static str, TempDir)>,
}

impl SmallModels {
    /// Writes one of every family.
    ///
    /// # Errors
    /// If the system's temporary folder cannot be written.
    pub(super) fn written() -> Result<Self> {
        let write = |class: &'static str| -> Result<_> {
            let folder = tempfile::tempdir().context("a folder for small models")?;
            write_trial_model(class, folder.path(), 1)?;
            Ok((class, folder))
        };
        Ok(Self { folders: trial_classes().into_iter().map(write).collect::<Result<_>>()? })
    }

    /// Every check.
    ///
    /// # Errors
    /// If a model cannot be read back.
    pub(super) fn checks(&self) -> Result<Vec<Check>> {
        let parts = self.folders.iter().map(|(class, folder)| Subject::new(class, folder.path())?.checks());
        Ok(parts.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
    }
}

/// One small model.
struct Subject {
    /// The class without the word that all have.
    name: String,
    source: ModelSource,
    /// A picture, or the shortest video that has more than one latent frame.
    extent: Extent,
    /// `[B, C, latent frames · H, W]`
    latents: [usize; 4],
    /// What the prompts became.
    states: States,
}

/// A condition's numbers.
#[derive(Clone)]
struct States {
    text: Vec<f32>,
    /// `[B, S, J]`
    shape: [usize; 3],
    lengths: Vec<usize>,
    pooled: Option<Vec<f32>>,
}

impl Subject {
    fn new(class: &str, folder: &Path) -> Result<Self> {
        let source = ModelSource::from(folder);
        let model = Model::from_pretrained(&source, &LoadOptions::default())?;
        let frames = 1 + model.frames_per_latent().unwrap_or(0);
        let extent = Extent { frames, height: SIDE, width: SIDE };
        let [channels, height, width] = model.latent_shape(extent)?;
        Ok(Self {
            name: class.trim_end_matches("Pipeline").into(),
            extent,
            latents: [BATCH, channels, height, width],
            states: States::of(with_plain_twins(|| model.encode_prompts(&prompts()))?),
            source,
        })
    }

    fn checks(self) -> Result<Vec<Check>> {
        let denoiser = self.denoiser("denoiser", false)?;
        let recomputed = Check { flops: 0.0, ..self.denoiser("recomputed", true)? };
        Ok(vec![self.text_encoders()?, denoiser, recomputed, self.encoder(), self.decoder()])
    }

    /// Text and pooled states of prompts.
    fn text_encoders(&self) -> Result<Check> {
        let [_, tokens, _] = self.states.shape;
        let encoding = Footprint::of_encoding(&self.source)?;
        let flops = encoding.flops_per_token as f64 * (BATCH * tokens) as f64;
        let source = self.source.clone();
        Ok(self.forward("text encoders", format!("{BATCH} x {tokens} tokens"), flops, move |inputs| {
            let model = loaded(&source, inputs.device());
            Box::new(move || {
                let condition =
                    model.encode_prompts(&prompts()).expect("the same prompts were encoded before");
                let pooled = condition.pooled.map(|pooled| pooled.flatten(0, 1));
                Tensor::cat(std::iter::once(condition.text.flatten(0, 2)).chain(pooled).collect(), 0)
            })
        }))
    }

    /// A velocity, with the gradients by latents and by all parameters. The twins keep their blocks in any case.
    fn denoiser(&self, part: &str, recomputes_blocks: bool) -> Result<Check> {
        let workload = Workload {
            frames: self.extent.frames,
            height: SIDE,
            width: SIDE,
            batch_size: BATCH,
            text_tokens: self.states.shape[1],
            lora_rank: None,
            components: Components::Denoiser,
            on_cpu: true,
        };
        let flops = Footprint::of(&self.source, &workload)?.flops;
        let (source, states, shape) = (self.source.clone(), self.states.clone(), self.latents);
        let frames = self.extent.frames;
        let operation = move |inputs: &mut Inputs| -> Run {
            let device = inputs.device().clone();
            let latents = inputs.learning(shape, 1.0);
            let model = loaded(&source, &device.clone().without_autodiff());
            let mut model = model.recomputing_blocks(recomputes_blocks);
            if device.is_autodiff() {
                model = model.train();
                inputs.parameters(&model);
            }
            let condition = states.on(&device).with_frames(frames);
            let sigma = Tensor::from_data(TensorData::new(SIGMAS.to_vec(), [BATCH]), &device);
            Box::new(move || model.velocity(latents.clone(), sigma.clone(), &condition).flatten(0, 3))
        };
        Ok(Check {
            backward_passes: flops.backward as f64 / flops.forward as f64,
            tolerance: BACKWARD,
            ..self.forward(part, size(self.latents), flops.forward as f64, operation)
        })
    }

    fn encoder(&self) -> Check {
        let (source, frames) = (self.source.clone(), self.extent.frames);
        let shape = [BATCH, 3, frames * SIDE, SIDE];
        self.forward("encoder", size(shape), 0.0, move |inputs| {
            let (pixels, model) = (inputs.frozen(shape, 0.5), loaded(&source, inputs.device()));
            Box::new(move || model.encode_images(pixels.clone(), frames).flatten(0, 3))
        })
    }

    fn decoder(&self) -> Check {
        let (source, frames, shape) = (self.source.clone(), self.extent.frames, self.latents);
        self.forward("decoder", size(shape), 0.0, move |inputs| {
            let (latents, model) = (inputs.frozen(shape, 1.0), loaded(&source, inputs.device()));
            Box::new(move || model.decode_latents(latents.clone(), frames).flatten(0, 3))
        })
    }

    /// A check without a backward.
    fn forward(
        &self,
        part: &str,
        size: String,
        flops: f64,
        operation: impl Fn(&mut Inputs) -> Run + 'static,
    ) -> Check {
        Check {
            name: format!("{}, {part}", self.name),
            size,
            flops,
            bytes: 0.0,
            backward_passes: 0.0,
            tolerance: FORWARD,
            operation: Box::new(operation),
        }
    }
}

impl States {
    fn of(condition: Condition) -> Self {
        Self {
            shape: condition.text.dims(),
            text: numbers(condition.text),
            lengths: condition.lengths,
            pooled: condition.pooled.map(numbers),
        }
    }

    fn on(&self, device: &Device) -> Condition {
        let text = Tensor::from_data(TensorData::new(self.text.clone(), self.shape), device);
        let condition = Condition::new(text, self.lengths.clone());
        match &self.pooled {
            Some(pooled) => {
                let data = TensorData::new(pooled.clone(), [BATCH, pooled.len() / BATCH]);
                condition.with_pooled(Tensor::from_data(data, device))
            }
            None => condition,
        }
    }
}

/// Of two lengths, so that one is padded where a family pads.
fn prompts() -> [String; BATCH] {
    ["a photo of a red apple on a white table", "a cat"].map(str::to_owned)
}

/// A small model on a device's plain side.
fn loaded(source: &ModelSource, device: &Device) -> Model {
    let options = LoadOptions { device: device.clone(), ..LoadOptions::default() };
    Model::from_pretrained(source, &options).expect("a model that was written and read before")
}

fn size(shape: [usize; 4]) -> String {
    shape.map(|side| side.to_string()).join(" x ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_of_every_family_agrees_with_its_twin_on_this_machine() {
        let models = SmallModels::written().unwrap();
        let checks = models.checks().unwrap();
        assert_eq!(checks.len(), 5 * trial_classes().len());
        for check in checks {
            let found = check.run(&Device::flex(), 1);
            assert!(found.agrees(), "{}: {found:?}", check.name);
            // One that cannot fail would agree to the bit.
            assert!(found.difference > 0.0, "{}: {found:?}", check.name);
        }
    }
}
