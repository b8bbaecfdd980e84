//! Published models by name: what their `config.json` says of their shape.

use std::path::Path;

use lora_model::config::RawConfig;
use serde_json::{Map, Value};

use crate::{Error, Result};

/// A published model.
pub struct Arch {
    /// Its name on the command line.
    pub name: &'static str,
    /// The keys of its `config.json` that differ from the defaults of its architecture.
    config: &'static str,
}

/// All models that are known by name. GPT-3 (Brown et al. 2020, table 2.1) is taken as a GPT-2 of its size.
pub const ARCHS: &[Arch] = &[
    arch("gpt2", r#"{"model_type": "gpt2"}"#),
    arch("gpt2-medium", r#"{"model_type": "gpt2", "n_layer": 24, "n_embd": 1024, "n_head": 16}"#),
    arch("gpt2-large", r#"{"model_type": "gpt2", "n_layer": 36, "n_embd": 1280, "n_head": 20}"#),
    arch("gpt2-xl", r#"{"model_type": "gpt2", "n_layer": 48, "n_embd": 1600, "n_head": 25}"#),
    arch("gpt3-175b", r#"{"model_type": "gpt2", "n_layer": 96, "n_embd": 12288, "n_head": 96, "n_positions": 2048}"#),
    arch("bert-base", r#"{"model_type": "bert"}"#),
    arch(
        "bert-large",
        r#"{"model_type": "bert", "num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16,
            "intermediate_size": 4096}"#,
    ),
    arch(
        "roberta-base",
        r#"{"model_type": "roberta", "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}"#,
    ),
    arch(
        "roberta-large",
        r#"{"model_type": "roberta", "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1,
            "num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096}"#,
    ),
    arch(
        "deberta-v2-xxlarge",
        r#"{"model_type": "deberta-v2", "vocab_size": 128100, "hidden_size": 1536, "num_hidden_layers": 48,
            "num_attention_heads": 24, "intermediate_size": 6144, "type_vocab_size": 0, "relative_attention": true,
            "position_buckets": 256, "max_relative_positions": -1, "share_att_key": true, "pos_att_type": "p2c|c2p",
            "norm_rel_ebd": "layer_norm", "position_biased_input": false, "conv_kernel_size": 3, "conv_act": "gelu"}"#,
    ),
    arch(
        "deberta-v3-base",
        r#"{"model_type": "deberta-v2", "vocab_size": 128100, "hidden_size": 768, "num_hidden_layers": 12,
            "num_attention_heads": 12, "intermediate_size": 3072, "type_vocab_size": 0, "relative_attention": true,
            "position_buckets": 256, "max_relative_positions": -1, "share_att_key": true, "pos_att_type": "p2c|c2p",
            "norm_rel_ebd": "layer_norm", "position_biased_input": false}"#,
    ),
    arch(
        "smollm-135m",
        r#"{"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
            "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": true}"#,
    ),
    arch(
        "qwen2.5-0.5b",
        r#"{"model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
            "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": true}"#,
    ),
    arch(
        "qwen3-0.6b",
        r#"{"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072,
            "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
            "max_position_embeddings": 40960, "rope_theta": 1000000, "tie_word_embeddings": true}"#,
    ),
    arch(
        "tinyllama-1.1b",
        r#"{"model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
            "num_attention_heads": 32, "num_key_value_heads": 4}"#,
    ),
    arch("llama-2-7b", r#"{"model_type": "llama", "max_position_embeddings": 4096}"#),
    arch("mistral-7b", r#"{"model_type": "mistral", "max_position_embeddings": 32768}"#),
    arch(
        "llama-3-8b",
        r#"{"model_type": "llama", "vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8,
            "max_position_embeddings": 8192, "rope_theta": 500000}"#,
    ),
    arch(
        "llama-2-70b",
        r#"{"model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
            "num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 4096}"#,
    ),
];

const fn arch(name: &'static str, config: &'static str) -> Arch {
    Arch { name, config }
}

impl Arch {
    /// Its configuration.
    ///
    /// # Panics
    /// Never: the table is tested.
    pub fn config(&self) -> RawConfig {
        let keys: Map<String, Value> = serde_json::from_str(self.config).expect("the table holds JSON objects");
        RawConfig::new(Path::new(self.name), keys)
    }
}

/// The model of that name.
///
/// # Errors
/// [`Error::Option`], listing those that are known.
pub fn arch_named(name: &str) -> Result<&'static Arch> {
    ARCHS.iter().find(|a| a.name == name).ok_or_else(|| {
        let known: Vec<&str> = ARCHS.iter().map(|a| a.name).collect();
        let why = format!("known models are {}; for any other give its folder as --model", known.join(", "));
        Error::option("arch", name, why)
    })
}

#[cfg(test)]
mod tests {
    use lora_model::{LoadOptions, Task, outline};

    use super::*;

    #[test]
    fn published_models_have_their_published_number_of_parameters() {
        let classifier = Some(Task::Classification { labels: 2 });
        for (name, count) in [
            ("gpt2", 124_439_808u128),
            ("gpt2-medium", 354_823_168),
            ("gpt2-large", 774_030_080),
            ("gpt2-xl", 1_557_611_200),
            // 96 blocks of 12·d² + 13·d, embeddings of 50,257 tokens and 2,048 positions, the last norm.
            ("gpt3-175b", 96 * (12 * 12_288 * 12_288 + 13 * 12_288) + (50_257 + 2_048 + 2) * 12_288),
            ("bert-base", 109_482_240 + 2 * 769),
            ("bert-large", 335_141_888 + 2 * 1025),
            // Of the encoder 124,055,040, and the head.
            ("roberta-base", 124_055_040 + 768 * 769 + 2 * 769),
            ("roberta-large", 354_310_144 + 1024 * 1025 + 2 * 1025),
            ("deberta-v2-xxlarge", 1_564_549_632 + 1536 * 1537 + 2 * 1537),
            ("deberta-v3-base", 183_831_552 + 768 * 769 + 2 * 769),
            ("smollm-135m", 134_515_008),
            ("qwen2.5-0.5b", 494_032_768),
            ("qwen3-0.6b", 596_049_920),
            ("tinyllama-1.1b", 1_100_048_384),
            ("llama-2-7b", 6_738_415_616),
            ("mistral-7b", 7_241_732_096),
            ("llama-3-8b", 8_030_261_248),
            ("llama-2-70b", 68_976_648_192),
        ] {
            let raw = arch_named(name).unwrap().config();
            let task = if outline(&raw, &LoadOptions::default()).is_ok() { None } else { classifier };
            let outline = outline(&raw, &LoadOptions { task, ..LoadOptions::default() }).unwrap();
            assert_eq!(outline.parameters(), count, "{name}");
        }
        assert_eq!(ARCHS.len(), 19, "every row is counted above");
        let e = arch_named("gpt5").err().unwrap().to_string();
        assert!(e.contains("gpt5") && e.contains("llama-3-8b"), "{e}");
    }
}
