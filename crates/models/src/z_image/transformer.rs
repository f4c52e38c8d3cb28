//! The single-stream transformer: text and picture are first refined apart, then run as one sequence. Numbers equal
//! diffusers' `ZImageTransformer2DModel`.
//!
//! Both parts are continued to a multiple of [`MULTIPLE`] tokens by a learned token, which is attended to.

use burn::module::{Module, Param};
use burn::tensor::activation::silu;
use burn::tensor::{Device, Tensor, TensorData};
use fewstep_kernels::{
    AttentionOptions, Gate, Modulation, RotaryTable, attention, gated_residual, glu, linear_concat,
    norm_modulate, recomputed, rms_norm, split_tokens,
};

use super::config::TransformerConfig;
use crate::load_options::widened;
use crate::parts::double_stream::{Heads, Scale};
use crate::parts::linear::Linear;
use crate::parts::rotary::rounded_table;
use crate::parts::single_stream::qkv_of_one;
use crate::parts::timestep::{TIME_FEATURES, TwoLayers, sinusoidal};
use crate::weights::{KeyMap, load, unfilled};
use crate::{Condition, ModelError, ModelSource, WeightType};

pub(super) const KEYS: KeyMap = KeyMap {
    rules: &[
        ("all_x_embedder.", "all_x_embedder.2-1."),
        ("all_final_layer.linear.", "all_final_layer.2-1.linear."),
        ("all_final_layer.modulation.", "all_final_layer.2-1.adaLN_modulation.1."),
        ("cap_embedder.norm.", "cap_embedder.0."),
        ("cap_embedder.linear.", "cap_embedder.1."),
        ("t_embedder.linear_1.", "t_embedder.mlp.0."),
        ("t_embedder.linear_2.", "t_embedder.mlp.2."),
        (".modulation.", ".adaLN_modulation.0."),
        (".to_out.", ".to_out.0."),
    ],
    ..KeyMap::PLAIN
};

/// Parameters that start at zero when trained from scratch.
pub(super) const ZERO_AT_START: &[&str] = &["modulation", "all_final_layer"];

/// Tokens of text and of a picture are continued to a multiple of this.
pub(super) const MULTIPLE: usize = 32;
/// Inner width of the time's embedding.
const TIME_INNER: usize = 1024;
/// Of the norms of queries and keys.
const HEAD_EPSILON: f32 = 1e-5;
/// Of the norm before the last projection.
const FINAL_EPSILON: f32 = 1e-6;
/// The last modulation: its scale, then zeros.
const FINAL: Modulation = Modulation { shift: 1, scale: 0 };

/// The denoiser over packed latents.
#[derive(Module, Debug)]
pub struct Transformer {
    all_x_embedder: Linear,
    all_final_layer: FinalLayer,
    noise_refiner: Vec<Block>,
    context_refiner: Vec<Block>,
    t_embedder: TwoLayers,
    cap_embedder: CaptionEmbedder,
    /// `[1, D]`
    x_pad_token: Param<Tensor<2>>,
    /// `[1, D]`
    cap_pad_token: Param<Tensor<2>>,
    layers: Vec<Block>,
    #[module(skip)]
    config: TransformerConfig,
    /// Backward passes compute the inside of each block again instead of keeping it.
    #[module(skip)]
    recomputes_blocks: bool,
}

#[derive(Module, Debug)]
struct FinalLayer {
    linear: Linear,
    modulation: Linear,
}

#[derive(Module, Debug)]
struct CaptionEmbedder {
    norm: Scale,
    linear: Linear,
}

/// Attention and a gated MLP, each between two norms, scaled and gated by the time where the block sees it.
#[derive(Module, Debug)]
struct Block {
    attention: SelfAttention,
    feed_forward: GatedMlp,
    attention_norm1: Scale,
    ffn_norm1: Scale,
    attention_norm2: Scale,
    ffn_norm2: Scale,
    /// Absent in blocks over the text alone.
    modulation: Option<Linear>,
}

#[derive(Module, Debug)]
struct SelfAttention {
    norm_q: Scale,
    norm_k: Scale,
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
}

#[derive(Module, Debug)]
struct GatedMlp {
    w1: Linear,
    w2: Linear,
    w3: Linear,
}

