//! Models of llama2.c as Hugging Face folders.

use std::{
    fs,
    path::{Path, PathBuf},
};

use lora_core::peft::Adapted;
use lora_kernels::Device;
use lora_model::{
    Error,
    checkpoint::Checkpoint,
    convert::{self, Llama2c, Vocabulary},
    generate::{GenerationConfig, generate},
    load,
    tokenizer::Tokenizer,
};

/// dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len.
type Header = [i32; 7];

const HEADER: Header = [8, 6, 2, 2, 1, 264, 5];

/// A file of version 0 in which each number says where it stands: its index after the header.
fn model(header: Header) -> Vec<u8> {
    let [d, f, layers, heads, kv_heads, vocab, positions] = header.map(i64::from);
    let kv = d / heads * kv_heads;
    let layer = 2 * d + 2 * d * d + 2 * kv * d + 3 * d * f;
    let head = if vocab < 0 { -vocab * d } else { 0 };
    let n = vocab.abs() * d + layers * layer + d + positions * (d / heads) + head;
    let floats = (0..n).flat_map(|i| (i as f32).to_le_bytes());
    header.iter().flat_map(|n| n.to_le_bytes()).chain(floats).collect()
}

fn vocabulary(pieces: &[(&str, f32)]) -> Vec<u8> {
    let special = ["<unk>", "\n<s>\n", "\n</s>\n"].map(str::to_owned).into_iter();
    let all = special.chain((0..256).map(|b| format!("<0x{b:02X}>"))).map(|piece| (piece, 0.0));
    let all = all.chain(pieces.iter().map(|(piece, score)| (piece.to_string(), *score)));
    let piece = |(piece, score): (String, f32)| {
        [&score.to_le_bytes()[..], &(piece.len() as i32).to_le_bytes(), piece.as_bytes()].concat()
    };
    [7i32.to_le_bytes().to_vec(), all.flat_map(piece).collect()].concat()
}

/// Five pieces; `ab` is made before ` a`.
const PIECES: [(&str, f32); 5] = [("ab", -1.0), (" a", -2.0), (" ", -3.0), ("a", -4.0), ("b", -5.0)];

struct Lab {
    dir: tempfile::TempDir,
}

impl Lab {
    fn new() -> Lab {
        Lab { dir: tempfile::tempdir().unwrap() }
    }

    fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::write(&path, bytes).unwrap();
        path
    }

    /// The folder that a model and a vocabulary become.
    fn convert(&self, header: Header) -> PathBuf {
        let model = Llama2c::open(&self.write("model.bin", &model(header))).unwrap();
        let vocabulary = Vocabulary::open(&self.write("vocab.bin", &vocabulary(&PIECES)), 264).unwrap();
        let out = self.dir.path().join("out");
        convert::write(&model, &vocabulary, &out).unwrap();
        out
    }
}

#[test]
fn every_matrix_stands_where_llama2c_has_it() {
    // Offsets after the header, by the order of export.py: embeddings, then each kind for both layers.
    let (d, f, kv, vocab) = (8, 6, 4, 264);
    let mut at = vocab * d;
    let mut begins = |len: usize| {
        let begin = at;
        at += 2 * len;
        begin
    };
    let ln_1 = begins(d);
    let (wq, wk, wv, wo) = (begins(d * d), begins(kv * d), begins(kv * d), begins(d * d));
    let (ln_2, w1, w2, w3) = (begins(d), begins(f * d), begins(d * f), begins(f * d));
    let norm = at;
    let classifier = norm + d + 5 * 4;
    // The row of the file that stands in a row: its own, or rows 0, 2, 1, 3 of each head of four.
    type Row = fn(usize) -> usize;
    let own: Row = |row| row;
    let turned: Row = |row| row / 4 * 4 + [0, 2, 1, 3][row % 4];
    let tensors = [
        ("self_attn.q_proj", [d, d], wq, turned),
        ("self_attn.k_proj", [kv, d], wk, turned),
        ("self_attn.v_proj", [kv, d], wv, own),
        ("self_attn.o_proj", [d, d], wo, own),
        ("mlp.gate_proj", [f, d], w1, own),
        ("mlp.down_proj", [d, f], w2, own),
        ("mlp.up_proj", [f, d], w3, own),
        ("input_layernorm", [1, d], ln_1, own),
        ("post_attention_layernorm", [1, d], ln_2, own),
    ];
    for untied in [false, true] {
        let mut header = HEADER;
        header[5] = if untied { -264 } else { 264 };
        let lab = Lab::new();
        let weights = Checkpoint::open(&lab.convert(header)).unwrap();
        let check = |name: &str, [rows, cols]: [usize; 2], begin: usize, row: Row| {
            let shape = weights.info(name).unwrap_or_else(|| panic!("no {name}")).shape;
            assert_eq!(shape.iter().product::<usize>(), rows * cols, "{name}");
            let found = weights.tensor(name, &shape, &Device::Cpu).unwrap().to_vec::<f32>().unwrap();
            for (i, x) in found.into_iter().enumerate() {
                assert_eq!(x as usize, begin + row(i / cols) * cols + i % cols, "{name}[{i}]");
            }
        };
        for layer in 0..2 {
            for (module, shape, begin, row) in tensors {
                let begin = begin + layer * shape[0] * shape[1];
                check(&format!("model.layers.{layer}.{module}.weight"), shape, begin, row);
            }
        }
        check("model.embed_tokens.weight", [vocab, d], 0, own);
        check("model.norm.weight", [1, d], norm, own);
        match untied {
            true => check("lm_head.weight", [vocab, d], classifier, own),
            false => assert!(weights.info("lm_head.weight").is_none()),
        }
    }
}

