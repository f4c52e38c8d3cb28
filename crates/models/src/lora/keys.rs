//! How LoRA files spell the layers they update, and the spellings written here.
//!
//! A key is a prefix, a layer and a part: `transformer.` `transformer_blocks.0.attn.to_q` `.lora_A.weight`. Read are
//! the spellings of DiffSynth-Studio, PEFT and diffusers, ComfyUI, and kohya's scripts.
//!
//! Inside the program a layer is called as in diffusers. Where a family's layers have other names at their authors and in
//! DiffSynth-Studio, those are read, and written in its format.

use crate::model::KINDS;

/// The spellings that are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LoraFormat {
    /// DiffSynth-Studio's: `transformer_blocks.0.attn.to_q.lora_A.default.weight`. diffusers reads it too, unless the layers
    /// have names of their own there.
    #[default]
    Diffsynth,
    /// PEFT's in a diffusers pipeline: `transformer.transformer_blocks.0.attn.to_q.lora_A.weight`.
    Diffusers,
}

impl LoraFormat {
    /// Both, for flags and messages.
    pub const ALL: [Self; 2] = [Self::Diffsynth, Self::Diffusers];

    /// What the command line calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Diffsynth => "diffsynth",
            Self::Diffusers => "diffusers",
        }
    }

    /// Another spelling's key in this one; `None` for keys of another kind.
    pub fn respelled(self, key: &str) -> Option<String> {
        match split(key)? {
            (layer, Part::Half(half)) => Some(self.key(&layer, half)),
            (_, Part::Alpha) => None,
        }
    }

    /// The key of one half of a layer's update.
    pub(super) fn key(self, layer: &str, half: Half) -> String {
        let letter = match half {
            Half::Down => 'A',
            Half::Up => 'B',
        };
        match self {
            Self::Diffsynth => {
                let named = KINDS.iter().find_map(|kind| kind.diffsynth_layer(layer));
                format!("{}.lora_{letter}.default.weight", named.as_deref().unwrap_or(layer))
            }
            Self::Diffusers => format!("{}.{layer}.lora_{letter}.weight", component(layer)),
        }
    }
}

/// A key of an adapter with its layer as diffusers calls it, `layer.lora_A.default.weight`, whichever spelling it has;
/// `None` for keys of another kind.
pub(crate) fn canonical_key(key: &str) -> Option<String> {
    match split(key)? {
        (layer, Part::Half(Half::Down)) => Some(format!("{layer}.lora_A.default.weight")),
        (layer, Part::Half(Half::Up)) => Some(format!("{layer}.lora_B.default.weight")),
        (_, Part::Alpha) => None,
    }
}

/// A factor of an update `up · down`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Half {
    /// `[rank, in]`, also called `lora_A`.
    Down,
    /// `[out, rank]`, also called `lora_B`.
    Up,
}

/// What a key holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// One factor of the update.
    Half(Half),
    /// The number that, divided by the rank, scales the update.
    Alpha,
}

/// What stands before the layer: PEFT's wrapper, DiffSynth-Studio's pipeline (without `--remove_prefix_in_ckpt`),
/// ComfyUI's model, diffusers' pipeline.
const PREFIXES: [&str; 6] =
    ["base_model.model.", "pipe.dit.", "pipe.unet.", "diffusion_model.", "transformer.", "unet."];

/// Where the layers of a UNet begin; no transformer has any of them.
const OF_UNETS: [&str; 3] = ["down_blocks.", "mid_block.", "up_blocks."];

/// The component of a diffusers pipeline that a layer is of.
fn component(layer: &str) -> &'static str {
    if OF_UNETS.iter().any(|start| layer.starts_with(start)) { "unet" } else { "transformer" }
}

/// kohya's prefix; after it the layer's dots are underscores too.
const FLAT_PREFIX: &str = "lora_unet_";

const HALVES: [(&str, Half); 4] =
    [(".lora_A", Half::Down), (".lora_down", Half::Down), (".lora_B", Half::Up), (".lora_up", Half::Up)];

