//! Weight files and configs of Wan: other names of keys, and what is refused.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use fewstep_models::{
    LoadOptions, Model, ModelSource, Pipeline, PipelineOptions, Request, WeightFiles, WeightType, lora,
    save_tensors,
};
use fewstep_testkit::{assert_close, copy_folder, golden, values};
use serde_json::Value;

/// diffusers' names with those of Wan's authors, in the order in which they are replaced.
const TRANSFORMER: [(&str, &str); 17] = [
    (".attn1.to_out.0.", ".self_attn.o."),
    (".attn1.to_", ".self_attn."),
    (".attn1.", ".self_attn."),
    (".attn2.to_out.0.", ".cross_attn.o."),
    (".attn2.to_", ".cross_attn."),
    (".attn2.", ".cross_attn."),
    (".norm2.", ".norm3."),
    (".ffn.net.0.proj.", ".ffn.0."),
    (".ffn.net.2.", ".ffn.2."),
    (".scale_shift_table", ".modulation"),
    ("condition_embedder.text_embedder.linear_1.", "text_embedding.0."),
    ("condition_embedder.text_embedder.linear_2.", "text_embedding.2."),
    ("condition_embedder.time_embedder.linear_1.", "time_embedding.0."),
    ("condition_embedder.time_embedder.linear_2.", "time_embedding.2."),
    ("condition_embedder.time_proj.", "time_projection.1."),
    ("proj_out.", "head.head."),
    ("scale_shift_table", "head.modulation"),
];

const TEXT_ENCODER: [(&str, &str); 10] = [
    ("shared.", "token_embedding."),
    ("encoder.final_layer_norm.", "norm."),
    ("encoder.block.", "blocks."),
    (".layer.0.SelfAttention.relative_attention_bias.", ".pos_embedding.embedding."),
    (".layer.0.SelfAttention.", ".attn."),
    (".layer.0.layer_norm.", ".norm1."),
    (".layer.1.DenseReluDense.wi_0.", ".ffn.gate.0."),
    (".layer.1.DenseReluDense.wi_1.", ".ffn.fc1."),
    (".layer.1.DenseReluDense.wo.", ".ffn.fc2."),
    (".layer.1.layer_norm.", ".norm2."),
];

/// The authors' name of a key of the autoencoder.
fn of_vae(key: &str) -> String {
    let key = match key.split_once('.').unwrap() {
        ("quant_conv", rest) => format!("conv1.{rest}"),
        ("post_quant_conv", rest) => format!("conv2.{rest}"),
        (half, rest) => {
            let rest = rest
                .replace("conv_in.", "conv1.")
                .replace("norm_out.", "head.0.")
                .replace("conv_out.", "head.2.");
            let rest = rest
                .replace("mid_block.resnets.0.", "middle.0.")
                .replace("mid_block.attentions.0.", "middle.1.");
            let rest =
                rest.replace("mid_block.resnets.1.", "middle.2.").replace("down_blocks.", "downsamples.");
            format!("{half}.{}", up(&rest))
        }
    };
    let layers = [(".norm1.", ".residual.0."), (".conv1.", ".residual.2."), (".norm2.", ".residual.3.")];
    let layers = layers.into_iter().chain([(".conv2.", ".residual.6."), (".conv_shortcut.", ".shortcut.")]);
    match key.starts_with("encoder.conv1") || key.starts_with("decoder.conv1") {
        true => key,
        false => layers.fold(key, |key, (from, to)| key.replace(from, to)),
    }
}

/// The decoder's layers numbered through.
fn up(rest: &str) -> String {
    let Some(rest) = rest.strip_prefix("up_blocks.") else { return rest.to_owned() };
    let (block, rest) = rest.split_once('.').unwrap();
    let (kind, rest) = rest.split_once('.').unwrap();
    let (index, rest) = rest.split_once('.').unwrap();
    let within = if kind == "upsamplers" { 3 } else { index.parse::<usize>().unwrap() };
    format!("upsamples.{}.{rest}", 4 * block.parse::<usize>().unwrap() + within)
}

fn replaced(key: &str, names: &[(&str, &str)]) -> String {
    names.iter().fold(key.to_owned(), |key, (from, to)| key.replacen(from, to, 1))
}

