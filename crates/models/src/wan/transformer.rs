//! The transformer: blocks of attention among the tokens of all frames, attention to the text, and an MLP. Numbers equal
//! diffusers' `WanTransformer3DModel`.

use burn::module::{Module, Param};
use burn::tensor::activation::silu;
use burn::tensor::{Device, Tensor};
use fewstep_kernels::{
    AttentionOptions, Gelu, Modulation, Projection, RotaryTable, attention, cross_attention, gated_residual,
    gelu, linear, linear_concat, norm_modulate, recomputed, rms_norm,
};

use super::config::TransformerConfig;
use crate::load_options::widened;
use crate::parts::double_stream::{Heads, Scale};
use crate::parts::linear::Linear;
use crate::parts::norm::LayerNorm;
use crate::parts::rotary::exact_table;
use crate::parts::single_stream::qkv_of_one;
use crate::parts::timestep::{TwoLayers, sinusoidal};
use crate::weights::{KeyMap, load, unfilled};
use crate::{ModelError, ModelSource, WeightType};

/// Files of Wan's authors, which DiffSynth-Studio reads, have other names.
pub(super) const KEYS: KeyMap = KeyMap {
    rules: &[(".to_out.", ".to_out.0."), (".ffn.up.", ".ffn.net.0.proj."), (".ffn.down.", ".ffn.net.2.")],
    aliases: &[
        ("text_embedding.0.", "condition_embedder.text_embedder.linear_1."),
        ("text_embedding.2.", "condition_embedder.text_embedder.linear_2."),
        ("time_embedding.0.", "condition_embedder.time_embedder.linear_1."),
        ("time_embedding.2.", "condition_embedder.time_embedder.linear_2."),
        ("time_projection.1.", "condition_embedder.time_proj."),
        ("head.head.", "proj_out."),
        ("head.modulation", "scale_shift_table"),
    ],
    respelled: &[
        (".self_attn.q.", ".attn1.to_q."),
        (".self_attn.k.", ".attn1.to_k."),
        (".self_attn.v.", ".attn1.to_v."),
        (".self_attn.o.", ".attn1.to_out.0."),
        (".self_attn.", ".attn1."),
        (".cross_attn.q.", ".attn2.to_q."),
        (".cross_attn.k.", ".attn2.to_k."),
        (".cross_attn.v.", ".attn2.to_v."),
        (".cross_attn.o.", ".attn2.to_out.0."),
        (".cross_attn.", ".attn2."),
        (".norm3.", ".norm2."),
        (".ffn.0.", ".ffn.net.0.proj."),
        (".ffn.2.", ".ffn.net.2."),
        (".modulation", ".scale_shift_table"),
    ],
    ..KeyMap::PLAIN
};

/// Parameters that start at zero when trained from scratch.
pub(super) const ZERO_AT_START: &[&str] = &["proj_out"];

/// Base of the rotary frequencies.
const THETA: f64 = 10_000.0;

/// Chunks of a block's modulation.
const ATTENTION: Modulation = Modulation { shift: 0, scale: 1 };
const ATTENTION_GATE: usize = 2;
const MLP: Modulation = Modulation { shift: 3, scale: 4 };
const MLP_GATE: usize = 5;
/// Chunks of the modulation after the last block.
const OUTPUT: Modulation = Modulation { shift: 0, scale: 1 };

/// The denoiser over packed latents.
#[derive(Module, Debug)]
pub struct Transformer {
    patch_embedding: PatchEmbedding,
    condition_embedder: ConditionEmbedder,
    blocks: Vec<Block>,
    proj_out: Linear,
    /// `[1, 2, D]`
    scale_shift_table: Param<Tensor<3>>,
    #[module(skip)]
    config: TransformerConfig,
    /// Backward passes compute the inside of each block again instead of keeping it.
    #[module(skip)]
    recomputes_blocks: bool,
}

/// A convolution whose kernel is as large as its stride: a projection of each patch, in the shape of the files.
#[derive(Module, Debug)]
struct PatchEmbedding {
    /// `[D, C, 1, 2, 2]`
    weight: Param<Tensor<5>>,
    bias: Param<Tensor<1>>,
}

#[derive(Module, Debug)]
struct ConditionEmbedder {
    time_embedder: TwoLayers,
    time_proj: Linear,
    text_embedder: TwoLayers,
}

/// Attention among the tokens and an MLP, both modulated and gated by the time; between them attention to the text.
#[derive(Module, Debug)]
struct Block {
    attn1: Attention,
    attn2: Attention,
    /// Of the attention to the text, where there is one.
    norm2: Option<LayerNorm>,
    ffn: Mlp,
    /// `[1, 6, D]`, added to what the time modulates by.
    scale_shift_table: Param<Tensor<3>>,
}

