//! DeBERTa-v2 and v3.

use std::path::Path;

use lora_core::{
    Error as CoreError,
    peft::{self, Lora, LoraConfig, Options, trainable},
};
use lora_kernels::Activation;
use lora_model::{
    Error, LoadOptions, Task,
    config::{DebertaV2Config, RawConfig},
    outline,
};
use serde_json::{Value, json};

fn raw(mut keys: Value) -> RawConfig {
    keys["model_type"] = json!("deberta-v2");
    let Value::Object(keys) = keys else { panic!("an object") };
    RawConfig::new(Path::new("folder/config.json"), keys)
}

fn parse(keys: Value) -> Result<DebertaV2Config, Error> {
    DebertaV2Config::from_raw(&raw(keys))
}

/// What the published files say, shortened by what plays no part.
#[test]
fn published_models_have_their_parameter_counts() {
    let relative = json!({"relative_attention": true, "position_buckets": 256, "norm_rel_ebd": "layer_norm",
        "share_att_key": true, "pos_att_type": "p2c|c2p", "max_relative_positions": -1, "position_biased_input": false,
        "layer_norm_eps": 1e-7, "type_vocab_size": 0, "attention_head_size": 64, "vocab_size": 128_100,
        "max_position_embeddings": 512});
    let with = |more: Value| {
        let mut keys = relative.clone();
        more.as_object().unwrap().iter().for_each(|(key, value)| keys[key] = value.clone());
        keys
    };
    for (name, keys, config, count) in [
        (
            "v3 base",
            with(json!({"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
                "intermediate_size": 3072, "pooler_hidden_size": 768})),
            DebertaV2Config::v3_base(),
            183_831_552,
        ),
        (
            "v2 XL",
            with(json!({"conv_kernel_size": 3, "conv_act": "gelu", "hidden_size": 1536, "num_hidden_layers": 24,
                "num_attention_heads": 24, "intermediate_size": 6144})),
            DebertaV2Config::v2_xlarge(),
            884_593_152,
        ),
        (
            "v2 XXL",
            with(json!({"conv_kernel_size": 3, "conv_act": "gelu", "hidden_size": 1536, "num_hidden_layers": 48,
                "num_attention_heads": 24, "intermediate_size": 6144})),
            DebertaV2Config::v2_xxlarge(),
            1_564_549_632,
        ),
    ] {
        assert_eq!(parse(keys).unwrap(), config, "{name}");
        assert_eq!(config.parameters(), count, "{name}");
        config.validate(Path::new("preset")).unwrap();
        // A classifier adds the pooler and its own matrix.
        let (d, outline) = (config.hidden_size as u128, config.outline(Task::Classification { labels: 3 }));
        assert_eq!(outline.parameters(), count + (d * d + d) + 3 * (d + 1), "{name}");
        let outline = config.outline(Task::MaskedLm);
        assert_eq!(outline.parameters(), count + (d * d + d) + 2 * d + config.vocab_size as u128, "{name}");
    }
}

/// 4.7M in table 2 of the LoRA paper: q and v of rank 16.
#[test]
fn lora_of_the_paper_trains_4_7_million_of_the_xxl_model() {
    let config = LoraConfig { rank: 16, alpha: 32.0, ..LoraConfig::default() };
    let outline = DebertaV2Config::v2_xxlarge().outline(Task::MaskedLm);
    assert_eq!(trainable(&Lora::new(config).unwrap(), &outline).unwrap(), 4_718_592);
}

#[test]
fn every_choice_of_tables_counts_its_own_weights() {
    for share_att_key in [false, true] {
        for (c2p, p2c) in [(true, true), (true, false), (false, true), (false, false)] {
            for (relative_attention, position_biased_input, type_vocab_size) in
                [(true, false, 0), (false, true, 2), (true, true, 3)]
            {
                let config = DebertaV2Config {
                    share_att_key,
                    c2p,
                    p2c,
                    relative_attention,
                    position_biased_input,
                    type_vocab_size,
                    position_buckets: relative_attention.then_some(5),
                    conv_kernel_size: c2p.then_some(5),
                    norm_rel_ebd: p2c,
                    ..DebertaV2Config::v3_base()
                };
                let d = config.hidden_size as u128;
                let outline = config.outline(Task::Regression);
                assert_eq!(outline.parameters(), config.parameters() + (d * d + d) + (d + 1), "{config:?}");
                assert_eq!(parse(Value::Object(config.to_json())).unwrap(), config);
            }
        }
    }
}

#[test]
fn keys_are_understood_in_all_their_spellings() {
    let d = DebertaV2Config::default();
    for (keys, read) in [
        (json!({}), d.clone()),
        (json!({"pos_att_type": "P2C | c2p"}), DebertaV2Config { c2p: true, p2c: true, ..d.clone() }),
        (json!({"pos_att_type": ["p2c"]}), DebertaV2Config { p2c: true, ..d.clone() }),
        (json!({"pos_att_type": null, "position_buckets": -1, "conv_kernel_size": 0}), d.clone()),
        (json!({"pos_att_type": []}), d.clone()),
        (json!({"max_relative_positions": 300}), DebertaV2Config { max_relative_positions: Some(300), ..d.clone() }),
        (json!({"norm_rel_ebd": "none"}), d.clone()),
        (json!({"norm_rel_ebd": "layer_norm"}), DebertaV2Config { norm_rel_ebd: true, ..d.clone() }),
        (json!({"conv_act": "gelu", "conv_groups": 1}), DebertaV2Config { conv_act: Activation::GeluErf, ..d.clone() }),
        (json!({"cls_dropout": 0.25}), DebertaV2Config { cls_dropout: Some(0.25), ..d.clone() }),
        (json!({"embedding_size": 1536, "pooler_hidden_size": 1536, "attention_head_size": 64}), d.clone()),
    ] {
        assert_eq!(parse(keys.clone()).unwrap(), read, "{keys}");
    }
}

