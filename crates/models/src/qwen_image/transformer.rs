//! The double-stream transformer (MMDiT): image and text tokens have their own weights and meet in one
//! attention per block. Numbers equal diffusers' `QwenImageTransformer2DModel`.

use burn::module::{Module, Param};
use burn::tensor::activation::silu;
use burn::tensor::{Device, Tensor};
use fewstep_kernels::{
    AttentionOptions, Gelu, KeyMask, Modulation, QkvStream, RotaryTable, attention, gated_residual, gelu,
    joint_qkv, linear_concat, norm_modulate, recomputed, rms_norm, split_tokens,
};

use super::config::{PredictionType, TransformerConfig};
use super::rotary::joint_table;
use crate::parts::linear::Linear;
use crate::parts::timestep::sinusoidal;
use crate::weights::{KeyMap, load, unfilled};
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

const EPSILON: f32 = 1e-6;
/// Width of the sinusoidal time features.
pub(super) const TIME_FEATURES: usize = 256;
/// σ in [0, 1] is the model's timestep / 1000; the features are taken of the timestep.
const TIME_SCALE: f32 = 1000.0;

/// Chunks of a stream's modulation, in the order of the projection's output.
const ATTENTION: Modulation = Modulation { shift: 0, scale: 1 };
const ATTENTION_GATE: usize = 2;
const MLP: Modulation = Modulation { shift: 3, scale: 4 };
const MLP_GATE: usize = 5;
/// The final modulation has its scale first.
const OUTPUT: Modulation = Modulation { shift: 1, scale: 0 };

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
    timestep_embedder: TimestepEmbedder,
}

#[derive(Module, Debug)]
struct TimestepEmbedder {
    linear_1: Linear,
    linear_2: Linear,
}

/// The weight of an RMS norm.
#[derive(Module, Debug)]
struct Scale {
    weight: Param<Tensor<1>>,
}

#[derive(Module, Debug)]
struct NormOut {
    linear: Linear,
}

/// One block: joint attention, then an MLP per stream, each modulated and gated by the time.
#[derive(Module, Debug)]
struct Block {
    img_mod: Linear,
    txt_mod: Linear,
    attn: JointAttention,
    img_mlp: Mlp,
    txt_mlp: Mlp,
}

#[derive(Module, Debug)]
struct JointAttention {
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
    add_q_proj: Linear,
    add_k_proj: Linear,
    add_v_proj: Linear,
    to_add_out: Linear,
    norm_q: Scale,
    norm_k: Scale,
    norm_added_q: Scale,
    norm_added_k: Scale,
}

#[derive(Module, Debug)]
struct Mlp {
    up: Linear,
    down: Linear,
}

/// The two streams, `[B, N, D]` and `[B, S, D]`.
struct Streams {
    image: Tensor<3>,
    text: Tensor<3>,
}

/// The modulations of the two streams, `[B, 6 D]` each.
struct Modulations {
    image: Tensor<2>,
    text: Tensor<2>,
}

/// One of the two streams.
#[derive(Clone, Copy)]
enum Side {
    Image,
    Text,
}

/// What every block of one evaluation shares.
#[derive(Clone)]
struct Shared {
    /// SiLU of the time embedding, `[B, D]`.
    time: Tensor<2>,
    rotary: RotaryTable,
    keys: Option<KeyMask>,
    gelu: Gelu,
    heads: usize,
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
        let width = config.num_attention_heads * config.attention_head_dim;
        let linear = |input, output| Linear::unfilled(input, output, true, device);
        Self {
            time_text_embed: TimeTextEmbed {
                timestep_embedder: TimestepEmbedder {
                    linear_1: linear(TIME_FEATURES, width),
                    linear_2: linear(width, width),
                },
            },
            txt_norm: Scale::unfilled(config.joint_attention_dim, device),
            img_in: linear(config.in_channels, width),
            txt_in: linear(config.joint_attention_dim, width),
            transformer_blocks: (0..config.num_layers).map(|_| Block::unfilled(config, device)).collect(),
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

    /// The same weights with gradient checkpointing: a backward pass through [`Transformer::forward`] keeps what goes
    /// into each block, and computes its inside again.
    pub fn recomputing_blocks(self, recomputes_blocks: bool) -> Self {
        Self { recomputes_blocks, ..self }
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
            streams = if self.recomputes_blocks {
                block.forward_recomputed(streams, &shared)
            } else {
                block.forward(streams, &shared)
            };
        }
        let image = if self.recomputes_blocks {
            last.forward_image_recomputed(streams, &shared)
        } else {
            last.forward_image(streams, &shared)
        };
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
        };
        let streams =
            Streams { image: self.img_in.forward(packed), text: self.embed_text(condition.text.clone()) };
        (streams, shared)
    }

    /// `[B]` to `[B, D]`.
    fn embed_time(&self, sigma: Tensor<1>) -> Tensor<2> {
        let embedder = &self.time_text_embed.timestep_embedder;
        let hidden = embedder.linear_1.forward(sinusoidal(sigma, TIME_FEATURES, TIME_SCALE));
        embedder.linear_2.forward(silu(hidden))
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
            let named = block.linears().into_iter();
            linears
                .extend(named.map(|(name, linear)| (format!("transformer_blocks.{index}.{name}"), linear)));
        }
        linears.push(("norm_out.linear".to_owned(), &mut self.norm_out.linear));
        linears.push(("proj_out".to_owned(), &mut self.proj_out));
        linears
    }
}

