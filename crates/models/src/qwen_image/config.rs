//! The config files of a Qwen-Image folder.

use std::path::Path;

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::published;
use crate::{ModelError, ModelSource};

/// `transformer/config.json` of class `QwenImageTransformer2DModel`.
#[derive(Clone, Debug, Deserialize)]
pub struct TransformerConfig {
    /// Pixels of latents per token along one side; 2.
    pub patch_size: usize,
    /// Width of an image token, `4 ·` latent channels.
    pub in_channels: usize,
    /// Latent channels.
    pub out_channels: usize,
    /// Double-stream blocks.
    pub num_layers: usize,
    /// E.
    pub attention_head_dim: usize,
    /// K.
    pub num_attention_heads: usize,
    /// J, width of the text states.
    pub joint_attention_dim: usize,
    /// Rotary dims of (frame, row, column); they add up to E.
    pub axes_dims_rope: [usize; 3],
    /// What the output means; the published model predicts velocities.
    #[serde(default)]
    pub prediction_type: PredictionType,
    /// Distilled guidance input; not supported.
    #[serde(default)]
    guidance_embeds: bool,
    /// Variant of later models; not supported.
    #[serde(default)]
    zero_cond_t: bool,
    /// Variant of later models; not supported.
    #[serde(default)]
    use_additional_t_cond: bool,
    /// Variant of later models; not supported.
    #[serde(default)]
    use_layer3d_rope: bool,
}

/// What a transformer's output means.
///
/// Small models on large pixel patches learn far better when they predict the picture: a velocity carries all of the
/// noise, which has to pass through every layer (arXiv 2511.13720).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PredictionType {
    /// noise − clean.
    #[default]
    Velocity,
    /// The clean latents.
    Clean,
}

/// The text model of `text_encoder/config.json` (Qwen2.5-VL); the vision tower is not used.
#[derive(Clone, Debug, Deserialize)]
pub struct TextEncoderConfig {
    /// Token embeddings, padding included.
    pub vocab_size: usize,
    /// Width, J of the transformer.
    pub hidden_size: usize,
    /// Width of the gated MLP.
    pub intermediate_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; divides the query heads.
    pub num_key_value_heads: usize,
    /// Epsilon of the RMS norms.
    pub rms_norm_eps: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f32,
}

/// `vae/config.json`.
#[derive(Clone, Debug, Deserialize)]
#[serde(tag = "_class_name")]
pub enum VaeConfig {
    /// Pixels rearranged, no weights.
    PixelUnshuffle(PixelUnshuffleConfig),
}

/// Config of the pixel autoencoder.
#[derive(Clone, Debug, Deserialize)]
pub struct PixelUnshuffleConfig {
    /// Pixels per latent pixel along one side.
    pub factor: usize,
    /// Mean of each colour in [−1, 1].
    pub mean: [f32; 3],
    /// Standard deviation of each colour.
    pub std: [f32; 3],
}

/// How a prompt is wrapped before tokenising.
///
/// The published model has one template; a folder may carry its own as `prompt_template` in
/// `model_index.json`.
#[derive(Clone, Debug, Deserialize)]
pub struct PromptTemplate {
    /// Text with one `{}` where the prompt goes.
    pub text: String,
    /// Leading tokens whose hidden states are dropped: the instruction.
    pub drop_tokens: usize,
    /// Longest prompt in tokens, where not [`crate::Conventions::max_prompt_tokens`]; longer ones are cut.
    pub max_tokens: Option<usize>,
}

impl Default for PromptTemplate {
    /// The published model's (diffusers' `QwenImagePipeline`).
    fn default() -> Self {
        Self {
            text: "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, \
                   quantity, text, spatial relationships of the objects and background:<|im_end|>\n\
                   <|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
                .into(),
            drop_tokens: 34,
            max_tokens: None,
        }
    }
}

impl TransformerConfig {
    pub(super) fn read(source: &ModelSource) -> Result<Self, ModelError> {
        let path = source.config("transformer")?;
        let config: Self = read_json(&path)?;
        config.check().map_err(|reason| ModelError::Config { path, reason })?;
        Ok(config)
    }

    fn check(&self) -> Result<(), String> {
        let variants = [
            ("guidance_embeds", self.guidance_embeds),
            ("zero_cond_t", self.zero_cond_t),
            ("use_additional_t_cond", self.use_additional_t_cond),
            ("use_layer3d_rope", self.use_layer3d_rope),
        ];
        if let Some((name, _)) = variants.iter().find(|(_, set)| *set) {
            return Err(format!("{name} is true, expected false: this variant is not supported"));
        }
        let rotary: usize = self.axes_dims_rope.iter().sum();
        if rotary != self.attention_head_dim {
            return Err(format!(
                "axes_dims_rope add up to {rotary}, expected attention_head_dim {}",
                self.attention_head_dim
            ));
        }
        let (patch, token) = (self.patch_size * self.patch_size, self.in_channels);
        if self.patch_size != super::latents::PATCH || token != patch * self.out_channels {
            return Err(format!(
                "patch_size {} and in_channels {token}, expected 2 and 4 × out_channels {}",
                self.patch_size, self.out_channels
            ));
        }
        Ok(())
    }
}

impl TextEncoderConfig {
    pub(super) fn read(source: &ModelSource) -> Result<Self, ModelError> {
        let path = source.config("text_encoder")?;
        let config: Self = read_json(&path)?;
        let (heads, groups) = (config.num_attention_heads, config.num_key_value_heads);
        if groups == 0 || !heads.is_multiple_of(groups) || !config.hidden_size.is_multiple_of(2 * heads) {
            let reason = format!(
                "hidden_size {}, num_attention_heads {heads}, num_key_value_heads {groups}: expected heads of an \
                 even size and groups that divide the heads",
                config.hidden_size
            );
            return Err(ModelError::Config { path, reason });
        }
        Ok(config)
    }
}

impl VaeConfig {
    pub(super) fn read(source: &ModelSource) -> Result<Self, ModelError> {
        read_json(&source.config("vae")?)
    }
}

impl PromptTemplate {
    pub(super) fn read(source: &ModelSource) -> Result<Self, ModelError> {
        #[derive(Deserialize)]
        struct Index {
            prompt_template: Option<PromptTemplate>,
        }
        let (path, text) = source.text_or("model_index.json", published::MODEL_INDEX)?;
        let template = parse_json::<Index>(&path, &text)?.prompt_template.unwrap_or_default();
        if template.text.matches("{}").count() != 1 {
            let reason = format!("prompt_template.text {:?}, expected exactly one {{}}", template.text);
            return Err(ModelError::Config { path, reason });
        }
        Ok(template)
    }
}

/// Reads a JSON file into a config.
fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, ModelError> {
    let text = std::fs::read_to_string(path).map_err(ModelError::io(path))?;
    parse_json(path, &text)
}

fn parse_json<T: DeserializeOwned>(path: &Path, text: &str) -> Result<T, ModelError> {
    serde_json::from_str(text)
        .map_err(|error| ModelError::Config { path: path.to_owned(), reason: error.to_string() })
}
