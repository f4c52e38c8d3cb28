//! Which sizes a config may ask for: none is 0, and none is so large that products of them leave 64 bits. Memory is taken
//! only for weights that are in the files.

use std::ops::RangeInclusive;

/// Layers, or blocks of a stage.
pub(crate) const LAYERS: RangeInclusive<usize> = 1..=1024;
/// Widths, and what divides them.
pub(crate) const WIDTH: RangeInclusive<usize> = 1..=1 << 17;
/// Token embeddings.
pub(crate) const VOCABULARY: RangeInclusive<usize> = 1..=1 << 24;

/// Checks values by their names in the config.
pub(crate) fn check(values: &[(&str, usize, RangeInclusive<usize>)]) -> Result<(), String> {
    match values.iter().find(|(_, found, range)| !range.contains(found)) {
        Some((name, found, range)) => {
            Err(format!("{name} is {found}, expected {} to {}", range.start(), range.end()))
        }
        None => Ok(()),
    }
}

/// Checks numbers that are divided by or taken the logarithm of.
pub(crate) fn check_positive(values: &[(&str, f32)]) -> Result<(), String> {
    match values.iter().find(|(_, found)| !(*found > 0.0 && found.is_finite())) {
        Some((name, found)) => Err(format!("{name} is {found}, expected a positive number")),
        None => Ok(()),
    }
}

/// Checks numbers that may have either sign.
pub(crate) fn check_finite(name: &str, values: &[f32]) -> Result<(), String> {
    match values.iter().find(|value| !value.is_finite()) {
        Some(found) => Err(format!("one of {name} is {found}, expected a finite number")),
        None => Ok(()),
    }
}
