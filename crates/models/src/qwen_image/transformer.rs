//! The double-stream transformer (MMDiT): image and text tokens have their own weights and meet in one
//! attention per block. Numbers equal diffusers' `QwenImageTransformer2DModel`.

use burn::module::Module;
use burn::tensor::activation::silu;
use burn::tensor::{Device, Tensor};
use fewstep_kernels::{Gelu, norm_modulate, rms_norm};

use super::config::{PredictionType, TransformerConfig};
use super::rotary::joint_table;
use crate::parts::double_stream::{Block, EPSILON, OUTPUT, Scale, Shared, Streams, key_mask};
use crate::parts::linear::Linear;
use crate::parts::timestep::{TIME_FEATURES, TwoLayers, sinusoidal};
use crate::weights::{KeyMap, load};
use crate::{Condition, ModelError, ModelSource, WeightType};

pub(super) const KEYS: KeyMap = KeyMap {
    rules: &[
        (".to_out.", ".to_out.0."),
        ("_mlp.up.", "_mlp.net.0.proj."),
        ("_mlp.down.", "_mlp.net.2."),
        ("_mod.", "_mod.1."),
    ],
    ..KeyMap::PLAIN
};

/// Parameters that start at zero when trained from scratch.
pub(super) const ZERO_AT_START: &[&str] = &["img_mod", "txt_mod", "norm_out", "proj_out"];

/// σ in [0, 1] is the model's timestep / 1000; the features are taken of the timestep.
const TIME_SCALE: f32 = 1000.0;

/// The order of a block's modules in diffusers.
const BLOCK_ORDER: [&str; 14] = [
    "img_mod",
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_out",
    "attn.to_add_out",
    "img_mlp.up",
    "img_mlp.down",
    "txt_mod",
    "txt_mlp.up",
    "txt_mlp.down",
];

/// The denoiser over packed latents.
#[derive(Module, Debug)]
pub struct Transformer {
    time_text_embed: TimeTextEmbed,
    txt_norm: Scale,
    img_in: Linear,
    txt_in: Linear,
    transformer_blocks: Vec<Block>,
    norm_out: NormOut,
    proj_out: Linear,
    #[module(skip)]
    config: TransformerConfig,
    #[module(skip)]
    gelu: Gelu,
    /// Backward passes compute the inside of each block again instead of keeping it.
    #[module(skip)]
    recomputes_blocks: bool,
}

#[derive(Module, Debug)]
struct TimeTextEmbed {
    timestep_embedder: TwoLayers,
}

#[derive(Module, Debug)]
struct NormOut {
    linear: Linear,
}

impl Transformer {
    /// Loads the component `transformer` of a model on the plain side of `device`.
    ///
    /// # Errors
    /// If its config or weights are missing, damaged or do not fit each other.
    pub fn from_pretrained(source: &ModelSource, device: &Device) -> Result<Self, ModelError> {
        Self::from_pretrained_in(source, WeightType::F32, device)
    }

    /// The same in a number type.
    pub(super) fn from_pretrained_in(
        source: &ModelSource,
        dtype: WeightType,
        device: &Device,
    ) -> Result<Self, ModelError> {
        let empty = Self::unfilled(&TransformerConfig::read(source)?, device);
        load(empty, &source.weights("transformer")?, &KEYS, dtype)
    }

    /// J.
    pub(crate) fn text_width(&self) -> usize {
        self.config.joint_attention_dim
    }

    pub(super) fn unfilled(config: &TransformerConfig, device: &Device) -> Self {
        let heads = config.heads();
        let width = heads.width();
        let linear = |input, output| Linear::unfilled(input, output, true, device);
        Self {
            time_text_embed: TimeTextEmbed {
                timestep_embedder: TwoLayers::unfilled(TIME_FEATURES, width, device),
            },
            txt_norm: Scale::unfilled(config.joint_attention_dim, device),
            img_in: linear(config.in_channels, width),
            txt_in: linear(config.joint_attention_dim, width),
            transformer_blocks: (0..config.num_layers).map(|_| Block::unfilled(heads, device)).collect(),
            norm_out: NormOut { linear: linear(width, 2 * width) },
            proj_out: linear(width, config.in_channels),
            config: config.clone(),
            gelu: Gelu::Tanh,
            recomputes_blocks: false,
        }
    }

    /// The same weights with another activation of the MLPs; they were trained with the tanh form.
    pub fn with_gelu(self, gelu: Gelu) -> Self {
        Self { gelu, ..self }
    }

