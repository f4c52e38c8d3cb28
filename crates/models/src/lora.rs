//! Low-rank adapters (LoRA, arXiv 2106.09685) of the denoiser: attach, detach, save and load.
//!
//! The base weights are shared: a model with an adapter and the same model without it are two views of
//! one storage. Files use DiffSynth-Studio's keys
//! (`transformer_blocks.0.attn.to_q.lora_A.default.weight`); PEFT-style files with a `transformer.`
//! prefix are read too. Both formats mean `W + lora_B · lora_A`, so a scale other than one is folded
//! into `lora_B` when writing.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use burn::module::Param;
use burn::tensor::{Device, Tensor, TensorData};
use fewstep_flow::noise::TorchGenerator;

use crate::weights::{WeightFiles, WeightType, read_info, save_tensors, values, weights_hash};
use crate::{Linear, LowRankAdapter, Model, ModelError, ModelSource};

/// Which projections get an adapter, and of which size.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    /// Rank of the update.
    pub rank: usize,
    /// The update is scaled by alpha / rank.
    pub alpha: f32,
    /// Names as in weight files; a layer matches if its name is one of them or ends with `.` and it.
    pub target_modules: Vec<String>,
}

/// Attaches fresh adapters, which start as the identity: `down` uniform in ±1/√in, `up` zero (PEFT's
/// initialisation). Returns the model and the layers that got one.
///
/// # Errors
/// If a target matches no layer.
pub fn attach(mut model: Model, config: &LoraConfig, seed: u64) -> Result<(Model, Vec<String>), ModelError> {
    let keys = model.denoiser_keys();
    let mut generator = TorchGenerator::new(seed);
    let mut matched: BTreeSet<&str> = BTreeSet::new();
    let (mut layers, mut names) = (Vec::new(), Vec::new());
    for (name, linear) in model.denoiser_linears() {
        let layer = layer_key(keys.key(&format!("{name}.weight")));
        let target = config.target_modules.iter().find(|target| matches(&layer, target));
        if let Some(target) = target {
            matched.insert(target);
            linear.lora = Some(fresh(linear, config, &mut generator));
            layers.push(layer.clone());
        }
        names.push(layer);
    }
    let unmatched: Vec<String> =
        config.target_modules.iter().filter(|target| !matched.contains(target.as_str())).cloned().collect();
    if !unmatched.is_empty() || layers.is_empty() {
        return Err(ModelError::NoTarget { targets: unmatched, available: short_names(&names) });
    }
    Ok((model, layers))
}

/// The base model: the same storage without adapters.
pub fn detach(mut model: Model) -> Model {
    for (_, linear) in model.denoiser_linears() {
        linear.lora = None;
    }
    model
}

/// Writes the adapters as one file, f32.
///
/// # Errors
/// If the file cannot be written.
pub fn save(model: &Model, path: &Path, info: &BTreeMap<String, String>) -> Result<(), ModelError> {
    let mut model = model.clone();
    let keys = model.denoiser_keys();
    let mut tensors = Vec::new();
    for (name, linear) in model.denoiser_linears() {
        let Some(lora) = &linear.lora else { continue };
        let layer = layer_key(keys.key(&format!("{name}.weight")));
        let (down, up) = (lora.down.val(), lora.up.val().mul_scalar(lora.scale));
        tensors.push((format!("{layer}.lora_A.default.weight"), down.dims().to_vec(), values(down)));
        tensors.push((format!("{layer}.lora_B.default.weight"), up.dims().to_vec(), values(up)));
    }
    save_tensors(path, tensors, WeightType::F32, info)
}

/// The entry of a LoRA file's metadata that holds the hash of the base it was trained on.
pub const BASE_HASH: &str = "fewstep.base_hash";

/// Checks that a LoRA file was trained on the weights of a model. A file that does not say passes.
///
/// # Errors
/// If the file names other weights, or a file cannot be read.
pub fn check_base(path: &Path, base: &ModelSource) -> Result<(), ModelError> {
    let Some(expected) = read_info(path)?.remove(BASE_HASH) else { return Ok(()) };
    let found = weights_hash(base)?;
    if found == expected {
        return Ok(());
    }
    Err(ModelError::OtherBase { path: path.to_owned(), base: base.to_string(), found, expected })
}

