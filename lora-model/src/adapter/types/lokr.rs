//! LoKr.

use lora_core::peft::Options;
use serde_json::{Value, json};

use super::super::{
    config::{alphas_of, number, pattern, ranks},
    own::whole_number,
};
use crate::{Result, config::RawConfig};

/// What the names of its tensors end in.
pub(super) const TENSORS: [&str; 6] = ["lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"];

/// Its keys beside those that say what is adapted.
pub(super) fn keys(o: &Options) -> Vec<(&'static str, Value)> {
    vec![
        ("alpha", number(o.alpha)),
        ("alpha_pattern", alphas_of(&o.alpha_pattern)),
        ("decompose_both", json!(o.decompose_both)),
        ("decompose_factor", json!(o.decompose_factor)),
        ("init_weights", json!(true)),
        ("module_dropout", json!(0.0)),
        ("r", json!(o.rank)),
        ("rank_dropout", json!(0.0)),
        ("rank_dropout_scale", json!(false)),
        ("rank_pattern", ranks(&o.rank_pattern)),
        ("use_effective_conv2d", json!(false)),
    ]
}

/// Those that are read, or without a meaning for what a saved adapter of linear maps computes.
pub(super) const KNOWN: [&str; 9] = [
    "alpha",
    "alpha_pattern",
    "decompose_both",
    "decompose_factor",
    "init_weights",
    "r",
    "rank_dropout_scale",
    "rank_pattern",
    "use_effective_conv2d",
];

/// Takes its keys over.
pub(super) fn read(raw: &RawConfig, o: &mut Options) -> Result<()> {
    let needed = |key: &str| raw.error(key, "missing; it says how the adapter was made, so it has to be there");
    o.rank = raw.usize("r")?.ok_or_else(|| needed("r"))?;
    o.alpha = raw.f64("alpha")?.ok_or_else(|| needed("alpha"))?;
    o.rank_pattern = pattern(raw, "rank_pattern", "a whole number", |v| v.as_u64()?.try_into().ok())?;
    o.alpha_pattern = pattern(raw, "alpha_pattern", "a number", Value::as_f64)?;
    o.decompose_both = raw.bool("decompose_both")?.unwrap_or(false);
    o.decompose_factor = whole_number(raw, "decompose_factor")?.unwrap_or(-1);
    Ok(())
}
