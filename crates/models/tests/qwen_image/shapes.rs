//! The published model's tensors, from its configs alone.

use std::path::Path;

use fewstep_models::{ModelSource, TensorShapes, WeightFiles, check_weights, expected_tensors};
use serde_json::json;

use crate::{edit_json, folder, model_copy};

/// A folder with the configs of Qwen/Qwen-Image, and no weights.
fn published() -> tempfile::TempDir {
    let copy = model_copy();
    for component in ["text_encoder", "transformer", "vae"] {
        for entry in std::fs::read_dir(copy.path().join(component)).expect("folder") {
            let path = entry.expect("entry").path();
            if path.to_string_lossy().contains(".safetensors") {
                std::fs::remove_file(path).expect("remove");
            }
        }
    }
    let set = |file: &str, entries: serde_json::Value| {
        edit_json(&copy.path().join(file), |config| {
            for (name, value) in entries.as_object().expect("object") {
                config[name] = value.clone();
            }
        });
    };
    set(
        "transformer/config.json",
        json!({
            "attention_head_dim": 128, "axes_dims_rope": [16, 56, 56], "joint_attention_dim": 3584,
            "num_attention_heads": 24, "num_layers": 60,
        }),
    );
    set(
        "text_encoder/config.json",
        json!({
            "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
            "num_hidden_layers": 28, "num_key_value_heads": 4, "vocab_size": 152_064, "text_config": null,
            "rope_scaling": { "mrope_section": [16, 24, 24], "rope_type": "default", "type": "default" },
        }),
    );
    set("vae/config.json", json!({ "base_dim": 96 }));
    copy
}

fn parameters(shapes: &TensorShapes) -> usize {
    shapes.values().map(|shape| shape.iter().product::<usize>()).sum()
}

fn shapes(folder: &Path) -> [TensorShapes; 3] {
    let mut all = expected_tensors(&folder.into()).expect("the configs are read");
    assert_eq!(all.len(), 3);
    ["text_encoder", "transformer", "vae"].map(|component| all.remove(component).expect("component"))
}

#[test]
fn the_published_model_has_the_published_tensors() {
    let copy = published();
    let [text_encoder, transformer, vae] = shapes(copy.path());
    // The index of the published transformer lists 1933 tensors; 20.43 billion parameters.
    assert_eq!((transformer.len(), parameters(&transformer)), (1933, 20_430_401_088));
    assert_eq!(transformer["transformer_blocks.59.img_mlp.net.0.proj.weight"], [12288, 3072]);
    assert_eq!(transformer["transformer_blocks.0.txt_mod.1.weight"], [18432, 3072]);
    assert_eq!(transformer["transformer_blocks.7.attn.norm_added_k.weight"], [128]);
    assert_eq!(transformer["txt_in.weight"], [3072, 3584]);
    assert_eq!(transformer["proj_out.weight"], [64, 3072]);
    // The language model of Qwen2.5 7B: 7 615 616 512 parameters, of which its head, not loaded, has 544 997 376.
    assert_eq!((text_encoder.len(), parameters(&text_encoder)), (338, 7_070_619_136));
    assert_eq!(text_encoder["model.layers.27.self_attn.k_proj.weight"], [512, 3584]);
    // Wan's VAE: 126 892 531 parameters.
    assert_eq!((vae.len(), parameters(&vae)), (194, 126_892_531));
    assert_eq!(vae["encoder.down_blocks.3.conv_shortcut.weight"], [192, 96, 1, 1, 1]);
    assert_eq!(vae["decoder.up_blocks.1.upsamplers.0.time_conv.weight"], [768, 384, 3, 1, 1]);
    assert_eq!(vae["decoder.mid_block.attentions.0.norm.gamma"], [384, 1, 1]);
}

