//! The parts inside the transformer against diffusers (goldens/qwen_image/transformer.safetensors).

use burn::module::Param;
use burn::tensor::Gradients;
use fewstep_kernels::inject;
use fewstep_testkit::{Golden, assert_close, assert_tensors_close, golden, random, values};

use super::*;
use crate::parts::double_stream::ATTENTION;
use crate::{NamedVisitor, visit_named};
use fewstep_kernels::{QkvStream, joint_qkv};

/// Absolute, on states of unit scale; the f32 rounding of the peers was measured at 1.2e-6.
const TOLERANCE: f32 = 1e-5;

/// A golden case with the states before the first block.
struct Case {
    golden: Golden,
    name: &'static str,
    transformer: Transformer,
    condition: Condition,
    sigma: Tensor<1>,
    streams: Streams,
    shared: Shared,
    /// Rows and columns of image tokens.
    tokens: [usize; 2],
}

impl Case {
    fn read(name: &'static str) -> Self {
        let file = Golden::open(golden("qwen_image/transformer.safetensors"));
        let device = Device::flex();
        let transformer =
            Transformer::from_pretrained(&(&golden("qwen_image/model")).into(), &device).unwrap();
        let text: Tensor<3> = file.tensor(&format!("{name}.prompt_embeds"), &device);
        let lengths = vec![text.dims()[1]];
        let condition = Condition::new(text, lengths);
        let sigma = file.tensor::<1>(&format!("{name}.timestep"), &device) / 1000.0;
        let latents = file.shape(&format!("{name}.latents"));
        let tokens = [latents[2] / 2, latents[3] / 2];
        let packed = file.tensor(&format!("{name}.packed"), &device);
        let (streams, shared) = transformer.embed(packed, sigma.clone(), &condition, tokens);
        Self { golden: file, name, transformer, condition, sigma, streams, shared, tokens }
    }

    fn expected<const D: usize>(&self, key: &str) -> Tensor<D> {
        self.golden.tensor(&format!("{}.{key}", self.name), &Device::flex())
    }

    fn check<const D: usize>(&self, found: Tensor<D>, key: &str) {
        assert_tensors_close(found, self.expected(&format!("diffusers.{key}")), TOLERANCE);
    }
}

fn cases() -> [Case; 2] {
    ["sq64", "odd144x80"].map(Case::read)
}

#[test]
fn embeddings_equal_the_peers() {
    for case in cases() {
        let transformer = &case.transformer;
        case.check(transformer.embed_time(case.sigma.clone()), "time_embed");
        case.check(case.streams.image.clone(), "img_in");
        let normed = rms_norm(case.condition.text.clone(), transformer.txt_norm.weight.val(), EPSILON);
        case.check(normed, "txt_norm");
        case.check(case.streams.text.clone(), "txt_in");
    }
}

#[test]
fn modulated_norms_equal_the_peers() {
    for case in cases() {
        let block = &case.transformer.transformer_blocks[0];
        let modulation = block.img_mod.forward(case.shared.time.clone());
        case.check(modulation.clone(), "block0.img_mod");
        case.check(block.txt_mod.forward(case.shared.time.clone()), "block0.txt_mod");
        let plain = norm_modulate(case.streams.image.clone(), modulation.zeros_like(), ATTENTION, EPSILON);
        case.check(plain, "block0.img_norm1");
        let last: Tensor<3> = case.expected("diffusers.block2.image");
        let modulation = case.transformer.norm_out.linear.forward(case.shared.time.clone());
        case.check(norm_modulate(last, modulation, OUTPUT, EPSILON), "norm_out");
    }
}

#[test]
fn joint_attention_equals_the_peers() {
    for case in cases() {
        let block = &case.transformer.transformer_blocks[0];
        let config = &case.transformer.config;
        let normed = |stream: &Tensor<3>, modulation: &Linear| {
            let modulation = modulation.forward(case.shared.time.clone());
            norm_modulate(stream.clone(), modulation, ATTENTION, EPSILON)
        };
        let image = normed(&case.streams.image, &block.img_mod);
        let text = normed(&case.streams.text, &block.txt_mod);
        let heads = |x: Tensor<3>, norm: &Scale| {
            let [batch, tokens, _] = x.dims();
            let (heads, dim) = (config.num_attention_heads, config.attention_head_dim);
            let normed = rms_norm(x.reshape([batch, tokens * heads, dim]), norm.weight.val(), EPSILON);
            normed.reshape([batch, tokens, heads, dim])
        };
        case.check(
            heads(block.attn.to_q.forward(image.clone()), block.attn.norm_q.as_ref().unwrap()),
            "block0.norm_q",
        );
        let key = block.attn.add_k_proj.forward(text.clone());
        case.check(heads(key, block.attn.norm_added_k.as_ref().unwrap()), "block0.norm_added_k");
        let attended = block.attn.attend(Streams { image, text }, &case.shared);
        case.check(block.attn.to_out.forward(attended.image), "block0.attn_out_image");
        case.check(block.attn.to_add_out.as_ref().unwrap().forward(attended.text), "block0.attn_out_text");
    }
}

