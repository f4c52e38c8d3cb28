//! The formulas of what a model takes, against files and the published size.

#![allow(clippy::unwrap_used)] // Helpers of the tests fail where the tests do.

use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::tensor::Device;
use fewstep_models::lora::{self, LoraConfig};
use fewstep_models::{Components, Footprint, Model, ModelSource, TensorEntry, WeightFiles, Workload};

fn teacher() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/teacher")
}

const WORKLOAD: Workload = Workload {
    height: 192,
    width: 192,
    frames: 1,
    batch_size: 2,
    text_tokens: 32,
    lora_rank: None,
    components: Components::All,
    on_cpu: true,
};

fn file_parameters(component: &Path) -> u64 {
    let entries = WeightFiles::open(component).unwrap().entries();
    entries.iter().map(TensorEntry::elements).sum::<usize>() as u64
}

#[test]
fn activations_of_other_devices_are_those_that_were_measured_at_full_size() {
    // Of Qwen-Image with adapters of rank 32, in bytes: LOG.md, "What other devices hold".
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../benches/cuda/qwen_image");
    for (side, batch_size, measured) in [(1024, 1, 13.1e9), (1328, 1, 32.0e9), (1024, 2, 30.3e9)] {
        let workload = Workload {
            height: side,
            width: side,
            batch_size,
            text_tokens: 128,
            lora_rank: Some(32),
            components: Components::Denoiser,
            on_cpu: false,
            ..WORKLOAD
        };
        let of = |workload| Footprint::of(&ModelSource::from(&source), &workload).unwrap().activations;
        let found = of(workload);
        let estimated = 4.0 * found.checkpointed as f64;
        assert!((0.85..1.15).contains(&(estimated / measured)), "{side} px: {estimated:e}, {measured:e}");
        // The CPU keeps results of every block there, and no scores where all is kept.
        let on_cpu = of(Workload { on_cpu: true, ..workload });
        assert!(on_cpu.checkpointed_graph > 5 * found.checkpointed_graph, "{on_cpu:?}, {found:?}");
        assert!(found.training > 2 * on_cpu.training, "{on_cpu:?}, {found:?}");
    }
}

#[test]
fn parameters_are_those_of_the_files() {
    let footprint = Footprint::of(&ModelSource::from(&teacher()), &WORKLOAD).unwrap();
    for (component, parameters) in &footprint.parameters {
        assert_eq!(*parameters, file_parameters(&teacher().join(component)), "{component}");
    }
    assert_eq!(footprint.trained, footprint.parameters["transformer"]);
}

#[test]
fn adapters_are_counted_as_they_are_attached() {
    let model = Model::random(&ModelSource::from(&teacher()), 1, &Device::flex()).unwrap();
    let targets = "to_q,to_k,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out,img_mlp.net.2,img_mod.1,\
                   txt_mlp.net.2,txt_mod.1";
    let config =
        LoraConfig { rank: 4, alpha: 4.0, target_modules: targets.split(',').map(str::to_owned).collect() };
    let (with, _) = lora::attach(model.clone(), &config, 1).unwrap();
    let footprint =
        Footprint::of(&ModelSource::from(&teacher()), &Workload { lora_rank: Some(4), ..WORKLOAD }).unwrap();
    assert_eq!(footprint.trained, (with.num_params() - model.num_params()) as u64);
}

#[test]
fn work_and_activations_grow_as_they_should() {
    let of = |workload| Footprint::of(&ModelSource::from(&teacher()), &workload).unwrap();
    let one = of(Workload { batch_size: 1, ..WORKLOAD });
    let two = of(WORKLOAD);
    assert_eq!(two.flops.forward, 2 * one.flops.forward);
    assert_eq!(two.activations.training, 2 * one.activations.training);
    let adapters = of(Workload { lora_rank: Some(4), ..WORKLOAD });
    assert!(
        adapters.flops.backward < two.flops.backward
            && adapters.activations.training < two.activations.training
    );
    // Of five blocks all results, about half, and one whole.
    assert!(4 * two.activations.checkpointed < 3 * two.activations.training);
    assert!(5 * two.activations.checkpointed_graph < 3 * two.activations.graph);
}

#[test]
fn a_forward_multiplies_every_matrix_by_its_tokens() {
    let footprint = Footprint::of(&ModelSource::from(&teacher()), &WORKLOAD).unwrap();
    let [image, text] = [footprint.image_tokens, WORKLOAD.text_tokens];
    let rows = |key: &str| match key {
        _ if ["_mod.", "time_text_embed", "norm_out"].iter().any(|part| key.contains(part)) => 1,
        _ if key.contains("txt_") || key.contains("add_") => text,
        _ => image,
    };
    let entries = WeightFiles::open(&teacher().join("transformer")).unwrap().entries();
    let matrices = entries.iter().filter(|entry| entry.shape.len() == 2);
    let products: usize = matrices.map(|entry| rows(&entry.key) * entry.elements()).sum();
    // Five blocks of width 256: every token's scores with every other, and as many products with the values.
    let attention = 5 * 2 * (image + text).pow(2) * 256;
    assert_eq!(footprint.flops.forward, (2 * WORKLOAD.batch_size * (products + attention)) as u64);
    assert_eq!(footprint.flops.recomputed, 0, "recomputed blocks keep what their matrices give");
}
