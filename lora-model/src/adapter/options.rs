//! What `adapter_config.json` of a LoRA may ask for, and what of it is not done here.

use serde_json::Value;

use super::types::Kind;
use crate::{Result, config::RawConfig};

/// Keys that are read, or that change nothing about what a saved adapter computes.
pub(super) const HARMLESS: &[&str] = &[
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    // A matter of how the base stores its weights, which the base knows better.
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "modules_to_save",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "use_dora",
    "use_rslora",
];

/// Options of PEFT that are not done here: they may be absent, null, false or empty.
const UNSUPPORTED: &[(&str, &str)] = &[
    ("alora_invocation_tokens", "adapters that begin at certain tokens (aLoRA)"),
    ("arrow_config", "routing between adapters (Arrow)"),
    ("kasa_config", "KaSA"),
    ("layer_replication", "layers that are repeated"),
    ("lora_bias", "a bias of the adapter's own"),
    ("megatron_config", "Megatron's layers"),
    ("monteclora_config", "MonteCLoRA"),
    ("target_parameters", "adapting parameters that are no module's weight"),
    ("trainable_token_indices", "training rows of the embedding"),
    ("use_bdlora", "block-diagonal LoRA"),
    ("use_qalora", "QALoRA"),
    ("velora_config", "VeLoRA"),
];

/// The type of an adapter beside LoRA, and none for LoRA.
pub(super) fn kind(raw: &RawConfig) -> Result<Option<Kind>> {
    let kind = match raw.str("peft_type")? {
        Some("LORA") => None,
        Some(other) => Some(Kind::named(other).ok_or_else(|| {
            let all = Kind::words().map(|word| format!("{word:?}")).collect::<Vec<_>>().join(", ");
            raw.error("peft_type", format_args!("adapters of type {other:?} are not supported; \"LORA\", {all} are"))
        })?),
        None => return Err(raw.error("peft_type", "missing; this is no configuration of a PEFT adapter")),
    };
    match raw.str("task_type")? {
        None | Some("CAUSAL_LM" | "SEQ_CLS") => {}
        Some(other) => {
            let problem = format!(
                "{other:?} is not supported; \"CAUSAL_LM\", a model that continues text, and \"SEQ_CLS\", one that \
                 classifies it, are"
            );
            return Err(raw.error("task_type", problem));
        }
    }
    Ok(kind)
}

/// Refuses what is not done here, naming the key.
pub(super) fn check(raw: &RawConfig) -> Result<()> {
    super::config::read_init(raw)?;
    const CHECKED: [&str; 3] = ["peft_type", "task_type", "init_lora_weights"];
    for (key, value) in raw.keys() {
        let key = key.as_str();
        if is_empty(value) || HARMLESS.contains(&key) || CHECKED.contains(&key) {
            continue;
        }
        let unsupported = UNSUPPORTED.iter().find(|(k, _)| *k == key).map(|(_, what)| *what);
        // PEFT's switches for variants are called so, those of the future too.
        let switch = (key.starts_with("use_") && value == &Value::Bool(true)).then_some("this variant of LoRA");
        match unsupported.or(switch) {
            Some(what) => return Err(raw.error(key, format_args!("{what} is not supported yet; found {value}"))),
            None => tracing::warn!("{}: unknown key {key:?} is ignored", raw.path().display()),
        }
    }
    Ok(())
}

/// Whether a value switches nothing on.
pub(super) fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
}
