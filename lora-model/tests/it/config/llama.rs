//! Llama, Mistral and Qwen.

use std::path::Path;

use lora_model::{
    Error,
    config::{LlamaConfig, LlamaKind, RawConfig, RopeConfig, RopeScaling},
};
use serde_json::{Value, json};

fn parse(keys: Value) -> Result<LlamaConfig, Error> {
    let Value::Object(keys) = keys else { panic!("an object") };
    LlamaConfig::from_raw(&RawConfig::new(Path::new("folder/config.json"), keys))
}

fn of(model_type: &str, mut keys: Value) -> Result<LlamaConfig, Error> {
    if keys.get("model_type").is_none() {
        keys["model_type"] = json!(model_type);
    }
    parse(keys)
}

/// What the published files say, shortened by what plays no part.
#[test]
fn published_models_have_their_parameter_counts() {
    let rope = json!({"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3"});
    for (name, keys, count, positions) in [
        ("Llama 2 7B", json!({"model_type": "llama", "max_position_embeddings": 4096}), 6_738_415_616, 4096),
        (
            "Llama 3.2 1B",
            json!({"model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128_256, "max_position_embeddings": 131_072,
                "rope_scaling": rope, "rope_theta": 5e5, "tie_word_embeddings": true}),
            1_235_814_400,
            131_072,
        ),
        ("Mistral 7B", json!({"model_type": "mistral", "max_position_embeddings": 32768}), 7_241_732_096, 4096),
        (
            "Qwen2 0.5B",
            json!({"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
                "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": true,
                "max_position_embeddings": 131_072, "use_sliding_window": false, "sliding_window": 131_072,
                "max_window_layers": 24, "rope_theta": 1e6}),
            494_032_768,
            131_072,
        ),
        (
            "Qwen3 0.6B",
            json!({"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
                "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": true,
                "attention_bias": false, "max_position_embeddings": 40_960, "rope_theta": 1_000_000}),
            596_049_920,
            40_960,
        ),
    ] {
        let config = parse(keys).unwrap();
        assert_eq!((config.parameters(), config.max_positions()), (count, positions), "{name}");
        assert_eq!(parse(Value::Object(config.to_json())).unwrap(), config, "{name}");
    }
    for (config, count) in [(LlamaConfig::tiny_llama(), 1_100_048_384), (LlamaConfig::smollm_135m(), 134_515_008)] {
        assert_eq!(config.parameters(), count);
        config.validate(Path::new("preset")).unwrap();
    }
}

#[test]
fn absent_keys_take_the_defaults_of_the_kind_and_written_ones_come_back() {
    for kind in LlamaKind::ALL {
        let default = LlamaConfig::of(kind);
        assert_eq!(of(kind.model_type(), json!({})).unwrap(), default);
        let attention_bias = matches!(kind, LlamaKind::Llama | LlamaKind::Qwen2 | LlamaKind::Qwen3);
        let made = LlamaConfig {
            kind,
            vocab_size: 300,
            hidden_size: 48,
            intermediate_size: 100,
            num_hidden_layers: 3,
            num_attention_heads: 6,
            num_key_value_heads: 2,
            head_dim: 10,
            max_position_embeddings: 64,
            sliding_window: (kind != LlamaKind::Llama).then_some(33),
            rms_norm_eps: 1e-5,
            attention_bias,
            mlp_bias: kind == LlamaKind::Llama,
            attention_dropout: 0.25,
            rope: RopeConfig {
                rope_theta: 5e5,
                scaling: RopeScaling::Yarn {
                    factor: 2.0,
                    original_max_position_embeddings: 32,
                    attention_factor: 1.25,
                    beta_fast: 16.0,
                    beta_slow: 0.5,
                    truncate: false,
                },
            },
            tie_word_embeddings: true,
            bos_token_id: None,
            eos_token_id: Some(7),
        };
        assert_eq!(parse(Value::Object(made.to_json())).unwrap(), made);
        assert_eq!(made.max_positions(), if kind == LlamaKind::Llama { 64 } else { 33 });
    }
}

