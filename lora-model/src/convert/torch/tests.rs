//! Hostile and damaged files, each refused for what is wrong with it.

use super::*;

/// A file of torch.save with this pickle, and one storage `0` of four f32.
fn file(pickle: &[u8]) -> Vec<u8> {
    let entries = [
        ("archive/data.pkl".to_owned(), pickle.to_vec()),
        ("archive/data/0".to_owned(), [1f32, 2.0, 3.0, 4.0].iter().flat_map(|v| v.to_le_bytes()).collect()),
    ];
    zip::write(&entries)
}

/// The pickle of `{"w": tensor}` whose arguments are these instructions.
fn of_tensor(storage: &str, arguments: &str) -> Vec<u8> {
    let mut pickle = b"\x80\x02}U\x01wctorch._utils\n_rebuild_tensor_v2\n(".to_vec();
    pickle.extend(format!("(U\x07storagectorch\n{storage}\nU\x010U\x03cpuK\x04tQ{arguments}").bytes());
    pickle.extend(b"tRs.");
    pickle
}

#[track_caller]
fn refused(pickle: &[u8], parts: &[&str]) {
    let e = parse(&file(pickle)).map(|s| s.tensors.into_keys().collect::<Vec<_>>()).expect_err("it has to be refused");
    parts.iter().for_each(|part| assert!(e.contains(part), "no {part:?} in: {e}"));
}

#[test]
fn a_tensor_is_read() {
    let state = parse(&file(&of_tensor("FloatStorage", "K\0(K\x02K\x02t(K\x01K\x02t"))).unwrap();
    // Strides of one and two: transposed.
    assert_eq!(state.tensors["w"].to_vec::<f32>().unwrap(), [1.0, 3.0, 2.0, 4.0]);
    assert_eq!(state.tensors["w"].shape(), [2, 2]);
}

#[test]
fn whatever_calls_something_is_refused_by_its_name() {
    // What `class Evil: __reduce__ = lambda self: (os.system, ("touch /tmp/owned",))` pickles as, in several protocols.
    for (module, name) in [
        ("os", "system"),
        ("posix", "system"),
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("__builtin__", "exec"),
        ("subprocess", "Popen"),
        ("torch", "load"),
        ("torch._utils", "_rebuild_tensor"),
        ("torch.storage", "_load_from_bytes"),
        ("collections", "OrderedDict.update"),
        ("numpy.core.multiarray", "_reconstruct"),
    ] {
        let pickle = format!("\u{2}c{module}\n{name}\nX\u{10}\u{0}\u{0}\u{0}touch /tmp/owned\u{5}R.");
        let mut bytes = vec![0x80];
        bytes.extend(pickle.bytes().map(|b| if b == 5 { 0x85 } else { b }));
        refused(&bytes, &[&format!("{module}.{name}"), "no part of a tensor"]);
    }
    // The newer ways to name something, to build objects, to go through registries, and to hold code.
    for (pickle, what) in [
        (&b"\x80\x04\x8c\x02os\x8c\x06system\x93."[..], "0x8c"),
        (b"\x80\x02\x93.", "0x93"),
        (b"\x80\x02(ios\nsystem\n.", "'i'"),
        (b"\x80\x02(U\x02osoU\x06system.", "'o'"),
        (b"\x80\x02)\x81.", "0x81"),
        (b"\x80\x02)}\x92.", "0x92"),
        (b"\x80\x02\x82\x01.", "0x82"),
        (b"\x80\x02Pos.system\n.", "'P'"),
        (b"\x80\x05\x96\x00\x00\x00\x00\x00\x00\x00\x00.", "protocol 5"),
        (b"I5\n.", "'I'"),
    ] {
        refused(pickle, &[what]);
    }
    // A global that is allowed may not be called for what it was not made for.
    refused(b"\x80\x02ccollections\nOrderedDict\n(K\x01K\x02t\x85R.", &["strange arguments"]);
    refused(b"\x80\x02ctorch\nFloatStorage\n(K\x05tR.", &["no function of tensors"]);
    refused(b"\x80\x02ctorch._utils\n_rebuild_parameter\n(U\x01atR.", &["parameter"]);
    refused(b"\x80\x02K\x01)R.", &["no function of tensors"]);
    refused(b"\x80\x02ccollections\nOrderedDict\n)R(K\x01tb.", &["attributes"]);
    assert!(!std::path::Path::new("/tmp/owned").exists());
}

