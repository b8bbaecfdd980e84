use std::{
    collections::{BTreeMap, BTreeSet},
    io::Write,
    path::Path,
};

use half::{bf16, f16};
use lora_core::Tensor;
use lora_kernels::DType;
use serde_json::{Map, Value, json};

use super::{INDEX_FILE, Layout, SINGLE_FILE, TensorSpec};
use crate::{Error, Result, files};

/// Elements that are turned into bytes at a time.
const CHUNK: usize = 1 << 16;

/// Writes a model's weights into `dir`, each in the type of its spec (whatever they were read from), spread over
/// files and named there as `layout` says; tensors that it does not know go to its last file under their own names. Then all
/// have their own: a head beside a bare model's names (without `bert.`, say) is what Transformers 4 takes for damaged.
///
/// `fetch` is asked for one tensor at a time, when its bytes are due, so that no second copy of the weights is ever
/// held. Each file is written atomically and the index last: a folder that had no weights has either all of them or
/// none that would be read.
///
/// # Errors
/// [`Error::TensorNames`] when `tensors` lacks some of the layout's, [`Error::Weights`] when `dir` already holds a
/// single file that would be read instead of shards, [`Error::Io`] (a full disk, say), and what `fetch` gives.
pub fn save(
    dir: &Path,
    layout: &Layout,
    tensors: &[TensorSpec],
    mut fetch: impl FnMut(&str) -> Result<Tensor>,
) -> Result<()> {
    let given: BTreeSet<&str> = tensors.iter().map(|t| t.name.as_str()).collect();
    let missing: Vec<String> = layout.names().filter(|n| !given.contains(n)).map(str::to_owned).collect();
    if !missing.is_empty() {
        return Err(Error::TensorNames { place: dir.to_owned(), missing, unexpected: Vec::new() });
    }
    let single = dir.join(SINGLE_FILE);
    if layout.index().is_some() && single.exists() {
        let problem =
            "it is there already and would be read instead of the shards; move it away or choose another folder";
        return Err(Error::Weights { file: single, problem: problem.to_owned() });
    }
    let last = layout.files().len() - 1;
    let mut shards: Vec<Vec<TensorSpec>> = vec![Vec::new(); layout.files().len()];
    let mut names: BTreeMap<String, &str> = BTreeMap::new();
    let own_names = tensors.iter().any(|t| layout.place(&t.name).is_none());
    for t in tensors {
        let (file, stored) = layout.place(&t.name).unwrap_or((last, &t.name));
        let stored = if own_names { &t.name } else { stored };
        shards[file].push(TensorSpec { name: stored.to_owned(), ..t.clone() });
        names.insert(stored.to_owned(), &t.name);
    }
    files::create_folder(dir)?;
    for (name, shard) in layout.files().iter().zip(&shards) {
        let path = dir.join(name);
        if let Some(folder) = path.parent() {
            files::create_folder(folder)?;
        }
        write_tensors(&path, &[("format", "pt")], shard, |stored| fetch(names[stored]))?;
    }
    match layout.index() {
        Some(metadata) => write_index(&dir.join(INDEX_FILE), metadata, layout.files(), &shards),
        None => Ok(()),
    }
}

/// The bytes of the file that [`write_tensors`] writes.
pub fn file_bytes(metadata: &[(&str, &str)], tensors: &[TensorSpec]) -> u64 {
    let mut sorted: Vec<&TensorSpec> = tensors.iter().collect();
    sorted.sort_by(|a, b| a.name.cmp(&b.name));
    (8 + header(metadata, &sorted).len() + sorted.iter().map(|t| bytes(t)).sum::<usize>()) as u64
}

