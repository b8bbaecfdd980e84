//! Weights read and written; every damaged file provoked, by bytes made here by hand.

use std::{cell::Cell, fs, path::Path};

use half::{bf16, f16};
use lora_core::Tensor;
use lora_kernels::Device;
use lora_model::{
    Error,
    checkpoint::{
        Checkpoint, Dtype, INDEX_FILE, Layout, SINGLE_FILE, TensorFile, TensorSpec, file_bytes, save, write_tensors,
    },
};
use serde_json::{Value, json};

const CPU: Device = Device::Cpu;

/// A safetensors file of this header and these bytes behind it.
fn raw(header: &str, data: &[u8]) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend(data);
    file
}

/// A file of f32 tensors [n] that count up from the given numbers.
fn floats(tensors: &[(&str, usize, f32)]) -> Vec<u8> {
    let (mut header, mut data) = (json!({}), Vec::new());
    for (name, n, from) in tensors {
        let start = data.len();
        data.extend((0..*n).flat_map(|i| (from + i as f32).to_le_bytes()));
        header[*name] = json!({"dtype": "F32", "shape": [n], "data_offsets": [start, data.len()]});
    }
    raw(&header.to_string(), &data)
}

/// The name and the contents of a file.
type File<'a> = (&'a str, Vec<u8>);

/// A folder with these files.
fn folder(files: &[File]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
    dir
}

fn index(map: Value) -> (&'static str, Vec<u8>) {
    (INDEX_FILE, json!({"metadata": {"total_size": 1}, "weight_map": map}).to_string().into_bytes())
}

fn values(c: &Checkpoint, name: &str, shape: &[usize]) -> Vec<f32> {
    c.tensor(name, shape, &CPU).unwrap().to_vec().unwrap()
}

fn tensor(shape: &[usize], from: f32) -> Tensor {
    let data: Vec<f32> = (0..shape.iter().product()).map(|i| from + i as f32).collect();
    Tensor::from_slice(&CPU, shape, &data).unwrap()
}

/// Checks that opening fails and that the message says all of this.
fn refused(dir: &Path, wanted: &[&str]) {
    let e = Checkpoint::open(dir).expect_err("it must not open");
    let text = e.to_string();
    for part in wanted {
        assert!(text.contains(part), "{text} lacks {part:?}");
    }
    assert!(!text.contains('\n') && text.len() < 700, "one paragraph: {text}");
}

#[test]
fn f32_is_used_in_place_and_other_floats_are_converted() {
    let mut data = Vec::new();
    let exact = [0.0f32, -0.0, 1.5, -2.0, f32::INFINITY];
    data.extend(exact.iter().flat_map(|x| x.to_le_bytes()));
    data.extend(exact.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()));
    data.extend(exact.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()));
    data.extend([0.1f64, -1e300, 1e-300, 1.0, 3.0].iter().flat_map(|x| x.to_le_bytes()));
    let header = json!({
        "__metadata__": {"format": "pt"},
        "f32": {"dtype": "F32", "shape": [5, 1], "data_offsets": [0, 20]},
        "bf16": {"dtype": "BF16", "shape": [5], "data_offsets": [20, 30]},
        "f16": {"dtype": "F16", "shape": [1, 5], "data_offsets": [30, 40]},
        "f64": {"dtype": "F64", "shape": [5], "data_offsets": [40, 80]},
        "nothing": {"dtype": "F32", "shape": [0, 3], "data_offsets": [80, 80]},
        "ids": {"dtype": "I64", "shape": [], "data_offsets": [80, 88]},
    });
    // Headers of every length, so that tensors begin at every alignment: unaligned ones are copied.
    for pad in 0..8 {
        let header = header.to_string() + &" ".repeat(pad);
        let dir = folder(&[(SINGLE_FILE, raw(&header, &[&data[..], &[0; 8]].concat()))]);
        let c = Checkpoint::open(dir.path()).unwrap();
        let bits = |v: Vec<f32>| v.into_iter().map(f32::to_bits).collect::<Vec<_>>();
        for (name, shape) in [("f32", &[5, 1][..]), ("bf16", &[5]), ("f16", &[1, 5])] {
            assert_eq!(bits(values(&c, name, shape)), bits(exact.to_vec()), "{name}");
        }
        assert_eq!(values(&c, "f64", &[5]), [0.1, f32::NEG_INFINITY, 0.0, 1.0, 3.0]);
        assert_eq!(values(&c, "nothing", &[0, 3]), [0.0f32; 0]);
        let e = c.tensor("ids", &[], &CPU).unwrap_err().to_string();
        assert!(e.contains("ids") && e.contains("I64") && e.contains(SINGLE_FILE), "{e}");
        let info = c.info("bf16").unwrap();
        assert_eq!((info.dtype, info.shape.as_slice(), info.bytes()), (Dtype::BF16, &[5][..], 10));
    }
}