/// Layer and part of a key; `None` for keys of another kind.
pub(super) fn split(key: &str) -> Option<(String, Part)> {
    if let Some(name) = key.strip_suffix(".alpha") {
        return Some((layer(name), Part::Alpha));
    }
    let stem = key.strip_suffix(".weight")?;
    let stem = stem.strip_suffix(".default").unwrap_or(stem);
    let (name, half) = HALVES.iter().find_map(|(suffix, half)| Some((stem.strip_suffix(suffix)?, *half)))?;
    Some((layer(name), Part::Half(half)))
}

/// A layer's name without what stands before it.
fn layer(name: &str) -> String {
    let name = without_prefixes(name);
    match name.strip_prefix(FLAT_PREFIX) {
        Some(flat) => canonical(without_prefixes(&dotted(flat))),
        None => canonical(name),
    }
}

/// A layer as diffusers calls it, where a family's weight files have other names for it.
fn canonical(layer: &str) -> String {
    let ended = format!("{layer}.");
    let respelled = KINDS.iter().filter_map(|kind| Some(kind.keys(kind.denoiser())?.canonical(&ended)));
    let found = respelled.into_iter().find(|found| *found != ended);
    found.map_or_else(|| layer.to_owned(), |found| found.trim_end_matches('.').to_owned())
}

fn without_prefixes(mut name: &str) -> &str {
    while let Some(rest) = PREFIXES.iter().find_map(|prefix| name.strip_prefix(prefix)) {
        name = rest;
    }
    name
}

/// Parts of layer names with an underscore of their own, a longer one before its beginning.
const COMPOUNDS: [&str; 36] = [
    "single_transformer_blocks",
    "transformer_blocks",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
    "to_q",
    "to_k",
    "to_v",
    "to_out",
    "img_mlp",
    "img_mod",
    "img_in",
    "txt_mlp",
    "txt_mod",
    "txt_in",
    "norm_out",
    "proj_out",
    "time_text_embed",
    "timestep_embedder",
    "linear_1",
    "linear_2",
    "ff_context",
    "proj_mlp",
    "context_embedder",
    "x_embedder",
    "guidance_embedder",
    "text_embedder",
    "time_embedder",
    "time_proj",
    "condition_embedder",
    "self_attn",
    "cross_attn",
    "text_embedding",
    "time_embedding",
    "time_projection",
];

