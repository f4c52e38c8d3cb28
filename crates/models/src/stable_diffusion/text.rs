//! From prompts to what the UNet is told of them.

use burn::tensor::{Tensor, TensorData};
use serde::Deserialize;

use super::kind::Kind;
use crate::config_file::ConfigFile;
use crate::load_options::rounded;
use crate::parts::clip::{ClipStates, ClipTextEncoder, ClipTokenizer};
use crate::{Condition, Conventions, ModelError, ModelSource, Peer, PromptLength, WeightType};

/// Tokens of a prompt that CLIP reads, the marks at its ends aside.
pub(super) const PUBLISHED_LIMIT: usize = 75;

/// What a model has beside its text encoders' weights.
#[derive(Clone, Debug)]
pub(super) struct TextEncoders {
    /// Of each text encoder that was loaded.
    tokenizers: Vec<ClipTokenizer>,
    /// SDXL reads the states before the last layer, and a pooled one.
    xl: bool,
    /// Whether an empty negative prompt is told as zeros.
    zeros_for_empty: bool,
}

impl TextEncoders {
    /// The tokenizers of the encoders that were loaded; a prompt is cut where the conventions say.
    pub(super) fn read(
        kind: &Kind,
        source: &ModelSource,
        encoders: &[Option<ClipTextEncoder>; 2],
        conventions: &Conventions,
    ) -> Result<Self, ModelError> {
        let mut tokenizers = Vec::new();
        for (name, encoder) in ["tokenizer", "tokenizer_2"].into_iter().zip(encoders) {
            if let Some(encoder) = encoder {
                let tokenizer = ClipTokenizer::read(source.tokenizer(name)?)?;
                let config = encoder.config();
                tokenizer.check_fits(config.vocab_size, config.max_position_embeddings)?;
                tokenizers.push(match conventions.max_prompt_tokens {
                    Some(limit) => tokenizer.cut_to(limit),
                    None => tokenizer,
                });
            }
        }
        Ok(Self { tokenizers, xl: kind.xl, zeros_for_empty: kind.xl && zeros_for_empty(kind, source)? })
    }

    /// The most tokens of a prompt that every encoder reads; `None` without encoders.
    pub(super) fn limit(&self) -> Option<usize> {
        self.tokenizers.iter().map(ClipTokenizer::limit).min()
    }

    /// How long a prompt is for the tokenizer that makes most tokens of it.
    pub(super) fn length(&self, prompt: &str) -> Result<PromptLength, ModelError> {
        let limit = self.limit().ok_or(NOT_LOADED)?;
        let counts: Result<Vec<usize>, ModelError> =
            self.tokenizers.iter().map(|tokenizer| tokenizer.count(prompt)).collect();
        let states = self.tokenizers[0].row_length();
        Ok(PromptLength { found: counts?.into_iter().max().unwrap_or(0), limit, dropped: 0, states })
    }

    /// The states of prompts; padding is attended to like any token, as in the peers.
    pub(super) fn encode<'a>(
        &self,
        encoders: impl Iterator<Item = &'a ClipTextEncoder>,
        prompts: &[String],
        dtype: WeightType,
    ) -> Result<Condition, ModelError> {
        let mut states: Vec<ClipStates> = Vec::new();
        for (encoder, tokenizer) in encoders.zip(&self.tokenizers) {
            states.push(encoder.forward(&tokenizer.encode(prompts)?));
        }
        let last = states.last().ok_or(NOT_LOADED)?;
        let (text, pooled) = match self.xl {
            true => {
                let texts = states.iter().map(ClipStates::penultimate).collect();
                (Tensor::cat(texts, 2), Some(last.pooled.clone()))
            }
            false => (last.last.clone(), None),
        };
        let lengths = vec![text.dims()[1]; prompts.len()];
        let condition = Condition::new(rounded(text, dtype), lengths);
        Ok(Condition { pooled: pooled.map(|pooled| rounded(pooled, dtype)), ..condition })
    }

    /// States of negative prompts, with zeros for empty ones where the model was trained so. DiffSynth encodes them.
    pub(super) fn emptied(&self, encoded: Condition, prompts: &[String], peer: Option<Peer>) -> Condition {
        if !self.zeros_for_empty || peer == Some(Peer::Diffsynth) {
            return encoded;
        }
        let kept: Vec<f32> = prompts.iter().map(|prompt| f32::from(u8::from(!prompt.is_empty()))).collect();
        let batch = kept.len();
        let kept = Tensor::<1>::from_data(TensorData::new(kept, [batch]), &encoded.text.device());
        Condition {
            text: encoded.text * kept.clone().reshape([batch, 1, 1]),
            pooled: encoded.pooled.map(|pooled| pooled * kept.reshape([batch, 1])),
            ..encoded
        }
    }
}

const NOT_LOADED: ModelError = ModelError::NotLoaded { component: "text_encoder" };

/// What `model_index.json` says of an empty negative prompt.
fn zeros_for_empty(kind: &Kind, source: &ModelSource) -> Result<bool, ModelError> {
    #[derive(Deserialize)]
    struct Index {
        #[serde(default = "yes")]
        force_zeros_for_empty_prompt: bool,
    }
    fn yes() -> bool {
        true
    }
    let index: Index = ConfigFile::shared(source, "model_index.json", kind.index)?.parse()?;
    Ok(index.force_zeros_for_empty_prompt)
}
