//! Adapters in PEFT's own format beside LoRA: its types, which keys their configurations have, and what their tensors are
//! called in a file.

mod adalora;
mod lokr;
mod vera;

use std::collections::BTreeMap;

use lora_core::{
    Tensor,
    lowrank::Layout,
    peft::{AdaLora, Adapted, Ia3, LnTuning, MethodRow, Modules, Options, Outline, find, saves},
};
use serde_json::{Value, json};

use super::{
    ARCHITECTURE_KEY, AdapterFile, AdapterTensors, PREFIX, check_rank,
    config::{modules, one_or_more, read_modules, some, some_modules, without_heads},
    finite,
    options::HARMLESS,
    own::strings,
    peft::is_table,
    twice,
};
use crate::{Error, Result, config::RawConfig, error::List};

/// A type of PEFT's that is read and written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Ia3,
    LnTuning,
    LoKr,
    Vera,
    AdaLora,
    Prompt,
    Prefix,
}

/// Each with PEFT's word and the method.
const KINDS: [(Kind, &str, &str); 7] = [
    (Kind::Ia3, "IA3", "ia3"),
    (Kind::LnTuning, "LN_TUNING", "ln-tuning"),
    (Kind::LoKr, "LOKR", "lokr"),
    (Kind::Vera, "VERA", "vera"),
    (Kind::AdaLora, "ADALORA", "adalora"),
    (Kind::Prompt, "PROMPT_TUNING", "pre-embed"),
    (Kind::Prefix, "PREFIX_TUNING", "pre-layer"),
];

/// What PEFT puts before the name of a module that trains whole beside virtual tokens.
const BESIDE: &str = "base_model.";
/// PEFT's name for all virtual tokens.
const PROMPT: &str = "prompt_embeddings";

impl Kind {
    /// The one of this word.
    pub(super) fn named(word: &str) -> Option<Kind> {
        KINDS.iter().find(|(_, w, _)| *w == word).map(|(kind, ..)| *kind)
    }

