//! What drawing and training take: numbers held in memory, and floating point operations.
//!
//! Computed from a folder's configs alone, before any weight is read. A family states its formulas in its own folder.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::family::{AUTOENCODER, Kind};
use crate::model::kind_of;
use crate::{Components, ModelError, ModelSource, WeightType, lora};

/// The work that is asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Picture height in pixels.
    pub height: usize,
    /// Picture width in pixels.
    pub width: usize,
    /// Frames; 1 is a picture.
    pub frames: usize,
    /// Pictures at once.
    pub batch_size: usize,
    /// Tokens of each prompt's states.
    pub text_tokens: usize,
    /// Rank of the adapters that are trained on the peers' usual layers; `None` trains the whole denoiser.
    pub lora_rank: Option<usize>,
    /// What is loaded; the denoiser is among it.
    pub components: Components,
    /// Whether the CPU computes. Other devices hold attention scores, and nothing inside of blocks that are computed again.
    pub on_cpu: bool,
}

/// What text encoder and autoencoder hold beside their weights, in numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Encoding {
    /// For each token of the prompts encoded together.
    pub per_token: u64,
    /// The same with a graph, everything the backward needs kept.
    pub per_token_training: u64,
    /// For each pixel of the pictures encoded together; of a video, of the frames that are in a chunk.
    pub per_pixel: u64,
    /// Floating point operations for each token.
    pub flops_per_token: u64,
    /// Floating point operations for each pixel of a picture that becomes latents. An attention in the middle, which grows
    /// faster than the picture, comes on top.
    pub flops_per_pixel: u64,
}

impl Encoding {
    /// Text encoders that run one after the other; nothing is said of pixels.
    pub(crate) fn in_turn(encoders: impl IntoIterator<Item = Self>) -> Self {
        let none = Self {
            per_token: 0,
            per_token_training: 0,
            per_pixel: 0,
            flops_per_token: 0,
            flops_per_pixel: 0,
        };
        encoders.into_iter().fold(none, |sum, encoder| Self {
            per_token: sum.per_token.max(encoder.per_token),
            per_token_training: sum.per_token_training + encoder.per_token_training,
            flops_per_token: sum.flops_per_token + encoder.flops_per_token,
            ..none
        })
    }

    /// Of a text encoder that gives `tokens` of each `states` that the denoiser reads.
    pub(crate) fn of_part(self, tokens: usize, states: usize) -> Self {
        let part = |of_one: u64| (of_one * tokens as u64).div_ceil(states as u64);
        Self {
            per_token: part(self.per_token),
            per_token_training: part(self.per_token_training),
            flops_per_token: part(self.flops_per_token),
            ..self
        }
    }
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

/// What one evaluation of a denoiser on a batch takes.
pub(crate) struct Evaluation {
    /// Tokens of one picture.
    pub(crate) image_tokens: usize,
    pub(crate) activations: Activations,
    pub(crate) flops: Flops,
}

/// Numbers held beside the weights at the worst moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Activations {
    /// Without a graph, as in drawing.
    pub drawing: u64,
    /// Forward and backward, everything the backward needs kept.
    pub training: u64,
    /// Of [`Activations::training`], what is kept for each evaluation whose backward is yet to come.
    pub graph: u64,
    /// Forward and backward, blocks computed a second time from their inputs and, on the CPU, results that they keep.
    pub checkpointed: u64,
    /// Of [`Activations::checkpointed`], what is kept for each evaluation whose backward is yet to come.
    pub checkpointed_graph: u64,
    /// What an evaluation that is not recorded leaves to its repetition with a graph; the CPU's does.
    pub remembered: u64,
}

/// Sampling steps of which direct distillation keeps something on the way to the picture for the way back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeptSteps {
    /// The last ones, with a graph.
    pub recorded: usize,
    /// Those before them, with the results that are dear for their size; they are evaluated again.
    pub remembered: usize,
}

impl KeptSteps {
    /// What of so many steps is kept.
    pub fn among(self, num_inference_steps: usize) -> Self {
        let recorded = self.recorded.min(num_inference_steps);
        Self { recorded, remembered: self.remembered.min(num_inference_steps - recorded) }
    }
}

impl Activations {
    /// The worst moment of a training step that keeps these sampling steps, each of so many evaluations.
    pub fn of_training(&self, checkpointed: bool, kept: KeptSteps, evaluations: u64) -> u64 {
        let (one, graph) = match checkpointed {
            true => (self.checkpointed, self.checkpointed_graph),
            false => (self.training, self.graph),
        };
        let recorded = evaluations * kept.recorded.max(1) as u64;
        one + (recorded - 1) * graph + evaluations * kept.remembered as u64 * self.remembered
    }
}

