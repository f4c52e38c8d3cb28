//! The transformer: double-stream blocks, in which image and text tokens have their own weights, then single-stream
//! blocks over both, with attention and MLP side by side. Numbers equal diffusers' `FluxTransformer2DModel`.

use burn::module::Module;
use burn::tensor::activation::silu;
use burn::tensor::{Device, Tensor};
use fewstep_kernels::{
    AttentionOptions, Gelu, Modulation, RotaryTable, attention, gated_residual, gelu, linear_concat,
    norm_modulate, recomputed, split_tokens,
};

use super::config::TransformerConfig;
use crate::parts::double_stream::{Block, EPSILON, Heads, KEYS, OUTPUT, Scale, Shared, Streams, key_mask};
use crate::parts::linear::Linear;
use crate::parts::rotary::exact_table;
use crate::parts::single_stream::qkv_of_one;
use crate::parts::timestep::TimeTextEmbed;
use crate::weights::load;
use crate::{Condition, ModelError, ModelSource, WeightType};

/// Parameters that start at zero when trained from scratch.
pub(super) const ZERO_AT_START: &[&str] = &["img_mod", "txt_mod", "norm.linear", "norm_out", "proj_out"];

/// Base of the rotary frequencies.
const THETA: f64 = 10_000.0;
/// σ in [0, 1] is the model's timestep / 1000, and its guidance input is a thousandth too; the features are taken of both
/// multiplied by this.
const FEATURE_SCALE: f32 = 1000.0;

/// Chunks of a single-stream block's modulation.
const SINGLE: Modulation = Modulation { shift: 0, scale: 1 };
const SINGLE_GATE: usize = 2;

/// The order of a double-stream block's modules in diffusers.
const BLOCK_ORDER: [&str; 14] = [
    "img_mod",
    "txt_mod",
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "img_mlp.up",
    "img_mlp.down",
    "txt_mlp.up",
    "txt_mlp.down",
];

/// The denoiser over packed latents.
#[derive(Module, Debug)]
pub struct Transformer {
    time_text_embed: TimeTextEmbed,
    context_embedder: Linear,
    x_embedder: Linear,
    transformer_blocks: Vec<Block>,
    single_transformer_blocks: Vec<SingleBlock>,
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

/// One block over all tokens: attention and MLP read the same modulated input, and one projection both.
#[derive(Module, Debug)]
struct SingleBlock {
    norm: Modulator,
    proj_mlp: Linear,
    proj_out: Linear,
    attn: SingleAttention,
}

#[derive(Module, Debug)]
struct SingleAttention {
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    norm_q: Scale,
    norm_k: Scale,
}

/// What the transformer is told beside latents and text.
#[derive(Clone, Debug)]
pub struct Told {
    /// `[B]`, a thousandth of the timestep.
    pub time: Tensor<1>,
    /// The guidance scale that a model which takes one follows.
    pub guidance: f32,
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
        let heads = config.heads();
        let width = heads.width();
        let linear = |input, output| Linear::unfilled(input, output, true, device);
        Self {
            time_text_embed: TimeTextEmbed::unfilled(
                config.pooled_projection_dim,
                width,
                config.guidance_embeds,
                device,
            ),
            context_embedder: linear(config.joint_attention_dim, width),
            x_embedder: linear(config.in_channels, width),
            transformer_blocks: (0..config.num_layers).map(|_| Block::unfilled(heads, device)).collect(),
            single_transformer_blocks: (0..config.num_single_layers)
                .map(|_| SingleBlock::unfilled(heads, device))
                .collect(),
            norm_out: Modulator { linear: linear(width, 2 * width) },
            proj_out: linear(width, config.in_channels),
            config: config.clone(),
            recomputes_blocks: false,
        }
    }

    /// Whether a backward pass through [`Transformer::forward`] keeps what goes into each block alone, and computes its
    /// inside again (gradient checkpointing).
    pub(super) fn recomputes_blocks_mut(&mut self) -> &mut bool {
        &mut self.recomputes_blocks
    }

    /// The config it was made with.
    pub(super) fn config(&self) -> &TransformerConfig {
        &self.config
    }

    /// The velocity at packed latents.
    ///
    /// # Shapes
    /// - `packed`: `[B, N, 4C]` with N = rows · columns
    /// - output `[B, N, 4C]`
    ///
    /// # Panics
    /// If the condition has no pooled states.
    pub fn forward(
        &self,
        packed: Tensor<3>,
        told: Told,
        condition: &Condition,
        [rows, columns]: [usize; 2],
    ) -> Tensor<3> {
        let (mut streams, shared) = self.embed(packed, told, condition, [rows, columns]);
        for block in &self.transformer_blocks {
            streams = block.forward(streams, &shared);
        }
        let text_tokens = streams.text.dims()[1];
        let mut tokens = Tensor::cat(vec![streams.text, streams.image], 1); // [B, S + N, D]
        for block in &self.single_transformer_blocks {
            tokens = block.forward(tokens, &shared);
        }
        let image = split_tokens(tokens, text_tokens..text_tokens + rows * columns);
        let modulation = self.norm_out.linear.forward(shared.time);
        self.proj_out.forward(norm_modulate(image, modulation, OUTPUT, EPSILON))
    }

