//! Files of `torch.save`, read without Python and without running what is in them: a [`StateDict`] of tensors.
//!
//! Both of PyTorch's formats are read, the zip archive of today and the stream of versions before 1.6. What they hold beside
//! tensors is a pickle, a program that may call anything; see `pickle.rs` for the few instructions that are followed.

mod pickle;
#[cfg(test)]
mod tests;
mod write;
mod zip;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs,
    path::Path,
};

use half::{bf16, f16};
use lora_core::Tensor;
use lora_kernels::Device;

use self::{
    pickle::{Kind, Node, Pickle, Value, View},
    zip::Archive,
};
use crate::{Error, Result};

pub use write::write_state_dict;

/// What a file of `torch.save` holds.
#[derive(Debug, Default)]
pub struct StateDict {
    /// Its tensors of floating-point numbers, in f32.
    pub tensors: BTreeMap<String, Tensor>,
    /// What else it names: numbers, tensors of whole numbers.
    pub others: Vec<String>,
}

/// Keys under which training programs keep the `state_dict` among other things.
const INNER: [&str; 3] = ["model_state_dict", "state_dict", "model"];

/// Reads the `state_dict` in a file of `torch.save`: of names and tensors, or of one such dictionary under
/// `model_state_dict`, `state_dict` or `model` beside other things.
///
/// # Errors
/// [`Error::Io`]; [`Error::Weights`] for a file that is none of PyTorch's, is damaged, or whose pickle asks for anything but
/// tensors: then by the name of what it asks for.
pub fn read_state_dict(path: &Path) -> Result<StateDict> {
    let bytes = fs::read(path).map_err(|e| Error::io("read", path, e))?;
    parse(&bytes).map_err(|problem| Error::Weights { file: path.to_owned(), problem })
}

type Parsed<T> = std::result::Result<T, String>;

fn parse(bytes: &[u8]) -> Parsed<StateDict> {
    match () {
        () if bytes.starts_with(b"PK\x03\x04") => of_zip(bytes),
        () if bytes.starts_with(LEGACY) => of_stream(bytes),
        () => Err("it is no file of torch.save, in neither of its formats".into()),
    }
}

fn of_zip(bytes: &[u8]) -> Parsed<StateDict> {
    let archive = Archive::open(bytes)?;
    const PICKLE: &str = "data.pkl";
    // `{name}/data.pkl`, whatever the archive is called.
    let folders: Vec<&str> =
        archive.names().filter_map(|n| n.strip_suffix(PICKLE).filter(|f| f.is_empty() || f.ends_with('/'))).collect();
    let [folder] = folders[..] else {
        return Err("it is a zip file, but not with the one data.pkl of torch.save".into());
    };
    let entry = |name: &str| archive.get(&format!("{folder}{name}"));
    if entry("byteorder").is_some_and(|order| order != b"little") {
        return Err("its numbers are in big-endian order, which is not read".into());
    }
    let pickle = pickle::read(entry(PICKLE).unwrap_or_default())?;
    state_dict(&pickle, &|storage| entry(&format!("data/{storage}")))
}

/// What a file of PyTorch before 1.6 begins with: a pickle of a long number.
const LEGACY: &[u8] = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.";

/// Four pickles (version, machine, contents, names of storages), and then the storages.
fn of_stream(bytes: &[u8]) -> Parsed<StateDict> {
    let mut at = LEGACY.len();
    let mut next = || -> Parsed<Pickle> {
        let pickle = pickle::read(&bytes[at..])?;
        at += pickle.end;
        Ok(pickle)
    };
    let (_version, machine, contents, names) = (next()?, next()?, next()?, next()?);
    if let Value::Node(n) = machine.root
        && let Node::Dict(pairs) = &machine.nodes[n]
    {
        let big = |(key, value): &(Value, Value)| {
            text(&machine, *key) == Some("little_endian") && *value == Value::Bool(false)
        };
        if pairs.iter().any(big) {
            return Err("its numbers are in big-endian order, which is not read".into());
        }
    }
    let kinds: HashMap<&str, Kind> = contents
        .nodes
        .iter()
        .filter_map(|node| match node {
            Node::Storage(s) => Some((s.key.as_str(), s.kind)),
            _ => None,
        })
        .collect();
    let Some(Node::List(list)) = node(&names, names.root) else { return Err("it does not name its storages".into()) };
    const ENDS: &str = "it ends before its last storage; it is damaged or cut off, fetch it again";
    let mut storages: HashMap<&str, &[u8]> = HashMap::new();
    for name in list {
        let name = text(&names, *name).ok_or("it has a storage whose name is no text")?;
        let kind = kinds.get(name).ok_or_else(|| format!("it has a storage {name} that no tensor uses"))?;
        let len = bytes[at..].first_chunk::<8>().ok_or(ENDS)?;
        let size =
            usize::try_from(u64::from_le_bytes(*len)).ok().and_then(|n| n.checked_mul(kind.bytes())).ok_or(ENDS)?;
        let data = bytes[at + 8..].get(..size).ok_or(ENDS)?;
        at += 8 + size;
        storages.insert(name, data);
    }
    if at != bytes.len() {
        return Err(format!("{} bytes follow its last storage; it is damaged, fetch it again", bytes.len() - at));
    }
    state_dict(&contents, &|storage| storages.get(storage).copied())
}