    /// Whether a backward pass through [`Transformer::forward`] keeps what goes into each block alone, and computes its
    /// inside again (gradient checkpointing).
    pub fn recomputes_blocks_mut(&mut self) -> &mut bool {
        &mut self.recomputes_blocks
    }

    /// What [`Transformer::forward`] returns.
    pub fn prediction_type(&self) -> PredictionType {
        self.config.prediction_type
    }

    /// The output at packed latents, a velocity or clean latents by [`Transformer::prediction_type`].
    ///
    /// # Shapes
    /// - `packed`: `[B, N, 4C]` with N = rows · columns
    /// - `sigma`: `[B]` in [0, 1]
    /// - output `[B, N, 4C]`
    pub fn forward(
        &self,
        packed: Tensor<3>,
        sigma: Tensor<1>,
        condition: &Condition,
        [rows, columns]: [usize; 2],
    ) -> Tensor<3> {
        let (mut streams, shared) = self.embed(packed, sigma, condition, [rows, columns]);
        let (last, blocks) = self.transformer_blocks.split_last().expect("a transformer has blocks");
        for block in blocks {
            streams = block.forward(streams, &shared);
        }
        let image = last.forward_image(streams, &shared);
        let modulation = self.norm_out.linear.forward(shared.time);
        self.proj_out.forward(norm_modulate(image, modulation, OUTPUT, EPSILON))
    }

    /// Image and text tokens after each block, `[B, N, D]` and `[B, S, D]`: where two implementations part.
    ///
    /// Takes what [`Transformer::forward`] takes.
    pub fn block_states(
        &self,
        packed: Tensor<3>,
        sigma: Tensor<1>,
        condition: &Condition,
        [rows, columns]: [usize; 2],
    ) -> Vec<[Tensor<3>; 2]> {
        let (mut streams, shared) = self.embed(packed, sigma, condition, [rows, columns]);
        let mut states = Vec::with_capacity(self.transformer_blocks.len());
        for block in &self.transformer_blocks {
            streams = block.forward(streams, &shared);
            states.push([streams.image.clone(), streams.text.clone()]);
        }
        states
    }

    fn embed(
        &self,
        packed: Tensor<3>,
        sigma: Tensor<1>,
        condition: &Condition,
        [rows, columns]: [usize; 2],
    ) -> (Streams, Shared) {
        let shared = Shared {
            time: silu(self.embed_time(sigma)),
            rotary: joint_table(condition.text.dims()[1], [rows, columns], self.config.axes_dims_rope),
            keys: key_mask(condition, rows * columns),
            gelu: self.gelu,
            heads: self.config.num_attention_heads,
            recomputes: self.recomputes_blocks,
        };
        let streams =
            Streams { image: self.img_in.forward(packed), text: self.embed_text(condition.text.clone()) };
        (streams, shared)
    }

    /// `[B]` to `[B, D]`.
    fn embed_time(&self, sigma: Tensor<1>) -> Tensor<2> {
        let features = sinusoidal(sigma, TIME_FEATURES, TIME_SCALE);
        self.time_text_embed.timestep_embedder.forward(features)
    }

    /// `[B, S, J]` to `[B, S, D]`.
    fn embed_text(&self, text: Tensor<3>) -> Tensor<3> {
        self.txt_in.forward(rms_norm(text, self.txt_norm.weight.val(), EPSILON))
    }
}

impl Transformer {
    /// Every projection with its module name, for adapters, in the order of the peers' modules: fresh adapters are
    /// drawn in it.
    pub(crate) fn linears(&mut self) -> Vec<(String, &mut Linear)> {
        let embedder = &mut self.time_text_embed.timestep_embedder;
        let mut linears = vec![
            ("time_text_embed.timestep_embedder.linear_1".to_owned(), &mut embedder.linear_1),
            ("time_text_embed.timestep_embedder.linear_2".to_owned(), &mut embedder.linear_2),
            ("img_in".to_owned(), &mut self.img_in),
            ("txt_in".to_owned(), &mut self.txt_in),
        ];
        for (index, block) in self.transformer_blocks.iter_mut().enumerate() {
            let named = block.linears(BLOCK_ORDER).into_iter();
            linears
                .extend(named.map(|(name, linear)| (format!("transformer_blocks.{index}.{name}"), linear)));
        }
        linears.push(("norm_out.linear".to_owned(), &mut self.norm_out.linear));
        linears.push(("proj_out".to_owned(), &mut self.proj_out));
        linears
    }
}

#[cfg(test)]
mod tests;