/// Writes one safetensors file atomically: `tensors` in the types of their specs, sorted by name, each asked of `fetch` when its bytes are
/// due, with `metadata` in the header. The same tensors give the same bytes.
///
/// # Errors
/// [`Error::Io`], [`Error::Shape`] when `fetch` gives another shape than announced, [`Error::Weights`] for a name that
/// comes twice, for a NaN or an infinity, and for a number that is too large for its type, and what `fetch` gives. No file is left then, and one that was there is as it was.
///
/// # Panics
/// When `fetch` gives a tensor that is not f32, or a spec has a type that weights are not written in.
pub fn write_tensors(
    path: &Path,
    metadata: &[(&str, &str)],
    tensors: &[TensorSpec],
    mut fetch: impl FnMut(&str) -> Result<Tensor>,
) -> Result<()> {
    let mut sorted: Vec<&TensorSpec> = tensors.iter().collect();
    sorted.sort_by(|a, b| a.name.cmp(&b.name));
    if let Some(pair) = sorted.windows(2).find(|pair| pair[0].name == pair[1].name) {
        let problem = format!("tensor {} would be written twice", pair[0].name);
        return Err(Error::Weights { file: path.to_owned(), problem });
    }
    let header = header(metadata, &sorted);
    files::write_atomic(path, |w| {
        w.write_all(&(header.len() as u64).to_le_bytes())?;
        w.write_all(header.as_bytes())?;
        for spec in &sorted {
            let t = fetch(&spec.name)?;
            if t.shape() != spec.shape {
                Err(Error::Shape {
                    file: path.to_owned(),
                    tensor: spec.name.clone(),
                    expected: spec.shape.clone(),
                    found: t.shape().to_vec(),
                })?;
            }
            if let Some(problem) = write_floats(w, &t, spec.dtype)? {
                let problem = format!("tensor {} {problem}", spec.name);
                Err(Error::Weights { file: path.to_owned(), problem })?;
            }
        }
        Ok(())
    })
}

/// Gives what is wrong with numbers that are none, or would be infinite in their type.
fn write_floats(w: &mut dyn Write, t: &Tensor, dtype: DType) -> std::io::Result<Option<String>> {
    let mut bytes = Vec::with_capacity(4 * CHUNK);
    let n = t.len();
    let column = t.clone().reshape(&[n, 1]);
    for start in (0..n).step_by(CHUNK) {
        let floats = column.rows_in(start..n.min(start + CHUNK)).to_vec::<f32>().map_err(Error::from)?;
        if let Some((i, x)) = floats.iter().enumerate().find(|(_, x)| !x.is_finite()) {
            return Ok(Some(format!("is {x} at element {}; what holds no numbers is not written", start + i)));
        }
        bytes.clear();
        match dtype {
            DType::Bf16 => bytes.extend(floats.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes())),
            DType::F16 => {
                if floats.iter().any(|&x| f16::from_f32(x).is_infinite()) {
                    return Ok(Some("has numbers beyond 65504, the largest of f16; write it in bf16".into()));
                }
                bytes.extend(floats.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()));
            }
            _ => bytes.extend(floats.iter().flat_map(|x| x.to_le_bytes())),
        }
        w.write_all(&bytes)?;
    }
    Ok(None)
}

/// The JSON of a header, filled up with spaces so that the tensors' bytes begin at a multiple of 8.
fn header(metadata: &[(&str, &str)], tensors: &[&TensorSpec]) -> String {
    let mut keys = Map::new();
    if !metadata.is_empty() {
        let strings = metadata.iter().map(|(k, v)| (k.to_string(), Value::from(*v)));
        keys.insert("__metadata__".to_owned(), Value::Object(strings.collect()));
    }
    let mut start = 0;
    for t in tensors {
        let end = start + bytes(t);
        keys.insert(
            t.name.clone(),
            json!({"dtype": type_name(t.dtype), "shape": t.shape, "data_offsets": [start, end]}),
        );
        start = end;
    }
    let mut text = Value::Object(keys).to_string();
    text.push_str(&" ".repeat(text.len().next_multiple_of(8) - text.len()));
    text
}

fn write_index(path: &Path, metadata: &Map<String, Value>, names: &[String], shards: &[Vec<TensorSpec>]) -> Result<()> {
    let mut metadata = metadata.clone();
    let total: usize = shards.iter().flatten().map(bytes).sum();
    metadata.insert("total_size".to_owned(), total.into());
    if let Some(parameters) = metadata.get_mut("total_parameters") {
        let count = |t: &TensorSpec| t.shape.iter().product::<usize>();
        *parameters = shards.iter().flatten().map(count).sum::<usize>().into();
    }
    let mut map: BTreeMap<&str, &str> = BTreeMap::new();
    for (name, shard) in names.iter().zip(shards) {
        map.extend(shard.iter().map(|t| (t.name.as_str(), name.as_str())));
    }
    let text = format!("{:#}\n", json!({"metadata": metadata, "weight_map": map}));
    files::write_bytes(path, text.as_bytes())
}

/// The name that safetensors has for a type.
fn type_name(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "F32",
        DType::Bf16 => "BF16",
        DType::F16 => "F16",
        other => panic!("weights are not written in {other:?}"),
    }
}

fn bytes(t: &TensorSpec) -> usize {
    t.dtype.size() * t.shape.iter().product::<usize>()
}
