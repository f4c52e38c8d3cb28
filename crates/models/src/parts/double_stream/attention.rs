//! The attentions of a double-stream block: of both streams together, and of the image alone.

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use fewstep_kernels::{
    AttentionOptions, QkvStream, attention, joint_qkv, linear_concat, rms_norm, split_tokens,
};

use super::{EPSILON, Layout, Scale, Shared, Streams, TextStream};
use crate::parts::attention::by_heads;
use crate::parts::linear::Linear;

#[derive(Module, Debug)]
pub(crate) struct JointAttention {
    pub(crate) to_q: Linear,
    pub(super) to_k: Linear,
    pub(super) to_v: Linear,
    pub(crate) to_out: Linear,
    pub(super) add_q_proj: Linear,
    pub(crate) add_k_proj: Linear,
    pub(super) add_v_proj: Linear,
    /// Absent where the text ends.
    pub(crate) to_add_out: Option<Linear>,
    /// This and the other norms: absent in [`super::QkNorm::Absent`].
    pub(crate) norm_q: Option<Scale>,
    norm_k: Option<Scale>,
    norm_added_q: Option<Scale>,
    pub(crate) norm_added_k: Option<Scale>,
}

#[derive(Module, Debug)]
pub(super) struct OwnAttention {
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
    norm_q: Option<Scale>,
    norm_k: Option<Scale>,
}

impl JointAttention {
    pub(super) fn unfilled(layout: &Layout, device: &Device) -> Self {
        let width = layout.heads.width();
        let square = || Linear::unfilled(width, width, true, device);
        let norm = || layout.norm(device);
        Self {
            to_q: square(),
            to_k: square(),
            to_v: square(),
            to_out: square(),
            add_q_proj: square(),
            add_k_proj: square(),
            add_v_proj: square(),
            to_add_out: (layout.text == TextStream::GoesOn).then(square),
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
        let qkv = self.join(linear_concat(streams.text, text), linear_concat(streams.image, image), shared);
        let joint = attention(qkv, AttentionOptions { keys: shared.keys.clone(), causal: false }); // [B, S + N, D]
        Streams {
            text: split_tokens(joint.clone(), 0..text_tokens),
            image: split_tokens(joint, text_tokens..text_tokens + image_tokens),
        }
    }

    /// Joins query, key and value of both streams by heads, `[3, B, K, S + N, E]`.
    fn join(&self, text: Tensor<3>, image: Tensor<3>, shared: &Shared) -> Tensor<5> {
        let norms = (&self.norm_added_q, &self.norm_added_k, &self.norm_q, &self.norm_k);
        let (Some(text_q), Some(text_k), Some(image_q), Some(image_k)) = norms else {
            return by_heads(Tensor::cat(vec![text, image], 1), shared.heads);
        };
        let stream = |qkv, norm_q: &Scale, norm_k: &Scale| QkvStream {
            qkv,
            norm_q: norm_q.weight.val(),
            norm_k: norm_k.weight.val(),
        };
        let (text, image) = (stream(text, text_q, text_k), stream(image, image_q, image_k));
        joint_qkv(text, image, shared.heads, &shared.rotary, EPSILON)
    }
}

impl OwnAttention {
    pub(super) fn unfilled(layout: &Layout, device: &Device) -> Self {
        let width = layout.heads.width();
        let square = || Linear::unfilled(width, width, true, device);
        Self {
            to_q: square(),
            to_k: square(),
            to_v: square(),
            to_out: square(),
            norm_q: layout.norm(device),
            norm_k: layout.norm(device),
        }
    }

    pub(super) fn linears(&mut self) -> [(&'static str, &mut Linear); 4] {
        [
            ("attn2.to_q", &mut self.to_q),
            ("attn2.to_k", &mut self.to_k),
            ("attn2.to_v", &mut self.to_v),
            ("attn2.to_out", &mut self.to_out),
        ]
    }

    /// `[B, N, D]` to `[B, N, D]`.
    pub(super) fn forward(&self, x: Tensor<3>, heads: usize) -> Tensor<3> {
        let projections = [&self.to_q, &self.to_k, &self.to_v].map(Linear::projection);
        let qkv = by_heads(linear_concat(x, projections), heads);
        let qkv = match (&self.norm_q, &self.norm_k) {
            (Some(norm_q), Some(norm_k)) => {
                let normed =
                    |at, norm: &Scale| rms_norm(qkv.clone().narrow(0, at, 1), norm.weight.val(), EPSILON);
                let (query, key) = (normed(0, norm_q), normed(1, norm_k));
                Tensor::cat(vec![query, key, qkv.narrow(0, 2, 1)], 0)
            }
            _ => qkv,
        };
        self.to_out.forward(attention(qkv, AttentionOptions::default()))
    }
}
