//! FLUX.1's transformer in the layout of its authors (`flux1-dev.safetensors`), which DiffSynth-Studio's scripts name: the
//! projections to query, key and value are one there, and the halves of the last modulation are the other way round.

use crate::weights::Made::{Renamed, Rows};
use crate::weights::{Rule, WeightFiles};

pub(super) const LAYOUT: &[Rule] = &[
    ("img_in", Renamed("x_embedder")),
    ("txt_in", Renamed("context_embedder")),
    ("time_in.in_layer", Renamed("time_text_embed.timestep_embedder.linear_1")),
    ("time_in.out_layer", Renamed("time_text_embed.timestep_embedder.linear_2")),
    ("guidance_in.in_layer", Renamed("time_text_embed.guidance_embedder.linear_1")),
    ("guidance_in.out_layer", Renamed("time_text_embed.guidance_embedder.linear_2")),
    ("vector_in.in_layer", Renamed("time_text_embed.text_embedder.linear_1")),
    ("vector_in.out_layer", Renamed("time_text_embed.text_embedder.linear_2")),
    (
        "double_blocks.*.img_attn.qkv",
        Rows {
            parts: 3,
            of: &[
                ("transformer_blocks.*.attn.to_q", &[0]),
                ("transformer_blocks.*.attn.to_k", &[1]),
                ("transformer_blocks.*.attn.to_v", &[2]),
            ],
        },
    ),
    (
        "double_blocks.*.txt_attn.qkv",
        Rows {
            parts: 3,
            of: &[
                ("transformer_blocks.*.attn.add_q_proj", &[0]),
                ("transformer_blocks.*.attn.add_k_proj", &[1]),
                ("transformer_blocks.*.attn.add_v_proj", &[2]),
            ],
        },
    ),
    ("double_blocks.*.img_attn.norm.query_norm.scale", Renamed("transformer_blocks.*.attn.norm_q.weight")),
    ("double_blocks.*.img_attn.norm.key_norm.scale", Renamed("transformer_blocks.*.attn.norm_k.weight")),
    (
        "double_blocks.*.txt_attn.norm.query_norm.scale",
        Renamed("transformer_blocks.*.attn.norm_added_q.weight"),
    ),
    (
        "double_blocks.*.txt_attn.norm.key_norm.scale",
        Renamed("transformer_blocks.*.attn.norm_added_k.weight"),
    ),
    ("double_blocks.*.img_attn.proj", Renamed("transformer_blocks.*.attn.to_out.0")),
    ("double_blocks.*.txt_attn.proj", Renamed("transformer_blocks.*.attn.to_add_out")),
    ("double_blocks.*.img_mod.lin", Renamed("transformer_blocks.*.norm1.linear")),
    ("double_blocks.*.txt_mod.lin", Renamed("transformer_blocks.*.norm1_context.linear")),
    ("double_blocks.*.img_mlp.0", Renamed("transformer_blocks.*.ff.net.0.proj")),
    ("double_blocks.*.img_mlp.2", Renamed("transformer_blocks.*.ff.net.2")),
    ("double_blocks.*.txt_mlp.0", Renamed("transformer_blocks.*.ff_context.net.0.proj")),
    ("double_blocks.*.txt_mlp.2", Renamed("transformer_blocks.*.ff_context.net.2")),
    (
        // The MLP is four times as wide as the stream.
        "single_blocks.*.linear1",
        Rows {
            parts: 7,
            of: &[
                ("single_transformer_blocks.*.attn.to_q", &[0]),
                ("single_transformer_blocks.*.attn.to_k", &[1]),
                ("single_transformer_blocks.*.attn.to_v", &[2]),
                ("single_transformer_blocks.*.proj_mlp", &[3, 4, 5, 6]),
            ],
        },
    ),
    ("single_blocks.*.linear2", Renamed("single_transformer_blocks.*.proj_out")),
    ("single_blocks.*.norm.query_norm.scale", Renamed("single_transformer_blocks.*.attn.norm_q.weight")),
    ("single_blocks.*.norm.key_norm.scale", Renamed("single_transformer_blocks.*.attn.norm_k.weight")),
    ("single_blocks.*.modulation.lin", Renamed("single_transformer_blocks.*.norm.linear")),
    ("final_layer.linear", Renamed("proj_out")),
    ("final_layer.adaLN_modulation.1", Rows { parts: 2, of: &[("norm_out.linear", &[1, 0])] }),
];

/// Whether weight files are in this layout.
pub(super) fn is_original(files: &WeightFiles) -> bool {
    ["img_in.weight", "vector_in.in_layer.weight", "double_blocks.0.img_attn.qkv.weight"]
        .iter()
        .all(|key| files.contains(key))
}
