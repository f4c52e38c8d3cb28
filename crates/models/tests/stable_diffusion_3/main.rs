//! Stable Diffusion 3 against numbers of diffusers (goldens/sd3): tokens, text states, transformer, whole pipelines; and
//! what 3.5 adds to its transformer.

#![allow(clippy::unwrap_used)] // Helpers of the tests fail where the tests do.

mod pipeline;

use std::collections::BTreeMap;
use std::path::Path;

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};
use fewstep_models::stable_diffusion_3::Transformer;
use fewstep_models::{
    ClipTokenizer, Condition, Conventions, LoadOptions, Model, ModelSource, NamedVisitor, T5Tokenizer,
    WeightType, visit_named,
};
use fewstep_testkit::{Golden, assert_tensors_close, golden, values};
use serde_json::Value;

/// Absolute, on unit-scale activations; the f32 rounding of the peers was measured at 1.2e-6.
const TOLERANCE: f32 = 1e-5;

/// Tokens that the peer padded T5's rows to.
const T5_TOKENS: usize = 32;
const CLIP_TOKENS: usize = 77;

fn source() -> ModelSource {
    ModelSource::from(&golden("sd3/model"))
}

fn numbers() -> Golden {
    Golden::open(golden("sd3/goldens.safetensors"))
}

fn json() -> Value {
    serde_json::from_str(&std::fs::read_to_string(golden("sd3/goldens.json")).unwrap()).unwrap()
}

fn options(max_prompt_tokens: usize) -> LoadOptions {
    let conventions = Conventions { max_prompt_tokens: Some(max_prompt_tokens), ..Conventions::default() };
    LoadOptions { conventions, ..LoadOptions::default() }
}

fn prompts(json: &Value) -> Vec<String> {
    json["tokens"].as_array().unwrap().iter().map(|row| row["prompt"].as_str().unwrap().to_owned()).collect()
}

/// Within [`TOLERANCE`] of the largest element, or of one if that is smaller.
#[track_caller]
fn assert_relatively_close<const D: usize>(found: Tensor<D>, expected: Tensor<D>) {
    let largest = values(expected.clone()).into_iter().fold(1.0f32, |most, value| most.max(value.abs()));
    assert_tensors_close(found, expected, TOLERANCE * largest);
}

#[test]
fn tokens_of_all_three_encoders_equal_the_peers() {
    let clip = |name: &str| ClipTokenizer::read(golden("sd3/model").join(name)).unwrap();
    let (first, second) = (clip("tokenizer"), clip("tokenizer_2"));
    let t5 = T5Tokenizer::read(golden("sd3/model/tokenizer_3")).unwrap();
    let json = json();
    for (row, prompt) in json["tokens"].as_array().unwrap().iter().zip(prompts(&json)) {
        let ids = |key: &str| -> Vec<u32> {
            row[key].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
        };
        let prompt = [prompt];
        assert_eq!(first.encode(&prompt).unwrap(), [ids("clip")]);
        assert_eq!(second.encode(&prompt).unwrap(), [ids("clip2")]);
        assert_eq!(t5.encode(&prompt, T5_TOKENS).unwrap().ids, [ids("t5")]);
    }
}

#[test]
fn states_of_all_text_encoders_are_joined_as_the_peer_joins_them() {
    let (golden, device) = (numbers(), Device::flex());
    let model = Model::from_pretrained(&source(), &options(T5_TOKENS)).unwrap();
    let prompts = prompts(&json());
    let condition = model.encode_prompts(&prompts).unwrap();
    assert_eq!(condition.lengths, vec![CLIP_TOKENS + T5_TOKENS; prompts.len()]);
    for index in 0..prompts.len() {
        let found = condition.row(index);
        assert_relatively_close(found.text, golden.tensor(&format!("p{index}.text"), &device));
        assert_relatively_close(found.pooled.unwrap(), golden.tensor(&format!("p{index}.pooled"), &device));
    }
    let length = model.prompt_tokens(&prompts[0]).unwrap();
    assert_eq!((length.limit, length.states), (T5_TOKENS, CLIP_TOKENS + T5_TOKENS));
}

fn condition(golden: &Golden, prefix: &str) -> Condition {
    let device = Device::flex();
    let text: Tensor<3> = golden.tensor(&format!("{prefix}text"), &device);
    let [batch, tokens, _] = text.dims();
    Condition::new(text, vec![tokens; batch]).with_pooled(golden.tensor(&format!("{prefix}pooled"), &device))
}

fn transformer(folder: &str) -> Transformer {
    Transformer::from_pretrained(&ModelSource::from(&golden(folder)), WeightType::F32, &Device::flex())
        .unwrap()
}

#[test]
fn velocities_equal_the_peers_at_each_time_and_size() {
    let (golden, device, transformer) = (numbers(), Device::flex(), transformer("sd3/model"));
    for case in 0..2 {
        let of = |name: &str| format!("case{case}.{name}");
        let latents = golden.tensor(&of("latents"), &device);
        let timestep = golden.tensor(&of("timestep"), &device);
        let found = transformer.forward(latents, timestep, &condition(&golden, "p0."));
        assert_relatively_close(found, golden.tensor(&of("out"), &device));
    }
}

