//! `text_encoder/config.json` of a CLIP text model.

use serde::Deserialize;
use serde_json::{Value, json};

use crate::config_file::ConfigFile;
use crate::parts::activation::Activation;
use crate::{Encoding, ModelError, ModelSource, ranges};

/// Classes of text models, and of those whose pooled state is projected.
const CLASSES: [&str; 2] = ["CLIPTextModel", WITH_PROJECTION];
const WITH_PROJECTION: &str = "CLIPTextModelWithProjection";

/// The end of the text in configs of old files, which is not the id their tokenizers give it: the largest id of a row
/// is meant.
const LARGEST_ID: u32 = 2;

/// Config of a text model.
#[derive(Clone, Debug, Deserialize)]
pub struct ClipTextConfig {
    /// Token embeddings.
    pub vocab_size: usize,
    /// Width of the states.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Heads; they divide the width.
    pub num_attention_heads: usize,
    /// Longest row of tokens, padding included.
    pub max_position_embeddings: usize,
    /// Width of the projected state.
    pub projection_dim: usize,
    /// Epsilon of the layer norms.
    pub layer_norm_eps: f32,
    /// Activation of the MLP.
    pub hidden_act: Activation,
    /// The token whose state is pooled.
    eos_token_id: u32,
    /// Whether the pooled state is projected.
    with_projection: bool,
}

impl ClipTextConfig {
    /// Reads the config of a component.
    ///
    /// # Errors
    /// If it is missing, damaged, or of another model.
    pub(crate) fn read(source: &ModelSource, component: &'static str) -> Result<Self, ModelError> {
        let file = ConfigFile::of_component(source, component)?;
        let class = file.json["architectures"][0].as_str();
        file.check_class(component, class, &CLASSES)?;
        let mut defaults = defaults();
        defaults["with_projection"] = (class == Some(WITH_PROJECTION)).into();
        let config: Self = file.parse_over(defaults)?;
        config.check().map_err(|reason| file.error(reason))?;
        Ok(config)
    }

    /// Width of the projected state, where there is one.
    pub(crate) fn projection(&self) -> Option<usize> {
        self.with_projection.then_some(self.projection_dim)
    }

    /// Width of the pooled state.
    pub(crate) fn pooled_width(&self) -> usize {
        self.projection().unwrap_or(self.hidden_size)
    }

    /// The place of the end of the text in a row of tokens.
    pub(super) fn end_of(&self, row: &[u32]) -> usize {
        let end = match self.eos_token_id {
            LARGEST_ID => row.iter().max().copied(),
            end => Some(end),
        };
        // Without one, as the peers' argmax over nothing but zeros.
        row.iter().position(|id| Some(*id) == end).unwrap_or(0)
    }

    /// What the text model holds.
    pub(crate) fn encoding(&self) -> Encoding {
        let [width, inner, layers] =
            [self.hidden_size, self.intermediate_size, self.num_hidden_layers].map(|size| size as u64);
        // The stream, its norm, query, key and value, these packed, and the attention's output; or the MLP before and
        // after its activation. The states of all layers are there at the end.
        let moment = (9 * width).max(2 * width + 2 * inner);
        Encoding {
            per_token: moment + layers * width,
            per_token_training: layers * (9 * width + 2 * inner) + moment,
            per_pixel: 0,
            flops_per_token: 2 * layers * (4 * width * width + 2 * width * inner),
        }
    }

    fn check(&self) -> Result<(), String> {
        ranges::check(&[
            ("vocab_size", self.vocab_size, ranges::VOCABULARY),
            ("hidden_size", self.hidden_size, ranges::WIDTH),
            ("intermediate_size", self.intermediate_size, ranges::WIDTH),
            ("num_hidden_layers", self.num_hidden_layers, ranges::LAYERS),
            ("num_attention_heads", self.num_attention_heads, ranges::WIDTH),
            ("max_position_embeddings", self.max_position_embeddings, ranges::WIDTH),
            ("projection_dim", self.projection_dim, ranges::WIDTH),
        ])?;
        ranges::check_positive(&[("layer_norm_eps", self.layer_norm_eps)])?;
        if !self.hidden_size.is_multiple_of(self.num_attention_heads) {
            return Err(format!(
                "hidden_size is {}, expected a multiple of num_attention_heads, {}",
                self.hidden_size, self.num_attention_heads
            ));
        }
        Ok(())
    }
}

/// What a file means where it leaves a key out: transformers' defaults.
fn defaults() -> Value {
    json!({
        "vocab_size": 49_408,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "max_position_embeddings": 77,
        "projection_dim": 512,
        "layer_norm_eps": 1e-5,
        "hidden_act": "quick_gelu",
        "eos_token_id": 49_407,
    })
}
