//! What is compared on what, as a file says it.

use std::path::{Path, PathBuf};

use lora_core::peft::METHODS;
use toml::{Table, Value};

use super::source::{Part, Source, option_of};
use crate::{Error, Place, Result, TrainConfig, place, resources};

/// What is compared on what.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    /// Data that finished runs are judged on.
    pub test: PathBuf,
    /// Share of the training data held out while a learning rate is chosen.
    pub hold_out: f64,
    /// Seed of the runs that choose it.
    pub search_seed: u64,
    /// Keys of training that are others in those runs (fewer epochs, say).
    pub search: Table,
    /// Flags of `lora eval` on the test data, such as `num-beams`.
    pub eval: Table,
    /// Whether whole models are kept, as adapters are.
    pub keep_models: bool,
    /// The methods.
    pub rows: Vec<Row>,
    /// The device and the processor that it is run on.
    pub machine: String,
    /// What a person should know of them: that `auto` found no CUDA device, and why.
    pub note: Option<String>,
}

/// A method with its options.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Its name in the table, and that of its folder.
    pub name: String,
    /// How it is trained, but for `out`, `seed` and, where there are several, `lr`.
    pub config: TrainConfig,
    /// The learning rates to choose from; one is taken as it is.
    pub lrs: Vec<f64>,
    /// The seeds.
    pub seeds: Vec<u64>,
}

/// Keys that belong to a comparison, not to training.
const OWN: [&str; 6] = ["test", "seeds", "search", "eval", "keep-models", "run"];
/// Keys of training that the comparison itself decides.
const DECIDED: [&str; 5] = ["out", "valid", "hold-out", "log", "eval-every"];
/// Keys that are the same for all rows.
const SAME: [&str; 6] = ["model", "data", "task", "format", "device", "dtype"];
/// Flags of `lora eval` that follow from the keys of training.
const JUDGED_BY: [&str; 10] =
    ["model", "adapter", "data", "task", "device", "dtype", "max-length", "predictions", "score", "json"];

impl Comparison {
    /// Reads a comparison. `flags` (`model`, `data`, `test`, `device`, `dtype`) lie over the keys of the file. Keys may be
    /// written with `-` or `_`, and by PEFT's names. A row that starts from an adapter (`init-adapter`) takes the method and
    /// its options from there, as in [`TrainConfig::from_toml`].
    ///
    /// ```toml
    /// model = "minilm"
    /// data = "train.tsv"            # these and all other keys of lora train: shared by all rows
    /// test = "test.tsv"
    /// task = "sst2"
    /// seeds = [0, 1, 2]
    ///
    /// [search]                      # how a learning rate is chosen, where a row names several
    /// hold-out = 0.1
    /// seed = 0
    /// epochs = 1
    ///
    /// [eval]                        # flags of lora eval
    /// batch-size = 32
    ///
    /// [[run]]
    /// method = "lora"
    /// rank = 8
    /// lr = [3e-4, 1e-3, 3e-3]
    /// ```
    ///
    /// # Errors
    /// [`Error::Config`] with file, line and key; [`Error::Option`] for what makes no sense in training.
    pub fn read(path: &Path, flags: Table) -> Result<Comparison> {
        let text = lora_model::files::read_to_string(path)?;
        let source = Source::parse(path, &text)?;
        let mut shared = source.table()?;
        shared.extend(flags);
        let own = Own::take(&source, &mut shared)?;
        source.check_keys(Part::Shared, &shared, &OWN, &[&DECIDED, &["seed"]])?;
        let mut rows: Vec<Row> = Vec::new();
        for (i, run) in own.runs.iter().enumerate() {
            rows.push(row(&source, &shared, &own, run, i)?);
        }
        for i in 0..rows.len() {
            if let Some(j) = (0..i).find(|&j| folder(&rows[j].name) == folder(&rows[i].name)) {
                let name = &rows[i].name;
                let problem = format!("[[run]] {} and {} are both called {name}: give one a name", j + 1, i + 1);
                return Err(source.problem(Part::Run(i), Some("name"), problem));
            }
        }
        // The names of the device and the type that `auto` means here: cells of another are other cells.
        let first = &rows[0].config;
        let place = Place::open(&first.device, &first.dtype).map_err(|e| source.placed(Part::Shared, e))?;
        let (device, dtype) = (place.device.to_string(), place::name(place.dtype).to_owned());
        for row in &mut rows {
            (row.config.device, row.config.dtype) = (device.clone(), dtype.clone());
        }
        let machine = resources::machine(&place.device);
        let comparison = Comparison {
            test: own.test,
            hold_out: own.hold_out,
            search_seed: own.search_seed.unwrap_or(own.seeds[0]),
            search: own.search,
            eval: own.eval,
            keep_models: own.keep_models,
            rows,
            machine,
            note: place.note,
        };
        for (i, row) in comparison.rows.iter().enumerate() {
            let in_run = |e| source.placed(Part::Run(i), e);
            let in_search = |e: Error| match option_of(&e) {
                Some(option) if comparison.search.contains_key(option) => source.placed(SEARCH, e),
                _ => in_run(e),
            };
            for &lr in &row.lrs {
                TrainConfig { lr, ..row.config.clone() }.check().map_err(in_run)?;
                if row.lrs.len() > 1 {
                    comparison.searching(row, lr)?.check().map_err(in_search)?;
                }
            }
        }
        Ok(comparison)
    }

