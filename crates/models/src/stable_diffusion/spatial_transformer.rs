//! Attention among the pixels of a stage and to the text (diffusers' `Transformer2DModel`).

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use fewstep_kernels::{
    AttentionOptions, Gate, Gelu, attention, cross_attention, glu_halves, linear_concat, recomputed,
};

use super::config::UnetConfig;
use crate::parts::attention::by_heads;
use crate::parts::conv::Conv2d;
use crate::parts::linear::Linear;
use crate::parts::norm::{GroupNorm, LayerNorm};

/// Of the norm before a transformer, and of those inside; no config says another.
const GROUP_EPSILON: f32 = 1e-6;
const LAYER_EPSILON: f32 = 1e-5;

/// Transformer blocks over the pixels, with a residual around them.
#[derive(Module, Debug)]
pub(super) struct SpatialTransformer {
    norm: GroupNorm,
    proj_in: Projection,
    transformer_blocks: Vec<Block>,
    proj_out: Projection,
}

/// One map for all pixels. Files of older models have it as a convolution.
#[derive(Module, Debug)]
enum Projection {
    Conv(Conv2d),
    Linear(Linear),
}

#[derive(Module, Debug)]
struct Block {
    norm1: LayerNorm,
    attn1: Attention,
    norm2: LayerNorm,
    attn2: Attention,
    norm3: LayerNorm,
    ff: FeedForward,
}

#[derive(Module, Debug)]
struct Attention {
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
    #[module(skip)]
    heads: usize,
}

/// A gated MLP: half of the first projection's output, times the GELU of the other half.
#[derive(Module, Debug)]
struct FeedForward {
    up: Linear,
    down: Linear,
}

impl SpatialTransformer {
    /// For a stage of the UNet.
    pub(super) fn unfilled(config: &UnetConfig, stage: usize, device: &Device) -> Self {
        let width = config.block_out_channels[stage];
        let projection = || match config.use_linear_projection {
            true => Projection::Linear(Linear::unfilled(width, width, true, device)),
            false => Projection::Conv(Conv2d::unfilled(width, width, 1, device)),
        };
        Self {
            norm: GroupNorm::unfilled(config.norm_num_groups, width, GROUP_EPSILON, device),
            proj_in: projection(),
            transformer_blocks: (0..config.depth(stage))
                .map(|_| Block::unfilled([width, config.cross_attention_dim], config.heads(stage), device))
                .collect(),
            proj_out: projection(),
        }
    }

    /// # Shapes
    /// - `x` and output: `[B, D, H, W]`
    /// - `text`: `[B, S, J]`
    ///
    /// A backward pass computes the inside of each block again where it `recomputes`.
    pub(super) fn forward(&self, x: Tensor<4>, text: &Tensor<3>, recomputes: bool) -> Tensor<4> {
        let [_, _, height, width] = x.dims();
        let mut tokens = self.proj_in.of_picture(self.norm.forward(x.clone()));
        for block in &self.transformer_blocks {
            tokens = match recomputes {
                true => recomputed(block, [tokens, text.clone()], |block, [tokens, text]| {
                    block.forward(tokens, &text)
                }),
                false => block.forward(tokens, text),
            };
        }
        self.proj_out.to_picture(tokens, [height, width]) + x
    }

    /// Every linear projection by its module name, in the order of the peers' modules.
    pub(super) fn linears(&mut self) -> Vec<(String, &mut Linear)> {
        let mut linears = Vec::new();
        linears.extend(as_linear(&mut self.proj_in).map(|linear| ("proj_in".to_owned(), linear)));
        for (index, block) in self.transformer_blocks.iter_mut().enumerate() {
            let named = block.linears().into_iter();
            linears
                .extend(named.map(|(name, linear)| (format!("transformer_blocks.{index}.{name}"), linear)));
        }
        linears.extend(as_linear(&mut self.proj_out).map(|linear| ("proj_out".to_owned(), linear)));
        linears
    }
}

fn as_linear(projection: &mut Projection) -> Option<&mut Linear> {
    match projection {
        Projection::Linear(linear) => Some(linear),
        Projection::Conv(_) => None,
    }
}