/// Writes a component's weights anew with other keys.
fn rename(folder: &Path, file: &str, name: impl Fn(&str) -> String) {
    let files = WeightFiles::open(&golden("wan/model").join(file)).unwrap();
    let keys: Vec<String> = files.keys().map(str::to_owned).collect();
    let tensors = keys.iter().filter(|key| !key.starts_with("encoder.embed_tokens")).map(|key| {
        let (shape, values) = files.read(key).unwrap();
        (name(key), shape, values)
    });
    let tensors: Vec<_> = tensors.collect();
    assert!(tensors.iter().zip(&keys).any(|(tensor, key)| tensor.0 != *key), "{file}");
    save_tensors(&folder.join(file), tensors, WeightType::F32, &BTreeMap::new()).unwrap();
}

const FILES: [&str; 3] = [
    "transformer/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
];

/// The model with the keys of its authors.
fn original() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    copy_folder(&golden("wan/model"), folder.path(), &|_| true);
    rename(folder.path(), FILES[0], |key| replaced(key, &TRANSFORMER));
    rename(folder.path(), FILES[1], |key| replaced(key, &TEXT_ENCODER));
    rename(folder.path(), FILES[2], of_vae);
    folder
}

/// Latents and pixels of a short video.
fn drawn(source: impl Into<ModelSource>, lora: Option<PathBuf>) -> (Vec<f32>, Vec<u8>) {
    let lora = lora.map(|path| fewstep_models::LoraFile { path, alpha: 1.0 });
    let pipeline =
        Pipeline::from_pretrained(source, PipelineOptions { lora, ..PipelineOptions::default() }).unwrap();
    let request =
        Request { num_inference_steps: 2, cfg_scale: 2.0, num_frames: 5, ..Request::new("a cat", 32, 32) };
    let generated = pipeline.generate(&request).unwrap();
    (values(generated.latents), generated.frames.iter().flat_map(|frame| frame.rgb.clone()).collect())
}

#[test]
fn weights_with_the_keys_of_the_authors_are_the_same_model() {
    let folder = original();
    let keys = WeightFiles::open(&folder.path().join("transformer")).unwrap();
    for key in [
        "blocks.0.self_attn.q.weight",
        "blocks.1.cross_attn.norm_k.weight",
        "blocks.0.modulation",
        "head.modulation",
    ] {
        assert!(keys.contains(key), "{key}");
    }
    let vae = WeightFiles::open(&folder.path().join("vae")).unwrap();
    for key in [
        "conv1.weight",
        "decoder.upsamples.3.time_conv.weight",
        "encoder.middle.1.to_qkv.weight",
        "encoder.downsamples.3.shortcut.bias",
    ] {
        assert!(vae.contains(key), "{key}");
    }
    let (latents, pixels) = drawn(folder.path(), None);
    let expected = drawn(&golden("wan/model"), None);
    assert_close(&latents, &expected.0, 0.0);
    assert_eq!(pixels, expected.1);
}

#[test]
fn files_given_one_by_one_are_recognised_in_either_spelling() {
    let folder = original();
    for base in [folder.path().to_owned(), golden("wan/model")] {
        let given = ModelSource::from_files(&FILES.map(|file| vec![base.join(file)])).unwrap();
        assert!(given.is_whole());
        let model = Model::outline(&given, &LoadOptions::default()).unwrap();
        assert_eq!(model.component_names(), ["text_encoder", "transformer", "vae"]);
        assert!(matches!(model, Model::Wan(_)));
    }
}

#[test]
fn a_saved_model_has_the_keys_of_diffusers() {
    let (folder, saved) = (original(), tempfile::tempdir().unwrap());
    let source = ModelSource::from(folder.path());
    let model = Model::from_pretrained(&source, &LoadOptions::default()).unwrap();
    model.save_pretrained(&source, saved.path(), WeightType::F32, &BTreeMap::new()).unwrap();
    let files = WeightFiles::open(&saved.path().join("transformer")).unwrap();
    assert!(files.contains("blocks.0.attn1.to_q.weight") && files.contains("scale_shift_table"));
    assert_close(&drawn(saved.path(), None).0, &drawn(&golden("wan/model"), None).0, 0.0);
}

