//! The Qwen-Image components against numbers of diffusers and DiffSynth-Studio (goldens/qwen_image).

mod hostile;
mod loading;
mod shapes;
mod vae;

use std::path::Path;

use burn::tensor::{Device, Tensor, TensorData};
use fewstep_kernels::Gelu;
use fewstep_models::qwen_image::{PromptTokenizer, TextEncoder, Transformer};
use fewstep_models::{Condition, ModelError, ModelSource};
use fewstep_testkit::{Golden, assert_close, assert_tensors_close, copy_folder, golden, values};

/// Absolute, on unit-scale activations; the f32 rounding of the peers was measured at 1.2e-6.
const TOLERANCE: f32 = 1e-5;

/// More than any golden prompt has.
const MAX_TOKENS: usize = 1024;

fn folder() -> std::path::PathBuf {
    golden("qwen_image/model")
}

fn source() -> ModelSource {
    ModelSource::from(&folder())
}

/// The golden model in a folder that may be changed.
fn model_copy() -> tempfile::TempDir {
    let target = tempfile::tempdir().expect("temporary folder");
    copy_folder(&folder(), target.path(), &|_| true);
    target
}

fn edit_json(path: &Path, edit: impl FnOnce(&mut serde_json::Value)) {
    let mut json = serde_json::from_str(&std::fs::read_to_string(path).expect("read")).expect("JSON");
    edit(&mut json);
    std::fs::write(path, json.to_string()).expect("write");
}

/// What the golden case `name` feeds the transformer.
struct Input {
    transformer: Transformer,
    packed: Tensor<3>,
    sigma: Tensor<1>,
    condition: Condition,
    /// Rows and columns of image tokens.
    tokens: [usize; 2],
}

impl Input {
    fn read(name: &str, golden: &Golden) -> Self {
        let device = Device::flex();
        let text: Tensor<3> = golden.tensor(&format!("{name}.prompt_embeds"), &device);
        let latents = golden.shape(&format!("{name}.latents"));
        let lengths = match golden.keys().contains(&format!("{name}.mask")) {
            true => {
                let mask = golden.i64s(&format!("{name}.mask"));
                mask.chunks_exact(text.dims()[1]).map(|row| row.iter().sum::<i64>() as usize).collect()
            }
            false => vec![text.dims()[1]; latents[0]],
        };
        Self {
            transformer: Transformer::from_pretrained(&source(), &device).expect("the golden model loads"),
            packed: pack(golden.tensor(&format!("{name}.latents"), &device)),
            sigma: golden.tensor::<1>(&format!("{name}.timestep"), &device) / 1000.0,
            condition: Condition::new(text, lengths),
            tokens: [latents[2] / 2, latents[3] / 2],
        }
    }
}

/// Within [`TOLERANCE`] of the largest element, or of one if that is smaller.
#[track_caller]
fn assert_relatively_close<const D: usize>(found: Tensor<D>, expected: Tensor<D>) {
    let largest = values(expected.clone()).into_iter().fold(1.0f32, |most, value| most.max(value.abs()));
    assert_tensors_close(found, expected, TOLERANCE * largest);
}

/// Velocity of the golden case `name`, packed.
fn velocity(name: &str, golden: &Golden) -> Tensor<3> {
    let input = Input::read(name, golden);
    input.transformer.forward(input.packed, input.sigma, &input.condition, input.tokens)
}

/// 2×2 patches, channel-major, written here a second time so that the crate's packing is checked.
fn pack(latents: Tensor<4>) -> Tensor<3> {
    let [batch, channels, height, width] = latents.dims();
    let source = values(latents.clone());
    let mut packed = Vec::with_capacity(source.len());
    for b in 0..batch {
        for (row, column) in (0..height / 2).flat_map(|row| (0..width / 2).map(move |column| (row, column))) {
            for c in 0..channels {
                for (i, j) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                    let index = ((b * channels + c) * height + 2 * row + i) * width + 2 * column + j;
                    packed.push(source[index]);
                }
            }
        }
    }
    let shape = [batch, height * width / 4, channels * 4];
    Tensor::from_data(TensorData::new(packed, shape), &latents.device())
}

