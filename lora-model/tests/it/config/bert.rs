//! BERT and RoBERTa, and what the head of an encoder is to give.

use std::path::Path;

use lora_core::peft::Outline;
use lora_model::{
    Error, LoadOptions, Task,
    config::{BertConfig, RawConfig, RobertaConfig},
    outline,
};
use serde_json::{Value, json};

const CLASSIFIER: Task = Task::Classification { labels: 2 };

fn read(keys: Value, task: Option<Task>) -> Result<Outline, Error> {
    let Value::Object(keys) = keys else { panic!("an object") };
    outline(&RawConfig::new(Path::new("folder/config.json"), keys), &LoadOptions { task, ..LoadOptions::default() })
}

/// The counts are Transformers' for its classes.
#[test]
fn published_models_have_their_parameter_counts() {
    let (bert, roberta) = (BertConfig::base(), RobertaConfig::base());
    assert_eq!(bert.encoder_parameters(), 108_891_648);
    for (name, outline, count) in [
        ("BERT base", bert.outline(CLASSIFIER), 109_483_778),
        ("BERT base, masked LM", bert.outline(Task::MaskedLm), 109_514_298),
        ("BERT large", BertConfig::large().outline(Task::Regression), 335_142_913),
        ("RoBERTa base", roberta.outline(CLASSIFIER), 124_647_170),
        ("RoBERTa base, masked LM", roberta.outline(Task::MaskedLm), 124_697_433),
        ("RoBERTa large", RobertaConfig::large().outline(CLASSIFIER), 355_361_794),
    ] {
        assert_eq!(outline.parameters(), count, "{name}");
    }
    assert_eq!((roberta.first_position(), roberta.max_positions()), (2, 512));
    for problem in [bert.validate(Path::new("preset")), roberta.validate(Path::new("preset"))] {
        problem.unwrap();
    }
}

