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
pub(crate) use keys::canonical_key;

use crate::load_options::widened;
use crate::weights::{WeightType, read_info, save_tensors, values, weights_hash};
use crate::{Linear, LowRankAdapter, Model, ModelError, ModelSource, NamedVisitor, visit_named};
use keys::Half;

/// Which projections get an adapter, and of which size.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    /// Rank of the update.
    pub rank: usize,
    /// The update is scaled by alpha / rank.
    pub alpha: f32,
    /// Names as in weight files, or as DiffSynth-Studio has them; a layer matches if its name is one of them or ends with `.`
    /// and it.
    pub target_modules: Vec<String>,
}

/// Attaches fresh adapters, which start as the identity: `down` uniform in ±1/√in, `up` zero. They are PEFT's to the
/// bit, after `torch.manual_seed(seed)`. Returns the model and the layers that got one.
///
/// # Errors
/// If a target matches no layer.
pub fn attach(mut model: Model, config: &LoraConfig, seed: u64) -> Result<(Model, Vec<String>), ModelError> {
    let keys = model.denoiser_keys();
    let chosen: BTreeSet<String> = targets(&model, config)?.into_iter().map(|(layer, _)| layer).collect();
    let mut generator = TorchGenerator::new(seed);
    let mut layers = Vec::new();
    for (name, linear) in model.denoiser_linears() {
        let layer = layer_key(keys.key(&format!("{name}.weight")));
        if chosen.contains(&layer) {
            linear.lora = Some(fresh(linear, config, &mut generator));
            layers.push(layer);
        }
    }
    Ok((model, layers))
}

/// The layers that [`attach`] gives adapters, as [`layers`] tells them; works on a model without weights.
///
/// # Errors
/// If a target matches no layer.
pub fn targets(model: &Model, config: &LoraConfig) -> Result<Vec<(String, [usize; 2])>, ModelError> {
    let all = layers(model);
    let asked = config.target_modules.iter();
    let is_named = |layer: &str, target: &str| {
        let theirs = model.diffsynth_layer(layer);
        matches(layer, target) || theirs.is_some_and(|theirs| matches(&theirs, target))
    };
    let unmatched: Vec<String> = asked
        .clone()
        .filter(|target| !all.iter().any(|(layer, _)| is_named(layer, target)))
        .cloned()
        .collect();
    let chosen: Vec<(String, [usize; 2])> = all
        .iter()
        .filter(|(layer, _)| asked.clone().any(|target| is_named(layer, target)))
        .cloned()
        .collect();
    match unmatched.is_empty() && !chosen.is_empty() {
        true => Ok(chosen),
        false => Err(ModelError::NoTarget { targets: unmatched, available: short_names(&all) }),
    }
}

/// The layers that can have an adapter: their names in weight files, and inputs and outputs as `[out, in]`.
pub fn layers(model: &Model) -> Vec<(String, [usize; 2])> {
    struct Layers<'a>(&'a Model, Vec<(String, [usize; 2])>);
    impl NamedVisitor for Layers<'_> {
        fn visit<const D: usize>(&mut self, name: &str, parameter: &Param<Tensor<D>>) {
            let (component, key) = self.0.weight_key(name);
            if D == 2 && component == self.0.denoiser_name() && name.ends_with(".weight") {
                let [output, input] = parameter.lazy_shape().dims::<2>();
                self.1.push((layer_key(key), [output, input]));
            }
        }
    }
    let mut layers = Layers(model, Vec::new());
    visit_named(model, &mut layers);
    layers.1
}

/// Checks that a LoRA file fits a model, which needs no weights for it; returns the numbers of its adapters.
///
/// # Errors
/// As [`load`].
pub fn check(model: &Model, path: &Path) -> Result<u64, ModelError> {
    let lora = LoraWeights::open(path)?;
    let shapes: BTreeMap<String, [usize; 2]> = layers(model).into_iter().collect();
    lora.check_layers(&shapes.keys().cloned().collect::<Vec<_>>())?;
    let mut numbers = 0;
    for (name, layer) in lora.layers() {
        lora.check_shape(name, shapes[name])?;
        numbers += (layer.rank * (layer.input + layer.output)) as u64;
    }
    Ok(numbers)
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

/// Whether a layer is the one that a target names, or ends with it.
pub(crate) fn matches(layer: &str, target: &str) -> bool {
    layer.strip_suffix(target).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// Distinct layer names inside a block, for hints.
fn short_names(layers: &[(String, [usize; 2])]) -> Vec<String> {
    let short = |(layer, _): &(String, [usize; 2])| {
        let parts: Vec<&str> = layer.split('.').collect();
        let numbered = parts.iter().position(|part| part.parse::<usize>().is_ok());
        numbered.map_or_else(|| layer.clone(), |index| parts[index + 1..].join("."))
    };
    layers.iter().map(short).collect::<BTreeSet<_>>().into_iter().collect()
}