#[test]
fn transformer_equals_the_peer_on_square_wide_and_odd_latents() {
    let golden = Golden::open(golden("qwen_image/transformer.safetensors"));
    for case in ["sq64", "w96", "odd144x80"] {
        let expected: Tensor<3> = golden.tensor(&format!("{case}.diffusers_out_packed"), &Device::flex());
        let found = velocity(case, &golden);
        assert_tensors_close(found.clone(), expected, TOLERANCE);
        let expected = golden.tensor(&format!("{case}.diffsynth_tanh_out"), &Device::flex());
        assert_tensors_close(found, pack(expected), TOLERANCE);
    }
}

#[test]
fn transformer_with_the_sigmoid_gelu_equals_the_peer_that_ships_it() {
    let golden = Golden::open(golden("qwen_image/transformer.safetensors"));
    for case in ["sq64", "w96", "odd144x80"] {
        let input = Input::read(case, &golden);
        let transformer = input.transformer.with_gelu(Gelu::Sigmoid);
        let found = transformer.forward(input.packed, input.sigma, &input.condition, input.tokens);
        let expected = golden.tensor(&format!("{case}.diffsynth_out"), &Device::flex());
        assert_tensors_close(found, pack(expected), TOLERANCE);
    }
}

#[test]
fn every_block_equals_the_peers() {
    let golden = Golden::open(golden("qwen_image/transformer.safetensors"));
    let recorded = [
        ("sq64", "diffusers", Gelu::Tanh),
        ("odd144x80", "diffusers", Gelu::Tanh),
        ("sq64", "diffsynth", Gelu::Sigmoid),
    ];
    for (case, peer, gelu) in recorded {
        let input = Input::read(case, &golden);
        let transformer = input.transformer.with_gelu(gelu);
        let states = transformer.block_states(input.packed, input.sigma, &input.condition, input.tokens);
        assert_eq!(states.len(), 3);
        for (block, [image, text]) in states.into_iter().enumerate() {
            for (stream, found) in [("image", image), ("text", text)] {
                let expected =
                    golden.tensor(&format!("{case}.{peer}.block{block}.{stream}"), &Device::flex());
                // The residual streams grow to a few tens.
                assert_relatively_close(found, expected);
            }
        }
    }
}

#[test]
fn transformer_equals_the_peer_on_a_batch_with_padded_prompts() {
    let golden = Golden::open(golden("qwen_image/transformer.safetensors"));
    let expected: Tensor<3> = golden.tensor("batch2.diffusers_out_packed", &Device::flex());
    assert_tensors_close(velocity("batch2", &golden), expected, TOLERANCE);
}

#[test]
fn tokenizer_gives_the_peers_ids() {
    let text = std::fs::read_to_string(golden("qwen_image/tokens.json")).expect("golden is there");
    let json: serde_json::Value = serde_json::from_str(&text).expect("golden is JSON");
    let tokenizer = PromptTokenizer::read(&source(), MAX_TOKENS).expect("the golden tokenizer loads");
    for row in json["rows"].as_array().expect("rows") {
        let prompt = row["prompt"].as_str().expect("prompt").to_owned();
        let expected: Vec<u32> = row["input_ids"]
            .as_array()
            .expect("ids")
            .iter()
            .map(|id| id.as_u64().expect("id") as u32)
            .collect();
        let tokens = tokenizer.encode(std::slice::from_ref(&prompt)).expect("tokenises");
        assert_eq!(tokens.ids[0], expected, "prompt {prompt:?}");
        assert_eq!(tokens.drop_tokens, 34);
    }
}

/// The prompts of tokens.json.
fn prompts() -> Vec<String> {
    let text = std::fs::read_to_string(golden("qwen_image/tokens.json")).expect("golden is there");
    let json: serde_json::Value = serde_json::from_str(&text).expect("golden is JSON");
    let rows = json["rows"].as_array().expect("rows").iter();
    rows.map(|row| row["prompt"].as_str().expect("prompt").to_owned()).collect()
}