/// Scales and gates of one block, `[B, 1, D]` and `[B, D]`.
struct Modulated {
    attention_scale: Tensor<3>,
    attention_gate: Tensor<2>,
    mlp_scale: Tensor<3>,
    mlp_gate: Tensor<2>,
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
        let (width, time) = (config.dim, config.time_width());
        let linear = |input, output| Linear::unfilled(input, output, true, device);
        let token = 4 * config.in_channels;
        let blocks =
            |count, modulated| (0..count).map(|_| Block::unfilled(config, modulated, device)).collect();
        Self {
            all_x_embedder: linear(token, width),
            all_final_layer: FinalLayer { linear: linear(width, token), modulation: linear(time, width) },
            noise_refiner: blocks(config.n_refiner_layers, true),
            context_refiner: blocks(config.n_refiner_layers, false),
            t_embedder: TwoLayers {
                linear_1: linear(TIME_FEATURES, TIME_INNER),
                linear_2: linear(TIME_INNER, time),
            },
            cap_embedder: CaptionEmbedder {
                norm: Scale::unfilled(config.cap_feat_dim, device),
                linear: linear(config.cap_feat_dim, width),
            },
            x_pad_token: unfilled([1, width], device),
            cap_pad_token: unfilled([1, width], device),
            layers: blocks(config.n_layers, true),
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

    /// What it predicts at packed latents: clean − noise.
    ///
    /// # Shapes
    /// - `packed`: `[B, N, 4C]` with N = rows · columns
    /// - `time`: `[B]`, 0 is pure noise and 1 clean
    /// - output `[B, N, 4C]`
    ///
    /// # Panics
    /// If the samples' texts are not continued to the same number of tokens: their pictures would have other positions.
    pub fn forward(
        &self,
        packed: Tensor<3>,
        time: Tensor<1>,
        condition: &Condition,
        [rows, columns]: [usize; 2],
    ) -> Tensor<3> {
        let image_tokens = rows * columns;
        let text_tokens = continued(condition.lengths[0]);
        assert!(
            condition.lengths.iter().all(|length| continued(*length) == text_tokens),
            "texts of one length"
        );
        let time = self.t_embedder.forward(sinusoidal(time * self.config.t_scale, TIME_FEATURES, 1.0));
        let tables = self.tables(text_tokens, [rows, columns]);
        let mut image = self.embed_image(packed);
        for block in &self.noise_refiner {
            image = self.through(block, image, Some(&time), &tables.image);
        }
        let mut text = self.embed_text(condition, text_tokens);
        for block in &self.context_refiner {
            text = self.through(block, text, None, &tables.text);
        }
        let mut tokens = Tensor::cat(vec![image, text], 1);
        for block in &self.layers {
            tokens = self.through(block, tokens, Some(&time), &tables.joint);
        }
        self.all_final_layer.forward(split_tokens(tokens, 0..image_tokens), time)
    }

    /// Runs a block, whose inside is kept or computed again.
    fn through(
        &self,
        block: &Block,
        x: Tensor<3>,
        time: Option<&Tensor<2>>,
        rotary: &RotaryTable,
    ) -> Tensor<3> {
        if !self.recomputes_blocks || !x.device().is_autodiff() {
            return block.forward(x, time, rotary, &self.config);
        }
        let (rotary, config) = (rotary.clone(), self.config.clone());
        match time {
            Some(time) => recomputed(block, [x, time.clone().unsqueeze_dim(1)], move |block, [x, time]| {
                block.forward(x, Some(&time.squeeze_dim(1)), &rotary, &config)
            }),
            None => recomputed(block, [x], move |block, [x]| block.forward(x, None, &rotary, &config)),
        }
    }

    /// `[B, N, 4C]` to `[B, N', D]`, N' a multiple of [`MULTIPLE`].
    fn embed_image(&self, packed: Tensor<3>) -> Tensor<3> {
        let image = self.all_x_embedder.forward(packed);
        let [batch, tokens, width] = image.dims();
        match continued(tokens) - tokens {
            0 => image,
            more => {
                let padding = widened(self.x_pad_token.val()).unsqueeze_dim::<3>(0);
                Tensor::cat(vec![image, padding.expand([batch, more, width])], 1)
            }
        }
    }

    /// `[B, S, J]` to `[B, S', D]`; the learned token stands past each text's length.
    fn embed_text(&self, condition: &Condition, text_tokens: usize) -> Tensor<3> {
        let text = crate::condition::pad_tokens(condition.text.clone(), text_tokens);
        let embedder = &self.cap_embedder;
        let text = rms_norm(text, embedder.norm.weight.val(), self.config.norm_eps);
        let text = embedder.linear.forward(text); // [B, S', D]
        let inside =
            |length: &usize| (0..text_tokens).map(|at| f32::from(u8::from(at < *length))).collect::<Vec<_>>();
        let mask: Vec<f32> = condition.lengths.iter().flat_map(inside).collect();
        let mask = TensorData::new(mask, [condition.lengths.len(), text_tokens, 1]);
        let mask = Tensor::<3>::from_data(mask, &text.device());
        let padding = widened(self.cap_pad_token.val()).unsqueeze_dim::<3>(0);
        text * mask.clone() + padding * mask.neg().add_scalar(1.0)
    }

    /// Text counts up from 1 on the first axis; the picture stands behind it, by row and column; what continues the
    /// picture is at the origin.
    fn tables(&self, text_tokens: usize, [rows, columns]: [usize; 2]) -> Tables {
        let table = |positions: Vec<[usize; 3]>| {
            rounded_table(positions.into_iter(), self.config.axes_dims, self.config.rope_theta)
        };
        let text: Vec<[usize; 3]> = (1..=text_tokens).map(|at| [at, 0, 0]).collect();
        let place = |at: usize| [text_tokens + 1, at / columns, at % columns];
        let mut image: Vec<[usize; 3]> = (0..rows * columns).map(place).collect();
        image.resize(continued(rows * columns), [0, 0, 0]);
        let joint = image.iter().chain(&text).copied().collect();
        Tables { text: table(text), image: table(image), joint: table(joint) }
    }

    /// Every projection with its module name, for adapters, in the order of the peers' modules: fresh adapters are
    /// drawn in it.
    pub(super) fn linears(&mut self) -> Vec<(String, &mut Linear)> {
        let mut linears = vec![
            ("all_x_embedder".to_owned(), &mut self.all_x_embedder),
            ("all_final_layer.linear".to_owned(), &mut self.all_final_layer.linear),
            ("all_final_layer.modulation".to_owned(), &mut self.all_final_layer.modulation),
        ];
        linears.extend(of_blocks("noise_refiner", &mut self.noise_refiner));
        linears.extend(of_blocks("context_refiner", &mut self.context_refiner));
        linears.push(("t_embedder.linear_1".to_owned(), &mut self.t_embedder.linear_1));
        linears.push(("t_embedder.linear_2".to_owned(), &mut self.t_embedder.linear_2));
        linears.push(("cap_embedder.linear".to_owned(), &mut self.cap_embedder.linear));
        linears.extend(of_blocks("layers", &mut self.layers));
        linears
    }
}

/// Rotary angles of the three kinds of sequences.
struct Tables {
    text: RotaryTable,
    image: RotaryTable,
    joint: RotaryTable,
}

/// The next multiple of [`MULTIPLE`].
pub(super) fn continued(tokens: usize) -> usize {
    tokens.next_multiple_of(MULTIPLE)
}

fn of_blocks<'a>(name: &'a str, blocks: &'a mut [Block]) -> impl Iterator<Item = (String, &'a mut Linear)> {
    blocks.iter_mut().enumerate().flat_map(move |(index, block)| {
        block.linears().into_iter().map(move |(part, linear)| (format!("{name}.{index}.{part}"), linear))
    })
}

