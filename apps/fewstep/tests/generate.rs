//! `fewstep generate` on the golden Qwen-Image folder: the peers' pictures from the command line.

#![allow(clippy::unwrap_used)] // Helpers of the tests fail where the tests do.

mod program;

use std::fs;
use std::path::{Path, PathBuf};

use fewstep_data::image::Picture;
use fewstep_testkit::{Golden, assert_close, golden};
use program::{fails, run, strs};
use tempfile::TempDir;

/// As the pipelines' own goldens: f32 rounding over a whole run.
const TOLERANCE: f32 = 5e-5;

/// A data set folder to draw into.
struct Drawn {
    folder: TempDir,
}

impl Drawn {
    /// Draws the golden case with more flags.
    fn new(flags: &[&str]) -> Self {
        let drawn = Self { folder: tempfile::tempdir().unwrap() };
        run(&strs(&drawn.command(flags)));
        drawn
    }

    /// The command; `flags` win over its steps and height.
    fn command(&self, flags: &[&str]) -> Vec<String> {
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let (model, output) = (text(&golden("qwen_image/model")), text(&self.output()));
        let fixed = ["generate", "--model", &model, "--output", &output, "--width", "64", "--cfg-scale", "1"];
        let unless_given = [["--num-inference-steps", "4"], ["--height", "64"]];
        let others = unless_given.iter().filter(|[name, _]| !flags.contains(name)).flatten().copied();
        let all = fixed.into_iter().chain(["--dtype", "f32", "--save-latents"]).chain(others);
        all.chain(flags.iter().copied()).map(str::to_owned).collect()
    }