#[derive(Module, Debug)]
struct Attention {
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
    /// Over all heads together.
    norm_q: Scale,
    /// Over all heads together.
    norm_k: Scale,
}

#[derive(Module, Debug)]
struct Mlp {
    up: Linear,
    down: Linear,
}

/// What every block reads beside the tokens.
struct Shared {
    /// `[B, S, D]`
    text: Tensor<3>,
    /// `[B, 6D]`
    time: Tensor<2>,
    rotary: RotaryTable,
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
        Self {
            patch_embedding: PatchEmbedding {
                weight: unfilled([width, config.in_channels, 1, 2, 2], device),
                bias: unfilled([width], device),
            },
            condition_embedder: ConditionEmbedder {
                time_embedder: TwoLayers::unfilled(config.freq_dim, width, device),
                time_proj: Linear::unfilled(width, 6 * width, true, device),
                text_embedder: TwoLayers::unfilled(config.text_dim, width, device),
            },
            blocks: (0..config.num_layers).map(|_| Block::unfilled(config, device)).collect(),
            proj_out: Linear::unfilled(width, 4 * config.in_channels, true, device),
            scale_shift_table: unfilled([1, 2, width], device),
            config: config.clone(),
            recomputes_blocks: false,
        }
    }

    /// The switch of gradient checkpointing.
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
    /// - `packed`: `[B, N, 4C]` with N = frames · rows · columns, the channels of a token (C, 2, 2)
    /// - `timestep`: `[B]`, 1000 is pure noise
    /// - `text`: `[B, S, J]`; all states are attended to
    /// - output `[B, N, 4C]`, the channels of a token (2, 2, C)
    pub fn forward(
        &self,
        packed: Tensor<3>,
        timestep: Tensor<1>,
        text: Tensor<3>,
        grid: [usize; 3],
    ) -> Tensor<3> {
        let embedder = &self.condition_embedder;
        let time = embedder.time_embedder.forward(sinusoidal(timestep, self.config.freq_dim, 1.0)); // [B, D]
        let shared = Shared {
            text: embedder.text_embedder.forward_gelu(text),
            time: embedder.time_proj.forward(silu(time.clone())),
            rotary: self.rotary(grid),
        };
        let mut tokens = self.patch_embedding.forward(packed);
        for block in &self.blocks {
            tokens = self.through(block, tokens, &shared);
        }
        let modulation = modulation(&self.scale_shift_table, Tensor::cat(vec![time.clone(), time], 1));
        self.proj_out.forward(norm_modulate(tokens, modulation, OUTPUT, self.config.eps))
    }

    /// Runs a block, whose inside is kept or computed again.
    fn through(&self, block: &Block, tokens: Tensor<3>, shared: &Shared) -> Tensor<3> {
        if !self.recomputes_blocks || !tokens.device().is_autodiff() {
            return block.forward(tokens, shared, &self.config);
        }
        let (rotary, config) = (shared.rotary.clone(), self.config.clone());
        let inputs = [tokens, shared.text.clone(), shared.time.clone().unsqueeze_dim(1)];
        recomputed(block, inputs, move |block, [tokens, text, time]| {
            let shared = Shared { text, time: time.squeeze_dim(1), rotary: rotary.clone() };
            block.forward(tokens, &shared, &config)
        })
    }

    /// Angles of every token by its frame, row and column.
    fn rotary(&self, [frames, rows, columns]: [usize; 3]) -> RotaryTable {
        let of_row = move |frame, row| (0..columns).map(move |column| [frame, row, column]);
        let of_frame = move |frame| (0..rows).flat_map(move |row| of_row(frame, row));
        exact_table((0..frames).flat_map(of_frame), self.config.rotary_dims(), THETA)
    }

    /// Its projections by their names here, in the order of diffusers' modules.
    pub(super) fn linears(&mut self) -> Vec<(String, &mut Linear)> {
        let embedder = &mut self.condition_embedder;
        let (time, text) = (&mut embedder.time_embedder, &mut embedder.text_embedder);
        let mut linears = vec![
            ("condition_embedder.time_embedder.linear_1".to_owned(), &mut time.linear_1),
            ("condition_embedder.time_embedder.linear_2".to_owned(), &mut time.linear_2),
            ("condition_embedder.time_proj".to_owned(), &mut embedder.time_proj),
            ("condition_embedder.text_embedder.linear_1".to_owned(), &mut text.linear_1),
            ("condition_embedder.text_embedder.linear_2".to_owned(), &mut text.linear_2),
        ];
        for (index, block) in self.blocks.iter_mut().enumerate() {
            let named = |(part, linear)| (format!("blocks.{index}.{part}"), linear);
            linears.extend(block.linears().into_iter().map(named));
        }
        linears.push(("proj_out".to_owned(), &mut self.proj_out));
        linears
    }
}

