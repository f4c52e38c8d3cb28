//! The config files of a Qwen-Image folder.

use serde::Deserialize;
use serde_json::{Value, json};

use super::published;
use super::vae::VaeConfig;
use crate::config_file::ConfigFile;
use crate::parts::double_stream::Heads;
use crate::parts::patches::PATCH;
use crate::{ModelError, ModelSource, ranges};

/// The configs of the components that learn, checked against each other and against the autoencoder's.
pub(super) struct Configs {
    pub(super) text_encoder: TextEncoderConfig,
    pub(super) transformer: TransformerConfig,
}

impl Configs {
    pub(super) fn read(source: &ModelSource) -> Result<Self, ModelError> {
        let (text_encoder, vae) = (TextEncoderConfig::read(source)?, VaeConfig::read(source)?);
        let file = ConfigFile::of_component(source, "transformer")?;
        let transformer = TransformerConfig::of(&file)?;
        let pairs = [
            (
                "joint_attention_dim",
                transformer.joint_attention_dim,
                "text encoder's width",
                text_encoder.hidden_size,
            ),
            ("out_channels", transformer.out_channels, "VAE's latent channels", vae.channels()),
        ];
        for (name, found, of, expected) in pairs {
            if found != expected {
                return Err(file.error(format!("{name} is {found}, expected the {of}, {expected}")));
            }
        }
        Ok(Self { text_encoder, transformer })
    }
}

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
    /// E, width of a head; heads need not be as wide together as the states.
    pub head_dim: usize,
    /// Whether queries, keys and values have biases.
    pub qkv_bias: bool,
    /// Whether queries and keys are normalised head by head.
    pub qk_norm: bool,
    /// Rotary embedding.
    pub rope: Rope,
    /// Activation of the MLP; SiLU.
    hidden_act: String,
    /// Attention over a window of tokens; not supported.
    #[serde(default)]
    use_sliding_window: bool,
}

/// Rotary embedding of the text model.
#[derive(Clone, Debug, Deserialize)]
pub struct Rope {
    /// Base of the frequencies.
    pub rope_theta: f32,
    /// Pairs of head dims that turn with (time, row, column); text has the same position on all three.
    pub mrope_section: Option<Vec<usize>>,
    rope_type: Option<String>,
    /// What files of older transformers call `rope_type`.
    #[serde(rename = "type")]
    older_type: Option<String>,
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

/// The most tokens a template may drop or a prompt may have: far more than text models read.
const MAX_TEMPLATE_TOKENS: usize = 1 << 20;

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
        Self::of(&ConfigFile::of_component(source, "transformer")?)
    }

    fn of(file: &ConfigFile) -> Result<Self, ModelError> {
        file.check_class("transformer", file.class_name(), &["QwenImageTransformer2DModel"])?;
        let config: Self = file.parse_over(published::transformer_defaults())?;
        config.check().map_err(|reason| file.error(reason))?;
        Ok(config)
    }

    /// K and E.
    pub(super) fn heads(&self) -> Heads {
        Heads { count: self.num_attention_heads, dim: self.attention_head_dim }
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
        ranges::check(&[
            ("num_layers", self.num_layers, ranges::LAYERS),
            ("attention_head_dim", self.attention_head_dim, ranges::WIDTH),
            ("num_attention_heads", self.num_attention_heads, ranges::WIDTH),
            ("joint_attention_dim", self.joint_attention_dim, ranges::WIDTH),
            ("in_channels", self.in_channels, ranges::WIDTH),
            ("out_channels", self.out_channels, ranges::WIDTH),
            ("patch_size", self.patch_size, ranges::WIDTH),
        ])?;
        let width = self.num_attention_heads * self.attention_head_dim;
        ranges::check(&[("num_attention_heads × attention_head_dim", width, ranges::WIDTH)])?;
        let axes = self.axes_dims_rope;
        let rotary = axes.iter().try_fold(0_usize, |sum, dims| sum.checked_add(*dims));
        if rotary != Some(self.attention_head_dim) || axes.iter().any(|dims| dims % 2 != 0) {
            return Err(format!(
                "axes_dims_rope are {axes:?}, expected even numbers that add up to attention_head_dim {}",
                self.attention_head_dim
            ));
        }
        let (patch, token) = (self.patch_size * self.patch_size, self.in_channels);
        if self.patch_size != PATCH || token != patch * self.out_channels {
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
        let mut file = ConfigFile::of_component(source, "text_encoder")?;
        let architecture = file.json["architectures"][0].as_str().or(file.json["model_type"].as_str());
        let expected = ["Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl", "qwen2_5_vl_text"];
        file.check_class("text_encoder", architecture, &expected)?;
        file.json = text_part(std::mem::take(&mut file.json));
        file.json["qkv_bias"] = true.into();
        file.json["qk_norm"] = false.into();
        Self::checked(file)
    }

    /// The config of a Qwen3 language model.
    pub(crate) fn of_qwen3(mut file: ConfigFile) -> Result<Self, ModelError> {
        let architecture = file.json["architectures"][0].as_str().or(file.json["model_type"].as_str());
        file.check_class("text_encoder", architecture, &["Qwen3ForCausalLM", "Qwen3Model", "qwen3"])?;
        file.json = text_part(std::mem::take(&mut file.json));
        file.json["qkv_bias"] = file.json["attention_bias"].as_bool().unwrap_or(false).into();
        file.json["qk_norm"] = true.into();
        Self::checked(file)
    }

    fn checked(mut file: ConfigFile) -> Result<Self, ModelError> {
        if !file.json["head_dim"].is_u64() {
            let size = |name: &str| file.json[name].as_u64().unwrap_or(0);
            let heads = size("num_attention_heads").max(1);
            file.json["head_dim"] = (size("hidden_size") / heads).into();
        }
        let config: Self = file.parse()?;
        config.check().map_err(|reason| file.error(reason))?;
        Ok(config)
    }

    /// E.
    pub(super) fn head_dim(&self) -> usize {
        self.head_dim
    }

    fn check(&self) -> Result<(), String> {
        ranges::check(&[
            ("vocab_size", self.vocab_size, ranges::VOCABULARY),
            ("hidden_size", self.hidden_size, ranges::WIDTH),
            ("intermediate_size", self.intermediate_size, ranges::WIDTH),
            ("num_hidden_layers", self.num_hidden_layers, ranges::LAYERS),
            ("num_attention_heads", self.num_attention_heads, ranges::WIDTH),
            ("num_key_value_heads", self.num_key_value_heads, ranges::WIDTH),
            ("head_dim", self.head_dim, ranges::WIDTH),
        ])?;
        ranges::check(&[(
            "num_attention_heads × head_dim",
            self.num_attention_heads * self.head_dim,
            ranges::WIDTH,
        )])?;
        ranges::check_positive(&[("rms_norm_eps", self.rms_norm_eps), ("rope_theta", self.rope.rope_theta)])?;
        let (heads, groups) = (self.num_attention_heads, self.num_key_value_heads);
        let whole = self.qk_norm || self.hidden_size == heads * self.head_dim;
        if heads % groups != 0 || !self.head_dim.is_multiple_of(2) || !whole {
            return Err(format!(
                "hidden_size {}, num_attention_heads {heads}, num_key_value_heads {groups}: expected heads of an \
                 even size and groups that divide the heads",
                self.hidden_size
            ));
        }
        if self.hidden_act != "silu" {
            return Err(format!("hidden_act is {}, expected silu", self.hidden_act));
        }
        if self.use_sliding_window {
            return Err("use_sliding_window is true, expected false".into());
        }
        self.rope.check(self.head_dim() / 2)
    }
}

