//! `unet/config.json` of class `UNet2DConditionModel`.

use serde::Deserialize;
use serde_json::{Value, json};

use crate::config_file::ConfigFile;
use crate::{ModelError, ModelSource, ranges};

/// The class that diffusers names.
const CLASS: &str = "UNet2DConditionModel";
/// The most stages, each of which may halve the latents.
const MAX_STAGES: usize = 8;

/// Config of the UNet. Keys that select what no Stable Diffusion model has are refused by name.
#[derive(Clone, Debug, Deserialize)]
pub struct UnetConfig {
    /// C, channels of the latents.
    pub in_channels: usize,
    /// Channels of the prediction.
    pub out_channels: usize,
    /// Channels of each stage, from full resolution on; each but the last halves the latents.
    pub block_out_channels: Vec<usize>,
    /// Residual blocks of a stage on the way down; there is one more on the way up.
    pub layers_per_block: usize,
    /// J, width of the text states.
    pub cross_attention_dim: usize,
    /// Groups of the norms.
    pub norm_num_groups: usize,
    /// Epsilon of the residual blocks' norms.
    pub norm_eps: f32,
    /// Whether a transformer's first and last projections are linear, or else 1×1 convolutions.
    pub use_linear_projection: bool,
    /// Width of the sinusoids of each size a model is told, where it is told any.
    pub addition_time_embed_dim: Option<usize>,
    /// Width of what is added to the time: the pooled text state and six sizes.
    pub projection_class_embeddings_input_dim: Option<usize>,
    addition_embed_type: Option<String>,
    down_block_types: Vec<String>,
    up_block_types: Vec<String>,
    /// Heads: the key was named before it was understood, and files kept it.
    attention_head_dim: PerStage,
    num_attention_heads: Option<PerStage>,
    transformer_layers_per_block: PerStage,
}

/// A number for all stages, or one for each.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum PerStage {
    All(usize),
    Each(Vec<usize>),
}

impl PerStage {
    fn at(&self, stage: usize) -> usize {
        match self {
            Self::All(value) => *value,
            Self::Each(values) => values[stage],
        }
    }

    fn values(&self, stages: usize) -> Vec<usize> {
        match self {
            Self::All(value) => vec![*value; stages],
            Self::Each(values) => values.clone(),
        }
    }
}

impl UnetConfig {
    /// Reads the config of the component `unet`.
    ///
    /// # Errors
    /// If it is missing, damaged, or of a variant there is no code for.
    pub(crate) fn read(source: &ModelSource) -> Result<Self, ModelError> {
        let file = ConfigFile::of_component(source, "unet")?;
        file.check_class("unet", file.class_name(), &[CLASS])?;
        check_variant(&file.json).map_err(|reason| file.error(reason))?;
        let config: Self = file.parse_over(defaults())?;
        config.check().map_err(|reason| file.error(reason))?;
        Ok(config)
    }

    /// Stages, the number of resolutions.
    pub(crate) fn stages(&self) -> usize {
        self.block_out_channels.len()
    }

    /// Heads of a stage's attention.
    pub(super) fn heads(&self, stage: usize) -> usize {
        self.num_attention_heads.as_ref().unwrap_or(&self.attention_head_dim).at(stage)
    }

    /// Transformer blocks of one attention of a stage.
    pub(super) fn depth(&self, stage: usize) -> usize {
        self.transformer_layers_per_block.at(stage)
    }

    /// Whether a stage attends on the way down.
    pub(super) fn attends_down(&self, stage: usize) -> bool {
        self.down_block_types[stage] == DOWN[0]
    }

    /// Whether a stage attends on the way up.
    pub(super) fn attends_up(&self, stage: usize) -> bool {
        self.up_block_types[self.stages() - 1 - stage] == UP[0]
    }

    /// Width of the time embedding.
    pub(super) fn time_width(&self) -> usize {
        4 * self.block_out_channels[0]
    }

    /// Width of the sinusoids of one size and of all that is added to the time; `None` where nothing is.
    pub(crate) fn added(&self) -> Option<[usize; 2]> {
        Some([self.addition_time_embed_dim?, self.projection_class_embeddings_input_dim?])
    }

    /// Width of the pooled text state that is added to the time.
    pub(crate) fn pooled_width(&self) -> Option<usize> {
        self.added().map(|[sinusoids, all]| all - SIZES * sinusoids)
    }