#[test]
fn adapters_are_read_written_and_fused_in_either_spelling() {
    let (folder, base) = (tempfile::tempdir().unwrap(), original());
    let input = golden("wan/lora_init.safetensors");
    let path = |name: &str| folder.path().join(name);
    for (name, format, key) in [
        ("diffsynth.safetensors", lora::LoraFormat::Diffsynth, "blocks.1.self_attn.o.lora_B.default.weight"),
        (
            "diffusers.safetensors",
            lora::LoraFormat::Diffusers,
            "transformer.blocks.1.attn1.to_out.0.lora_B.weight",
        ),
    ] {
        lora::convert(&input, &path(name), format).unwrap();
        assert!(WeightFiles::open(&path(name)).unwrap().contains(key), "{key}");
        assert_eq!(lora::LoraWeights::open(&path(name)).unwrap().format(), Some(format));
    }
    let expected = drawn(&golden("wan/model"), Some(input)).0;
    assert_ne!(expected, drawn(&golden("wan/model"), None).0);
    for name in ["diffsynth.safetensors", "diffusers.safetensors"] {
        assert_close(&drawn(base.path(), Some(path(name))).0, &expected, 0.0);
    }
    for (name, model) in [("fused", golden("wan/model")), ("fused_original", base.path().to_owned())] {
        let loras = vec![fewstep_models::LoraFile { path: path("diffsynth.safetensors"), alpha: 1.0 }];
        let output = path(name);
        let fusion =
            lora::Fusion { model, loras, output, dtype: None, max_shard_bytes: lora::MAX_SHARD_BYTES };
        lora::fuse(&fusion).unwrap();
        // One product or two.
        assert_close(&drawn(&path(name), None).0, &expected, 2e-5);
    }
}

#[test]
fn layers_get_adapters_by_either_name() {
    let model = || Model::from_pretrained(&(&golden("wan/model")).into(), &LoadOptions::default()).unwrap();
    let attached = |names: &[&str]| {
        let target_modules = names.iter().map(|name| (*name).to_owned()).collect();
        let config = lora::LoraConfig { rank: 2, alpha: 2.0, target_modules };
        lora::attach(model(), &config, 0).unwrap().1
    };
    let theirs = attached(&["q", "k", "v", "o", "ffn.0", "ffn.2"]);
    assert_eq!(theirs.len(), 2 * 10, "{theirs:?}");
    assert_eq!(theirs, attached(&["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]));
    assert_eq!(theirs, attached(model().lora_targets()));
}

#[test]
fn configs_that_cannot_be_followed_say_why() {
    let refusal = |file: &str, key: &str, value: Value| {
        let folder = tempfile::tempdir().unwrap();
        copy_folder(&golden("wan/model"), folder.path(), &|_| true);
        let path = folder.path().join(file);
        let mut config: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        config[key] = value;
        std::fs::write(&path, config.to_string()).unwrap();
        Model::outline(&folder.path().into(), &LoadOptions::default()).unwrap_err().to_string()
    };
    for (file, key, value, expected) in [
        (
            "transformer/config.json",
            "in_channels",
            Value::from(36),
            "in_channels is 36 and out_channels 16, expected the same",
        ),
        (
            "model_index.json",
            "transformer_2",
            vec!["diffusers", "WanTransformer3DModel"].into(),
            "transformer_2 is [\"diffusers\",\"WanTransformer3DModel\"], expected none",
        ),
        ("model_index.json", "expand_timesteps", true.into(), "expand_timesteps is true, expected none"),
        (
            "vae/config.json",
            "scale_factor_spatial",
            Value::from(16),
            "scale_factor_spatial is 16, expected 8, which temperal_downsample makes of it",
        ),
        (
            "vae/config.json",
            "scale_factor_temporal",
            Value::from(8),
            "scale_factor_temporal is 8, expected 4",
        ),
        (
            "transformer/config.json",
            "image_dim",
            Value::from(1280),
            "models that start from a picture are not supported",
        ),
        (
            "transformer/config.json",
            "qk_norm",
            Value::Null,
            "qk_norm is None, expected rms_norm_across_heads",
        ),
        (
            "transformer/config.json",
            "patch_size",
            vec![2, 2, 2].into(),
            "patch_size is [2, 2, 2], expected [1, 2, 2]",
        ),
        (
            "transformer/config.json",
            "text_dim",
            Value::from(64),
            "text_dim is 64, expected the text encoder's width, 48",
        ),
        ("vae/config.json", "is_residual", Value::from(true), "as in Wan 2.1"),
        (
            "vae/config.json",
            "temperal_downsample",
            vec![false, false, true].into(),
            "makes one latent frame of 2, expected 4",
        ),
        (
            "scheduler/scheduler_config.json",
            "solver_order",
            Value::from(3),
            "solver_order: found 3, expected 2",
        ),
    ] {
        let error = refusal(file, key, value);
        assert!(error.contains(expected), "{error}");
    }
}
