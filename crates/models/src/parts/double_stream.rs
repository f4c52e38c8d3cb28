//! The block of a double-stream transformer (MMDiT): image and text tokens have their own weights and meet in one
//! attention. Stable Diffusion 3, where it comes from (arXiv 2403.03206), Qwen-Image and FLUX are made of it; their files
//! call its parts differently.

mod attention;

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};
use fewstep_kernels::{
    Gelu, KeyMask, Modulation, RotaryTable, gated_residual, gelu, norm_modulate, recomputed_outputs,
};

use self::attention::{JointAttention, OwnAttention};
use crate::Condition;
use crate::parts::linear::Linear;
use crate::weights::{KeyMap, unfilled};

/// How most of diffusers' models call a block's parts.
pub(crate) const KEYS: KeyMap = KeyMap {
    rules: &[
        (".img_mod.", ".norm1.linear."),
        (".txt_mod.", ".norm1_context.linear."),
        (".img_mlp.up.", ".ff.net.0.proj."),
        (".img_mlp.down.", ".ff.net.2."),
        (".txt_mlp.up.", ".ff_context.net.0.proj."),
        (".txt_mlp.down.", ".ff_context.net.2."),
        (".to_out.", ".to_out.0."),
    ],
    ..KeyMap::PLAIN
};

/// Of all norms.
pub(crate) const EPSILON: f32 = 1e-6;

/// Chunks of a stream's modulation, in the order of the projection's output.
pub(crate) const ATTENTION: Modulation = Modulation { shift: 0, scale: 1 };
const ATTENTION_GATE: usize = 2;
const MLP: Modulation = Modulation { shift: 3, scale: 4 };
const MLP_GATE: usize = 5;
/// Of the image's attention to itself.
const OWN_ATTENTION: Modulation = Modulation { shift: 6, scale: 7 };
const OWN_ATTENTION_GATE: usize = 8;
/// The modulation after the last block, and of text that ends in a block, has its scale first.
pub(crate) const OUTPUT: Modulation = Modulation { shift: 1, scale: 0 };

/// K heads of E numbers each.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Heads {
    /// K.
    pub(crate) count: usize,
    /// E.
    pub(crate) dim: usize,
}

impl Heads {
    /// D.
    pub(crate) fn width(self) -> usize {
        self.count * self.dim
    }
}

/// What a block may leave out, and have beside.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    pub(crate) heads: Heads,
    pub(crate) qk_norm: QkNorm,
    pub(crate) text: TextStream,
    pub(crate) image: ImageAttention,
}

/// What happens to queries and keys, head by head, before they meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum QkNorm {
    /// An RMS norm, and then the rotation by their places.
    Rms,
    /// Nothing: there are no rotary positions either.
    Absent,
}

/// What becomes of the text in a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TextStream {
    /// The next block reads it.
    GoesOn,
    /// It is attended to for the last time.
    Ends,
}

/// What the image attends to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ImageAttention {
    /// Both streams.
    Joint,
    /// Both streams, and itself once more (the dual attention of Stable Diffusion 3.5, which has no rotary positions).
    JointAndOwn,
}

/// The weight of an RMS norm.
#[derive(Module, Debug)]
pub(crate) struct Scale {
    pub(crate) weight: Param<Tensor<1>>,
}

/// Joint attention, then an MLP per stream, each modulated and gated by the time.
#[derive(Module, Debug)]
pub(crate) struct Block {
    pub(crate) img_mod: Linear,
    pub(crate) txt_mod: Linear,
    pub(crate) attn: JointAttention,
    /// Of the image alone, in blocks of [`ImageAttention::JointAndOwn`].
    attn2: Option<OwnAttention>,
    img_mlp: Mlp,
    /// Absent where the text ends.
    txt_mlp: Option<Mlp>,
}

#[derive(Module, Debug)]
struct Mlp {
    up: Linear,
    down: Linear,
}

/// The two streams, `[B, N, D]` and `[B, S, D]`.
pub(crate) struct Streams {
    pub(crate) image: Tensor<3>,
    pub(crate) text: Tensor<3>,
}

/// The modulations of the two streams, `[B, 6 D]` each in the usual block.
struct Modulations {
    image: Tensor<2>,
    text: Tensor<2>,
}

