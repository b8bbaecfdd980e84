//! `config.json`: the file as it is, typed reading of its keys, and what each architecture needs from it.

mod bert;
mod checks;
mod deberta_v2;
mod gpt2;
mod llama;
mod roberta;
mod rope;

use std::path::{Path, PathBuf};

use lora_kernels::{Activation, DType};
use serde_json::{Map, Value};

use crate::{
    Error, Result,
    architectures::{ARCHITECTURES, ArchitectureRow},
    files,
};
use checks::Problem;

pub use bert::BertConfig;
pub use deberta_v2::DebertaV2Config;
pub use gpt2::Gpt2Config;
pub use llama::{LlamaConfig, LlamaKind};
pub use roberta::RobertaConfig;
pub use rope::{RopeConfig, RopeScaling};

/// The name of the configuration in a model's folder.
pub const CONFIG_FILE: &str = "config.json";

/// A JSON configuration with all its keys in their order, known or not, so that it can be written back as it was.
///
/// The getters give `None` for a key that is absent or `null`, and an error that names file and key for a value of
/// another type or out of range.
#[derive(Clone, Debug)]
pub struct RawConfig {
    path: PathBuf,
    keys: Map<String, Value>,
}

impl RawConfig {
    /// Reads `config.json` of a model's folder.
    ///
    /// # Errors
    /// When the file is missing, is no JSON (with line and column) or no JSON object.
    pub fn from_dir(dir: &Path) -> Result<RawConfig> {
        RawConfig::from_file(&dir.join(CONFIG_FILE))
    }

    /// Reads any JSON object; errors as in [`RawConfig::from_dir`].
    pub fn from_file(path: &Path) -> Result<RawConfig> {
        let text = files::read_to_string(path)?;
        let problem = match serde_json::from_str(&text) {
            Ok(Value::Object(keys)) => return Ok(RawConfig { path: path.to_owned(), keys }),
            Ok(other) => format!("expected a JSON object {{...}}, found {}", shown(&other)),
            Err(e) => format!("not valid JSON: {e}"),
        };
        Err(Error::Config { path: path.to_owned(), problem })
    }

    /// A configuration that was made rather than read; `path` stands in error messages.
    pub fn new(path: &Path, keys: Map<String, Value>) -> RawConfig {
        RawConfig { path: path.to_owned(), keys }
    }

    /// The file that error messages name.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All keys, in the order of the file.
    pub fn keys(&self) -> &Map<String, Value> {
        &self.keys
    }