fn text_encoder() -> (PromptTokenizer, TextEncoder) {
    let tokenizer = PromptTokenizer::read(&source(), MAX_TOKENS).expect("the golden tokenizer loads");
    let encoder = TextEncoder::from_pretrained(&source(), &Device::flex());
    (tokenizer, encoder.expect("the golden encoder loads"))
}

#[test]
fn text_encoder_equals_the_peer_alone_and_in_a_padded_batch() {
    let golden_states = Golden::open(golden("qwen_image/text_encoder.safetensors"));
    let (prompts, device, (tokenizer, encoder)) = (prompts(), Device::flex(), text_encoder());
    let encode = |prompts: &[String]| encoder.forward(&tokenizer.encode(prompts).expect("tokenises"));
    for (index, prompt) in prompts.iter().enumerate() {
        let expected: Tensor<3> = golden_states.tensor(&format!("p{index}.prompt_embeds"), &device);
        assert_tensors_close(encode(std::slice::from_ref(prompt)).text, expected, TOLERANCE);
    }
    assert_eq!(
        golden_states.keys().iter().filter(|key| key.ends_with("prompt_embeds")).count(),
        prompts.len() + 1
    );
    let batch = encode(&prompts[..2]);
    let expected: Tensor<3> = golden_states.tensor("batch01.prompt_embeds", &device);
    assert_tensors_close(batch.text, expected, TOLERANCE);
    let mask = golden_states.i64s("batch01.mask");
    let rows = mask.chunks_exact(mask.len() / 2);
    assert_eq!(batch.lengths, rows.map(|row| row.iter().sum::<i64>() as usize).collect::<Vec<_>>());
}

#[test]
fn every_layer_of_the_text_encoder_equals_the_peers() {
    let golden_states = Golden::open(golden("qwen_image/text_encoder.safetensors"));
    let (tokenizer, encoder) = text_encoder();
    let states = encoder.hidden_states(&tokenizer.encode(&prompts()[..1]).expect("tokenises"));
    assert_eq!(states.len(), 4);
    for (layer, found) in states.into_iter().enumerate() {
        let expected: Tensor<3> = golden_states.tensor(&format!("p0.hidden_states.{layer}"), &Device::flex());
        assert_tensors_close(found, expected, TOLERANCE);
    }
}

#[test]
fn weights_of_another_size_are_refused_with_the_tensor_named() {
    let temporary = model_copy();
    let target = temporary.path().join("transformer");
    let config = std::fs::read_to_string(target.join("config.json")).expect("config");
    let edit = |from: &str, to: &str| {
        assert!(config.contains(from), "{from} in the golden config");
        std::fs::write(target.join("config.json"), config.replace(from, to)).expect("write");
        Transformer::from_pretrained(&temporary.path().into(), &Device::flex()).expect_err("must not load")
    };
    let wider = edit("\"joint_attention_dim\": 64", "\"joint_attention_dim\": 80");
    assert!(matches!(&wider, ModelError::Shape { key, .. } if key == "txt_in.weight"), "{wider}");
    let deeper = edit("\"num_layers\": 3", "\"num_layers\": 4").to_string();
    assert!(deeper.contains("missing") && deeper.contains("transformer_blocks.3."), "{deeper}");
    let shallower = edit("\"num_layers\": 3", "\"num_layers\": 2").to_string();
    assert!(shallower.contains("unknown") && shallower.contains("transformer_blocks.2."), "{shallower}");
}

#[test]
fn finite_values_come_out() {
    // A guard for the tests above: equal NaNs must not pass as close.
    let golden = Golden::open(golden("qwen_image/transformer.safetensors"));
    let out = values(velocity("sq64", &golden));
    assert_close(&[out.iter().map(|value| value * 0.0).sum()], &[0.0], 0.0);
}
