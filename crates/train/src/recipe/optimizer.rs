//! The optimisers a recipe can name.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use toml::{Table, toml};

/// How gradients move parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum OptimizerName {
    /// torch's AdamW: 8 bytes of state per trained number.
    #[value(alias = "torch.optim.AdamW")]
    Adamw,
    /// The same with both moments in 8 bits: 2 bytes.
    #[value(alias = "bitsandbytes.optim.AdamW8bit")]
    Adamw8bit,
    /// Mean squares of rows and columns, no momentum: next to nothing.
    Adafactor,
    /// AdamW that finds its own rate, which learning_rate multiplies (1 where not given): 16 bytes.
    Prodigy,
    /// Orthogonal momentum for matrices, AdamW for the rest: 4 bytes.
    Muon,
}

impl OptimizerName {
    /// Keys whose defaults are other ones with this optimiser.
    pub(super) fn defaults(self) -> Table {
        match self {
            Self::Prodigy => toml! { learning_rate = 1.0 },
            _ => Table::new(),
        }
    }
}