    /// Transformers' name for a type of weights.
    ///
    /// # Panics
    /// For a type that weights do not have.
    pub(crate) fn type_name(dtype: DType) -> &'static str {
        match dtype {
            DType::F32 => "float32",
            DType::Bf16 => "bfloat16",
            DType::F16 => "float16",
            other => panic!("weights are not {other:?}"),
        }
    }

    /// Adds or replaces a key.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) {
        self.keys.insert(key.to_owned(), value.into());
    }

    /// Writes all keys to `config.json` in `dir`, indented by two.
    pub fn save(&self, dir: &Path) -> Result<()> {
        let mut text = format!("{:#}", Value::Object(self.keys.clone()));
        text.push('\n');
        files::write_bytes(&dir.join(CONFIG_FILE), text.as_bytes())
    }

    /// The value of a key as it stands; `None` when absent or `null`.
    pub fn value(&self, key: &str) -> Option<&Value> {
        self.keys.get(key).filter(|v| !v.is_null())
    }

    /// A whole number of at least 0.
    pub fn usize(&self, key: &str) -> Result<Option<usize>> {
        self.get(key, "a whole number of at least 0", |v| v.as_u64().and_then(|n| n.try_into().ok()))
    }

    /// A token id.
    pub fn token(&self, key: &str) -> Result<Option<u32>> {
        self.get(key, "a token id (a whole number below 2^32)", |v| v.as_u64().and_then(|n| n.try_into().ok()))
    }

    /// A token id that is absent (`default` holds), `null` (there is none), a number, or the first of a list.
    pub fn token_or(&self, key: &str, default: Option<u32>) -> Result<Option<u32>> {
        match self.keys.get(key) {
            None => Ok(default),
            Some(Value::Array(_)) => match self.tokens(key)?.as_deref() {
                Some([first, ..]) => Ok(Some(*first)),
                _ => Err(self.error(key, "expected token ids (whole numbers below 2^32)")),
            },
            Some(_) => self.token(key),
        }
    }

    /// Token ids: a number, or a list of them.
    pub fn tokens(&self, key: &str) -> Result<Option<Vec<u32>>> {
        let id = |v: &Value| v.as_u64().and_then(|n| n.try_into().ok());
        self.get(key, "token ids (whole numbers below 2^32)", |v| match v {
            Value::Array(ids) => ids.iter().map(id).collect(),
            v => id(v).map(|id| vec![id]),
        })
    }

    /// A finite number.
    pub fn f64(&self, key: &str) -> Result<Option<f64>> {
        self.get(key, "a finite number", |v| v.as_f64().filter(|x| x.is_finite()))
    }

    /// `true` or `false`.
    pub fn bool(&self, key: &str) -> Result<Option<bool>> {
        self.get(key, "true or false", Value::as_bool)
    }

    /// A string.
    pub fn str(&self, key: &str) -> Result<Option<&str>> {
        self.get(key, "a string", Value::as_str)
    }

    /// [`RawConfig::usize`] of the first of several names of one key that is there.
    pub fn usize_of(&self, names: &[&str]) -> Result<Option<usize>> {
        for name in names {
            if let Some(n) = self.usize(name)? {
                return Ok(Some(n));
            }
        }
        Ok(None)
    }

    /// An error about `key` of this file.
    pub fn error(&self, key: &str, problem: impl std::fmt::Display) -> Error {
        Error::Config { path: self.path.clone(), problem: format!("key {key:?}: {problem}") }
    }

    /// The row of [`ARCHITECTURES`] that `model_type` names.
    ///
    /// # Errors
    /// [`Error::Unsupported`], listing what there is; [`Error::Config`] when the key is missing.
    pub fn architecture(&self) -> Result<&'static ArchitectureRow> {
        let Some(found) = self.str("model_type")? else {
            return Err(self.error("model_type", format_args!("missing; set it to one of {}", MODEL_TYPES.join(", "))));
        };
        ARCHITECTURES.iter().find(|row| row.model_type == found).ok_or_else(|| Error::Unsupported {
            path: self.path.clone(),
            what: "the architecture",
            found: found.to_owned(),
            supported: &MODEL_TYPES,
        })
    }

    /// The activation function that `key` names, if it is there.
    ///
    /// # Errors
    /// [`Error::Unsupported`], listing what there is.
    pub fn activation(&self, key: &str) -> Result<Option<Activation>> {
        let Some(name) = self.str(key)? else { return Ok(None) };
        let supported =
            &["gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu", "gelu_python", "relu", "silu", "swish", "tanh"];
        let unknown = || Error::Unsupported {
            path: self.path.clone(),
            what: "the activation",
            found: name.to_owned(),
            supported,
        };
        Activation::from_hf(name).ok_or_else(unknown).map(Some)
    }

    /// # Errors
    /// [`Error::Config`] when the weights are quantised, which nothing here reads.
    pub fn refuse_quantised(&self) -> Result<()> {
        match self.value("quantization_config") {
            Some(_) => Err(self.error("quantization_config", "quantised weights are not read; use the original model")),
            None => Ok(()),
        }
    }

    /// The error of a check, if it has found something.
    fn checked(&self, problem: Option<Problem>) -> Result<()> {
        problem.map_or(Ok(()), |(key, problem)| Err(self.error(key, problem)))
    }

    fn get<'a, T>(&'a self, key: &str, expected: &str, read: impl FnOnce(&'a Value) -> Option<T>) -> Result<Option<T>> {
        let Some(v) = self.value(key) else { return Ok(None) };
        match read(v) {
            Some(x) => Ok(Some(x)),
            None => Err(self.error(key, format_args!("expected {expected}, found {}", shown(v)))),
        }
    }
}

/// The names of all architectures, for messages.
const MODEL_TYPES: [&str; ARCHITECTURES.len()] = {
    let mut names = [""; ARCHITECTURES.len()];
    let mut i = 0;
    while i < names.len() {
        names[i] = ARCHITECTURES[i].model_type;
        i += 1;
    }
    names
};

/// A value for a message: short ones as they are, long ones by their beginning.
fn shown(v: &Value) -> String {
    const LONGEST: usize = 60;
    let text = v.to_string();
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}
