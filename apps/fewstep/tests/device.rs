//! Devices that a build or a machine does not have are refused before anything is read or written.

#![allow(clippy::unwrap_used)] // Helpers of the tests fail where the tests do.

mod program;

use fewstep_testkit::golden;
use program::fails;

/// Every subcommand that computes, on a device, writing into a folder.
fn commands(device: &str, output: &str) -> Vec<Vec<String>> {
    let model = golden("qwen_image/model").to_string_lossy().into_owned();
    let commands: [&[&str]; 5] = [
        &[
            "generate", "--model", &model, "--prompt", "a cat", "--output", output, "--height", "64",
            "--width", "64",
        ],
        &["train", "--model", &model, "--output-path", output],
        &["train", "--model", &model, "--output-path", output, "--dry-run"],
        &["selftest"],
        &["demo", "--output", output],
    ];
    let all = commands.iter().map(|command| [*command, &["--device", device]].concat());
    all.map(|command| command.into_iter().map(str::to_owned).collect()).collect()
}

#[cfg(not(feature = "cuda"))]
#[test]
fn a_build_without_cuda_refuses_it_and_says_how_to_build_with_it() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("output");
    for command in commands("cuda:1", &output.to_string_lossy()) {
        let said = fails(&program::strs(&command), 2);
        assert!(said.contains("device cuda:1: this build computes on cpu"), "{command:?}: {said}");
        assert!(said.contains("hint: build with --features cuda"), "{command:?}: {said}");
    }
    assert!(!output.exists());
}

#[cfg(feature = "cuda")]
#[test]
fn a_gpu_that_is_not_there_is_named_with_what_is_missing() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("output");
    for command in commands("cuda:99", &output.to_string_lossy()) {
        let said = fails(&program::strs(&command), 1);
        let (driver, gpu) = (said.contains("libcuda.so.1"), said.contains("on this machine"));
        assert!(said.contains("device cuda:99: ") && (driver || gpu), "{command:?}: {said}");
        assert!(!driver || said.contains("hint: install NVIDIA's driver"), "{command:?}: {said}");
    }
    assert!(!output.exists());
}

#[test]
fn a_name_that_is_no_device_is_refused_in_flags_and_recipes() {
    for command in commands("gpu", "nowhere") {
        let said = fails(&program::strs(&command), 2);
        assert!(said.contains("expected cpu, cuda:N or wgpu"), "{command:?}: {said}");
    }
    let folder = tempfile::tempdir().unwrap();
    let recipe = folder.path().join("recipe.toml");
    std::fs::write(&recipe, "device = \"cuda:first\"\n").unwrap();
    let said = fails(&["train", "--config", &recipe.to_string_lossy()], 2);
    assert!(said.contains("\"cuda:first\", expected cpu, cuda:N or wgpu"), "{said}");
}
