//! Tokenizer files read, trained and written; every damaged one refused by name. `golden/tokenizer.py` wrote what GPT-2's
//! own tokenizer makes of the texts here; the tokenizer itself is needed to compare with it.

use std::{
    fs,
    path::{Path, PathBuf},
};

use lora_model::tokenizer::{END_OF_TEXT, Tokenizer};

/// Texts that go wrong easily: spaces at both ends, runs of newlines, contractions, many-byte and combining characters,
/// emoji of several code points, control characters, special tokens inside a text, and what is no word in any language.
const TRICKY: [&str; 17] = [
    "",
    " ",
    "   leading and trailing   ",
    "Hello, world! It's 2024; we'll see, they've been, I'M, you'D.",
    "tabs\tand\nnewlines\n\n\nand\r\nreturns\n",
    "\n\n  \n x",
    "naïve café, Ærøskøbing, ЖЁЛТЫЙ, ελληνικά",
    "日本語のテキスト 한국어 中文",
    "عربى עברית हिन्दी",
    "🙂 👩‍👩‍👧‍👦 🇩🇪 👍🏽",
    "e\u{301} vs \u{e9}; \u{200b}zero\u{a0}width\u{feff}",
    "name[The Eagle], eatType[coffee shop], priceRange[£20-25]",
    "1234567890 3.14159 1e-5 0xFF",
    "a<|endoftext|>b <|endoftext|>",
    "<|endoftext",
    "\u{0}\u{1}\u{7f}\u{fffd}",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
];

/// Names and contents of a folder's files.
type Files<'a> = &'a [(&'a str, &'a str)];

/// GPT-2's own tokenizer (`tokenizer.json`, `vocab.json`, `merges.txt`): the folder `gpt2-tokenizer` in the folder of test
/// data that `LORA_DATA` names, or else in `shared/data` beside the workspace.
fn gpt2_folder() -> Option<PathBuf> {
    let data = std::env::var_os("LORA_DATA")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data"), PathBuf::from);
    let folder = data.join("gpt2-tokenizer");
    if folder.join("tokenizer.json").is_file() {
        return Some(folder);
    }
    eprintln!("skipped: no {}; set LORA_DATA to a folder with gpt2-tokenizer", folder.display());
    None
}

/// A folder with `vocab.json` and `merges.txt` alone, out of the `tokenizer.json` in `folder`.
fn as_two_files(folder: &Path) -> tempfile::TempDir {
    let file: serde_json::Value = serde_json::from_slice(&fs::read(folder.join("tokenizer.json")).unwrap()).unwrap();
    let merges = file["model"]["merges"].as_array().unwrap().iter().map(|merge| match merge {
        serde_json::Value::String(line) => format!("{line}\n"),
        pair => format!("{} {}\n", pair[0].as_str().unwrap(), pair[1].as_str().unwrap()),
    });
    let two = tempfile::tempdir().unwrap();
    fs::write(two.path().join("vocab.json"), file["model"]["vocab"].to_string()).unwrap();
    fs::write(two.path().join("merges.txt"), format!("#version: 0.2\n{}", merges.collect::<String>())).unwrap();
    two
}

fn trained(vocab_size: usize) -> Tokenizer {
    let texts = (0..200).map(|i| format!("{} the name of the {i}th place, says it's nice\n", TRICKY[i % TRICKY.len()]));
    Tokenizer::train_bpe(texts, vocab_size).unwrap()
}

fn streamed(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let mut stream = tokenizer.decode_stream(&[], false).unwrap();
    let mut text = String::new();
    for &id in ids {
        let piece = stream.push(id).unwrap();
        assert!(!piece.contains('\u{fffd}') || tokenizer.decode(ids, false).unwrap().contains('\u{fffd}'));
        text += &piece;
    }
    text + &stream.finish().unwrap()
}

#[test]
fn gpt2_from_one_file_and_from_two_is_the_same_tokenizer() {
    let Some(folder) = gpt2_folder() else { return };
    let json = Tokenizer::from_dir(&folder).unwrap();
    let two = tempfile::tempdir().unwrap();
    for name in ["vocab.json", "merges.txt"] {
        fs::copy(folder.join(name), two.path().join(name)).unwrap();
    }
    let pair = Tokenizer::from_dir(two.path()).unwrap();
    for t in [&json, &pair] {
        assert_eq!(t.vocab_size(), 50257);
        assert_eq!(t.end_of_text().unwrap(), 50256);
        assert_eq!(t.token_id("Ġthe"), Some(262));
        // Radford et al.'s encoder gives these.
        assert_eq!(t.encode("Hello world").unwrap(), [15496, 995]);
        assert_eq!(t.encode(" It's 🙂\n\nx").unwrap(), [632, 338, 32485, 198, 198, 87]);
        assert_eq!(t.encode("a<|endoftext|>b").unwrap(), [64, 50256, 65]);
        assert_eq!(t.decode(&[64, 50256, 65], true).unwrap(), "ab");
    }
    for Golden { text, ids } in golden() {
        for t in [&json, &pair] {
            assert_eq!(t.encode(&text).unwrap(), ids, "{text:?}");
            assert_eq!(t.decode(&ids, false).unwrap(), text);
            assert_eq!(streamed(t, &ids), text);
        }
    }
}

