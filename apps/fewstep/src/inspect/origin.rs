//! Where trained weights come from, as their metadata tells it.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

/// What this program's metadata entries begin with.
const OURS: &str = "fewstep.";
/// Entries that hold JSON.
const JSON: [&str; 3] = ["sigma_grids", "sigma_rule", "fused"];
/// The order to read them in; others follow.
const FIRST: [&str; 12] = [
    "task",
    "base_hash",
    "fused",
    "training_steps",
    "num_inference_steps",
    "cfg_scale",
    "noise_generator",
    "sigma_grids",
    "sigma_rule",
    "data_file",
    "data_hash",
    "version",
];

/// Metadata as `origin`, what training wrote, and `metadata`, all the rest.
pub(super) fn told(info: &BTreeMap<String, String>) -> Value {
    let mut ours: BTreeMap<&str, &String> =
        info.iter().filter_map(|(key, value)| Some((key.strip_prefix(OURS)?, value))).collect();
    let mut origin = Map::new();
    for name in FIRST {
        if let Some(text) = ours.remove(name) {
            origin.insert(name.to_owned(), value(name, text));
        }
    }
    origin.extend(ours.into_iter().map(|(name, text)| (name.to_owned(), value(name, text))));
    let others = info.iter().filter(|(key, _)| !key.starts_with(OURS));
    let others: Map<String, Value> = others.map(|(key, text)| (key.clone(), json!(text))).collect();
    json!({"origin": if origin.is_empty() { Value::Null } else { origin.into() }, "metadata": others})
}

/// Damaged JSON is told as it stands.
fn value(name: &str, text: &str) -> Value {
    let parsed = JSON.contains(&name).then(|| serde_json::from_str(text).ok()).flatten();
    parsed.unwrap_or_else(|| json!(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_of_training_are_told_in_order_and_others_as_they_stand() {
        let entries = [
            ("format", "pt"),
            ("fewstep.recipe", "a = 1\nb = 2\n"),
            ("fewstep.sigma_grids", "[{\"sigmas\":[1.0,0.0]}]"),
            ("fewstep.sigma_rule", "damaged"),
            ("fewstep.task", "direct_distill"),
        ];
        let info = entries.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
        let told = told(&info);
        let names: Vec<&String> = told["origin"].as_object().unwrap().keys().collect();
        assert_eq!(names, ["task", "sigma_grids", "sigma_rule", "recipe"]);
        assert_eq!(told["origin"]["sigma_grids"][0]["sigmas"], json!([1.0, 0.0]));
        assert_eq!(told["origin"]["sigma_rule"], "damaged");
        assert_eq!(told["metadata"], json!({"format": "pt"}));
    }
}
