//! Stable Diffusion and SDXL against numbers of diffusers (goldens/sd15, goldens/sdxl).

mod pipeline;

use burn::tensor::{Device, Tensor};
use fewstep_data::image::Picture;
use fewstep_models::stable_diffusion::{AddedCondition, Unet, UnetCondition};
use fewstep_models::{ModelSource, WeightType};
use fewstep_testkit::{Golden, assert_tensors_close, golden, values};

/// Absolute, on unit-scale activations; the f32 rounding of the peers was measured at 1.2e-6.
const TOLERANCE: f32 = 1e-5;

fn source(family: &str) -> ModelSource {
    ModelSource::from(&golden(&format!("{family}/model")))
}

fn numbers(family: &str) -> Golden {
    Golden::open(golden(&format!("{family}/goldens.safetensors")))
}

fn unet(family: &str) -> Unet {
    Unet::from_pretrained(&source(family), WeightType::F32, &Device::flex()).expect("the golden UNet loads")
}

fn golden_picture(relative: &str) -> Picture {
    Picture::load(&golden(relative)).expect("the golden picture loads")
}

/// Latents, timestep and condition of a golden case.
fn input(golden: &Golden, case: &str) -> (Tensor<4>, Tensor<1>, UnetCondition) {
    let device = Device::flex();
    let sized = golden.keys().contains(&format!("{case}.time_ids"));
    let added = sized.then(|| AddedCondition {
        pooled: golden.tensor("p0.pooled", &device),
        sizes: golden.tensor(&format!("{case}.time_ids"), &device),
    });
    let condition = UnetCondition { text: golden.tensor("p0.hidden", &device), added };
    (
        golden.tensor(&format!("{case}.latents"), &device),
        golden.tensor(&format!("{case}.timestep"), &device),
        condition,
    )
}

/// Within [`TOLERANCE`] of the largest element, or of one if that is smaller.
#[track_caller]
fn assert_relatively_close<const D: usize>(found: Tensor<D>, expected: Tensor<D>) {
    let largest = values(expected.clone()).into_iter().fold(1.0f32, |most, value| most.max(value.abs()));
    assert_tensors_close(found, expected, TOLERANCE * largest);
}

#[test]
fn the_unets_equal_the_peers_also_where_halving_rounds_up() {
    for family in ["sd15", "sdxl"] {
        let (golden, unet) = (numbers(family), unet(family));
        for case in ["case0", "case1"] {
            let (latents, timestep, condition) = input(&golden, case);
            let found = unet.forward(latents, timestep, condition);
            assert_relatively_close(found, golden.tensor(&format!("{case}.out"), &Device::flex()));
        }
    }
}

#[test]
fn every_block_of_the_unets_equals_the_peers() {
    for family in ["sd15", "sdxl"] {
        let golden = numbers(family);
        let (latents, timestep, condition) = input(&golden, "case0");
        let mut compared = 0;
        for (name, found) in unet(family).states(latents, timestep, condition) {
            // Blocks on the way down hand on their last state first.
            let key =
                if name.starts_with("down") { format!("case0.{name}.0") } else { format!("case0.{name}") };
            let expected = Tensor::<1>::from_floats(&*golden.f32s(&key), &Device::flex());
            assert_relatively_close(found.clone(), expected.reshape(found.dims()));
            compared += 1;
        }
        let inputs = ["latents", "timestep", "time_ids", "out"];
        let recorded =
            golden.keys().into_iter().filter_map(|key| key.strip_prefix("case0.").map(str::to_owned));
        assert_eq!(compared, recorded.filter(|key| !inputs.contains(&key.as_str())).count());
    }
}

#[test]
fn a_batch_of_the_unet_is_its_samples() {
    let golden = numbers("sdxl");
    let (latents, timestep, condition) = input(&golden, "case0");
    let unet = unet("sdxl");
    let both = |tensor: Tensor<2>| Tensor::cat(vec![tensor.clone(), tensor * 0.5], 0);
    let added = condition.added.clone().expect("SDXL is told sizes");
    let pair = UnetCondition {
        text: Tensor::cat(vec![condition.text.clone(), condition.text.clone() * 0.5], 0),
        added: Some(AddedCondition { pooled: both(added.pooled), sizes: both(added.sizes) }),
    };
    let noisy = Tensor::cat(vec![latents.clone(), latents.clone().flip([3])], 0);
    let times = Tensor::cat(vec![timestep.clone(), timestep - 500.0], 0);
    let batch = unet.forward(noisy.clone(), times.clone(), pair.clone());
    for row in 0..2 {
        let added = pair.added.clone().expect("as above");
        let alone = UnetCondition {
            text: pair.text.clone().narrow(0, row, 1),
            added: Some(AddedCondition {
                pooled: added.pooled.narrow(0, row, 1),
                sizes: added.sizes.narrow(0, row, 1),
            }),
        };
        let found = unet.forward(noisy.clone().narrow(0, row, 1), times.clone().narrow(0, row, 1), alone);
        assert_relatively_close(batch.clone().narrow(0, row, 1), found);
    }
}
