//! The encoder: pre-norm, attention to both sides with a learned bias per distance, unscaled scores, gated MLPs. Numbers
//! equal transformers' `T5EncoderModel` and `UMT5EncoderModel`.

use burn::module::Module;
use burn::tensor::activation::softmax;
use burn::tensor::{Bool, Device, Int, Tensor, TensorData};
use fewstep_kernels::{Gate, Gelu, HalfType, glu, linear_concat, rms_norm};

use super::config::T5Config;
use crate::parts::attention::by_heads;
use crate::parts::double_stream::Scale;
use crate::parts::embedding::{Embedding, padded_ids};
use crate::parts::linear::Linear;
use crate::weights::{KeyMap, load};
use crate::{ModelError, ModelSource, WeightType};

/// Files of whole models hold a decoder too, and some a second name of the embeddings. Those of Wan's authors have other
/// names.
pub(crate) const KEYS: KeyMap = KeyMap {
    rules: &[
        (".attention.", ".layer.0.SelfAttention."),
        (".attention_norm.", ".layer.0.layer_norm."),
        (".mlp.", ".layer.1.DenseReluDense."),
        (".mlp_norm.", ".layer.1.layer_norm."),
    ],
    aliases: &[
        ("token_embedding.", "shared."),
        ("norm.", "encoder.final_layer_norm."),
        ("blocks.", "encoder.block."),
    ],
    respelled: &[
        (".attn.", ".layer.0.SelfAttention."),
        (".pos_embedding.embedding.", ".layer.0.SelfAttention.relative_attention_bias."),
        (".norm1.", ".layer.0.layer_norm."),
        (".ffn.gate.0.", ".layer.1.DenseReluDense.wi_0."),
        (".ffn.fc1.", ".layer.1.DenseReluDense.wi_1."),
        (".ffn.fc2.", ".layer.1.DenseReluDense.wo."),
        (".norm2.", ".layer.1.layer_norm."),
    ],
    ignored: &["encoder.embed_tokens.", "decoder.", "lm_head."],
    ..KeyMap::PLAIN
};

/// What hides a key from every query.
const HIDDEN: f32 = f32::MIN;

/// The encoder; its states after the final norm are the condition.
#[derive(Module, Debug)]
pub struct T5Encoder {
    shared: Embedding,
    encoder: Stack,
    #[module(skip)]
    config: T5Config,
}

#[derive(Module, Debug)]
struct Stack {
    block: Vec<Block>,
    final_layer_norm: Scale,
}

#[derive(Module, Debug)]
struct Block {
    attention: SelfAttention,
    attention_norm: Scale,
    mlp: GatedMlp,
    mlp_norm: Scale,
}

#[derive(Module, Debug)]
struct SelfAttention {
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    /// `[buckets, heads]`: of the first block alone, or of every one.
    relative_attention_bias: Option<Embedding>,
}

#[derive(Module, Debug)]
struct GatedMlp {
    wi_0: Linear,
    wi_1: Linear,
    wo: Linear,
}

impl T5Encoder {
    /// Loads a component of a model on the plain side of `device`, in a number type.
    ///
    /// # Errors
    /// If its config or weights are missing, damaged or do not fit each other.
    pub fn from_pretrained(
        source: &ModelSource,
        component: &'static str,
        dtype: WeightType,
        device: &Device,
    ) -> Result<Self, ModelError> {
        let empty = Self::unfilled(&T5Config::read(source, component)?, device);
        load(empty, &source.weights(component)?, &KEYS, dtype)
    }

