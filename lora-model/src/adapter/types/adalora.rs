//! AdaLoRA.

use std::collections::BTreeMap;

use lora_core::{
    lowrank::Layout,
    peft::{AdaLoraSchedule, Adapted, Budget, Options, Outline},
};
use serde_json::{Map, Value, json};

use super::super::config::number;
use crate::{Result, config::RawConfig};

/// What the names of its tensors end in.
pub(super) const TENSORS: [&str; 3] = ["lora_A", "lora_B", "lora_E"];
/// What a key of `rank_pattern` ends in.
const VALUES: &str = ".lora_E";

/// Its keys beside those that say what is adapted; of an adapter whose budget was cut with the ranks that are left.
pub(super) fn keys(o: &Options, outline: &Outline, adapted: &Adapted) -> Vec<(&'static str, Value)> {
    let s = &o.adalora;
    let kept = adapted.budget().and_then(Budget::kept);
    let kept =
        kept.map(|all| all.into_iter().map(|(m, kept)| (format!("{m}{VALUES}"), json!(kept))).collect::<Map<_, _>>());
    // PEFT refuses a file without it. Of an adapter that never trained it is the shortest schedule that PEFT takes.
    let total = s.total_step.or(adapted.budget().and_then(Budget::total_step)).unwrap_or(s.tinit + s.tfinal + 1);
    vec![
        ("beta1", json!(s.beta1)),
        ("beta2", json!(s.beta2)),
        ("bias", json!("none")),
        ("deltaT", json!(s.delta_t)),
        ("fan_in_fan_out", json!(outline.linear_sites().any(|(_, l)| l.layout == Layout::InOut))),
        ("init_lora_weights", json!(true)),
        ("init_r", json!(s.init_r)),
        ("lora_alpha", number(o.alpha)),
        ("lora_dropout", json!(o.dropout)),
        ("orth_reg_weight", number(s.orth_reg_weight)),
        ("rank_pattern", kept.map_or(Value::Null, Value::Object)),
        ("target_r", json!(s.target_r)),
        ("tfinal", json!(s.tfinal)),
        ("tinit", json!(s.tinit)),
        ("total_step", json!(total)),
    ]
}

/// Those that are read, or without a meaning for what a saved adapter computes; beside those that LoRA knows.
pub(super) const KNOWN: [&str; 13] = [
    "beta1",
    "beta2",
    "deltaT",
    "init_lora_weights",
    "init_r",
    "lora_alpha",
    "lora_dropout",
    "orth_reg_weight",
    "rank_pattern",
    "target_r",
    "tfinal",
    "tinit",
    "total_step",
];

/// Keys of LoRA that it does not read as LoRA does: they may be absent, null, false or empty.
pub(super) const NOT_ITS_OWN: [&str; 2] = ["alpha_pattern", "use_dora"];

/// Takes its keys over.
pub(super) fn read(raw: &RawConfig, o: &mut Options) -> Result<()> {
    let needed = |key: &str| raw.error(key, "missing; it says how the adapter was made, so it has to be there");
    o.alpha = raw.f64("lora_alpha")?.ok_or_else(|| needed("lora_alpha"))?;
    o.dropout = raw.f64("lora_dropout")?.unwrap_or(0.0);
    let standard = AdaLoraSchedule::default();
    let steps = |key: &str, default: u64| -> Result<u64> { Ok(raw.usize(key)?.map_or(default, |n| n as u64)) };
    o.adalora = AdaLoraSchedule {
        init_r: raw.usize("init_r")?.ok_or_else(|| needed("init_r"))?,
        target_r: raw.usize("target_r")?.unwrap_or(standard.target_r),
        tinit: steps("tinit", standard.tinit)?,
        tfinal: steps("tfinal", standard.tfinal)?,
        delta_t: steps("deltaT", standard.delta_t)?,
        total_step: raw.usize("total_step")?.map(|n| n as u64),
        beta1: raw.f64("beta1")?.unwrap_or(standard.beta1),
        beta2: raw.f64("beta2")?.unwrap_or(standard.beta2),
        orth_reg_weight: raw.f64("orth_reg_weight")?.unwrap_or(standard.orth_reg_weight),
        kept: kept(raw)?,
    };
    Ok(())
}

/// The dimension of a tensor that is the rank, and the rank.
pub(super) fn rank(name: &str, o: &Options) -> Option<(usize, usize)> {
    let (module, tensor) = name.rsplit_once('.')?;
    let dimension = [("lora_A", 0), ("lora_B", 1), ("lora_E", 0)].iter().find(|(own, _)| *own == tensor)?.1;
    let kept = o.adalora.kept.get(module).map(|kept| kept.iter().filter(|kept| **kept).count());
    Some((dimension, kept.unwrap_or(o.adalora.init_r)))
}

/// PEFT's `rank_pattern`, by module.
fn kept(raw: &RawConfig) -> Result<BTreeMap<String, Vec<bool>>> {
    const KEY: &str = "rank_pattern";
    let bad = |found: &dyn std::fmt::Display| {
        raw.error(
            KEY,
            format_args!("expected MODULE{VALUES} and for each of its ranks whether it is left, found {found}"),
        )
    };
    let all = match raw.value(KEY) {
        None => return Ok(BTreeMap::new()),
        Some(Value::Object(all)) => all,
        Some(other) => return Err(bad(other)),
    };
    let one = |(name, value): (&String, &Value)| {
        let module = name.rsplit_once(VALUES).filter(|(_, rest)| rest.is_empty() || rest.starts_with('.'));
        let kept = value.as_array().and_then(|list| list.iter().map(Value::as_bool).collect::<Option<_>>());
        Ok((module.ok_or_else(|| bad(name))?.0.to_owned(), kept.ok_or_else(|| bad(value))?))
    };
    all.iter().map(one).collect()
}
