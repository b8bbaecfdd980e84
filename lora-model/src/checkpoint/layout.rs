use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Component, Path},
};

use serde_json::{Map, Value};

use super::{SINGLE_FILE, TensorFile};
use crate::{Error, Result, config::RawConfig, error::List};

/// How tensors are spread over files and what they are called there.
#[derive(Clone, Debug)]
pub struct Layout {
    files: Vec<String>,
    /// By the model's name of a tensor: the file, and the name in it.
    places: BTreeMap<String, (usize, String)>,
    /// `metadata` of the index; `None` for a single file without one.
    index: Option<Map<String, Value>>,
}

impl Layout {
    /// One `model.safetensors`, tensors under the model's own names.
    pub fn single() -> Layout {
        Layout::of_single(std::iter::empty())
    }

    pub(super) fn of_single<'a>(names: impl Iterator<Item = &'a str>) -> Layout {
        let places = names.map(|name| (name.to_owned(), (0, name.to_owned()))).collect();
        Layout { files: vec![SINGLE_FILE.to_owned()], places, index: None }
    }

    /// Reads an index: `{"metadata": {"total_size": ..}, "weight_map": {tensor: file, ..}}`.
    pub(super) fn from_index(path: &Path) -> Result<Layout> {
        let damaged = |problem: String| Error::Weights { file: path.to_owned(), problem };
        let raw = RawConfig::from_file(path).map_err(|e| match e {
            Error::Config { problem, .. } => damaged(problem),
            e => e,
        })?;
        let Some(Value::Object(map)) = raw.value("weight_map") else {
            return Err(damaged("it has no object \"weight_map\" that gives each tensor its file".to_owned()));
        };
        if map.is_empty() {
            return Err(damaged("its \"weight_map\" names no tensor".to_owned()));
        }
        let folder = path.parent().unwrap_or(Path::new("."));
        let mut files: BTreeSet<&str> = BTreeSet::new();
        for (tensor, file) in map {
            let Some(file) = file.as_str() else {
                return Err(damaged(format!("tensor {tensor}: expected a file name, found {file}")));
            };
            if files.insert(file) && !lies_inside(folder, file) {
                return Err(damaged(format!(
                    "tensor {tensor}: the file {file:?} lies outside the model's folder, or is no file name; \
                     do not use this model, or correct the name"
                )));
            }
        }
        let files: Vec<String> = files.into_iter().map(str::to_owned).collect();
        let place = |(tensor, file): (&String, &Value)| {
            let file = files.iter().position(|f| Some(f.as_str()) == file.as_str())?;
            Some((tensor.clone(), (file, tensor.clone())))
        };
        let places = map.iter().filter_map(place).collect();
        let index = match raw.value("metadata") {
            Some(Value::Object(metadata)) => metadata.clone(),
            _ => Map::new(),
        };
        Ok(Layout { files, places, index: Some(index) })
    }

    /// Checks that every shard holds exactly the tensors that the index gives it.
    pub(super) fn check_shards(&self, index: &Path, shards: &[TensorFile]) -> Result<()> {
        let mut found: BTreeMap<&str, usize> = BTreeMap::new();
        for (i, shard) in shards.iter().enumerate() {
            for name in shard.names() {
                if let Some(other) = found.insert(name, i) {
                    let problem = format!("tensor {name} is in {} too", self.files[other]);
                    return Err(Error::Weights { file: shard.path().to_owned(), problem });
                }
            }
        }
        let mut problems = Vec::new();
        for (name, (i, _)) in &self.places {
            match found.remove(name.as_str()) {
                Some(j) if j == *i => {}
                Some(j) => problems.push(format!("{name} (listed in {}, found in {})", self.files[*i], self.files[j])),
                None => problems.push(format!("{name} (listed in {}, not there)", self.files[*i])),
            }
        }
        problems.extend(found.into_iter().map(|(name, i)| format!("{name} (in {}, not listed)", self.files[i])));
        if problems.is_empty() {
            return Ok(());
        }
        let problem = format!("index and shards disagree, fetch all of them again: {}", List(&problems));
        Err(Error::Weights { file: index.to_owned(), problem })
    }

    /// The same files, with other names for the tensors in them; `None` leaves a tensor out.
    pub(super) fn rename(&self, rename: &dyn Fn(&str) -> Option<String>) -> std::result::Result<Layout, String> {
        let mut places: BTreeMap<String, (usize, String)> = BTreeMap::new();
        for (i, stored) in self.places.values() {
            let Some(name) = rename(stored) else { continue };
            if let Some((_, other)) = places.get(&name) {
                return Err(format!(
                    "tensors {other} and {stored} are both the model's {name}; one of them is too many"
                ));
            }
            places.insert(name, (*i, stored.clone()));
        }
        Ok(Layout { places, ..self.clone() })
    }

    /// The names of the files, relative to the folder.
    pub fn files(&self) -> &[String] {
        &self.files
    }

    /// The model's names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.places.keys().map(String::as_str)
    }

    /// The number of the file that a tensor is in, and its name there.
    pub(super) fn place(&self, name: &str) -> Option<(usize, &str)> {
        self.places.get(name).map(|(file, stored)| (*file, stored.as_str()))
    }

    /// `metadata` of the index, when there is an index.
    pub(super) fn index(&self) -> Option<&Map<String, Value>> {
        self.index.as_ref()
    }
}

/// Whether `name` stays in `folder`: relative, without `..`, and not through a linked subfolder that leads out. The
/// file itself may be a link: that is how download caches lay out a model.
fn lies_inside(folder: &Path, name: &str) -> bool {
    let path = Path::new(name);
    if name.is_empty() || name.contains(['\\', '\0']) || !path.components().all(|c| matches!(c, Component::Normal(_))) {
        return false;
    }
    match path.parent() {
        Some(sub) if !sub.as_os_str().is_empty() => match (folder.join(sub).canonicalize(), folder.canonicalize()) {
            (Ok(sub), Ok(folder)) => sub.starts_with(folder),
            // Not there: the shard will be reported as missing.
            _ => true,
        },
        _ => true,
    }
}
