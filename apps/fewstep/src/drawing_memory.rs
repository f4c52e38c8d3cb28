//! Whether drawing fits a device that has memory of its own, told before weights are read.

use anyhow::{Result, bail};
use fewstep_models::{AUTOENCODER, Components, Extent, Footprint, Model, ModelSource, WeightType, Workload};
use indicatif::HumanBytes;

use crate::conventions::LoadArgs;

/// Refuses to draw where a device with memory of its own has too little of it.
///
/// # Errors
/// If it does not fit, with what would; or if the device or the model cannot be asked.
pub(crate) fn check<'a>(
    load: &LoadArgs,
    source: &ModelSource,
    (extent, batch_size): (Extent, usize),
    prompts: impl Iterator<Item = &'a String>,
) -> Result<()> {
    let Some(free) = load.device.free_memory_bytes()? else { return Ok(()) };
    let model = Model::outline(source, &load.options()?)?;
    let mut work = Drawing { extent, batch_size, text_tokens: 0 };
    for prompt in prompts {
        let length = model.prompt_tokens(prompt)?;
        work.text_tokens = work.text_tokens.max(length.found.min(length.limit));
    }
    let needed = work.bytes(source, load.dtype)?;
    if needed <= free {
        return Ok(());
    }
    let smaller = [
        ("--dtype bf16", load.dtype == WeightType::F32, work, WeightType::BF16),
        ("--batch-size 1", work.batch_size > 1, Drawing { batch_size: 1, ..work }, load.dtype),
        ("--dtype bf16 --batch-size 1", true, Drawing { batch_size: 1, ..work }, WeightType::BF16),
    ];
    let mut hints = String::new();
    for (change, differs, work, dtype) in smaller {
        let bytes = work.bytes(source, dtype)?;
        if differs && bytes <= free {
            hints.push_str(&format!("\nhint: {change} fits: {}", HumanBytes(bytes)));
        }
    }
    bail!(
        "device {}: drawing needs {} of memory, {} are free{hints}",
        load.device,
        HumanBytes(needed),
        HumanBytes(free)
    )
}

/// What is drawn at once.
#[derive(Clone, Copy)]
struct Drawing {
    extent: Extent,
    batch_size: usize,
    /// Tokens of the longest prompt.
    text_tokens: usize,
}

impl Drawing {
    /// All weights, and the largest of what the parts hold beside them, one after the other.
    fn bytes(self, source: &ModelSource, dtype: WeightType) -> Result<u64> {
        let Extent { frames, height, width } = self.extent;
        let workload = Workload {
            frames,
            height,
            width,
            batch_size: self.batch_size,
            text_tokens: self.text_tokens,
            lora_rank: None,
            components: Components::All,
            on_cpu: false,
        };
        let footprint = Footprint::of(source, &workload)?;
        let encoding = Footprint::of_encoding(source)?;
        let weights = footprint.held.iter();
        let weights: u64 =
            weights.map(|(name, count)| count * Footprint::bytes_per_weight(name, dtype, false)).sum();
        let text = encoding.per_token * (self.batch_size * self.text_tokens) as u64;
        let pixels = encoding.per_pixel * (self.batch_size * height * width) as u64;
        let beside = footprint.activations.drawing.max(text).max(pixels);
        Ok(weights + beside * Footprint::bytes_per_weight(AUTOENCODER, dtype, false))
    }
}
