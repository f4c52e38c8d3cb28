//! The same operations written with burn's own, for every device that the fused ones do not run on, and as the
//! reference of their tests.

use std::ops::Range;

use burn::tensor::activation::{sigmoid, silu, softmax};
use burn::tensor::ops::ConvOptions;
use burn::tensor::{Bool, DType, Device, Int, Tensor, TensorData};

use crate::activation::{SIGMOID_SLOPE, TANH_CUBIC, TANH_SCALE};
use crate::adamw::Factors;
use crate::channel_norm::SMALLEST_LENGTH;
use crate::{
    AdamW, AdamWStep, After, AttentionOptions, ConvShape, Gate, Gelu, GroupNorm, HalfType, KeyMask, LowRank,
    Modulation, Moments, Projection, QkvStream, RotaryTable,
};

/// See [`crate::linear`].
pub fn linear<const D: usize>(x: Tensor<D>, projection: Projection) -> Tensor<D> {
    let mut shape = x.dims();
    let input = shape[D - 1];
    let rows = shape[..D - 1].iter().product();
    let Projection { weight, bias, low_rank, rounded_to } = projection;
    let weight = widened(weight, rounded_to);
    shape[D - 1] = weight.dims()[0];
    let x: Tensor<2> = x.reshape([rows, input]);
    let mut output = x.clone().matmul(weight.transpose());
    if let Some(bias) = bias {
        output = output + bias.unsqueeze();
    }
    if let Some(LowRank { down, up, scale }) = low_rank {
        output = output + x.matmul(down.transpose()).matmul(up.transpose()).mul_scalar(scale);
    }
    output.reshape(shape)
}

/// A weight as f32.
fn widened(weight: Tensor<2>, rounded_to: Option<HalfType>) -> Tensor<2> {
    match rounded_to {
        Some(half) => half.nearest(weight),
        None if weight.dtype() == DType::F32 => weight,
        None => weight.cast(DType::F32),
    }
}

/// See [`crate::linear_concat`].
pub fn linear_concat<const D: usize>(x: Tensor<D>, projections: [Projection; 3]) -> Tensor<D> {
    Tensor::cat(projections.map(|projection| linear(x.clone(), projection)).to_vec(), D - 1)
}

/// See [`crate::norm_modulate`].
pub fn norm_modulate(x: Tensor<3>, modulation: Tensor<2>, at: Modulation, epsilon: f32) -> Tensor<3> {
    let [_, _, width] = x.dims();
    let (shift, scale) = (chunk(&modulation, at.shift, width), chunk(&modulation, at.scale, width));
    let centred = x.clone() - x.mean_dim(2);
    let variance = centred.clone().powf_scalar(2.0).mean_dim(2);
    centred / variance.add_scalar(epsilon).sqrt() * scale.add_scalar(1.0) + shift
}

/// See [`crate::gated_residual`].
pub fn gated_residual(x: Tensor<3>, update: Tensor<3>, modulation: Tensor<2>, gate: usize) -> Tensor<3> {
    let [_, _, width] = x.dims();
    x + update * chunk(&modulation, gate, width)
}

/// One chunk of a modulation, `[B, 1, width]`.
fn chunk(modulation: &Tensor<2>, index: usize, width: usize) -> Tensor<3> {
    let [batch, _] = modulation.dims();
    modulation.clone().slice([0..batch, index * width..(index + 1) * width]).unsqueeze_dim(1)
}

/// See [`crate::gelu`].
pub fn gelu<const D: usize>(x: Tensor<D>, kind: Gelu) -> Tensor<D> {
    match kind {
        Gelu::Exact => burn::tensor::activation::gelu(x),
        Gelu::Tanh => {
            let cubic = (x.clone() * x.clone()).mul_scalar(TANH_CUBIC).add_scalar(1.0);
            let inner = x.clone().mul_scalar(TANH_SCALE) * cubic;
            x.mul_scalar(0.5) * inner.tanh().add_scalar(1.0)
        }
        Gelu::Sigmoid => x.clone() * sigmoid(x.mul_scalar(SIGMOID_SLOPE)),
    }
}

/// See [`crate::glu`].
pub fn glu<const D: usize>(value: Tensor<D>, gate: Tensor<D>, kind: Gate) -> Tensor<D> {
    value
        * match kind {
            Gate::Silu => silu(gate),
            Gate::Gelu(kind) => gelu(gate, kind),
        }
}

/// See [`crate::glu_halves`].
pub fn glu_halves<const D: usize>(x: Tensor<D>, kind: Gate) -> Tensor<D> {
    let half = x.dims()[D - 1] / 2;
    let [value, gate] = [0, half].map(|start| x.clone().narrow(D - 1, start, half));
    glu(value, gate, kind)
}

/// See [`crate::rms_norm`].
pub fn rms_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, epsilon: f32) -> Tensor<D> {
    let mean = (x.clone() * x.clone()).mean_dim(D - 1);
    x / mean.add_scalar(epsilon).sqrt() * weight.unsqueeze()
}

