//! Reading the header of a safetensors file, and saying in full what is wrong with a bad one.

use std::path::Path;

use safetensors::{SafeTensorError, SafeTensors, tensor::Metadata};
use serde_json::{Map, Value};

use crate::{Error, Result};

const LENGTH: usize = 8;

/// The header of `bytes`, and the offset at which the tensors' bytes begin.
///
/// The tensors cover everything behind the header, one after the other, without a gap or an overlap, and each has as
/// many bytes as its shape and type need: the safetensors crate checks that.
pub(super) fn read(path: &Path, bytes: &[u8]) -> Result<(Metadata, usize)> {
    match SafeTensors::read_metadata(bytes) {
        Ok((n, metadata)) => Ok((metadata, LENGTH + n)),
        Err(e) => Err(Error::Weights { file: path.to_owned(), problem: describe(bytes, &e) }),
    }
}

fn describe(bytes: &[u8], e: &SafeTensorError) -> String {
    const AGAIN: &str = "the file is damaged or cut off; fetch it again";
    if bytes.starts_with(b"version https://git-lfs") {
        return "it is a Git LFS pointer, not the weights; run `git lfs pull` in its folder".to_owned();
    }
    let Some(claimed) = bytes.first_chunk().map(|b| u64::from_le_bytes(*b)) else {
        return format!("{} bytes are too few for a safetensors file; {AGAIN}", bytes.len());
    };
    let header = usize::try_from(claimed).ok().and_then(|n| bytes.get(LENGTH..n.checked_add(LENGTH)?));
    match (e, header) {
        (SafeTensorError::HeaderTooLarge, _) => {
            format!(
                "it claims a header of {claimed} bytes, beyond the format's limit of 100 MB; it is no safetensors file, or {AGAIN}"
            )
        }
        (_, None) => format!("it claims a header of {claimed} bytes, but has {} bytes in all; {AGAIN}", bytes.len()),
        (SafeTensorError::InvalidOffset(name), Some(_)) => {
            format!("tensor {name}: its bytes overlap another tensor's, leave a gap or end before they begin; {AGAIN}")
        }
        (e, Some(header)) => match inconsistency(header, (bytes.len() - LENGTH - header.len()) as u128) {
            Some(problem) => format!("{problem}; {AGAIN}"),
            None => format!("{e}; {AGAIN}"),
        },
    }
}

/// What does not add up in a header that is valid JSON: the first tensor whose size belies its shape, or a size of all
/// that is not what follows the header.
fn inconsistency(header: &[u8], follow: u128) -> Option<String> {
    let tensors: Map<String, Value> = serde_json::from_slice(header).ok()?;
    let mut end = 0;
    for (name, tensor) in tensors.iter().filter(|(name, _)| *name != "__metadata__") {
        // What is no number at all, JSON's own error tells better.
        let shape = tensor["shape"].as_array()?.iter().map(Value::as_u64).collect::<Option<Vec<u64>>>()?;
        let [from, to] = [0, 1].map(|i| tensor["data_offsets"][i].as_u64().map(u128::from));
        let (from, to) = (from?, to?);
        let dtype = serde_json::from_value::<safetensors::Dtype>(tensor["dtype"].clone()).ok()?;
        let count = shape.iter().try_fold(1u128, |n, d| n.checked_mul(u128::from(*d)));
        let needed = count.and_then(|n| Some(n.checked_mul(dtype.bitsize() as u128)? / 8));
        if needed != to.checked_sub(from) || needed.is_none() {
            let needed = needed.map_or("more bytes than can be counted".to_owned(), |n| format!("{n} bytes"));
            return Some(format!(
                "tensor {name}: {dtype} of shape {shape:?} needs {needed}, but has bytes {from} to {to}"
            ));
        }
        end = end.max(to);
    }
    (end != follow).then(|| format!("its tensors need {end} bytes behind the header, but {follow} are there"))
}