#[test]
fn conversion_crosses_its_chunks() {
    let n = (1 << 17) + 5;
    let data: Vec<u8> = (0..n).flat_map(|i| bf16::from_f32((i % 251) as f32).to_le_bytes()).collect();
    let header = json!({"w": {"dtype": "BF16", "shape": [n], "data_offsets": [0, 2 * n]}});
    let dir = folder(&[(SINGLE_FILE, raw(&header.to_string(), &data))]);
    let read = values(&Checkpoint::open(dir.path()).unwrap(), "w", &[n]);
    assert!(read.iter().enumerate().all(|(i, x)| *x == (i % 251) as f32));
}

#[test]
fn tensors_outlive_the_checkpoint_and_the_file_s_replacement() {
    let dir = folder(&[(SINGLE_FILE, floats(&[("w", 3, 1.0)]))]);
    let c = Checkpoint::open(dir.path()).unwrap();
    let w = c.tensor("w", &[3], &CPU).unwrap();
    // Saved over the very file it is mapped from.
    save(dir.path(), c.layout(), &[TensorSpec::new("w", [3])], |_| Ok(tensor(&[3], 7.0))).unwrap();
    drop(c);
    assert_eq!(w.to_vec::<f32>().unwrap(), [1.0, 2.0, 3.0]);
    assert_eq!(values(&Checkpoint::open(dir.path()).unwrap(), "w", &[3]), [7.0, 8.0, 9.0]);
}

#[test]
fn strictness_names_what_is_missing_unexpected_or_of_another_shape() {
    let dir = folder(&[(SINGLE_FILE, floats(&[("a", 2, 0.0), ("b", 3, 0.0), ("c", 4, 0.0)]))]);
    let c = Checkpoint::open(dir.path()).unwrap();
    let specs = |list: &[(&str, usize)]| list.iter().map(|(n, d)| TensorSpec::new(*n, [*d])).collect::<Vec<_>>();
    c.expect(&specs(&[("c", 4), ("a", 2), ("b", 3)])).unwrap();
    for (expected, wanted) in [
        (&[("a", 2), ("b", 3)][..], &["1 tensor is unexpected: c"][..]),
        (&[("a", 2), ("b", 3), ("c", 4), ("d", 1)], &["1 tensor is missing: d"]),
        (&[("x", 2), ("b", 3), ("y", 3)], &["2 tensors are missing: x, y", "2 tensors are unexpected: a, c"]),
        (&[("a", 2), ("b", 9), ("c", 4)], &["tensor b", "[3]", "[9]"]),
    ] {
        let e = c.expect(&specs(expected)).unwrap_err().to_string();
        for part in wanted {
            assert!(e.contains(part), "{e} lacks {part:?}");
        }
    }
    let many: Vec<_> = (0..20).map(|i| TensorSpec::new(format!("t{i}"), [1])).collect();
    assert!(c.expect(&many).unwrap_err().to_string().contains("and 12 more"));
    let e = c.tensor("b", &[3, 1], &CPU).unwrap_err();
    assert!(matches!(&e, Error::Shape { found, expected, .. } if found == &[3] && expected == &[3, 1]), "{e}");
    assert!(matches!(c.tensor("d", &[1], &CPU), Err(Error::TensorNames { .. })));
    assert!(TensorFile::open(&dir.path().join(SINGLE_FILE)).unwrap().tensor("d", &[1], &CPU).is_err());
}

