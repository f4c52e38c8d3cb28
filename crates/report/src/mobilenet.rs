//! The feature layers of MobileNetV2 (arXiv 1801.04381) with batch norm folded in, for inference on the CPU.
//!
//! Maps are channel-last, so that a 1×1 convolution is one matrix product over all pixels of a batch and a depthwise
//! convolution is a sum of nine products of contiguous rows. Leaves out the classifier and every gradient.

use std::collections::BTreeSet;
use std::path::Path;

use half::f16;
use safetensors::{Dtype, SafeTensors};

use crate::ReportError;
use crate::product::times_transposed;

/// (expansion, channels, blocks, stride of the first block) of each stage: table 2 of the paper.
const STAGES: [(usize, usize, usize, usize); 7] = [
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
];
const STEM_CHANNELS: usize = 32;
/// Channels of the last layer.
pub(crate) const FEATURES: usize = 1280;

/// A batch of square channel-last maps.
pub(crate) struct Maps {
    /// `[B, H, W, C]`
    pub(crate) values: Vec<f32>,
    /// Height and width.
    pub(crate) side: usize,
    /// C
    pub(crate) channels: usize,
}

/// The network up to its last convolution.
pub(crate) struct MobileNet {
    stem: Convolution,
    blocks: Vec<Block>,
    head: Convolution,
}

/// An inverted residual: widen, filter each channel, narrow.
struct Block {
    expand: Option<Convolution>,
    depthwise: Convolution,
    project: Convolution,
    stride: usize,
    residual: bool,
}

/// Weights of one convolution, in whichever order its loop reads them.
struct Convolution {
    weight: Vec<f32>,
    bias: Vec<f32>,
}

impl MobileNet {
    /// Builds the network from torchvision's key names.
    pub(crate) fn load(path: &Path, bytes: &[u8]) -> Result<Self, ReportError> {
        let tensors = SafeTensors::deserialize(bytes)
            .map_err(|reason| ReportError::NotSafetensors { path: path.to_owned(), reason })?;
        let mut reader = Reader { path, tensors, used: BTreeSet::new(), missing: Vec::new() };
        let stem = reader.spatial("features.0.0", [STEM_CHANNELS, 3, 3, 3])?;
        let mut blocks = Vec::new();
        let mut inputs = STEM_CHANNELS;
        for (expansion, outputs, count, first_stride) in STAGES {
            for index in 0..count {
                let stride = if index == 0 { first_stride } else { 1 };
                let name = format!("features.{}.conv", blocks.len() + 1);
                blocks.push(Block::load(&mut reader, &name, [inputs, inputs * expansion, outputs], stride)?);
                inputs = outputs;
            }
        }
        let head = reader.pointwise(&format!("features.{}.0", blocks.len() + 1), [FEATURES, inputs])?;
        reader.finish()?;
        Ok(Self { stem, blocks, head })
    }

    /// The last layer's channels averaged over each picture, `[B, FEATURES]`, for `pictures` of three channels.
    pub(crate) fn features(&self, pictures: Maps) -> Vec<f32> {
        let mut maps = relu6(product(&patches(&pictures), &self.stem));
        for block in &self.blocks {
            maps = block.forward(maps);
        }
        let last = relu6(product(&maps, &self.head));
        last.values
            .chunks_exact(last.side * last.side * last.channels)
            .flat_map(|map| average(map, FEATURES))
            .collect()
    }
}

impl Block {
    fn load(
        reader: &mut Reader,
        name: &str,
        channels: [usize; 3],
        stride: usize,
    ) -> Result<Self, ReportError> {
        let [inputs, hidden, outputs] = channels;
        let expands = hidden != inputs;
        let (depthwise, project) = if expands { ("1.0", "2") } else { ("0.0", "1") };
        let expand =
            expands.then(|| reader.pointwise(&format!("{name}.0.0"), [hidden, inputs])).transpose()?;
        Ok(Self {
            expand,
            depthwise: reader.spatial(&format!("{name}.{depthwise}"), [hidden, 1, 3, 3])?,
            project: reader.pointwise(&format!("{name}.{project}"), [outputs, hidden])?,
            stride,
            residual: stride == 1 && inputs == outputs,
        })
    }

