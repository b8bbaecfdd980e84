//! The method and its options, as several commands take them.

use std::{convert::Infallible, path::PathBuf, str::FromStr};

use clap::{
    Args,
    builder::{PossibleValue, PossibleValuesParser},
};
use lora_core::peft::{Bias, InitLoraWeights, METHODS, Modules};
use serde::{Serialize, Serializer};

/// Fields of [`TrainConfig`](lora_train::TrainConfig).
#[derive(Args, Serialize)]
#[serde(rename_all = "kebab-case")]
#[command(next_help_heading = "Method")]
pub(crate) struct MethodArgs {
    /// What to train. Options below begin with the methods that read them, alone or in combination [default: lora]
    #[arg(long, value_parser = methods())]
    pub(crate) method: Option<String>,
    /// lora, lokr, vera: rank r of the update [default: 8]
    #[arg(long, alias = "r", value_name = "R")]
    rank: Option<usize>,
    /// lora, lokr, adalora: the update is scaled by alpha/r [default: 16]
    #[arg(long, alias = "lora-alpha")]
    alpha: Option<f64>,
    /// lora, vera, adalora: dropout on the input of the update [default: 0]
    #[arg(long, alias = "lora-dropout", value_name = "P")]
    dropout: Option<f64>,
    /// lora: scale by alpha/√r (rank-stabilised LoRA)
    #[arg(long, alias = "use-rslora", value_name = "true|false", num_args = 0..=1, require_equals = true,
          default_missing_value = "true", hide_possible_values = true)]
    rslora: Option<bool>,
    /// lora, lokr, vera, adalora, ia3, ln-tuning: modules to adapt, by PEFT's names (attn.c_proj, c_fc, ...); with lora
    /// parts of a fused projection by theirs (c_attn.q,c_attn.v); all-linear; or a regular expression that a module's
    /// whole name matches ('.*(q|v)_proj') [default: PEFT's for the architecture: c_attn, query,value, q_proj,v_proj,
    /// ...]
    #[arg(long, alias = "target-modules", value_name = "NAME,...|REGEX", value_parser = modules)]
    #[serde(serialize_with = "as_list_or_text")]
    targets: Option<Modules>,
    /// lora, lokr, adalora, ia3, ln-tuning: modules not to adapt, although a target names them, as names or a regular
    /// expression
    #[arg(long, value_name = "NAME,...|REGEX", value_parser = modules)]
    #[serde(serialize_with = "as_list_or_text")]
    exclude_modules: Option<Modules>,
    /// lora, lokr, vera, adalora: adapt in these layers alone, numbered from 0
    #[arg(long, value_name = "N,...", value_delimiter = ',')]
    layers_to_transform: Option<Vec<usize>>,
    /// lora, lokr, vera, adalora: what stands before a layer's number in the names of modules, such as h or layers
    /// [default: anything]
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    layers_pattern: Option<Vec<String>>,
    /// lora, lokr: another rank for the modules that KEY names, as a target does or as a regular expression; may be
    /// given again
    #[arg(long, value_name = "KEY=R", value_parser = entry::<usize>)]
    #[serde(serialize_with = "as_map")]
    rank_pattern: Option<Vec<(String, usize)>>,
    /// lora, lokr: another alpha for the modules that KEY names; may be given again
    #[arg(long, value_name = "KEY=ALPHA", value_parser = entry::<f64>)]
    #[serde(serialize_with = "as_map")]
    alpha_pattern: Option<Vec<(String, f64)>>,
    /// lora, lokr, vera, adalora, ia3, ln-tuning: modules of the base to train whole and save beside the adapter, by
    /// the ends of their names (ln_f)
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    modules_to_save: Option<Vec<String>>,
    /// lora: biases of the base that train too: none, all of them, or those of adapted modules [default: none]
    #[arg(long, value_parser = PossibleValuesParser::new(Bias::ALL.map(|(word, _)| word)), hide_possible_values = true,
          value_name = "none|all|lora_only")]
    bias: Option<String>,
    /// lora: train the lengths of adapted weights apart from their directions (DoRA)
    #[arg(long, value_name = "true|false", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          hide_possible_values = true)]
    use_dora: Option<bool>,
    /// lora: how A and B begin, as in PEFT: true (A at random, B zero), false (both at random), gaussian, orthogonal, or, of the
    /// base's own weights, pissa, pissa_niter_N (N iterations in place of the whole decomposition), olora; these two train
    /// beside what is left of the base, and are saved as adapters of twice the rank for the base as it is [default: true]
    #[arg(long, value_name = "WORD", value_parser = init)]
    init_lora_weights: Option<String>,
    /// lora: PEFT's word for weights that are stored [in, out], as GPT-2's are; the model says so itself, and another value is
    /// refused [default: the model's]
    #[arg(long, value_name = "true|false", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          hide_possible_values = true)]
    fan_in_fan_out: Option<bool>,
    /// ia3: among the targets those whose inputs are multiplied, not the outputs [default: PEFT's]
    #[arg(long, value_name = "NAME,...|REGEX", value_parser = modules)]
    #[serde(serialize_with = "as_list_or_text")]
    feedforward_modules: Option<Modules>,
    /// adapter-h, adapter-l, adapter-p, adapter-d: width of the bottleneck [default: 48]
    #[arg(long, value_name = "R")]
    bottleneck: Option<usize>,
    /// adapter-h, adapter-l, adapter-p, adapter-d: what stands between its two maps: relu, gelu, gelu_new, silu or tanh
    /// [default: gelu in adapter-h, relu in the others]
    #[arg(long, value_name = "NAME")]
    non_linearity: Option<String>,
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
    /// pre-layer: whether virtual tokens count as positions of the text, as in PEFT; in AdapterHub they do not [default: true]
    #[arg(long, value_name = "true|false", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          hide_possible_values = true)]
    count_prefix: Option<bool>,
    /// pre-embed: whether a text is classified by the first virtual token, as in PEFT, rather than by its own first token
    /// [default: false]
    #[arg(long, value_name = "true|false", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          hide_possible_values = true)]
    classify_prefix: Option<bool>,
    /// pre-layer: width of the hidden layer that it is reparametrised with while it trains; 0 is none [default: 0]
    #[arg(long, value_name = "M")]
    reparam: Option<usize>,
    /// fusion: folders of trained adapters of adapter-p to combine
    #[arg(long, value_name = "DIR,...", value_delimiter = ',')]
    fuse: Option<Vec<PathBuf>>,
    /// lokr: factor both factors of the product, where the rank is low enough
    #[arg(long, value_name = "true|false", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          hide_possible_values = true)]
    decompose_both: Option<bool>,
    /// lokr: one of the two factors of inputs and outputs, where it divides them; -1 is near their square roots
    /// [default: -1]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    decompose_factor: Option<i64>,
    /// vera: what the vector between the random matrices begins at [default: 0.1]
    #[arg(long, value_name = "X")]
    d_initial: Option<f64>,
    /// vera: seed of the random matrices [default: 0]
    #[arg(long, value_name = "N")]
    projection_prng_key: Option<u64>,
    /// vera: save the random matrices with the adapter, so that no reader has to draw them again [default: true]
    #[arg(long, value_name = "true|false", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          hide_possible_values = true)]
    save_projection: Option<bool>,
    /// adalora: rank of each update when training begins [default: 12]
    #[arg(long, value_name = "R")]
    init_r: Option<usize>,
    /// adalora: their mean rank when it ends [default: 8]
    #[arg(long, value_name = "R")]
    target_r: Option<usize>,
    /// adalora: steps before ranks are taken away [default: 0]
    #[arg(long, value_name = "N")]
    tinit: Option<u64>,
    /// adalora: steps after the last were [default: 0]
    #[arg(long, value_name = "N")]
    tfinal: Option<u64>,
    /// adalora: steps from one time that ranks are taken away to the next [default: 1]
    #[arg(long, alias = "deltaT", value_name = "N")]
    delta_t: Option<u64>,
    /// adalora: steps of the schedule [default: those of the run]
    #[arg(long, value_name = "N")]
    total_step: Option<u64>,
    /// adalora: beta of the mean of sensitivities; PEFT's beta1 [default: 0.85]
    #[arg(long, value_name = "BETA")]
    adalora_beta1: Option<f64>,
    /// adalora: beta of the mean of their deviations; PEFT's beta2 [default: 0.85]
    #[arg(long, value_name = "BETA")]
    adalora_beta2: Option<f64>,
    /// adalora: weight of the penalty that keeps its factors near orthonormal [default: 0.5]
    #[arg(long, value_name = "X")]
    orth_reg_weight: Option<f64>,
    /// Dropout of the base itself while training [default: what the model's configuration says]
    #[arg(long, value_name = "P")]
    base_dropout: Option<f64>,
}