#[test]
fn names_are_mapped_for_the_model_and_kept_for_the_file() {
    let old = floats(&[("wte.weight", 2, 5.0), ("h.0.attn.bias", 4, 0.0), ("h.0.ln_1.bias", 1, 9.0)]);
    let dir = folder(&[(SINGLE_FILE, old)]);
    let rename = |name: &str| (!name.ends_with(".attn.bias")).then(|| format!("transformer.{name}"));
    let c = Checkpoint::open(dir.path()).unwrap().rename(rename).unwrap();
    assert_eq!(c.names().collect::<Vec<_>>(), ["transformer.h.0.ln_1.bias", "transformer.wte.weight"]);
    assert_eq!(values(&c, "transformer.wte.weight", &[2]), [5.0, 6.0]);
    assert_eq!(c.info("transformer.wte.weight").unwrap().stored_name, "wte.weight");
    let specs = [TensorSpec::new("transformer.wte.weight", [2]), TensorSpec::new("transformer.h.0.ln_1.bias", [1])];
    c.expect(&specs).unwrap();
    let out = tempfile::tempdir().unwrap();
    save(out.path(), c.layout(), &specs, |name| c.tensor(name, &specs[name.contains("ln_1") as usize].shape, &CPU))
        .unwrap();
    let back = Checkpoint::open(out.path()).unwrap();
    assert_eq!(back.names().collect::<Vec<_>>(), ["h.0.ln_1.bias", "wte.weight"]);
    assert_eq!(values(&back, "h.0.ln_1.bias", &[1]), [9.0]);
    let e = back.rename(|_| Some("same".to_owned())).unwrap_err().to_string();
    assert!(e.contains("same") && e.contains("wte.weight") && e.contains("h.0.ln_1.bias"), "{e}");
}

#[test]
fn a_sharded_checkpoint_is_written_back_in_its_layout() {
    let (one, two) = ("model-00001-of-00002.safetensors", "sub/model-00002-of-00002.safetensors");
    let map = json!({"a": one, "b": two, "c": one});
    let text = json!({"metadata": {"total_size": 36, "by": "hand"}, "weight_map": map}).to_string();
    let dir = folder(&[
        (one, floats(&[("a", 2, 1.0), ("c", 3, 2.0)])),
        (two, floats(&[("b", 4, 3.0)])),
        (INDEX_FILE, text.into_bytes()),
    ]);
    let c = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(c.info("b").unwrap().file, dir.path().join(two));
    let specs = [TensorSpec::new("c", [3]), TensorSpec::new("b", [4]), TensorSpec::new("a", [2])];
    c.expect(&specs).unwrap();
    let out = tempfile::tempdir().unwrap();
    let fetch = |name: &str| c.tensor(name, &specs.iter().find(|s| s.name == name).unwrap().shape, &CPU);
    save(out.path(), c.layout(), &specs, fetch).unwrap();
    let back = Checkpoint::open(out.path()).unwrap();
    assert_eq!(back.layout().files(), [one, two]);
    for s in &specs {
        assert_eq!(values(&back, &s.name, &s.shape), values(&c, &s.name, &s.shape));
    }
    let written: Value = serde_json::from_slice(&fs::read(out.path().join(INDEX_FILE)).unwrap()).unwrap();
    assert_eq!(written, json!({"metadata": {"total_size": 36, "by": "hand"}, "weight_map": map}));

    // A tensor more goes to the last file, one less is an error, and a single file in the way is not overwritten.
    let more = [&specs[..], &[TensorSpec::new("score", [1])]].concat();
    let extra = tempfile::tempdir().unwrap();
    save(extra.path(), c.layout(), &more, |n| if n == "score" { Ok(tensor(&[1], 0.5)) } else { fetch(n) }).unwrap();
    assert_eq!(Checkpoint::open(extra.path()).unwrap().info("score").unwrap().file, extra.path().join(two));
    let e = save(extra.path(), c.layout(), &specs[1..], fetch).unwrap_err().to_string();
    assert!(e.contains("missing: c"), "{e}");
    let taken = folder(&[(SINGLE_FILE, floats(&[]))]);
    let e = save(taken.path(), c.layout(), &specs, fetch).unwrap_err().to_string();
    assert!(e.contains("read instead of the shards"), "{e}");
    assert_eq!(fs::read_dir(taken.path()).unwrap().count(), 1);
}

