//! Values, files and links that nobody made in good faith: an error that names them, and no memory.

use std::fs;

use clap::{Args, Command, FromArgMatches};

use super::bad_input::{assert_says, sft};
use super::fixtures::{Bench, fail};
use crate::recipe::Recipe;

#[test]
fn values_that_no_run_needs_are_refused_before_anything_is_allocated() {
    let bench = Bench::new().with_pictures();
    let cases = [
        (Recipe { batch_size: usize::MAX, ..sft(&bench) }, "batch_size is 18446744073709551615"),
        (Recipe { lora_rank: 1 << 40, ..sft(&bench) }, "lora_rank is 1099511627776, expected at most 65536"),
        (Recipe { height: Some(1 << 40), ..sft(&bench) }, "height is 1099511627776, expected at most 16384"),
        (Recipe { num_epochs: 1 << 50, ..sft(&bench) }, "num_epochs is 1125899906842624"),
        (Recipe { dataset_repeat: 1 << 40, ..sft(&bench) }, "dataset_repeat is 1099511627776"),
        (Recipe { num_inference_steps: 1_000_000_000, ..sft(&bench) }, "expected at most 10000"),
        (Recipe { sample_num_inference_steps: Some(10_001), ..sft(&bench) }, "expected at most 10000"),
        (Recipe { cfg_scale: 1e300, ..sft(&bench) }, "cfg_scale is 1000"),
        (
            Recipe { seed: u64::MAX, ..sft(&bench) },
            "seed is 18446744073709551615, expected at most 9223372036854775807",
        ),
    ];
    for (recipe, expected) in cases {
        assert_says(&fail(&recipe), &[expected]);
        assert!(!bench.path("run").exists());
    }
}

#[test]
fn a_flag_beyond_toml_is_refused_and_not_written() {
    let matches = Recipe::augment_args(Command::new("train")).get_matches_from([
        "train",
        "--max-steps",
        "18446744073709551615",
    ]);
    let flags = Recipe::from_arg_matches(&matches).unwrap();
    let error = flags.resolve(&matches, None).unwrap_err();
    assert!(error.is_usage());
    assert_says(
        &error.to_string(),
        &["max_steps is 18446744073709551615, expected at most 9223372036854775807"],
    );
}

#[test]
fn recipes_of_wrong_types_and_without_end_are_errors_with_their_line() {
    let cases = [
        ("seed = 1\nbatch_size = \"two\"\n", "line 2"),
        ("seed = -1\n", "line 1"),
        ("seed = 99999999999999999999\n", "line 1"),
        ("learning_rate = []\n", "line 1"),
        ("model = 3\n", "line 1"),
        ("lr_schedule = \"steps\"\n", "line 1"),
        ("data_file_keys = [1, 2]\n", "line 1"),
        ("seed = 1\nseed = 2\n", "duplicate key"),
        ("[train]\nseed = 1\n", "unknown field `train`"),
        ("seed = 1\n\0\n", "line 2"),
    ];
    for (text, expected) in cases {
        let error = Recipe::parse("run.toml".as_ref(), text).unwrap_err();
        assert!(error.is_usage());
        assert_says(&error.to_string(), &["run.toml", expected, "hint:"]);
    }
    for deep in [
        "sample_prompts = ".to_owned() + &"[".repeat(100_000),
        "a.".repeat(100_000) + "a = 1",
        "a = ".to_owned() + &"{a=".repeat(100_000),
    ] {
        assert!(Recipe::parse("run.toml".as_ref(), &deep).unwrap_err().is_usage());
    }
}

#[cfg(unix)]
#[test]
fn stored_latents_that_are_a_link_out_of_the_data_set_are_refused() {
    let bench = Bench::new().with_teacher_data();
    let (latents, outside) = (bench.path("data/latents/2.safetensors"), bench.path("outside.safetensors"));
    fs::rename(&latents, &outside).unwrap();
    std::os::unix::fs::symlink("../../outside.safetensors", &latents).unwrap();
    assert_says(
        &fail(&bench.recipe()),
        &["latents/2.safetensors", "leads by a link to", "outside.safetensors", "hint:"],
    );
}

#[test]
fn stored_text_states_of_another_width_are_refused() {
    let bench = Bench::new().with_teacher_data();
    let path = bench.path("data/latents/1.safetensors");
    let files = fewstep_models::WeightFiles::open(&path).unwrap();
    let (shape, values) = files.read("latents").unwrap();
    let tensors = [("latents".to_owned(), shape, values), ("text".to_owned(), vec![2, 5], vec![0.5; 10])];
    fewstep_models::save_tensors(&path, tensors, fewstep_models::WeightType::F32, &Default::default())
        .unwrap();
    assert_says(&fail(&bench.recipe()), &["1.safetensors", "text", "[2, 5]", "hint:"]);
}

#[test]
fn weights_that_are_not_finite_are_named_wherever_a_run_reads_them() {
    let bench = Bench::new().with_pictures();
    let lora = |name: &str, bad: f32| {
        let path = bench.path(name);
        let (down, up) = (vec![bad; 32], vec![1.0; 32]);
        let layer = "transformer_blocks.0.attn.to_q";
        let tensors = [
            (format!("{layer}.lora_A.default.weight"), vec![1, 32], down),
            (format!("{layer}.lora_B.default.weight"), vec![32, 1], up),
        ];
        fewstep_models::save_tensors(&path, tensors, fewstep_models::WeightType::F32, &Default::default())
            .unwrap();
        path
    };
    let adapters = Recipe { lora_base_model: Some("transformer".into()), lora_rank: 1, ..sft(&bench) };
    let start = Recipe { lora_checkpoint: Some(lora("a.safetensors", f32::NAN)), ..adapters };
    assert_says(&fail(&start), &["a.safetensors", "to_q.lora_A", "not finite", "hint:"]);

    let weights = bench.path("model/transformer/diffusion_pytorch_model.safetensors");
    let files = fewstep_models::WeightFiles::open(&weights).unwrap();
    let mut tensors: Vec<_> = files
        .keys()
        .map(|key| {
            let (shape, values) = files.read(key).unwrap();
            (key.to_owned(), shape, values)
        })
        .collect();
    tensors[3].2[0] = f32::INFINITY;
    let (key, start) = (tensors[3].0.clone(), bench.path("start.safetensors"));
    for path in [&start, &weights] {
        fewstep_models::save_tensors(
            path,
            tensors.clone(),
            fewstep_models::WeightType::F32,
            &Default::default(),
        )
        .unwrap();
    }
    assert_says(&fail(&sft(&bench)), &["diffusion_pytorch_model.safetensors", &key, "not finite"]);
}