impl FinalLayer {
    fn forward(&self, tokens: Tensor<3>, time: Tensor<2>) -> Tensor<3> {
        let scale = self.modulation.forward(silu(time));
        let modulation = Tensor::cat(vec![scale.clone(), scale.zeros_like()], 1);
        self.linear.forward(norm_modulate(tokens, modulation, FINAL, FINAL_EPSILON))
    }
}

impl Block {
    fn unfilled(config: &TransformerConfig, modulated: bool, device: &Device) -> Self {
        let (width, hidden) = (config.dim, config.hidden());
        let linear = |input, output| Linear::unfilled(input, output, false, device);
        let norm = || Scale::unfilled(width, device);
        Self {
            attention: SelfAttention::unfilled(config.heads(), device),
            feed_forward: GatedMlp {
                w1: linear(width, hidden),
                w2: linear(hidden, width),
                w3: linear(width, hidden),
            },
            attention_norm1: norm(),
            ffn_norm1: norm(),
            attention_norm2: norm(),
            ffn_norm2: norm(),
            modulation: modulated.then(|| Linear::unfilled(config.time_width(), 4 * width, true, device)),
        }
    }

    fn linears(&mut self) -> Vec<(&'static str, &mut Linear)> {
        let (attention, mlp) = (&mut self.attention, &mut self.feed_forward);
        let mut linears = vec![
            ("attention.to_q", &mut attention.to_q),
            ("attention.to_k", &mut attention.to_k),
            ("attention.to_v", &mut attention.to_v),
            ("attention.to_out", &mut attention.to_out),
            ("feed_forward.w1", &mut mlp.w1),
            ("feed_forward.w2", &mut mlp.w2),
            ("feed_forward.w3", &mut mlp.w3),
        ];
        linears.extend(self.modulation.as_mut().map(|modulation| ("modulation", modulation)));
        linears
    }