/// What every block of one evaluation shares.
#[derive(Clone)]
pub(crate) struct Shared {
    /// SiLU of the time embedding, `[B, D]`.
    pub(crate) time: Tensor<2>,
    pub(crate) rotary: RotaryTable,
    pub(crate) keys: Option<KeyMask>,
    pub(crate) gelu: Gelu,
    /// K.
    pub(crate) heads: usize,
    /// Backward passes compute the inside of each block again instead of keeping it.
    pub(crate) recomputes: bool,
}

impl Shared {
    /// Whether blocks are to be recomputed: without a graph there is nothing to keep.
    pub(crate) fn recomputes_now(&self) -> bool {
        self.recomputes && self.time.device().is_autodiff()
    }

    /// The time as an input of a recomputed block, `[B, 1, D]`, and the rest without it: a graph that ends outside of the
    /// block's node must not be held by it.
    pub(crate) fn apart(&self) -> (Tensor<3>, Self) {
        let time = self.time.clone().unsqueeze_dim(1);
        (time, Self { time: self.time.clone().inner(), ..self.clone() })
    }

    /// The same with a time that was an input.
    pub(crate) fn at(&self, time: Tensor<3>) -> Self {
        Self { time: time.squeeze_dim(1), ..self.clone() }
    }
}

/// Hides padded text tokens; `None` where there are none.
pub(crate) fn key_mask(condition: &Condition, image_tokens: usize) -> Option<KeyMask> {
    let tokens = condition.text.dims()[1];
    let padded = condition.lengths.iter().any(|length| *length < tokens);
    padded.then(|| KeyMask::from_lengths(&condition.lengths, tokens, image_tokens))
}

impl Scale {
    pub(crate) fn unfilled(width: usize, device: &Device) -> Self {
        Self { weight: unfilled([width], device) }
    }
}

impl Layout {
    /// The usual block.
    pub(crate) fn whole(heads: Heads) -> Self {
        Self { heads, qk_norm: QkNorm::Rms, text: TextStream::GoesOn, image: ImageAttention::Joint }
    }

    fn norm(&self, device: &Device) -> Option<Scale> {
        (self.qk_norm == QkNorm::Rms).then(|| Scale::unfilled(self.heads.dim, device))
    }
}

impl Block {
    /// The usual block.
    pub(crate) fn unfilled(heads: Heads, device: &Device) -> Self {
        Self::unfilled_as(&Layout::whole(heads), device)
    }

    pub(crate) fn unfilled_as(layout: &Layout, device: &Device) -> Self {
        let width = layout.heads.width();
        let (goes_on, own) = (layout.text == TextStream::GoesOn, layout.image == ImageAttention::JointAndOwn);
        let modulation = |chunks| Linear::unfilled(width, chunks * width, true, device);
        Self {
            img_mod: modulation(if own { 9 } else { 6 }),
            txt_mod: modulation(if goes_on { 6 } else { 2 }),
            attn: JointAttention::unfilled(layout, device),
            attn2: own.then(|| OwnAttention::unfilled(layout, device)),
            img_mlp: Mlp::unfilled(width, device),
            txt_mlp: goes_on.then(|| Mlp::unfilled(width, device)),
        }
    }