/// See [`crate::joint_qkv`].
pub fn joint_qkv(
    text: QkvStream,
    image: QkvStream,
    heads: usize,
    rotary: &RotaryTable,
    epsilon: f32,
) -> Tensor<5> {
    let device = image.qkv.device();
    let [text, image] = [text, image].map(|stream| split_heads(stream, heads, epsilon));
    rotated(join(text, image), rotary, &device)
}

/// Rotates query and key `[B, K, T, E]`.
fn rotated([query, key, value]: [Tensor<4>; 3], rotary: &RotaryTable, device: &Device) -> Tensor<5> {
    let [_, _, tokens, dim] = query.dims();
    let [cos, sin] =
        rotary.on(device).map(|table| table.narrow(0, 0, tokens).reshape([1, 1, tokens, dim / 2, 1]));
    let [query, key] = [query, key].map(|x| rotate(x, cos.clone(), sin.clone()));
    Tensor::stack(vec![query, key, value], 0)
}

/// See [`crate::single_qkv`].
pub fn single_qkv(stream: QkvStream, heads: usize, rotary: &RotaryTable, epsilon: f32) -> Tensor<5> {
    let device = stream.qkv.device();
    rotated(split_heads(stream, heads, epsilon), rotary, &device)
}

/// Query, key and value as `[B, K, T, E]`, query and key normalised.
fn split_heads(stream: QkvStream, heads: usize, epsilon: f32) -> [Tensor<4>; 3] {
    let [batch, tokens, width] = stream.qkv.dims();
    let dim = width / 3 / heads;
    let part = |index: usize| -> Tensor<3> {
        let columns = index * heads * dim..(index + 1) * heads * dim;
        stream.qkv.clone().slice([0..batch, 0..tokens, columns])
    };
    let by_heads = |part: Tensor<3>| part.reshape([batch, tokens, heads, dim]).swap_dims(1, 2);
    let normalised = |index: usize, norm: &Tensor<1>| match norm.dims() == [dim] {
        true => rms_norm(by_heads(part(index)), norm.clone(), epsilon),
        false => by_heads(rms_norm(part(index), norm.clone(), epsilon)),
    };
    [normalised(0, &stream.norm_q), normalised(1, &stream.norm_k), by_heads(part(2))]
}

fn join(text: [Tensor<4>; 3], image: [Tensor<4>; 3]) -> [Tensor<4>; 3] {
    let [text_q, text_k, text_v] = text;
    let [image_q, image_k, image_v] = image;
    [[text_q, image_q], [text_k, image_k], [text_v, image_v]].map(|streams| Tensor::cat(streams.to_vec(), 2))
}

fn rotate(x: Tensor<4>, cos: Tensor<5>, sin: Tensor<5>) -> Tensor<4> {
    let [batch, heads, tokens, dim] = x.dims();
    let pairs: Tensor<5> = x.reshape([batch, heads, tokens, dim / 2, 2]);
    let [real, imaginary] = [0, 1].map(|index| pairs.clone().narrow(4, index, 1));
    let rotated =
        vec![real.clone() * cos.clone() - imaginary.clone() * sin.clone(), real * sin + imaginary * cos];
    Tensor::cat(rotated, 4).reshape([batch, heads, tokens, dim])
}

/// See [`crate::attention`].
pub fn attention(qkv: Tensor<5>, options: AttentionOptions) -> Tensor<3> {
    let [_, batch, heads, tokens, dim] = qkv.dims();
    let device = qkv.device();
    let [query, key, value] = [0, 1, 2].map(|part| qkv.clone().narrow(0, part, 1).squeeze_dim::<4>(0));
    let scores = query.matmul(key.swap_dims(2, 3)).div_scalar((dim as f32).sqrt());
    let weights = match hidden_keys(&options, batch, tokens, &device) {
        None => softmax(scores, 3),
        Some(hidden) => {
            let hidden = hidden.expand([batch, heads, tokens, tokens]);
            // Finite, so that a row without visible keys is no NaN before it becomes zero.
            softmax(scores.mask_fill(hidden.clone(), -1e30), 3).mask_fill(hidden, 0.0)
        }
    };
    weights.matmul(value).swap_dims(1, 2).reshape([batch, tokens, heads * dim])
}

/// See [`crate::cross_attention`].
pub fn cross_attention(query: Tensor<3>, key: Tensor<3>, value: Tensor<3>, heads: usize) -> Tensor<3> {
    let [batch, queries, width] = query.dims();
    let dim = width / heads;
    let by_heads = |x: Tensor<3>| -> Tensor<4> {
        let [batch, tokens, _] = x.dims();
        x.reshape([batch, tokens, heads, dim]).swap_dims(1, 2)
    };
    let scores = by_heads(query).matmul(by_heads(key).swap_dims(2, 3)).div_scalar((dim as f32).sqrt());
    softmax(scores, 3).matmul(by_heads(value)).swap_dims(1, 2).reshape([batch, queries, width])
}

