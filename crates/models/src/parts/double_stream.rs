//! The block of a double-stream transformer (MMDiT): image and text tokens have their own weights and meet in one
//! attention. Qwen-Image and FLUX are made of it; their files call its parts differently.

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};
use fewstep_kernels::{
    AttentionOptions, Gelu, KeyMask, Modulation, QkvStream, RotaryTable, attention, gated_residual, gelu,
    joint_qkv, linear_concat, norm_modulate, recomputed, split_tokens,
};

use crate::Condition;
use crate::parts::linear::Linear;
use crate::weights::unfilled;

/// Of all norms.
pub(crate) const EPSILON: f32 = 1e-6;

/// Chunks of a stream's modulation, in the order of the projection's output.
pub(crate) const ATTENTION: Modulation = Modulation { shift: 0, scale: 1 };
const ATTENTION_GATE: usize = 2;
const MLP: Modulation = Modulation { shift: 3, scale: 4 };
const MLP_GATE: usize = 5;
/// The modulation after the last block has its scale first.
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
    img_mlp: Mlp,
    txt_mlp: Mlp,
}

#[derive(Module, Debug)]
pub(crate) struct JointAttention {
    pub(crate) to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    pub(crate) to_out: Linear,
    add_q_proj: Linear,
    pub(crate) add_k_proj: Linear,
    add_v_proj: Linear,
    pub(crate) to_add_out: Linear,
    pub(crate) norm_q: Scale,
    norm_k: Scale,
    norm_added_q: Scale,
    pub(crate) norm_added_k: Scale,
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

/// The modulations of the two streams, `[B, 6 D]` each.
struct Modulations {
    image: Tensor<2>,
    text: Tensor<2>,
}

/// One of the two streams.
#[derive(Clone, Copy)]
enum Side {
    Image,
    Text,
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

impl Block {
    pub(crate) fn unfilled(heads: Heads, device: &Device) -> Self {
        let width = heads.width();
        Self {
            img_mod: Linear::unfilled(width, 6 * width, true, device),
            txt_mod: Linear::unfilled(width, 6 * width, true, device),
            attn: JointAttention::unfilled(heads, device),
            img_mlp: Mlp::unfilled(width, device),
            txt_mlp: Mlp::unfilled(width, device),
        }
    }

    /// Its projections by their names here, in the order of `names`.
    pub(crate) fn linears(&mut self, names: [&'static str; 14]) -> Vec<(&'static str, &mut Linear)> {
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
            ("attn.to_add_out", &mut attn.to_add_out),
            ("img_mlp.up", &mut self.img_mlp.up),
            ("img_mlp.down", &mut self.img_mlp.down),
            ("txt_mod", &mut self.txt_mod),
            ("txt_mlp.up", &mut self.txt_mlp.up),
            ("txt_mlp.down", &mut self.txt_mlp.down),
        ];
        all.sort_by_key(|(name, _)| names.iter().position(|at| at == name).expect("names has all of them"));
        all
    }

    pub(crate) fn forward(&self, streams: Streams, shared: &Shared) -> Streams {
        if !shared.recomputes_now() {
            return self.kept(streams, shared);
        }
        let (text, image) = (streams.text.dims()[1], streams.image.dims()[1]);
        let joint = self.recomputed(streams, shared, |block, streams, shared| {
            let Streams { image, text } = block.kept(streams, shared);
            Tensor::cat(vec![text, image], 1)
        }); // [B, S + N, D]
        Streams { text: split_tokens(joint.clone(), 0..text), image: split_tokens(joint, text..text + image) }
    }

    /// The image after a last block: nothing reads its text any more.
    pub(crate) fn forward_image(&self, streams: Streams, shared: &Shared) -> Tensor<3> {
        match shared.recomputes_now() {
            true => self.recomputed(streams, shared, Self::kept_image),
            false => self.kept_image(streams, shared),
        }
    }

