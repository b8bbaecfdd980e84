//! A run's configuration as a TOML file.

use std::path::Path;

use lora_core::peft::METHODS;

use super::TrainConfig;
use crate::{Error, Result};

impl TrainConfig {
    /// Reads a TOML file and lays `flags` (the same keys) over it. Keys may be written with `-` or `_`. A run that starts
    /// from an adapter (`init-adapter`) takes the method and its options from there, except for those of its training, such as
    /// dropout and AdaLoRA's schedule, which may be others.
    ///
    /// # Errors
    /// [`Error::Config`] with file, line and key; [`Error::Option`] for a value that contradicts the adapter's, and for a β of
    /// the file that could be AdamW's or AdaLoRA's;
    /// [`Error::Model`] when the file or the adapter cannot be read.
    pub fn from_toml(file: Option<&Path>, flags: toml::Table) -> Result<TrainConfig> {
        let mut table = match file {
            None => toml::Table::new(),
            Some(path) => read_table(path)?,
        };
        // Of two that exclude each other, the flag wins.
        let pairs = [("steps", "epochs"), ("valid", "hold-out")];
        for (flag, other) in pairs.into_iter().chain(pairs.map(|(a, b)| (b, a))) {
            if flags.contains_key(flag) && !flags.contains_key(other) {
                table.remove(other);
            }
        }
        let flagged: Vec<String> = flags.keys().cloned().collect();
        let betas = ["beta1", "beta2"].into_iter().filter(|key| table.contains_key(*key) && !flags.contains_key(*key));
        let betas: Vec<&str> = betas.collect();
        table.extend(flags);
        let given: Vec<String> = table.keys().cloned().collect();
        let path = file.unwrap_or(Path::new("command line"));
        let mut config: TrainConfig = toml::Value::Table(table)
            .try_into()
            .map_err(|e: toml::de::Error| Error::Config { path: path.into(), problem: e.message().into() })?;
        if let Some(dir) = config.init_adapter.clone() {
            let adapter = lora_model::adapter::load(&dir)?;
            config.adopt(&dir, &adapter, |key| given.iter().any(|g| g == key))?;
        }
        let in_file = |key: &str| betas.contains(&key) || key.starts_with("adalora") && given.iter().any(|g| g == key);
        config.check_betas(in_file)?;
        let row = config.row()?;
        // A file may serve several methods; a flag is meant for this one.
        for method in METHODS {
            if let Some(option) =
                method.options.iter().find(|o| !row.options.contains(o) && flagged.iter().any(|f| f == *o))
            {
                let why = format!("method {} does not read it; leave it out, or choose another method", row.name);
                return Err(Error::option(option, "given", why));
            }
        }
        Ok(config)
    }

    /// Refuses a β that a file has alone, where the method has a β of its own that PEFT calls so.
    ///
    /// # Errors
    /// [`Error::Option`].
    pub(crate) fn check_betas(&self, has: impl Fn(&str) -> bool) -> Result<()> {
        let row = self.row()?;
        for (key, value) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            let own = format!("adalora-{key}");
            if row.options.contains(&own.as_str()) && has(key) && !has(&own) {
                let why = format!(
                    "with method {} it could be AdamW's, or what PEFT calls so, which is {own} here; give {own} too, and {key} \
                     is AdamW's",
                    row.name
                );
                return Err(Error::option(key, value, why));
            }
        }
        Ok(())
    }

    /// As a TOML file that gives this configuration again.
    pub(crate) fn to_toml(&self) -> String {
        toml::to_string(self).expect("numbers within the range of TOML: checked")
    }

    /// The first key that must not change between a run and its continuation, and has: its name and both values.
    pub(crate) fn difference(&self, old: &TrainConfig) -> Option<(String, String, String)> {
        // Where things are kept and how often is no part of the result; data is known by its contents, wherever it lies.
        let result = |c: &TrainConfig| {
            let mut c = c.clone();
            (c.out, c.log, c.save_every, c.keep, c.strict, c.checkpoint) = Default::default();
            (c.data, c.valid, c.eval_every) = Default::default();
            // Any device can continue a run; its type stays, and `auto` asks for just that.
            c.device = String::new();
            if self.dtype == "auto" || old.dtype == "auto" {
                c.dtype = String::new();
            }
            c.model = c.model.canonicalize().unwrap_or(c.model);
            toml::Table::try_from(c).unwrap_or_default()
        };
        let (new, old) = (result(self), result(old));
        let keys: std::collections::BTreeSet<&String> = new.keys().chain(old.keys()).collect();
        let shown = |t: &toml::Table, k: &str| t.get(k).map_or("not set".into(), |v| v.to_string());
        // By their texts, in which the order of patterns counts.
        let key = keys.into_iter().find(|k| shown(&new, k) != shown(&old, k))?;
        Some((key.clone(), shown(&old, key), shown(&new, key)))
    }
}