    /// The words of all.
    pub(super) fn words() -> impl Iterator<Item = &'static str> {
        KINDS.iter().map(|(_, word, _)| *word)
    }

    /// PEFT's word for a method all of whose adapters it has.
    pub(super) fn alone(method: &str) -> Option<&'static str> {
        let row = KINDS.iter().find(|(.., own)| *own == method);
        let always = |kind: &Kind| matches!(kind, Kind::Ia3 | Kind::LnTuning | Kind::Vera | Kind::AdaLora);
        row.filter(|(kind, ..)| always(kind)).map(|(_, word, _)| *word).or((method == "lora").then_some("LORA"))
    }

    /// How PEFT has what a method trained, if it has it. Its LoKr has no layer for weights stored [in, out]. It puts virtual
    /// tokens before the text alone and counts them as positions, it has none for tasks that it has no name for, and with
    /// prompt tuning it classifies a text by the first virtual token.
    pub(super) fn of(row: &MethodRow, options: &Options, outline: &Outline) -> Option<Kind> {
        let (kind, ..) = KINDS.iter().find(|(.., method)| *method == row.name)?;
        match kind {
            Kind::Ia3 | Kind::LnTuning | Kind::Vera | Kind::AdaLora => true,
            Kind::LoKr => outline.linear_sites().all(|(_, linear)| linear.layout == Layout::OutIn),
            Kind::Prompt => match outline.task_type {
                Some("CAUSAL_LM") => options.infix == 0,
                Some("SEQ_CLS") => options.infix == 0 && options.classify_prefix,
                _ => false,
            },
            Kind::Prefix => options.infix == 0 && options.count_prefix && outline.task_type.is_some(),
        }
        .then_some(*kind)
    }

    /// The text of `adapter_config.json`.
    pub(super) fn text(
        self,
        options: &Options,
        outline: &Outline,
        adapted: &Adapted,
        base_model: Option<&str>,
    ) -> String {
        let (_, word, _) = KINDS.iter().find(|(kind, ..)| *kind == self).expect("each kind has a row");
        let mut saved = outline.modules_to_save.clone();
        let mut keys: BTreeMap<&str, Value> = [
            ("base_model_name_or_path", json!(base_model)),
            ("inference_mode", json!(true)),
            ("peft_type", json!(word)),
            ("task_type", json!(outline.task_type)),
        ]
        .into();
        let more = |saved: &mut Vec<String>| {
            saved.extend(options.modules_to_save.iter().filter(|m| !outline.modules_to_save.contains(m)).cloned());
        };
        let excluded = (!options.exclude_modules.is_default()).then(|| modules(&options.exclude_modules));
        match self {
            Kind::Ia3 => {
                let or = |named: &Modules, default| if named.is_default() { default } else { named.clone() };
                let [targets, feedforward] = Ia3::defaults(outline).unwrap_or_default();
                let targets = or(&options.targets, targets);
                let feedforward = or(&options.feedforward_modules, feedforward);
                more(&mut saved);
                keys.extend([
                    ("exclude_modules", json!(excluded)),
                    ("fan_in_fan_out", json!(outline.linear_sites().any(|(_, l)| l.layout == Layout::InOut))),
                    ("feedforward_modules", among(feedforward, &targets)),
                    ("init_ia3_weights", json!(true)),
                    ("target_modules", modules(&sorted(targets))),
                ]);
            }
            Kind::LnTuning => {
                let targets = match options.targets.is_default() {
                    true => LnTuning::default_targets(outline),
                    false => options.targets.clone(),
                };
                more(&mut saved);
                keys.extend([("target_modules", modules(&sorted(targets))), ("exclude_modules", json!(excluded))]);
            }
            Kind::LoKr | Kind::Vera => {
                more(&mut saved);
                keys.extend(selected(options, Modules::Names(outline.default_targets.clone())));
                keys.extend(if self == Kind::LoKr { lokr::keys(options) } else { vera::keys(options, outline) });
            }
            Kind::AdaLora => {
                more(&mut saved);
                keys.extend(selected(options, AdaLora::default_targets(outline)));
                keys.extend(adalora::keys(options, outline, adapted));
            }
            Kind::Prompt | Kind::Prefix => {
                // The widths PEFT knows from the base, and where heads share keys it would divide them once more.
                keys.extend([
                    ("num_layers", json!(outline.layers)),
                    ("num_transformer_submodules", json!(1)),
                    ("num_virtual_tokens", json!(options.prefix)),
                ]);
            }
        }
        match self {
            Kind::Prompt => drop(keys.insert("prompt_tuning_init", json!("RANDOM"))),
            Kind::Prefix => drop(keys.insert("prefix_projection", json!(false))),
            _ => {}
        }
        keys.insert("modules_to_save", some(&saved));
        format!("{:#}", json!(keys))
    }

    /// The name in a file of a tensor of the adapter.
    pub(super) fn stored_name(self, name: &str, outline: &Outline) -> String {
        match self {
            Kind::LnTuning if outline.tensors.iter().any(|t| t.norm && t.name == name) => {
                let (module, tensor) = name.rsplit_once('.').unwrap_or_default();
                format!("{PREFIX}{module}.{NORM}.{tensor}")
            }
            Kind::Vera => vera::stored_name(name),
            Kind::Ia3 | Kind::LnTuning | Kind::LoKr | Kind::AdaLora => format!("{PREFIX}{name}"),
            Kind::Prompt | Kind::Prefix if name.ends_with(PROMPT) => PROMPT.into(),
            Kind::Prompt | Kind::Prefix => format!("{BESIDE}{name}"),
        }
    }

    /// The adapter of a configuration that was read, and of the tensors beside it.
    pub(super) fn load(self, raw: RawConfig, file: &AdapterTensors) -> Result<AdapterFile> {
        check(self, &raw)?;
        let (_, _, method) = KINDS.iter().find(|(kind, ..)| *kind == self).expect("each kind has a row");
        let row = find(method)?;
        let mut options = Options::default();
        let task_type = raw.str("task_type")?.map(str::to_owned);
        let mut saved = strings(&raw, "modules_to_save")?.unwrap_or_default();
        saved.dedup();
        match self {
            Kind::Ia3 | Kind::LnTuning | Kind::LoKr | Kind::Vera | Kind::AdaLora => {
                match self {
                    Kind::LoKr => lokr::read(&raw, &mut options)?,
                    Kind::Vera => vera::read(&raw, &mut options)?,
                    Kind::AdaLora => adalora::read(&raw, &mut options)?,
                    _ => {}
                }
                if matches!(self, Kind::LoKr | Kind::Vera | Kind::AdaLora) {
                    read_selected(&raw, &mut options)?;
                }
                if self == Kind::Ia3 {
                    let none = raw.value("feedforward_modules") == Some(&json!([]));
                    let named = || some_modules(&raw, "feedforward_modules");
                    options.feedforward_modules = if none { Modules::nothing() } else { named()? };
                }
                options.targets = read_modules(&raw, "target_modules")?.unwrap_or_default();
                options.exclude_modules = some_modules(&raw, "exclude_modules")?;
                options.modules_to_save = without_heads(&saved, task_type.as_deref());
            }
            Kind::Prompt | Kind::Prefix => {
                let needed = || raw.error("num_virtual_tokens", "missing; it says how the adapter was made");
                options.prefix = raw.usize("num_virtual_tokens")?.ok_or_else(needed)?;
                options.infix = 0;
                options.classify_prefix = self == Kind::Prompt && task_type.as_deref() == Some("SEQ_CLS");
            }
        }
        let (mut tensors, mut repeated, mut strange) = (BTreeMap::new(), BTreeMap::new(), Vec::new());
        let mut keys: BTreeMap<String, &str> = BTreeMap::new();
        for key in file.names() {
            let (Some(own), Some(info)) = (self.own_name(key, &saved), file.info(key)) else {
                let name = key.strip_prefix(PREFIX).unwrap_or(key);
                if let Some(module) = name.strip_suffix(".base_layer.weight") {
                    let problem = format!("{module}: this type has no adapters of embeddings and output heads here");
                    return Err(raw.error("target_modules", problem));
                }
                match file.info(key).filter(|_| is_table(name)) {
                    Some(info) => drop(repeated.insert(name.to_owned(), finite(file, &info)?)),
                    None => strange.push(key.to_owned()),
                }
                continue;
            };
            if let Some(first) = keys.insert(own.clone(), key) {
                return Err(twice(file, first, key));
            }
            let wanted = match self {
                Kind::Vera => vera::rank(&own, &options),
                Kind::AdaLora => adalora::rank(&own, &options),
                _ => None,
            };
            if let Some((dimension, r)) = wanted {
                check_rank(file, &raw, &info, dimension, r)?;
            }
            tensors.insert(own, finite(file, &info)?);
        }
        if !strange.is_empty() {
            let problem = format!("not a tensor of this kind of adapter: {}", List(&strange));
            return Err(Error::Weights { file: file.path().to_owned(), problem });
        }
        if self == Kind::Vera {
            options.projection = vera::projection(&tensors);
        }
        let adapter = AdapterFile {
            method: row.name,
            options,
            base_model_name_or_path: raw.str("base_model_name_or_path")?.map(str::to_owned),
            tensors,
            architecture: file.metadata().get(ARCHITECTURE_KEY).cloned(),
            task_type,
            base_fingerprint: None,
            repeated,
            weights: file.path().to_owned(),
            raw,
        };
        adapter.build()?;
        Ok(adapter)
    }

    /// The name here of a tensor of the file. Virtual tokens have that of their site only once there is a base.
    fn own_name(self, key: &str, saved: &[String]) -> Option<String> {
        let whole = |name: &str| saved.iter().any(|m| saves(m, name)).then(|| name.to_owned());
        match self {
            Kind::Ia3 => of_module(key, &["ia3_l"]).or_else(|| whole(key.strip_prefix(PREFIX)?)),
            Kind::Vera => vera::own_name(key)
                .or_else(|| of_module(key, &vera::TENSORS))
                .or_else(|| whole(key.strip_prefix(PREFIX)?)),
            Kind::AdaLora => of_module(key, &adalora::TENSORS).or_else(|| whole(key.strip_prefix(PREFIX)?)),
            Kind::LoKr => of_module(key, &lokr::TENSORS).or_else(|| whole(key.strip_prefix(PREFIX)?)),
            Kind::LnTuning => {
                let name = key.strip_prefix(PREFIX)?;
                let norm = name.rsplit_once('.').and_then(|(module, tensor)| {
                    // With or without the adapter's own name.
                    let (module, rest) = module.split_once(&format!(".{NORM}"))?;
                    (rest.is_empty() || rest.starts_with('.') && !rest[1..].contains('.'))
                        .then(|| format!("{module}.{tensor}"))
                });
                norm.or_else(|| whole(name))
            }
            Kind::Prompt | Kind::Prefix if key == PROMPT => Some(PROMPT.into()),
            Kind::Prompt | Kind::Prefix => whole(key.strip_prefix(BESIDE)?),
        }
    }
}