    /// Image and text tokens after each block, `[B, N, D]` and `[B, S, D]`: where two implementations part.
    ///
    /// Takes what [`Transformer::forward`] takes.
    pub fn block_states(
        &self,
        packed: Tensor<3>,
        told: Told,
        condition: &Condition,
        [rows, columns]: [usize; 2],
    ) -> Vec<[Tensor<3>; 2]> {
        let (mut streams, shared) = self.embed(packed, told, condition, [rows, columns]);
        let mut states = Vec::new();
        for block in &self.transformer_blocks {
            streams = block.forward(streams, &shared);
            states.push([streams.image.clone(), streams.text.clone()]);
        }
        let text_tokens = streams.text.dims()[1];
        let mut tokens = Tensor::cat(vec![streams.text, streams.image], 1);
        for block in &self.single_transformer_blocks {
            tokens = block.forward(tokens, &shared);
            let image = tokens.clone().narrow(1, text_tokens, rows * columns);
            states.push([image, tokens.clone().narrow(1, 0, text_tokens)]);
        }
        states
    }

    fn embed(
        &self,
        packed: Tensor<3>,
        told: Told,
        condition: &Condition,
        grid: [usize; 2],
    ) -> (Streams, Shared) {
        let text_tokens = condition.text.dims()[1];
        let (time, guidance) = (told.time * FEATURE_SCALE, told.guidance * FEATURE_SCALE);
        let shared = Shared {
            time: silu(self.time_text_embed.forward(time, guidance, condition)),
            rotary: joint_table(text_tokens, grid, self.config.axes_dims_rope),
            keys: key_mask(condition, grid[0] * grid[1]),
            gelu: Gelu::Tanh,
            heads: self.config.heads().count,
            recomputes: self.recomputes_blocks,
        };
        let image = self.x_embedder.forward(packed);
        (Streams { image, text: self.context_embedder.forward(condition.text.clone()) }, shared)
    }

    /// Every projection with its module name, for adapters, in the order of the peers' modules: fresh adapters are
    /// drawn in it.
    pub(super) fn linears(&mut self) -> Vec<(String, &mut Linear)> {
        let mut linears = self.time_text_embed.linears();
        linears.push(("context_embedder".to_owned(), &mut self.context_embedder));
        linears.push(("x_embedder".to_owned(), &mut self.x_embedder));
        for (index, block) in self.transformer_blocks.iter_mut().enumerate() {
            let named = block.linears(BLOCK_ORDER).into_iter();
            linears
                .extend(named.map(|(name, linear)| (format!("transformer_blocks.{index}.{name}"), linear)));
        }
        for (index, block) in self.single_transformer_blocks.iter_mut().enumerate() {
            let name = |name| format!("single_transformer_blocks.{index}.{name}");
            linears.extend(block.linears().map(|(part, linear)| (name(part), linear)));
        }
        linears.push(("norm_out.linear".to_owned(), &mut self.norm_out.linear));
        linears.push(("proj_out".to_owned(), &mut self.proj_out));
        linears
    }
}

impl SingleBlock {
    fn unfilled(heads: Heads, device: &Device) -> Self {
        let width = heads.width();
        let linear = |input, output| Linear::unfilled(input, output, true, device);
        let norm = || Scale::unfilled(heads.dim, device);
        Self {
            norm: Modulator { linear: linear(width, 3 * width) },
            proj_mlp: linear(width, 4 * width),
            proj_out: linear(5 * width, width),
            attn: SingleAttention {
                to_q: linear(width, width),
                to_k: linear(width, width),
                to_v: linear(width, width),
                norm_q: norm(),
                norm_k: norm(),
            },
        }
    }

    fn linears(&mut self) -> [(&'static str, &mut Linear); 6] {
        [
            ("norm.linear", &mut self.norm.linear),
            ("proj_mlp", &mut self.proj_mlp),
            ("proj_out", &mut self.proj_out),
            ("attn.to_q", &mut self.attn.to_q),
            ("attn.to_k", &mut self.attn.to_k),
            ("attn.to_v", &mut self.attn.to_v),
        ]
    }

    /// `[B, S + N, D]`, text first.
    fn forward(&self, tokens: Tensor<3>, shared: &Shared) -> Tensor<3> {
        if !shared.recomputes_now() {
            return self.kept(tokens, shared);
        }
        let (time, shared) = shared.apart();
        recomputed(self, [tokens, time], move |block, [tokens, time]| block.kept(tokens, &shared.at(time)))
    }

    fn kept(&self, tokens: Tensor<3>, shared: &Shared) -> Tensor<3> {
        let modulation = self.norm.linear.forward(shared.time.clone());
        let input = norm_modulate(tokens.clone(), modulation.clone(), SINGLE, EPSILON);
        let attended = self.attn.forward(input.clone(), shared);
        let hidden = gelu(self.proj_mlp.forward(input), shared.gelu);
        let update = self.proj_out.forward(Tensor::cat(vec![attended, hidden], 2));
        gated_residual(tokens, update, modulation, SINGLE_GATE)
    }
}

impl SingleAttention {
    fn forward(&self, x: Tensor<3>, shared: &Shared) -> Tensor<3> {
        let projections = [&self.to_q, &self.to_k, &self.to_v].map(Linear::projection);
        let norms = [&self.norm_q, &self.norm_k];
        let qkv = qkv_of_one(linear_concat(x, projections), norms, shared.heads, (&shared.rotary, EPSILON));
        attention(qkv, AttentionOptions { keys: shared.keys.clone(), causal: false })
    }
}

/// Angles of text tokens, which have no place, followed by `rows × columns` image tokens, over the axes (spare, row,
/// column).
fn joint_table(text: usize, [rows, columns]: [usize; 2], axes: [usize; 3]) -> RotaryTable {
    let text = (0..text).map(|_| [0, 0, 0]);
    let image = (0..rows).flat_map(|row| (0..columns).map(move |column| [0, row, column]));
    exact_table(text.chain(image), axes, THETA)
}
