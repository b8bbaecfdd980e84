//! Methods, adapters and configurations that do not fit a model, or make no sense on any.

use std::fs;

use serde_json::{Value, json};

use crate::{
    cli::bad_input::{refused, with_header},
    cli::lab::Lab,
    common,
};

/// `train` with options of methods on models of every kind.
#[test]
fn options_that_do_not_fit_a_model() {
    let lab = Lab::new();
    for (case, to) in [("llama2", "llama"), ("bert_regression", "bert"), ("deberta_v2_masked_lm", "deberta")] {
        lab.golden(case, to, |_| ());
    }
    lab.write("pairs.tsv", &common::pairs(|i| format!("{}.5", i % 4)));
    for (args, parts) in [
        ("--model llama --method bitfit", ["method `bitfit` trains nothing", "llama"]),
        ("--model DEBERTA --method pre-layer", ["`pre-layer` does not fit", "deberta-v2"]),
        ("--model DEBERTA --method lora+pre-layer", ["`pre-layer` does not fit", "deberta-v2"]),
        ("--model llama --targets c_attn", ["`c_attn` matches no module", "self_attn.q_proj"]),
        ("--model llama --rank 17 --init-lora-weights pissa", ["init-lora-weights = pissa", "16"]),
        ("--method adapter-h --bottleneck 0", ["bottleneck = 0", "at least one"]),
        ("--method adapter-l --bottleneck 0", ["bottleneck = 0", "at least one"]),
        ("--method adapter-p --rank 4", ["rank = given", "adapter-p does not read it"]),
        ("--method bitfit --drop-layers first:9", ["drop-layers = given", "bitfit does not read it"]),
        ("--method adapter-p --bottleneck 99999999999", ["bottleneck = 99999999999", "at most"]),
        ("--method pre-embed --prefix 0", ["prefix = 0", "at least one"]),
        ("--method pre-layer --prefix 0", ["prefix = 0", "at least one"]),
        ("--method pre-embed --prefix 64", ["prefix = 64", "64 positions"]),
        ("--method pre-embed --prefix 0 --infix 70", ["infix = 70", "64 positions"]),
        ("--method pre-embed --classify-prefix", ["classify-prefix = true", "classifies no texts"]),
        ("--method pre-embed --prefix 0 --infix 2 --classify-prefix", ["classify-prefix = true", "no prefix"]),
        ("--method pre-layer --prefix 32 --infix 32", ["prefix = 32", "64 positions"]),
        ("--method pre-layer --model llama --prefix 32", ["prefix = 32", "32 positions"]),
        ("--method pre-layer --model BERT --prefix 28", ["prefix = 28", "28 positions"]),
        ("--method lora+pre-embed --prefix 4000000000", ["prefix = 4000000000", "positions"]),
        ("--method pre-embed --prefix 63", ["train.txt:", "--max-length"]),
        ("--method pre-layer --reparam 99999999", ["reparam = 99999999", "0 is none"]),
        ("--method top2 --layers last:3", ["layers = last:3", "2 layers"]),
        ("--method top2 --layers 1,2", ["layers = 1,2", "2 layers"]),
        ("--method top2 --layers none", ["layers = none", "at least one layer"]),
        ("--method top2 --layers upper", ["layers = upper", "last:N"]),
        ("--method adapter-d --drop-layers 2", ["drop-layers = 2", "2 layers"]),
        ("--method adapter-d --drop-layers 0-1", ["drop-layers = 0,1", "left in at least one layer"]),
        ("--method adapter-d --drop-layers all", ["drop-layers = all", "left in at least one layer"]),
        ("--method adapter-d --drop-layers 1-0", ["drop-layers = 1-0", "numbers from 0"]),
    ] {
        let encoder = |name: &str| format!("--model {name} --data pairs.tsv --task values");
        let args = args.replace("--model BERT", &encoder("bert")).replace("--model DEBERTA", &encoder("deberta"));
        refused(&lab, &args, &parts);
    }
}

