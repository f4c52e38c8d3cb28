//! The language model of Qwen2.5-VL without its vision tower (arXiv 2502.13923), and Qwen3's: pre-norm causal
//! transformer with grouped queries, half-split rotary embeddings and gated MLPs.
//!
//! For text alone the three sections of its rotary embedding carry the same positions, which makes it
//! the ordinary one.

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor, TensorData};
use fewstep_kernels::{AttentionOptions, Gate, HalfType, attention, glu, rms_norm};

use super::config::TextEncoderConfig;
use super::tokenizer::PromptTokens;
use crate::parts::embedding::{Embedding, padded_ids};
use crate::parts::linear::Linear;
use crate::parts::rotary::frequencies;
use crate::weights::{KeyMap, load, unfilled};
use crate::{Condition, ModelError, ModelSource, WeightType};

/// The published files hold the vision tower and an output head too. Folders written by transformers 4.52 and
/// later may nest both towers in `model.`; one that was saved as a language model without a head has no `model.`.
pub(crate) const KEYS: KeyMap = KeyMap {
    prefix: "model.",
    aliases: &[
        ("model.language_model.", "model."),
        ("model.visual.", "visual."),
        ("embed_tokens.", "model.embed_tokens."),
        ("layers.", "model.layers."),
        ("norm.", "model.norm."),
    ],
    ignored: &["visual.", "lm_head."],
    ..KeyMap::PLAIN
};

/// The language model; its states after the final norm are the condition.
#[derive(Module, Debug)]
pub struct TextEncoder {
    embed_tokens: Embedding,
    layers: Vec<Layer>,
    norm: RmsNorm,
    #[module(skip)]
    config: TextEncoderConfig,
}

#[derive(Module, Debug)]
struct RmsNorm {
    weight: Param<Tensor<1>>,
}

#[derive(Module, Debug)]
struct Layer {
    input_layernorm: RmsNorm,
    self_attn: SelfAttention,
    post_attention_layernorm: RmsNorm,
    mlp: GatedMlp,
}

#[derive(Module, Debug)]
struct SelfAttention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    /// In Qwen3, as the next.
    q_norm: Option<RmsNorm>,
    k_norm: Option<RmsNorm>,
}

#[derive(Module, Debug)]
struct GatedMlp {
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
}

/// Cosines and sines, `[1, 1, T, E/2]` each.
#[derive(Clone)]
struct Rotation {
    cos: Tensor<4>,
    sin: Tensor<4>,
}

