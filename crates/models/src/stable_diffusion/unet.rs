//! The UNet: residual blocks and attention on the way to small resolutions, and on the way back the same beside what
//! was there on the way down. Numbers equal diffusers' `UNet2DConditionModel`.

use burn::module::Module;
use burn::tensor::activation::silu;
use burn::tensor::{Device, Tensor};

use super::config::{SIZES, UnetConfig};
use super::spatial_transformer::SpatialTransformer;
use crate::parts::conv::{Conv2d, Padding, Resample};
use crate::parts::linear::Linear;
use crate::parts::norm::GroupNorm;
use crate::parts::resnet::{Groups, ResnetBlock};
use crate::parts::timestep::sinusoidal;
use crate::weights::{KeyMap, load};
use crate::{ModelError, ModelSource, WeightType};

pub(crate) const KEYS: KeyMap = KeyMap {
    rules: &[(".to_out.", ".to_out.0."), (".ff.up.", ".ff.net.0.proj."), (".ff.down.", ".ff.net.2.")],
    ..KeyMap::PLAIN
};

/// Parameters that start at zero when trained from scratch: the ends of all residuals, so that each begins as the identity.
pub(super) const ZERO_AT_START: &[&str] = &["conv2", "proj_out", "conv_out"];

/// The denoiser over latents.
#[derive(Module, Debug)]
pub struct Unet {
    conv_in: Conv2d,
    time_embedding: TimeEmbedding,
    /// Of the pooled text and the sizes, in models that are told them.
    add_embedding: Option<TimeEmbedding>,
    down_blocks: Vec<DownBlock>,
    mid_block: MidBlock,
    up_blocks: Vec<UpBlock>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
    #[module(skip)]
    config: UnetConfig,
}

#[derive(Module, Debug)]
struct TimeEmbedding {
    linear_1: Linear,
    linear_2: Linear,
}

#[derive(Module, Debug)]
struct DownBlock {
    resnets: Vec<ResnetBlock>,
    /// One after each residual block, or none.
    attentions: Vec<SpatialTransformer>,
    /// One, but in the last block.
    downsamplers: Vec<Resample>,
}

#[derive(Module, Debug)]
struct MidBlock {
    resnets: Vec<ResnetBlock>,
    attentions: Vec<SpatialTransformer>,
}

#[derive(Module, Debug)]
struct UpBlock {
    resnets: Vec<ResnetBlock>,
    /// One after each residual block, or none.
    attentions: Vec<SpatialTransformer>,
    /// One, but in the last block.
    upsamplers: Vec<Resample>,
}

/// What the UNet is told of a batch beside latents and time.
#[derive(Clone, Debug)]
pub struct UnetCondition {
    /// `[B, S, J]`, states of the text.
    pub text: Tensor<3>,
    /// In models that are told more.
    pub added: Option<AddedCondition>,
}

/// What SDXL is told beside the text's states.
#[derive(Clone, Debug)]
pub struct AddedCondition {
    /// `[B, P]`, the pooled state of the text.
    pub pooled: Tensor<2>,
    /// `[B, 6]`, in pixels: original height and width, top and left of the crop, height and width.
    pub sizes: Tensor<2>,
}

/// What every block of one evaluation shares.
struct Shared {
    /// SiLU of the time embedding, `[B, 4 · width]`.
    time: Tensor<2>,
    text: Tensor<3>,
}

/// Sees a state with its name.
type Observer<'a> = dyn FnMut(&str, Tensor<4>) + 'a;

impl UnetConfig {
    fn groups(&self) -> Groups {
        Groups { groups: self.norm_num_groups, epsilon: self.norm_eps }
    }

    fn resnet(&self, ends: [usize; 2], device: &Device) -> ResnetBlock {
        ResnetBlock::unfilled(ends, Some(self.time_width()), self.groups(), device)
    }

    fn attentions(
        &self,
        wanted: bool,
        count: usize,
        stage: usize,
        device: &Device,
    ) -> Vec<SpatialTransformer> {
        let count = if wanted { count } else { 0 };
        (0..count).map(|_| SpatialTransformer::unfilled(self, stage, device)).collect()
    }
}

impl Unet {
    /// Loads the component `unet` of a model on the plain side of `device`, in a number type.
    ///
    /// # Errors
    /// If its config or weights are missing, damaged or do not fit each other.
    pub fn from_pretrained(
        source: &ModelSource,
        dtype: WeightType,
        device: &Device,
    ) -> Result<Self, ModelError> {
        let empty = Self::unfilled(UnetConfig::read(source)?, device);
        load(empty, &source.weights("unet")?, &KEYS, dtype)
    }