/// Attaches the adapters of a file, scaled by `alpha` (1 applies them as trained).
///
/// # Errors
/// If the file is damaged, lacks half of a pair, or names layers this model does not have.
pub fn load(mut model: Model, path: &Path, alpha: f32) -> Result<Model, ModelError> {
    let files = WeightFiles::open(path)?;
    let mut halves = halves(&files)?;
    let keys = model.denoiser_keys();
    for (name, linear) in model.denoiser_linears() {
        let layer = layer_key(keys.key(&format!("{name}.weight")));
        if let Some((down, up)) = halves.remove(&layer) {
            linear.lora = Some(read_adapter(&files, linear, [&down, &up], alpha)?);
        }
    }
    if halves.is_empty() {
        return Ok(model);
    }
    let unknown = halves.into_values().flat_map(|(down, up)| [down, up]).collect();
    Err(ModelError::Keys { path: path.to_owned(), missing: Vec::new(), unknown })
}

/// Keys of the (down, up) halves by layer.
fn halves(files: &WeightFiles) -> Result<BTreeMap<String, (String, String)>, ModelError> {
    let mut pairs: BTreeMap<String, [Option<String>; 2]> = BTreeMap::new();
    let mut unknown = Vec::new();
    for key in files.keys() {
        match split_key(key) {
            Some((layer, half)) => pairs.entry(layer).or_default()[half] = Some(key.to_owned()),
            None => unknown.push(key.to_owned()),
        }
    }
    let mut complete = BTreeMap::new();
    let mut missing = Vec::new();
    for (layer, pair) in pairs {
        match pair {
            [Some(down), Some(up)] => {
                complete.insert(layer, (down, up));
            }
            [None, _] => missing.push(format!("{layer}.lora_A.default.weight")),
            [_, None] => missing.push(format!("{layer}.lora_B.default.weight")),
        }
    }
    if unknown.is_empty() && missing.is_empty() && !complete.is_empty() {
        return Ok(complete);
    }
    Err(ModelError::Keys { path: files.path().to_owned(), missing, unknown })
}

/// Layer and half (0 down, 1 up) of a LoRA key; `None` for other keys.
fn split_key(key: &str) -> Option<(String, usize)> {
    const SUFFIXES: [(&str, usize); 4] = [
        (".lora_A.default.weight", 0),
        (".lora_B.default.weight", 1),
        (".lora_A.weight", 0),
        (".lora_B.weight", 1),
    ];
    let (layer, half) =
        SUFFIXES.iter().find_map(|(suffix, half)| Some((key.strip_suffix(suffix)?, *half)))?;
    Some((layer.strip_prefix("transformer.").unwrap_or(layer).to_owned(), half))
}

fn read_adapter(
    files: &WeightFiles,
    linear: &Linear,
    keys: [&str; 2],
    alpha: f32,
) -> Result<LowRankAdapter, ModelError> {
    let [output, input] = linear.weight.val().dims();
    let device = linear.weight.val().device();
    let (down_shape, down) = files.read(keys[0])?;
    let rank = down_shape.first().copied().unwrap_or(0);
    let (up_shape, up) = files.read(keys[1])?;
    for (key, found, expected) in [(keys[0], down_shape, [rank, input]), (keys[1], up_shape, [output, rank])]
    {
        if found != expected {
            let (path, key, expected) = (files.path().to_owned(), key.to_owned(), expected.to_vec());
            return Err(ModelError::Shape { path, key, found, expected });
        }
    }
    Ok(LowRankAdapter {
        down: matrix(down, [rank, input], &device),
        up: matrix(up, [output, rank], &device),
        scale: alpha,
    })
}

fn fresh(linear: &Linear, config: &LoraConfig, generator: &mut TorchGenerator) -> LowRankAdapter {
    let [output, input] = linear.weight.val().dims();
    let device = linear.weight.val().device();
    let bound = (input as f32).sqrt().recip();
    let down =
        generator.rand(config.rank * input).into_iter().map(|value| bound * (2.0 * value - 1.0)).collect();
    LowRankAdapter {
        down: matrix(down, [config.rank, input], &device),
        up: matrix(vec![0.0; output * config.rank], [output, config.rank], &device),
        scale: config.alpha / config.rank as f32,
    }
}

fn matrix(values: Vec<f32>, shape: [usize; 2], device: &Device) -> Param<Tensor<2>> {
    Param::from_tensor(Tensor::from_data(TensorData::new(values, shape), device))
}

fn layer_key(key: String) -> String {
    key.strip_suffix(".weight").map_or(key.clone(), str::to_owned)
}

fn matches(layer: &str, target: &str) -> bool {
    layer.strip_suffix(target).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// Distinct layer names inside a block, for hints.
fn short_names(layers: &[String]) -> Vec<String> {
    let short = |layer: &String| {
        let parts: Vec<&str> = layer.split('.').collect();
        let numbered = parts.iter().position(|part| part.parse::<usize>().is_ok());
        numbered.map_or_else(|| layer.clone(), |index| parts[index + 1..].join("."))
    };
    layers.iter().map(short).collect::<BTreeSet<_>>().into_iter().collect()
}