impl TextEncoder {
    /// Loads the component `text_encoder` of a model on the plain side of `device`.
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
        let empty = Self::unfilled(&TextEncoderConfig::read(source)?, device);
        load(empty, &source.weights("text_encoder")?, &KEYS, dtype)
    }

    pub(crate) fn unfilled(config: &TextEncoderConfig, device: &Device) -> Self {
        let norm = || RmsNorm { weight: unfilled([config.hidden_size], device) };
        Self {
            embed_tokens: Embedding::unfilled(config.vocab_size, config.hidden_size, device),
            layers: (0..config.num_hidden_layers)
                .map(|_| Layer {
                    input_layernorm: norm(),
                    self_attn: SelfAttention::unfilled(config, device),
                    post_attention_layernorm: norm(),
                    mlp: GatedMlp::unfilled(config, device),
                })
                .collect(),
            norm: norm(),
            config: config.clone(),
        }
    }

    /// Tokens there are embeddings for.
    pub(crate) fn vocabulary(&self) -> usize {
        self.config.vocab_size
    }

    /// J, the width of its states.
    pub(crate) fn width(&self) -> usize {
        self.config.hidden_size
    }

    /// Computes with the nearest numbers of a type to its matrices.
    pub(crate) fn round_to(&mut self, half: Option<HalfType>) {
        self.embed_tokens.rounded_to = half;
        for layer in &mut self.layers {
            layer.linears().into_iter().for_each(|linear| linear.rounded_to = half);
        }
    }

    /// Runs the prompts as one right-padded batch and drops the template's leading tokens.
    ///
    /// Padding comes after the tokens and attention is causal, so no valid token sees it.
    pub fn forward(&self, tokens: &PromptTokens) -> Condition {
        let hidden = self.run(tokens, &mut |_| ());
        let [batch, longest, width] = hidden.dims();
        let text = hidden.slice([0..batch, tokens.drop_tokens..longest, 0..width]);
        let lengths = tokens.ids.iter().map(|ids| ids.len() - tokens.drop_tokens).collect();
        zero_padding(Condition::new(text, lengths))
    }

    /// The states before the last layer, of prompts of which no token is dropped; padding is zero.
    pub(crate) fn penultimate(&self, tokens: &PromptTokens) -> Condition {
        let mut states = self.hidden_states(tokens);
        let text = states.swap_remove(states.len() - 2);
        zero_padding(Condition::new(text, tokens.ids.iter().map(Vec::len).collect()))
    }

    /// The states of all tokens, `[B, T, J]` each: the embeddings, then after every layer, the last of them after
    /// the final norm too. The template's leading tokens are still there, and padding holds arbitrary numbers.
    pub fn hidden_states(&self, tokens: &PromptTokens) -> Vec<Tensor<3>> {
        let mut states = Vec::with_capacity(self.layers.len() + 1);
        let last = self.run(tokens, &mut |state| states.push(state.clone()));
        states.pop();
        states.push(last);
        states
    }

    /// The states after the final norm, `[B, T, J]`; `observe` sees those before it.
    fn run(&self, tokens: &PromptTokens, observe: &mut dyn FnMut(&Tensor<3>)) -> Tensor<3> {
        let device = self.embed_tokens.device();
        let longest = tokens.ids.iter().map(Vec::len).max().unwrap_or(0);
        let mut hidden = self.embed_tokens.forward(padded_ids(&tokens.ids, longest, &device));
        observe(&hidden);
        let rotation = self.rotation(longest, &device);
        for layer in &self.layers {
            hidden = layer.forward(hidden, &rotation, &self.config);
            observe(&hidden);
        }
        self.norm.forward(hidden, &self.config)
    }

    fn rotation(&self, positions: usize, device: &Device) -> Rotation {
        let head_dim = self.config.head_dim();
        let frequencies: Vec<f32> = frequencies(head_dim, self.config.rope.rope_theta).collect();
        let angles = (0..positions).flat_map(|position| frequencies.iter().map(move |f| position as f32 * f));
        let (sin, cos): (Vec<f32>, Vec<f32>) = angles.map(f32::sin_cos).unzip();
        let shape = [1, 1, positions, head_dim / 2];
        let tensor = |values| Tensor::from_data(TensorData::new(values, shape), device);
        Rotation { cos: tensor(cos), sin: tensor(sin) }
    }
}

/// Sets the states past each prompt's length to zero.
fn zero_padding(condition: Condition) -> Condition {
    let [batch, tokens, _] = condition.text.dims();
    if condition.lengths.iter().all(|length| *length == tokens) {
        return condition;
    }
    let row =
        |length: &usize| (0..tokens).map(|token| f32::from(u8::from(token < *length))).collect::<Vec<_>>();
    let mask: Vec<f32> = condition.lengths.iter().flat_map(row).collect();
    let mask = Tensor::from_data(TensorData::new(mask, [batch, tokens, 1]), &condition.text.device());
    Condition { text: condition.text.clone() * mask, ..condition }
}

impl RmsNorm {
    fn forward(&self, x: Tensor<3>, config: &TextEncoderConfig) -> Tensor<3> {
        rms_norm(x, self.weight.val(), config.rms_norm_eps)
    }
}

impl Layer {
    fn linears(&mut self) -> [&mut Linear; 7] {
        let (attention, mlp) = (&mut self.self_attn, &mut self.mlp);
        [
            &mut attention.q_proj,
            &mut attention.k_proj,
            &mut attention.v_proj,
            &mut attention.o_proj,
            &mut mlp.gate_proj,
            &mut mlp.up_proj,
            &mut mlp.down_proj,
        ]
    }

