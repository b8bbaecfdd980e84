//! The method and its options, as several commands take them.

use std::path::PathBuf;

use clap::{
    Args,
    builder::{PossibleValue, PossibleValuesParser},
};
use lora_core::peft::METHODS;
use serde::Serialize;

/// Fields of [`TrainConfig`](lora_train::TrainConfig).
#[derive(Args, Serialize)]
#[serde(rename_all = "kebab-case")]
#[command(next_help_heading = "Method")]
pub(crate) struct MethodArgs {
    /// What to train. Options below begin with the methods that read them, alone or in combination [default: lora]
    #[arg(long, value_parser = methods())]
    pub(crate) method: Option<String>,
    /// lora: rank r of the update [default: 8]
    #[arg(long, value_name = "R")]
    rank: Option<usize>,
    /// lora: the update is scaled by alpha/r [default: 16]
    #[arg(long)]
    alpha: Option<f64>,
    /// lora: dropout on the input of the update [default: 0]
    #[arg(long, value_name = "P")]
    dropout: Option<f64>,
    /// lora: scale by alpha/√r (rank-stabilised LoRA)
    #[arg(long, value_name = "true|false", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          hide_possible_values = true)]
    rslora: Option<bool>,
    /// lora: modules to adapt, by PEFT's names (attn.c_proj, c_fc, ...); parts of a fused projection by theirs
    /// (c_attn.q,c_attn.v) [default: PEFT's for the architecture: c_attn, query,value, q_proj,v_proj, ...]
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    targets: Option<Vec<String>>,
    /// adapter-h, adapter-l, adapter-p, adapter-d: width of the bottleneck [default: 48]
    #[arg(long, value_name = "R")]
    bottleneck: Option<usize>,
    /// adapter-h, adapter-l, adapter-p, adapter-d: train the base's normalisations too, as Houlsby et al. do and the LoRA
    /// paper's counts do not
    #[arg(long, value_name = "true|false", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          hide_possible_values = true)]
    train_norms: Option<bool>,
    /// top2: layers that train, as last:N, first:N, all, or numbers from 0 such as 0,2,4-7 [default: last:2]
    #[arg(long, value_name = "LAYERS")]
    layers: Option<String>,
    /// adapter-d: layers without an adapter, as first:N, last:N, none, or numbers from 0 [default: the lowest five of twelve,
    /// and so on]
    #[arg(long, value_name = "LAYERS")]
    drop_layers: Option<String>,
    /// pre-embed, pre-layer: virtual tokens before the text [default: 8]
    #[arg(long, value_name = "N")]
    prefix: Option<usize>,
    /// pre-embed, pre-layer: virtual tokens after the prompt [default: 0]
    #[arg(long, value_name = "N")]
    infix: Option<usize>,
    /// pre-layer: width of the hidden layer that it is reparametrised with while it trains; 0 is none [default: 0]
    #[arg(long, value_name = "M")]
    reparam: Option<usize>,
    /// fusion: folders of trained adapters of adapter-p to combine
    #[arg(long, value_name = "DIR,...", value_delimiter = ',')]
    fuse: Option<Vec<PathBuf>>,
    /// Dropout of the base itself while training [default: what the model's configuration says]
    #[arg(long, value_name = "P")]
    base_dropout: Option<f64>,
}

fn methods() -> PossibleValuesParser {
    PossibleValuesParser::new(METHODS.iter().map(|m| PossibleValue::new(m.name).help(m.about)))
}
