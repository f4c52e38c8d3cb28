//! What can go wrong with a model folder or a weight file.

use std::path::{Path, PathBuf};

use crate::family::MAX_FRAMES;

/// Errors of loading, saving and running models.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A part is needed that was left out when the model was loaded.
    #[error("{component} was not loaded")]
    NotLoaded {
        /// The component.
        component: &'static str,
    },
    /// A file could not be read or written.
    #[error("{}: {reason}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        reason: std::io::Error,
    },
    /// A folder is no model folder.
    #[error("{}: no model folder: {missing} is missing\nhint: give the folder that holds model_index.json", path.display())]
    NoModelFolder {
        /// The folder.
        path: PathBuf,
        /// What was looked for.
        missing: String,
    },
    /// A small file that goes with given weight files is nowhere around them.
    #[error(
        "no {what} for the given weight files; looked for {}\nhint: {}",
        paths(looked),
        beside_hint(what)
    )]
    NotBeside {
        /// Its place in the official layout.
        what: String,
        /// Where it was looked for.
        looked: Vec<PathBuf>,
    },
    /// A component that is needed was not given.
    #[error(
        "no weights of the component {component} among {}\nhint: add its file, or a nested list of its shards",
        paths(given)
    )]
    MissingComponent {
        /// The component.
        component: &'static str,
        /// The files that were given.
        given: Vec<PathBuf>,
    },
    /// A weight file of no component there is code for.
    #[error("{}: weights of no known component; the file begins with the keys {}\nhint: shards of one component are given together, in a nested list", path.display(), keys.join(", "))]
    UnknownWeights {
        /// The file.
        path: PathBuf,
        /// Some of its keys.
        keys: Vec<String>,
    },
    /// Weight files that no family has all of.
    #[error("{} are not of one model\nhint: give the components of one model", paths(given))]
    MixedFamilies {
        /// The files that were given.
        given: Vec<PathBuf>,
    },
    /// Two weight files that are the same component.
    #[error("{} and {} both hold the component {component}\nhint: shards of one component are given together, in a nested list", first.display(), second.display())]
    SameComponent {
        /// The component.
        component: &'static str,
        /// A file given first.
        first: PathBuf,
        /// A file given later.
        second: PathBuf,
    },
    /// A shard of a component is not there.
    #[error("{}: is missing, named by {}\nhint: download it again", shard.display(), by.display())]
    MissingShard {
        /// The shard.
        shard: PathBuf,
        /// The index or the other shard that names it.
        by: PathBuf,
    },
    /// A tensor that two weight files of one component hold.
    #[error("{} and {} both hold the tensor {key}\nhint: keep the shards of one set in the folder and remove the others", first.display(), second.display())]
    SameTensor {
        /// Its key.
        key: String,
        /// The file opened first.
        first: PathBuf,
        /// The file opened later.
        second: PathBuf,
    },
    /// A folder holds weights in several variants.
    #[error("{}: found {}, expected one weight file or the shards of one\nhint: remove the others, or name the files by --model-paths", path.display(), files.join(", "))]
    Ambiguous {
        /// The folder.
        path: PathBuf,
        /// The weight files in it.
        files: Vec<String>,
    },
    /// A JSON file does not say what it should.
    #[error("{}: {reason}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong, found against expected.
        reason: String,
    },
    /// A class this program has no code for.
    #[error("{}: {role} of class {found}, expected one of {}\nhint: is it the folder of another model? Other families are not supported", path.display(), expected.join(", "))]
    UnknownClass {
        /// The file that names the class.
        path: PathBuf,
        /// The component.
        role: &'static str,
        /// The class found.
        found: String,
        /// The classes there is code for.
        expected: Vec<&'static str>,
    },
    /// A file is no safetensors file.
    #[error("{}: no valid safetensors file: {reason}\nhint: the file is truncated, damaged or of another format; download or write it again", path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// The parser's reason.
        reason: String,
    },
    /// Keys of a weight file and of the model differ.
    #[error("{}: weights do not fit the model: {}\nhint: is it the file of another model, or of another size of it?", path.display(), mismatch(missing, unknown))]
    Keys {
        /// The file or folder.
        path: PathBuf,
        /// Keys the model has and the file lacks.
        missing: Vec<String>,
        /// Keys the file has and the model lacks.
        unknown: Vec<String>,
    },
    /// A tensor has another shape than the model's.
    #[error("{}: tensor {key} has shape {found:?}, expected {expected:?}\nhint: is it the file of another model, or of another size of it?", path.display())]
    Shape {
        /// The file or folder.
        path: PathBuf,
        /// The tensor's key.
        key: String,
        /// Its shape in the file.
        found: Vec<usize>,
        /// Its shape in the model.
        expected: Vec<usize>,
    },
    /// A tensor has a type that cannot be read as numbers.
    #[error("{}: tensor {key} has type {found}, expected F32, F16 or BF16\nhint: quantised weights are not read; take the files in bf16", path.display())]
    DataType {
        /// The file or folder.
        path: PathBuf,
        /// The tensor's key.
        key: String,
        /// Its type in the file.
        found: String,
    },
    /// A weight that is not finite.
    #[error("{}: tensor {key} holds a value that is not finite\nhint: the file was written by a diverged run; take an earlier checkpoint", path.display())]
    NotFinite {
        /// The file or folder.
        path: PathBuf,
        /// The tensor's key.
        key: String,
    },
    /// The tokenizer cannot be built or used.
    #[error("{}: tokenizer: {reason}\nhint: copy the tokenizer folder of the model's repository", path.display())]
    Tokenizer {
        /// Its folder.
        path: PathBuf,
        /// The reason.
        reason: String,
    },
    /// A picture size the family cannot make.
    #[error("{axis} {found} px is not divisible by {factor}\nhint: {}", sizes_near(*found, *factor))]
    Size {
        /// "height" or "width".
        axis: &'static str,
        /// The size asked for, in pixels.
        found: usize,
        /// The division factor of the family.
        factor: usize,
    },
    /// A guidance scale for a denoiser that is told none.
    #[error(
        "embedded_guidance is {found}, expected none: {class} has no input for it\nhint: leave it out; cfg_scale guides every model"
    )]
    NotTold {
        /// The scale asked for.
        found: f32,
        /// The pipeline's class.
        class: &'static str,
    },
    /// A number of frames the family cannot make.
    #[error("num_frames is {found}, expected {}\nhint: {}", frames_rule(*frames_per_latent), frames_near(*found, *frames_per_latent))]
    Frames {
        /// The number asked for.
        found: usize,
        /// Frames per latent frame after the first; `None` where the family draws pictures alone.
        frames_per_latent: Option<usize>,
    },
    /// A picture size nobody has the memory for, or the model no places for.
    #[error("{axis} {found} px, expected at most {most}")]
    TooLarge {
        /// "height" or "width".
        axis: &'static str,
        /// The size asked for, in pixels.
        found: usize,
        /// The most pixels that a picture, or one of this model, has along a side.
        most: usize,
    },
    /// A LoRA that was trained on other weights.
    #[error(
        "{}: trained on a base with hash {expected}, {base} has hash {found}\nhint: give the model the adapter was \
         trained on",
        path.display()
    )]
    OtherBase {
        /// The LoRA file.
        path: PathBuf,
        /// The model.
        base: String,
        /// The model's hash.
        found: String,
        /// The hash in the file.
        expected: String,
    },
    /// Keys of a file that is no LoRA, or one of a kind that is not read.
    #[error("{}: no LoRA that can be read: {}\nhint: expected pairs such as transformer_blocks.0.attn.to_q.lora_A.weight and .lora_B.weight", path.display(), mismatch(missing, unknown))]
    LoraKeys {
        /// The file.
        path: PathBuf,
        /// Halves of pairs that are not there.
        missing: Vec<String>,
        /// Keys that are neither half of a pair nor an alpha.
        unknown: Vec<String>,
    },
    /// A LoRA layer that would add nothing, or nothing finite.
    #[error("{}: the update of {layer} is scaled by {scale}, expected a number other than 0\nhint: its alpha is wrong; an alpha of 0 is read as the rank by some scripts and switches the layer off in others", path.display())]
    LoraScale {
        /// The file.
        path: PathBuf,
        /// The layer.
        layer: String,
        /// alpha / rank, or alpha / √rank.
        scale: f32,
    },
    /// A LoRA of layers the model does not have.
    #[error(
        "{}: {} of its {layers} layers are not in the model: found {}, expected some of {}\nhint: is it the LoRA of \
         another model, or of another size of it?",
        path.display(),
        unknown.len(),
        first(unknown),
        first(available)
    )]
    LoraLayers {
        /// The file.
        path: PathBuf,
        /// The layers that are not in the model.
        unknown: Vec<String>,
        /// Layers in the file.
        layers: usize,
        /// The layers of the model.
        available: Vec<String>,
    },
    /// An output that already holds something else.
    #[error("{}: there is something else already\nhint: give another output, or remove this one", path.display())]
    Taken {
        /// The file or folder.
        path: PathBuf,
    },
    /// LoRA targets that match nothing.
    #[error("no layer matches the LoRA target modules {}\nhint: this model has {}", targets.join(", "), available.join(", "))]
    NoTarget {
        /// The names asked for.
        targets: Vec<String>,
        /// Names that would match.
        available: Vec<String>,
    },
    /// A picture that cannot be read or written.
    #[error(transparent)]
    Picture(#[from] fewstep_data::DataError),
    /// A schedule that cannot be computed.
    #[error(transparent)]
    Flow(#[from] fewstep_flow::FlowError),
}

impl ModelError {
    /// For `map_err` on file operations.
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> ModelError + '_ {
        move |reason| ModelError::Io { path: path.to_owned(), reason }
    }
}

