//! Values of flags that are more than a number or a path.

use std::path::PathBuf;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use fewstep_flow::Solver;
use fewstep_hub::Source;
use fewstep_models::conventions::SOLVERS;
use fewstep_models::lora::LoraFormat;
use fewstep_models::{LoraFile, WeightType};

/// Guidance that no picture survives; recipes have the same limit.
const MAX_CFG_SCALE: f32 = 10_000.0;

/// A student to evaluate.
#[derive(Clone, Debug, PartialEq)]
pub struct Student {
    /// What the report calls it.
    pub name: String,
    /// A LoRA file or a model folder.
    pub path: PathBuf,
}

/// `FILE` or `FILE:alpha`.
pub fn lora_file(text: &str) -> Result<LoraFile, String> {
    let (path, alpha) = match text.rsplit_once(':') {
        Some((path, alpha)) if !alpha.contains(['/', '\\']) => (path, number(alpha)?),
        _ => (text, 1.0),
    };
    Ok(LoraFile { path: path.into(), alpha })
}

fn number(text: &str) -> Result<f32, String> {
    let parsed = text.parse::<f32>().ok().filter(|alpha| alpha.is_finite());
    parsed.ok_or_else(|| format!("alpha {text:?}, expected a number as in FILE:0.5"))
}

/// A guidance scale: 1 is off.
pub fn guidance(text: &str) -> Result<f32, String> {
    let parsed = text.parse::<f32>().ok().filter(|scale| (0.0..=MAX_CFG_SCALE).contains(scale));
    parsed.ok_or_else(|| format!("expected a number from 0 to {MAX_CFG_SCALE}"))
}

/// `NAME=PATH`.
pub fn student(text: &str) -> Result<Student, String> {
    match text.split_once('=') {
        Some((name, path)) if !name.is_empty() && !path.is_empty() => {
            Ok(Student { name: name.into(), path: path.into() })
        }
        _ => Err(format!("{text:?}, expected NAME=PATH")),
    }
}

/// `diffsynth` or `diffusers`.
pub fn lora_format(text: &str) -> Result<LoraFormat, String> {
    let named = LoraFormat::ALL.into_iter().find(|format| format.name() == text);
    named.ok_or_else(|| "expected diffsynth or diffusers".into())
}

/// `f32`, `bf16` or `f16`.
pub fn weight_type(text: &str) -> Result<WeightType, String> {
    match text {
        "f32" => Ok(WeightType::F32),
        "bf16" => Ok(WeightType::BF16),
        "f16" => Ok(WeightType::F16),
        _ => Err("expected f32, bf16 or f16".into()),
    }
}

/// A name of [`SOLVERS`].
pub fn solver(text: &str) -> Result<Solver, String> {
    let known = SOLVERS.iter().find(|(name, _)| *name == text);
    known
        .map(|(_, solver)| *solver)
        .ok_or_else(|| "expected euler, heun, ddim, plms, plms-angular or unipc".into())
}

/// `huggingface` or `modelscope`.
pub fn hub_source(text: &str) -> Result<Source, String> {
    Source::from_name(text).ok_or_else(|| "expected huggingface or modelscope".into())
}

/// One of a table's names.
pub fn named<T: Copy + Send + Sync + 'static>(
    names: &'static [(&'static str, T)],
) -> impl TypedValueParser<Value = T> {
    let of_name = |found: String| names.iter().find(|(name, _)| *name == found);
    PossibleValuesParser::new(names.iter().map(|(name, _)| *name))
        .map(move |found| of_name(found).expect("the parser before accepts these names alone").1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lora_files_take_an_alpha_after_the_last_colon() {
        let file = |path: &str, alpha| Ok(LoraFile { path: path.into(), alpha });
        assert_eq!(lora_file("a.safetensors"), file("a.safetensors", 1.0));
        assert_eq!(lora_file("dir/a.safetensors:-0.5"), file("dir/a.safetensors", -0.5));
        assert_eq!(lora_file("C:/a.safetensors"), file("C:/a.safetensors", 1.0));
        assert!(lora_file("a.safetensors:half").is_err());
    }

    #[test]
    fn guidance_is_a_number_that_can_be_sampled_with() {
        assert_eq!(guidance("4.5"), Ok(4.5));
        for text in ["NaN", "inf", "-1", "1e30", "four", ""] {
            assert_eq!(guidance(text), Err("expected a number from 0 to 10000".into()), "{text}");
        }
    }

    #[test]
    fn students_need_a_name_and_a_path() {
        assert_eq!(student("LoRA=a=b"), Ok(Student { name: "LoRA".into(), path: "a=b".into() }));
        assert!(student("a.safetensors").is_err());
        assert!(student("=a").is_err());
    }
}