/// A text and its tokens by GPT-2's own tokenizer.
#[derive(serde::Deserialize)]
struct Golden {
    text: String,
    ids: Vec<u32>,
}

fn golden() -> Vec<Golden> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tokenizer.json");
    let golden: Vec<Golden> = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    assert!(golden.iter().map(|g| g.text.as_str()).eq(TRICKY), "golden/tokenizer.json has other texts");
    golden
}

#[test]
fn one_file_and_two_are_the_same_tokenizer() {
    // Its ids can be told beforehand: the end of a text, the bytes, then merges of the most frequent pair first.
    let small = Tokenizer::train_bpe(["lo\nlow low low low"].into_iter(), 259).unwrap();
    for (token, id) in [(END_OF_TEXT, 0), ("!", 1), ("lo", 257), ("low", 258)] {
        assert_eq!(small.token_id(token), Some(id), "{token}");
    }
    let dir = tempfile::tempdir().unwrap();
    for vocab_size in [257, 300, 400] {
        trained(vocab_size).save(dir.path()).unwrap();
        let json = Tokenizer::from_dir(dir.path()).unwrap();
        let two = as_two_files(dir.path());
        let pair = Tokenizer::from_dir(two.path()).unwrap();
        assert_eq!((pair.vocab_size(), pair.end_of_text().unwrap()), (vocab_size, json.end_of_text().unwrap()));
        for Golden { text, ids: gpt2 } in golden() {
            let ids = json.encode(&text).unwrap();
            assert_eq!(pair.encode(&text).unwrap(), ids, "{text:?}");
            assert_eq!(pair.decode(&ids, false).unwrap(), text);
            assert_eq!(streamed(&pair, &ids), text);
            // Special tokens are where GPT-2 has them, whatever the rest is cut into.
            let ends = |ids: &[u32], end| ids.iter().filter(|&&id| id == end).count();
            assert_eq!(ends(&ids, 0), ends(&gpt2, 50256), "{text:?}");
        }
    }
}

#[test]
fn a_trained_tokenizer_is_the_same_every_time_and_gives_every_text_back() {
    let a = trained(400);
    assert_eq!(a.vocab_size(), 400);
    let dir = tempfile::tempdir().unwrap();
    a.save(dir.path()).unwrap();
    let saved = fs::read(dir.path().join("tokenizer.json")).unwrap();
    for _ in 0..3 {
        let again = tempfile::tempdir().unwrap();
        trained(400).save(again.path()).unwrap();
        assert!(fs::read(again.path().join("tokenizer.json")).unwrap() == saved);
    }
    let back = Tokenizer::from_dir(dir.path()).unwrap();
    assert_eq!(back.end_of_text().unwrap(), a.end_of_text().unwrap());
    assert_eq!(back.vocab_size(), 400);
    for text in TRICKY {
        let ids = a.encode(text).unwrap();
        assert_eq!(back.encode(text).unwrap(), ids, "{text:?}");
        assert_eq!(a.decode(&ids, false).unwrap(), text);
        assert_eq!(streamed(&a, &ids), text);
    }
    // It has learnt something, and byte pairs of nothing but the given texts.
    assert!(a.encode(" the name of the").unwrap().len() <= 4);
}

#[test]
fn a_long_text_and_its_lines_learn_and_encode_alike() {
    let lines: Vec<String> = (0..20_000).map(|i| format!("{i} {}\n", TRICKY[i % 13])).collect();
    let text = lines.concat();
    assert!(text.len() > 10 << 16);
    let whole = Tokenizer::train_bpe([&text].into_iter(), 500).unwrap();
    let halves = Tokenizer::train_bpe([&text].into_iter(), 500).unwrap();
    let ids = whole.encode(&text).unwrap();
    assert_eq!(ids, halves.encode(&text).unwrap());
    assert_eq!(whole.decode(&ids, false).unwrap(), text);
    let texts: Vec<&str> = lines.iter().map(String::as_str).collect();
    let each = whole.encode_all(&texts).unwrap();
    assert!(lines.iter().zip(&each).all(|(line, ids)| whole.encode(line).unwrap() == *ids));
}

