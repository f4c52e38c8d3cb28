//! What drawing and training take: numbers held in memory, and floating point operations.
//!
//! Computed from a folder's configs alone, before any weight is read. A family states its formulas in its own folder.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::model::check_family;
use crate::{Components, ModelError, ModelSource, WeightType, qwen_image};

/// The work that is asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Picture height in pixels.
    pub height: usize,
    /// Picture width in pixels.
    pub width: usize,
    /// Pictures at once.
    pub batch_size: usize,
    /// Tokens of each prompt's states.
    pub text_tokens: usize,
    /// Rank of the adapters that are trained on the peers' usual layers; `None` trains the whole denoiser.
    pub lora_rank: Option<usize>,
    /// What is loaded; the denoiser is among it.
    pub components: Components,
}

/// What text encoder and autoencoder hold beside their weights, in numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Encoding {
    /// For each token of the prompts encoded together.
    pub per_token: u64,
    /// The same with a graph, everything the backward needs kept.
    pub per_token_training: u64,
    /// For each pixel of the pictures encoded together.
    pub per_pixel: u64,
    /// Floating point operations for each token.
    pub flops_per_token: u64,
}

/// What a workload takes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Footprint {
    /// Tokens of one picture.
    pub image_tokens: usize,
    /// Parameters in the files of each loaded component that has any.
    pub parameters: BTreeMap<&'static str, u64>,
    /// Those of them that stay in memory: an autoencoder for videos needs few of its weights for pictures.
    pub held: BTreeMap<&'static str, u64>,
    /// The component that denoises.
    pub denoiser: &'static str,
    /// Parameters that learn.
    pub trained: u64,
    /// Numbers that evaluating the denoiser on a batch holds.
    pub activations: Activations,
    /// Floating point operations of the denoiser on a batch.
    pub flops: Flops,
}

/// Numbers held beside the weights at the worst moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Activations {
    /// Without a graph, as in drawing.
    pub drawing: u64,
    /// Forward and backward, everything the backward needs kept.
    pub training: u64,
    /// Forward and backward, blocks computed a second time from their inputs.
    pub checkpointed: u64,
}

/// Floating point operations, a multiplication with its addition being two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Flops {
    /// One evaluation.
    pub forward: u64,
    /// The backward of one evaluation.
    pub backward: u64,
}

impl Footprint {
    /// What a workload takes with a model; weights need not be there.
    ///
    /// # Errors
    /// If the model is of no known family, a config of what is loaded is missing or damaged, or the family cannot draw
    /// that size.
    pub fn of(source: &ModelSource, workload: &Workload) -> Result<Self, ModelError> {
        check_family(source)?;
        qwen_image::footprint(source, workload)
    }

    /// What encoding takes with a model; weights need not be there.
    ///
    /// # Errors
    /// As [`Footprint::of`].
    pub fn of_encoding(source: &ModelSource) -> Result<Encoding, ModelError> {
        check_family(source)?;
        qwen_image::encoding(source)
    }

    /// Parameters of the components, as [`Footprint::parameters`].
    ///
    /// # Errors
    /// As [`Footprint::of`].
    pub fn counted(
        source: &ModelSource,
        components: Components,
    ) -> Result<BTreeMap<&'static str, u64>, ModelError> {
        check_family(source)?;
        qwen_image::counted(source, components)
    }

    /// Numbers of the components' weights that stay in memory, as [`Footprint::held`].
    ///
    /// # Errors
    /// As [`Footprint::of`].
    pub fn held_by(
        source: &ModelSource,
        components: Components,
    ) -> Result<BTreeMap<&'static str, u64>, ModelError> {
        check_family(source)?;
        qwen_image::held(source, components)
    }

    /// Bytes that a weight of a component takes in memory. Frozen matrices are stored in the number type, and the few
    /// norms and biases among them count as well; what learns stays in f32, and so does the autoencoder.
    pub fn bytes_per_weight(component: &str, dtype: WeightType, learns: bool) -> u64 {
        let stored = if component == "vae" || learns { WeightType::F32 } else { dtype };
        stored.bytes() as u64
    }

    /// Gradients held at the worst moment: the sum over sampling steps, and those that are being added to it.
    pub fn gradients(&self) -> u64 {
        2 * self.trained
    }

    /// AdamW's two moments, which are f32 whatever the weights are.
    pub fn moments(&self) -> u64 {
        2 * self.trained
    }
}

impl Flops {
    /// One optimiser step of direct distillation: every sampling step is run once to get there and once with a graph,
    /// and, where blocks are checkpointed, their inside a third time.
    pub fn distillation_step(&self, num_inference_steps: usize, checkpointed: bool) -> u64 {
        let forwards = if checkpointed { 3 } else { 2 };
        num_inference_steps as u64 * (forwards * self.forward + self.backward)
    }
}