#[test]
fn a_machine_that_runs_dry_stops() {
    for (pickle, part) in [
        (&b""[..], "ends in the middle"),
        (b"\x80", "ends in the middle"),
        (b"\x80\x02", "ends in the middle"),
        (b".", "more values than there are"),
        (b"\x80\x02s.", "more values than there are"),
        (b"\x80\x02R.", "more values than there are"),
        (b"\x80\x02Q.", "more values than there are"),
        (b"\x80\x02b.", "more values than there are"),
        (b"\x80\x02K\x01\x86.", "more values than there are"),
        // A mark is a floor.
        (b"\x80\x02}(s.", "more values than there are"),
        (b"\x80\x02K\x01(\x85.", "more values than there are"),
        (b"\x80\x02t.", "never opened"),
        (b"\x80\x02}u.", "never opened"),
        (b"\x80\x02}(K\x01u.", "without a value"),
        (b"\x80\x02](K\x01K\x02u.", "no dictionary"),
        (b"\x80\x02}K\x01a.", "no list"),
        (b"\x80\x02K\x01K\x02K\x03s.", "no dictionary"),
        (b"\x80\x02h\x00.", "never kept"),
        (b"\x80\x02q\x00.", "more values than there are"),
        (b"\x80\x02j\xff\xff\xff\xff.", "never kept"),
        (b"\x80\x02}}.", "left over"),
        (b"\x80\x02(}.", "left over"),
        (b"\x80\x02X\xff\xff\xff\xffabc.", "ends in the middle"),
        (b"\x80\x02T\xff\xff\xff\x7fabc.", "ends in the middle"),
        (b"\x80\x02U\xffabc.", "ends in the middle"),
        (b"\x80\x02U\x02\xff\xfe.", "not UTF-8"),
        (b"\x80\x02\x8a\xff.", "ends in the middle"),
        (b"\x80\x02\x8a\x09123456789.", "9 bytes"),
        (b"\x80\x02cos", "without an end"),
        (b"\x80\x02K\x01.", "no dictionary"),
        (b"\x80\x02U\x05helloQ.", "no storage"),
        (b"\x80\x02(U\x04codectorch\nFloatStorage\nU\x010U\x03cpuK\x04tQ.", "no storage"),
    ] {
        refused(pickle, &[part]);
    }
    let long = [b"\x80\x02c".to_vec(), vec![b'a'; 10_000], b"\nb\n.".to_vec()].concat();
    refused(&long, &["without an end"]);
}

#[test]
fn bombs_cost_what_their_bytes_cost() {
    // Lists in lists, doubled thirty times: a billion entries, if anybody wrote them out.
    let mut pickle = b"\x80\x02]q\x00".to_vec();
    for i in 1..=30u8 {
        pickle.extend([b']', b'(', b'h', i - 1, b'h', i - 1, b'e', b'q', i]);
    }
    pickle.push(b'.');
    refused(&pickle, &["left over"]);
    // Tuples of tuples that nobody looks into, in a dictionary that contains itself.
    let mut pickle = b"\x80\x02}q\x00U\x01a]q\x01s".to_vec();
    for _ in 0..1000 {
        pickle.extend(b"U\x01b(h\x01h\x01h\x01h\x01tq\x01s");
    }
    pickle.extend(b"U\x05modelh\x00s.");
    let state = parse(&file(&pickle)).unwrap();
    assert!(state.tensors.is_empty());
    // One tensor under as many names as there are.
    let mut pickle = of_tensor("FloatStorage", "K\0(K\x04t(K\x01t");
    pickle.truncate(pickle.len() - 2);
    pickle.extend(b"q\x07s");
    let tied = pickle.clone();
    for i in 0..300_000 {
        pickle.extend(format!("U\x06{i:06}h\x07s").bytes());
    }
    refused(&[&pickle[..], b"."].concat(), &["lie in the same memory"]);
    let tied = [&tied[..], b"U\x01vh\x07s."].concat();
    assert_eq!(parse(&file(&tied)).unwrap().tensors.len(), 2, "tied weights");
    // Marks upon marks.
    let marks = [b"\x80\x02".to_vec(), vec![b'('; 1_000_000], b".".to_vec()].concat();
    refused(&marks, &["more values than there are"]);
}

