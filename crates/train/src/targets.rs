//! Which layers get adapters: names, a regular expression, or what a model has to offer.

use fewstep_models::{Model, lora};
use regex::Regex;

use crate::TrainError;

/// Projections found by themselves have at least this many inputs and outputs (the peer's rule).
const SMALLEST_SIDE: usize = 512;

/// The recipe's choice as names of layers; the model's usual ones where there is none.
///
/// # Errors
/// If a single entry is neither the name of layers nor a regular expression.
pub(crate) fn resolve(given: Option<&[String]>, model: &Model) -> Result<Vec<String>, TrainError> {
    let Some(given) = given else {
        return Ok(model.lora_targets().iter().map(|name| (*name).to_owned()).collect());
    };
    let given: Vec<String> =
        given.iter().map(|name| name.trim().to_owned()).filter(|name| !name.is_empty()).collect();
    let layers = lora::layers(model);
    match given.as_slice() {
        [] => Ok(find(&layers)),
        [pattern] if pattern.contains(|letter: char| r"\^$*+?()[]{}|".contains(letter)) => {
            // As Python's fullmatch, which the peer's library applies.
            let expression =
                Regex::new(&format!("^(?:{pattern})$")).map_err(|error| TrainError::Pattern {
                    key: "lora_target_modules",
                    found: pattern.clone(),
                    reason: error.to_string(),
                })?;
            let matched: Vec<String> =
                layers.into_iter().map(|(name, _)| name).filter(|name| expression.is_match(name)).collect();
            // No match is an error where adapters are attached, which names the layers there are.
            Ok(if matched.is_empty() { given } else { matched })
        }
        _ => Ok(given),
    }
}

/// The large projections of the blocks; in a small model all of the blocks'.
fn find(layers: &[(String, [usize; 2])]) -> Vec<String> {
    let in_block = |name: &str| name.split('.').any(|part| part.parse::<usize>().is_ok());
    let at_least = |side: usize| -> Vec<String> {
        let fits = |(name, size): &&(String, [usize; 2])| in_block(name) && size[0].min(size[1]) >= side;
        layers.iter().filter(fits).map(|(name, _)| name.clone()).collect()
    };
    let large = at_least(SMALLEST_SIDE);
    if large.is_empty() { at_least(0) } else { large }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_projections_of_blocks_are_found_and_small_ones_only_alone() {
        let layer = |name: &str, size| (name.to_owned(), size);
        let mut layers = vec![
            layer("img_in", [3072, 1024]),
            layer("blocks.0.to_q", [64, 64]),
            layer("blocks.1.up", [64, 9]),
        ];
        assert_eq!(find(&layers), ["blocks.0.to_q", "blocks.1.up"]);
        layers.push(layer("blocks.1.to_q", [512, 4096]));
        assert_eq!(find(&layers), ["blocks.1.to_q"]);
    }
}