/// `[B, 1, T, T]`, or `[B, 1, 1, T]` where all queries see the same keys: true where a query must not look; nothing if it
/// may look everywhere.
fn hidden_keys(
    options: &AttentionOptions,
    batch: usize,
    tokens: usize,
    device: &Device,
) -> Option<Tensor<4, Bool>> {
    let padding = options.keys.as_ref().map(|keys| padding(keys, batch, tokens));
    if padding.is_none() && !options.causal {
        return None;
    }
    let queries = if options.causal { tokens } else { 1 };
    let mut hidden = vec![0_i32; batch * queries * tokens];
    for (index, hidden) in hidden.iter_mut().enumerate() {
        let (sample, query, key) = (index / tokens / queries, index / tokens % queries, index % tokens);
        let padded = padding.as_ref().is_some_and(|padding| padding[sample * tokens + key]);
        *hidden = i32::from(padded || (options.causal && key > query));
    }
    let hidden = Tensor::<4, Int>::from_data(TensorData::new(hidden, [batch, 1, queries, tokens]), device);
    Some(hidden.equal_elem(1))
}

fn padding(keys: &KeyMask, batch: usize, tokens: usize) -> Vec<bool> {
    (0..batch).flat_map(|sample| (0..tokens).map(move |key| keys.hidden(sample).contains(&key))).collect()
}

/// See [`crate::conv2d`].
pub fn conv2d(x: Tensor<4>, weight: Tensor<4>, bias: Option<Tensor<1>>, shape: ConvShape) -> Tensor<4> {
    let ConvShape { stride, before, after } = shape;
    let options =
        ConvOptions { padding: [(before, after); 2], ..ConvOptions::new([stride; 2], [0; 2], [1; 2], 1) };
    burn::tensor::module::conv2d(x, weight, bias, options)
}

/// See [`crate::channel_norm`].
pub fn channel_norm(x: Tensor<4>, gamma: Tensor<1>, after: After) -> Tensor<4> {
    let [_, channels, _, _] = x.dims();
    // Clamped under the root, so that the gradient of zero is finite.
    let length = x.clone().square().sum_dim(1).clamp_min(SMALLEST_LENGTH * SMALLEST_LENGTH).sqrt();
    let scale = gamma.reshape([1, channels, 1, 1]).mul_scalar((channels as f32).sqrt());
    followed(x / length * scale, after)
}

/// See [`crate::group_norm`].
pub fn group_norm(x: Tensor<4>, weight: Tensor<1>, bias: Tensor<1>, norm: GroupNorm) -> Tensor<4> {
    let [batch, channels, height, width] = x.dims();
    let grouped: Tensor<3> = x.reshape([batch, norm.groups, channels / norm.groups * height * width]);
    let centred = grouped.clone() - grouped.mean_dim(2);
    let variance = centred.clone().square().mean_dim(2);
    let normed = centred / variance.add_scalar(norm.epsilon).sqrt();
    let [weight, bias] = [weight, bias].map(|parameter| parameter.reshape([1, channels, 1, 1]));
    followed(normed.reshape([batch, channels, height, width]) * weight + bias, norm.after)
}

/// The activation after a norm.
fn followed(x: Tensor<4>, after: After) -> Tensor<4> {
    match after {
        After::Nothing => x,
        After::Silu => silu(x),
    }
}

/// See [`crate::split_tokens`].
pub fn split_tokens(x: Tensor<3>, range: Range<usize>) -> Tensor<3> {
    x.narrow(1, range.start, range.len())
}

/// See [`crate::inject`].
pub fn inject<const D: usize>(output: Tensor<D>, cotangent: Tensor<D>) -> Tensor<1> {
    let product = (output * cotangent.detach()).sum();
    product.clone() - product.detach()
}

/// See [`crate::AdamW::step`].
pub fn adamw_step<const D: usize>(
    options: &AdamW,
    parameter: Tensor<D>,
    gradient: Tensor<D>,
    moments: &mut Moments,
    at: AdamWStep,
) -> Tensor<D> {
    let factors = Factors::new(options, at);
    let shape = parameter.dims();
    let before = std::mem::replace(moments, Moments::zeros(0)).into_tensors(&parameter.device());
    let [first, second] = before.map(|moment| moment.reshape(shape));
    let gradient = gradient.mul_scalar(factors.gradient_scale);
    let first = first.clone() + (gradient.clone() - first).mul_scalar(factors.first_weight);
    let second = second.mul_scalar(factors.second_keep)
        + (gradient.clone() * gradient).mul_scalar(factors.second_weight);
    let root = second.clone().sqrt().div_scalar(factors.root_correction).add_scalar(factors.epsilon);
    let parameter =
        parameter.mul_scalar(factors.decay) - (first.clone() / root).mul_scalar(factors.step_size);
    *moments = Moments::Device(Box::new([first, second].map(|moment| moment.flatten(0, D - 1))));
    parameter
}

/// The squared norm of one tensor: see [`crate::SquaredNorm`].
///
/// # Shapes
/// - returns: `[1]`
pub fn squared_norm<const D: usize>(x: Tensor<D>) -> Tensor<1> {
    x.square().sum()
}

pub(crate) fn download<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_to_vec().expect("fused operations and their twins take f32 tensors")
}