/// Hides padded text tokens; `None` where there are none.
fn key_mask(condition: &Condition, image_tokens: usize) -> Option<KeyMask> {
    let tokens = condition.text.dims()[1];
    let padded = condition.lengths.iter().any(|length| *length < tokens);
    padded.then(|| KeyMask::from_lengths(&condition.lengths, tokens, image_tokens))
}

impl Scale {
    fn unfilled(width: usize, device: &Device) -> Self {
        Self { weight: unfilled([width], device) }
    }
}

impl Block {
    fn unfilled(config: &TransformerConfig, device: &Device) -> Self {
        let width = config.num_attention_heads * config.attention_head_dim;
        Self {
            img_mod: Linear::unfilled(width, 6 * width, true, device),
            txt_mod: Linear::unfilled(width, 6 * width, true, device),
            attn: JointAttention::unfilled(config, device),
            img_mlp: Mlp::unfilled(width, device),
            txt_mlp: Mlp::unfilled(width, device),
        }
    }

    fn linears(&mut self) -> [(&'static str, &mut Linear); 14] {
        let attn = &mut self.attn;
        [
            ("img_mod", &mut self.img_mod),
            ("attn.to_q", &mut attn.to_q),
            ("attn.to_k", &mut attn.to_k),
            ("attn.to_v", &mut attn.to_v),
            ("attn.add_q_proj", &mut attn.add_q_proj),
            ("attn.add_k_proj", &mut attn.add_k_proj),
            ("attn.add_v_proj", &mut attn.add_v_proj),
            ("attn.to_out", &mut attn.to_out),
            ("attn.to_add_out", &mut attn.to_add_out),
            ("img_mlp.up", &mut self.img_mlp.up),
            ("img_mlp.down", &mut self.img_mlp.down),
            ("txt_mod", &mut self.txt_mod),
            ("txt_mlp.up", &mut self.txt_mlp.up),
            ("txt_mlp.down", &mut self.txt_mlp.down),
        ]
    }

    fn forward(&self, streams: Streams, shared: &Shared) -> Streams {
        let (attended, modulations) = self.attend(&streams, shared);
        Streams {
            image: self.after_attention(
                Side::Image,
                streams.image,
                attended.image,
                modulations.image,
                shared,
            ),
            text: self.after_attention(Side::Text, streams.text, attended.text, modulations.text, shared),
        }
    }

    /// The image after the last block: nothing reads its text any more.
    fn forward_image(&self, streams: Streams, shared: &Shared) -> Tensor<3> {
        let (attended, modulations) = self.attend(&streams, shared);
        self.after_attention(Side::Image, streams.image, attended.image, modulations.image, shared)
    }

    /// [`Block::forward`] with gradient checkpointing.
    fn forward_recomputed(&self, streams: Streams, shared: &Shared) -> Streams {
        let (text, image) = (streams.text.dims()[1], streams.image.dims()[1]);
        let joint = self.recomputed(streams, shared, |block, streams, shared| {
            let Streams { image, text } = block.forward(streams, shared);
            Tensor::cat(vec![text, image], 1)
        }); // [B, S + N, D]
        Streams { text: split_tokens(joint.clone(), 0..text), image: split_tokens(joint, text..text + image) }
    }

    /// [`Block::forward_image`] with gradient checkpointing.
    fn forward_image_recomputed(&self, streams: Streams, shared: &Shared) -> Tensor<3> {
        self.recomputed(streams, shared, Self::forward_image)
    }

    fn recomputed(
        &self,
        streams: Streams,
        shared: &Shared,
        forward: fn(&Self, Streams, &Shared) -> Tensor<3>,
    ) -> Tensor<3> {
        let inputs = [streams.image, streams.text, shared.time.clone().unsqueeze_dim(1)];
        // The time goes in as an input: a graph that ends outside of the node must not be held by it.
        let shared = Shared { time: shared.time.clone().inner(), ..shared.clone() };
        recomputed(self, inputs, move |block, [image, text, time]| {
            let shared = Shared { time: time.squeeze_dim(1), ..shared.clone() };
            forward(block, Streams { image, text }, &shared)
        })
    }

    /// What both streams attend to, and their modulations.
    fn attend(&self, streams: &Streams, shared: &Shared) -> (Streams, Modulations) {
        let image = self.img_mod.forward(shared.time.clone());
        let text = self.txt_mod.forward(shared.time.clone());
        let normed = Streams {
            image: norm_modulate(streams.image.clone(), image.clone(), ATTENTION, EPSILON),
            text: norm_modulate(streams.text.clone(), text.clone(), ATTENTION, EPSILON),
        };
        (self.attn.attend(normed, shared), Modulations { image, text })
    }

    /// The rest of one stream: the attention's projection and the MLP, each gated into the residual.
    fn after_attention(
        &self,
        side: Side,
        x: Tensor<3>,
        attended: Tensor<3>,
        modulation: Tensor<2>,
        shared: &Shared,
    ) -> Tensor<3> {
        let (projection, mlp) = match side {
            Side::Image => (&self.attn.to_out, &self.img_mlp),
            Side::Text => (&self.attn.to_add_out, &self.txt_mlp),
        };
        let x = gated_residual(x, projection.forward(attended), modulation.clone(), ATTENTION_GATE);
        mlp.forward(x, modulation, shared.gelu)
    }
}

impl JointAttention {
    fn unfilled(config: &TransformerConfig, device: &Device) -> Self {
        let width = config.num_attention_heads * config.attention_head_dim;
        let square = || Linear::unfilled(width, width, true, device);
        let norm = || Scale::unfilled(config.attention_head_dim, device);
        Self {
            to_q: square(),
            to_k: square(),
            to_v: square(),
            to_out: square(),
            add_q_proj: square(),
            add_k_proj: square(),
            add_v_proj: square(),
            to_add_out: square(),
            norm_q: norm(),
            norm_k: norm(),
            norm_added_q: norm(),
            norm_added_k: norm(),
        }
    }

