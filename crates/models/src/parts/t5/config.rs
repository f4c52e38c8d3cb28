//! `config.json` of a T5 or UMT5 encoder.

use serde::Deserialize;
use serde_json::{Value, json};

use crate::config_file::ConfigFile;
use crate::{Encoding, ModelError, ModelSource, ranges};

/// Classes of encoders with positions of the first layer for all, and with positions of each layer's own.
const CLASSES: [&str; 4] =
    ["T5EncoderModel", "T5ForConditionalGeneration", UMT5, "UMT5ForConditionalGeneration"];
const UMT5: &str = "UMT5EncoderModel";

/// The MLP of T5 1.1.
const GATED_GELU: &str = "gated-gelu";

/// Config of an encoder; the names are the files'.
#[derive(Clone, Debug, Deserialize)]
pub struct T5Config {
    /// Token embeddings.
    pub vocab_size: usize,
    /// J, width of the states.
    pub d_model: usize,
    /// Width of a head.
    pub d_kv: usize,
    /// Width of the MLP.
    pub d_ff: usize,
    /// Layers.
    pub num_layers: usize,
    /// Heads; together they need not be as wide as the states.
    pub num_heads: usize,
    /// Distances that positions are told apart by, in both directions together.
    pub relative_attention_num_buckets: usize,
    /// Distance from which on all are alike.
    pub relative_attention_max_distance: usize,
    /// Epsilon of the RMS norms.
    pub layer_norm_epsilon: f32,
    /// Whether every layer has positions of its own, as in UMT5.
    pub positions_per_layer: bool,
    feed_forward_proj: String,
}

impl T5Config {
    /// Reads the config of a component.
    ///
    /// # Errors
    /// If it is missing, damaged, or of another model.
    pub(crate) fn read(source: &ModelSource, component: &'static str) -> Result<Self, ModelError> {
        let file = ConfigFile::of_component(source, component)?;
        let class = file.json["architectures"][0].as_str();
        file.check_class(component, class, &CLASSES)?;
        let mut defaults = defaults();
        defaults["positions_per_layer"] = class.is_some_and(|class| class.starts_with("UMT5")).into();
        let config: Self = file.parse_over(defaults)?;
        config.check().map_err(|reason| file.error(reason))?;
        Ok(config)
    }

    /// Width of all heads together.
    pub(super) fn inner(&self) -> usize {
        self.num_heads * self.d_kv
    }

    /// What the encoder holds, for rows of so many tokens.
    pub(crate) fn encoding(&self, tokens: usize) -> Encoding {
        let [width, inner, hidden, layers] =
            [self.d_model, self.inner(), self.d_ff, self.num_layers].map(|size| size as u64);
        // The stream and its norm beside query, key and value, these by heads, and their output; or beside both branches
        // of the MLP, the activation and the product. Scores of all heads come on top, a row of them for each token.
        let scores = 3 * (self.num_heads * tokens) as u64;
        let per_token = (2 * width + 7 * inner + scores).max(2 * width + 4 * hidden);
        Encoding {
            per_token,
            per_token_training: layers * (4 * width + 8 * inner + 5 * hidden) + per_token,
            per_pixel: 0,
            flops_per_token: 2 * layers * (4 * width * inner + 3 * width * hidden),
        }
    }

    fn check(&self) -> Result<(), String> {
        ranges::check(&[
            ("vocab_size", self.vocab_size, ranges::VOCABULARY),
            ("d_model", self.d_model, ranges::WIDTH),
            ("d_kv", self.d_kv, ranges::WIDTH),
            ("d_ff", self.d_ff, ranges::WIDTH),
            ("num_layers", self.num_layers, ranges::LAYERS),
            ("num_heads", self.num_heads, ranges::WIDTH),
            ("relative_attention_num_buckets", self.relative_attention_num_buckets, 4..=1 << 16),
            ("relative_attention_max_distance", self.relative_attention_max_distance, ranges::WIDTH),
        ])?;
        ranges::check(&[("num_heads × d_kv", self.inner(), ranges::WIDTH)])?;
        ranges::check_positive(&[("layer_norm_epsilon", self.layer_norm_epsilon)])?;
        let (buckets, distance) = (self.relative_attention_num_buckets, self.relative_attention_max_distance);
        if !buckets.is_multiple_of(4) || distance <= buckets / 4 {
            return Err(format!(
                "relative_attention_num_buckets {buckets} and relative_attention_max_distance {distance}, expected a \
                 multiple of 4 and more than a fourth of it"
            ));
        }
        match self.feed_forward_proj.as_str() {
            GATED_GELU => Ok(()),
            other => Err(format!("feed_forward_proj is {other}, expected {GATED_GELU}")),
        }
    }
}

/// What a file means where it leaves a key out: transformers' defaults.
fn defaults() -> Value {
    json!({
        "vocab_size": 32_128,
        "d_model": 512,
        "d_kv": 64,
        "d_ff": 2048,
        "num_layers": 6,
        "num_heads": 8,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "relu",
    })
}