    pub(crate) fn unfilled(config: &T5Config, device: &Device) -> Self {
        let norm = || Scale::unfilled(config.d_model, device);
        let linear = |input, output| Linear::unfilled(input, output, false, device);
        let block = |index| Block {
            attention: SelfAttention::unfilled(config, index == 0 || config.positions_per_layer, device),
            attention_norm: norm(),
            mlp: GatedMlp {
                wi_0: linear(config.d_model, config.d_ff),
                wi_1: linear(config.d_model, config.d_ff),
                wo: linear(config.d_ff, config.d_model),
            },
            mlp_norm: norm(),
        };
        Self {
            shared: Embedding::unfilled(config.vocab_size, config.d_model, device),
            encoder: Stack { block: (0..config.num_layers).map(block).collect(), final_layer_norm: norm() },
            config: config.clone(),
        }
    }

    /// The config it was made with.
    pub(crate) fn config(&self) -> &T5Config {
        &self.config
    }

    /// Where it computes.
    pub(crate) fn device(&self) -> Device {
        self.shared.device()
    }

    /// Computes with the nearest numbers of a type to its matrices.
    pub(crate) fn round_to(&mut self, half: Option<HalfType>) {
        self.shared.rounded_to = half;
        for block in &mut self.encoder.block {
            if let Some(bias) = &mut block.attention.relative_attention_bias {
                bias.rounded_to = half;
            }
            block.linears().into_iter().for_each(|linear| linear.rounded_to = half);
        }
    }

    /// Runs rows of tokens of equal length. Of each row, keys past its length are hidden; without lengths padding is
    /// attended to like any token.
    ///
    /// # Shapes
    /// - output `[B, T, J]`
    pub fn forward(&self, ids: &[Vec<u32>], lengths: Option<&[usize]>) -> Tensor<3> {
        let device = self.device();
        let tokens = ids.first().map_or(0, Vec::len);
        let hidden_keys = lengths.map(|lengths| hidden_keys(lengths, tokens, &device));
        let buckets = self.buckets(tokens, &device);
        let mut state = self.shared.forward(padded_ids(ids, tokens, &device));
        let mut bias = None;
        for block in &self.encoder.block {
            bias = block.attention.bias(&buckets, tokens).or(bias);
            let bias = bias.clone().expect("the first block has positions");
            state = block.forward(state, (bias, hidden_keys.clone()), &self.config);
        }
        rms_norm(state, self.encoder.final_layer_norm.weight.val(), self.config.layer_norm_epsilon)
    }

    /// The bucket of the way from every query to every key, `[1, T · T]`.
    fn buckets(&self, tokens: usize, device: &Device) -> Tensor<2, Int> {
        let tokens = tokens as i64;
        let pairs = (0..tokens).flat_map(|query| (0..tokens).map(move |key| key - query));
        let buckets: Vec<i32> = pairs.map(|distance| self.config.bucket(distance) as i32).collect();
        let count = buckets.len();
        Tensor::from_data(TensorData::new(buckets, [1, count]), device)
    }
}

impl T5Config {
    /// Half of the buckets are for keys behind the query. Of each half, one half are single distances, and the others
    /// grow with the logarithm up to the largest distance.
    fn bucket(&self, distance: i64) -> usize {
        let half = self.relative_attention_num_buckets / 2;
        let first = if distance > 0 { half } else { 0 };
        let (distance, exact) = (distance.unsigned_abs() as usize, half / 2);
        if distance < exact {
            return first + distance;
        }
        // In f32 as the peer, since the quotient is cut off.
        let largest = (self.relative_attention_max_distance as f64 / exact as f64).ln() as f32;
        let grown = (distance as f32 / exact as f32).ln() / largest * (half - exact) as f32;
        first + (exact + grown as usize).min(half - 1)
    }
}

/// `[B, 1, 1, T]`, true for keys past a row's length.
fn hidden_keys(lengths: &[usize], tokens: usize, device: &Device) -> Tensor<4, Bool> {
    let past = |length: &usize| {
        let length = *length;
        (0..tokens).map(move |token| i32::from(token >= length))
    };
    let hidden: Vec<i32> = lengths.iter().flat_map(past).collect();
    Tensor::<4, Int>::from_data(TensorData::new(hidden, [lengths.len(), 1, 1, tokens]), device).equal_elem(1)
}