fn node(pickle: &Pickle, value: Value) -> Option<&Node> {
    match value {
        Value::Node(n) => pickle.nodes.get(n),
        _ => None,
    }
}

fn text(pickle: &Pickle, value: Value) -> Option<&str> {
    match node(pickle, value) {
        Some(Node::Text(text)) => Some(text),
        _ => None,
    }
}

fn dict(pickle: &Pickle, value: Value) -> Option<&[(Value, Value)]> {
    match node(pickle, value) {
        Some(Node::Dict(pairs)) => Some(pairs),
        _ => None,
    }
}

fn state_dict<'a>(pickle: &Pickle, storage: &dyn Fn(&str) -> Option<&'a [u8]>) -> Parsed<StateDict> {
    let pairs = dict(pickle, pickle.root).ok_or("it holds no dictionary of tensors")?;
    let inner = pairs.iter().find(|(key, value)| {
        text(pickle, *key).is_some_and(|key| INNER.contains(&key)) && dict(pickle, *value).is_some()
    });
    let pairs = inner.and_then(|(_, value)| dict(pickle, *value)).unwrap_or(pairs);
    let mut state = StateDict::default();
    let (mut seen, mut stored, mut taken) = (HashSet::new(), 0usize, 0usize);
    for (key, value) in pairs {
        let name = text(pickle, *key).ok_or("it has a key that is no text")?;
        match node(pickle, *value) {
            Some(Node::Tensor(view)) if !matches!(view.storage.kind, Kind::Other(_)) => {
                let data = storage(&view.storage.key)
                    .ok_or_else(|| format!("tensor {name}: its storage {} is missing", view.storage.key))?;
                if seen.insert(&view.storage.key) {
                    stored += data.len() / view.storage.kind.bytes().max(1);
                }
                let tensor = tensor(view, data).map_err(|e| format!("tensor {name}: {e}"))?;
                // Tied weights lie in the same memory, a few of them; without an end a small file would take a large one's.
                taken = taken.saturating_add(tensor.len());
                if taken > (4 * stored).saturating_add(1 << 20) {
                    return Err(format!("tensor {name}: too many tensors lie in the same memory"));
                }
                if state.tensors.insert(name.to_owned(), tensor).is_some() {
                    return Err(format!("tensor {name} is there twice"));
                }
            }
            _ => state.others.push(name.to_owned()),
        }
    }
    Ok(state)
}

/// The elements of a view, in f32 and in order.
fn tensor(view: &View, data: &[u8]) -> Parsed<Tensor> {
    let size = view.storage.kind.bytes();
    if view.storage.len.checked_mul(size) != Some(data.len()) {
        return Err(format!(
            "its storage of {} elements of {size} bytes has {} bytes; the file is damaged",
            view.storage.len,
            data.len()
        ));
    }
    let at = |i: usize| &data[i * size..];
    fn first<const N: usize>(bytes: &[u8]) -> [u8; N] {
        *bytes.first_chunk().expect("the view lies within the storage: checked")
    }
    let read: &dyn Fn(usize) -> f32 = match view.storage.kind {
        Kind::F32 => &|i| f32::from_le_bytes(first(at(i))),
        Kind::F64 => &|i| f64::from_le_bytes(first(at(i))) as f32,
        Kind::F16 => &|i| f16::from_le_bytes(first(at(i))).to_f32(),
        Kind::Bf16 => &|i| bf16::from_le_bytes(first(at(i))).to_f32(),
        Kind::Other(_) => return Err("it does not hold floating-point numbers".into()),
    };
    let count: usize = view.shape.iter().product();
    let mut values = Vec::with_capacity(count);
    let mut index = vec![0; view.shape.len()];
    for _ in 0..count {
        let offset: usize = index.iter().zip(&view.strides).map(|(i, s)| i * s).sum();
        values.push(read(view.offset + offset));
        for (i, n) in index.iter_mut().zip(&view.shape).rev() {
            *i += 1;
            if *i < *n {
                break;
            }
            *i = 0;
        }
    }
    Tensor::from_slice(&Device::Cpu, &view.shape, &values).map_err(|e| e.to_string())
}
