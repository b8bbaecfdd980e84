//! `config.json`: what is read, what is written back, and what is refused with which words.

mod bert;
mod deberta_v2;
mod llama;

use std::{fs, path::Path};

use lora_kernels::Activation;
use lora_model::{
    Error,
    config::{Gpt2Config, RawConfig},
};
use serde_json::{Value, json};

fn parse(keys: Value) -> Result<Gpt2Config, Error> {
    let Value::Object(keys) = keys else { panic!("an object") };
    Gpt2Config::from_raw(&RawConfig::new(Path::new("folder/config.json"), keys))
}

#[test]
fn every_published_size_has_its_parameter_count() {
    for (config, count) in [
        (Gpt2Config::small(), 124_439_808),
        (Gpt2Config::medium(), 354_823_168),
        (Gpt2Config::large(), 774_030_080),
        (Gpt2Config::xl(), 1_557_611_200),
    ] {
        assert_eq!(config.parameters(), count);
        assert_eq!(config.head_dim(), 64);
        config.validate(Path::new("preset")).unwrap();
    }
    let untied = Gpt2Config { tie_word_embeddings: false, ..Gpt2Config::small() };
    assert_eq!(untied.parameters(), 124_439_808 + 50257 * 768);
}

#[test]
fn absent_keys_take_the_defaults_and_written_ones_come_back() {
    assert_eq!(parse(json!({"model_type": "gpt2"})).unwrap(), Gpt2Config::small());
    let made = Gpt2Config {
        vocab_size: 300,
        n_positions: 32,
        n_embd: 48,
        n_layer: 2,
        n_head: 4,
        n_inner: Some(100),
        activation_function: Activation::Relu,
        resid_pdrop: 0.0,
        embd_pdrop: 0.25,
        attn_pdrop: 0.5,
        layer_norm_epsilon: 1e-6,
        tie_word_embeddings: false,
        scale_attn_weights: false,
        scale_attn_by_inverse_layer_idx: true,
        bos_token_id: None,
        eos_token_id: Some(0),
    };
    assert_eq!(parse(Value::Object(made.to_json())).unwrap(), made);
    assert_eq!(made.to_json()["architectures"], json!(["GPT2LMHeadModel"]));
}

#[test]
fn other_names_of_the_same_keys_are_understood() {
    for (keys, read) in [
        (json!({"n_ctx": 77}), Gpt2Config { n_positions: 77, ..Gpt2Config::small() }),
        (json!({"n_ctx": 77, "n_positions": 88}), Gpt2Config { n_positions: 88, ..Gpt2Config::small() }),
        (
            json!({"hidden_size": 144, "num_hidden_layers": 3}),
            Gpt2Config { n_embd: 144, n_layer: 3, ..Gpt2Config::small() },
        ),
        (json!({"activation_function": "gelu_pytorch_tanh"}), Gpt2Config::small()),
        (
            json!({"activation_function": "swish"}),
            Gpt2Config { activation_function: Activation::Silu, ..Gpt2Config::small() },
        ),
        (
            json!({"activation_function": "gelu"}),
            Gpt2Config { activation_function: Activation::GeluErf, ..Gpt2Config::small() },
        ),
        (json!({"n_inner": null, "eos_token_id": [7, 8]}), Gpt2Config { eos_token_id: Some(7), ..Gpt2Config::small() }),
        (json!({"eos_token_id": null}), Gpt2Config { eos_token_id: None, ..Gpt2Config::small() }),
    ] {
        let mut keys = keys;
        keys["model_type"] = json!("gpt2");
        assert_eq!(parse(keys.clone()).unwrap(), read, "{keys}");
    }
}