#[test]
fn a_stream_gives_whole_characters_only() {
    let bytes = Tokenizer::train_bpe(["x"].into_iter(), 257).unwrap();
    let ids = bytes.encode("a🙂é").unwrap();
    assert_eq!(ids.len(), 7);
    let mut stream = bytes.decode_stream(&[], true).unwrap();
    let pieces: Vec<String> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
    assert_eq!(pieces, ["a", "", "", "", "🙂", "", "é"]);
    assert_eq!(stream.finish().unwrap(), "");
    // Bytes that never become a character are given out as such, and do not hold the stream back for good.
    let (start, end) = (ids[1], bytes.end_of_text().unwrap());
    let mut text = String::new();
    for id in [start, start, start, end, start, start, ids[0], end] {
        text += &stream.push(id).unwrap();
    }
    assert!(text.ends_with('a') && text.starts_with('\u{fffd}'), "{text:?}");
    assert_eq!(stream.push(start).unwrap(), "");
    assert_eq!(stream.finish().unwrap(), "\u{fffd}");
    assert_eq!(stream.push(257).unwrap(), "");
}

#[test]
fn bad_requests_are_refused() {
    let t = trained(300);
    for (result, wanted) in [
        (Tokenizer::train_bpe(["a"].into_iter(), 256).map(drop), "257"),
        (Tokenizer::train_bpe(["a"].into_iter(), 0).map(drop), "too small"),
        (Tokenizer::train_bpe(std::iter::empty::<&str>(), 300).map(drop), "no text"),
        (Tokenizer::train_bpe(["", ""].into_iter(), 300).map(drop), "no text"),
    ] {
        let text = result.unwrap_err().to_string();
        assert!(text.contains(wanted), "{text}");
    }
    assert_eq!(Tokenizer::train_bpe(["ab ab"].into_iter(), 5000).unwrap().vocab_size(), 258);
    // A model may have rows for more ids, which have no text.
    assert_eq!(t.decode(&[70, 300, 71, u32::MAX], false).unwrap(), t.decode(&[70, 71], false).unwrap());
}

