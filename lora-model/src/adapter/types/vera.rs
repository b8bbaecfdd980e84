//! VeRA.

use std::collections::BTreeMap;

use lora_core::{
    Tensor,
    lowrank::Layout,
    peft::{Options, Outline},
};
use serde_json::{Value, json};

use super::super::{PREFIX, config::number};
use crate::{Result, config::RawConfig};

/// What the names of its tensors of a module end in.
pub(super) const TENSORS: [&str; 2] = ["vera_lambda_d", "vera_lambda_b"];
/// The random matrices that all modules share.
pub(super) const A: &str = "vera_A";
/// The other one.
pub(super) const B: &str = "vera_B";
/// What PEFT puts before their names, which are those of no module.
const BASE: &str = "base_model.";

/// Its keys beside those that say what is adapted.
pub(super) fn keys(o: &Options, outline: &Outline) -> Vec<(&'static str, Value)> {
    vec![
        ("bias", json!("none")),
        ("d_initial", number(o.d_initial)),
        ("fan_in_fan_out", json!(outline.linear_sites().any(|(_, l)| l.layout == Layout::InOut))),
        ("init_weights", json!(true)),
        ("projection_prng_key", json!(o.projection_prng_key)),
        ("r", json!(o.rank)),
        ("save_projection", json!(o.save_projection)),
        ("vera_dropout", json!(o.dropout)),
    ]
}

/// Those that are read, or without a meaning for what a saved adapter computes.
pub(super) const KNOWN: [&str; 7] =
    ["d_initial", "fan_in_fan_out", "init_weights", "projection_prng_key", "r", "save_projection", "vera_dropout"];

/// Takes its keys over.
pub(super) fn read(raw: &RawConfig, o: &mut Options) -> Result<()> {
    o.rank = raw.usize("r")?.ok_or_else(|| raw.error("r", "missing; it says how the adapter was made"))?;
    o.dropout = raw.f64("vera_dropout")?.unwrap_or(0.0);
    o.d_initial = raw.f64("d_initial")?.unwrap_or(o.d_initial);
    o.save_projection = raw.bool("save_projection")?.unwrap_or(true);
    o.projection_prng_key = match raw.value("projection_prng_key") {
        None => 0,
        Some(key) => key.as_u64().ok_or_else(|| {
            raw.error("projection_prng_key", format_args!("expected a whole number of at least 0, found {key}"))
        })?,
    };
    Ok(())
}

/// The name in a file.
pub(super) fn stored_name(name: &str) -> String {
    match [A, B].into_iter().find(|own| name.strip_suffix(own).is_some_and(|site| site.ends_with('.'))) {
        Some(shared) => format!("{BASE}{shared}"),
        None => format!("{PREFIX}{name}"),
    }
}

/// The name here of what all modules share.
pub(super) fn own_name(key: &str) -> Option<String> {
    let name = key.strip_prefix(BASE)?;
    [A, B].into_iter().find(|own| *own == name).map(str::to_owned)
}

/// The dimension of a tensor that is the rank, and the rank.
pub(super) fn rank(name: &str, o: &Options) -> Option<(usize, usize)> {
    match name.rsplit('.').next()? {
        A | "vera_lambda_d" => Some((0, o.rank)),
        B => Some((1, o.rank)),
        _ => None,
    }
}

/// The random matrices of a file that has them.
pub(super) fn projection(tensors: &BTreeMap<String, Tensor>) -> Option<[Tensor; 2]> {
    Some([tensors.get(A)?.clone(), tensors.get(B)?.clone()])
}
