//! Texts between the tokens that an encoder wants around them.

use std::{fs, path::Path};

use lora_model::tokenizer::{Joined, Tokenizer};
use serde_json::{Value, json};

/// Words by their letters: a to z are 10 to 35.
fn write(dir: &Path, specials: [&str; 2], post_processor: Value, config: Option<Value>) {
    let letters = ('a'..='z').enumerate().map(|(i, c)| (c.to_string(), json!(10 + i)));
    let specials = specials.into_iter().enumerate().map(|(i, s)| (s.to_owned(), json!(i + 1)));
    let mut vocab: serde_json::Map<String, Value> = letters.chain(specials).collect();
    vocab.insert("?".into(), json!(0));
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "Whitespace"}, "decoder": null, "post_processor": post_processor,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "?"},
    });
    fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    if let Some(config) = config {
        fs::write(dir.join("tokenizer_config.json"), config.to_string()).unwrap();
    }
}

fn template(second: u32) -> Value {
    let special = |id: &str, segment: u32| json!({"SpecialToken": {"id": id, "type_id": segment}});
    let text = |id: &str, segment: u32| json!({"Sequence": {"id": id, "type_id": segment}});
    let token = |name: &str, id: u32| json!({"id": name, "ids": [id], "tokens": [name]});
    json!({
        "type": "TemplateProcessing",
        "single": [special("[CLS]", 0), text("A", 0), special("[SEP]", 0)],
        "pair": [special("[CLS]", 0), text("A", 0), special("[SEP]", 0), text("B", second), special("[SEP]", second)],
        "special_tokens": {"[CLS]": token("[CLS]", 1), "[SEP]": token("[SEP]", 2)},
    })
}

#[test]
fn texts_and_pairs() {
    let bert = ["[CLS]", "[SEP]"];
    let roberta = ["<s>", "</s>"];
    let processed = json!({"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1], "trim_offsets": true, "add_prefix_space": false});
    let named = json!({"cls_token": "<s>", "sep_token": {"content": "</s>"}});
    // By the post-processor, by the configuration, by the vocabulary: the same.
    for (what, specials, post_processor, config, separators) in [
        ("template", bert, template(1), None, 1),
        ("known tokens", bert, Value::Null, None, 1),
        ("RoBERTa", roberta, processed, None, 2),
        ("named tokens", roberta, Value::Null, Some(named), 2),
    ] {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), specials, post_processor, config);
        let joiner = Tokenizer::from_dir(dir.path()).unwrap().joiner(dir.path()).unwrap();
        assert_eq!((joiner.around(false), joiner.around(true)), (2, 2 + separators), "{what}");
        let pair = |a: &[u32], b: &[u32], cut| {
            let mut ids = [&[1], a, &vec![2; separators]].concat();
            let second_from = ids.len();
            ids.extend([b, &[2]].concat());
            let second_from = if separators == 1 { second_from } else { ids.len() };
            Joined { ids, second_from, cut }
        };
        let single = |a: &[u32], cut| Joined { second_from: a.len() + 2, ids: [&[1], a, &[2]].concat(), cut };
        let around = joiner.around(true);
        for (text, second, max_length, expected) in [
            ("a b", None, 99, single(&[10, 11], false)),
            ("a b c", None, 4, single(&[10, 11], true)),
            ("", None, 9, single(&[], false)),
            ("a b", Some("c"), 99, pair(&[10, 11], &[12], false)),
            ("a b", Some("c"), around + 3, pair(&[10, 11], &[12], false)),
            ("a b c d e", Some("x y"), around + 4, pair(&[10, 11], &[33, 34], true)),
            ("x y", Some("a b c d e"), around + 5, pair(&[33, 34], &[10, 11, 12], true)),
            // The first is the shorter one where both lose something, as in Transformers.
            ("a b c d", Some("v w x y z"), around + 5, pair(&[10, 11], &[31, 32, 33], true)),
            ("a b", Some(""), 99, pair(&[10, 11], &[], false)),
        ] {
            assert_eq!(joiner.join(text, second, max_length).unwrap(), expected, "{what}: {text:?}, {second:?}");
        }
        let error = joiner.join("a", Some("b"), around + 1).unwrap_err().to_string();
        assert!(error.contains("no room for text") && error.contains("tokenizer.json"), "{what}: {error}");
    }
}

#[test]
fn what_joins_no_texts() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), ["begin", "end"], Value::Null, Some(json!({"cls_token": "begin", "sep_token": "other"})));
    let error = Tokenizer::from_dir(dir.path()).unwrap().joiner(dir.path()).unwrap_err().to_string();
    assert!(error.contains("\"cls_token\" and \"sep_token\"") && error.contains("[CLS]"), "{error}");

    // A third kind of segment.
    write(dir.path(), ["[CLS]", "[SEP]"], template(2), None);
    let joiner = Tokenizer::from_dir(dir.path()).unwrap().joiner(dir.path()).unwrap();
    assert!(joiner.join("a", Some("b"), 9).unwrap_err().to_string().contains("segments"));
}