    fn forward(
        &self,
        x: Tensor<3>,
        time: Option<&Tensor<2>>,
        rotary: &RotaryTable,
        config: &TransformerConfig,
    ) -> Tensor<3> {
        let norm = |x: Tensor<3>, scale: &Scale| rms_norm(x, scale.weight.val(), config.norm_eps);
        let attend = |x| norm(self.attention.forward(x, rotary, config.heads()), &self.attention_norm2);
        let transform = |x| norm(self.feed_forward.forward(x), &self.ffn_norm2);
        match self.modulation.as_ref().zip(time) {
            Some((modulation, time)) => {
                let by = Modulated::new(modulation.forward(time.clone()));
                let update = attend(norm(x.clone(), &self.attention_norm1) * by.attention_scale);
                let x = gated_residual(x, update, by.attention_gate, 0);
                let update = transform(norm(x.clone(), &self.ffn_norm1) * by.mlp_scale);
                gated_residual(x, update, by.mlp_gate, 0)
            }
            None => {
                let x = x.clone() + attend(norm(x, &self.attention_norm1));
                x.clone() + transform(norm(x, &self.ffn_norm1))
            }
        }
    }
}

impl Modulated {
    /// From `[B, 4D]`.
    fn new(chunks: Tensor<2>) -> Self {
        let width = chunks.dims()[1] / 4;
        let chunk = |index| chunks.clone().narrow(1, index * width, width);
        let scale = |index| chunk(index).add_scalar(1.0).unsqueeze_dim::<3>(1);
        Self {
            attention_scale: scale(0),
            attention_gate: chunk(1).tanh(),
            mlp_scale: scale(2),
            mlp_gate: chunk(3).tanh(),
        }
    }
}

impl SelfAttention {
    fn unfilled(heads: Heads, device: &Device) -> Self {
        let square = || Linear::unfilled(heads.width(), heads.width(), false, device);
        let norm = || Scale::unfilled(heads.dim, device);
        Self {
            norm_q: norm(),
            norm_k: norm(),
            to_q: square(),
            to_k: square(),
            to_v: square(),
            to_out: square(),
        }
    }

    fn forward(&self, x: Tensor<3>, rotary: &RotaryTable, heads: Heads) -> Tensor<3> {
        let projections = [&self.to_q, &self.to_k, &self.to_v].map(Linear::projection);
        let norms = [&self.norm_q, &self.norm_k];
        let qkv = qkv_of_one(linear_concat(x, projections), norms, heads.count, (rotary, HEAD_EPSILON));
        self.to_out.forward(attention(qkv, AttentionOptions::default()))
    }
}

impl GatedMlp {
    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let gate = self.w1.forward(x.clone());
        self.w2.forward(glu(self.w3.forward(x), gate, Gate::Silu))
    }
}
