//! Vector-Jacobian products through burn's `backward`, which itself only starts from a scalar.

use burn::tensor::Tensor;

use crate::extension::{Input, Pullback, Values, is_fused, operation};
use crate::plain;

/// A pseudo-loss whose gradient with respect to `output` is `cotangent`.
///
/// Its value is zero and carries no meaning. `inject(f(x), c).backward()` leaves `cᵀ ∂f/∂x` as the gradient of x.
/// Several pseudo-losses can be added before `backward`.
///
/// # Shapes
/// - `output`, `cotangent`: the same
/// - returns: `[1]`
pub fn inject<const D: usize>(output: Tensor<D>, cotangent: Tensor<D>) -> Tensor<1> {
    assert_eq!(output.dims(), cotangent.dims(), "output and cotangent");
    if !is_fused(&output) {
        return plain::inject(output, cotangent);
    }
    let shape = output.dims();
    let cotangent = Values::detached(cotangent);
    operation([Input::new(output)], |_, _| {
        let pullback: Pullback<1> = Box::new(move |gradient| {
            let factor = gradient[0];
            if factor == 1.0 {
                return [Some(cotangent.clone())];
            }
            let scaled = cotangent.iter().map(|value| value * factor).collect();
            [Some(Values::from_vec(scaled, &shape))]
        });
        (Values::from_vec(vec![0.0], &[1]), pullback)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;
    use fewstep_testkit::{random, values};

    type Operation = fn(Tensor<2>, Tensor<2>) -> Tensor<1>;

    #[test]
    fn the_output_gets_exactly_the_cotangent() {
        for operation in [inject as Operation, plain::inject as Operation] {
            let output = random([3, 5], 1, &Device::flex().autodiff()).require_grad();
            let cotangent = random([3, 5], 2, &Device::flex());
            let loss = operation(output.clone(), cotangent.clone().autodiff());
            assert_eq!(values(loss.clone()), [0.0]);
            let gradients = loss.backward();
            assert_eq!(values(output.grad(&gradients).unwrap()), values(cotangent));
        }
    }

    #[test]
    fn pseudo_losses_add_and_scale() {
        let x = random([2, 3], 1, &Device::flex().autodiff()).require_grad();
        let cotangent = random::<2>([2, 3], 2, &Device::flex());
        let loss = inject(x.clone().mul_scalar(3.0), cotangent.clone())
            + inject(x.clone(), cotangent.clone()).mul_scalar(2.0);
        let gradients = loss.backward();
        let expected = values(cotangent.mul_scalar(5.0));
        // One rounding a term.
        fewstep_testkit::assert_close(&values(x.grad(&gradients).unwrap()), &expected, 2e-6);
    }
}