#[test]
fn impossible_values_are_refused_with_file_and_key() {
    for (keys, wanted) in [
        (json!({"num_attention_heads": 7}), &["num_attention_heads", "7 heads do not divide hidden_size = 1536"][..]),
        (json!({"num_attention_heads": 0}), &["num_attention_heads", "from 1 to"]),
        (json!({"hidden_size": "768"}), &["hidden_size", "a whole number"]),
        (json!({"num_hidden_layers": 1u64 << 40}), &["num_hidden_layers", "from 1 to"]),
        (json!({"hidden_size": 1 << 20, "num_hidden_layers": 4096, "num_attention_heads": 1}), &["parameters"]),
        (json!({"hidden_act": "mish"}), &["mish", "gelu"]),
        (json!({"conv_act": "sin"}), &["sin", "tanh"]),
        (json!({"pooler_hidden_act": 1}), &["pooler_hidden_act", "a string"]),
        (json!({"hidden_dropout_prob": 1.5}), &["hidden_dropout_prob", "1.5", "below 1"]),
        (json!({"cls_dropout": -0.5}), &["cls_dropout", "-0.5"]),
        (json!({"layer_norm_eps": 0.0}), &["layer_norm_eps", "above 0"]),
        (json!({"initializer_range": -1.0}), &["initializer_range", "-1"]),
        (json!({"pos_att_type": "c2p|p2p"}), &["pos_att_type", "\"p2p\" is not supported", "c2p, p2c"]),
        (json!({"pos_att_type": ["c2p", 3]}), &["pos_att_type", "a list of strings", "3"]),
        (json!({"pos_att_type": true}), &["pos_att_type", "a list of strings", "true"]),
        (json!({"norm_rel_ebd": "batch_norm"}), &["norm_rel_ebd", "batch_norm", "layer_norm"]),
        (json!({"relative_attention": 1}), &["relative_attention", "true or false"]),
        (json!({"relative_attention": true, "position_buckets": 1}), &["position_buckets", "1 does not fit"]),
        (
            json!({"relative_attention": true, "position_buckets": 256, "max_relative_positions": 129}),
            &["position_buckets", "256 does not fit max_relative_positions = 129"],
        ),
        (
            json!({"relative_attention": true, "position_buckets": 64, "max_position_embeddings": 33}),
            &["position_buckets", "64 does not fit max_position_embeddings = 33"],
        ),
        (json!({"position_buckets": 2.5}), &["position_buckets", "a whole number", "2.5"]),
        (json!({"position_buckets": 1u64 << 50}), &["position_buckets", "from 1 to"]),
        (json!({"conv_kernel_size": 4}), &["conv_kernel_size", "4 is even"]),
        (json!({"conv_kernel_size": 100_001}), &["conv_kernel_size", "from 1 to"]),
        (json!({"conv_kernel_size": 3, "conv_groups": 2}), &["conv_groups", "2 instead of 1"]),
        (json!({"embedding_size": 128}), &["embedding_size", "128 instead of 1536"]),
        (json!({"pooler_hidden_size": 768}), &["pooler_hidden_size", "768 instead of 1536"]),
        (json!({"attention_head_size": 32}), &["attention_head_size", "32 instead of 64"]),
        (json!({"quantization_config": {"bits": 8}}), &["quantization_config"]),
    ] {
        let text = parse(keys.clone()).expect_err(&keys.to_string()).to_string();
        assert!(text.starts_with("folder/config.json: ") && text.len() < 300, "{text}");
        for part in wanted {
            assert!(text.contains(part), "{keys}: {text} lacks {part:?}");
        }
    }
}

/// Its attention has no place for further keys and values.
#[test]
fn prefixes_are_refused_and_everything_else_fits() {
    let raw = raw(json!({"architectures": ["DebertaV2ForSequenceClassification"], "num_labels": 2,
        "relative_attention": true, "pos_att_type": "c2p|p2c", "hidden_size": 8, "num_attention_heads": 2,
        "num_hidden_layers": 3, "vocab_size": 11}));
    let outline = outline(&raw, &LoadOptions::default()).unwrap();
    for row in peft::METHODS {
        let options = Options { prefix: 2, bottleneck: 4, ..Options::default() };
        let Ok(method) = (row.build)(&options) else { continue };
        match trainable(method.as_ref(), &outline) {
            Err(CoreError::DoesNotFit { architecture, .. }) => {
                assert!(row.name.contains("pre-layer") && architecture == "deberta-v2", "{}", row.name);
            }
            Ok(count) => assert!(count > 0 && !row.name.contains("pre-layer"), "{}", row.name),
            Err(e) => panic!("{}: {e}", row.name),
        }
    }
}