#[test]
fn damaged_tokenizers_are_refused_by_name() {
    let merges = ("merges.txt", "#version: 0.2\na b\n");
    let vocab = ("vocab.json", r#"{"a": 0, "b": 1, "ab": 2}"#);
    let bpe = |model: &str| format!(r#"{{"version": "1.0", "added_tokens": [], "model": {model}}}"#);
    let cases: [(Files, &[&str]); 18] = [
        (
            &[vocab, merges, ("tokenizer_config.json", r#"{"tokenizer_class": "Qwen2Tokenizer"}"#)],
            &["Qwen2Tokenizer", "tokenizer.json"],
        ),
        (&[vocab, merges, ("config.json", r#"{"model_type": "llama"}"#)], &["llama", "tokenizer.json"]),
        (&[], &["no tokenizer here", "tokenizer.json", "merges.txt"]),
        (&[vocab], &["no tokenizer here"]),
        (&[("tokenizer.json", "")], &["tokenizer.json"]),
        (&[("tokenizer.json", "{\"model\": ")], &["tokenizer.json"]),
        (&[("tokenizer.json", "[]")], &["tokenizer.json"]),
        (&[("tokenizer.json", &bpe("{}"))], &["tokenizer.json"]),
        (
            &[("tokenizer.json", &bpe(r#"{"type": "BPE", "vocab": {"a": 0, "ab": 1}, "merges": ["a b"]}"#))],
            &["tokenizer.json", "not a tokenizer file"],
        ),
        (
            &[(
                "tokenizer.json",
                &bpe(r#"{"type": "BPE", "continuing_subword_prefix": "@@@@",
                         "vocab": {"a": 0, "é": 1, "aé": 2}, "merges": ["a é"]}"#),
            )],
            &["tokenizer.json", "prefix"],
        ),
        (&[("vocab.json", "{}"), merges], &["vocab.json", "empty"]),
        (&[("vocab.json", r#"{"a": -1}"#), merges], &["vocab.json", "\"a\"", "-1"]),
        (&[("vocab.json", r#"{"a": 0, "b": 0}"#), merges], &["vocab.json", "id 0", "\"b\""]),
        (&[("vocab.json", "[1]"), merges], &["vocab.json", "JSON object"]),
        (&[vocab, ("merges.txt", "#version: 0.2\na b c\n")], &["merges.txt", "line 2"]),
        (&[vocab, ("merges.txt", "a b\na c\n")], &["merges.txt", "line 2", "\"c\""]),
        (&[vocab, ("merges.txt", "b a\n")], &["merges.txt", "line 1", "\"ba\""]),
        (&[vocab, merges, ("added_tokens.json", r#"{"<x>": 9}"#)], &["added_tokens.json", "<x>", "9"]),
    ];
    for (files, wanted) in cases {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(dir.path().join(name), text).unwrap();
        }
        let text = Tokenizer::from_dir(dir.path()).expect_err(&format!("{files:?}")).to_string();
        for part in wanted {
            assert!(text.contains(part), "{files:?}: {text} lacks {part:?}");
        }
    }
}

/// Parts over which the library panics: when a file is read, a text encoded, tokens decoded.
#[test]
fn parts_that_make_no_sense_are_refused_by_name() {
    use serde_json::{Value, json};
    for (key, part) in [
        ("normalizer", json!({"type": "Precompiled", "precompiled_charsmap": ""})),
        ("normalizer", json!({"type": "Prepend", "prepend": ""})),
        ("pre_tokenizer", json!({"type": "FixedLength", "length": 0})),
        ("decoder", json!({"type": "Strip", "content": "H", "start": 0, "stop": 99})),
    ] {
        let dir = tempfile::tempdir().unwrap();
        trained(300).save(dir.path()).unwrap();
        let path = dir.path().join("tokenizer.json");
        let mut file: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        file[key] = part.clone();
        fs::write(&path, file.to_string()).unwrap();
        let used = |t: Tokenizer| {
            ["Hello wörld 12  x", "H"].into_iter().try_for_each(|text| t.decode(&t.encode(text)?, false).map(drop))
        };
        let error = Tokenizer::from_dir(dir.path()).and_then(used).expect_err(&part.to_string()).to_string();
        assert!(error.contains("tokenizer.json"), "{part}: {error}");
    }
}

#[test]
fn the_end_of_a_text_is_found_where_it_is_told() {
    let vocab = ("vocab.json", r#"{"a": 0, "b": 1, "ab": 2}"#);
    let merges = ("merges.txt", "a b\n");
    let cases: [(Files, Option<u32>); 9] = [
        (&[("tokenizer_config.json", r#"{"tokenizer_class": "GPT2TokenizerFast", "eos_token": "b"}"#)], Some(1)),
        (&[], None),
        (&[("tokenizer_config.json", r#"{"eos_token": "b"}"#)], Some(1)),
        (&[("tokenizer_config.json", r#"{"eos_token": {"content": "ab"}}"#)], Some(2)),
        (&[("tokenizer_config.json", r#"{"eos_token": "z"}"#)], None),
        (&[("config.json", r#"{"eos_token_id": 2}"#)], Some(2)),
        (&[("config.json", r#"{"eos_token_id": [1, 2]}"#)], Some(1)),
        (&[("config.json", r#"{"eos_token_id": 3}"#)], None),
        (&[("added_tokens.json", r#"{"<|endoftext|>": 3}"#), ("config.json", r#"{"eos_token_id": 2}"#)], Some(3)),
    ];
    for (files, wanted) in cases {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files.iter().chain([&vocab, &merges]) {
            fs::write(dir.path().join(name), text).unwrap();
        }
        let t = Tokenizer::from_dir(dir.path()).unwrap();
        match wanted {
            Some(id) => assert_eq!(t.end_of_text().unwrap(), id, "{files:?}"),
            None => assert!(t.end_of_text().unwrap_err().to_string().contains(END_OF_TEXT), "{files:?}"),
        }
    }
}

#[test]
fn truncation_and_padding_of_the_file_are_ignored() {
    let dir = tempfile::tempdir().unwrap();
    let t = trained(300);
    t.save(dir.path()).unwrap();
    let path = dir.path().join("tokenizer.json");
    let mut file: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    // The second is impossible.
    for (max_length, stride) in [(3, 0), (1, 5)] {
        file["truncation"] = serde_json::json!({
            "direction": "Right", "max_length": max_length, "strategy": "LongestFirst", "stride": stride
        });
        fs::write(&path, file.to_string()).unwrap();
        let text = "a text of far more than three tokens";
        assert_eq!(Tokenizer::from_dir(dir.path()).unwrap().encode(text).unwrap(), t.encode(text).unwrap());
    }
}

#[test]
fn all_files_of_a_tokenizer_are_copied() {
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    trained(300).save(from.path()).unwrap();
    fs::write(from.path().join("generation_config.json"), "{}").unwrap();
    fs::write(from.path().join("model.safetensors"), "not a tokenizer").unwrap();
    Tokenizer::copy_files(from.path(), to.path()).unwrap();
    let mut names: Vec<_> =
        fs::read_dir(to.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]);
}
