//! Low-rank adapters (LoRA, arXiv 2106.09685) of the denoiser: attach, detach, save, load, convert and fuse.
//!
//! The base weights are shared: a model with an adapter and the same model without it are two views of
//! one storage. Written files mean `W + lora_B · lora_A`, so a scale other than one is folded into `lora_B`; read
//! files may bring an alpha in any of the ways of [`LoraWeights::open`].

mod convert;
mod file;
mod fuse;
mod keys;
mod peft;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use burn::module::Param;
use burn::tensor::{Device, Tensor, TensorData};
use fewstep_flow::noise::TorchGenerator;

pub use convert::convert;
pub use file::{LoraLayer, LoraWeights};
pub use fuse::{Fusion, MAX_SHARD_BYTES, fuse};
pub use keys::LoraFormat;

use crate::load_options::widened;
use crate::weights::{WeightType, read_info, save_tensors, values, weights_hash};
use crate::{Linear, LowRankAdapter, Model, ModelError, ModelSource};
use keys::Half;

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

/// Attaches fresh adapters, which start as the identity: `down` uniform in ±1/√in, `up` zero. They are PEFT's to the
/// bit, after `torch.manual_seed(seed)`. Returns the model and the layers that got one.
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

/// The layers that can have an adapter: their names in weight files, and inputs and outputs as `[out, in]`.
pub fn layers(model: &Model) -> Vec<(String, [usize; 2])> {
    let (keys, mut model) = (model.denoiser_keys(), model.clone());
    let named = |(name, linear): (String, &mut Linear)| {
        (layer_key(keys.key(&format!("{name}.weight"))), linear.weight.val().dims())
    };
    model.denoiser_linears().into_iter().map(named).collect()
}

/// The model with its adapters added into the base weights, W + scale · up · down, and none beside them. Computed in
/// f32, and rounded once where the weights are stored in another type.
pub fn merge(mut model: Model) -> Model {
    for (_, linear) in model.denoiser_linears() {
        if let Some(lora) = linear.lora.take() {
            let update = lora.up.val().matmul(lora.down.val()).mul_scalar(lora.scale);
            linear.weight = linear.weight.clone().map(|weight| {
                let dtype = weight.dtype();
                let merged = widened(weight) + update;
                if dtype == merged.dtype() { merged } else { merged.cast(dtype) }
            });
        }
    }
    model
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
pub fn save(
    model: &Model,
    path: &Path,
    info: &BTreeMap<String, String>,
    format: LoraFormat,
) -> Result<(), ModelError> {
    let mut model = model.clone();
    let keys = model.denoiser_keys();
    let mut tensors = Vec::new();
    for (name, linear) in model.denoiser_linears() {
        let Some(lora) = &linear.lora else { continue };
        let layer = layer_key(keys.key(&format!("{name}.weight")));
        let (down, up) = (lora.down.val(), lora.up.val().mul_scalar(lora.scale));
        tensors.push((format.key(&layer, Half::Down), down.dims().to_vec(), values(down)));
        tensors.push((format.key(&layer, Half::Up), up.dims().to_vec(), values(up)));
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
/// As [`LoraWeights::open`], or if the file names layers this model does not have, or other sizes of them.
pub fn load(mut model: Model, path: &Path, alpha: f32) -> Result<Model, ModelError> {
    let lora = LoraWeights::open(path)?;
    let keys = model.denoiser_keys();
    let mut linears: Vec<(String, &mut Linear)> = model
        .denoiser_linears()
        .into_iter()
        .map(|(name, linear)| (layer_key(keys.key(&format!("{name}.weight"))), linear))
        .collect();
    let available: Vec<String> = linears.iter().map(|(layer, _)| layer.clone()).collect();
    lora.check_layers(&available)?;
    for (layer, linear) in &mut linears {
        if lora.layers().contains_key(layer) {
            linear.lora = Some(read_adapter(&lora, layer, linear, alpha)?);
        }
    }
    Ok(model)
}

fn read_adapter(
    lora: &LoraWeights,
    name: &str,
    linear: &Linear,
    alpha: f32,
) -> Result<LowRankAdapter, ModelError> {
    let [output, input] = linear.weight.val().dims();
    let device = linear.weight.val().device();
    lora.check_shape(name, [output, input])?;
    let (layer, factors) = (&lora.layers()[name], lora.read(name)?);
    Ok(LowRankAdapter {
        down: matrix(factors.down, [layer.rank, input], &device),
        up: matrix(factors.up, [output, layer.rank], &device),
        scale: alpha * layer.scale,
    })
}

fn fresh(linear: &Linear, config: &LoraConfig, generator: &mut TorchGenerator) -> LowRankAdapter {
    let [output, input] = linear.weight.val().dims();
    let device = linear.weight.val().device();
    // PEFT makes two linear layers, which draw weights of their own, before it draws the one that stays.
    generator.rand(config.rank * input);
    generator.rand(output * config.rank);
    let bound = (input as f64).sqrt().recip() as f32;
    // torch scales in f64.
    let scaled = |value: f32| (f64::from(value) * f64::from(2.0 * bound) - f64::from(bound)) as f32;
    let down = generator.rand(config.rank * input).into_iter().map(scaled).collect();
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
