//! The transformer (MMDiT, arXiv 2403.03206): patches of latents that know their places, and double-stream blocks, in the
//! last of which the text ends. Numbers equal diffusers' `SD3Transformer2DModel`.

use burn::module::Module;
use burn::tensor::activation::silu;
use burn::tensor::{Device, Tensor};
use fewstep_kernels::{Gelu, norm_modulate};

use super::config::TransformerConfig;
use super::positions::PatchEmbed;
use crate::parts::double_stream::{Block, EPSILON, KEYS, OUTPUT, Shared, Streams, key_mask};
use crate::parts::linear::Linear;
use crate::parts::patches::{PATCH, unpack_by_place};
use crate::parts::rotary::exact_table;
use crate::parts::timestep::TimeTextEmbed;
use crate::weights::load;
use crate::{Condition, ModelError, ModelSource, WeightType};

/// Parameters that start at zero when trained from scratch.
pub(super) const ZERO_AT_START: &[&str] = &["img_mod", "txt_mod", "norm_out", "proj_out"];

/// The order of a block's modules in diffusers.
const BLOCK_ORDER: [&str; 18] = [
    "img_mod",
    "txt_mod",
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.add_q_proj",
    "attn.to_out",
    "attn.to_add_out",
    "attn2.to_q",
    "attn2.to_k",
    "attn2.to_v",
    "attn2.to_out",
    "img_mlp.up",
    "img_mlp.down",
    "txt_mlp.up",
    "txt_mlp.down",
];

/// The denoiser.
#[derive(Module, Debug)]
pub struct Transformer {
    pos_embed: PatchEmbed,
    time_text_embed: TimeTextEmbed,
    context_embedder: Linear,
    transformer_blocks: Vec<Block>,
    norm_out: Modulator,
    proj_out: Linear,
    #[module(skip)]
    config: TransformerConfig,
    /// Backward passes compute the inside of each block again instead of keeping it.
    #[module(skip)]
    recomputes_blocks: bool,
}

#[derive(Module, Debug)]
struct Modulator {
    linear: Linear,
}

impl Transformer {
    /// Loads the component `transformer` of a model on the plain side of `device`, in a number type.
    ///
    /// # Errors
    /// If its config or weights are missing, damaged or do not fit each other.
    pub fn from_pretrained(
        source: &ModelSource,
        dtype: WeightType,
        device: &Device,
    ) -> Result<Self, ModelError> {
        let empty = Self::unfilled(&TransformerConfig::read(source)?, device);
        load(empty, &source.weights(super::DENOISER)?, &KEYS, dtype)
    }

    pub(super) fn unfilled(config: &TransformerConfig, device: &Device) -> Self {
        let width = config.heads().width();
        let linear = |input, output| Linear::unfilled(input, output, true, device);
        let block = |index| Block::unfilled_as(&config.layout(index), device);
        Self {
            pos_embed: PatchEmbed::unfilled(config, device),
            time_text_embed: TimeTextEmbed::unfilled(config.pooled_projection_dim, width, false, device),
            context_embedder: linear(config.joint_attention_dim, width),
            transformer_blocks: (0..config.num_layers).map(block).collect(),
            norm_out: Modulator { linear: linear(width, 2 * width) },
            proj_out: linear(width, PATCH * PATCH * config.in_channels),
            config: config.clone(),
            recomputes_blocks: false,
        }
    }

    /// With the table of places that a model begins with.
    pub(super) fn with_fresh_places(self) -> Self {
        Self { pos_embed: self.pos_embed.with_fresh_table(&self.config), ..self }
    }

    /// Whether a backward pass through [`Transformer::forward`] keeps what goes into each block alone, and computes its
    /// inside again (gradient checkpointing).
    pub fn recomputes_blocks_mut(&mut self) -> &mut bool {
        &mut self.recomputes_blocks
    }

    /// The config it was made with.
    pub(super) fn config(&self) -> &TransformerConfig {
        &self.config
    }

    /// The velocity at latents.
    ///
    /// # Shapes
    /// - `latents`: `[B, C, H, W]`, even sides of at most twice the table's
    /// - `timestep`: `[B]` in 0 to 1000
    /// - output `[B, C, H, W]`
    ///
    /// # Panics
    /// If the condition has no pooled states.
    pub fn forward(&self, latents: Tensor<4>, timestep: Tensor<1>, condition: &Condition) -> Tensor<4> {
        let [_, channels, height, width] = latents.dims();
        let (mut streams, shared) = self.embed(latents, timestep, condition);
        let (last, blocks) = self.transformer_blocks.split_last().expect("a transformer has blocks");
        for block in blocks {
            streams = block.forward(streams, &shared);
        }
        let image = last.forward_image(streams, &shared);
        let modulation = self.norm_out.linear.forward(shared.time);
        let output = self.proj_out.forward(norm_modulate(image, modulation, OUTPUT, EPSILON));
        unpack_by_place(output, [channels, height, width])
    }

    /// Image and text tokens after each block but the last, `[B, N, D]` and `[B, S, D]`, and image tokens after the last:
    /// where two implementations part.
    ///
    /// Takes what [`Transformer::forward`] takes.
    pub fn block_states(
        &self,
        latents: Tensor<4>,
        timestep: Tensor<1>,
        condition: &Condition,
    ) -> (Vec<[Tensor<3>; 2]>, Tensor<3>) {
        let (mut streams, shared) = self.embed(latents, timestep, condition);
        let (last, blocks) = self.transformer_blocks.split_last().expect("a transformer has blocks");
        let mut states = Vec::new();
        for block in blocks {
            streams = block.forward(streams, &shared);
            states.push([streams.image.clone(), streams.text.clone()]);
        }
        (states, last.forward_image(streams, &shared))
    }

    fn embed(&self, latents: Tensor<4>, timestep: Tensor<1>, condition: &Condition) -> (Streams, Shared) {
        let image = self.pos_embed.forward(latents); // [B, N, D]
        let (image_tokens, text_tokens) = (image.dims()[1], condition.text.dims()[1]);
        let heads = self.config.heads();
        // Places are in the tokens already: nothing is rotated.
        let nowhere = (0..text_tokens + image_tokens).map(|_| [0]);
        let shared = Shared {
            time: silu(self.time_text_embed.forward(timestep, 0.0, condition)),
            rotary: exact_table(nowhere, [heads.dim], 1.0),
            keys: key_mask(condition, image_tokens),
            gelu: Gelu::Tanh,
            heads: heads.count,
            recomputes: self.recomputes_blocks,
        };
        (Streams { image, text: self.context_embedder.forward(condition.text.clone()) }, shared)
    }

    /// Every projection of tokens and vectors with its module name, for adapters, in the order of the peers' modules: fresh
    /// adapters are drawn in it.
    pub(super) fn linears(&mut self) -> Vec<(String, &mut Linear)> {
        let mut linears = self.time_text_embed.linears();
        linears.push(("context_embedder".to_owned(), &mut self.context_embedder));
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
