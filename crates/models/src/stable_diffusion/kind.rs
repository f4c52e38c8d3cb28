//! What is known of a Stable Diffusion folder before anything of it is loaded.

use burn::tensor::Device;

use super::config::UnetConfig;
use super::unet::{self, Unet};
use super::{StableDiffusion, footprint, published, trial};
use crate::config_file::ConfigFile;
use crate::family::{self, AUTOENCODER};
use crate::footprint::{Evaluation, Workload};
use crate::model_folder::SCHEDULER_FILE;
use crate::parts::autoencoder_kl::{self, AutoencoderKl, AutoencoderKlConfig};
use crate::parts::clip::{self, ClipTextConfig, ClipTextEncoder};
use crate::trial::Trial;
use crate::weights::{KeyMap, TensorShapes, WeightFiles, expected};
use crate::{Encoding, LoadOptions, Model, ModelError, ModelSource};

/// The component that denoises.
pub(super) const DENOISER: &str = "unet";

/// Layers that the peers' recipes give adapters: the attentions' projections.
const LORA_TARGETS: &[&str] = &["to_q", "to_k", "to_v", "to_out.0"];

/// One of the two families: what they differ in.
#[derive(Debug)]
pub(crate) struct Kind {
    /// Whether it is SDXL.
    pub(super) xl: bool,
    class: &'static str,
    text_encoders: &'static [&'static str],
    tokenizers: &'static [&'static str],
    components: &'static [&'static str],
    /// The published `model_index.json`.
    pub(super) index: &'static str,
    /// The published scheduler.
    pub(super) scheduler: &'static str,
    published_files: [(&'static str, &'static str); 2],
    tables: &'static [&'static str],
    pub(super) cfg_scale: f32,
}

/// Stable Diffusion 1 and 2.
pub(crate) static BASE: Kind = Kind {
    xl: false,
    class: "StableDiffusionPipeline",
    text_encoders: &["text_encoder"],
    tokenizers: &["tokenizer"],
    components: &["text_encoder", DENOISER, AUTOENCODER],
    index: published::INDEX,
    scheduler: published::SCHEDULER,
    published_files: [("model_index.json", published::INDEX), (SCHEDULER_FILE, published::SCHEDULER)],
    tables: &[
        "text_encoder.text_model.embeddings.token_embedding.weight",
        "text_encoder.text_model.embeddings.position_embedding.weight",
    ],
    cfg_scale: 7.5,
};

/// SDXL.
pub(crate) static XL: Kind = Kind {
    xl: true,
    class: "StableDiffusionXLPipeline",
    text_encoders: &["text_encoder", "text_encoder_2"],
    tokenizers: &["tokenizer", "tokenizer_2"],
    components: &["text_encoder", "text_encoder_2", DENOISER, AUTOENCODER],
    index: published::XL_INDEX,
    scheduler: published::XL_SCHEDULER,
    published_files: [("model_index.json", published::XL_INDEX), (SCHEDULER_FILE, published::XL_SCHEDULER)],
    tables: &[
        "text_encoder.text_model.embeddings.token_embedding.weight",
        "text_encoder.text_model.embeddings.position_embedding.weight",
        "text_encoder_2.text_model.embeddings.token_embedding.weight",
        "text_encoder_2.text_model.embeddings.position_embedding.weight",
    ],
    cfg_scale: 5.0,
};

/// The configs of all components, checked against each other.
pub(super) struct Configs {
    pub(super) unet: UnetConfig,
}

impl Configs {
    pub(super) fn read(kind: &Kind, source: &ModelSource) -> Result<Self, ModelError> {
        let (unet, vae) = (UnetConfig::read(source)?, AutoencoderKlConfig::read(source)?);
        let file = ConfigFile::of_component(source, DENOISER)?;
        let pooled = match kind.xl {
            true => Some(ClipTextConfig::read(source, "text_encoder_2")?.pooled_width()),
            false => None,
        };
        let pairs = [
            (
                "cross_attention_dim",
                Some(unet.cross_attention_dim),
                "width of the text states",
                Some(kind.text_width(source)?),
            ),
            ("in_channels", Some(unet.in_channels), "VAE's latent channels", Some(vae.latent_channels)),
            (
                "projection_class_embeddings_input_dim without six times addition_time_embed_dim",
                unet.pooled_width(),
                "width of the pooled text state",
                pooled,
            ),
        ];
        let shown = |width: Option<usize>| width.map_or("none".into(), |width| width.to_string());
        for (name, found, of, expected) in pairs {
            if found != expected {
                let (found, expected) = (shown(found), shown(expected));
                return Err(file.error(format!("{name} is {found}, expected the {of}, {expected}")));
            }
        }
        Ok(Self { unet })
    }
}