    /// Its projections by their names here, in the order of `names`.
    pub(crate) fn linears<const N: usize>(
        &mut self,
        names: [&'static str; N],
    ) -> Vec<(&'static str, &mut Linear)> {
        let attn = &mut self.attn;
        let mut all = vec![
            ("img_mod", &mut self.img_mod),
            ("attn.to_q", &mut attn.to_q),
            ("attn.to_k", &mut attn.to_k),
            ("attn.to_v", &mut attn.to_v),
            ("attn.add_q_proj", &mut attn.add_q_proj),
            ("attn.add_k_proj", &mut attn.add_k_proj),
            ("attn.add_v_proj", &mut attn.add_v_proj),
            ("attn.to_out", &mut attn.to_out),
            ("img_mlp.up", &mut self.img_mlp.up),
            ("img_mlp.down", &mut self.img_mlp.down),
            ("txt_mod", &mut self.txt_mod),
        ];
        all.extend(attn.to_add_out.as_mut().map(|linear| ("attn.to_add_out", linear)));
        if let Some(mlp) = &mut self.txt_mlp {
            all.extend([("txt_mlp.up", &mut mlp.up), ("txt_mlp.down", &mut mlp.down)]);
        }
        all.extend(self.attn2.iter_mut().flat_map(OwnAttention::linears));
        all.sort_by_key(|(name, _)| names.iter().position(|at| at == name).expect("names has all of them"));
        all
    }

    pub(crate) fn forward(&self, streams: Streams, shared: &Shared) -> Streams {
        if !shared.recomputes_now() {
            return self.kept(streams, shared);
        }
        let [image, text] = self.recomputed(streams, shared, |block, streams, shared| {
            let Streams { image, text } = block.kept(streams, shared);
            [image, text]
        });
        Streams { image, text }
    }

    /// The image after a last block: nothing reads its text any more.
    pub(crate) fn forward_image(&self, streams: Streams, shared: &Shared) -> Tensor<3> {
        if !shared.recomputes_now() {
            return self.kept_image(streams, shared);
        }
        let [image] =
            self.recomputed(streams, shared, |block, streams, shared| [block.kept_image(streams, shared)]);
        image
    }

    fn kept(&self, streams: Streams, shared: &Shared) -> Streams {
        let (attended, modulations) = self.attend(&streams, shared);
        Streams {
            image: self.image_after(streams.image, attended.image, modulations.image, shared),
            text: self.text_after(streams.text, attended.text, modulations.text, shared),
        }
    }

    fn kept_image(&self, streams: Streams, shared: &Shared) -> Tensor<3> {
        let (attended, modulations) = self.attend(&streams, shared);
        self.image_after(streams.image, attended.image, modulations.image, shared)
    }

    fn recomputed<const K: usize>(
        &self,
        streams: Streams,
        shared: &Shared,
        forward: fn(&Self, Streams, &Shared) -> [Tensor<3>; K],
    ) -> [Tensor<3>; K] {
        let (time, shared) = shared.apart();
        recomputed_outputs(self, [streams.image, streams.text, time], move |block, [image, text, time]| {
            forward(block, Streams { image, text }, &shared.at(time))
        })
    }

    /// What both streams attend to, and their modulations.
    fn attend(&self, streams: &Streams, shared: &Shared) -> (Streams, Modulations) {
        let image = self.img_mod.forward(shared.time.clone());
        let text = self.txt_mod.forward(shared.time.clone());
        let normed = Streams {
            image: norm_modulate(streams.image.clone(), image.clone(), ATTENTION, EPSILON),
            text: norm_modulate(streams.text.clone(), text.clone(), self.text_modulation(), EPSILON),
        };
        (self.attn.attend(normed, shared), Modulations { image, text })
    }

    fn text_modulation(&self) -> Modulation {
        if self.txt_mlp.is_some() { ATTENTION } else { OUTPUT }
    }

    /// The rest of the image's stream: the attentions' projections and the MLP, each gated into the residual.
    fn image_after(
        &self,
        x: Tensor<3>,
        attended: Tensor<3>,
        modulation: Tensor<2>,
        shared: &Shared,
    ) -> Tensor<3> {
        let own = self.attn2.as_ref().map(|attention| {
            let normed = norm_modulate(x.clone(), modulation.clone(), OWN_ATTENTION, EPSILON);
            attention.forward(normed, shared.heads)
        });
        let x = gated_residual(x, self.attn.to_out.forward(attended), modulation.clone(), ATTENTION_GATE);
        let x = match own {
            Some(update) => gated_residual(x, update, modulation.clone(), OWN_ATTENTION_GATE),
            None => x,
        };
        self.img_mlp.forward(x, modulation, shared.gelu)
    }

    /// The same of the text, where it goes on.
    fn text_after(
        &self,
        x: Tensor<3>,
        attended: Tensor<3>,
        modulation: Tensor<2>,
        shared: &Shared,
    ) -> Tensor<3> {
        let (Some(projection), Some(mlp)) = (&self.attn.to_add_out, &self.txt_mlp) else {
            panic!("after a block in which the text ends, there is none")
        };
        let x = gated_residual(x, projection.forward(attended), modulation.clone(), ATTENTION_GATE);
        mlp.forward(x, modulation, shared.gelu)
    }
}

impl Mlp {
    fn unfilled(width: usize, device: &Device) -> Self {
        Self {
            up: Linear::unfilled(width, 4 * width, true, device),
            down: Linear::unfilled(4 * width, width, true, device),
        }
    }

    /// The modulated, gated MLP with its residual.
    fn forward(&self, x: Tensor<3>, modulation: Tensor<2>, kind: Gelu) -> Tensor<3> {
        let hidden = self.up.forward(norm_modulate(x.clone(), modulation.clone(), MLP, EPSILON));
        gated_residual(x, self.down.forward(gelu(hidden, kind)), modulation, MLP_GATE)
    }
}