/// The name here of a tensor of a module that ends in one of these names, with or without the adapter's own after it.
fn of_module(key: &str, names: &[&str]) -> Option<String> {
    let name = key.strip_prefix(PREFIX)?;
    let of = |own: &&str| {
        let of_this =
            |path: &str| path.strip_suffix(*own)?.strip_suffix('.').filter(|m| !m.is_empty()).map(str::to_owned);
        let named = || name.rsplit_once('.').and_then(|(path, _)| of_this(path));
        of_this(name).or_else(named).map(|module| format!("{module}.{own}"))
    };
    names.iter().find_map(of)
}

/// The keys that say what is adapted, as those of LoRA do.
fn selected(o: &Options, default_targets: Modules) -> Vec<(&'static str, Value)> {
    let targets = if o.targets.is_default() { default_targets } else { o.targets.clone() };
    let mut keys = vec![("target_modules", modules(&sorted(targets)))];
    keys.extend((!o.exclude_modules.is_default()).then(|| ("exclude_modules", modules(&o.exclude_modules))));
    keys.extend((!o.layers_to_transform.is_empty()).then(|| ("layers_to_transform", json!(o.layers_to_transform))));
    keys.extend((!o.layers_pattern.is_empty()).then(|| ("layers_pattern", json!(o.layers_pattern))));
    keys
}