impl Kind {
    /// J, the width of all text encoders together.
    pub(super) fn text_width(&self, source: &ModelSource) -> Result<usize, ModelError> {
        let width = |name: &&'static str| Ok(ClipTextConfig::read(source, name)?.hidden_size);
        self.text_encoders.iter().map(width).sum()
    }

    /// Makes the text encoders that the family has.
    pub(super) fn encoders(
        &self,
        mut make: impl FnMut(&'static str) -> Result<Option<ClipTextEncoder>, ModelError>,
    ) -> Result<[Option<ClipTextEncoder>; 2], ModelError> {
        let first = make(self.text_encoders[0])?;
        let second = if self.xl { make(self.text_encoders[1])? } else { None };
        Ok([first, second])
    }
}

/// A text encoder without weights.
pub(super) fn unfilled_encoder(
    source: &ModelSource,
    name: &'static str,
    device: &Device,
) -> Result<ClipTextEncoder, ModelError> {
    Ok(ClipTextEncoder::unfilled(&ClipTextConfig::read(source, name)?, device))
}

impl family::Kind for Kind {
    fn pipeline_class(&self) -> &'static str {
        self.class
    }

    fn components(&self) -> &'static [&'static str] {
        self.components
    }

    fn denoiser(&self) -> &'static str {
        DENOISER
    }

    fn text_encoders(&self) -> &'static [&'static str] {
        self.text_encoders
    }

    fn tokenizers(&self) -> &'static [&'static str] {
        self.tokenizers
    }

    fn lora_targets(&self) -> &'static [&'static str] {
        LORA_TARGETS
    }

    fn tables(&self) -> &'static [&'static str] {
        self.tables
    }

    fn keys(&self, component: &str) -> Option<&'static KeyMap> {
        match component {
            DENOISER => Some(&unet::KEYS),
            AUTOENCODER => Some(&autoencoder_kl::KEYS),
            _ => self.text_encoders.contains(&component).then_some(&clip::KEYS),
        }
    }

    fn component_of(&self, files: &WeightFiles) -> Option<&'static str> {
        published::component_of(files, self.xl)
    }

    fn published_files(&self) -> &'static [(&'static str, &'static str)] {
        match self.xl {
            true => &XL.published_files,
            false => &BASE.published_files,
        }
    }

    fn trial(&self) -> Option<Trial> {
        Some(trial::trial(self.xl))
    }

    fn check_configs(&self, source: &ModelSource) -> Result<(), ModelError> {
        Configs::read(self, source).map(|_| ())
    }

    fn component_tensors(&self, source: &ModelSource, component: &str) -> Result<TensorShapes, ModelError> {
        // Nothing is allocated there.
        let device = Device::flex();
        if let Some(name) = self.text_encoders.iter().find(|name| **name == component) {
            return Ok(expected(&unfilled_encoder(source, name, &device)?, &clip::KEYS));
        }
        Ok(match component {
            DENOISER => expected(&Unet::unfilled(UnetConfig::read(source)?, &device), &unet::KEYS),
            AUTOENCODER => AutoencoderKl::expected(source)?,
            _ => TensorShapes::new(),
        })
    }

    fn evaluation(&self, source: &ModelSource, workload: &Workload) -> Result<Evaluation, ModelError> {
        footprint::evaluation(source, workload)
    }

    fn encoding(&self, source: &ModelSource) -> Result<Encoding, ModelError> {
        footprint::encoding(source, self.text_encoders)
    }

    fn load(&self, source: &ModelSource, options: &LoadOptions) -> Result<Model, ModelError> {
        StableDiffusion::from_pretrained(self.family(), source, options).map(Model::StableDiffusion)
    }

    fn outline(&self, source: &ModelSource, options: &LoadOptions) -> Result<Model, ModelError> {
        StableDiffusion::outline(self.family(), source, options).map(Model::StableDiffusion)
    }

    fn random(&self, source: &ModelSource, seed: u64, device: &Device) -> Result<Model, ModelError> {
        StableDiffusion::random(self.family(), source, seed, device).map(Model::StableDiffusion)
    }
}

impl Kind {
    /// Itself, for as long as a model lives.
    fn family(&self) -> &'static Self {
        if self.xl { &XL } else { &BASE }
    }
}