/// The published files hold other values than the defaults: absent keys take Transformers'.
#[test]
fn absent_keys_take_the_defaults() {
    let raw = |keys: Value| RawConfig::new(Path::new("folder/config.json"), keys.as_object().unwrap().clone());
    assert_eq!(BertConfig::from_raw(&raw(json!({}))).unwrap(), BertConfig::base());
    let roberta = raw(json!({"max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}));
    assert_eq!(RobertaConfig::from_raw(&roberta).unwrap(), RobertaConfig::base());
    assert_eq!(RobertaConfig::from_raw(&raw(json!({}))).unwrap().bert.max_position_embeddings, 512);
}

#[test]
fn impossible_values_are_refused_with_file_and_key() {
    let cases = [
        (json!({"num_attention_heads": 7}), &["num_attention_heads", "7 heads do not divide hidden_size = 768"][..]),
        (json!({"num_attention_heads": 0}), &["num_attention_heads", "from 1 to"]),
        (json!({"num_hidden_layers": 0}), &["num_hidden_layers"]),
        (json!({"hidden_size": u64::MAX}), &["hidden_size"]),
        (json!({"hidden_size": 1 << 20, "num_attention_heads": 1, "num_hidden_layers": 4096}), &["parameters"]),
        (json!({"vocab_size": [1]}), &["vocab_size", "[1]"]),
        (json!({"type_vocab_size": 0}), &["type_vocab_size"]),
        (json!({"max_position_embeddings": 0}), &["max_position_embeddings"]),
        (json!({"hidden_dropout_prob": 1.0}), &["hidden_dropout_prob", "below 1"]),
        (json!({"classifier_dropout": -0.5}), &["classifier_dropout", "-0.5"]),
        (json!({"layer_norm_eps": 0}), &["layer_norm_eps"]),
        (json!({"initializer_range": 0}), &["initializer_range"]),
        (json!({"hidden_act": "mish"}), &["mish", "gelu", "relu"]),
        (json!({"is_decoder": true}), &["is_decoder", "encoders"]),
        (json!({"add_cross_attention": true}), &["add_cross_attention"]),
        (json!({"position_embedding_type": "relative_key"}), &["position_embedding_type", "relative_key", "absolute"]),
        (json!({"quantization_config": {"bits": 8}}), &["quantization_config"]),
        // Positions begin after the padding token.
        (json!({"model_type": "roberta", "pad_token_id": 511}), &["pad_token_id", "511", "512"]),
        (json!({"model_type": "roberta", "pad_token_id": -1}), &["pad_token_id", "-1"]),
    ];
    for (mut keys, wanted) in cases {
        if keys.get("model_type").is_none() {
            keys["model_type"] = json!("bert");
        }
        let text = read(keys.clone(), Some(CLASSIFIER)).expect_err(&keys.to_string()).to_string();
        assert!(text.starts_with("folder/config.json: ") && text.len() < 300, "{text}");
        for part in wanted {
            assert!(text.contains(part), "{keys}: {text} lacks {part:?}");
        }
    }
}

#[test]
fn the_configuration_says_what_the_head_gives_unless_a_task_is_asked_for() {
    let classes = |class: &str| json!({"architectures": [class]});
    let labels = |n: usize| {
        let names: serde_json::Map<_, _> = (0..n).map(|i| (i.to_string(), json!(format!("LABEL_{i}")))).collect();
        json!({"architectures": ["BertForSequenceClassification"], "id2label": names})
    };
    let and = |mut keys: Value, key: &str, value: Value| {
        keys[key] = value;
        keys
    };
    // Rows of the classifier; none in a masked LM.
    for (keys, task, wanted) in [
        (classes("BertForMaskedLM"), None, Ok(None)),
        (classes("BertForPreTraining"), None, Ok(None)),
        (classes("BertForSequenceClassification"), None, Ok(Some(2))),
        (labels(3), None, Ok(Some(3))),
        (labels(1), None, Ok(Some(1))),
        (and(labels(3), "num_labels", json!(5)), None, Ok(Some(5))),
        (and(labels(3), "problem_type", json!("single_label_classification")), None, Ok(Some(3))),
        (and(labels(1), "problem_type", json!("regression")), None, Ok(Some(1))),
        (classes("BertModel"), Some(Task::Classification { labels: 4 }), Ok(Some(4))),
        (labels(3), Some(Task::Regression), Ok(Some(1))),
        (labels(3), Some(Task::MaskedLm), Ok(None)),
        (and(labels(3), "problem_type", json!("regression")), None, Err(&["problem_type", "3 labels"][..])),
        (
            and(labels(3), "problem_type", json!("multi_label_classification")),
            None,
            Err(&["problem_type", "multi_label"]),
        ),
        (and(labels(1), "problem_type", json!("single_label_classification")), None, Err(&["num_labels", "not 1"])),
        (and(labels(1), "id2label", json!(["a"])), None, Err(&["id2label"])),
        (and(labels(1), "num_labels", json!(0)), None, Err(&["num_labels", "not 0"])),
        (classes("BertModel"), None, Err(&["architectures", "BertModel", "ask for a task"])),
        (json!({}), None, Err(&["architectures", "missing", "ask for a task"])),
        (labels(3), Some(Task::CausalLm), Err(&["model_type", "continuing text"])),
        (labels(3), Some(Task::Classification { labels: 1 }), Err(&["num_labels", "not 1"])),
    ] {
        let keys = and(keys, "model_type", json!("bert"));
        match (read(keys.clone(), task), wanted) {
            (Ok(outline), Ok(rows)) => {
                let classifier = outline.tensors.iter().find(|t| t.name == "classifier.weight").map(|t| t.shape[0]);
                assert_eq!(classifier, rows, "{keys}");
                assert_eq!(outline.task_type, rows.map(|_| "SEQ_CLS"), "{keys}");
                assert_eq!(outline.modules_to_save.len(), usize::from(rows.is_some()), "{keys}");
            }
            (Err(e), Err(parts)) => {
                let text = e.to_string();
                assert!(parts.iter().all(|p| text.contains(p)), "{keys}: {text} lacks some of {parts:?}");
            }
            (got, wanted) => panic!("{keys}: {wanted:?} expected, not {:?}", got.map(|o| o.modules_to_save)),
        }
    }
}
