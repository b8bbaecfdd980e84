use std::collections::{BTreeMap, BTreeSet};

use lora_core::peft::{Bias, InitLoraWeights, Lora, LoraConfig, Modules, Outline, names};
use serde_json::{Map, Value, json};

use super::{own::strings, refused};
use crate::{Result, config::RawConfig};

/// What `adapter_config.json` says.
#[derive(Clone, Debug)]
pub(super) struct PeftConfig {
    /// The adapter as one of whole modules.
    pub(super) lora: LoraConfig,
    pub(super) base_model: Option<String>,
    /// All modules that train whole, a classifier's head included.
    pub(super) modules_to_save: Vec<String>,
    pub(super) task_type: Option<String>,
}

/// What PEFT adds to the modules to save of every classifier, whatever its head is called.
const HEADS: [&str; 2] = ["classifier", "score"];

/// The modules to save that are no head of a classifier, which is none of the adapter's options.
pub(super) fn without_heads(modules: &[String], task_type: Option<&str>) -> Vec<String> {
    let is_head = |m: &&String| task_type == Some("SEQ_CLS") && HEADS.contains(&m.as_str());
    modules.iter().filter(|m| !is_head(m)).cloned().collect()
}

/// PEFT's rule for the keys of patterns, for keys of plain names: a dot in the key stands for any character.
fn pattern_names(key: &str, module: &str) -> bool {
    let Some(from) = module.len().checked_sub(key.len()) else { return false };
    let (head, tail) = module.as_bytes().split_at(from);
    let same = tail.iter().zip(key.as_bytes()).all(|(m, k)| m == k || *k == b'.');
    same && (head.is_empty() || head.ends_with(b"."))
}

/// The module that a target adapts at this site: itself, or what it is a part of.
fn module_of<'a>(target: &'a str, site: &str) -> Option<&'a str> {
    if names(target, site) {
        return Some(target);
    }
    let (module, _) = target.rsplit_once('.')?;
    names(module, site).then_some(module)
}

/// Whether some target names a part of the site rather than the whole.
pub(super) fn has_parts<'a>(config: &LoraConfig, mut sites: impl Iterator<Item = &'a str>) -> bool {
    let Modules::Names(targets) = &config.targets else { return false };
    sites.any(|s| !targets.iter().any(|t| names(t, s)))
}

/// The adapter of whole modules that equals one of parts, where `sites` says how many parts are adapted at each site, and
/// what rank and α each of them has: n parts of rank r are one update of rank n·r, whose α keeps the scale α/r (or α/√r).
fn of_whole_modules<'a>(config: &'a LoraConfig, sites: &BTreeMap<&str, (usize, usize, f64)>) -> LoraConfig {
    let alpha = |a: f64, n: usize| a * if config.rslora { (n as f64).sqrt() } else { n as f64 };
    let targets = match &config.targets {
        Modules::Names(targets) => {
            // A target that adapts nothing, because its modules are left out, stays what it is.
            let module = |t: &'a String| sites.keys().find_map(|s| module_of(t, s)).unwrap_or(t);
            targets.iter().map(module).collect::<BTreeSet<&str>>().into_iter().collect()
        }
        all => all.clone(),
    };
    let fewest = sites.values().map(|(n, ..)| *n).min().unwrap_or(1);
    let base = (fewest * config.rank, alpha(config.alpha, fewest));
    let mut whole = LoraConfig { rank: base.0, alpha: base.1, targets, ..config.clone() };
    if sites.values().all(|(n, ..)| *n == fewest) {
        whole.rank_pattern.iter_mut().for_each(|(_, r)| *r *= fewest);
        whole.alpha_pattern.iter_mut().for_each(|(_, a)| *a = alpha(*a, fewest));
        return whole;
    }
    let of = |(n, r, a): (usize, usize, f64)| (n * r, alpha(a, n));
    let (mut ranks, mut alphas) = (BTreeMap::new(), BTreeMap::new());
    for (site, &setting) in sites.iter().filter(|(_, setting)| of(**setting) != base) {
        let (rank, alpha) = of(setting);
        // The short name where it means the same at every site that it can name, else the site itself.
        let Modules::Names(short) = &whole.targets else { unreachable!("parts are targets by name") };
        let same = |m: &String| sites.iter().all(|(s, other)| of(*other) == (rank, alpha) || !pattern_names(m, s));
        let key = short.iter().find(|m| names(m, site) && same(m)).map_or(*site, String::as_str);
        ranks.insert(key.to_owned(), rank);
        alphas.insert(key.to_owned(), alpha);
    }
    (whole.rank_pattern, whole.alpha_pattern) = (ranks.into_iter().collect(), alphas.into_iter().collect());
    whole
}