#[test]
fn the_same_thing_can_be_said_in_several_ways() {
    let linear = RopeConfig { rope_theta: 1e6, scaling: RopeScaling::Linear { factor: 4.0 } };
    let (llama, qwen2) = (LlamaConfig::of(LlamaKind::Llama), LlamaConfig::of(LlamaKind::Qwen2));
    let mistral = LlamaConfig::of(LlamaKind::Mistral);
    let rope = |rope: &RopeConfig| LlamaConfig { rope: rope.clone(), ..llama.clone() };
    let plain = |rope_theta| RopeConfig { rope_theta, scaling: RopeScaling::Default };
    for (model_type, keys, read) in [
        ("llama", json!({"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 4}}), rope(&linear)),
        ("llama", json!({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0}}), rope(&linear)),
        (
            "llama",
            json!({"rope_theta": 1e6, "rope_parameters": {"rope_type": "linear", "type": "linear", "factor": 4.0},
                "rope_scaling": {"rope_type": "linear", "factor": 4.0, "finetuned": true}}),
            rope(&linear),
        ),
        ("llama", json!({"rope_theta": 5e5, "rope_scaling": null}), rope(&plain(5e5))),
        ("llama", json!({"rope_parameters": {"rope_theta": 5e5}}), rope(&plain(5e5))),
        ("llama", json!({"rope_theta": 5e5, "rope_scaling": {}}), rope(&plain(5e5))),
        ("llama", json!({"eos_token_id": [5, 6]}), LlamaConfig { eos_token_id: Some(5), ..llama.clone() }),
        ("llama", json!({"num_key_value_heads": null, "hidden_act": "swish"}), llama.clone()),
        // A window that a Llama does not have.
        ("llama", json!({"sliding_window": 5}), llama.clone()),
        ("mistral", json!({"sliding_window": null}), LlamaConfig { sliding_window: None, ..mistral.clone() }),
        ("mistral", json!({"num_key_value_heads": null}), LlamaConfig { num_key_value_heads: 32, ..mistral.clone() }),
        // Biases are no choice here.
        ("mistral", json!({"attention_bias": true, "mlp_bias": true}), mistral.clone()),
        ("qwen2", json!({"attention_bias": false}), qwen2.clone()),
        ("qwen2", json!({"sliding_window": 9}), qwen2.clone()),
        ("qwen2", json!({"use_sliding_window": true, "max_window_layers": 32}), qwen2.clone()),
        ("qwen2", json!({"use_sliding_window": true}), LlamaConfig { sliding_window: Some(4096), ..qwen2.clone() }),
        ("qwen2", json!({"use_sliding_window": true, "sliding_window": null}), qwen2.clone()),
        (
            "qwen2",
            json!({"num_hidden_layers": 2, "use_sliding_window": true, "sliding_window": 9,
                "layer_types": ["full_attention", "sliding_attention"]}),
            LlamaConfig { num_hidden_layers: 2, sliding_window: Some(9), ..qwen2.clone() },
        ),
        (
            "qwen2",
            json!({"num_hidden_layers": 2, "use_sliding_window": true, "sliding_window": 9, "max_window_layers": 0,
                "layer_types": ["full_attention", "full_attention"]}),
            LlamaConfig { num_hidden_layers: 2, ..qwen2.clone() },
        ),
    ] {
        assert_eq!(of(model_type, keys.clone()).unwrap(), read, "{model_type}: {keys}");
    }
}

#[test]
fn impossible_values_are_refused_with_file_and_key() {
    let scaled = |more: Value| {
        let mut rope = json!({"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4,
            "original_max_position_embeddings": 1024});
        for (key, value) in more.as_object().unwrap() {
            rope[key] = value.clone();
        }
        json!({"rope_scaling": rope})
    };
    let yarn = |more: Value| {
        let mut keys = scaled(more);
        keys["rope_scaling"]["rope_type"] = json!("yarn");
        json!({"rope_parameters": keys["rope_scaling"]})
    };
    let cases = [
        (
            "llama",
            json!({"num_attention_heads": 7}),
            &["num_attention_heads", "7 heads do not divide hidden_size = 4096"][..],
        ),
        ("llama", json!({"num_attention_heads": 0}), &["num_attention_heads"]),
        ("llama", json!({"num_attention_heads": 0, "head_dim": 64}), &["num_attention_heads", "from 1 to"]),
        (
            "llama",
            json!({"num_key_value_heads": 5}),
            &["num_key_value_heads", "5 heads of keys", "num_attention_heads = 32"],
        ),
        ("llama", json!({"num_key_value_heads": 0}), &["num_key_value_heads", "from 1 to"]),
        ("mistral", json!({"num_key_value_heads": 64}), &["num_key_value_heads", "64"]),
        ("llama", json!({"head_dim": 63}), &["head_dim", "63 is odd"]),
        ("llama", json!({"head_dim": 0}), &["head_dim", "from 1 to"]),
        (
            "llama",
            json!({"head_dim": 65_536, "max_position_embeddings": 1 << 20}),
            &["max_position_embeddings", "head_dim = 65536", "at most 4096"],
        ),
        ("llama", json!({"hidden_size": 0, "head_dim": 64}), &["hidden_size"]),
        ("llama", json!({"hidden_size": "4096"}), &["hidden_size", "expected a whole number"]),
        ("llama", json!({"intermediate_size": 0}), &["intermediate_size"]),
        ("llama", json!({"num_hidden_layers": 1u64 << 40}), &["num_hidden_layers", "from 1 to"]),
        ("llama", json!({"hidden_size": 1 << 20, "num_hidden_layers": 4096}), &["hidden_size", "parameters"]),
        ("llama", json!({"vocab_size": 0}), &["vocab_size"]),
        ("llama", json!({"max_position_embeddings": 0}), &["max_position_embeddings"]),
        ("llama", json!({"rms_norm_eps": 0}), &["rms_norm_eps"]),
        ("llama", json!({"attention_dropout": 1.5}), &["attention_dropout", "below 1"]),
        ("llama", json!({"attention_bias": 1}), &["attention_bias", "true or false"]),
        ("llama", json!({"mlp_bias": "no"}), &["mlp_bias"]),
        ("llama", json!({"hidden_act": "gelu"}), &["hidden_act", "gelu", "silu"]),
        ("llama", json!({"hidden_act": "mish"}), &["mish", "silu"]),
        ("llama", json!({"quantization_config": {"bits": 4}}), &["quantization_config"]),
        ("llama", json!({"eos_token_id": ["</s>"]}), &["eos_token_id"]),
        ("mistral", json!({"sliding_window": 0}), &["sliding_window", "from 1 to"]),
        ("mistral", json!({"sliding_window": "wide"}), &["sliding_window"]),
        ("qwen2", json!({"layer_types": ["full_attention"]}), &["layer_types", "1 types", "32"]),
        (
            "qwen3",
            json!({"num_hidden_layers": 1, "layer_types": ["linear_attention"]}),
            &["layer_types", "linear_attention"],
        ),
        (
            "qwen3",
            json!({"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}),
            &["layer_types", "no sliding_window"],
        ),
        ("llama", json!({"rope_theta": 1.0}), &["rope_theta", "above 1"]),
        ("llama", json!({"rope_theta": -5}), &["rope_theta"]),
        ("llama", json!({"rope_theta": "big"}), &["rope_theta", "a finite number"]),
        ("llama", json!({"partial_rotary_factor": 0.5}), &["partial_rotary_factor", "whole heads"]),
        ("llama", json!({"rope_scaling": 8.0}), &["rope_scaling", "an object"]),
        ("llama", json!({"rope_scaling": {"type": "linear"}}), &["rope_scaling.factor", "missing"]),
        (
            "llama",
            json!({"rope_scaling": {"type": "linear", "factor": 0.5}}),
            &["rope_scaling.factor", "0.5", "at least 1"],
        ),
        (
            "llama",
            json!({"rope_scaling": {"type": "dynamic", "factor": "2"}}),
            &["rope_scaling.factor", "a finite number"],
        ),
        (
            "llama",
            json!({"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 2}}),
            &["rope_scaling.rope_type", "contradicts", "linear"],
        ),
        (
            "llama",
            json!({"rope_scaling": {"type": "su", "factor": 2}}),
            &["rope_type", "su", "default, linear, dynamic, llama3, yarn"],
        ),
        (
            "llama",
            json!({"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}}),
            &["rope_type", "longrope"],
        ),
        ("llama", json!({"rope_parameters": {"rope_type": 3}}), &["rope_parameters.rope_type", "a string"]),
        (
            "llama",
            json!({"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 1e4}),
            &["rope_parameters.rope_theta", "contradicts", "10000"],
        ),
        (
            "llama",
            json!({"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": {"rope_theta": 1e6}}),
            &["rope_scaling", "contradicts rope_parameters"],
        ),
        (
            "llama",
            json!({"rope_parameters": {"full_attention": {"rope_theta": 5e5}}}),
            &["rope_parameters.full_attention", "differs between layers"],
        ),
        (
            "llama",
            json!({"rope_parameters": {"partial_rotary_factor": 0.5}}),
            &["rope_parameters.partial_rotary_factor"],
        ),
        ("llama", scaled(json!({"factor": 0.9})), &["rope_scaling.factor", "at least 1"]),
        ("llama", scaled(json!({"low_freq_factor": null})), &["rope_scaling.low_freq_factor", "missing"]),
        ("llama", scaled(json!({"high_freq_factor": null})), &["rope_scaling.high_freq_factor", "missing"]),
        ("llama", scaled(json!({"low_freq_factor": 4})), &["rope_scaling.high_freq_factor", "above low_freq_factor"]),
        ("llama", scaled(json!({"low_freq_factor": 0})), &["rope_scaling.high_freq_factor", "above 0"]),
        (
            "llama",
            scaled(json!({"original_max_position_embeddings": 0})),
            &["rope_scaling.original_max_position_embeddings"],
        ),
        (
            "llama",
            scaled(json!({"original_max_position_embeddings": null})),
            &["rope_scaling.original_max_position_embeddings", "missing"],
        ),
        ("qwen2", yarn(json!({"factor": null})), &["rope_parameters.factor", "missing"]),
        ("qwen2", yarn(json!({"beta_fast": 1, "beta_slow": 2})), &["rope_parameters.beta_fast", "beta_slow = 2"]),
        ("qwen2", yarn(json!({"beta_slow": -1})), &["rope_parameters.beta_fast", "above 0"]),
        ("qwen2", yarn(json!({"attention_factor": -1})), &["rope_parameters.attention_factor", "above 0"]),
        ("qwen2", yarn(json!({"truncate": 1})), &["rope_parameters.truncate", "true or false"]),
        ("mamba", json!({}), &["model_type", "llama, mistral, qwen2, qwen3"]),
    ];
    for (model_type, keys, wanted) in cases {
        let text = of(model_type, keys.clone()).expect_err(&keys.to_string()).to_string();
        assert!(text.starts_with("folder/config.json: ") && text.len() < 300, "{text}");
        for part in wanted {
            assert!(text.contains(part), "{keys}: {text} lacks {part:?}");
        }
    }
    let mut outside = scaled(json!({}));
    outside["original_max_position_embeddings"] = json!(4096);
    let text = of("llama", outside.clone()).unwrap_err().to_string();
    assert!(text.contains("rope_scaling.original_max_position_embeddings") && text.contains("contradicts"), "{text}");
    outside["rope_scaling"]["original_max_position_embeddings"] = json!(4096);
    of("llama", outside).unwrap();
}