    /// Attends over [text, image]; the streams are still to be projected.
    fn attend(&self, streams: Streams, shared: &Shared) -> Streams {
        let (text_tokens, image_tokens) = (streams.text.dims()[1], streams.image.dims()[1]);
        let image = [&self.to_q, &self.to_k, &self.to_v].map(Linear::projection);
        let text = [&self.add_q_proj, &self.add_k_proj, &self.add_v_proj].map(Linear::projection);
        let qkv = joint_qkv(
            QkvStream {
                qkv: linear_concat(streams.text, text),
                norm_q: self.norm_added_q.weight.val(),
                norm_k: self.norm_added_k.weight.val(),
            },
            QkvStream {
                qkv: linear_concat(streams.image, image),
                norm_q: self.norm_q.weight.val(),
                norm_k: self.norm_k.weight.val(),
            },
            shared.heads,
            &shared.rotary,
            EPSILON,
        ); // [3, B, K, S + N, E]
        let joint = attention(qkv, AttentionOptions { keys: shared.keys.clone(), causal: false }); // [B, S + N, D]
        Streams {
            text: split_tokens(joint.clone(), 0..text_tokens),
            image: split_tokens(joint, text_tokens..text_tokens + image_tokens),
        }
    }
}

impl Mlp {
    fn unfilled(width: usize, device: &Device) -> Self {
        Self {
            up: Linear::unfilled(width, 4 * width, true, device),
            down: Linear::unfilled(4 * width, width, true, device),
        }
    }

    /// The modulated, gated MLP with its residual.
    fn forward(&self, x: Tensor<3>, modulation: Tensor<2>, kind: Gelu) -> Tensor<3> {
        let hidden = self.up.forward(norm_modulate(x.clone(), modulation.clone(), MLP, EPSILON));
        gated_residual(x, self.down.forward(gelu(hidden, kind)), modulation, MLP_GATE)
    }
}

#[cfg(test)]
mod tests;
