//! What a prompt became: the text states a denoiser attends to, and what else it is told.

use burn::tensor::{Tensor, TensorData};

/// Text states of a batch of prompts, padded to the longest.
#[derive(Clone, Debug)]
pub struct Condition {
    /// `[B, S, J]`, J the family's joint text width; rows past a prompt's length are zero.
    pub text: Tensor<3>,
    /// Valid text tokens of each sample, B numbers in 0..=S.
    pub lengths: Vec<usize>,
    /// `[B, P]`, one state for each whole prompt, where the family has such.
    pub pooled: Option<Tensor<2>>,
    /// The guidance scale that the denoiser is told, where the family's takes one; `None` leaves it to the model.
    pub embedded_guidance: Option<f32>,
    /// Frames of what is drawn; not yet said of states that an encoder gave. A family of videos refuses to guess.
    pub frames: Option<usize>,
}

/// How long a prompt is, in tokens without the template's dropped ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PromptLength {
    /// The prompt's tokens and those of the template's end.
    pub found: usize,
    /// How many are read; the rest is cut, the template's end with it.
    pub limit: usize,
    /// Tokens of the template's beginning, which are encoded and then dropped.
    pub dropped: usize,
    /// Tokens of the text states, padding that the denoiser attends to included.
    pub states: usize,
}

impl PromptLength {
    /// Whether the end of the prompt is not read.
    pub fn is_cut(self) -> bool {
        self.found > self.limit
    }
}

impl Condition {
    /// Text states `[B, S, J]` alone.
    pub fn new(text: Tensor<3>, lengths: Vec<usize>) -> Self {
        Self { text, lengths, pooled: None, embedded_guidance: None, frames: None }
    }

    /// With pooled states `[B, P]`.
    pub fn with_pooled(self, pooled: Tensor<2>) -> Self {
        Self { pooled: Some(pooled), ..self }
    }

    /// With the guidance scale that the denoiser is told; `None` leaves it to the model.
    pub fn with_embedded_guidance(self, embedded_guidance: Option<f32>) -> Self {
        Self { embedded_guidance, ..self }
    }

    /// Of so many frames; 1 is a picture.
    pub fn with_frames(self, frames: usize) -> Self {
        Self { frames: Some(frames), ..self }
    }

    /// Joins conditions along the batch, padding with zeros to the longest.
    ///
    /// # Panics
    /// If `parts` is empty, the text widths differ, some have pooled states and others none, or the denoiser is to be told
    /// different scales or numbers of frames.
    pub fn stack(parts: &[Condition]) -> Condition {
        let longest = parts.iter().map(|part| part.text.dims()[1]).max().expect("at least one condition");
        let text = parts.iter().map(|part| pad_tokens(part.text.clone(), longest)).collect();
        let pooled: Vec<Tensor<2>> = parts.iter().filter_map(|part| part.pooled.clone()).collect();
        assert!([0, parts.len()].contains(&pooled.len()), "conditions with and without pooled states");
        let embedded_guidance = parts[0].embedded_guidance;
        assert!(
            parts.iter().all(|part| part.embedded_guidance == embedded_guidance),
            "conditions of different embedded guidance"
        );
        let frames = parts[0].frames;
        assert!(parts.iter().all(|part| part.frames == frames), "conditions of different numbers of frames");
        Condition {
            text: Tensor::cat(text, 0),
            lengths: parts.iter().flat_map(|part| part.lengths.iter().copied()).collect(),
            pooled: (!pooled.is_empty()).then(|| Tensor::cat(pooled, 0)),
            embedded_guidance,
            frames,
        }
    }

    /// One sample without its padding.
    pub fn row(&self, index: usize) -> Condition {
        let length = self.lengths[index];
        let width = self.text.dims()[2];
        Condition {
            text: self.text.clone().slice([index..index + 1, 0..length, 0..width]),
            lengths: vec![length],
            pooled: self.pooled.clone().map(|pooled| pooled.narrow(0, index, 1)),
            embedded_guidance: self.embedded_guidance,
            frames: self.frames,
        }
    }

    /// The same states on the device's autodiff side, without a graph behind them.
    pub fn autodiff(self) -> Condition {
        Condition { text: self.text.autodiff(), pooled: self.pooled.map(Tensor::autodiff), ..self }
    }
}

/// Appends zero tokens up to `length`.
pub(crate) fn pad_tokens(text: Tensor<3>, length: usize) -> Tensor<3> {
    let [batch, tokens, width] = text.dims();
    if tokens == length {
        return text;
    }
    let device = text.device();
    let padding = vec![0.0f32; batch * (length - tokens) * width];
    let padding = TensorData::new(padding, [batch, length - tokens, width]);
    Tensor::cat(vec![text, Tensor::from_data(padding, &device)], 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;
    use fewstep_testkit::{assert_close, values};

    #[test]
    fn rows_are_what_was_stacked() {
        let device = Device::flex();
        let of = |text: &[f32], pooled: [f32; 2]| {
            let lengths = vec![text.len()];
            let text = Tensor::from_data(TensorData::new(text.to_vec(), [1, text.len(), 1]), &device);
            let pooled = Tensor::from_data(TensorData::new(pooled.to_vec(), [1, 2]), &device);
            let condition = Condition::new(text, lengths).with_pooled(pooled);
            condition.with_embedded_guidance(Some(3.5)).with_frames(5)
        };
        let stacked = Condition::stack(&[of(&[1.0], [2.0, 3.0]), of(&[4.0, 5.0], [6.0, 7.0])]);
        assert_eq!(
            (stacked.text.dims(), stacked.embedded_guidance, stacked.frames),
            ([2, 2, 1], Some(3.5), Some(5))
        );
        let (first, second) = (stacked.row(0), stacked.row(1));
        assert_close(&values(first.text), &[1.0], 0.0);
        assert_close(&values(second.text), &[4.0, 5.0], 0.0);
        assert_close(&values(second.pooled.unwrap()), &[6.0, 7.0], 0.0);
        assert_eq!((first.embedded_guidance, first.frames), (Some(3.5), Some(5)));
    }
}