    /// How a row is trained to try a learning rate.
    ///
    /// # Errors
    /// Keys of `[search]` that do not go together with the row's.
    pub fn searching(&self, row: &Row, lr: f64) -> Result<TrainConfig> {
        let base =
            Table::try_from(TrainConfig { lr, seed: self.search_seed, hold_out: self.hold_out, ..row.config.clone() });
        let mut table = base.expect("numbers within the range of TOML: checked");
        if self.search.contains_key("steps") {
            table.remove("epochs");
        }
        if self.search.contains_key("epochs") {
            table.remove("steps");
        }
        table.extend(self.search.clone());
        let problem = |e: toml::de::Error| Error::Config { path: "[search]".into(), problem: e.message().into() };
        Value::Table(table).try_into().map_err(problem)
    }
}

const SEARCH: Part = Part::Table("search");
const EVAL: Part = Part::Table("eval");

/// Bytes of a row's name at most: it is also that of a folder.
const LONGEST: usize = 100;

fn is_name(name: &str) -> bool {
    name.len() <= LONGEST && !name.chars().any(char::is_control) && !folder(name).is_empty()
}

/// The name of a row's folder.
pub(super) fn folder(name: &str) -> String {
    let plain = |c: char| if c.is_alphanumeric() || "-_.+=,".contains(c) { c.to_ascii_lowercase() } else { '-' };
    let name: String = name.chars().map(plain).collect();
    name.trim_start_matches('.').to_owned()
}

/// The keys of a comparison itself.
struct Own {
    test: PathBuf,
    seeds: Vec<u64>,
    hold_out: f64,
    search_seed: Option<u64>,
    search: Table,
    eval: Table,
    keep_models: bool,
    runs: Vec<Table>,
}