    pub(crate) fn unfilled(config: UnetConfig, device: &Device) -> Self {
        let stages = config.stages();
        let (first, width) = (config.block_out_channels[0], config.time_width());
        Self {
            conv_in: Conv2d::unfilled(config.in_channels, first, 3, device),
            time_embedding: TimeEmbedding::unfilled(first, width, device),
            add_embedding: config.added().map(|[_, input]| TimeEmbedding::unfilled(input, width, device)),
            down_blocks: (0..stages).map(|stage| DownBlock::unfilled(&config, stage, device)).collect(),
            mid_block: MidBlock::unfilled(&config, device),
            up_blocks: (0..stages).rev().map(|stage| UpBlock::unfilled(&config, stage, device)).collect(),
            conv_norm_out: GroupNorm::unfilled(config.norm_num_groups, first, config.norm_eps, device),
            conv_out: Conv2d::unfilled(first, config.out_channels, 3, device),
            config,
        }
    }

    /// The config it was made with.
    pub(crate) fn config(&self) -> &UnetConfig {
        &self.config
    }

    /// The prediction at noisy latents.
    ///
    /// # Shapes
    /// - `latents` and output: `[B, C, H, W]`, of any size
    /// - `timestep`: `[B]`, from 0 to the last training timestep
    pub fn forward(&self, latents: Tensor<4>, timestep: Tensor<1>, condition: UnetCondition) -> Tensor<4> {
        self.run(latents, timestep, condition, &mut |_, _| ())
    }

    /// The states that [`Unet::forward`] passes through, by name: where two implementations part. Names are `conv_in`,
    /// `down<i>`, `mid`, `up<i>`; `time_embedding` and `add_embedding` are `[B, width, 1, 1]`.
    pub fn states(
        &self,
        latents: Tensor<4>,
        timestep: Tensor<1>,
        condition: UnetCondition,
    ) -> Vec<(String, Tensor<4>)> {
        let mut states = Vec::new();
        self.run(latents, timestep, condition, &mut |name, state| states.push((name.to_owned(), state)));
        states
    }

    fn run(
        &self,
        latents: Tensor<4>,
        timestep: Tensor<1>,
        condition: UnetCondition,
        observe: &mut Observer,
    ) -> Tensor<4> {
        let time = self.embed(timestep, condition.added, observe);
        let shared = Shared { time: silu(time), text: condition.text };
        let mut x = self.conv_in.forward(latents);
        observe("conv_in", x.clone());
        let mut skipped = vec![x.clone()];
        for (index, block) in self.down_blocks.iter().enumerate() {
            x = block.forward(x, &shared, &mut skipped);
            observe(&format!("down{index}"), x.clone());
        }
        x = self.mid_block.forward(x, &shared);
        observe("mid", x.clone());
        for (index, block) in self.up_blocks.iter().enumerate() {
            x = block.forward(x, &shared, &mut skipped);
            observe(&format!("up{index}"), x.clone());
        }
        self.conv_out.forward(self.conv_norm_out.forward_silu(x))
    }

    /// `[B]` to `[B, width]`.
    fn embed(&self, timestep: Tensor<1>, added: Option<AddedCondition>, observe: &mut Observer) -> Tensor<2> {
        let features = sinusoidal(timestep, self.config.block_out_channels[0], 1.0);
        let time = self.time_embedding.forward(features);
        observe("time_embedding", time.clone().unsqueeze_dims(&[2, 3]));
        let (Some(embedding), Some([width, _])) = (&self.add_embedding, self.config.added()) else {
            return time;
        };
        let AddedCondition { pooled, sizes } = added.expect("a model that is told sizes is given them");
        let [batch, _] = sizes.dims();
        let sizes = sinusoidal(sizes.reshape([batch * SIZES]), width, 1.0).reshape([batch, SIZES * width]);
        let added = embedding.forward(Tensor::cat(vec![pooled, sizes], 1));
        observe("add_embedding", added.clone().unsqueeze_dims(&[2, 3]));
        time + added
    }

    /// Every linear projection with its module name, for adapters, in the order of the peers' modules: fresh adapters
    /// are drawn in it.
    pub(crate) fn linears(&mut self) -> Vec<(String, &mut Linear)> {
        let mut linears = self.time_embedding.linears("time_embedding");
        if let Some(embedding) = &mut self.add_embedding {
            linears.extend(embedding.linears("add_embedding"));
        }
        for (index, block) in self.down_blocks.iter_mut().enumerate() {
            linears.extend(named(&format!("down_blocks.{index}"), &mut block.attentions, &mut block.resnets));
        }
        for (index, block) in self.up_blocks.iter_mut().enumerate() {
            linears.extend(named(&format!("up_blocks.{index}"), &mut block.attentions, &mut block.resnets));
        }
        linears.extend(named("mid_block", &mut self.mid_block.attentions, &mut self.mid_block.resnets));
        linears
    }
}