#[test]
fn a_written_file_is_what_others_read_and_the_same_every_time() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("adapter.safetensors");
    let n = (1 << 16) + 3;
    let specs = [TensorSpec::new("z", [n]), TensorSpec::new("a", [2, 3]), TensorSpec::new("s", [])];
    let asked = Cell::new(0);
    let fetch = |name: &str| {
        asked.set(asked.get() + 1);
        Ok(tensor(&specs.iter().find(|s| s.name == name).unwrap().shape, 0.25))
    };
    write_tensors(&path, &[("format", "pt"), ("by", "test")], &specs, fetch).unwrap();
    assert_eq!(asked.get(), 3);
    let bytes = fs::read(&path).unwrap();
    assert_eq!(bytes.len() as u64, file_bytes(&[("format", "pt"), ("by", "test")], &specs));
    let read = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(read.tensor("a").unwrap().shape(), [2, 3]);
    assert_eq!(read.tensor("z").unwrap().data()[4 * (n - 1)..], (0.25 + (n - 1) as f32).to_le_bytes());
    assert_eq!(read.tensor("s").unwrap().data(), 0.25f32.to_le_bytes());
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    assert_eq!(header % 8, 0);
    let text = String::from_utf8_lossy(&bytes[8..8 + header as usize]);
    let order = ["__metadata__", "\"a\"", "\"s\"", "\"z\""].map(|key| text.find(key).unwrap());
    assert!(order.is_sorted(), "{text}");
    let file = TensorFile::open(&path).unwrap();
    assert_eq!(file.names().collect::<Vec<_>>(), ["a", "s", "z"]);
    assert_eq!(file.metadata()["format"], "pt");
    for _ in 0..5 {
        write_tensors(&path, &[("format", "pt"), ("by", "test")], &specs, fetch).unwrap();
        assert!(fs::read(&path).unwrap() == bytes);
    }
}

#[test]
fn a_failed_save_leaves_what_was_there() {
    let dir = folder(&[(SINGLE_FILE, floats(&[("w", 3, 1.0)]))]);
    let specs = [TensorSpec::new("v", [2]), TensorSpec::new("w", [3])];
    let broken = || Error::Weights { file: "elsewhere".into(), problem: "it broke".into() };
    for (name, e) in
        [
            (
                "fetch",
                save(dir.path(), &Layout::single(), &specs, |n| {
                    if n == "w" { Err(broken()) } else { Ok(tensor(&[2], 0.)) }
                }),
            ),
            ("shape", save(dir.path(), &Layout::single(), &specs, |_| Ok(tensor(&[2], 0.)))),
            (
                "twice",
                write_tensors(&dir.path().join(SINGLE_FILE), &[], &[specs[0].clone(), specs[0].clone()], |_| {
                    Ok(tensor(&[2], 0.))
                }),
            ),
        ]
    {
        let text = e.unwrap_err().to_string();
        assert!(
            ["elsewhere: it broke", "tensor w has shape [2] but [3]", "v would be written twice"]
                .iter()
                .any(|w| text.contains(w)),
            "{name}: {text}"
        );
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "{name}");
        assert_eq!(values(&Checkpoint::open(dir.path()).unwrap(), "w", &[3]), [1.0, 2.0, 3.0]);
    }
}

#[test]
fn folders_without_safetensors_are_refused_with_what_to_do() {
    refused(folder(&[]).path(), &["holds no weights", SINGLE_FILE, INDEX_FILE]);
    refused(folder(&[("training_args.bin", vec![])]).path(), &["holds no weights"]);
    refused(&folder(&[]).path().join("nowhere"), &["nowhere", "No such file"]);
    let file = folder(&[("file", vec![1])]);
    refused(&file.path().join("file"), &["file", "Not a directory"]);
    for name in ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "model.pth", "x.ckpt"] {
        refused(
            folder(&[(name, b"PK\x03\x04".to_vec())]).path(),
            &[name, "save_pretrained", "safe_serialization=True"],
        );
    }
    let dir = folder(&[("model.safetensors/x", vec![])]);
    refused(dir.path(), &[SINGLE_FILE, "not a regular file"]);
}