impl Own {
    /// Takes them out of the file's table.
    fn take(source: &Source, file: &mut Table) -> Result<Own> {
        let mut own: Table = OWN.iter().filter_map(|key| Some((key.to_string(), file.remove(*key)?))).collect();
        if let Some(key) = DECIDED.iter().find(|key| file.contains_key(**key)) {
            return Err(source.problem(Part::Shared, Some(key), decided(key)));
        }
        if file.contains_key("seed") {
            return Err(source.problem(Part::Shared, Some("seed"), A_LIST.into()));
        }
        let test: PathBuf = match own.remove("test") {
            Some(Value::String(path)) => path.into(),
            Some(other) => return Err(source.wrong(Part::Shared, "test", "the path of a file", &other)),
            None => {
                return Err(source.problem(Part::Shared, None, "key test: missing; name the data to judge by".into()));
            }
        };
        for (key, what) in [("model", "the base"), ("data", "the data to train on")] {
            if !file.contains_key(key) {
                return Err(source.problem(Part::Shared, None, format!("key {key}: missing; name {what}")));
            }
        }
        let seeds = own.remove("seeds").map(|v| seeds(source, Part::Shared, &v)).transpose()?.unwrap_or(vec![0]);
        let mut table = |key: &str| match own.remove(key) {
            Some(Value::Table(table)) => Ok(table),
            Some(other) => Err(source.wrong(Part::Shared, key, "a table", &other)),
            None => Ok(Table::new()),
        };
        let (mut search, eval) = (table("search")?, table("eval")?);
        let hold_out = match search.remove("hold-out") {
            None => 0.1,
            Some(Value::Float(share)) if share > 0.0 && share < 1.0 => share,
            Some(other) => return Err(source.wrong(SEARCH, "hold-out", "a share between 0 and 1", &other)),
        };
        let search_seed = match search.remove("seed") {
            None => None,
            Some(Value::Integer(n)) if n >= 0 => Some(n as u64),
            Some(other) => return Err(source.wrong(SEARCH, "seed", "a number from 0", &other)),
        };
        if let Some(key) = DECIDED.iter().chain(&SAME).chain(&["lr", "method"]).find(|key| search.contains_key(**key)) {
            let problem = format!("key {key}: cannot be another while a learning rate is chosen; leave it out");
            return Err(source.problem(SEARCH, Some(key), problem));
        }
        source.check_keys(SEARCH, &search, &["hold-out", "seed"], &[&DECIDED, &SAME, &["lr", "method", "seed"]])?;
        if let Some(key) = JUDGED_BY.iter().find(|key| eval.contains_key(**key)) {
            return Err(source.problem(EVAL, Some(key), decided(key)));
        }
        if let Some((key, value)) = eval.iter().find(|(_, v)| v.is_table() || v.is_array()) {
            return Err(source.wrong(EVAL, key, "the value of a flag of lora eval", value));
        }
        let keep_models = match own.remove("keep-models") {
            None => false,
            Some(Value::Boolean(keep)) => keep,
            Some(other) => return Err(source.wrong(Part::Shared, "keep-models", "true or false", &other)),
        };
        let runs: Vec<Table> = match own.remove("run") {
            None => Vec::new(),
            Some(Value::Array(runs)) if runs.iter().all(Value::is_table) => {
                runs.into_iter().filter_map(|r| if let Value::Table(t) = r { Some(t) } else { None }).collect()
            }
            Some(other) => return Err(source.wrong(Part::Shared, "run", "[[run]] tables", &other)),
        };
        if runs.is_empty() {
            let problem = "no [[run]]: add one for each method, such as [[run]] method = \"lora\"";
            return Err(source.problem(Part::Shared, None, problem.into()));
        }
        Ok(Own { test, seeds, hold_out, search_seed, search, eval, keep_models, runs })
    }
}

