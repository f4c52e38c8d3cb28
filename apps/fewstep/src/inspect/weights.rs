//! Safetensors files, single or sharded, and LoRA files.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::Result;
use fewstep_models::lora::{LoraLayer, LoraWeights};
use fewstep_models::{TensorEntry, WeightFiles, read_info};
use serde_json::{Value, json};

use super::origin;

/// A weight file or the folder of its shards.
pub(super) fn tensors(path: &Path) -> Result<Value> {
    let entries = WeightFiles::open(path)?.entries();
    let info = if path.is_file() { read_info(path)? } else { BTreeMap::new() };
    let mut told = json!({"kind": if path.is_file() { "weight file" } else { "weight files" }});
    merge(&mut told, summary(&entries));
    let list =
        entries.iter().map(|entry| (entry.key.clone(), json!(format!("{} {:?}", entry.dtype, entry.shape))));
    merge(&mut told, origin::told(&info));
    merge(&mut told, json!({"keys": list.collect::<serde_json::Map<_, _>>()}));
    Ok(told)
}

/// Number, types and sizes of tensors.
pub(super) fn summary(entries: &[TensorEntry]) -> Value {
    let dtypes: BTreeSet<&str> = entries.iter().map(|entry| entry.dtype.as_str()).collect();
    json!({
        "tensors": entries.len(),
        "parameters": entries.iter().map(TensorEntry::elements).sum::<usize>(),
        "dtypes": dtypes,
        "bytes": entries.iter().map(|entry| entry.bytes).sum::<usize>(),
    })
}

/// A LoRA file.
pub(super) fn lora(lora: &LoraWeights) -> Result<Value> {
    let layers = lora.layers();
    let entries = WeightFiles::open(lora.path())?.entries();
    let ranks: BTreeSet<usize> = layers.values().map(|layer| layer.rank).collect();
    let mut told = json!({
        "kind": "LoRA",
        "format": lora.format().map_or("another's spelling, which is read", |format| format.name()),
        "example_key": lora.example_key(),
        "ranks": ranks,
    });
    merge(&mut told, summary(&entries));
    let layer = |(name, layer): (&String, &LoraLayer)| {
        let LoraLayer { rank, input, output, scale, .. } = layer;
        let told = format!("rank {rank}, alpha {}, {input} → {output}", scale * *rank as f32);
        (name.clone(), Value::String(told))
    };
    let layers: serde_json::Map<String, Value> = layers.iter().map(layer).collect();
    merge(&mut told, origin::told(lora.info()));
    merge(&mut told, json!({"layers": layers}));
    Ok(told)
}

/// Appends the entries of an object to those of another.
pub(super) fn merge(into: &mut Value, from: Value) {
    if let (Value::Object(into), Value::Object(from)) = (into, from) {
        into.extend(from);
    }
}