    fn kept(&self, streams: Streams, shared: &Shared) -> Streams {
        let (attended, modulations) = self.attend(&streams, shared);
        Streams {
            image: self.after_attention(
                Side::Image,
                streams.image,
                attended.image,
                modulations.image,
                shared,
            ),
            text: self.after_attention(Side::Text, streams.text, attended.text, modulations.text, shared),
        }
    }

    fn kept_image(&self, streams: Streams, shared: &Shared) -> Tensor<3> {
        let (attended, modulations) = self.attend(&streams, shared);
        self.after_attention(Side::Image, streams.image, attended.image, modulations.image, shared)
    }

    fn recomputed(
        &self,
        streams: Streams,
        shared: &Shared,
        forward: fn(&Self, Streams, &Shared) -> Tensor<3>,
    ) -> Tensor<3> {
        let (time, shared) = shared.apart();
        recomputed(self, [streams.image, streams.text, time], move |block, [image, text, time]| {
            forward(block, Streams { image, text }, &shared.at(time))
        })
    }

    /// What both streams attend to, and their modulations.
    fn attend(&self, streams: &Streams, shared: &Shared) -> (Streams, Modulations) {
        let image = self.img_mod.forward(shared.time.clone());
        let text = self.txt_mod.forward(shared.time.clone());
        let normed = Streams {
            image: norm_modulate(streams.image.clone(), image.clone(), ATTENTION, EPSILON),
            text: norm_modulate(streams.text.clone(), text.clone(), ATTENTION, EPSILON),
        };
        (self.attn.attend(normed, shared), Modulations { image, text })
    }

    /// The rest of one stream: the attention's projection and the MLP, each gated into the residual.
    fn after_attention(
        &self,
        side: Side,
        x: Tensor<3>,
        attended: Tensor<3>,
        modulation: Tensor<2>,
        shared: &Shared,
    ) -> Tensor<3> {
        let (projection, mlp) = match side {
            Side::Image => (&self.attn.to_out, &self.img_mlp),
            Side::Text => (&self.attn.to_add_out, &self.txt_mlp),
        };
        let x = gated_residual(x, projection.forward(attended), modulation.clone(), ATTENTION_GATE);
        mlp.forward(x, modulation, shared.gelu)
    }
}

impl JointAttention {
    fn unfilled(heads: Heads, device: &Device) -> Self {
        let square = || Linear::unfilled(heads.width(), heads.width(), true, device);
        let norm = || Scale::unfilled(heads.dim, device);
        Self {
            to_q: square(),
            to_k: square(),
            to_v: square(),
            to_out: square(),
            add_q_proj: square(),
            add_k_proj: square(),
            add_v_proj: square(),
            to_add_out: square(),
            norm_q: norm(),
            norm_k: norm(),
            norm_added_q: norm(),
            norm_added_k: norm(),
        }
    }

    /// Attends over [text, image]; the streams are still to be projected.
    pub(crate) fn attend(&self, streams: Streams, shared: &Shared) -> Streams {
        let (text_tokens, image_tokens) = (streams.text.dims()[1], streams.image.dims()[1]);
        let image = [&self.to_q, &self.to_k, &self.to_v].map(Linear::projection);
        let text = [&self.add_q_proj, &self.add_k_proj, &self.add_v_proj].map(Linear::projection);
        let qkv = joint_qkv(
            QkvStream {
                qkv: linear_concat(streams.text, text),
                norm_q: self.norm_added_q.weight.val(),
                norm_k: self.norm_added_k.weight.val(),
            },
            QkvStream {
                qkv: linear_concat(streams.image, image),
                norm_q: self.norm_q.weight.val(),
                norm_k: self.norm_k.weight.val(),
            },
            shared.heads,
            &shared.rotary,
            EPSILON,
        ); // [3, B, K, S + N, E]
        let joint = attention(qkv, AttentionOptions { keys: shared.keys.clone(), causal: false }); // [B, S + N, D]
        Streams {
            text: split_tokens(joint.clone(), 0..text_tokens),
            image: split_tokens(joint, text_tokens..text_tokens + image_tokens),
        }
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