    fn check(&self) -> Result<(), String> {
        let stages = self.stages();
        ranges::check(&[
            ("the number of block_out_channels", stages, 1..=MAX_STAGES),
            ("layers_per_block", self.layers_per_block, ranges::LAYERS),
            ("in_channels", self.in_channels, ranges::WIDTH),
            ("out_channels", self.out_channels, self.in_channels..=self.in_channels),
            ("cross_attention_dim", self.cross_attention_dim, ranges::WIDTH),
            ("norm_num_groups", self.norm_num_groups, ranges::WIDTH),
        ])?;
        ranges::check_positive(&[("norm_eps", self.norm_eps)])?;
        check_types("down_block_types", &self.down_block_types, &DOWN, stages)?;
        check_types("up_block_types", &self.up_block_types, &UP, stages)?;
        let heads = self.num_attention_heads.as_ref().unwrap_or(&self.attention_head_dim).values(stages);
        let depths = self.transformer_layers_per_block.values(stages);
        for (name, found) in [("attention_head_dim", &heads), ("transformer_layers_per_block", &depths)] {
            if found.len() != stages {
                return Err(format!("{name} has {} entries, expected {stages}", found.len()));
            }
        }
        for (stage, channels) in self.block_out_channels.iter().enumerate() {
            ranges::check(&[
                ("one of block_out_channels", *channels, ranges::WIDTH),
                ("one of attention_head_dim", heads[stage], ranges::WIDTH),
                ("one of transformer_layers_per_block", depths[stage], ranges::LAYERS),
            ])?;
            for (name, divisor) in [("norm_num_groups", self.norm_num_groups), ("its heads", heads[stage])] {
                if !channels.is_multiple_of(divisor) {
                    return Err(format!(
                        "one of block_out_channels is {channels}, expected a multiple of {name}, {divisor}"
                    ));
                }
            }
        }
        self.check_added()
    }

    fn check_added(&self) -> Result<(), String> {
        match (self.addition_embed_type.as_deref(), self.added()) {
            (None, _) if self.addition_time_embed_dim.is_none() => Ok(()),
            (Some("text_time"), Some([sinusoids, all])) if sinusoids % 2 == 0 && all > SIZES * sinusoids => {
                Ok(())
            }
            (kind, added) => Err(format!(
                "addition_embed_type is {kind:?} with addition_time_embed_dim and \
                 projection_class_embeddings_input_dim {added:?}, expected none of them, or text_time with an even \
                 number and one more than {SIZES} times it"
            )),
        }
    }
}

/// Sizes a model is told: original height and width, top and left of the crop, height and width.
pub(super) const SIZES: usize = 6;
/// Blocks that attend, and those that do not.
const DOWN: [&str; 2] = ["CrossAttnDownBlock2D", "DownBlock2D"];
const UP: [&str; 2] = ["CrossAttnUpBlock2D", "UpBlock2D"];

fn check_types(name: &str, found: &[String], known: &[&str], stages: usize) -> Result<(), String> {
    if found.len() == stages && found.iter().all(|kind| known.contains(&kind.as_str())) {
        return Ok(());
    }
    Err(format!("{name} are {found:?}, expected {stages} of {}", known.join(" or ")))
}

/// Refuses values that ask for something else than the published models.
fn check_variant(json: &Value) -> Result<(), String> {
    let only = [
        ("act_fn", json!("silu")),
        ("center_input_sample", json!(false)),
        ("class_embed_type", Value::Null),
        ("conv_in_kernel", json!(3)),
        ("conv_out_kernel", json!(3)),
        ("cross_attention_norm", Value::Null),
        ("downsample_padding", json!(1)),
        ("dual_cross_attention", json!(false)),
        ("encoder_hid_dim", Value::Null),
        ("encoder_hid_dim_type", Value::Null),
        ("flip_sin_to_cos", json!(true)),
        ("freq_shift", json!(0)),
        ("mid_block_scale_factor", json!(1)),
        ("mid_block_type", json!("UNetMidBlock2DCrossAttn")),
        ("num_class_embeds", Value::Null),
        ("only_cross_attention", json!(false)),
        ("resnet_out_scale_factor", json!(1.0)),
        ("resnet_skip_time_act", json!(false)),
        ("resnet_time_scale_shift", json!("default")),
        ("reverse_transformer_layers_per_block", Value::Null),
        ("time_cond_proj_dim", Value::Null),
        ("time_embedding_act_fn", Value::Null),
        ("time_embedding_dim", Value::Null),
        ("time_embedding_type", json!("positional")),
        ("timestep_post_act", Value::Null),
    ];
    for name in ["layers_per_block", "cross_attention_dim"] {
        if json.get(name).is_some_and(|found| !found.is_u64()) {
            return Err(format!("{name} is {}, expected one number for all blocks", json[name]));
        }
    }
    let same = |found: &Value, expected: &Value| match (found.as_f64(), expected.as_f64()) {
        (Some(found), Some(expected)) => found == expected,
        _ => found == expected,
    };
    let other =
        |(name, expected): &&(&str, Value)| json.get(name).is_some_and(|found| !same(found, expected));
    match only.iter().find(other) {
        Some((name, expected)) => {
            Err(format!("{name} is {}, expected {expected}: this variant is not supported", json[*name]))
        }
        None => Ok(()),
    }
}

/// What a file means where it leaves a key out: diffusers' defaults.
fn defaults() -> Value {
    json!({
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [320, 640, 1280, 1280],
        "layers_per_block": 2,
        "cross_attention_dim": 1280,
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
        "use_linear_projection": false,
        "attention_head_dim": 8,
        "transformer_layers_per_block": 1,
        "down_block_types":
            ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    })
}