    fn forward(&self, input: Maps) -> Maps {
        let widened = self.expand.as_ref().map(|expand| relu6(product(&input, expand)));
        let filtered = relu6(depthwise(widened.as_ref().unwrap_or(&input), &self.depthwise, self.stride));
        let mut output = product(&filtered, &self.project);
        if self.residual {
            output.values.iter_mut().zip(&input.values).for_each(|(value, shortcut)| *value += shortcut);
        }
        output
    }
}

/// A 1×1 convolution.
fn product(input: &Maps, layer: &Convolution) -> Maps {
    let channels = layer.bias.len();
    let mut values = vec![0.0; input.values.len() / input.channels * channels];
    times_transposed(&input.values, &layer.weight, input.channels, &mut values);
    for pixel in values.chunks_exact_mut(channels) {
        pixel.iter_mut().zip(&layer.bias).for_each(|(value, bias)| *value += bias);
    }
    Maps { values, side: input.side, channels }
}

fn relu6(mut maps: Maps) -> Maps {
    maps.values.iter_mut().for_each(|value| *value = value.clamp(0.0, 6.0));
    maps
}

/// The 3×3 surroundings of every second pixel, rows in (y, x, channel) order and zero outside the picture, which makes
/// the first layer (3×3, stride 2, padding 1) a matrix product.
fn patches(input: &Maps) -> Maps {
    let (side, channels) = (input.side.div_ceil(2), 9 * input.channels);
    let mut values =
        vec![0.0; input.values.len() / (input.side * input.side * input.channels) * side * side * channels];
    for (index, patch) in values.chunks_exact_mut(channels).enumerate() {
        let place = Place::of(index, side, 2);
        for (tap, pixel) in place.taps(input) {
            patch[tap * input.channels..][..input.channels].copy_from_slice(pixel);
        }
    }
    Maps { values, side, channels }
}

/// A 3×3 convolution of each channel by itself, padding 1.
fn depthwise(input: &Maps, layer: &Convolution, stride: usize) -> Maps {
    let (side, channels) = (input.side.div_ceil(stride), input.channels);
    let mut values = vec![0.0; input.values.len() / (input.side * input.side) * side * side];
    for (index, output) in values.chunks_exact_mut(channels).enumerate() {
        output.copy_from_slice(&layer.bias);
        for (tap, pixel) in Place::of(index, side, stride).taps(input) {
            let weight = &layer.weight[tap * channels..][..channels];
            output
                .iter_mut()
                .zip(pixel.iter().zip(weight))
                .for_each(|(sum, (value, weight))| *sum += value * weight);
        }
    }
    Maps { values, side, channels }
}

/// Where an output pixel of a 3×3 convolution is centred in its input.
struct Place {
    picture: usize,
    y: usize,
    x: usize,
}

impl Place {
    /// The place of output pixel `index` when outputs have `side`² pixels, `stride` input pixels apart.
    fn of(index: usize, side: usize, stride: usize) -> Self {
        Self { picture: index / (side * side), y: index / side % side * stride, x: index % side * stride }
    }

    /// The taps (0 to 8, row by row) that lie inside the map, each with the channels of its pixel.
    fn taps<'a>(&self, input: &'a Maps) -> impl Iterator<Item = (usize, &'a [f32])> + use<'a> {
        let Self { picture, y, x } = *self;
        let (side, channels) = (input.side, input.channels);
        (0..9).filter_map(move |tap| {
            // The centre is tap (1, 1): coordinates are shifted by one so that the padding needs no sign.
            let (row, column) = (y + tap / 3, x + tap % 3);
            let inside = (1..=side).contains(&row) && (1..=side).contains(&column);
            inside.then(|| {
                let pixel = (picture * side + row - 1) * side + column - 1;
                (tap, &input.values[pixel * channels..][..channels])
            })
        })
    }
}

fn average(map: &[f32], channels: usize) -> Vec<f32> {
    let mut sums = vec![0.0; channels];
    for pixel in map.chunks_exact(channels) {
        sums.iter_mut().zip(pixel).for_each(|(sum, value)| *sum += value);
    }
    let pixels = (map.len() / channels) as f32;
    sums.iter_mut().for_each(|sum| *sum /= pixels);
    sums
}

/// Hands out the tensors of a file and remembers which were asked for, so that nothing is skipped silently.
struct Reader<'a> {
    path: &'a Path,
    tensors: SafeTensors<'a>,
    used: BTreeSet<String>,
    missing: Vec<String>,
}