fn row(source: &Source, shared: &Table, own: &Own, run: &Table, index: usize) -> Result<Row> {
    let mut run = run.clone();
    let part = Part::Run(index);
    let problem = |key: &str, problem: String| source.problem(part, Some(key), format!("key {key}: {problem}"));
    if let Some(key) = DECIDED.iter().find(|key| run.contains_key(**key)) {
        return Err(source.problem(part, Some(key), decided(key)));
    }
    if let Some(key) = SAME.iter().find(|key| run.contains_key(**key)) {
        return Err(problem(key, "is the same for all rows of a comparison; leave it out".into()));
    }
    if run.contains_key("seed") {
        return Err(source.problem(part, Some("seed"), A_LIST.into()));
    }
    let name = match run.remove("name") {
        None => None,
        Some(Value::String(name)) if is_name(&name) => Some(name),
        Some(other) => {
            return Err(problem("name", format!("is {other}; a row's name is one line of up to {LONGEST} bytes")));
        }
    };
    let seeds = match run.remove("seeds") {
        None => own.seeds.clone(),
        Some(value) => seeds(source, part, &value)?,
    };
    source.check_keys(part, &run, &["name", "seeds"], &[&DECIDED, &SAME, &["seed"]])?;
    let named = run.clone();
    let mut table = shared.clone();
    for (flag, other) in [("steps", "epochs"), ("epochs", "steps")] {
        if run.contains_key(flag) {
            table.remove(other);
        }
    }
    table.extend(run);
    let lrs = match table.remove("lr") {
        None => vec![TrainConfig::default().lr],
        Some(Value::Array(all)) if !all.is_empty() => {
            let one = |v: &Value| number(v).ok_or_else(|| problem("lr", format!("{v} is no number")));
            all.iter().map(one).collect::<Result<_>>()?
        }
        Some(value) => vec![number(&value).ok_or_else(|| problem("lr", format!("{value} is no number")))?],
    };
    let config: TrainConfig =
        Value::Table(table).try_into().map_err(|e: toml::de::Error| source.problem(part, None, e.message().into()))?;
    let mut config = TrainConfig { lr: lrs[0], ..config };
    let given = |key: &str| named.contains_key(key) || shared.contains_key(key);
    if let Some(dir) = config.init_adapter.clone() {
        config.adopt(&dir, &lora_model::adapter::load(&dir)?, given).map_err(|e| source.placed(part, e))?;
    }
    let options = config.row().map_err(|e| problem("method", e.to_string()))?.options;
    config.check_betas(given).map_err(|e| source.placed(part, e))?;
    // Shared keys may serve several methods; one in the row is meant for this.
    let read_by_others = |key: &str| METHODS.iter().any(|m| m.options.contains(&key)) && !options.contains(&key);
    if let Some(key) = named.keys().find(|key| read_by_others(key)) {
        return Err(problem(key, format!("method {} does not read it; leave it out", config.method)));
    }
    let name = name.unwrap_or_else(|| {
        let mut name = config.method.clone();
        for option in options {
            if let Some(value) = named.get(*option) {
                name += &format!(" {option}={}", plain(value));
            }
        }
        name
    });
    if !is_name(&name) {
        return Err(problem("name", format!("missing, and its options make none of up to {LONGEST} bytes; give one")));
    }
    Ok(Row { name, config, lrs, seeds })
}

/// A value as people write it: without quotation marks and brackets.
fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(all) => all.iter().map(plain).collect::<Vec<_>>().join(","),
        Value::Table(all) => {
            all.iter().map(|(key, value)| format!("{key}={}", plain(value))).collect::<Vec<_>>().join(",")
        }
        other => other.to_string(),
    }
}

fn number(value: &Value) -> Option<f64> {
    value.as_float().or(value.as_integer().map(|n| n as f64))
}

/// What is wrong with a key that no part of the file has.
fn decided(key: &str) -> String {
    format!("key {key}: a comparison decides this itself; leave it out")
}

const A_LIST: &str = "key seed: write a list, such as seeds = [0, 1, 2]";

fn seeds(source: &Source, part: Part, value: &Value) -> Result<Vec<u64>> {
    let all = value.as_array().map(|all| all.iter().map(|v| v.as_integer().and_then(|n| u64::try_from(n).ok())));
    let mut all: Vec<u64> = match all.and_then(|all| all.collect::<Option<Vec<u64>>>()) {
        Some(all) if !all.is_empty() => all,
        _ => return Err(source.wrong(part, "seeds", "a list of numbers from 0", value)),
    };
    let mut seen = std::collections::HashSet::new();
    all.retain(|seed| seen.insert(*seed));
    Ok(all)
}