impl Rope {
    fn check(&self, pairs: usize) -> Result<(), String> {
        if let Some(kind) = self.kinds().find(|kind| !["default", "mrope"].contains(kind)) {
            return Err(format!("rotary embedding of type {kind}, expected default or mrope"));
        }
        match &self.mrope_section {
            Some(sections)
                if sections.iter().try_fold(0_usize, |sum, dims| sum.checked_add(*dims)) != Some(pairs) =>
            {
                Err(format!(
                    "mrope_section is {sections:?}, expected to add up to half of the head dim, {pairs}"
                ))
            }
            _ => Ok(()),
        }
    }

    fn kinds(&self) -> impl Iterator<Item = &str> {
        [&self.rope_type, &self.older_type].into_iter().filter_map(Option::as_deref)
    }
}

/// The text model's entries in one object, whichever release of transformers wrote the file: on top, or in
/// `text_config`, which wins; the rotary entries in `rope_scaling` or `rope_parameters`, the base on top or there.
fn text_part(config: Value) -> Value {
    let mut text = published::text_encoder_defaults();
    text["file"] = config;
    merge(&mut text, "file");
    merge(&mut text, "text_config");
    let mut rope = json!({ "rope_theta": text["rope_theta"] });
    for name in ["rope_scaling", "rope_parameters"] {
        rope[name] = text[name].take();
        merge(&mut rope, name);
    }
    text["rope"] = rope;
    text
}

/// Moves the entries of the object `name` one level up.
fn merge(config: &mut Value, name: &str) {
    let Some(outer) = config.as_object_mut() else { return };
    if let Some(Value::Object(inner)) = outer.remove(name) {
        outer.extend(inner.into_iter().filter(|(_, value)| !value.is_null()));
    }
}

impl PromptTemplate {
    pub(super) fn read(source: &ModelSource) -> Result<Self, ModelError> {
        #[derive(Deserialize)]
        struct Index {
            prompt_template: Option<PromptTemplate>,
        }
        let file = ConfigFile::shared(source, "model_index.json", published::MODEL_INDEX)?;
        let template = file.parse::<Index>()?.prompt_template.unwrap_or_default();
        let tokens = [template.drop_tokens, template.max_tokens.unwrap_or(1)];
        if tokens[0] > MAX_TEMPLATE_TOKENS || !(1..=MAX_TEMPLATE_TOKENS).contains(&tokens[1]) {
            let reason = format!(
                "prompt_template: drop_tokens {} and max_tokens {}, expected 0 or 1 to {MAX_TEMPLATE_TOKENS}",
                tokens[0], tokens[1]
            );
            return Err(file.error(reason));
        }
        if template.text.matches("{}").count() != 1 {
            let reason = format!("prompt_template.text {:?}, expected exactly one {{}}", template.text);
            return Err(file.error(reason));
        }
        Ok(template)
    }
}

impl PromptTemplate {
    /// The special tokens in the text, such as `<|im_start|>`.
    pub(super) fn special_tokens(&self) -> impl Iterator<Item = &str> {
        let starts = self.text.match_indices("<|").map(|(start, _)| &self.text[start..]);
        starts.filter_map(|rest| Some(&rest[..rest.find("|>")? + 2]))
    }
}
