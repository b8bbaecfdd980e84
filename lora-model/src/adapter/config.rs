use std::collections::{BTreeMap, BTreeSet};

use lora_core::peft::{LoraConfig, Outline, names};
use serde_json::{Map, Value, json};

use super::own::strings;
use crate::{Result, config::RawConfig};

/// What `adapter_config.json` says. A rank r and an α hold for every module that no pattern names.
#[derive(Clone, Debug)]
pub(super) struct PeftConfig {
    pub(super) r: usize,
    pub(super) alpha: f64,
    pub(super) dropout: f64,
    pub(super) rslora: bool,
    pub(super) targets: Vec<String>,
    pub(super) rank_pattern: BTreeMap<String, usize>,
    pub(super) alpha_pattern: BTreeMap<String, f64>,
    pub(super) base_model: Option<String>,
    pub(super) modules_to_save: Vec<String>,
    pub(super) task_type: Option<String>,
}

/// PEFT's rule for the keys of patterns, `re.match("(.*\.)?(KEY)$", module)`, for keys of plain names: a dot in the key
/// stands for any character.
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
    sites.any(|s| !config.targets.iter().any(|t| names(t, s)))
}

impl PeftConfig {
    /// The description of an adapter that was trained with `config`, where `sites` says how many parts of rank r are
    /// adapted at each site: n parts are one update of rank n·r, whose α keeps the scale α/r (or α/√r).
    pub(super) fn of(
        config: &LoraConfig,
        sites: &BTreeMap<&str, usize>,
        base_model: Option<String>,
        outline: &Outline,
    ) -> PeftConfig {
        let rank = |n: usize| n * config.rank;
        let alpha = |n: usize| config.alpha * if config.rslora { (n as f64).sqrt() } else { n as f64 };
        let targets: BTreeSet<&str> =
            sites.keys().flat_map(|s| config.targets.iter().filter_map(|t| module_of(t, s))).collect();
        let fewest = sites.values().copied().min().unwrap_or(1);
        let (mut rank_pattern, mut alpha_pattern) = (BTreeMap::new(), BTreeMap::new());
        let mut add = |key: &str, n: usize| {
            rank_pattern.insert(key.to_owned(), rank(n));
            alpha_pattern.insert(key.to_owned(), alpha(n));
        };
        for (site, &n) in sites.iter().filter(|(_, n)| **n != fewest) {
            // The short name where it means the same at every site that it can name, else the site itself.
            let short = targets
                .iter()
                .find(|m| names(m, site) && sites.iter().all(|(s, other)| *other == n || !pattern_names(m, s)));
            add(short.unwrap_or(site), n);
        }
        PeftConfig {
            r: rank(fewest),
            alpha: alpha(fewest),
            dropout: config.dropout,
            rslora: config.rslora,
            targets: targets.into_iter().map(str::to_owned).collect(),
            rank_pattern,
            alpha_pattern,
            base_model,
            modules_to_save: outline.modules_to_save.clone(),
            task_type: outline.task_type.map(str::to_owned),
        }
    }

    /// The rank of the update of a site.
    pub(super) fn rank(&self, site: &str) -> usize {
        self.rank_pattern.iter().find(|(k, _)| pattern_names(k, site)).map_or(self.r, |(_, r)| *r)
    }

    /// α of the update of a site.
    pub(super) fn alpha(&self, site: &str) -> f64 {
        self.alpha_pattern.iter().find(|(k, _)| pattern_names(k, site)).map_or(self.alpha, |(_, a)| *a)
    }

    /// The first key whose value differs from `other`'s, and both values; numbers may differ in their last digits,
    /// which a JSON reader may round another way.
    pub(super) fn difference(&self, other: &PeftConfig) -> Option<(&'static str, String, String)> {
        let near = |a: f64, b: f64| (a - b).abs() <= 1e-12 * b.abs();
        let sorted = |v: &[String]| v.iter().cloned().collect::<BTreeSet<_>>();
        let (a, b) = (self, other);
        let alphas = a.alpha_pattern.len() == b.alpha_pattern.len()
            && a.alpha_pattern.iter().zip(&b.alpha_pattern).all(|((k, x), (l, y))| k == l && near(*x, *y));
        let shown = |key, a: &dyn ToString, b: &dyn ToString| Some((key, a.to_string(), b.to_string()));
        match () {
            () if a.r != b.r => shown("r", &a.r, &b.r),
            () if !near(a.alpha, b.alpha) => shown("lora_alpha", &a.alpha, &b.alpha),
            () if sorted(&a.targets) != sorted(&b.targets) => {
                shown("target_modules", &json!(a.targets), &json!(b.targets))
            }
            () if a.rank_pattern != b.rank_pattern => {
                shown("rank_pattern", &json!(a.rank_pattern), &json!(b.rank_pattern))
            }
            () if !alphas => shown("alpha_pattern", &json!(a.alpha_pattern), &json!(b.alpha_pattern)),
            () => None,
        }
    }

