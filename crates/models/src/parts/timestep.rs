//! What modulates a transformer's blocks: the time by its sinusoidal features, and with it pooled text and a guidance scale.

use burn::module::Module;
use burn::tensor::activation::silu;
use burn::tensor::{Device, Tensor, TensorData};
use fewstep_kernels::{Gelu, gelu};

use crate::Condition;
use crate::parts::linear::Linear;

/// Width of the sinusoidal time features.
pub(crate) const TIME_FEATURES: usize = 256;

/// Two linear layers with an activation between them.
#[derive(Module, Debug)]
pub(crate) struct TwoLayers {
    pub(crate) linear_1: Linear,
    pub(crate) linear_2: Linear,
}

impl TwoLayers {
    pub(crate) fn unfilled(input: usize, width: usize, device: &Device) -> Self {
        Self {
            linear_1: Linear::unfilled(input, width, true, device),
            linear_2: Linear::unfilled(width, width, true, device),
        }
    }

    /// Linear, SiLU, linear: `[B, input]` to `[B, D]`.
    pub(crate) fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        self.linear_2.forward(silu(self.linear_1.forward(x)))
    }

    /// Linear, GELU, linear: `[B, S, input]` to `[B, S, D]`.
    pub(crate) fn forward_gelu(&self, x: Tensor<3>) -> Tensor<3> {
        self.linear_2.forward(gelu(self.linear_1.forward(x), Gelu::Tanh))
    }
}

/// The sum of what becomes of time, guidance and pooled text.
#[derive(Module, Debug)]
pub(crate) struct TimeTextEmbed {
    timestep_embedder: TwoLayers,
    /// In models that were distilled from guidance.
    guidance_embedder: Option<TwoLayers>,
    text_embedder: TwoLayers,
}

impl TimeTextEmbed {
    /// For pooled states of `pooled` numbers.
    pub(crate) fn unfilled(pooled: usize, width: usize, embeds_guidance: bool, device: &Device) -> Self {
        let embedder = |input| TwoLayers::unfilled(input, width, device);
        Self {
            timestep_embedder: embedder(TIME_FEATURES),
            guidance_embedder: embeds_guidance.then(|| embedder(TIME_FEATURES)),
            text_embedder: embedder(pooled),
        }
    }

    /// The guidance is that of models which are told one, on the scale of the time.
    ///
    /// # Shapes
    /// - `timestep`: `[B]` in 0 to 1000; output `[B, D]`
    ///
    /// # Panics
    /// If the condition has no pooled states.
    pub(crate) fn forward(&self, timestep: Tensor<1>, guidance: f32, condition: &Condition) -> Tensor<2> {
        let pooled = condition.pooled.clone().expect("the condition has pooled states");
        let features = |value: Tensor<1>| sinusoidal(value, TIME_FEATURES, 1.0);
        let guidance = Tensor::full(timestep.dims(), guidance, &timestep.device());
        let mut sum = self.timestep_embedder.forward(features(timestep));
        if let Some(embedder) = &self.guidance_embedder {
            sum = sum + embedder.forward(features(guidance));
        }
        sum + self.text_embedder.forward(pooled)
    }

    /// Its projections, for adapters.
    pub(crate) fn linears(&mut self) -> Vec<(String, &mut Linear)> {
        let embedders = [
            ("timestep_embedder", Some(&mut self.timestep_embedder)),
            ("guidance_embedder", self.guidance_embedder.as_mut()),
            ("text_embedder", Some(&mut self.text_embedder)),
        ];
        let mut linears = Vec::new();
        for (name, embedder) in embedders {
            let Some(TwoLayers { linear_1, linear_2 }) = embedder else { continue };
            linears.push((format!("time_text_embed.{name}.linear_1"), linear_1));
            linears.push((format!("time_text_embed.{name}.linear_2"), linear_2));
        }
        linears
    }
}

/// Sinusoids of `scale · value`, cosines first, frequencies `max_period^(−i/half)`.
///
/// The order of the multiplications is that of diffusers' `get_timestep_embedding`, so that f32
/// rounding agrees with it: (value · frequency) · scale.
///
/// # Shapes
/// - `value`: `[B]`; output `[B, width]` with an even `width`
pub(crate) fn sinusoidal(value: Tensor<1>, width: usize, scale: f32) -> Tensor<2> {
    const MAX_PERIOD: f32 = 10_000.0;
    let half = width / 2;
    let frequencies: Vec<f32> =
        (0..half).map(|i| (-MAX_PERIOD.ln() * i as f32 / half as f32).exp()).collect();
    let device: Device = value.device();
    let frequencies = Tensor::<1>::from_data(TensorData::new(frequencies, [half]), &device);
    let angle = value.unsqueeze_dim::<2>(1).mul(frequencies.unsqueeze_dim::<2>(0)).mul_scalar(scale);
    Tensor::cat(vec![angle.clone().cos(), angle.sin()], 1)
}