#[test]
fn damaged_headers_are_refused_by_name_and_reason() {
    let good = |offsets: &str| format!(r#"{{"w":{{"dtype":"F32","shape":[2],"data_offsets":{offsets}}}}}"#);
    let two = |a: &str, b: &str| {
        format!(
            r#"{{"a":{{"dtype":"F32","shape":[2],"data_offsets":{a}}},"b":{{"dtype":"F32","shape":[2],"data_offsets":{b}}}}}"#
        )
    };
    let shaped = |dtype: &str, shape: &str| {
        raw(&format!(r#"{{"w":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[0,8]}}}}"#), &[0; 8])
    };
    let lengthy = |n: u64| [&n.to_le_bytes()[..], b"{}      "].concat();
    let cases: Vec<(Vec<u8>, &[&str])> = vec![
        (vec![], &["0 bytes are too few"]),
        (vec![1, 2, 3], &["3 bytes are too few"]),
        (lengthy(1 << 63), &["9223372036854775808", "100 MB"]),
        (lengthy(u64::MAX), &["18446744073709551615"]),
        (lengthy(u64::MAX - 7), &["18446744073709551608"]),
        (lengthy(100_000_001), &["100000001", "100 MB"]),
        (lengthy(9), &["header of 9 bytes", "16 bytes in all"]),
        (lengthy(0), &["JSON"]),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n".to_vec(), &["Git LFS"]),
        (vec![0x80; 4096], &["no safetensors file"]),
        (raw("not json", &[]), &["JSON"]),
        (raw("[]", &[]), &["JSON"]),
        (raw("\u{0}\u{1}", &[]), &["JSON"]),
        ([&2u64.to_le_bytes()[..], b"\xff\xff"].concat(), &["UTF-8"]),
        (raw(&"[".repeat(200_000), &[]), &["JSON"]),
        (raw(&format!("{{\"a\":{}", "{\"a\":".repeat(100_000)), &[]), &["JSON"]),
        (raw(&good("[0,8]"), &[0; 7]), &["8 bytes behind the header", "7 are there"]),
        (raw(&good("[0,8]"), &[]), &["0 are there"]),
        (raw(&good("[0,8]"), &[0; 9]), &["9 are there"]),
        (raw(&good("[8,16]"), &[0; 16]), &["tensor w", "gap"]),
        (raw(&good("[8,0]"), &[0; 8]), &["tensor w"]),
        (raw(&good("[0,4]"), &[0; 4]), &["tensor w", "[2]", "needs 8 bytes", "bytes 0 to 4"]),
        (raw(&good("[0,18446744073709551615]"), &[0; 8]), &["tensor w", "needs 8 bytes"]),
        (raw(&good("[0,99999999999999999999]"), &[0; 8]), &["JSON"]),
        (raw(&good("[-8,0]"), &[0; 8]), &["JSON"]),
        (raw(&good("[0]"), &[0; 8]), &["JSON"]),
        (raw(&two("[0,8]", "[4,12]"), &[0; 12]), &["tensor b", "overlap"]),
        (raw(&two("[0,8]", "[0,8]"), &[0; 8]), &["overlap"]),
        (raw(&two("[0,8]", "[12,20]"), &[0; 20]), &["tensor b", "gap"]),
        (shaped("F32", "[4294967296,4294967296,4294967296]"), &["tensor w", "F32"]),
        (shaped("F32", "[18446744073709551615]"), &["tensor w"]),
        (shaped("F32", "[2.5]"), &["JSON"]),
        (shaped("F32", "[-2]"), &["JSON"]),
        (shaped("F33", "[2]"), &["F33"]),
        (shaped("F64", "[2]"), &["tensor w", "F64", "16 bytes"]),
        (raw(r#"{"w":{"dtype":"F32","shape":[2]}}"#, &[0; 8]), &["JSON"]),
        (raw(r#"{"w":3}"#, &[]), &["JSON"]),
        (raw(r#"{"__metadata__":{"a":1}}"#, &[]), &["JSON"]),
    ];
    for (bytes, wanted) in cases {
        let dir = folder(&[(SINGLE_FILE, bytes)]);
        refused(dir.path(), &[&[SINGLE_FILE], wanted].concat());
    }
}

#[test]
fn a_file_cut_or_changed_anywhere_is_refused_or_read_but_never_panics() {
    let whole = floats(&[("a", 3, 0.0), ("bc", 2, 0.0)]);
    for n in 0..whole.len() {
        refused(folder(&[(SINGLE_FILE, whole[..n].to_vec())]).path(), &[SINGLE_FILE]);
    }
    for i in 0..whole.len() {
        for flip in [0x01, 0x10, 0x80, 0xff] {
            let mut bytes = whole.clone();
            bytes[i] ^= flip;
            let dir = folder(&[(SINGLE_FILE, bytes)]);
            if let Ok(c) = Checkpoint::open(dir.path()) {
                for name in c.names().map(str::to_owned).collect::<Vec<_>>() {
                    let shape = c.info(&name).unwrap().shape;
                    let _ = c.tensor(&name, &shape, &CPU).map(|t| t.to_vec::<f32>().unwrap());
                }
            }
        }
    }
}

#[test]
fn an_index_that_lies_is_refused() {
    let shard = || ("s1.safetensors", floats(&[("a", 2, 0.0)]));
    for name in
        ["/etc/passwd", "../s1.safetensors", "x/../../s1.safetensors", "./../x", "..", ".", "", "a\\b", "C:\\x", "x\0y"]
    {
        refused(
            folder(&[shard(), index(json!({"a": name}))]).path(),
            &[INDEX_FILE, "tensor a", "outside the model's folder"],
        );
    }
    let in_index = |bytes: &[u8]| folder(&[shard(), (INDEX_FILE, bytes.to_vec())]);
    refused(in_index(b"{").path(), &[INDEX_FILE, "JSON"]);
    refused(in_index(b"[]").path(), &[INDEX_FILE, "JSON object"]);
    refused(in_index(b"{}").path(), &[INDEX_FILE, "weight_map"]);
    refused(in_index(b"{\"weight_map\": [1]}").path(), &["weight_map"]);
    refused(in_index(b"{\"weight_map\": {}}").path(), &["names no tensor"]);
    refused(in_index(b"{\"weight_map\": {\"a\": 1}}").path(), &["tensor a", "file name"]);
    let cases: [(Vec<File>, &[&str]); 5] = [
        (vec![index(json!({"a": "s1.safetensors"}))], &[INDEX_FILE, "s1.safetensors", "not in the folder"]),
        (
            vec![shard(), index(json!({"a": "s1.safetensors", "b": "s1.safetensors"}))],
            &[INDEX_FILE, "b (listed in s1.safetensors, not there)"],
        ),
        (
            vec![
                shard(),
                ("s2.safetensors", floats(&[("b", 1, 0.), ("c", 1, 0.)])),
                index(json!({"a": "s1.safetensors", "b": "s2.safetensors"})),
            ],
            &["c (in s2.safetensors, not listed)"],
        ),
        (
            vec![
                shard(),
                ("s2.safetensors", floats(&[("a", 2, 0.)])),
                index(json!({"a": "s1.safetensors", "b": "s2.safetensors"})),
            ],
            &["s2.safetensors", "tensor a is in s1.safetensors too"],
        ),
        (
            vec![
                ("s1.safetensors", floats(&[("b", 2, 0.)])),
                ("s2.safetensors", floats(&[("a", 2, 0.)])),
                index(json!({"a": "s1.safetensors", "b": "s2.safetensors"})),
            ],
            &["a (listed in s1.safetensors, found in s2.safetensors)"],
        ),
    ];
    for (files, wanted) in cases {
        refused(folder(&files).path(), wanted);
    }
}

#[cfg(unix)]
#[test]
fn a_linked_folder_that_leads_out_is_refused_and_a_linked_file_is_not() {
    use std::os::unix::fs::symlink;
    let outside = folder(&[("s1.safetensors", floats(&[("a", 2, 4.0)]))]);
    let dir = folder(&[index(json!({"a": "sub/s1.safetensors"}))]);
    symlink(outside.path(), dir.path().join("sub")).unwrap();
    refused(dir.path(), &["outside the model's folder"]);
    // As download caches do it.
    let dir = folder(&[index(json!({"a": "s1.safetensors"}))]);
    symlink(outside.path().join("s1.safetensors"), dir.path().join("s1.safetensors")).unwrap();
    assert_eq!(values(&Checkpoint::open(dir.path()).unwrap(), "a", &[2]), [4.0, 5.0]);
}
