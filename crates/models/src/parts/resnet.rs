//! The residual block of convolutions (diffusers' `ResnetBlock2D`).

use burn::module::Module;
use burn::tensor::{Device, Tensor};

use super::conv::Conv2d;
use super::linear::Linear;
use super::norm::GroupNorm;

/// What a residual block's group norms have in common in a network.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Groups {
    pub(crate) groups: usize,
    pub(crate) epsilon: f32,
}

/// Two convolutions beside a shortcut.
#[derive(Module, Debug)]
pub(crate) struct ResnetBlock {
    norm1: GroupNorm,
    conv1: Conv2d,
    /// Where the network is told a time.
    pub(crate) time_emb_proj: Option<Linear>,
    norm2: GroupNorm,
    conv2: Conv2d,
    /// Where the number of channels changes.
    conv_shortcut: Option<Conv2d>,
}

impl ResnetBlock {
    /// `time` is the width of the time embedding.
    pub(crate) fn unfilled(
        [input, output]: [usize; 2],
        time: Option<usize>,
        norm: Groups,
        device: &Device,
    ) -> Self {
        let group_norm = |channels| GroupNorm::unfilled(norm.groups, channels, norm.epsilon, device);
        Self {
            norm1: group_norm(input),
            conv1: Conv2d::unfilled(input, output, 3, device),
            time_emb_proj: time.map(|width| Linear::unfilled(width, output, true, device)),
            norm2: group_norm(output),
            conv2: Conv2d::unfilled(output, output, 3, device),
            conv_shortcut: (input != output).then(|| Conv2d::unfilled(input, output, 1, device)),
        }
    }

    /// # Shapes
    /// - `x`: `[B, in, H, W]`; output `[B, out, H, W]`
    /// - `time`: SiLU of the time embedding, `[B, width]`
    ///
    /// # Panics
    /// If the block has a projection of the time and is given none.
    pub(crate) fn forward(&self, x: Tensor<4>, time: Option<&Tensor<2>>) -> Tensor<4> {
        let mut hidden = self.conv1.forward(self.norm1.forward_silu(x.clone()));
        if let Some(projection) = &self.time_emb_proj {
            let time = time.expect("a block with a projection of the time is told it");
            hidden = hidden + projection.forward(time.clone()).unsqueeze_dims(&[2, 3]);
        }
        let hidden = self.conv2.forward(self.norm2.forward_silu(hidden));
        match &self.conv_shortcut {
            Some(shortcut) => hidden + shortcut.forward(x),
            None => hidden + x,
        }
    }
}