#[test]
fn rotation_angles_equal_the_peers() {
    for case in cases() {
        let dim = case.transformer.config.attention_head_dim;
        let device = Device::flex();
        // A head of pairs (1, 0) turns into pairs (cos, sin); its RMS norm of 1/√2 is undone by the norm's weight.
        let ones_and_zeros = |tokens: usize| {
            let pairs =
                Tensor::<4>::from_floats([[[[1.0, 0.0]]]], &device).expand([1, tokens, 3 * dim / 2, 2]);
            let norm = Tensor::full([dim], 0.5f32.sqrt(), &device);
            QkvStream { qkv: pairs.reshape([1, tokens, 3 * dim]), norm_q: norm.clone(), norm_k: norm }
        };
        let (text, image) = (case.condition.text.dims()[1], case.tokens[0] * case.tokens[1]);
        let turned = joint_qkv(ones_and_zeros(text), ones_and_zeros(image), 1, &case.shared.rotary, EPSILON);
        let angles = ["cos", "sin"].map(|part| {
            let streams = ["text", "image"].map(|stream| case.expected(&format!("rope_{stream}.{part}")));
            Tensor::<2>::cat(streams.to_vec(), 0)
        });
        let expected = Tensor::stack::<3>(angles.to_vec(), 2).reshape([1, 1, text + image, dim]);
        for part in 0..2 {
            let found = turned.clone().slice_dim(0, part..part + 1).squeeze_dim::<4>(0);
            assert_tensors_close(found, expected.clone(), TOLERANCE);
        }
    }
}

/// The gradients of parameters by name; `None` where one has none.
type ByName = Vec<(String, Option<Vec<f32>>)>;

/// The output at a case's inputs, the gradient by the packed latents, and those by all parameters.
fn gradients(case: &Case, transformer: Transformer) -> (Tensor<3>, Tensor<3>, ByName) {
    struct Read<'a>(&'a Gradients, ByName);
    impl NamedVisitor for Read<'_> {
        fn visit<const D: usize>(&mut self, name: &str, parameter: &Param<Tensor<D>>) {
            self.1.push((name.to_owned(), parameter.val().grad(self.0).map(values)));
        }
    }
    let transformer = transformer.train();
    let packed = case.expected::<3>("packed").autodiff().require_grad();
    let condition = case.condition.clone().autodiff();
    let output = transformer.forward(packed.clone(), case.sigma.clone().autodiff(), &condition, case.tokens);
    let cotangent = random(output.dims(), 1, &Device::flex());
    let gradients = inject(output.clone(), cotangent).backward();
    let mut read = Read(&gradients, Vec::new());
    visit_named(&transformer, &mut read);
    (output.inner(), packed.grad(&gradients).unwrap(), read.1)
}

#[test]
fn recomputed_blocks_have_the_gradients_of_kept_ones() {
    for case in cases() {
        for learns in [true, false] {
            let transformer = case.transformer.clone().set_require_grad(learns);
            let kept = gradients(&case, transformer.clone());
            let mut transformer = transformer;
            *transformer.recomputes_blocks_mut() = true;
            let recomputed = gradients(&case, transformer);
            assert_eq!(values(recomputed.0), values(kept.0));
            let largest = |x: &[f32]| x.iter().fold(0.0_f32, |largest, x| largest.max(x.abs()));
            // The same sums in another order.
            let close = |found: &[f32], expected: &[f32]| {
                assert_close(found, expected, 1e-6 * largest(expected).max(1e-6));
            };
            close(&values(recomputed.1), &values(kept.1));
            assert_eq!(recomputed.2.len(), kept.2.len());
            for ((name, found), (_, expected)) in recomputed.2.iter().zip(&kept.2) {
                match (found, expected) {
                    (Some(found), Some(expected)) => close(found, expected),
                    (None, None) => {}
                    _ => panic!("{name}: only one of the two has a gradient"),
                }
            }
            // The text of the last block leads nowhere.
            let without = kept.2.iter().filter(|(_, gradient)| gradient.is_none()).count();
            assert_eq!(without, if learns { 6 } else { kept.2.len() });
        }
    }
}