impl Block {
    fn linears(&mut self) -> [&mut Linear; 7] {
        let (attention, mlp) = (&mut self.attention, &mut self.mlp);
        [
            &mut attention.q,
            &mut attention.k,
            &mut attention.v,
            &mut attention.o,
            &mut mlp.wi_0,
            &mut mlp.wi_1,
            &mut mlp.wo,
        ]
    }

    fn forward(
        &self,
        x: Tensor<3>,
        scores: (Tensor<4>, Option<Tensor<4, Bool>>),
        config: &T5Config,
    ) -> Tensor<3> {
        let norm =
            |x: &Tensor<3>, scale: &Scale| rms_norm(x.clone(), scale.weight.val(), config.layer_norm_epsilon);
        let attended = self.attention.forward(norm(&x, &self.attention_norm), scores, config);
        let x = x + attended;
        let updated = self.mlp.forward(norm(&x, &self.mlp_norm));
        x + updated
    }
}

impl SelfAttention {
    fn unfilled(config: &T5Config, has_bias: bool, device: &Device) -> Self {
        let linear = |input, output| Linear::unfilled(input, output, false, device);
        let projection = || linear(config.d_model, config.inner());
        let bias = || Embedding::unfilled(config.relative_attention_num_buckets, config.num_heads, device);
        Self {
            q: projection(),
            k: projection(),
            v: projection(),
            o: linear(config.inner(), config.d_model),
            relative_attention_bias: has_bias.then(bias),
        }
    }

    /// What is added to the scores, `[1, K, T, T]`, where the block has positions of its own.
    fn bias(&self, buckets: &Tensor<2, Int>, tokens: usize) -> Option<Tensor<4>> {
        let rows = self.relative_attention_bias.as_ref()?.forward(buckets.clone()); // [1, T · T, K]
        let heads = rows.dims()[2];
        Some(rows.swap_dims(1, 2).reshape([1, heads, tokens, tokens]))
    }

    fn forward(
        &self,
        x: Tensor<3>,
        (bias, hidden): (Tensor<4>, Option<Tensor<4, Bool>>),
        config: &T5Config,
    ) -> Tensor<3> {
        let [batch, tokens, _] = x.dims();
        let projections = [&self.q, &self.k, &self.v].map(Linear::projection);
        let heads = by_heads(linear_concat(x, projections), config.num_heads);
        let [query, key, value] = [0, 1, 2].map(|part| heads.clone().narrow(0, part, 1).squeeze_dim::<4>(0));
        let scores = query.matmul(key.swap_dims(2, 3)) + bias;
        let scores = match hidden {
            Some(hidden) => {
                let shape = scores.dims();
                scores.mask_fill(hidden.expand(shape), HIDDEN)
            }
            None => scores,
        };
        let attended = softmax(scores, 3).matmul(value).swap_dims(1, 2);
        self.o.forward(attended.reshape([batch, tokens, config.inner()]))
    }
}

impl GatedMlp {
    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let gate = self.wi_0.forward(x.clone());
        self.wo.forward(glu(self.wi_1.forward(x), gate, Gate::Gelu(Gelu::Tanh)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_keys_have_buckets_of_their_own_and_far_ones_share() {
        let config: T5Config = serde_json::from_value(serde_json::json!({
            "vocab_size": 1, "d_model": 1, "d_kv": 1, "d_ff": 1, "num_layers": 1, "num_heads": 1,
            "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6,
            "positions_per_layer": false, "feed_forward_proj": "gated-gelu",
        }))
        .unwrap();
        // From transformers' `T5Attention._relative_position_bucket`.
        for (distance, bucket) in [
            (0, 0),
            (-1, 1),
            (1, 17),
            (-7, 7),
            (-8, 8),
            (-11, 8),
            (-12, 9),
            (16, 26),
            (-64, 14),
            (-127, 15),
            (300, 31),
        ] {
            assert_eq!(config.bucket(distance), bucket, "{distance}");
        }
    }
}
