//! From prompts to what the transformer is told of them: the states of both CLIPs side by side, widened with zeros, and
//! after them T5's; and the pooled states of both CLIPs.

use burn::tensor::{Device, Tensor};
use fewstep_flow::noise::TorchGenerator;
use fewstep_kernels::HalfType;

use super::config::TextConfigs;
use super::{TEXT_ENCODER, TEXT_ENCODER_2, TEXT_ENCODER_3, TOKENIZERS};
use crate::load_options::rounded;
use crate::parts::clip::{ClipStates, ClipTextEncoder, ClipTokenizer};
use crate::parts::t5::{T5Encoder, T5Tokenizer};
use crate::weights::initialize;
use crate::{Condition, LoadOptions, ModelError, ModelSource, PromptLength};

/// The text encoders of one model.
pub(super) struct Encoders {
    pub(super) clips: [ClipTextEncoder; 2],
    /// `None` in a model that does without.
    pub(super) t5: Option<T5Encoder>,
}

impl Encoders {
    pub(super) fn from_pretrained(source: &ModelSource, options: &LoadOptions) -> Result<Self, ModelError> {
        let (dtype, device) = (options.dtype, &options.device);
        let has_t5 = TextConfigs::read(source)?.t5.is_some();
        let clip = |name| ClipTextEncoder::from_pretrained(source, name, dtype, device);
        let t5 = || T5Encoder::from_pretrained(source, TEXT_ENCODER_3, dtype, device);
        Ok(Self { clips: [clip(TEXT_ENCODER)?, clip(TEXT_ENCODER_2)?], t5: has_t5.then(t5).transpose()? })
    }

    pub(super) fn unfilled(configs: &TextConfigs, device: &Device) -> Self {
        Self {
            clips: configs.clips.each_ref().map(|clip| ClipTextEncoder::unfilled(clip, device)),
            t5: configs.t5.as_ref().map(|t5| T5Encoder::unfilled(t5, device)),
        }
    }

    /// With fresh weights.
    pub(super) fn filled(self, generator: &mut TorchGenerator) -> Self {
        Self {
            clips: self.clips.map(|clip| initialize(clip, generator, &[])),
            t5: self.t5.map(|t5| initialize(t5, generator, &[])),
        }
    }
}

/// The tokenizers of the text encoders, in their order.
#[derive(Clone, Debug)]
pub(super) struct Tokenizers {
    clips: [ClipTokenizer; 2],
    t5: Option<T5Tokenizer>,
}

impl Tokenizers {
    /// # Errors
    /// If one is missing or damaged, does not fit its encoder, or both CLIPs have rows of different lengths.
    pub(super) fn read(source: &ModelSource, encoders: &Encoders) -> Result<Self, ModelError> {
        let clip = |at: usize| -> Result<ClipTokenizer, ModelError> {
            let tokenizer = ClipTokenizer::read(source.tokenizer(TOKENIZERS[at])?)?;
            let config = encoders.clips[at].config();
            tokenizer.check_fits(config.vocab_size, config.max_position_embeddings)?;
            Ok(tokenizer)
        };
        let t5 = |encoder: &T5Encoder| -> Result<T5Tokenizer, ModelError> {
            let tokenizer = T5Tokenizer::read(source.tokenizer(TOKENIZERS[2])?)?;
            tokenizer.check_ids(encoder.config().vocab_size)?;
            Ok(tokenizer)
        };
        let clips = [clip(0)?, clip(1)?];
        let [expected, found] = clips.each_ref().map(ClipTokenizer::row_length);
        if found != expected {
            let path = source.tokenizer(TOKENIZERS[1])?;
            let reason =
                format!("model_max_length is {found}, expected that of {}, {expected}", TOKENIZERS[0]);
            return Err(ModelError::Tokenizer { path, reason });
        }
        Ok(Self { clips, t5: encoders.t5.as_ref().map(t5).transpose()? })
    }

    /// How long a prompt is for T5, which reads most of it, or for CLIP alone. CLIP cuts it in any case.
    pub(super) fn length(&self, prompt: &str, t5_tokens: usize) -> Result<PromptLength, ModelError> {
        let (found, limit) = match &self.t5 {
            Some(t5) => (t5.count(prompt)?, t5_tokens),
            None => (self.clips[0].count(prompt)?, self.clips[0].limit()),
        };
        Ok(PromptLength { found, limit, dropped: 0, states: self.clips[0].row_length() + t5_tokens })
    }
}

impl super::StableDiffusion3 {
    /// The states of prompts; padding is attended to like any token, as in the peer. A model without T5 is told zeros in
    /// the place of its states.
    pub(super) fn encode(&self, prompts: &[String]) -> Result<Condition, ModelError> {
        let not_loaded = ModelError::NotLoaded { component: TEXT_ENCODER };
        let (Some(first), Some(second), Some(tokenizers)) =
            (&self.text_encoder, &self.text_encoder_2, &self.tokenizers)
        else {
            return Err(not_loaded);
        };
        let mut states: Vec<ClipStates> = Vec::new();
        for (clip, tokenizer) in [first, second].into_iter().zip(&tokenizers.clips) {
            states.push(clip.forward(&tokenizer.encode(prompts)?));
        }
        let joined = Tensor::cat(states.iter().map(ClipStates::penultimate).collect(), 2);
        let pooled = Tensor::cat(states.into_iter().map(|states| states.pooled).collect(), 1);
        let (width, tokens, device) = (self.settings.sizes.text_width, self.t5_tokens(), joined.device());
        let long = match (&self.text_encoder_3, &tokenizers.t5) {
            (Some(t5), Some(tokenizer)) => t5.forward(&tokenizer.encode(prompts, tokens)?.ids, None),
            _ => Tensor::zeros([prompts.len(), tokens, width], &device),
        };
        let text = Tensor::cat(vec![widened_to(width, joined), long], 1); // [B, S, J]
        let dtype = self.settings.dtype;
        let lengths = vec![text.dims()[1]; prompts.len()];
        Ok(Condition::new(rounded(text, dtype), lengths).with_pooled(rounded(pooled, dtype)))
    }

    /// [`crate::Model::rounding`] of a text encoder.
    pub(super) fn round_encoder(&mut self, component: &str, half: Option<HalfType>) {
        match component {
            TEXT_ENCODER => self.text_encoder.iter_mut().for_each(|encoder| encoder.round_to(half)),
            TEXT_ENCODER_2 => self.text_encoder_2.iter_mut().for_each(|encoder| encoder.round_to(half)),
            TEXT_ENCODER_3 => self.text_encoder_3.iter_mut().for_each(|encoder| encoder.round_to(half)),
            _ => {}
        }
    }
}

/// `[B, T, J']` to `[B, T, J]` with zeros behind.
fn widened_to(width: usize, states: Tensor<3>) -> Tensor<3> {
    let [batch, tokens, found] = states.dims();
    match width - found {
        0 => states,
        missing => {
            let zeros = Tensor::zeros([batch, tokens, missing], &states.device());
            Tensor::cat(vec![states, zeros], 2)
        }
    }
}