fn methods() -> PossibleValuesParser {
    PossibleValuesParser::new(METHODS.iter().map(|m| PossibleValue::new(m.name).help(m.about)))
}

fn modules(text: &str) -> Result<Modules, Infallible> {
    Ok(Modules::of_line(text))
}

fn init(text: &str) -> Result<String, String> {
    // What is refused says why, without naming the option once more.
    match InitLoraWeights::parse(text) {
        Ok(init) => Ok(init.word()),
        Err(lora_core::Error::Option { why, .. }) => Err(why),
        Err(e) => Err(e.to_string()),
    }
}

/// `KEY=VALUE`; the key, a regular expression, may hold a `=` itself.
fn entry<T: FromStr>(text: &str) -> Result<(String, T), String> {
    let (key, value) = text.rsplit_once('=').ok_or("expected the name of a module, =, and a number")?;
    let value = value.trim().parse().map_err(|_| format!("expected a number after the last =, found {value:?}"))?;
    Ok((key.trim().to_owned(), value))
}

fn as_list_or_text<S: Serializer>(modules: &Option<Modules>, to: S) -> Result<S::Ok, S::Error> {
    match modules {
        Some(Modules::Names(names)) => names.serialize(to),
        Some(other) => other.to_string().serialize(to),
        None => to.serialize_none(),
    }
}

fn as_map<T: Serialize, S: Serializer>(entries: &Option<Vec<(String, T)>>, to: S) -> Result<S::Ok, S::Error> {
    match entries {
        Some(entries) => to.collect_map(entries.iter().map(|(key, value)| (key, value))),
        None => to.serialize_none(),
    }
}