#[test]
fn the_vocabulary_joins_by_score() {
    let lab = Lab::new();
    let folder = lab.convert(HEADER);
    let tokenizer = Tokenizer::from_dir(&folder).unwrap();
    let [ab, space_a, space, a, b] = [259, 260, 261, 262, 263];
    for (text, ids) in [
        ("", &[][..]),
        ("a", &[space_a]),
        ("ab", &[space, ab]),
        ("ba ab", &[space, b, a, space, ab]),
        (" a", &[space, space_a]),
        ("aé\n", &[space_a, 3 + 0xC3, 3 + 0xA9, 3 + 0x0A]),
    ] {
        assert_eq!(tokenizer.encode(text).unwrap(), ids, "{text:?}");
        assert_eq!(tokenizer.decode(ids, true).unwrap(), text, "{text:?}");
    }
    // In two parts, the second of which does not lose its space; and token by token, over many bytes in a row.
    for text in ["a\n🙂 ab a", "\n🙂\n\né", &" ab a".repeat(30), &"🙂é\n".repeat(30), &format!("a{}a", "\n".repeat(99))]
    {
        let ids = tokenizer.encode(text).unwrap();
        for at in 0..ids.len().min(40) {
            let (before, after) = ids.split_at(at);
            let mut stream = tokenizer.decode_stream(before, true).unwrap();
            let mut streamed: String = after.iter().map(|&id| stream.push(id).unwrap()).collect();
            streamed += &stream.finish().unwrap();
            let before =
                (tokenizer.decode(before, true).unwrap(), tokenizer.decode_after(before, after, true).unwrap());
            let begins = before.0.trim_end_matches('\u{fffd}');
            assert_eq!((begins.to_owned() + &before.1, streamed), (text.to_owned(), before.1), "{text:?} at {at}");
        }
    }
    assert_eq!((tokenizer.begin_of_text(), tokenizer.end_of_text().unwrap()), (Some(1), 1));
    let config = folder.join("tokenizer_config.json");
    let mut json: serde_json::Value = serde_json::from_str(&fs::read_to_string(&config).unwrap()).unwrap();
    for (says, begin) in [(Some(false), None), (Some(true), Some(2)), (None, Some(1))] {
        json["bos_token"] = "</s>".into();
        json["add_bos_token"] = says.into();
        fs::write(&config, json.to_string()).unwrap();
        assert_eq!(Tokenizer::from_dir(&folder).unwrap().begin_of_text(), begin, "{says:?}");
    }
}

#[test]
fn damaged_weights_are_refused() {
    let lab = Lab::new();
    let whole = model(HEADER);
    let with = |field: usize, n: i32| {
        let mut bytes = whole.clone();
        bytes[4 * field..4 * field + 4].copy_from_slice(&n.to_le_bytes());
        bytes
    };
    let longer = [&whole[..], &[0]].concat();
    for (bytes, parts) in [
        (whole[..0].to_vec(), &["too short"][..]),
        (whole[..27].to_vec(), &["too short", "28 bytes"]),
        (whole[..28].to_vec(), &["28 bytes, but its header asks for", "cut off"]),
        (whole[..whole.len() - 1].to_vec(), &["cut off"]),
        (longer, &["what follows belongs to something else"]),
        (with(0, 0x616b_3432), &["only version 0", "--version 0"]),
        (with(0, 0), &["dim = 0", "llama2.c"]),
        (with(0, -8), &["dim = -8"]),
        (with(1, 0), &["hidden_dim = 0"]),
        (with(2, 0), &["n_layers = 0"]),
        (with(2, 5000), &["num_hidden_layers", "out of range"]),
        (with(2, 3), &["cut off"]),
        (with(3, 3), &["n_heads = 3", "does not divide dim = 8"]),
        (with(3, 8), &["head_dim", "odd"]),
        (with(4, 2), &["cut off"]),
        (with(4, 3), &["num_key_value_heads", "3 heads of keys"]),
        (with(5, 0), &["vocab_size = 0"]),
        (with(5, i32::MIN), &["vocab_size", "out of range"]),
        (with(5, -264), &["cut off"]),
        (with(6, -5), &["seq_len = -5"]),
        (with(6, i32::MAX), &["max_position_embeddings", "out of range"]),
    ] {
        let path = lab.write("bad.bin", &bytes);
        refused(Llama2c::open(&path).unwrap_err(), &path, parts);
    }
    let missing = lab.dir.path().join("missing.bin");
    refused(Llama2c::open(&missing).unwrap_err(), &missing, &["could not read"]);
}