    fn forward(&self, x: Tensor<3>, rotation: &Rotation, config: &TextEncoderConfig) -> Tensor<3> {
        let attended =
            self.self_attn.forward(self.input_layernorm.forward(x.clone(), config), rotation, config);
        let x = x + attended;
        let updated = self.mlp.forward(self.post_attention_layernorm.forward(x.clone(), config));
        x + updated
    }
}

impl SelfAttention {
    fn unfilled(config: &TextEncoderConfig, device: &Device) -> Self {
        let (width, bias) = (config.hidden_size, config.qkv_bias);
        let joined = config.head_dim() * config.num_attention_heads;
        let grouped = config.head_dim() * config.num_key_value_heads;
        let norm = || config.qk_norm.then(|| RmsNorm { weight: unfilled([config.head_dim()], device) });
        Self {
            q_proj: Linear::unfilled(width, joined, bias, device),
            k_proj: Linear::unfilled(width, grouped, bias, device),
            v_proj: Linear::unfilled(width, grouped, bias, device),
            o_proj: Linear::unfilled(joined, width, false, device),
            q_norm: norm(),
            k_norm: norm(),
        }
    }

    fn forward(&self, x: Tensor<3>, rotation: &Rotation, config: &TextEncoderConfig) -> Tensor<3> {
        let (heads, groups) = (config.num_attention_heads, config.num_key_value_heads);
        let normed = |x: Tensor<4>, norm: &Option<RmsNorm>| match norm {
            Some(norm) => rms_norm(x, norm.weight.val(), config.rms_norm_eps),
            None => x,
        };
        let query = normed(split_heads(self.q_proj.forward(x.clone()), heads), &self.q_norm);
        let key = normed(split_heads(self.k_proj.forward(x.clone()), groups), &self.k_norm);
        let (query, key) = (rotate(query, rotation), rotate(key, rotation));
        let value = split_heads(self.v_proj.forward(x), groups);
        let packed =
            Tensor::stack(vec![query, repeat(key, heads / groups), repeat(value, heads / groups)], 0);
        self.o_proj.forward(attention(packed, AttentionOptions { keys: None, causal: true }))
    }
}

/// `[B, T, heads · E]` to `[B, heads, T, E]`.
fn split_heads(x: Tensor<3>, heads: usize) -> Tensor<4> {
    let [batch, tokens, width] = x.dims();
    x.reshape([batch, tokens, heads, width / heads]).swap_dims(1, 2)
}

/// Rotates the pairs (i, i + E/2) of every head.
fn rotate(x: Tensor<4>, rotation: &Rotation) -> Tensor<4> {
    let [batch, heads, tokens, head_dim] = x.dims();
    let half = |range| x.clone().slice([0..batch, 0..heads, 0..tokens, range]);
    let (first, second) = (half(0..head_dim / 2), half(head_dim / 2..head_dim));
    let (cos, sin) = (rotation.cos.clone(), rotation.sin.clone());
    let rotated_first = first.clone() * cos.clone() - second.clone() * sin.clone();
    let rotated_second = second * cos + first * sin;
    Tensor::cat(vec![rotated_first, rotated_second], 3)
}

/// Gives each group of query heads its own copy of a key or value head.
fn repeat(x: Tensor<4>, times: usize) -> Tensor<4> {
    let [batch, groups, tokens, head_dim] = x.dims();
    x.unsqueeze_dim::<5>(2).expand([batch, groups, times, tokens, head_dim]).reshape([
        batch,
        groups * times,
        tokens,
        head_dim,
    ])
}

impl GatedMlp {
    fn unfilled(config: &TextEncoderConfig, device: &Device) -> Self {
        let (width, inner) = (config.hidden_size, config.intermediate_size);
        Self {
            gate_proj: Linear::unfilled(width, inner, false, device),
            up_proj: Linear::unfilled(width, inner, false, device),
            down_proj: Linear::unfilled(inner, width, false, device),
        }
    }

    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let gate = self.gate_proj.forward(x.clone());
        self.down_proj.forward(glu(self.up_proj.forward(x), gate, Gate::Silu))
    }
}
