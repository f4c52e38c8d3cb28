//! The UNet: residual blocks and attention on the way to small resolutions, and on the way back the same beside what
//! was there on the way down. Numbers equal diffusers' `UNet2DConditionModel`.

use burn::module::Module;
use burn::tensor::activation::silu;
use burn::tensor::{Device, Tensor};

use super::config::{SIZES, UnetConfig};
use super::stages::{DownBlock, MidBlock, Shared, UpBlock};
use crate::parts::conv::Conv2d;
use crate::parts::linear::Linear;
use crate::parts::norm::GroupNorm;
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
    /// Backward passes compute the inside of each block again instead of keeping it.
    #[module(skip)]
    recomputes_blocks: bool,
}

#[derive(Module, Debug)]
struct TimeEmbedding {
    linear_1: Linear,
    linear_2: Linear,
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

/// Sees a state with its name.
type Observer<'a> = dyn FnMut(&str, Tensor<4>) + 'a;

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
            recomputes_blocks: false,
        }
    }

    /// Whether a backward pass through [`Unet::forward`] keeps what goes into each residual block and each block of a
    /// transformer alone, and computes its inside again (gradient checkpointing).
    pub fn recomputes_blocks_mut(&mut self) -> &mut bool {
        &mut self.recomputes_blocks
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
        // Without a graph there is nothing to keep.
        let recomputes = self.recomputes_blocks && latents.device().is_autodiff();
        let shared = Shared { time: silu(time), text: condition.text, recomputes };
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
            linears.extend(block.linears(&format!("down_blocks.{index}")));
        }
        for (index, block) in self.up_blocks.iter_mut().enumerate() {
            linears.extend(block.linears(&format!("up_blocks.{index}")));
        }
        linears.extend(self.mid_block.linears("mid_block"));
        linears
    }
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
