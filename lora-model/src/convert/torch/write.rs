//! Writing what `torch.load` reads, also with `weights_only=True`.

use std::{collections::BTreeMap, path::Path};

use lora_core::Tensor;
use lora_kernels::DType;

use super::zip;
use crate::{Error, Result, files};

/// Writes an ordered dictionary of names and f32 tensors, as `torch.save(state_dict, path)` does, in one piece. The same
/// tensors give the same bytes.
///
/// # Errors
/// [`Error::Io`]; [`Error::Weights`] beyond the 4 GiB that are written without 64-bit sizes.
pub fn write_state_dict(path: &Path, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
    let bytes: usize = tensors.values().map(|t| 4 * t.len()).sum();
    if bytes > u32::MAX as usize / 2 || tensors.len() > usize::from(u16::MAX) / 2 {
        let problem = format!("{bytes} bytes in {} tensors are more than fit such a file", tensors.len());
        return Err(Error::Weights { file: path.to_owned(), problem });
    }
    const FOLDER: &str = "archive";
    let mut entries =
        vec![(format!("{FOLDER}/data.pkl"), pickle(tensors)), (format!("{FOLDER}/byteorder"), b"little".into())];
    for (i, tensor) in tensors.values().enumerate() {
        let values = tensor.to_dtype(DType::F32)?.to_vec::<f32>()?;
        entries.push((format!("{FOLDER}/data/{i}"), values.iter().flat_map(|v| v.to_le_bytes()).collect()));
    }
    entries.push((format!("{FOLDER}/version"), b"3\n".into()));
    let archive = zip::write(&entries);
    files::write_atomic(path, |w| w.write_all(&archive))
}

/// The pickle of such a dictionary, in protocol 2.
fn pickle(tensors: &BTreeMap<String, Tensor>) -> Vec<u8> {
    let mut out = b"\x80\x02ccollections\nOrderedDict\n)R(".to_vec();
    fn text(out: &mut Vec<u8>, text: &str) {
        out.push(b'X');
        out.extend((text.len() as u32).to_le_bytes());
        out.extend(text.as_bytes());
    }
    fn number(out: &mut Vec<u8>, n: usize) {
        // With its sign bit free.
        let bytes = (n as u64).to_le_bytes();
        out.extend([0x8a, 8]);
        out.extend(bytes);
    }
    fn numbers(out: &mut Vec<u8>, all: &[usize]) {
        out.push(b'(');
        all.iter().for_each(|n| number(out, *n));
        out.push(b't');
    }
    for (i, (name, tensor)) in tensors.iter().enumerate() {
        text(&mut out, name);
        out.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        text(&mut out, "storage");
        out.extend(b"ctorch\nFloatStorage\n");
        text(&mut out, &i.to_string());
        text(&mut out, "cpu");
        number(&mut out, tensor.len());
        // The storage by its tuple; offset, shape, strides; no gradient, no hooks.
        out.extend(b"tQ");
        number(&mut out, 0);
        numbers(&mut out, tensor.shape());
        let mut stride = tensor.len();
        let strides: Vec<usize> = tensor
            .shape()
            .iter()
            .map(|n| {
                stride /= n.max(&1);
                stride
            })
            .collect();
        numbers(&mut out, &strides);
        out.extend(b"\x89ccollections\nOrderedDict\n)RtR");
    }
    out.extend(b"u.");
    out
}