/// Names of PEFT and Transformers for keys that have shorter ones here.
const PEFT_NAMES: [(&str, &str); 9] = [
    ("r", "rank"),
    ("lora-alpha", "alpha"),
    ("lora-dropout", "dropout"),
    ("use-rslora", "rslora"),
    ("target-modules", "targets"),
    ("vera-dropout", "dropout"),
    ("num-virtual-tokens", "prefix"),
    ("deltaT", "delta-t"),
    ("gradient-checkpointing", "checkpoint"),
];

/// The name here of a key: spelt with `-`, and of PEFT's other names ours.
pub(crate) fn our_name(key: &str) -> String {
    let key = key.replace('_', "-");
    PEFT_NAMES.iter().find(|(theirs, _)| *theirs == key).map_or(key, |(_, ours)| ours.to_string())
}

/// A table's keys by [`our_name`].
///
/// # Errors
/// The name of a key that stands there twice.
pub(crate) fn by_our_names(table: toml::Table) -> std::result::Result<toml::Table, String> {
    let mut named = toml::Table::new();
    for (key, value) in table {
        let name = our_name(&key);
        if named.insert(name.clone(), value).is_some() {
            return Err(name);
        }
    }
    Ok(named)
}

/// The keys of a TOML file, spelt with `-`, those of PEFT by their names here; each is known and has a value of its type.
fn read_table(path: &Path) -> Result<toml::Table> {
    let text = lora_model::files::read_to_string(path)?;
    // The spelling is changed in the text, so that the parser's places stay true.
    let spelt = |key: &str| key.trim().chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c));
    let mut in_table = false;
    let is_header = |line: &str| {
        let inside = line.trim().strip_prefix('[').and_then(|line| line.split_once(']'));
        inside
            .is_some_and(|(name, rest)| !name.contains('=') && (rest.trim().is_empty() || rest.trim().starts_with('#')))
    };
    let mut dashed = |line: &str| {
        if is_header(line) {
            // The names of modules follow, which are spelt as they are.
            in_table = true;
            return line.replace('_', "-");
        }
        // After a point as well.
        let own = line.find(['=', '.']).map(|at| line.split_at(at));
        match own.filter(|(key, _)| spelt(key) && !in_table && line.contains('=')) {
            Some((key, rest)) => key.replace('_', "-") + rest,
            None => line.to_owned(),
        }
    };
    let text: String = text.split_inclusive('\n').map(&mut dashed).collect();
    let problem = |e: toml::de::Error| {
        let line = e.span().map_or(1, |s| 1 + text[..s.start].matches('\n').count());
        let problem = format!("line {line}: {}", e.message().trim().replace('\n', " "));
        Error::Config { path: path.into(), problem }
    };
    toml::from_str::<TrainConfig>(&text).map_err(problem)?;
    let table: toml::Table = text.parse().map_err(problem)?;
    by_our_names(table).map_err(|key| Error::Config {
        path: path.into(),
        problem: format!("key {key}: stands there under two names; leave one out"),
    })
}