    fn output(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    fn tensors(&self) -> Golden {
        Golden::open(self.output().join("latents/000000.safetensors"))
    }

    fn picture(&self, index: usize) -> Picture {
        Picture::load(&self.output().join(format!("images/{index:06}.png"))).unwrap()
    }

    fn provenance(&self) -> serde_json::Value {
        serde_json::from_slice(&fs::read(self.output().join("provenance.json")).unwrap()).unwrap()
    }
}

const CAT: [&str; 4] = ["--prompt", "a photo of a cat sitting on the red sofa", "--seed", "42"];

/// Draws the golden case `s4_cfg1` and compares it with a peer's run of it.
fn assert_draws(flags: &[&str], tag: &str) {
    let goldens = Golden::open(golden("qwen_image/pipeline.safetensors"));
    let drawn = Drawn::new(&[&CAT[..], flags].concat());
    let found = drawn.tensors();
    assert_eq!(found.shape("trajectory"), [5, 16, 8, 8]);
    assert_eq!(found.shape("noise"), [16, 8, 8]);
    let trajectory = found.f32s("trajectory");
    // diffusers shows the states after each step, diffsynth the noise before them too.
    let states = goldens.f32s(&format!("s4_cfg1.{tag}.latents"));
    assert_close(&trajectory[trajectory.len() - states.len()..], &states, TOLERANCE);
    assert_close(&found.f32s("latents"), &states[states.len() - 16 * 64..], TOLERANCE);
    let noise = &goldens.f32s("s4_cfg1.diffsynth.latents")[..16 * 64];
    assert_close(&found.f32s("noise"), noise, 0.0);
    assert_close(&trajectory[..16 * 64], noise, 0.0);
    let sigmas = found.f32s("sigmas");
    assert_close(&sigmas[..4], &goldens.f32s("s4_cfg1.diffsynth.sigmas"), 5e-7);
    assert_eq!(sigmas[4..], [0.0]);
    let expected = Picture::load(&golden(&format!("qwen_image/s4_cfg1_{tag}.png"))).unwrap();
    // A pixel within the tolerance of a boundary between two levels may fall to either.
    let ties = drawn.picture(0).rgb.iter().zip(&expected.rgb).filter(|(found, peer)| found != peer).count();
    assert!(ties <= 3, "{ties} bytes differ from the picture of {tag}");
}

#[test]
fn the_golden_prompt_gives_the_golden_pictures_in_every_convention() {
    assert_draws(&[], "diffusers");
    assert_draws(&["--compat", "diffusers"], "diffusers");
    assert_draws(&["--compat", "diffsynth"], "diffsynth");
    assert_draws(&["--compat", "diffsynth", "--activation", "gelu-tanh"], "diffsynth_tanh");
}

#[test]
fn conventions_travel_with_the_data_and_a_run_with_others_is_refused() {
    let drawn = Drawn::new(&[&CAT[..], &["--compat", "diffsynth", "--rand_device", "cpu"]].concat());
    let provenance = drawn.provenance();
    assert_eq!(provenance["conventions"]["activation"], "gelu-sigmoid");
    assert_eq!(provenance["conventions"]["pixel_rounding"], "truncate");
    let other = drawn.command(&[&CAT[..], &["--compat", "diffusers"]].concat());
    let said = fails(&strs(&other), 1);
    assert!(said.contains("conventions.activation is \"gelu-sigmoid\" there"), "{said}");
}

#[test]
fn image_to_image_starts_from_the_given_picture() {
    let goldens = Golden::open(golden("qwen_image/pipeline.safetensors"));
    let input = golden("qwen_image/i2i_input.png").to_string_lossy().into_owned();
    let flags =
        ["--input-image", &input, "--denoising-strength", "0.6", "--seed", "5", "--compat", "diffsynth"];
    let drawn = Drawn::new(&[&CAT[..2], &flags, &["--num-inference-steps", "5"]].concat());
    assert_close(&drawn.tensors().f32s("trajectory"), &goldens.f32s("i2i.diffsynth.latents"), TOLERANCE);
}

#[test]
fn noise_of_the_cuda_generator_is_philoxs_and_recorded() {
    let drawn = Drawn::new(&[&CAT[..], &["--rand_device", "cuda"]].concat());
    let philox = Golden::open(golden("rng/rng_emulated_unverified.safetensors"));
    let expected = philox.f32s("s42.cuda_philox_randn.f32.1024");
    assert_close(&drawn.tensors().f32s("noise"), &expected, 0.0);
    assert_eq!(drawn.provenance()["noise_generator"], "torch-cuda");
    let metadata = fs::read_to_string(drawn.output().join("metadata.csv")).unwrap();
    assert!(metadata.contains(",42,cuda,"), "{metadata}");
}

#[test]
fn rows_of_a_prompt_file_bring_their_own_seeds() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("prompts.csv");
    fs::write(&file, format!("prompt,seed\n{0},42\n{0},43\n", CAT[1])).unwrap();
    let file = file.to_string_lossy();
    // One by one: on some processors a batch of two differs from its samples in the last bits.
    let (rows, single) = (Drawn::new(&["--prompts", &file, "--batch-size", "1"]), Drawn::new(&CAT));
    assert_eq!(rows.picture(0), single.picture(0));
    assert_ne!(rows.picture(1), single.picture(0));
    let metadata = fs::read_to_string(rows.output().join("metadata.csv")).unwrap();
    assert!(metadata.contains(",43,cpu,"), "{metadata}");
}

#[test]
fn a_long_prompt_is_named_once_and_drawn() {
    let drawn = Drawn { folder: tempfile::tempdir().unwrap() };
    let long = "word ".repeat(30);
    let flags = ["--prompt", &long, "--images-per-prompt", "2", "--max-prompt-tokens", "16"];
    let command = drawn.command(&flags);
    let said = run(&strs(&command));
    assert_eq!(said.matches("warning: 1 of the prompts").count(), 1, "{said}");
    assert!(said.contains("16 tokens") && said.contains("word word"), "{said}");
    assert_eq!(drawn.tensors().shape("text"), [16, 64]);
}

#[test]
fn unusable_flags_are_refused_before_anything_is_written() {
    let drawn = Drawn { folder: tempfile::tempdir().unwrap() };
    for (flags, code, expected) in [
        (&["--device", "gpu"][..], 2, "expected cpu, cuda:N or wgpu"),
        (&["--compat", "comfy"], 2, "diffsynth, diffusers"),
        (&["--denoising-strength", "0.5"], 1, "--input-image"),
        (
            &["--height", "72"],
            1,
            "height 72 px is not divisible by 16\nhint: the nearest sizes are 64 and 80",
        ),
        (&["--height", "0"], 1, "the smallest size is 16"),
        (&["--student-cfg-scale", "nan"], 2, "expected a number from 0"),
    ] {
        let command = drawn.command(&[&CAT[..], flags].concat());
        let said = fails(&strs(&command), code);
        assert!(said.contains(expected), "{said}");
    }
    assert!(!drawn.output().exists());
}
