//! Which parameters AdamW updates by which learning rate and decay.

use std::ops::Range;

use lora_core::Params;

use crate::TrainConfig;

/// Parameters that follow each other in the flat buffer and are updated by one rule.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Group {
    pub(crate) range: Range<usize>,
    /// Peak learning rate.
    pub(crate) lr: f64,
    pub(crate) weight_decay: f64,
}

/// All parameters in groups: one, or with `no_decay_vectors` those that decay and those that do not, or with
/// `loraplus_lr_ratio` those of LoRA+ (Hayou et al. 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models", section
/// 4), as PEFT's `create_loraplus_optimizer` makes them:
///
/// | parameters | learning rate | weight decay |
/// |---|---|---|
/// | both factors of embeddings | `loraplus_lr_embedding` | yes |
/// | other B's, and DoRA's lengths | `lr`·ratio | yes |
/// | other vectors: biases, gains of normalisations | `lr`·ratio | of gains without a bias (RMSNorm) |
/// | other matrices: A's, AdaLoRA's E's, weights that train whole | `lr` | yes |
pub(crate) fn groups(params: &Params, config: &TrainConfig) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    for id in params.ids() {
        let (name, vector) = (params.name(id), params.is_vector(id));
        let spared = vector && config.no_decay_vectors;
        let (lr, spared) = match config.loraplus_lr_ratio {
            None => (config.lr, spared),
            Some(_) if EMBEDDING.iter().any(|end| name.ends_with(end)) => (config.loraplus_lr_embedding, spared),
            Some(ratio) if vector || B.iter().any(|end| name.ends_with(end)) => {
                (config.lr * ratio, spared || is_spared(params, name))
            }
            Some(_) => (config.lr, spared),
        };
        let group = Group { range: params.range(id), lr, weight_decay: if spared { 0.0 } else { config.weight_decay } };
        match groups.last_mut() {
            Some(last) if (last.lr, last.weight_decay) == (group.lr, group.weight_decay) => {
                last.range.end = group.range.end;
            }
            _ => groups.push(group),
        }
    }
    groups
}

/// LoRA's, and AdaLoRA's.
const B: [&str; 2] = [".lora_B.weight", ".lora_B"];
const EMBEDDING: [&str; 2] = [".lora_embedding_A", ".lora_embedding_B"];

/// Whether PEFT's LoRA+ spares it: a bias, or a parameter of a LayerNorm, which is the normalisation with a bias.
fn is_spared(params: &Params, name: &str) -> bool {
    let gain_with_bias = |module: &str| params.find(&format!("{module}.bias")).is_some();
    name.ends_with(".bias") || name.strip_suffix(".weight").is_some_and(gain_with_bias)
}