impl PeftConfig {
    /// The description of an adapter that was trained with `config`, where `sites` says how many parts are adapted at each
    /// site.
    ///
    /// # Errors
    /// A regular expression among the keys of patterns that takes too long.
    pub(super) fn of(
        config: &LoraConfig,
        sites: &BTreeMap<&str, usize>,
        base_model: Option<String>,
        outline: &Outline,
    ) -> Result<PeftConfig> {
        let lora = Lora::new(config.clone())?;
        let setting = |(site, n): (&&str, &usize)| {
            let (rank, alpha) = lora.rank_and_alpha(site)?;
            lora_core::Result::Ok(((*site).to_owned(), (*n, rank, alpha)))
        };
        let settings = sites.iter().map(setting).collect::<lora_core::Result<BTreeMap<String, _>>>()?;
        let settings = settings.iter().map(|(site, setting)| (site.as_str(), *setting)).collect();
        let mut modules_to_save = outline.modules_to_save.clone();
        modules_to_save.extend(config.modules_to_save.iter().filter(|m| !outline.modules_to_save.contains(m)).cloned());
        Ok(PeftConfig {
            lora: of_whole_modules(config, &settings),
            base_model,
            modules_to_save,
            task_type: outline.task_type.map(str::to_owned),
        })
    }

    /// The first key whose value differs from `other`'s, and both values; numbers may differ in their last digits,
    /// which a JSON reader may round another way.
    pub(super) fn difference(&self, other: &PeftConfig) -> Option<(&'static str, String, String)> {
        let near = |a: f64, b: f64| (a - b).abs() <= 1e-12 * b.abs();
        let sorted = |m: &Modules| match m {
            Modules::Names(names) => json!(names.iter().collect::<BTreeSet<_>>()),
            other => modules(other),
        };
        let (a, b) = (&self.lora, &other.lora);
        let same = a.alpha_pattern.iter().zip(&b.alpha_pattern).all(|((k, x), (l, y))| k == l && near(*x, *y));
        let alphas = a.alpha_pattern.len() == b.alpha_pattern.len() && same;
        let shown = |key, a: &dyn ToString, b: &dyn ToString| Some((key, a.to_string(), b.to_string()));
        match () {
            () if a.rank != b.rank => shown("r", &a.rank, &b.rank),
            () if !near(a.alpha, b.alpha) => shown("lora_alpha", &a.alpha, &b.alpha),
            () if sorted(&a.targets) != sorted(&b.targets) => {
                shown("target_modules", &modules(&a.targets), &modules(&b.targets))
            }
            () if a.rank_pattern != b.rank_pattern => {
                shown("rank_pattern", &ranks(&a.rank_pattern), &ranks(&b.rank_pattern))
            }
            () if !alphas => shown("alpha_pattern", &alphas_of(&a.alpha_pattern), &alphas_of(&b.alpha_pattern)),
            () => None,
        }
    }

    /// The text of `adapter_config.json`: all keys that PEFT needs and those that say more than its defaults, sorted,
    /// indented by two.
    pub(super) fn text(&self, fan_in_fan_out: bool) -> String {
        let c = &self.lora;
        let mut keys: BTreeMap<&str, Value> = [
            ("alpha_pattern", alphas_of(&c.alpha_pattern)),
            ("base_model_name_or_path", json!(self.base_model)),
            ("bias", json!(c.bias.word())),
            ("fan_in_fan_out", json!(fan_in_fan_out)),
            ("inference_mode", json!(true)),
            ("init_lora_weights", init_value(c.init_lora_weights)),
            ("lora_alpha", number(c.alpha)),
            ("lora_dropout", json!(c.dropout)),
            ("modules_to_save", some(&self.modules_to_save)),
            ("peft_type", json!("LORA")),
            ("r", json!(c.rank)),
            ("rank_pattern", ranks(&c.rank_pattern)),
            ("target_modules", modules(&c.targets)),
            ("task_type", json!(self.task_type)),
            ("use_dora", json!(c.use_dora)),
            ("use_rslora", json!(c.rslora)),
        ]
        .into();
        let more = [
            ("exclude_modules", (!c.exclude_modules.is_default()).then(|| modules(&c.exclude_modules))),
            ("layers_to_transform", (!c.layers_to_transform.is_empty()).then(|| json!(c.layers_to_transform))),
            ("layers_pattern", (!c.layers_pattern.is_empty()).then(|| json!(c.layers_pattern))),
        ];
        keys.extend(more.into_iter().filter_map(|(key, value)| Some((key, value?))));
        format!("{:#}", json!(keys))
    }