/// Those that no other type reads.
fn read_selected(raw: &RawConfig, o: &mut Options) -> Result<()> {
    let number = |v: &Value| v.as_u64()?.try_into().ok();
    o.layers_to_transform = one_or_more(raw, "layers_to_transform", "a layer's number", number)?;
    o.layers_pattern = one_or_more(raw, "layers_pattern", "a name", |v| v.as_str().map(str::to_owned))?;
    o.layers_pattern.retain(|p| !p.is_empty());
    Ok(())
}

/// Names in the order of the alphabet, as PEFT's sets are best compared.
fn sorted(modules: Modules) -> Modules {
    match modules {
        Modules::Names(mut names) => {
            names.sort();
            Modules::Names(names)
        }
        other => other,
    }
}

/// `feedforward_modules`: of a list PEFT takes only what is among the targets by the same name, so that other names of
/// targets stand in an expression.
fn among(feedforward: Modules, targets: &Modules) -> Value {
    let (mut names, targets) = match (feedforward, targets) {
        (Modules::Names(names), Modules::Names(targets)) => (names, targets),
        (other, _) if other == Modules::nothing() => return json!([]),
        (other, _) => return modules(&sorted(other)),
    };
    names.retain(|n| targets.iter().any(|t| t.ends_with(n.as_str()) || n.ends_with(t.as_str())));
    match names.iter().all(|n| targets.contains(n)) {
        true => modules(&sorted(Modules::Names(names))),
        false => json!(format!(".*({})", names.join("|").replace('.', r"\."))),
    }
}

