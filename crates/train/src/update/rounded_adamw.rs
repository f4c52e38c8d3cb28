//! AdamW on numbers of a small type, every operation rounded to it: torch's single-tensor loop on bf16 parameters.
//!
//! Steps smaller than half a unit in the last place are lost, and so is most weight decay; f32 state avoids both.

use fewstep_kernels::{AdamW, AdamWStep, Moments};
use half::{bf16, f16};

use crate::recipe::Dtype;

impl Dtype {
    /// The nearest number of the type.
    pub(crate) fn round(self, value: f32) -> f32 {
        match self {
            Self::F32 => value,
            Self::F16 => f16::from_f32(value).to_f32(),
            Self::Bf16 => bf16::from_f32(value).to_f32(),
        }
    }
}

/// Moves `parameter` and `moments` by one step.
pub(crate) fn step(
    options: &AdamW,
    parameter: &mut [f32],
    gradient: &[f32],
    moments: &mut Moments,
    (at, dtype): (AdamWStep, Dtype),
) {
    let round = |value| dtype.round(value);
    let keep = (1.0 - at.learning_rate * options.weight_decay) as f32;
    let (beta_2, new_first, new_second) =
        (options.beta_2 as f32, (1.0 - options.beta_1) as f32, (1.0 - options.beta_2) as f32);
    let correct = |beta: f64| 1.0 - beta.powf(at.step as f64);
    let step_size = (at.learning_rate / correct(options.beta_1)) as f32;
    let second_scale = correct(options.beta_2).sqrt() as f32;
    let [first, second] = moments.on_host();
    let moments = first.iter_mut().zip(second);
    for ((parameter, gradient), (first, second)) in parameter.iter_mut().zip(gradient).zip(moments) {
        let gradient = round(gradient * at.gradient_scale);
        *parameter = round(*parameter * keep);
        *first = round(*first + new_first * (gradient - *first));
        *second = round(round(*second * beta_2) + new_second * gradient * gradient);
        let root = round(round(second.sqrt()) / second_scale);
        let denominator = round(root + options.epsilon as f32);
        *parameter = round(*parameter - step_size * *first / denominator);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One step by hand in numbers that bf16 (steps of 2⁻⁷ from 1 on) holds exactly.
    #[test]
    fn every_operation_is_rounded() {
        let options = AdamW { weight_decay: 0.0, ..AdamW::default() };
        let at = |learning_rate| AdamWStep { learning_rate, gradient_scale: 1.0, step: 1 };
        let moved = |learning_rate, dtype| {
            let (mut parameter, mut moments) = ([1.0], Moments::zeros(1));
            step(&options, &mut parameter, &[0.5], &mut moments, (at(learning_rate), dtype));
            parameter[0]
        };
        // The first step is the learning rate itself, up to the rounding of the moments.
        assert!((moved(0.25, Dtype::F32) - 0.75).abs() < 1e-6);
        assert!((moved(0.25, Dtype::Bf16) - 0.75).abs() <= 2f32.powi(-8));
        // Less than half of the spacing below 1 is lost in bf16.
        assert!(moved(1e-3, Dtype::F32) < 1.0);
        assert_eq!(moved(1e-3, Dtype::Bf16), 1.0);
    }

    #[test]
    fn in_f32_it_is_the_fused_optimiser() {
        use burn::tensor::{Device, Tensor};
        let options = AdamW::default();
        let start = fewstep_testkit::random_values(50, 1);
        let (mut parameter, mut moments) = (start.clone(), Moments::zeros(50));
        let mut fused = Tensor::<1>::from_floats(start.as_slice(), &Device::flex());
        let mut fused_moments = Moments::zeros(50);
        for number in 1..=5 {
            let at = AdamWStep { learning_rate: 3e-3, gradient_scale: 0.5, step: number };
            let gradient = fewstep_testkit::random_values(50, 10 + number);
            step(&options, &mut parameter, &gradient, &mut moments, (at, Dtype::F32));
            let gradient = Tensor::<1>::from_floats(gradient.as_slice(), &Device::flex());
            fused = options.step(fused, gradient, &mut fused_moments, at);
        }
        // Five roundings of numbers up to 4.
        fewstep_testkit::assert_close(&parameter, &crate::host::to_vec(fused), 2e-6);
    }
}