    /// Reads `adapter_config.json`, whose options were checked.
    pub(super) fn of_raw(raw: &RawConfig) -> Result<PeftConfig> {
        let needed = |key: &str| raw.error(key, "missing; it says how the adapter was made, so it has to be there");
        let rank = raw.usize("r")?.ok_or_else(|| needed("r"))?;
        let alpha = raw.f64("lora_alpha")?.ok_or_else(|| needed("lora_alpha"))?;
        let dropout = raw.f64("lora_dropout")?.unwrap_or(0.0);
        if !(0.0..1.0).contains(&dropout) {
            return Err(raw.error("lora_dropout", format_args!("a dropout rate is in [0, 1), found {dropout}")));
        }
        check_alpha(raw, "lora_alpha", alpha)?;
        let task_type = raw.str("task_type")?.map(str::to_owned);
        let modules_to_save = strings(raw, "modules_to_save")?.unwrap_or_default();
        let lora = LoraConfig {
            rank,
            alpha,
            dropout,
            rslora: raw.bool("use_rslora")?.unwrap_or(false),
            targets: read_modules(raw, "target_modules")?.unwrap_or_default(),
            exclude_modules: some_modules(raw, "exclude_modules")?,
            layers_to_transform: one_or_more(raw, "layers_to_transform", "a layer's number", |v| {
                v.as_u64()?.try_into().ok()
            })?,
            layers_pattern: one_or_more(raw, "layers_pattern", "a name", |v| v.as_str().map(str::to_owned))?
                .into_iter()
                .filter(|p| !p.is_empty())
                .collect(),
            rank_pattern: pattern(raw, "rank_pattern", "a whole number", |v| v.as_u64()?.try_into().ok())?,
            alpha_pattern: pattern(raw, "alpha_pattern", "a number", Value::as_f64)?,
            modules_to_save: without_heads(&modules_to_save, task_type.as_deref()),
            bias: match raw.str("bias")? {
                Some(word) => Bias::parse(word).map_err(|e| refused(raw, e))?,
                None => Bias::None,
            },
            use_dora: raw.bool("use_dora")?.unwrap_or(false),
            init_lora_weights: read_init(raw)?,
            // The base knows better; PEFT too sets a wrong one right.
            fan_in_fan_out: None,
        };
        lora.alpha_pattern.iter().try_for_each(|(_, a)| check_alpha(raw, "alpha_pattern", *a))?;
        let base_model = raw.str("base_model_name_or_path")?.map(str::to_owned);
        Ok(PeftConfig { lora, base_model, modules_to_save, task_type })
    }
}

/// A list, or null for an empty one.
pub(super) fn some(list: &[String]) -> Value {
    if list.is_empty() { Value::Null } else { json!(list) }
}

/// A list of names, or a text.
pub(super) fn modules(modules: &Modules) -> Value {
    match modules {
        Modules::Names(names) => json!(names),
        other => json!(other.to_string()),
    }
}

/// Module names and ranks, in their order.
pub(super) fn ranks(pattern: &[(String, usize)]) -> Value {
    Value::Object(pattern.iter().map(|(k, r)| (k.clone(), json!(r))).collect())
}

/// Module names and α's, in their order.
pub(super) fn alphas_of(pattern: &[(String, f64)]) -> Value {
    Value::Object(pattern.iter().map(|(k, a)| (k.clone(), number(*a))).collect::<Map<_, _>>())
}

/// PEFT's `init_lora_weights`: two of its words are no texts.
pub(super) fn init_value(init: InitLoraWeights) -> Value {
    match init {
        InitLoraWeights::Kaiming => json!(true),
        InitLoraWeights::Random => json!(false),
        other => json!(other.word()),
    }
}