/// What PEFT calls its copies of normalisations.
const NORM: &str = "ln_tuning_layers";

/// Gives what all sites share, such as virtual tokens, the name that it has on a base, the only one of `wanted` that ends so.
pub(super) fn placed(
    tensors: &BTreeMap<String, Tensor>,
    wanted: &BTreeMap<String, Tensor>,
) -> BTreeMap<String, Tensor> {
    let place = |name: &str| wanted.keys().find(|w| w.strip_suffix(name).is_some_and(|site| site.ends_with('.')));
    let named = |(name, t): (&String, &Tensor)| match name.as_str() {
        PROMPT | vera::A | vera::B => (place(name).unwrap_or(name).clone(), t.clone()),
        _ => (name.clone(), t.clone()),
    };
    tensors.iter().map(named).collect()
}

/// Refuses what would compute something else, by its key.
fn check(kind: Kind, raw: &RawConfig) -> Result<()> {
    // Read, or without a meaning for what a saved adapter computes.
    const GENERAL: [&str; 8] = [
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "revision",
        "task_type",
    ];
    const MODULES: [&str; 2] = ["target_modules", "exclude_modules"];
    // How the base stores its weights, the base knows better; how the vectors began does not matter.
    const GAINS: [&str; 3] = ["fan_in_fan_out", "feedforward_modules", "init_ia3_weights"];
    const LAYERS: [&str; 2] = ["layers_to_transform", "layers_pattern"];
    // Sizes that the tensor has to have anyway, and how it began.
    const TOKENS: [&str; 10] = [
        "encoder_hidden_size",
        "init_weights",
        "num_attention_heads",
        "num_layers",
        "num_virtual_tokens",
        "prompt_tuning_init",
        "prompt_tuning_init_text",
        "token_dim",
        "tokenizer_kwargs",
        "tokenizer_name_or_path",
    ];
    // Saved flattened, a projection is gone.
    const PROJECTION: &str = "prefix_projection";
    let known = |key: &str| match kind {
        Kind::Ia3 => MODULES.contains(&key) || GAINS.contains(&key),
        Kind::LnTuning => MODULES.contains(&key),
        Kind::AdaLora => {
            let of_lora = HARMLESS.contains(&key) && !adalora::NOT_ITS_OWN.contains(&key) && key != "bias";
            of_lora || adalora::KNOWN.contains(&key)
        }
        Kind::Vera => key == MODULES[0] || LAYERS.contains(&key) || vera::KNOWN.contains(&key),
        Kind::LoKr => MODULES.contains(&key) || LAYERS.contains(&key) || lokr::KNOWN.contains(&key),
        Kind::Prompt => TOKENS.contains(&key),
        Kind::Prefix => TOKENS.contains(&key) || key == PROJECTION,
    };
    for (key, value) in raw.keys() {
        if key == "num_transformer_submodules"
            && matches!(value.as_u64(), None | Some(1))
            && matches!(kind, Kind::Prompt | Kind::Prefix)
        {
            continue;
        }
        if key == "bias" && matches!(kind, Kind::Vera | Kind::AdaLora) && value == "none" {
            continue;
        }
        if kind == Kind::LoKr && ["rank_dropout", "module_dropout"].contains(&key.as_str()) {
            // It changes nothing about what a trained adapter computes.
            if value.as_f64().is_some_and(|p| p != 0.0) {
                tracing::warn!(
                    "{}: {key} = {value} is not done here: training goes on without it",
                    raw.path().display()
                );
            }
            continue;
        }
        if !GENERAL.contains(&key.as_str()) && !known(key) && !super::options::is_empty(value) {
            return Err(raw.error(key, format_args!("is not supported with this type of adapter; found {value}")));
        }
    }
    Ok(())
}
