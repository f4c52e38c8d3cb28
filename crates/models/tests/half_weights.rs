//! Models stored in two bytes a number compute what the same numbers in f32 compute, to the bit.

use burn::module::Param;
use burn::tensor::{DType, Device, Tensor};
use fewstep_models::{
    Condition, Denoiser, LoadOptions, Model, ModelSource, NamedMapper, NamedVisitor, WeightType, lora,
    map_named, visit_named,
};
use fewstep_testkit::{assert_close, golden, random, values};

fn source() -> ModelSource {
    ModelSource::from(&golden("qwen_image/model"))
}

fn load(dtype: WeightType) -> Model {
    let options = LoadOptions { dtype, ..LoadOptions::default() };
    Model::from_pretrained(&source(), &options).expect("the golden model loads")
}

struct Widen;

impl NamedMapper for Widen {
    fn map<const D: usize>(&mut self, _name: &str, parameter: Param<Tensor<D>>) -> Param<Tensor<D>> {
        parameter.map(|values| values.cast(DType::F32))
    }
}

/// Bytes of the parameters of the components that stand for most of a model.
fn stored_bytes(model: &Model) -> usize {
    struct Bytes(usize);
    impl NamedVisitor for Bytes {
        fn visit<const D: usize>(&mut self, name: &str, parameter: &Param<Tensor<D>>) {
            if !name.starts_with("vae") {
                let tensor = parameter.val();
                self.0 += tensor.dtype().size() * tensor.shape().num_elements();
            }
        }
    }
    let mut bytes = Bytes(0);
    visit_named(model, &mut bytes);
    bytes.0
}

/// Text states of a prompt, and a velocity.
fn outputs(model: &Model) -> [Vec<f32>; 2] {
    let condition: Condition = model.encode_prompts(&["a red apple".to_owned()]).expect("a prompt");
    let [channels, height, width] = model.latent_shape([64, 64]).expect("a size of the model");
    let noisy = random([1, channels, height, width], 3, &Device::flex());
    let sigma = Tensor::from_floats([0.7], &Device::flex());
    let velocity = model.velocity(noisy, sigma, &condition);
    [values(condition.text), values(velocity)]
}

#[test]
fn half_models_give_the_bits_of_the_same_numbers_in_f32() {
    let exact = outputs(&load(WeightType::F32));
    for dtype in [WeightType::BF16, WeightType::F16] {
        let stored = load(dtype);
        let found = outputs(&stored);
        assert_eq!(found, outputs(&map_named(stored, &mut Widen)), "{dtype:?}");
        assert!(found != exact, "{dtype:?} changes nothing");
    }
}

/// What stays in f32, norms and biases, is large only in a model as small as this.
#[test]
fn half_models_take_about_half_the_memory() {
    let (whole, half) = (stored_bytes(&load(WeightType::F32)), stored_bytes(&load(WeightType::BF16)));
    let share = half as f64 / whole as f64;
    assert!((0.5..0.53).contains(&share), "{half} of {whole} bytes");
}

#[test]
fn a_model_loaded_in_a_type_is_the_model_stored_in_it_afterwards() {
    let stored = load(WeightType::F32).stored_in(WeightType::BF16);
    assert_eq!(outputs(&stored), outputs(&load(WeightType::BF16)));
}

/// Weights that learn are f32; where they compute in bf16 the outcome is that of bf16 weights, matrices alone rounded.
#[test]
fn a_rounding_component_computes_with_the_nearest_numbers_of_its_matrices() {
    struct RoundMatrices;
    impl NamedMapper for RoundMatrices {
        fn map<const D: usize>(&mut self, _name: &str, parameter: Param<Tensor<D>>) -> Param<Tensor<D>> {
            parameter.map(|values| if D == 2 { values.cast(DType::BF16).cast(DType::F32) } else { values })
        }
    }
    let exact = map_named(load(WeightType::BF16), &mut Widen);
    let shifted = map_named(exact, &mut Shift);
    let rounding = ["text_encoder", "transformer"].into_iter().fold(shifted.clone(), Model::rounding);
    let found = outputs(&rounding);
    assert_eq!(found, outputs(&map_named(shifted.clone(), &mut RoundMatrices)));
    assert!(found != outputs(&shifted), "rounding changes nothing");
}

/// Moves weights off the numbers of bf16.
struct Shift;

impl NamedMapper for Shift {
    fn map<const D: usize>(&mut self, _name: &str, parameter: Param<Tensor<D>>) -> Param<Tensor<D>> {
        parameter.map(|values| values.mul_scalar(1.001))
    }
}

#[test]
fn an_adapter_merges_into_half_weights_rounded_once() {
    let config = lora::LoraConfig { rank: 2, alpha: 2.0, target_modules: vec!["to_q".to_owned()] };
    let merged = |dtype| {
        let (mut model, _) = lora::attach(load(dtype), &config, 1).expect("there are such layers");
        model = map_named(model, &mut FillUp);
        lora::merge(model)
    };
    struct FillUp;
    impl NamedMapper for FillUp {
        fn map<const D: usize>(&mut self, name: &str, parameter: Param<Tensor<D>>) -> Param<Tensor<D>> {
            let up = name.ends_with("lora.up");
            parameter.map(|values| if up { values.add_scalar(0.1) } else { values })
        }
    }
    let first_query = |model: &Model| {
        struct Query(Vec<f32>, Option<DType>);
        impl NamedVisitor for Query {
            fn visit<const D: usize>(&mut self, name: &str, parameter: &Param<Tensor<D>>) {
                if name == "transformer.transformer_blocks.0.attn.to_q.weight" {
                    *self = Query(values(parameter.val()), Some(parameter.val().dtype()));
                }
            }
        }
        let mut query = Query(Vec::new(), None);
        visit_named(model, &mut query);
        query
    };
    let half = first_query(&merged(WeightType::BF16));
    assert_eq!(half.1, Some(DType::BF16));
    // Twice a rounding by half of 2⁻⁸ of weights up to 1.
    assert_close(&half.0, &first_query(&merged(WeightType::F32)).0, 2.0_f32.powi(-8));
}