/// How an adapter began, which still matters where that was at a part of the base: until PEFT converts it, its numbers
/// belong to what is left of the base.
///
/// # Errors
/// A word that is not known, and those whose part of the base cannot be found again.
pub(super) fn read_init(raw: &RawConfig) -> Result<InitLoraWeights> {
    const KEY: &str = "init_lora_weights";
    // They left the base as it is: once trained, an adapter is like any other.
    const HARMLESS: [&str; 2] = ["eva", "mica"];
    let init = match raw.value(KEY) {
        None => InitLoraWeights::Kaiming,
        Some(Value::Bool(zero)) => {
            if *zero {
                InitLoraWeights::Kaiming
            } else {
                InitLoraWeights::Random
            }
        }
        Some(Value::String(word)) if HARMLESS.contains(&word.as_str()) => InitLoraWeights::Kaiming,
        Some(Value::String(word)) if !["corda", "loftq", "lora_ga"].contains(&word.as_str()) => {
            InitLoraWeights::parse(word).map_err(|e| refused(raw, e))?
        }
        Some(other) => return Err(raw.error(KEY, unconverted(other))),
    };
    match init {
        InitLoraWeights::Pissa { niter: Some(_) } => Err(raw.error(KEY, unconverted(&init_value(init)))),
        other => Ok(other),
    }
}

/// Why an adapter that changed its base is refused.
pub(super) fn unconverted(word: &Value) -> String {
    format!(
        "{word} changed the base's weights when training began, in a way that this file alone does not tell, so the adapter \
         does not fit the base as it is; convert it with PEFT's \
         save_pretrained(..., path_initial_model_for_weight_conversion=...)"
    )
}

/// A whole number without a fraction, as PEFT writes α.
pub(super) fn number(x: f64) -> Value {
    if x.fract() == 0.0 && x.abs() < 1e15 { json!(x as i64) } else { json!(x) }
}

fn check_alpha(raw: &RawConfig, key: &str, alpha: f64) -> Result<()> {
    const LARGEST: f64 = 1e9;
    if !(alpha > 0.0 && alpha <= LARGEST) {
        return Err(raw.error(key, format_args!("α is a positive number of at most {LARGEST:e}, found {alpha}")));
    }
    Ok(())
}

/// A list of names, a regular expression, or `all-linear`.
pub(super) fn read_modules(raw: &RawConfig, key: &str) -> Result<Option<Modules>> {
    let strings = |list: &Vec<Value>| list.iter().map(|v| v.as_str().map(str::to_owned)).collect::<Option<Vec<_>>>();
    match raw.value(key) {
        None => Ok(None),
        Some(Value::Array(list)) => match strings(list) {
            Some(names) if !names.is_empty() && names.iter().all(|n| !n.is_empty()) => Ok(Some(names.into())),
            _ => Err(raw.error(key, "expected the names of one or more modules")),
        },
        Some(Value::String(text)) if !text.is_empty() => Ok(Some(Modules::of_text(text))),
        Some(other) => Err(raw.error(
            key,
            format_args!("expected a list of names, a regular expression, or \"all-linear\", found {other}"),
        )),
    }
}

/// The same where an empty list, or text, is none.
pub(super) fn some_modules(raw: &RawConfig, key: &str) -> Result<Modules> {
    match raw.value(key) {
        Some(Value::Array(list)) if list.is_empty() => Ok(Modules::default()),
        Some(Value::String(text)) if text.is_empty() => Ok(Modules::default()),
        _ => Ok(read_modules(raw, key)?.unwrap_or_default()),
    }
}

/// One value, or a list of them.
pub(super) fn one_or_more<T>(
    raw: &RawConfig,
    key: &str,
    what: &str,
    read: impl Fn(&Value) -> Option<T>,
) -> Result<Vec<T>> {
    let read_or = |v: &Value| read(v).ok_or_else(|| raw.error(key, format_args!("expected {what}, found {v}")));
    match raw.value(key) {
        None => Ok(Vec::new()),
        Some(Value::Array(list)) => list.iter().map(read_or).collect(),
        Some(one) => Ok(vec![read_or(one)?]),
    }
}