#[test]
fn damaged_vocabularies_are_refused() {
    let lab = Lab::new();
    let whole = vocabulary(&PIECES);
    let with = |at: usize, byte: u8| {
        let mut bytes = whole.clone();
        bytes[at] = byte;
        bytes
    };
    let last = whole.len() - 1;
    for (bytes, size, parts) in [
        (whole[..3].to_vec(), 264, &["ends within the length of its longest piece"][..]),
        (whole[..last].to_vec(), 264, &["ends within token 263", "264"]),
        (whole[..last - 5].to_vec(), 264, &["ends within token 263"]),
        (whole.clone(), 265, &["ends within token 264"]),
        (whole.clone(), 263, &["9 bytes follow", "another model"]),
        (with(0, 3), 264, &["token 0", "length 5"]),
        (with(11, 0xff), 264, &["token 0", "length -", "llama2.c"]),
        (with(12, b'!'), 264, &["token 0", "!unk>", "<unk>"]),
        (with(last, 0xff), 264, &["token 263", "not UTF-8"]),
        (with(last, b'a'), 264, &["token 263", "\"a\"", "token 262"]),
        (vocabulary(&[]), 250, &["250 tokens are too few", "259"]),
        (vocabulary(&[("", 0.0)]), 260, &["token 259", "empty"]),
        (vocabulary(&[("x", f32::NAN)]), 260, &["token 259", "NaN"]),
    ] {
        let path = lab.write("bad.bin", &bytes);
        refused(Vocabulary::open(&path, size).unwrap_err(), &path, parts);
    }
}

#[track_caller]
fn refused(e: Error, path: &Path, parts: &[&str]) {
    let text = e.to_string();
    assert!(text.contains(&path.display().to_string()) && text.len() < 300, "{text}");
    for part in parts {
        assert!(text.contains(part), "{text} lacks {part:?}");
    }
}

/// The folder `stories260k` in the folder of test data that `LORA_DATA` names, or else in `shared/data` beside the
/// workspace.
fn stories() -> Option<PathBuf> {
    let data = std::env::var_os("LORA_DATA")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data"), PathBuf::from);
    let folder = data.join("stories260k");
    if folder.join("stories260K.bin").is_file() {
        return Some(folder);
    }
    eprintln!("skipped: no {}; set LORA_DATA to a folder with stories260k", folder.display());
    None
}

/// A model that others trained gives the text that its authors publish, which `run -t 0.0` makes in 256 positions.
#[test]
fn stories260k_tells_its_story() {
    let Some(folder) = stories() else { return };
    let about = fs::read_to_string(folder.join("stories260K.md")).unwrap();
    let (_, story) = about.split_once("tok512.bin -t 0.0\n").unwrap();
    let (story, _) = story.split_once("\n```").unwrap();

    let lab = Lab::new();
    let out = lab.dir.path().join("out");
    let weights = Llama2c::open(&folder.join("stories260K.bin")).unwrap();
    let vocabulary = Vocabulary::open(&folder.join("tok512.bin"), 512).unwrap();
    convert::write(&weights, &vocabulary, &out).unwrap();
    let (model, tokenizer) = (load(&out, &Device::Cpu).unwrap(), Tokenizer::from_dir(&out).unwrap());
    let bos = tokenizer.begin_of_text().unwrap();
    let adapted = Adapted::none(&Device::Cpu).unwrap();
    let tell = |prompt: &str, max_new_tokens: usize| {
        let prompt: Vec<u32> = [bos].into_iter().chain(tokenizer.encode(prompt).unwrap()).collect();
        let end = tokenizer.end_of_text().unwrap();
        let config = GenerationConfig { max_new_tokens, eos_token_id: vec![end], ..GenerationConfig::default() };
        let told = generate(&*model, &adapted, std::slice::from_ref(&prompt), &config, None).unwrap();
        tokenizer.decode_after(&prompt, &told[0].tokens, true).unwrap()
    };
    assert_eq!(tell("", 256), story);
    let begin = "Once upon a time, there was";
    assert_eq!(begin.to_owned() + &tell(begin, 256 - tokenizer.encode(begin).unwrap().len()), story);

    // What llama2.c's `encode` gives.
    for (text, ids) in [
        (
            "Once upon a time, there was a little girl named Lily.",
            &[403, 407, 261, 378, 432, 383, 286, 261, 376, 298, 315, 421, 395, 317, 426][..],
        ),
        ("  a  b", &[410, 410, 261, 410, 268]),
        ("\n\nx\ty", &[410, 13, 13, 444, 12, 422]),
        ("🙂 né … “q”", &[410, 243, 162, 156, 133, 297, 485, 410, 486, 410, 465, 456, 466]),
        ("aaaaaaa lllllll", &[261, 412, 412, 412, 412, 412, 412, 278, 306, 306, 306]),
        ("there's naïve—dash", &[383, 439, 419, 297, 412, 198, 178, 360, 481, 418, 412, 419, 415]),
    ] {
        assert_eq!(tokenizer.encode(text).unwrap(), ids, "{text:?}");
    }
}