/// A weight file with a header and no numbers: the disk is not asked to hold them.
fn write_header(path: &Path, shapes: &TensorShapes) {
    let (mut header, mut end) = (serde_json::Map::new(), 0);
    for (key, shape) in shapes {
        let start = end;
        end += 2 * shape.iter().product::<usize>();
        header.insert(key.clone(), json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}));
    }
    let header = serde_json::Value::Object(header).to_string();
    std::fs::create_dir_all(path.parent().expect("in a folder")).expect("folder");
    let mut file = std::fs::File::create(path).expect("created");
    std::io::Write::write_all(&mut file, &(header.len() as u64).to_le_bytes()).expect("written");
    std::io::Write::write_all(&mut file, header.as_bytes()).expect("written");
    file.set_len((8 + header.len() + end) as u64).expect("a file with a hole");
}

#[test]
fn weights_of_the_published_size_need_no_configs() {
    let copy = published();
    let all = expected_tensors(&copy.path().into()).expect("the configs are read");
    let lone = tempfile::tempdir().expect("temporary folder");
    let file = |component: &str| lone.path().join(format!("{component}/of/its/own/weights.safetensors"));
    all.iter().for_each(|(component, shapes)| write_header(&file(component), shapes));
    let groups: Vec<_> = all.keys().map(|component| vec![file(component)]).collect();
    let source = ModelSource::from_files(&groups).expect("the components are recognised");
    assert_eq!(expected_tensors(&source).expect("the published configs"), all);
    all.keys().for_each(|component| check_weights(&source, component).expect("the files fit"));
}

#[test]
fn expected_tensors_are_those_of_the_files() {
    for (component, expected) in ["text_encoder", "transformer", "vae"].into_iter().zip(shapes(&folder())) {
        let files = WeightFiles::open(&folder().join(component)).expect("weights are there");
        let ignored = ["visual.", "lm_head."];
        let found: TensorShapes = files
            .keys()
            .filter(|key| !ignored.iter().any(|prefix| key.starts_with(prefix)))
            .map(|key| (key.to_owned(), files.read(key).expect("reads").0))
            .collect();
        assert_eq!(found, expected, "{component}");
    }
}

#[test]
fn attention_of_the_encoder_sits_where_the_config_says() {
    let copy = model_copy();
    edit_json(&copy.path().join("vae/config.json"), |config| {
        config["attn_scales"] = json!([0.5]);
        config["num_res_blocks"] = json!(1);
        config["dim_mult"] = json!([1, 3, 2]);
        config["temperal_downsample"] = json!([true, false]);
    });
    let [.., vae] = shapes(copy.path());
    // Full size: residual, halving; half: residual, attention, halving; quarter: residual.
    assert_eq!(vae["encoder.down_blocks.1.time_conv.weight"], [8, 8, 3, 1, 1]);
    assert_eq!(vae["encoder.down_blocks.2.conv_shortcut.weight"], [24, 8, 1, 1, 1]);
    assert_eq!(vae["encoder.down_blocks.3.to_qkv.weight"], [72, 24, 1, 1]);
    assert_eq!(vae["encoder.down_blocks.4.resample.1.weight"], [24, 24, 3, 3]);
    assert_eq!(vae["encoder.down_blocks.5.conv1.weight"], [16, 24, 3, 3, 3]);
    assert!(!vae.contains_key("encoder.down_blocks.4.time_conv.weight"));
    // The decoder goes back through the stages in reverse, halving the channels as it doubles the size.
    assert_eq!(vae["decoder.up_blocks.0.upsamplers.0.resample.1.weight"], [8, 16, 3, 3]);
    assert_eq!(vae["decoder.up_blocks.1.resnets.0.conv1.weight"], [24, 8, 3, 3, 3]);
    assert_eq!(vae["decoder.up_blocks.1.upsamplers.0.time_conv.weight"], [48, 24, 3, 1, 1]);
    assert_eq!(vae["decoder.up_blocks.2.resnets.0.conv_shortcut.weight"], [8, 12, 1, 1, 1]);
    assert!(!vae.contains_key("decoder.up_blocks.0.upsamplers.0.time_conv.weight"));
}