fn sizes_near(found: usize, factor: usize) -> String {
    match found / factor {
        0 => format!("the smallest size is {factor}"),
        below => format!("the nearest sizes are {} and {}", below * factor, (below + 1) * factor),
    }
}

fn frames_rule(frames_per_latent: Option<usize>) -> String {
    match frames_per_latent {
        None => "1: the model draws pictures, no videos".into(),
        Some(step) => format!("{step}n + 1, at most {MAX_FRAMES}"),
    }
}

fn frames_near(found: usize, frames_per_latent: Option<usize>) -> String {
    match frames_per_latent {
        None => "leave num_frames out, or take a model that draws videos".into(),
        Some(step) => {
            let below = found.clamp(1, MAX_FRAMES).saturating_sub(1) / step * step + 1;
            format!("the nearest numbers are {below} and {}", below + step)
        }
    }
}

fn paths(paths: &[PathBuf]) -> String {
    let names: Vec<String> = paths.iter().map(|path| path.display().to_string()).collect();
    names.join(", ")
}

fn beside_hint(what: &str) -> String {
    match what {
        "tokenizer" => "give its folder by --tokenizer-path".into(),
        _ => format!("copy it there from the model's repository; in the official layout it is {what}"),
    }
}

/// Names at most a handful of keys.
fn first(keys: &[String]) -> String {
    const SHOWN: usize = 6;
    let shown: Vec<&str> = keys.iter().take(SHOWN).map(String::as_str).collect();
    let more = keys.len().saturating_sub(SHOWN);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("{}{more}", shown.join(", "))
}

/// Names some keys of each kind.
fn mismatch(missing: &[String], unknown: &[String]) -> String {
    let kinds = [("missing", missing), ("unknown", unknown)];
    let named = kinds.iter().filter(|(_, keys)| !keys.is_empty());
    let parts: Vec<String> =
        named.map(|(label, keys)| format!("{} {label} ({})", keys.len(), first(keys))).collect();
    if parts.is_empty() { "no keys".into() } else { parts.join("; ") }
}