#[test]
fn adapters_that_cannot_be_fused() {
    let lab = Lab::new();
    lab.train("first", "--method adapter-p --bottleneck 3 --steps 1");
    lab.train("lora", "--rank 2 --steps 1");
    lab.train("norms", "--method adapter-p --bottleneck 3 --train-norms --steps 1");
    lab.train("some", "--method adapter-d --bottleneck 3 --drop-layers 0 --steps 1");
    for (name, width, layers) in [("wide", 32, 2), ("deep", 16, 3)] {
        lab.model("other", |c| (c.n_embd, c.n_layer) = (width, layers));
        lab.ok(&format!(
            "train --model other --data train.txt --out {name} --method adapter-p --bottleneck 3 --steps 1"
        ));
    }
    fs::create_dir(lab.path("more")).unwrap();
    lab.copy("first", "more/first");
    lab.copy("first", "näher");
    const DOWN: &str = "transformer.h.0.mlp.adapter_down.weight";
    for (fuse, parts) in [
        ("", &["fuse = nothing", "at least one"][..]),
        ("--fuse nowhere", &["nowhere/adapter_config.json"]),
        ("--fuse first,base", &["base/adapter_config.json"]),
        ("--fuse first,lora", &["fuse = lora", "trained with lora", "adapter-p"]),
        ("--fuse first,first", &["fuse = first", "names of their own"]),
        ("--fuse first,more/first", &["fuse = more/first", "names of their own"]),
        ("--fuse näher", &["fuse = näher", "letters, digits"]),
        ("--fuse first,wide", &["`wide`", DOWN, "[3, 32]", "[3, 16]"]),
        ("--fuse deep", &["`deep`", "transformer.h.2.mlp.adapter_down", "nothing here uses"]),
        ("--fuse first,some", &["`some`", DOWN, "does not have it"]),
        ("--fuse norms", &["`norms`", "nothing here uses"]),
    ] {
        refused(&lab, &format!("--method fusion {fuse}"), parts);
    }
}

/// An adapter, what becomes of its folder, and what is said of it.
type Damage = (&'static str, fn(&Lab), &'static [&'static str]);

const CONFIG: &str = "bad/adapter_config.json";
const WEIGHTS: &str = "bad/adapter_model.safetensors";

fn remove(lab: &Lab, tensor: &'static str) {
    let bytes = lab.bytes(WEIGHTS);
    let start = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..start]).unwrap();
    assert!(header[tensor].is_object(), "no {tensor} in {header}");
    // The bytes stay, as those of something else.
    with_header(lab, WEIGHTS, |h| {
        let keys = h.as_object_mut().unwrap();
        let name = keys.keys().find(|k| k.ends_with("h.0.mlp.adapter_down.bias")).unwrap().clone();
        let bias = keys.remove(&name).unwrap();
        keys.insert("base_model.model.transformer.h.7.bias".into(), bias);
    });
}