/// Keys and values, in the order of the file.
pub(super) fn pattern<T>(
    raw: &RawConfig,
    key: &str,
    what: &str,
    read: impl Fn(&Value) -> Option<T>,
) -> Result<Vec<(String, T)>> {
    let map = match raw.value(key) {
        None => return Ok(Vec::new()),
        Some(Value::Object(map)) => map,
        Some(other) => return Err(raw.error(key, format_args!("expected module names and numbers, found {other}"))),
    };
    let entry = |(name, value): (&String, &Value)| {
        let value =
            read(value).ok_or_else(|| raw.error(key, format_args!("expected {what} for {name:?}, found {value}")))?;
        Ok((name.clone(), value))
    };
    map.iter().map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SITES: [&str; 4] =
        ["transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_proj", "transformer.h.1.attn.c_attn", "h.0.xc_attn"];

    #[test]
    fn parts_become_ranks_of_modules() {
        let config = |targets: &[&str], rslora| LoraConfig {
            rank: 4,
            alpha: 8.0,
            rslora,
            targets: targets.iter().copied().collect(),
            ..LoraConfig::default()
        };
        // Targets, parts per site (of the first three), r, lora_alpha, target_modules, pattern.
        type Row<'a> = (&'a [&'a str], [usize; 3], usize, f64, &'a [&'a str], &'a [(&'a str, usize, f64)]);
        let rows: [Row; 4] = [
            (&["c_attn"], [1, 0, 1], 4, 8.0, &["c_attn"], &[]),
            (&["c_attn.q", "c_attn.v"], [2, 0, 2], 8, 16.0, &["c_attn"], &[]),
            (&["c_attn.q", "c_attn.v", "c_proj"], [2, 1, 2], 4, 8.0, &["c_attn", "c_proj"], &[("c_attn", 8, 16.0)]),
            (
                &["c_attn.q", "h.1.attn.c_attn.v"],
                [1, 0, 2],
                4,
                8.0,
                &["c_attn", "h.1.attn.c_attn"],
                &[("h.1.attn.c_attn", 8, 16.0)],
            ),
        ];
        for (targets, parts, r, alpha, modules, pattern) in rows {
            let sites = SITES.iter().copied().zip(parts).filter(|(_, n)| *n > 0).collect();
            let of = |rslora| PeftConfig::of(&config(targets, rslora), &sites, None, &Outline::default()).unwrap().lora;
            let c = of(false);
            assert_eq!((c.rank, c.alpha, &c.targets), (r, alpha, &modules.iter().copied().collect()), "{targets:?}");
            let ranks: Vec<_> = pattern.iter().map(|(k, r, _)| (k.to_string(), *r)).collect();
            assert_eq!(c.rank_pattern, ranks, "{targets:?}");
            let (c, rs) = (Lora::new(c).unwrap(), Lora::new(of(true)).unwrap());
            for (site, n) in &sites {
                assert_eq!(c.rank_and_alpha(site).unwrap(), (4 * n, 8.0 * *n as f64), "{targets:?} {site}");
                // α/√r stays what it is for one part.
                let (rank, alpha) = rs.rank_and_alpha(site).unwrap();
                let scale = alpha / (rank as f64).sqrt();
                assert!((scale - 4.0).abs() < 1e-12, "{targets:?} {site}: {scale}");
            }
        }
    }

    /// Ranks of their own stay those of the parts, whatever is written.
    #[test]
    fn patterns_go_on_in_the_ranks_of_modules() {
        let config = LoraConfig {
            rank: 4,
            alpha: 8.0,
            targets: ["c_attn.q", "c_attn.v", "c_proj"].into_iter().collect(),
            rank_pattern: vec![("h.1.attn.c_attn".into(), 3)],
            alpha_pattern: vec![(r".*proj".into(), 5.0)],
            ..LoraConfig::default()
        };
        for (parts, r, patterns) in [([2, 2, 2], 8, 1), ([2, 1, 2], 4, 3)] {
            let sites = SITES.iter().copied().zip(parts).collect();
            let c = PeftConfig::of(&config, &sites, None, &Outline::default()).unwrap().lora;
            assert_eq!((c.rank, c.rank_pattern.len()), (r, patterns));
            let (trained, saved) = (Lora::new(config.clone()).unwrap(), Lora::new(c).unwrap());
            for (site, n) in sites {
                let ((r, a), n) = (trained.rank_and_alpha(site).unwrap(), n as f64);
                assert_eq!(saved.rank_and_alpha(site).unwrap(), (r * n as usize, a * n), "{site} of {n} parts");
            }
        }
    }
}