    /// The text of `adapter_config.json`: all keys that PEFT needs, sorted, indented by two.
    pub(super) fn text(&self, fan_in_fan_out: bool) -> String {
        let alphas: Map<String, Value> = self.alpha_pattern.iter().map(|(k, a)| (k.clone(), number(*a))).collect();
        let keys: BTreeMap<&str, Value> = [
            ("alpha_pattern", Value::Object(alphas)),
            ("base_model_name_or_path", json!(self.base_model)),
            ("bias", json!("none")),
            ("fan_in_fan_out", json!(fan_in_fan_out)),
            ("inference_mode", json!(true)),
            ("init_lora_weights", json!(true)),
            ("lora_alpha", number(self.alpha)),
            ("lora_dropout", json!(self.dropout)),
            ("modules_to_save", some(&self.modules_to_save)),
            ("peft_type", json!("LORA")),
            ("r", json!(self.r)),
            ("rank_pattern", json!(self.rank_pattern)),
            ("target_modules", json!(self.targets)),
            ("task_type", json!(self.task_type)),
            ("use_dora", json!(false)),
            ("use_rslora", json!(self.rslora)),
        ]
        .into();
        format!("{:#}", json!(keys))
    }

    /// Reads `adapter_config.json`, whose options were checked.
    pub(super) fn of_raw(raw: &RawConfig) -> Result<PeftConfig> {
        let needed = |key: &str| raw.error(key, "missing; it says how the adapter was made, so it has to be there");
        let r = raw.usize("r")?.ok_or_else(|| needed("r"))?;
        let alpha = raw.f64("lora_alpha")?.ok_or_else(|| needed("lora_alpha"))?;
        let dropout = raw.f64("lora_dropout")?.unwrap_or(0.0);
        if !(0.0..1.0).contains(&dropout) {
            return Err(raw.error("lora_dropout", format_args!("a dropout rate is in [0, 1), found {dropout}")));
        }
        check_rank(raw, "r", r)?;
        check_alpha(raw, "lora_alpha", alpha)?;
        let config = PeftConfig {
            r,
            alpha,
            dropout,
            rslora: raw.bool("use_rslora")?.unwrap_or(false),
            targets: targets(raw)?,
            rank_pattern: pattern(raw, "rank_pattern", "a whole number", |v| v.as_u64()?.try_into().ok())?,
            alpha_pattern: pattern(raw, "alpha_pattern", "a number", Value::as_f64)?,
            base_model: raw.str("base_model_name_or_path")?.map(str::to_owned),
            modules_to_save: strings(raw, "modules_to_save")?.unwrap_or_default(),
            task_type: raw.str("task_type")?.map(str::to_owned),
        };
        config.rank_pattern.values().try_for_each(|r| check_rank(raw, "rank_pattern", *r))?;
        config.alpha_pattern.values().try_for_each(|a| check_alpha(raw, "alpha_pattern", *a))?;
        Ok(config)
    }
}

/// A list, or null for an empty one.
fn some(list: &[String]) -> Value {
    if list.is_empty() { Value::Null } else { json!(list) }
}

/// A whole number without a fraction, as PEFT writes α.
fn number(x: f64) -> Value {
    if x.fract() == 0.0 && x.abs() < 1e15 { json!(x as i64) } else { json!(x) }
}

fn check_rank(raw: &RawConfig, key: &str, r: usize) -> Result<()> {
    const LARGEST: usize = 1 << 20;
    if r == 0 || r > LARGEST {
        return Err(raw.error(key, format_args!("a rank is from 1 to the smaller side of the matrix, found {r}")));
    }
    Ok(())
}

