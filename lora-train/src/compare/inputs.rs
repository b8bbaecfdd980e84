//! What tells whether a base or a data file is still the same, wherever it lies.

use serde::{Deserialize, Serialize};

/// [Fingerprints](lora_model::fingerprint) of what a cell was made from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inputs {
    /// The base's configuration, tokenizer, chat template and weights.
    pub base: String,
    /// The training data.
    pub data: String,
    /// The test data; of a run that tries a learning rate there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub test: Option<String>,
    /// The adapters that the row begins with or combines.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub adapters: Vec<String>,
}