#[test]
fn impossible_values_are_refused_with_file_and_key() {
    let cases = [
        (json!({"n_head": 7}), &["n_head", "7 heads do not divide n_embd = 768"][..]),
        (json!({"n_head": "12"}), &["n_head", "expected a whole number", "\"12\""]),
        (json!({"n_head": 0}), &["n_head", "from 1 to"]),
        (json!({"n_layer": 0}), &["n_layer"]),
        (json!({"n_layer": -3}), &["n_layer", "-3"]),
        (json!({"n_layer": 2.5}), &["n_layer", "2.5"]),
        (json!({"n_layer": 1u64 << 60}), &["n_layer", "from 1 to"]),
        (json!({"n_embd": u64::MAX}), &["n_embd"]),
        (json!({"n_embd": 1 << 20, "n_head": 1, "n_layer": 4096}), &["parameters"]),
        (json!({"n_inner": 0}), &["n_inner"]),
        (json!({"vocab_size": 0}), &["vocab_size"]),
        (json!({"vocab_size": [1]}), &["vocab_size", "[1]"]),
        (json!({"n_positions": 0}), &["n_positions"]),
        (json!({"resid_pdrop": 1.0}), &["resid_pdrop", "below 1"]),
        (json!({"attn_pdrop": -0.1}), &["attn_pdrop", "-0.1"]),
        (json!({"embd_pdrop": "none"}), &["embd_pdrop", "a finite number"]),
        (json!({"layer_norm_epsilon": 0}), &["layer_norm_epsilon"]),
        (json!({"layer_norm_epsilon": 1e300}), &["layer_norm_epsilon"]),
        (json!({"tie_word_embeddings": "yes"}), &["tie_word_embeddings", "true or false"]),
        (json!({"activation_function": "mish"}), &["mish", "gelu_new", "relu", "silu"]),
        (json!({"activation_function": 3}), &["activation_function", "a string"]),
        (json!({"eos_token_id": -1}), &["eos_token_id"]),
        (json!({"eos_token_id": []}), &["eos_token_id"]),
        (json!({"bos_token_id": 1u64 << 40}), &["bos_token_id"]),
        (json!({"add_cross_attention": true}), &["cross-attention"]),
        (json!({"quantization_config": {"bits": 4}}), &["quantization_config"]),
        (json!({"model_type": "mamba"}), &["architecture", "mamba", "gpt2"]),
        (json!({"model_type": null}), &["model_type", "missing"]),
        (json!({"model_type": ["x".repeat(500)]}), &["model_type", "..."]),
    ];
    for (mut keys, wanted) in cases {
        if keys.get("model_type").is_none() {
            keys["model_type"] = json!("gpt2");
        }
        let text = parse(keys.clone()).expect_err(&keys.to_string()).to_string();
        assert!(text.starts_with("folder/config.json: ") && text.len() < 300, "{text}");
        for part in wanted {
            assert!(text.contains(part), "{keys}: {text} lacks {part:?}");
        }
    }
}

#[test]
fn damaged_files_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let missing = RawConfig::from_dir(dir.path()).unwrap_err().to_string();
    assert!(missing.contains("config.json") && missing.contains("No such file"), "{missing}");
    for (bytes, wanted) in [
        (&b""[..], "not valid JSON"),
        (b"{\"n_layer\": 2,}", "line 1 column"),
        (b"[1, 2]", "expected a JSON object"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"{\"model_type\": \"gpt2\"", "not valid JSON"),
    ] {
        fs::write(dir.path().join("config.json"), bytes).unwrap();
        let text = RawConfig::from_dir(dir.path()).unwrap_err().to_string();
        assert!(text.contains("config.json") && text.contains(wanted), "{text}");
    }
    fs::write(dir.path().join("config.json"), "[".repeat(100_000)).unwrap();
    assert!(RawConfig::from_dir(dir.path()).is_err());
}

#[test]
fn a_configuration_is_written_back_with_all_its_keys_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let text = "{\n  \"zeta\": [\n    1,\n    {\n      \"b\": 0.00001,\n      \"a\": null\n    }\n  ],\n  \"model_type\": \"gpt2\",\n  \"alpha\": \"é\"\n}\n";
    fs::write(dir.path().join("config.json"), text).unwrap();
    let mut raw = RawConfig::from_dir(dir.path()).unwrap();
    assert_eq!(raw.architecture().unwrap().model_type, "gpt2");
    let out = tempfile::tempdir().unwrap();
    raw.save(out.path()).unwrap();
    let back = fs::read_to_string(out.path().join("config.json")).unwrap();
    assert_eq!(back, text);
    raw.set("torch_dtype", "float32");
    raw.save(out.path()).unwrap();
    let back = RawConfig::from_dir(out.path()).unwrap();
    assert_eq!(back.keys().keys().collect::<Vec<_>>(), ["zeta", "model_type", "alpha", "torch_dtype"]);
}