impl Reader<'_> {
    /// A 1×1 convolution of `[outputs, inputs]`.
    fn pointwise(&mut self, name: &str, [outputs, inputs]: [usize; 2]) -> Result<Convolution, ReportError> {
        self.convolution(name, [outputs, inputs, 1, 1])
    }

    /// A 3×3 convolution of torch's shape `[outputs, inputs, 3, 3]`: depthwise weights become `[9, outputs]`, others
    /// `[outputs, 9 * inputs]`, both with the tap before the input channel.
    fn spatial(&mut self, name: &str, shape: [usize; 4]) -> Result<Convolution, ReportError> {
        let [outputs, inputs, ..] = shape;
        let Convolution { weight, bias } = self.convolution(name, shape)?;
        let at = |output: usize, tap: usize, input: usize| {
            weight.get((output * inputs + input) * 9 + tap).copied()
        };
        let weight = match inputs {
            1 => (0..9).flat_map(|tap| (0..outputs).filter_map(move |output| at(output, tap, 0))).collect(),
            _ => (0..outputs * 9 * inputs)
                .filter_map(|index| at(index / (9 * inputs), index / inputs % 9, index % inputs))
                .collect(),
        };
        Ok(Convolution { weight, bias })
    }

    fn convolution(&mut self, name: &str, shape: [usize; 4]) -> Result<Convolution, ReportError> {
        let weight = self.take(format!("{name}.weight"), &shape)?;
        let bias = self.take(format!("{name}.bias"), &shape[..1])?;
        Ok(Convolution { weight, bias })
    }

    /// A tensor's values; empty when it is missing, which [`Reader::finish`] reports with all others.
    fn take(&mut self, key: String, shape: &[usize]) -> Result<Vec<f32>, ReportError> {
        let Ok(tensor) = self.tensors.tensor(&key) else {
            self.missing.push(key);
            return Ok(Vec::new());
        };
        if tensor.dtype() != Dtype::F16 || tensor.shape() != shape {
            let found = format!("{:?} {:?}", tensor.dtype(), tensor.shape());
            let expected = format!("{:?} {shape:?}", Dtype::F16);
            return Err(ReportError::Tensor { path: self.path.to_owned(), key, found, expected });
        }
        self.used.insert(key);
        let halves = tensor.data().chunks_exact(2);
        Ok(halves.map(|pair| f16::from_le_bytes([pair[0], pair[1]]).to_f32()).collect())
    }

    fn finish(self) -> Result<(), ReportError> {
        let names = self.tensors.names().into_iter().map(String::from);
        let mut unknown: Vec<String> = names.filter(|name| !self.used.contains(name)).collect();
        unknown.sort();
        if self.missing.is_empty() && unknown.is_empty() {
            return Ok(());
        }
        Err(ReportError::Keys { path: self.path.to_owned(), missing: self.missing, unknown })
    }
}

#[cfg(test)]
mod tests {
    use fewstep_testkit::assert_close;

    use super::*;

    /// Deterministic values in [-1, 1).
    fn noise(count: usize, salt: u32) -> Vec<f32> {
        let mut state = salt;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }

    /// A convolution by its definition, channel-first in f64: torch's `[O, I, 3, 3]` weights with padding 1, `groups`
    /// 1 or C; returned channel-last.
    fn by_definition(input: &Maps, torch_weight: &[f32], bias: &[f32], stride: usize) -> Vec<f32> {
        let (side, channels, outputs) = (input.side as i64, input.channels, bias.len());
        let depth = torch_weight.len() / 9 / outputs;
        let at = |b: usize, c: usize, y: i64, x: i64| {
            let inside = (0..side).contains(&y) && (0..side).contains(&x);
            let index = ((b as i64 * side + y) * side + x) * channels as i64 + c as i64;
            if inside { f64::from(input.values[index as usize]) } else { 0.0 }
        };
        let mut expected = Vec::new();
        for b in 0..input.values.len() / (input.side * input.side * channels) {
            for y in (0..side).step_by(stride) {
                for x in (0..side).step_by(stride) {
                    for o in 0..outputs {
                        let mut sum = f64::from(bias[o]);
                        for i in 0..depth {
                            let channel = if depth == 1 { o } else { i };
                            for tap in 0..9 {
                                let weight = torch_weight[(o * depth + i) * 9 + tap];
                                let (dy, dx) = (tap as i64 / 3 - 1, tap as i64 % 3 - 1);
                                sum += f64::from(weight) * at(b, channel, y + dy, x + dx);
                            }
                        }
                        expected.push(sum as f32);
                    }
                }
            }
        }
        expected
    }