#[test]
fn sizes_and_offsets_are_checked() {
    let tensor = |arguments: &str| of_tensor("FloatStorage", arguments);
    for (arguments, part) in [
        // More elements than the storage, by size, by stride, by offset, by repetition.
        ("K\0(K\x05t(K\x01t", "does not lie within"),
        ("K\0(K\x02t(K\x04t", "does not lie within"),
        ("K\x03(K\x02t(K\x01t", "does not lie within"),
        ("K\0(K\x05t(K\0t", "does not lie within"),
        ("J\u{1}\0\0\u{7f}(K\x01t(K\x01t", "does not lie within"),
        // Products and sums that overflow.
        ("K\0(J\0\0\0\u{7f}J\0\0\0\u{7f}J\0\0\0\u{7f}t(K\x01K\x01K\x01t", "does not lie within"),
        // Sizes and strides that do not belong together, or are none.
        ("K\0(K\x02t(K\x01K\x01t", "1 dimensions with 2 strides"),
        (
            "K\0(K\x01K\x01K\x01K\x01K\x01K\x01K\x01K\x01K\x01t(K\x01K\x01K\x01K\x01K\x01K\x01K\x01K\x01K\x01t",
            "9 dimensions",
        ),
        ("K\0(U\x01at(K\x01t", "strange arguments"),
        ("K\0K\x01K\x01", "strange arguments"),
        ("U\x01a(K\x02t(K\x01t", "strange arguments"),
        ("K\0", "strange arguments"),
    ] {
        refused(&tensor(arguments), &[part]);
    }
    // Negative ones.
    let minus = |at: usize| {
        let mut bytes = of_tensor("FloatStorage", "J\u{1}\0\0\0(J\u{2}\0\0\0t(J\u{1}\0\0\0t");
        let places: Vec<usize> = (0..bytes.len()).filter(|i| bytes[*i] == b'J').collect();
        bytes[places[at] + 1..places[at] + 5].fill(0xff);
        bytes
    };
    refused(&minus(0), &["offset -1"]);
    refused(&minus(1), &["size or stride of -1"]);
    refused(&minus(2), &["size or stride of -1"]);
    // A storage that is not what the pickle claims.
    refused(&of_tensor("DoubleStorage", "K\0(K\x02t(K\x01t"), &["tensor w", "4 elements of 8 bytes has 16 bytes"]);
    let other = String::from_utf8(tensor("K\0(K\x02t(K\x01t")[1..].to_vec()).unwrap().replace("U\x010", "U\x017");
    refused(&[b"\x80", other.as_bytes()].concat(), &["storage 7 is missing"]);
}

#[test]
fn damaged_files_never_panic() {
    let good = file(&of_tensor("FloatStorage", "K\0(K\x02K\x02t(K\x02K\x01t"));
    assert!(parse(&good).is_ok());
    for at in 0..good.len() {
        assert!(parse(&good[..at]).is_err(), "cut at {at}");
        for change in [1, 0x40, 0xff] {
            let mut bad = good.clone();
            bad[at] ^= change;
            let _ = parse(&bad);
        }
    }
    for (bytes, part) in
        [(&b"PK\x03\x04"[..], "without an end"), (b"GGUF....", "no file of torch.save"), (b"", "no file of torch.save")]
    {
        assert!(parse(bytes).unwrap_err().contains(part));
    }
    let two = zip::write(&[("a/data.pkl".into(), vec![]), ("b/data.pkl".into(), vec![])]);
    assert!(parse(&two).unwrap_err().contains("one data.pkl"));
    let big = zip::write(&[("a/data.pkl".into(), b"\x80\x02}.".into()), ("a/byteorder".into(), b"big".into())]);
    assert!(parse(&big).unwrap_err().contains("big-endian"));
}

#[test]
fn what_is_written_is_read_again() {
    let tensors: BTreeMap<String, Tensor> = [("a.b", vec![2, 3]), ("scalar", vec![]), ("empty", vec![0, 4])]
        .into_iter()
        .map(|(name, shape)| {
            let values: Vec<f32> = (0..shape.iter().product()).map(|i| i as f32 - 1.5).collect();
            (name.to_owned(), Tensor::from_slice(&Device::Cpu, &shape, &values).unwrap())
        })
        .collect();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.pt");
    write_state_dict(&path, &tensors).unwrap();
    let state = read_state_dict(&path).unwrap();
    assert!(state.others.is_empty());
    assert_eq!(state.tensors.keys().collect::<Vec<_>>(), tensors.keys().collect::<Vec<_>>());
    for (name, t) in &tensors {
        assert_eq!(
            (state.tensors[name].shape(), state.tensors[name].to_vec::<f32>().unwrap()),
            (t.shape(), t.to_vec().unwrap())
        );
    }
}
