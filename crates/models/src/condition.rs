//! What a prompt became: the text states a denoiser attends to.

use burn::tensor::{Tensor, TensorData};

/// Text states of a batch of prompts, padded to the longest.
#[derive(Clone, Debug)]
pub struct Condition {
    /// `[B, S, J]`, J the family's joint text width; rows past a prompt's length are zero.
    pub text: Tensor<3>,
    /// Valid text tokens of each sample, B numbers in 0..=S.
    pub lengths: Vec<usize>,
}

impl Condition {
    /// Joins conditions along the batch, padding with zeros to the longest.
    ///
    /// # Panics
    /// If `parts` is empty or the text widths differ.
    pub fn stack(parts: &[Condition]) -> Condition {
        let longest = parts.iter().map(|part| part.text.dims()[1]).max().expect("at least one condition");
        let text = parts.iter().map(|part| pad_tokens(part.text.clone(), longest)).collect();
        Condition {
            text: Tensor::cat(text, 0),
            lengths: parts.iter().flat_map(|part| part.lengths.iter().copied()).collect(),
        }
    }

    /// One sample without its padding.
    pub fn row(&self, index: usize) -> Condition {
        let length = self.lengths[index];
        let width = self.text.dims()[2];
        Condition {
            text: self.text.clone().slice([index..index + 1, 0..length, 0..width]),
            lengths: vec![length],
        }
    }

    /// The same states on the device's autodiff side, without a graph behind them.
    pub fn autodiff(self) -> Condition {
        Condition { text: self.text.autodiff(), lengths: self.lengths }
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