    /// The file with one convolution, as [`Reader`] would meet it.
    fn spatial(shape: [usize; 4], torch_weight: &[f32], bias: &[f32]) -> Convolution {
        let halves =
            |values: &[f32]| values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect::<Vec<u8>>();
        let (weight, bias_bytes) = (halves(torch_weight), halves(bias));
        let view = |shape: &[usize], data| {
            safetensors::tensor::TensorView::new(Dtype::F16, shape.to_vec(), data).unwrap()
        };
        let views = [("c.weight", view(&shape, &weight)), ("c.bias", view(&shape[..1], &bias_bytes))];
        let bytes = safetensors::serialize(views, None).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let mut reader =
            Reader { path: Path::new("test"), tensors, used: BTreeSet::new(), missing: Vec::new() };
        reader.spatial("c", shape).unwrap()
    }

    fn in_half(values: Vec<f32>) -> Vec<f32> {
        values.into_iter().map(|value| f16::from_f32(value).to_f32()).collect()
    }

    // The largest of 27 products of unit scale summed in f32 errs by about 1e-6.
    const TOLERANCE: f32 = 5e-6;

    #[test]
    fn depthwise_is_the_definition_at_both_strides_and_at_the_edges() {
        for (side, stride) in [(5, 1), (6, 2), (5, 2)] {
            let input = Maps { values: noise(2 * side * side * 3, 1), side, channels: 3 };
            let (weight, bias) = (in_half(noise(27, 2)), in_half(noise(3, 3)));
            let actual = depthwise(&input, &spatial([3, 1, 3, 3], &weight, &bias), stride);
            assert_eq!(actual.side, side.div_ceil(stride));
            assert_close(&actual.values, &by_definition(&input, &weight, &bias, stride), TOLERANCE);
        }
    }

    #[test]
    fn the_stem_is_a_strided_convolution() {
        let input = Maps { values: noise(2 * 36 * 3, 4), side: 6, channels: 3 };
        let (weight, bias) = (in_half(noise(4 * 27, 5)), in_half(noise(4, 6)));
        let actual = product(&patches(&input), &spatial([4, 3, 3, 3], &weight, &bias));
        assert_close(&actual.values, &by_definition(&input, &weight, &bias, 2), TOLERANCE);
    }

    #[test]
    fn a_pointwise_product_mixes_channels_and_adds_the_bias() {
        let input = Maps { values: vec![1., 2., 3., -4.], side: 1, channels: 2 };
        let layer = Convolution { weight: vec![1., 10., 0., -1., 2., 0.], bias: vec![0.5, 0., -1.] };
        assert_eq!(product(&input, &layer).values, [21.5, -2., 1., -36.5, 4., 5.]);
    }

    #[test]
    fn residual_blocks_add_their_input_and_clip_only_inside() {
        let one = |bias: f32, weight: f32| Convolution { weight: vec![weight], bias: vec![bias] };
        let depthwise = Convolution { weight: vec![0., 0., 0., 0., 1., 0., 0., 0., 0.], bias: vec![0.] };
        let block =
            Block { expand: Some(one(0., 4.)), depthwise, project: one(-7., 0.5), stride: 1, residual: true };
        let output = block.forward(Maps { values: vec![1., 2., -3., 0.5], side: 2, channels: 1 });
        // min(max(4x, 0), 6) / 2 - 7 + x
        assert_eq!(output.values, [-4., -2., -10., -5.5]);
    }

    #[test]
    fn missing_and_unknown_keys_are_listed() {
        let bytes = safetensors::serialize(
            [("other", safetensors::tensor::TensorView::new(Dtype::F16, vec![1], &[0, 0]).unwrap())],
            None,
        )
        .unwrap();
        let Err(ReportError::Keys { missing, unknown, .. }) = MobileNet::load(Path::new("x"), &bytes) else {
            panic!("a foreign file was accepted")
        };
        assert_eq!(unknown, ["other"]);
        assert_eq!(missing.len(), 104);
        assert_eq!(missing[2], "features.1.conv.0.0.weight");
    }
}