#[test]
fn folders_of_adapters_that_make_no_sense() {
    let lab = Lab::new();
    lab.train("p", "--method adapter-p --bottleneck 3 --steps 1");
    lab.train("d", "--method adapter-d --bottleneck 3 --steps 1");
    // After the prompt, where PEFT has no virtual tokens.
    lab.train("infix", "--method pre-layer --prefix 0 --infix 2 --steps 1");
    lab.train("top", "--method top2 --layers 1 --steps 1");
    lab.copy("p", "q");
    lab.train("fused", "--method fusion --fuse p,q --steps 1");
    let damages: &[Damage] = &[
        ("p", |lab| lab.set(CONFIG, "method", json!("magic")), &[CONFIG, "\"method\"", "magic", "adapter-p"]),
        ("p", |lab| lab.set(CONFIG, "method", json!(3)), &[CONFIG, "\"method\"", "a string"]),
        ("p", |lab| lab.set(CONFIG, "method", json!("full")), &[CONFIG, "full", "whole model"]),
        ("p", |lab| lab.set(CONFIG, "method", json!("adapter-h")), &[WEIGHTS, "missing", "h.0.attn.adapter_down"]),
        ("p", |lab| lab.set(CONFIG, "rank", json!(4)), &[CONFIG, "\"rank\"", "no such option"]),
        ("p", |lab| lab.set(CONFIG, "bottleneck", json!(4)), &[WEIGHTS, "adapter_down.bias", "[3]", "[4]"]),
        ("p", |lab| lab.set(CONFIG, "bottleneck", json!(0)), &[CONFIG, "\"bottleneck\"", "0"]),
        ("p", |lab| lab.set(CONFIG, "bottleneck", json!(99)), &[WEIGHTS, "adapter_down.bias", "[3]", "[99]"]),
        ("p", |lab| lab.set(CONFIG, "bottleneck", json!("wide")), &[CONFIG, "\"bottleneck\"", "wide"]),
        ("p", |lab| lab.set(CONFIG, "architecture", json!("bert")), &[CONFIG, "bert", "gpt2"]),
        ("p", |lab| lab.set(CONFIG, "task_type", json!("SEQ_CLS")), &[CONFIG, "SEQ_CLS", "CAUSAL_LM"]),
        (
            "p",
            |lab| remove(lab, "base_model.model.transformer.h.0.mlp.adapter_down.bias"),
            &[WEIGHTS, "missing", "h.0.mlp.adapter_down.bias"],
        ),
        ("d", |lab| lab.set(CONFIG, "drop_layers", json!("9")), &[CONFIG, "\"drop_layers\"", "2 layers"]),
        ("d", |lab| lab.set(CONFIG, "drop_layers", json!("upper")), &[CONFIG, "\"drop_layers\"", "upper"]),
        ("d", |lab| lab.set(CONFIG, "drop_layers", json!("0")), &[WEIGHTS, "unexpected", "h.0.mlp.adapter_down"]),
        ("top", |lab| lab.set(CONFIG, "layers", json!("last:3")), &[CONFIG, "\"layers\"", "2 layers"]),
        ("top", |lab| lab.set(CONFIG, "layers", json!("0")), &[WEIGHTS, "missing", "h.0."]),
        ("infix", |lab| lab.set(CONFIG, "infix", json!(0)), &[CONFIG, "\"prefix\"", "0"]),
        ("infix", |lab| lab.set(CONFIG, "infix", json!(3)), &[WEIGHTS, "prompt_embeddings", "[2, 64]", "[3, 64]"]),
        ("infix", |lab| lab.set(CONFIG, "infix", json!(64)), &[CONFIG, "\"infix\"", "64 positions"]),
        ("infix", |lab| lab.set(CONFIG, "reparam", json!(4)), &["reparam"]),
        ("fused", |lab| lab.set(CONFIG, "fuse", json!({})), &[CONFIG, "\"fuse\""]),
        ("fused", |lab| lab.set(CONFIG, "fuse", json!(["p"])), &[CONFIG, "\"fuse\"", "names and bottlenecks"]),
        ("fused", |lab| lab.set(CONFIG, "fuse", json!({"p": "wide"})), &[CONFIG, "\"fuse\"", "\"p\""]),
        ("fused", |lab| lab.set(CONFIG, "fuse", json!({"p": 3})), &[WEIGHTS, "unexpected", "adapters.q."]),
        ("fused", |lab| lab.set(CONFIG, "fuse", json!({"p": 3, "q": 3, "r": 3})), &["`r`", "adapter_down"]),
        ("fused", |lab| lab.set(CONFIG, "fuse", json!({"p": 3, "q": 2})), &["`q`", "adapter_down", "[2, 16]"]),
    ];
    for (adapter, damage, parts) in damages {
        lab.copy(adapter, "bad");
        fs::remove_file(lab.path("bad/run.toml")).unwrap();
        damage(&lab);
        for args in ["eval --model base --data valid.txt", "generate --model base --prompt a"] {
            lab.fails(&format!("{args} --adapter bad"), parts);
        }
        lab.fails("info bad --model base", parts);
        refused(&lab, "--init-adapter bad", parts);
        fs::remove_dir_all(lab.path("bad")).unwrap();
    }
    for (args, parts) in [
        ("--init-adapter p --method lora", ["method = lora", "adapter-p"]),
        ("--init-adapter p --method full", ["init-adapter", "method full has no adapter"]),
        ("--init-adapter p --bottleneck 4", ["bottleneck = 4", "the adapter p has 3"]),
        ("--init-adapter d --drop-layers 0", ["drop-layers = 0", "the adapter d has the default"]),
        ("--init-adapter top --layers last:2", ["layers = last:2", "the adapter top has 1"]),
        ("--init-adapter infix --infix 3", ["infix = 3", "the adapter infix has 2"]),
    ] {
        refused(&lab, args, &parts);
    }
}

