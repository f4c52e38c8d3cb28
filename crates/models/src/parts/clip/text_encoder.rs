//! The text transformer: pre-norm, causal, with learned positions. Numbers equal transformers' `CLIPTextModel` and
//! `CLIPTextModelWithProjection`.

use burn::module::Module;
use burn::tensor::{Device, Int, Tensor};
use fewstep_kernels::{AttentionOptions, HalfType, attention, linear_concat};

use super::config::ClipTextConfig;
use crate::parts::attention::by_heads;
use crate::parts::embedding::{Embedding, padded_ids};
use crate::parts::linear::Linear;
use crate::parts::norm::LayerNorm;
use crate::weights::{KeyMap, load};
use crate::{ModelError, ModelSource, WeightType};

/// Old files hold the positions' ids too; transformers 5 leaves `text_model.` out.
pub(crate) const KEYS: KeyMap = KeyMap {
    aliases: &[
        ("embeddings.", "text_model.embeddings."),
        ("encoder.", "text_model.encoder."),
        ("final_layer_norm.", "text_model.final_layer_norm."),
    ],
    ignored: &["text_model.embeddings.position_ids"],
    ..KeyMap::PLAIN
};

/// The text model.
#[derive(Module, Debug)]
pub struct ClipTextEncoder {
    text_model: TextModel,
    /// Of the pooled state, in models that have it.
    text_projection: Option<Linear>,
    #[module(skip)]
    config: ClipTextConfig,
}

#[derive(Module, Debug)]
struct TextModel {
    embeddings: Embeddings,
    encoder: Encoder,
    final_layer_norm: LayerNorm,
}

#[derive(Module, Debug)]
struct Embeddings {
    token_embedding: Embedding,
    position_embedding: Embedding,
}

#[derive(Module, Debug)]
struct Encoder {
    layers: Vec<Layer>,
}

#[derive(Module, Debug)]
struct Layer {
    layer_norm1: LayerNorm,
    self_attn: SelfAttention,
    layer_norm2: LayerNorm,
    mlp: Mlp,
}

#[derive(Module, Debug)]
struct SelfAttention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    out_proj: Linear,
}

#[derive(Module, Debug)]
struct Mlp {
    fc1: Linear,
    fc2: Linear,
}

/// What the text model makes of rows of tokens.
#[derive(Clone, Debug)]
pub struct ClipStates {
    /// `[B, T, D]` each: the embeddings, then the states after every layer.
    pub hidden: Vec<Tensor<3>>,
    /// `[B, T, D]`: the last of them after the final norm.
    pub last: Tensor<3>,
    /// `[B, P]`: the state of `last` at the end of each text, projected in models that have a projection.
    pub pooled: Tensor<2>,
}

impl ClipStates {
    /// The states before the last layer.
    pub fn penultimate(&self) -> Tensor<3> {
        self.before_last(1)
    }

    /// The states before the last `layers` layers.
    ///
    /// # Panics
    /// If the model has fewer.
    pub fn before_last(&self, layers: usize) -> Tensor<3> {
        self.hidden[self.hidden.len() - 1 - layers].clone()
    }
}

