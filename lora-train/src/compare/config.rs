//! The file of a comparison.

use std::path::{Path, PathBuf};

use lora_core::peft::METHODS;
use toml::{Table, Value};

use crate::{Error, Place, Result, TrainConfig, place};

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

impl Comparison {
    /// Reads a comparison. `flags` (`model`, `data`, `test`, `device`, `dtype`) lie over the keys of the file. Keys may be
    /// written with `-` or `_`.
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
        let source = Source { path, text: &lora_model::files::read_to_string(path)? };
        let mut shared = dashed(source.parse()?);
        shared.extend(flags);
        let own = Own::take(&source, &mut shared)?;
        source.check_keys(&shared, None)?;
        let mut rows: Vec<Row> = Vec::new();
        for (i, run) in own.runs.iter().enumerate() {
            rows.push(row(&source, &shared, &own, run, i)?);
        }
        for i in 0..rows.len() {
            if let Some(j) = (0..i).find(|&j| folder(&rows[j].name) == folder(&rows[i].name)) {
                let name = &rows[i].name;
                let problem = format!("[[run]] {} and {} are both called {name}: give one a name", j + 1, i + 1);
                return Err(source.run_problem(i, Some("name"), problem));
            }
        }
        // The names of the device and the type that `auto` means here: cells of another are other cells.
        let first = &rows[0].config;
        let place = Place::open(&first.device, &first.dtype)?;
        let (device, dtype) = (place.device.to_string(), place::name(place.dtype).to_owned());
        for row in &mut rows {
            (row.config.device, row.config.dtype) = (device.clone(), dtype.clone());
        }
        let comparison = Comparison {
            test: own.test,
            hold_out: own.hold_out,
            search_seed: own.search_seed.unwrap_or(rows[0].seeds[0]),
            search: own.search,
            eval: own.eval,
            keep_models: own.keep_models,
            rows,
        };
        for (i, row) in comparison.rows.iter().enumerate() {
            let in_run = |e: Error| match e {
                Error::Option { option, value, why } => {
                    source.run_problem(i, Some(option), format!("{option} = {value}: {why}"))
                }
                e => e,
            };
            for &lr in &row.lrs {
                TrainConfig { lr, ..row.config.clone() }.check().map_err(in_run)?;
                if row.lrs.len() > 1 {
                    comparison.searching(row, lr)?.check().map_err(in_run)?;
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
            return Err(source.problem(Some(key), format!("key {key}: a comparison decides this itself; leave it out")));
        }
        if file.contains_key("seed") {
            return Err(source.problem(Some("seed"), "key seed: write a list, such as seeds = [0, 1, 2]".into()));
        }
        let test: PathBuf = match own.remove("test") {
            Some(Value::String(path)) => path.into(),
            Some(other) => return Err(source.wrong("test", "the path of a file", &other)),
            None => return Err(source.problem(None, "key test: missing; name the data to judge by".into())),
        };
        for (key, what) in [("model", "the base"), ("data", "the data to train on")] {
            if !file.contains_key(key) {
                return Err(source.problem(None, format!("key {key}: missing; name {what}")));
            }
        }
        let seeds = own.remove("seeds").map(|v| seeds(source, &v)).transpose()?.unwrap_or(vec![0]);
        let mut table = |key: &str| match own.remove(key) {
            Some(Value::Table(table)) => Ok(table),
            Some(other) => Err(source.wrong(key, "a table", &other)),
            None => Ok(Table::new()),
        };
        let (mut search, eval) = (table("search")?, table("eval")?);
        let hold_out = match search.remove("hold-out") {
            None => 0.1,
            Some(Value::Float(share)) if share > 0.0 && share < 1.0 => share,
            Some(other) => return Err(source.wrong("hold-out", "a share between 0 and 1", &other)),
        };
        let search_seed = match search.remove("seed") {
            None => None,
            Some(Value::Integer(n)) if n >= 0 => Some(n as u64),
            Some(other) => return Err(source.wrong("seed", "a number from 0", &other)),
        };
        if let Some(key) = DECIDED.iter().chain(&SAME).chain(&["lr", "method"]).find(|key| search.contains_key(**key)) {
            let problem =
                format!("key {key}: cannot be another while a learning rate is chosen; leave it out of [search]");
            return Err(source.problem(Some(key), problem));
        }
        source.check_keys(&search, None)?;
        if let Some((key, value)) = eval.iter().find(|(_, v)| v.is_table() || v.is_array()) {
            return Err(source.wrong(key, "the value of a flag of lora eval", value));
        }
        let keep_models = match own.remove("keep-models") {
            None => false,
            Some(Value::Boolean(keep)) => keep,
            Some(other) => return Err(source.wrong("keep-models", "true or false", &other)),
        };
        let runs: Vec<Table> = match own.remove("run") {
            None => Vec::new(),
            Some(Value::Array(runs)) if runs.iter().all(Value::is_table) => {
                runs.into_iter().filter_map(|r| if let Value::Table(t) = r { Some(t) } else { None }).collect()
            }
            Some(other) => return Err(source.wrong("run", "[[run]] tables", &other)),
        };
        if runs.is_empty() {
            let problem = "no [[run]]: add one for each method, such as [[run]] method = \"lora\"";
            return Err(source.problem(None, problem.into()));
        }
        Ok(Own { test, seeds, hold_out, search_seed, search, eval, keep_models, runs })
    }
}

fn row(source: &Source, shared: &Table, own: &Own, run: &Table, index: usize) -> Result<Row> {
    let mut run = run.clone();
    let problem = |key: &str, problem: String| source.run_problem(index, Some(key), format!("key {key}: {problem}"));
    if let Some(key) = DECIDED.iter().chain(&SAME).chain(&["seed"]).find(|key| run.contains_key(**key)) {
        return Err(problem(key, "is the same for all rows of a comparison; leave it out".into()));
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
        Some(value) => seeds(source, &value)?,
    };
    let named: Vec<(String, Value)> = run.iter().map(|(k, v)| (k.clone(), v.clone())).collect();
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
    let keys: Table = table.iter().map(|(k, v)| (k.clone(), v.clone())).collect();
    source.check_keys(&keys, Some(index))?;
    let config: TrainConfig =
        Value::Table(table).try_into().map_err(|e: toml::de::Error| problem("", e.message().into()))?;
    let config = TrainConfig { lr: lrs[0], ..config };
    let options = config.row()?.options;
    // Shared keys may serve several methods; one in the row is meant for this.
    let read_by_others = |key: &str| METHODS.iter().any(|m| m.options.contains(&key)) && !options.contains(&key);
    if let Some((key, _)) = named.iter().find(|(key, _)| read_by_others(key)) {
        return Err(problem(key, format!("method {} does not read it; leave it out", config.method)));
    }
    let name = name.unwrap_or_else(|| {
        let mut name = config.method.clone();
        for option in options {
            if let Some((_, value)) = named.iter().find(|(key, _)| key == option) {
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
        other => other.to_string(),
    }
}

fn number(value: &Value) -> Option<f64> {
    value.as_float().or(value.as_integer().map(|n| n as f64))
}

fn seeds(source: &Source, value: &Value) -> Result<Vec<u64>> {
    let all = value.as_array().map(|all| all.iter().map(|v| v.as_integer().and_then(|n| u64::try_from(n).ok())));
    let mut all: Vec<u64> = match all.and_then(|all| all.collect::<Option<Vec<u64>>>()) {
        Some(all) if !all.is_empty() => all,
        _ => return Err(source.wrong("seeds", "a list of numbers from 0", value)),
    };
    let mut seen = std::collections::HashSet::new();
    all.retain(|seed| seen.insert(*seed));
    Ok(all)
}

/// With all keys spelt with `-`.
fn dashed(table: Table) -> Table {
    let value = |v| match v {
        Value::Table(t) => Value::Table(dashed(t)),
        Value::Array(all) => Value::Array(
            all.into_iter().map(|v| if let Value::Table(t) = v { Value::Table(dashed(t)) } else { v }).collect(),
        ),
        v => v,
    };
    table.into_iter().map(|(k, v)| (k.replace('_', "-"), value(v))).collect()
}

/// The file, for messages about its lines.
struct Source<'a> {
    path: &'a Path,
    text: &'a str,
}

impl Source<'_> {
    fn parse(&self) -> Result<Table> {
        self.text.parse().map_err(|e: toml::de::Error| {
            let line = e.span().map_or(1, |s| 1 + self.text[..s.start].matches('\n').count());
            let problem = format!("line {line}: {}", e.message().trim().replace('\n', " "));
            Error::Config { path: self.path.into(), problem }
        })
    }

    /// Tries each key of training alone, so that the one at fault is named.
    fn check_keys(&self, table: &Table, run: Option<usize>) -> Result<()> {
        for (key, value) in table.iter().filter(|(key, _)| *key != "lr") {
            let alone: Table = [(key.clone(), value.clone())].into_iter().collect();
            if let Err(e) = Value::Table(alone).try_into::<TrainConfig>() {
                let problem = format!("key {key}: {}", e.message().trim().replace('\n', " "));
                return Err(match run {
                    Some(i) => self.run_problem(i, Some(key), problem),
                    None => self.problem(Some(key), problem),
                });
            }
        }
        Ok(())
    }

    fn wrong(&self, key: &str, wanted: &str, found: &Value) -> Error {
        self.problem(Some(key), format!("key {key}: is {found} in place of {wanted}"))
    }

    fn problem(&self, key: Option<&str>, problem: String) -> Error {
        self.at(key.and_then(|key| self.line_of(key, 0)), problem)
    }

    /// A problem of the `index`-th `[[run]]`.
    fn run_problem(&self, index: usize, key: Option<&str>, problem: String) -> Error {
        let header =
            |(_, line): &(usize, &str)| line.split('#').next().unwrap_or("").trim().replace(' ', "") == "[[run]]";
        let start = self.text.lines().enumerate().filter(header).nth(index).map(|(i, _)| i);
        let line = start.map(|start| key.and_then(|key| self.line_of(key, start + 1)).unwrap_or(start + 1));
        self.at(line, format!("[[run]] {}: {problem}", index + 1))
    }

    /// The line, from 1, on which a key stands: from the `from`-th line to the next `[[run]]`, or where it is shared.
    fn line_of(&self, key: &str, from: usize) -> Option<usize> {
        let is = |line: &str| line.split_once('=').is_some_and(|(k, _)| k.trim().replace('_', "-") == key);
        let lines = || self.text.lines().enumerate();
        let own = lines().skip(from).take_while(|(_, line)| from == 0 || !line.trim_start().starts_with("[["));
        own.chain(lines()).find(|(_, line)| is(line)).map(|(i, _)| i + 1)
    }

    fn at(&self, line: Option<usize>, problem: String) -> Error {
        let place = line.map_or(String::new(), |line| format!("line {line}: "));
        Error::Config { path: self.path.into(), problem: format!("{place}{problem}") }
    }
}