/// Where all shapes are the same, what the adapter says of its base is what tells.
#[test]
fn an_adapter_of_another_architecture() {
    let lab = Lab::new();
    for (case, to) in [("llama2", "llama"), ("qwen2", "qwen2")] {
        lab.golden(case, to, |raw| {
            for (key, n) in [("num_attention_heads", 4), ("num_key_value_heads", 2), ("head_dim", 4)] {
                raw.set(key, n);
            }
        });
    }
    for method in ["lora", "adapter-p", "pre-layer"] {
        let out = format!("of-{method}");
        // A file may serve several methods, where a flag would be refused by those that do not read it.
        lab.write("options.toml", "bottleneck = 3\nprefix = 2\nrank = 2\nsteps = 1\n");
        let options = "--config options.toml";
        lab.ok(&format!("train --model llama --data train.txt --out {out} --method {method} {options}"));
        let parts = [out.as_str(), "architecture llama", "not on qwen2"];
        lab.fails(&format!("eval --model qwen2 --adapter {out} --data valid.txt"), &parts);
        lab.fails(&format!("generate --model qwen2 --adapter {out} --prompt a"), &parts);
        refused(&lab, &format!("--model qwen2 --init-adapter {out}"), &parts);
    }
    lab.fails("merge --model qwen2 --adapter of-lora --out out", &["of-lora", "not on qwen2"]);
    lab.fails("merge --model llama --adapter of-adapter-p --out out", &["llama with of-adapter-p", "keep it beside"]);
    assert!(!lab.path("out").exists());
}

/// A key of a configuration, and a value that makes no sense.
type Senseless = (&'static str, &'static str, Value, &'static [&'static str]);

#[test]
fn configurations_that_make_no_sense() {
    let lab = Lab::new();
    let rope = |name: &str, more: Value| {
        let mut rope = json!({"rope_type": name, "factor": 2.0});
        rope.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        rope
    };
    let table: Vec<Senseless> = vec![
        ("llama3", "num_attention_heads", json!(0), &["num_attention_heads", "0"]),
        ("qwen2", "num_attention_heads", json!(3), &["num_attention_heads", "hidden_size = 16"]),
        ("llama3", "num_key_value_heads", json!(3), &["num_key_value_heads", "num_attention_heads = 4"]),
        ("llama3", "num_key_value_heads", json!(0), &["num_key_value_heads", "0"]),
        ("llama3", "num_key_value_heads", json!(8), &["num_key_value_heads", "8"]),
        ("llama3", "num_key_value_heads", json!("two"), &["num_key_value_heads", "two"]),
        ("llama3", "head_dim", json!(7), &["head_dim", "odd"]),
        ("llama3", "rope_theta", json!(-1.0), &["rope_theta", "-1"]),
        ("llama3", "rope_scaling", json!("linear"), &["rope_scaling", "linear"]),
        ("llama3", "rope_scaling", rope("spiral", json!({})), &["rope_type", "spiral", "llama3"]),
        ("llama3", "rope_scaling", rope("linear", json!({"factor": 0.5})), &["rope_scaling.factor", "0.5"]),
        ("llama3", "rope_scaling", rope("linear", json!({"factor": null})), &["rope_scaling.factor", "missing"]),
        ("llama3", "rope_scaling", rope("llama3", json!({})), &["rope_scaling.low_freq_factor", "missing"]),
        (
            "llama3",
            "rope_scaling",
            rope("llama3", json!({"low_freq_factor": 4, "high_freq_factor": 1, "original_max_position_embeddings": 8})),
            &["rope_scaling.high_freq_factor", "low_freq_factor"],
        ),
        ("llama3", "rope_scaling", rope("yarn", json!({"beta_fast": 1, "beta_slow": 2})), &["rope_scaling.beta_fast"]),
        ("llama3", "hidden_act", json!("gelu"), &["hidden_act", "gelu", "silu"]),
        ("mistral", "sliding_window", json!(0), &["sliding_window", "0"]),
        ("bert_regression", "num_attention_heads", json!(3), &["num_attention_heads", "hidden_size = 16"]),
        ("roberta_regression", "num_attention_heads", json!(0), &["num_attention_heads", "0"]),
        ("deberta_v2_masked_lm", "num_attention_heads", json!(5), &["num_attention_heads", "hidden_size = 16"]),
        ("deberta_v2_masked_lm", "pos_att_type", json!(["x2y"]), &["pos_att_type", "x2y"]),
    ];
    for (case, key, value, parts) in table {
        lab.golden(case, "bad", |_| ());
        lab.set("bad/config.json", key, value);
        let parts = [&["bad/config.json"], parts].concat();
        lab.fails("info bad", &parts);
        lab.fails("eval --model bad --data valid.txt", &parts);
        refused(&lab, "--model bad", &parts);
    }
    // What a task's own head takes the place of.
    for (key, value) in [("problem_type", json!("multi_label_classification")), ("id2label", json!("yes"))] {
        lab.golden("bert_regression", "bad", |_| ());
        lab.set("bad/config.json", key, value);
        lab.fails("info bad", &["bad/config.json", key]);
    }
}