/// Turns the underscores that were dots back into dots.
fn dotted(flat: &str) -> String {
    let (mut parts, mut rest) = (Vec::new(), flat);
    while !rest.is_empty() {
        let ends = |part: &&&str| {
            rest.strip_prefix(**part).is_some_and(|after| after.is_empty() || after.starts_with('_'))
        };
        let single = rest.split('_').next().unwrap_or(rest);
        let part = COMPOUNDS.iter().find(ends).copied().unwrap_or(single);
        parts.push(part);
        rest = rest[part.len()..].strip_prefix('_').unwrap_or("");
    }
    parts.join(".")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_found_in_the_wild_names_the_same_layer() {
        let spellings = [
            "transformer_blocks.0.img_mlp.net.0.proj.lora_A.default.weight",
            "transformer.transformer_blocks.0.img_mlp.net.0.proj.lora_A.weight",
            "base_model.model.transformer_blocks.0.img_mlp.net.0.proj.lora_A.weight",
            "diffusion_model.transformer_blocks.0.img_mlp.net.0.proj.lora_down.weight",
            "pipe.dit.transformer_blocks.0.img_mlp.net.0.proj.lora_A.default.weight",
            "transformer_blocks.0.img_mlp.net.0.proj.lora_down.weight",
            "lora_unet_transformer_blocks_0_img_mlp_net_0_proj.lora_down.weight",
        ];
        for key in spellings {
            let expected = ("transformer_blocks.0.img_mlp.net.0.proj".to_owned(), Part::Half(Half::Down));
            assert_eq!(split(key), Some(expected), "{key}");
        }
    }

    #[test]
    fn layers_with_other_names_at_their_authors_are_called_as_in_diffusers_and_written_as_there() {
        for (theirs, ours) in [
            ("blocks.29.self_attn.q", "blocks.29.attn1.to_q"),
            ("blocks.0.self_attn.o", "blocks.0.attn1.to_out.0"),
            ("blocks.0.cross_attn.v", "blocks.0.attn2.to_v"),
            ("blocks.7.ffn.0", "blocks.7.ffn.net.0.proj"),
            ("blocks.7.ffn.2", "blocks.7.ffn.net.2"),
        ] {
            let expected = Some((ours.to_owned(), Part::Half(Half::Up)));
            for key in [
                format!("{theirs}.lora_B.default.weight"),
                format!("diffusion_model.{theirs}.lora_up.weight"),
                format!("lora_unet_{}.lora_up.weight", theirs.replace('.', "_")),
                format!("transformer.{ours}.lora_B.weight"),
                format!("{ours}.lora_B.default.weight"),
            ] {
                assert_eq!(split(&key), expected, "{key}");
            }
            assert_eq!(LoraFormat::Diffsynth.key(ours, Half::Up), format!("{theirs}.lora_B.default.weight"));
            assert_eq!(
                LoraFormat::Diffusers.key(ours, Half::Up),
                format!("transformer.{ours}.lora_B.weight")
            );
        }
        assert_eq!(split("head.head.lora_A.weight"), Some(("proj_out".to_owned(), Part::Half(Half::Down))));
        let unet = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q";
        assert_eq!(LoraFormat::Diffsynth.key(unet, Half::Up), format!("{unet}.lora_B.default.weight"));
    }

    #[test]
    fn underscores_that_were_dots_are_told_from_those_that_were_not() {
        let layers = [
            "transformer_blocks.59.attn.to_out.0",
            "transformer_blocks.7.attn.add_q_proj",
            "transformer_blocks.7.attn.to_add_out",
            "transformer_blocks.7.txt_mod.1",
            "time_text_embed.timestep_embedder.linear_2",
            "norm_out.linear",
            "proj_out",
            "single_transformer_blocks.3.attn.to_q",
            "single_transformer_blocks.3.proj_mlp",
            "transformer_blocks.1.ff_context.net.2",
            "time_text_embed.guidance_embedder.linear_1",
        ];
        for layer in layers {
            assert_eq!(dotted(&layer.replace('.', "_")), layer);
        }
    }

    #[test]
    fn a_prefix_with_underscores_is_no_part_of_the_layer_either() {
        let spelled = split("lora_unet_transformer_transformer_blocks_0_attn_to_q.lora_up.weight");
        assert_eq!(spelled, Some(("transformer_blocks.0.attn.to_q".to_owned(), Part::Half(Half::Up))));
    }

    #[test]
    fn alphas_and_foreign_keys_are_told_apart() {
        let alpha = split("lora_unet_img_in.alpha");
        assert_eq!(alpha, Some(("img_in".to_owned(), Part::Alpha)));
        for key in ["img_in.weight", "img_in.lora_magnitude_vector", "img_in.lora_B.bias", "img_in.diff_b"] {
            assert_eq!(split(key), None, "{key}");
        }
    }

    #[test]
    fn written_keys_are_read_as_what_they_were_written_for() {
        for format in LoraFormat::ALL {
            for half in [Half::Down, Half::Up] {
                let found = split(&format.key("transformer_blocks.0.attn.to_q", half));
                assert_eq!(found, Some(("transformer_blocks.0.attn.to_q".to_owned(), Part::Half(half))));
            }
        }
    }

    #[test]
    fn diffusers_finds_layers_of_a_unet_under_its_name() {
        let layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q";
        let key = LoraFormat::Diffusers.key(layer, Half::Down);
        assert_eq!(key, format!("unet.{layer}.lora_A.weight"));
        assert_eq!(split(&key), Some((layer.to_owned(), Part::Half(Half::Down))));
    }
}