impl ClipTextEncoder {
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
        let empty = Self::unfilled(&ClipTextConfig::read(source, component)?, device);
        load(empty, &source.weights(component)?, &KEYS, dtype)
    }

    pub(crate) fn unfilled(config: &ClipTextConfig, device: &Device) -> Self {
        let width = config.hidden_size;
        let norm = || LayerNorm::unfilled(width, config.layer_norm_eps, device);
        let layer = || Layer {
            layer_norm1: norm(),
            self_attn: SelfAttention::unfilled(width, device),
            layer_norm2: norm(),
            mlp: Mlp {
                fc1: Linear::unfilled(width, config.intermediate_size, true, device),
                fc2: Linear::unfilled(config.intermediate_size, width, true, device),
            },
        };
        Self {
            text_model: TextModel {
                embeddings: Embeddings {
                    token_embedding: Embedding::unfilled(config.vocab_size, width, device),
                    position_embedding: Embedding::unfilled(config.max_position_embeddings, width, device),
                },
                encoder: Encoder { layers: (0..config.num_hidden_layers).map(|_| layer()).collect() },
                final_layer_norm: norm(),
            },
            text_projection: config
                .projection()
                .map(|projected| Linear::unfilled(width, projected, false, device)),
            config: config.clone(),
        }
    }

    /// The config it was made with.
    pub(crate) fn config(&self) -> &ClipTextConfig {
        &self.config
    }

    /// Computes with the nearest numbers of a type to its matrices.
    pub(crate) fn round_to(&mut self, half: Option<HalfType>) {
        let embeddings = &mut self.text_model.embeddings;
        embeddings.token_embedding.rounded_to = half;
        embeddings.position_embedding.rounded_to = half;
        let layers = self.text_model.encoder.layers.iter_mut().flat_map(Layer::linears);
        layers.chain(&mut self.text_projection).for_each(|linear| linear.rounded_to = half);
    }

    /// Runs rows of tokens of equal length, such as [`super::ClipTokenizer::encode`] makes them. Padding is attended to
    /// like any token, as in the peers.
    ///
    /// # Panics
    /// If a row is longer than the model has positions.
    pub fn forward(&self, ids: &[Vec<u32>]) -> ClipStates {
        let model = &self.text_model;
        let mut state = model.embeddings.forward(ids);
        let mut hidden = vec![state.clone()];
        for layer in &model.encoder.layers {
            state = layer.forward(state, &self.config);
            hidden.push(state.clone());
        }
        let last = model.final_layer_norm.forward(state);
        let pooled = self.pool(&last, ids);
        ClipStates { hidden, last, pooled }
    }

    /// The state at the end of each text.
    fn pool(&self, states: &Tensor<3>, ids: &[Vec<u32>]) -> Tensor<2> {
        let at_end = |(row, ids): (usize, &Vec<u32>)| {
            states.clone().narrow(0, row, 1).narrow(1, self.config.end_of(ids), 1)
        };
        let ends = Tensor::cat(ids.iter().enumerate().map(at_end).collect(), 0).squeeze_dim::<2>(1);
        match &self.text_projection {
            Some(projection) => projection.forward(ends),
            None => ends,
        }
    }
}

impl Embeddings {
    fn forward(&self, ids: &[Vec<u32>]) -> Tensor<3> {
        let device = self.token_embedding.device();
        let tokens = ids.first().map_or(0, Vec::len);
        let positions = Tensor::<1, Int>::arange(0..tokens as i64, &device).unsqueeze_dim::<2>(0);
        self.token_embedding.forward(padded_ids(ids, tokens, &device))
            + self.position_embedding.forward(positions)
    }
}

impl Layer {
    fn linears(&mut self) -> [&mut Linear; 6] {
        let attention = &mut self.self_attn;
        [
            &mut attention.q_proj,
            &mut attention.k_proj,
            &mut attention.v_proj,
            &mut attention.out_proj,
            &mut self.mlp.fc1,
            &mut self.mlp.fc2,
        ]
    }

    fn forward(&self, x: Tensor<3>, config: &ClipTextConfig) -> Tensor<3> {
        let attended =
            self.self_attn.forward(self.layer_norm1.forward(x.clone()), config.num_attention_heads);
        let x = x + attended;
        let hidden = config.hidden_act.forward(self.mlp.fc1.forward(self.layer_norm2.forward(x.clone())));
        x + self.mlp.fc2.forward(hidden)
    }
}

impl SelfAttention {
    fn unfilled(width: usize, device: &Device) -> Self {
        let square = || Linear::unfilled(width, width, true, device);
        Self { q_proj: square(), k_proj: square(), v_proj: square(), out_proj: square() }
    }

    fn forward(&self, x: Tensor<3>, heads: usize) -> Tensor<3> {
        let projections = [&self.q_proj, &self.k_proj, &self.v_proj].map(Linear::projection);
        let qkv = by_heads(linear_concat(x, projections), heads);
        self.out_proj.forward(attention(qkv, AttentionOptions { keys: None, causal: true }))
    }
}