/// The linear projections of a block.
fn named<'a>(
    block: &str,
    attentions: &'a mut [SpatialTransformer],
    resnets: &'a mut [ResnetBlock],
) -> Vec<(String, &'a mut Linear)> {
    let mut linears = Vec::new();
    for (index, attention) in attentions.iter_mut().enumerate() {
        let inside = attention.linears().into_iter();
        linears.extend(inside.map(|(name, linear)| (format!("{block}.attentions.{index}.{name}"), linear)));
    }
    for (index, resnet) in resnets.iter_mut().enumerate() {
        let time = resnet.time_emb_proj.iter_mut();
        linears.extend(time.map(|linear| (format!("{block}.resnets.{index}.time_emb_proj"), linear)));
    }
    linears
}

impl TimeEmbedding {
    fn unfilled(input: usize, width: usize, device: &Device) -> Self {
        let linear = |input| Linear::unfilled(input, width, true, device);
        Self { linear_1: linear(input), linear_2: linear(width) }
    }

    fn forward(&self, features: Tensor<2>) -> Tensor<2> {
        self.linear_2.forward(silu(self.linear_1.forward(features)))
    }

    fn linears(&mut self, name: &str) -> Vec<(String, &mut Linear)> {
        vec![
            (format!("{name}.linear_1"), &mut self.linear_1),
            (format!("{name}.linear_2"), &mut self.linear_2),
        ]
    }
}

impl DownBlock {
    fn unfilled(config: &UnetConfig, stage: usize, device: &Device) -> Self {
        let channels = &config.block_out_channels;
        let (count, output) = (config.layers_per_block, channels[stage]);
        let input = |index| if index == 0 { channels[stage.saturating_sub(1)] } else { output };
        let last = stage + 1 == config.stages();
        Self {
            resnets: (0..count).map(|index| config.resnet([input(index), output], device)).collect(),
            attentions: config.attentions(config.attends_down(stage), count, stage, device),
            downsamplers: (!last).then(|| Resample::unfilled(output, device)).into_iter().collect(),
        }
    }

    /// Appends every state that the way up meets again.
    fn forward(&self, mut x: Tensor<4>, shared: &Shared, skipped: &mut Vec<Tensor<4>>) -> Tensor<4> {
        for (index, resnet) in self.resnets.iter().enumerate() {
            x = resnet.forward(x, Some(&shared.time));
            x = attend(&self.attentions, index, x, shared);
            skipped.push(x.clone());
        }
        for downsampler in &self.downsamplers {
            x = downsampler.conv.halve(x, Padding::Around);
            skipped.push(x.clone());
        }
        x
    }
}

impl MidBlock {
    fn unfilled(config: &UnetConfig, device: &Device) -> Self {
        let last = config.stages() - 1;
        let resnet = || config.resnet([config.block_out_channels[last]; 2], device);
        Self { resnets: vec![resnet(), resnet()], attentions: config.attentions(true, 1, last, device) }
    }

    fn forward(&self, x: Tensor<4>, shared: &Shared) -> Tensor<4> {
        let x = attend(&self.attentions, 0, self.resnets[0].forward(x, Some(&shared.time)), shared);
        self.resnets[1].forward(x, Some(&shared.time))
    }
}

impl UpBlock {
    fn unfilled(config: &UnetConfig, stage: usize, device: &Device) -> Self {
        let channels = &config.block_out_channels;
        let (last, count, output) = (config.stages() - 1, config.layers_per_block + 1, channels[stage]);
        let before = channels[(stage + 1).min(last)];
        let below = channels[stage.saturating_sub(1)];
        let ends = |index| {
            let input = if index == 0 { before } else { output };
            let skipped = if index + 1 == count { below } else { output };
            [input + skipped, output]
        };
        Self {
            resnets: (0..count).map(|index| config.resnet(ends(index), device)).collect(),
            attentions: config.attentions(config.attends_up(stage), count, stage, device),
            upsamplers: (stage > 0).then(|| Resample::unfilled(output, device)).into_iter().collect(),
        }
    }

    /// Takes its states of the way down off the end.
    fn forward(&self, mut x: Tensor<4>, shared: &Shared, skipped: &mut Vec<Tensor<4>>) -> Tensor<4> {
        for (index, resnet) in self.resnets.iter().enumerate() {
            let beside = skipped.pop().expect("as many states as the way down has left");
            x = resnet.forward(Tensor::cat(vec![x, beside], 1), Some(&shared.time));
            x = attend(&self.attentions, index, x, shared);
        }
        for upsampler in &self.upsamplers {
            // Halving odd sides has rounded up.
            let [_, _, height, width] = skipped.last().expect("states of the next block").dims();
            x = upsampler.conv.enlarge(x, [height, width]);
        }
        x
    }
}

/// The attention after a block's residual block, where there is one.
fn attend(attentions: &[SpatialTransformer], index: usize, x: Tensor<4>, shared: &Shared) -> Tensor<4> {
    match attentions.get(index) {
        Some(attention) => attention.forward(x, &shared.text),
        None => x,
    }
}