/// Floating point operations, a multiplication with its addition being two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Flops {
    /// One evaluation.
    pub forward: u64,
    /// Of it, what is computed again where blocks are: on the CPU convolutions, since the products of projections are kept.
    pub recomputed: u64,
    /// Of it, what an evaluation is spared that remembers the one before it, on the CPU.
    pub remembered: u64,
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
        let kind = kind_of(source)?;
        kind.latent_frames(workload.frames)?;
        let Evaluation { image_tokens, activations, flops } = kind.evaluation(source, workload)?;
        let parameters = Self::counted(source, workload.components)?;
        let trained = match workload.lora_rank {
            Some(rank) => adapters(kind, source, rank)?,
            None => parameters[kind.denoiser()],
        };
        let held = Self::held_by(source, workload.components)?;
        let denoiser = kind.denoiser();
        Ok(Self { image_tokens, parameters, held, denoiser, trained, activations, flops })
    }

    /// What encoding takes with a model; weights need not be there.
    ///
    /// # Errors
    /// As [`Footprint::of`].
    pub fn of_encoding(source: &ModelSource) -> Result<Encoding, ModelError> {
        kind_of(source)?.encoding(source)
    }

    /// Parameters of the components, as [`Footprint::parameters`].
    ///
    /// # Errors
    /// As [`Footprint::of`].
    pub fn counted(
        source: &ModelSource,
        components: Components,
    ) -> Result<BTreeMap<&'static str, u64>, ModelError> {
        sums(kind_of(source)?, source, components, &|_, shape| numbers(shape))
    }

    /// Numbers of the components' weights that stay in memory, as [`Footprint::held`].
    ///
    /// # Errors
    /// As [`Footprint::of`].
    pub fn held_by(
        source: &ModelSource,
        components: Components,
    ) -> Result<BTreeMap<&'static str, u64>, ModelError> {
        let kind = kind_of(source)?;
        sums(kind, source, components, &|key, shape| kind.held(key, shape))
    }

    /// Bytes that a weight of a component takes in memory. Frozen matrices are stored in the number type, and the few
    /// norms and biases among them count as well; what learns stays in f32, and so does the autoencoder.
    pub fn bytes_per_weight(component: &str, dtype: WeightType, learns: bool) -> u64 {
        let stored = if component == AUTOENCODER || learns { WeightType::F32 } else { dtype };
        stored.bytes() as u64
    }

    /// Gradients held at the worst moment: the sum over sampling steps, which each is added to when it is made.
    pub fn gradients(&self) -> u64 {
        self.trained
    }

    /// AdamW's two moments, which are f32 whatever the weights are.
    pub fn moments(&self) -> u64 {
        2 * self.trained
    }
}

impl Flops {
    /// One evaluation with its backward.
    pub fn training_evaluation(&self, checkpointed: bool) -> u64 {
        let recomputed = if checkpointed { self.recomputed } else { 0 };
        self.forward + recomputed + self.backward
    }

    /// One optimiser step of direct distillation: every sampling step is run to get there, those that are not recorded
    /// then once more with a graph, and, where blocks are checkpointed, part of their inside again.
    pub fn distillation_step(&self, num_inference_steps: usize, kept: KeptSteps, checkpointed: bool) -> u64 {
        let KeptSteps { recorded, remembered } = kept.among(num_inference_steps);
        let [steps, repeated] =
            [num_inference_steps, num_inference_steps - recorded].map(|steps| steps as u64);
        steps * self.training_evaluation(checkpointed) + repeated * self.forward
            - remembered as u64 * self.remembered
    }
}

/// What `count` makes of the tensors of each component that has any.
fn sums(
    kind: &dyn Kind,
    source: &ModelSource,
    components: Components,
    count: &dyn Fn(&str, &[usize]) -> u64,
) -> Result<BTreeMap<&'static str, u64>, ModelError> {
    let of = |component: &'static str| {
        let shapes = kind.component_tensors(source, component)?;
        Ok((component, shapes.iter().map(|(key, shape)| count(key, shape)).sum()))
    };
    let counts: Result<BTreeMap<&str, u64>, ModelError> =
        kind.loaded(components).into_iter().map(of).collect();
    Ok(counts?.into_iter().filter(|(_, count)| *count > 0).collect())
}

fn numbers(shape: &[usize]) -> u64 {
    shape.iter().product::<usize>() as u64
}

/// Parameters of adapters on the layers that the peers' recipes give some.
fn adapters(kind: &dyn Kind, source: &ModelSource, rank: usize) -> Result<u64, ModelError> {
    let tensors = kind.component_tensors(source, kind.denoiser())?;
    let of = |(key, shape): (&String, &Vec<usize>)| match (key.strip_suffix(".weight"), shape.as_slice()) {
        (Some(layer), [output, input]) => {
            let chosen = kind.lora_targets().iter().any(|target| lora::matches(layer, target));
            if chosen { (rank * (output + input)) as u64 } else { 0 }
        }
        _ => 0,
    };
    Ok(tensors.iter().map(of).sum())
}