/// A table `[1, chunks, D]` added to `[B, chunks · D]` of the time.
fn modulation(table: &Param<Tensor<3>>, time: Tensor<2>) -> Tensor<2> {
    let [_, chunks, width] = table.val().dims();
    time + table.val().reshape([1, chunks * width])
}

impl PatchEmbedding {
    /// `[B, N, 4C]` to `[B, N, D]`.
    fn forward(&self, packed: Tensor<3>) -> Tensor<3> {
        let weight = self.weight.val();
        let [width, channels, frames, height, columns] = weight.dims();
        let weight = widened(weight).reshape([width, channels * frames * height * columns]);
        linear(packed, Projection { weight, rounded_to: None, bias: Some(self.bias.val()), low_rank: None })
    }
}

impl Block {
    fn unfilled(config: &TransformerConfig, device: &Device) -> Self {
        let (heads, width) = (config.heads(), config.heads().width());
        Self {
            attn1: Attention::unfilled(heads, device),
            attn2: Attention::unfilled(heads, device),
            norm2: config.cross_attn_norm.then(|| LayerNorm::unfilled(width, config.eps, device)),
            ffn: Mlp {
                up: Linear::unfilled(width, config.ffn_dim, true, device),
                down: Linear::unfilled(config.ffn_dim, width, true, device),
            },
            scale_shift_table: unfilled([1, 6, width], device),
        }
    }

    fn linears(&mut self) -> Vec<(&'static str, &mut Linear)> {
        let (own, text, mlp) = (&mut self.attn1, &mut self.attn2, &mut self.ffn);
        vec![
            ("attn1.to_q", &mut own.to_q),
            ("attn1.to_k", &mut own.to_k),
            ("attn1.to_v", &mut own.to_v),
            ("attn1.to_out", &mut own.to_out),
            ("attn2.to_q", &mut text.to_q),
            ("attn2.to_k", &mut text.to_k),
            ("attn2.to_v", &mut text.to_v),
            ("attn2.to_out", &mut text.to_out),
            ("ffn.up", &mut mlp.up),
            ("ffn.down", &mut mlp.down),
        ]
    }

    fn forward(&self, x: Tensor<3>, shared: &Shared, config: &TransformerConfig) -> Tensor<3> {
        let by = modulation(&self.scale_shift_table, shared.time.clone()); // [B, 6D]
        let normed = norm_modulate(x.clone(), by.clone(), ATTENTION, config.eps);
        let attended = self.attn1.among(normed, &shared.rotary, config);
        let x = gated_residual(x, attended, by.clone(), ATTENTION_GATE);
        let normed = self.norm2.as_ref().map_or_else(|| x.clone(), |norm| norm.forward(x.clone()));
        let x = x + self.attn2.to_text(normed, shared.text.clone(), config);
        let hidden = self.ffn.up.forward(norm_modulate(x.clone(), by.clone(), MLP, config.eps));
        gated_residual(x, self.ffn.down.forward(gelu(hidden, Gelu::Tanh)), by, MLP_GATE)
    }
}

impl Attention {
    fn unfilled(heads: Heads, device: &Device) -> Self {
        let square = || Linear::unfilled(heads.width(), heads.width(), true, device);
        let norm = || Scale::unfilled(heads.width(), device);
        Self {
            to_q: square(),
            to_k: square(),
            to_v: square(),
            to_out: square(),
            norm_q: norm(),
            norm_k: norm(),
        }
    }

    /// Attention of the tokens to each other, `[B, N, D]`.
    fn among(&self, x: Tensor<3>, rotary: &RotaryTable, config: &TransformerConfig) -> Tensor<3> {
        let projections = [&self.to_q, &self.to_k, &self.to_v].map(Linear::projection);
        let (norms, heads) = ([&self.norm_q, &self.norm_k], config.num_attention_heads);
        let qkv = qkv_of_one(linear_concat(x, projections), norms, heads, (rotary, config.eps));
        self.to_out.forward(attention(qkv, AttentionOptions::default()))
    }

    /// Attention of the tokens `[B, N, D]` to the text `[B, S, D]`.
    fn to_text(&self, x: Tensor<3>, text: Tensor<3>, config: &TransformerConfig) -> Tensor<3> {
        let norm = |x, scale: &Scale| rms_norm(x, scale.weight.val(), config.eps);
        let query = norm(self.to_q.forward(x), &self.norm_q);
        let key = norm(self.to_k.forward(text.clone()), &self.norm_k);
        let value = self.to_v.forward(text);
        self.to_out.forward(cross_attention(query, key, value, config.num_attention_heads))
    }
}