impl Projection {
    /// `[B, D, H, W]` to `[B, H · W, D]`.
    fn of_picture(&self, x: Tensor<4>) -> Tensor<3> {
        match self {
            Self::Conv(conv) => to_tokens(conv.forward(x)),
            Self::Linear(linear) => linear.forward(to_tokens(x)),
        }
    }

    /// `[B, H · W, D]` to `[B, D, H, W]`.
    fn to_picture(&self, tokens: Tensor<3>, size: [usize; 2]) -> Tensor<4> {
        match self {
            Self::Conv(conv) => conv.forward(from_tokens(tokens, size)),
            Self::Linear(linear) => from_tokens(linear.forward(tokens), size),
        }
    }
}

fn to_tokens(x: Tensor<4>) -> Tensor<3> {
    let [batch, width, rows, columns] = x.dims();
    x.reshape([batch, width, rows * columns]).swap_dims(1, 2)
}

fn from_tokens(tokens: Tensor<3>, [rows, columns]: [usize; 2]) -> Tensor<4> {
    let [batch, _, width] = tokens.dims();
    tokens.swap_dims(1, 2).reshape([batch, width, rows, columns])
}

impl Block {
    fn unfilled([width, text]: [usize; 2], heads: usize, device: &Device) -> Self {
        let norm = || LayerNorm::unfilled(width, LAYER_EPSILON, device);
        Self {
            norm1: norm(),
            attn1: Attention::unfilled([width, width], heads, device),
            norm2: norm(),
            attn2: Attention::unfilled([width, text], heads, device),
            norm3: norm(),
            ff: FeedForward {
                up: Linear::unfilled(width, 8 * width, true, device),
                down: Linear::unfilled(4 * width, width, true, device),
            },
        }
    }

    fn linears(&mut self) -> [(&'static str, &mut Linear); 10] {
        let (attn1, attn2) = (&mut self.attn1, &mut self.attn2);
        [
            ("attn1.to_q", &mut attn1.to_q),
            ("attn1.to_k", &mut attn1.to_k),
            ("attn1.to_v", &mut attn1.to_v),
            ("attn1.to_out", &mut attn1.to_out),
            ("attn2.to_q", &mut attn2.to_q),
            ("attn2.to_k", &mut attn2.to_k),
            ("attn2.to_v", &mut attn2.to_v),
            ("attn2.to_out", &mut attn2.to_out),
            ("ff.up", &mut self.ff.up),
            ("ff.down", &mut self.ff.down),
        ]
    }

    fn forward(&self, x: Tensor<3>, text: &Tensor<3>) -> Tensor<3> {
        let x = x.clone() + self.attn1.among(self.norm1.forward(x));
        let x = x.clone() + self.attn2.to(self.norm2.forward(x), text);
        x.clone() + self.ff.forward(self.norm3.forward(x))
    }
}

impl Attention {
    fn unfilled([width, states]: [usize; 2], heads: usize, device: &Device) -> Self {
        let linear = |input, bias| Linear::unfilled(input, width, bias, device);
        Self {
            to_q: linear(width, false),
            to_k: linear(states, false),
            to_v: linear(states, false),
            to_out: linear(width, true),
            heads,
        }
    }

    /// Attention among the tokens themselves.
    fn among(&self, x: Tensor<3>) -> Tensor<3> {
        let projections = [&self.to_q, &self.to_k, &self.to_v].map(Linear::projection);
        let qkv = by_heads(linear_concat(x, projections), self.heads);
        self.to_out.forward(attention(qkv, AttentionOptions::default()))
    }

    /// Attention to the text.
    fn to(&self, x: Tensor<3>, text: &Tensor<3>) -> Tensor<3> {
        let (key, value) = (self.to_k.forward(text.clone()), self.to_v.forward(text.clone()));
        self.to_out.forward(cross_attention(self.to_q.forward(x), key, value, self.heads))
    }
}

impl FeedForward {
    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        self.down.forward(glu_halves(self.up.forward(x), Gate::Gelu(Gelu::Exact)))
    }
}