fn check_alpha(raw: &RawConfig, key: &str, alpha: f64) -> Result<()> {
    const LARGEST: f64 = 1e9;
    if !(alpha > 0.0 && alpha <= LARGEST) {
        return Err(raw.error(key, format_args!("α is a positive number of at most {LARGEST:e}, found {alpha}")));
    }
    Ok(())
}

fn targets(raw: &RawConfig) -> Result<Vec<String>> {
    const KEY: &str = "target_modules";
    let strings = |list: &Vec<Value>| list.iter().map(|v| v.as_str().map(str::to_owned)).collect::<Option<Vec<_>>>();
    let problem = match raw.value(KEY) {
        Some(Value::Array(list)) => match strings(list) {
            Some(t) if !t.is_empty() && t.iter().all(|t| !t.is_empty()) => return Ok(t),
            _ => "expected the names of one or more modules".to_owned(),
        },
        Some(Value::String(s)) => {
            format!(
                "{s:?}, a regular expression or a word for many modules, is not supported; list the modules by name"
            )
        }
        Some(other) => format!("expected a list of names, found {other}"),
        None => {
            "missing; PEFT's default for an architecture is not supported, so list the modules, for GPT-2 [\"c_attn\"]"
                .to_owned()
        }
    };
    Err(raw.error(KEY, problem))
}

fn pattern<T>(
    raw: &RawConfig,
    key: &str,
    what: &str,
    read: impl Fn(&Value) -> Option<T>,
) -> Result<BTreeMap<String, T>> {
    let map = match raw.value(key) {
        None => return Ok(BTreeMap::new()),
        Some(Value::Object(map)) => map,
        Some(other) => return Err(raw.error(key, format_args!("expected module names and numbers, found {other}"))),
    };
    let entry = |(name, value): (&String, &Value)| {
        if name.is_empty() || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.".contains(&b)) {
            return Err(raw.error(
                key,
                format_args!("{name:?} is a regular expression, which is not supported; name the modules"),
            ));
        }
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

    /// What PEFT's own expression gives for these keys, in the order of `SITES`.
    #[test]
    fn patterns_name_modules_as_pefts_expression_does() {
        for (key, wanted) in [
            ("c_attn", [true, false, true, false]),
            ("attn.c_attn", [true, false, true, false]),
            ("h.0.attn.c_attn", [true, false, false, false]),
            ("transformer.h.0.mlp.c_proj", [false, true, false, false]),
            // The dot is a wildcard.
            ("0.xc.attn", [false, false, false, true]),
            ("_attn", [false; 4]),
            ("a.very.long.name.that.is.longer.than.any.site", [false; 4]),
        ] {
            assert_eq!(SITES.map(|s| pattern_names(key, s)), wanted, "{key}");
        }
    }

    #[test]
    fn parts_become_ranks_of_modules() {
        let config = |targets: &[&str], rslora| LoraConfig {
            rank: 4,
            alpha: 8.0,
            dropout: 0.0,
            rslora,
            targets: targets.iter().map(|t| t.to_string()).collect(),
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
            let c = PeftConfig::of(&config(targets, false), &sites, None, &Outline::default());
            assert_eq!((c.r, c.alpha, &c.targets[..]), (r, alpha, &modules.map_str()[..]), "{targets:?}");
            let ranks: Vec<_> = pattern.iter().map(|(k, r, _)| (k.to_string(), *r)).collect();
            assert_eq!(c.rank_pattern.clone().into_iter().collect::<Vec<_>>(), ranks, "{targets:?}");
            for (site, n) in &sites {
                assert_eq!((c.rank(site), c.alpha(site)), (4 * n, 8.0 * *n as f64), "{targets:?} {site}");
                // α/√r stays what it is for one part.
                let rs = PeftConfig::of(&config(targets, true), &sites, None, &Outline::default());
                let scale = rs.alpha(site) / (rs.rank(site) as f64).sqrt();
                assert!((scale - 4.0).abs() < 1e-12, "{targets:?} {site}: {scale}");
            }
        }
    }

    trait MapStr {
        fn map_str(&self) -> Vec<String>;
    }

    impl MapStr for &[&str] {
        fn map_str(&self) -> Vec<String> {
            self.iter().map(|s| s.to_string()).collect()
        }
    }
}