#[test]
fn tokens_of_both_streams_equal_the_peers_after_every_block() {
    let (golden, device) = (numbers(), Device::flex());
    let (latents, timestep) =
        (golden.tensor("case0.latents", &device), golden.tensor("case0.timestep", &device));
    let found = transformer("sd3/model").block_states(latents, timestep, &condition(&golden, "p0."));
    assert_states(found, &golden, "case0");
}

/// The last block's text is `None` at the peer.
fn assert_states((states, last): (Vec<[Tensor<3>; 2]>, Tensor<3>), golden: &Golden, prefix: &str) {
    let device = Device::flex();
    assert_eq!(states.len(), 2);
    for (index, [image, text]) in states.into_iter().enumerate() {
        assert_relatively_close(text, golden.tensor(&format!("{prefix}.block{index}.0"), &device));
        assert_relatively_close(image, golden.tensor(&format!("{prefix}.block{index}.1"), &device));
    }
    assert_relatively_close(last, golden.tensor(&format!("{prefix}.block2.1"), &device));
}

#[test]
fn norms_of_queries_and_a_second_attention_give_the_peers_states_and_velocities() {
    let golden = Golden::open(golden("sd3/sd35/goldens.safetensors"));
    let (device, transformer) = (Device::flex(), transformer("sd3/sd35"));
    let of = |name: &str| -> Tensor<4> { golden.tensor(name, &device) };
    let timestep = || golden.tensor("timestep", &device);
    let condition = condition(&golden, "");
    let found = transformer.forward(of("latents"), timestep(), &condition);
    assert_relatively_close(found, of("out"));
    assert_states(transformer.block_states(of("latents"), timestep(), &condition), &golden, "states");
}

/// Gradients of the sum of squared outputs by the parameters' names.
fn gradients(recomputes_blocks: bool) -> BTreeMap<String, Vec<f32>> {
    let golden = Golden::open(golden("sd3/sd35/goldens.safetensors"));
    let device = Device::flex();
    let mut plain = transformer("sd3/sd35");
    *plain.recomputes_blocks_mut() = recomputes_blocks;
    let transformer = plain.train();
    let latents: Tensor<4> = golden.tensor("latents", &device);
    let timestep: Tensor<1> = golden.tensor("timestep", &device);
    let condition = condition(&golden, "").autodiff();
    let output = transformer.forward(latents.autodiff(), timestep.autodiff(), &condition);
    let mut found = Gradients(&output.square().sum().backward(), BTreeMap::new());
    visit_named(&transformer, &mut found);
    found.1
}

struct Gradients<'a>(&'a burn::tensor::Gradients, BTreeMap<String, Vec<f32>>);

impl NamedVisitor for Gradients<'_> {
    fn visit<const D: usize>(&mut self, name: &str, parameter: &Param<Tensor<D>>) {
        if let Some(gradient) = parameter.val().grad(self.0) {
            self.1.insert(name.to_owned(), values(gradient));
        }
    }
}

#[test]
fn gradients_of_what_only_this_family_has_equal_the_peers_recomputed_or_not() {
    let golden = Golden::open(golden("sd3/sd35/goldens.safetensors"));
    for found in [gradients(false), gradients(true)] {
        for (name, key) in [
            ("transformer_blocks.0.attn2.to_k.weight", "transformer_blocks.0.attn2.to_k.weight"),
            ("transformer_blocks.0.attn2.norm_q.weight", "transformer_blocks.0.attn2.norm_q.weight"),
            ("transformer_blocks.0.img_mod.weight", "transformer_blocks.0.norm1.linear.weight"),
            (
                "transformer_blocks.1.attn.norm_added_k.weight",
                "transformer_blocks.1.attn.norm_added_k.weight",
            ),
            ("transformer_blocks.2.attn2.to_out.bias", "transformer_blocks.2.attn2.to_out.0.bias"),
            ("transformer_blocks.2.txt_mod.weight", "transformer_blocks.2.norm1_context.linear.weight"),
            ("pos_embed.proj.weight", "pos_embed.proj.weight"),
            ("context_embedder.weight", "context_embedder.weight"),
        ] {
            assert_norm_close(&found[name], &golden.f32s(&format!("grad.{key}")), name);
        }
        assert!(!found.contains_key("pos_embed.pos_embed"), "places are not learned");
    }
}

/// Within 1e-5 of the tensor's norm.
#[track_caller]
fn assert_norm_close(found: &[f32], expected: &[f32], name: &str) {
    assert_eq!(found.len(), expected.len(), "{name}");
    let norm = |values: &mut dyn Iterator<Item = f32>| {
        values.map(|value| f64::from(value).powi(2)).sum::<f64>().sqrt()
    };
    let apart = norm(&mut found.iter().zip(expected).map(|(found, expected)| found - expected));
    let whole = norm(&mut expected.iter().copied());
    assert!(apart <= 1e-5 * whole, "{name}: {apart:e} of {whole:e}");
}

/// A copy of the golden folder whose list of components names none for `component`.
fn without(component: &str, folder: &Path) {
    fewstep_testkit::copy_folder(&golden("sd3/model"), folder, &|path| {
        !path.to_string_lossy().contains(component)
    });
    std::fs::remove_dir(folder.join(component)).unwrap();
    let index = folder.join("model_index.json");
    let mut json: Value = serde_json::from_str(&std::fs::read_to_string(&index).unwrap()).unwrap();
    json[component] = serde_json::json!([null, null]);
    std::fs::write(&index, json.to_string()).unwrap();
}
