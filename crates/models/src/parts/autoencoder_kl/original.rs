//! The layout of latent diffusion's own code, in which FLUX.1's authors published their autoencoder (`ae.safetensors`): the
//! decoder's stages are counted from full resolution on, and the attention's projections are 1×1 convolutions.

use crate::weights::Made::{Matrix, Renamed};
use crate::weights::{Rule, WeightFiles};

pub(super) const LAYOUT: &[Rule] = &[
    ("encoder.norm_out", Renamed("encoder.conv_norm_out")),
    ("decoder.norm_out", Renamed("decoder.conv_norm_out")),
    ("encoder.down.*.block.*.nin_shortcut", Renamed("encoder.down_blocks.*.resnets.*.conv_shortcut")),
    ("encoder.down.*.block.*", Renamed("encoder.down_blocks.*.resnets.*")),
    ("encoder.down.*.downsample", Renamed("encoder.down_blocks.*.downsamplers.0")),
    ("decoder.up.*.block.*.nin_shortcut", Renamed("decoder.up_blocks.^.resnets.*.conv_shortcut")),
    ("decoder.up.*.block.*", Renamed("decoder.up_blocks.^.resnets.*")),
    ("decoder.up.*.upsample", Renamed("decoder.up_blocks.^.upsamplers.0")),
    ("encoder.mid.block_1", Renamed("encoder.mid_block.resnets.0")),
    ("encoder.mid.block_2", Renamed("encoder.mid_block.resnets.1")),
    ("decoder.mid.block_1", Renamed("decoder.mid_block.resnets.0")),
    ("decoder.mid.block_2", Renamed("decoder.mid_block.resnets.1")),
    ("encoder.mid.attn_1.norm", Renamed("encoder.mid_block.attentions.0.group_norm")),
    ("encoder.mid.attn_1.q", Matrix("encoder.mid_block.attentions.0.to_q")),
    ("encoder.mid.attn_1.k", Matrix("encoder.mid_block.attentions.0.to_k")),
    ("encoder.mid.attn_1.v", Matrix("encoder.mid_block.attentions.0.to_v")),
    ("encoder.mid.attn_1.proj_out", Matrix("encoder.mid_block.attentions.0.to_out.0")),
    ("decoder.mid.attn_1.norm", Renamed("decoder.mid_block.attentions.0.group_norm")),
    ("decoder.mid.attn_1.q", Matrix("decoder.mid_block.attentions.0.to_q")),
    ("decoder.mid.attn_1.k", Matrix("decoder.mid_block.attentions.0.to_k")),
    ("decoder.mid.attn_1.v", Matrix("decoder.mid_block.attentions.0.to_v")),
    ("decoder.mid.attn_1.proj_out", Matrix("decoder.mid_block.attentions.0.to_out.0")),
];

/// Whether weight files are in this layout.
pub(super) fn is_original(files: &WeightFiles) -> bool {
    ["encoder.conv_in.weight", "encoder.down.0.block.0.norm1.weight", "decoder.up.0.block.0.norm1.weight"]
        .iter()
        .all(|key| files.contains(key))
}
