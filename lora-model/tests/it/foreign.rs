//! Adapters of other programs, read and written (`golden/foreign.py`).

use std::{collections::BTreeMap, fs, path::PathBuf};

use lora_core::{
    Tensor,
    peft::{Adapted, Bias, Lora, LoraConfig, Options, find},
};
use lora_kernels::{Activation, DType};
use lora_model::{
    Model, Texts, adapter,
    checkpoint::TensorFile,
    convert::{self, read_state_dict},
    load,
};
use serde_json::{Value, json};

use crate::common::{CPU, disturb, goldens, reference, relative};

fn foreign(name: &str) -> PathBuf {
    goldens().join("foreign").join(name)
}

fn about() -> Value {
    serde_json::from_str(&fs::read_to_string(foreign("foreign.json")).unwrap()).unwrap()
}

fn base(name: &str) -> Box<dyn Model> {
    load(&goldens().join(name).join("model"), &CPU).unwrap()
}

/// How far our logits of the goldens' text are from theirs.
fn off(model: &dyn Model, adapted: &Adapted, name: &str) -> f64 {
    let ids: Vec<u32> = about()["ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
    let batch = model.batch(adapted, &Texts::new(&ids, &[ids.len()])).unwrap();
    let file = TensorFile::open(&foreign("logits.safetensors")).unwrap();
    let far = relative(&model.logits(adapted, &batch).unwrap(), &reference(&file, name));
    println!("{name}: {far:.1e}");
    far
}

#[test]
fn state_dicts_of_both_formats_hold_what_torch_saved() {
    let expected = TensorFile::open(&foreign("torch/expected.safetensors")).unwrap();
    let names: Vec<&str> = expected.names().collect();
    assert!(names.len() == 11, "{names:?}");
    for file in ["state.pt", "legacy.pt", "nested.pt"] {
        let state = read_state_dict(&foreign("torch").join(file)).unwrap();
        assert_eq!(state.tensors.keys().map(String::as_str).collect::<Vec<_>>(), names, "{file}");
        assert_eq!(state.others, ["ids"], "{file}");
        for (name, t) in &state.tensors {
            let wanted = reference(&expected, name);
            assert_eq!(t.shape(), wanted.shape(), "{file}: {name}");
            assert_eq!(t.to_vec::<f32>().unwrap(), wanted.to_vec::<f32>().unwrap(), "{file}: {name}");
        }
        // No byte of them is trusted.
        let bytes = fs::read(foreign("torch").join(file)).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(file);
        for at in (0..bytes.len()).step_by(7) {
            fs::write(&path, &bytes[..at]).unwrap();
            assert!(read_state_dict(&path).unwrap_err().to_string().contains(file), "{file} cut at {at}");
            let mut bad = bytes.clone();
            bad[at] ^= 0x81;
            fs::write(&path, bad).unwrap();
            let _ = read_state_dict(&path);
        }
    }
}

#[test]
fn adapters_of_loralib_go_both_ways() {
    let about = about();
    for (name, case) in about["loralib"].as_object().unwrap() {
        let model = base(case["model"].as_str().unwrap());
        let path = foreign("loralib").join(format!("{name}.pt"));
        let parts: Vec<String> = match &case["enable_lora"] {
            Value::Array(flags) => {
                ["q", "k", "v"].iter().zip(flags).filter(|(_, on)| **on == true).map(|(p, _)| p.to_string()).collect()
            }
            _ => Vec::new(),
        };
        let alpha = case["lora_alpha"].as_f64().unwrap();
        let (config, adapted) = convert::from_loralib(&path, &*model, alpha, &parts).unwrap();
        assert_eq!(json!(config.rank), case["r"], "{name}");
        let far = off(&*model, &adapted, &format!("loralib.{name}"));
        assert!(far < 1e-5, "{name}: {far:e}");

        // As PEFT's adapter it is the one that the rule says: rank n·r and α·n.
        let dir = tempfile::tempdir().unwrap();
        adapter::save(dir.path(), "lora", &Options::from(&config), &adapted, &*model, None).unwrap();
        let saved: Value = serde_json::from_slice(&fs::read(dir.path().join(adapter::CONFIG_FILE)).unwrap()).unwrap();
        let n = parts.len().max(1);
        assert_eq!(
            (&saved["r"], &saved["lora_alpha"]),
            (&json!(n * config.rank), &json!(n * alpha as usize)),
            "{name}"
        );
        let far = off(&*model, &adapter::attach(dir.path(), &*model, &CPU).unwrap(), &format!("loralib.{name}"));
        assert!(far < 1e-5, "{name} saved: {far:e}");

        // And back, number for number.
        let back = convert::to_loralib(&adapter::load(dir.path()).unwrap(), &*model).unwrap();
        assert_eq!((back.r, back.alpha), (config.rank, alpha), "{name}");
        let enabled: Vec<Value> = back.enable_lora.values().map(|flags| json!(flags)).collect();
        let wanted = if parts.is_empty() { vec![] } else { vec![case["enable_lora"].clone()] };
        assert_eq!(enabled, wanted, "{name}");
        let original = read_state_dict(&path).unwrap().tensors;
        same(&back.tensors, &original, name);
        let written = dir.path().join("back.pt");
        convert::write_state_dict(&written, &back.tensors).unwrap();
        same(&read_state_dict(&written).unwrap().tensors, &original, name);
        // Where the shapes leave one choice, nothing has to be said; else it does.
        match convert::from_loralib(&path, &*model, alpha, &[]) {
            Ok((again, _)) => assert!(n != 2 && name != "gpt2_v" && again.rank == config.rank, "{name}"),
            Err(e) => assert!(e.to_string().contains("--parts") && !parts.is_empty(), "{name}: {e}"),
        }
    }
}

fn same(found: &BTreeMap<String, Tensor>, wanted: &BTreeMap<String, Tensor>, what: &str) {
    assert_eq!(found.keys().collect::<Vec<_>>(), wanted.keys().collect::<Vec<_>>(), "{what}");
    for (name, t) in found {
        assert_eq!(t.to_vec::<f32>().unwrap(), wanted[name].to_vec::<f32>().unwrap(), "{what}: {name}");
    }
}

/// An adapter of LoRA with every parameter away from where it began, saved here.
fn saved(model: &dyn Model, config: LoraConfig) -> (tempfile::TempDir, Adapted) {
    let lora = Lora::new(config.clone()).unwrap();
    let mut adapted = Adapted::new(&lora, model, &CPU, DType::F32, 3).unwrap();
    disturb(&mut adapted.params, 0.3);
    let dir = tempfile::tempdir().unwrap();
    adapter::save(dir.path(), "lora", &Options::from(&config), &adapted, model, None).unwrap();
    (dir, adapted)
}

/// loralib's file has one α: another one of a module goes into its A.
#[test]
fn an_alpha_of_a_module_goes_into_its_factor() {
    let model = base("gpt2");
    let config = |rslora| LoraConfig {
        rank: 4,
        alpha: 8.0,
        rslora,
        targets: ["c_attn", "c_fc"].into_iter().collect(),
        alpha_pattern: vec![("c_fc".into(), 3.0), ("h.1.attn.c_attn".into(), 20.0)],
        ..LoraConfig::default()
    };
    for rslora in [false, true] {
        let (dir, adapted) = saved(&*model, config(rslora));
        let out = convert::to_loralib(&adapter::load(dir.path()).unwrap(), &*model).unwrap();
        let path = dir.path().join("lora.pt");
        convert::write_state_dict(&path, &out.tensors).unwrap();
        let (_, back) = convert::from_loralib(&path, &*model, out.alpha, &[]).unwrap();
        let far = relative(&logits(&*model, &back), &logits(&*model, &adapted));
        assert!(far < 1e-6, "rslora {rslora}: {far:e}");
    }
}

/// The logits of a short text, of one sequence.
fn logits(model: &dyn Model, adapted: &Adapted) -> Tensor {
    let batch = model.batch(adapted, &Texts::new(&[5, 17, 9, 3, 42], &[5])).unwrap();
    model.logits(adapted, &batch).unwrap()
}

#[test]
fn biases_and_heads_go_to_loralib_and_back() {
    for (name, bias, of_head, biases) in [
        ("gpt2", Bias::All, 0, 13),
        ("gpt2", Bias::LoraOnly, 0, 2),
        ("bert_classification", Bias::None, 2, 0),
        ("roberta_classification", Bias::LoraOnly, 4, 2),
    ] {
        let model = base(name);
        let target = if name == "gpt2" { "c_attn" } else { "query" };
        let targets = [target].into_iter().collect();
        let (dir, adapted) = saved(&*model, LoraConfig { rank: 4, bias, targets, ..LoraConfig::default() });
        let out = convert::to_loralib(&adapter::load(dir.path()).unwrap(), &*model).unwrap();
        let is_of_head = |name: &&String| model.outline().is_saved_module(name);
        let is_bias = |name: &&String| name.ends_with(".bias") && !is_of_head(name);
        let count = |is: &dyn Fn(&&String) -> bool| out.tensors.keys().filter(is).count();
        assert_eq!((count(&is_of_head), count(&is_bias)), (of_head, biases), "{name} {bias:?}");

        let path = dir.path().join("lora.pt");
        convert::write_state_dict(&path, &out.tensors).unwrap();
        let (config, back) = convert::from_loralib(&path, &*model, out.alpha, &[]).unwrap();
        assert_eq!(config.bias, bias, "{name}");
        let [ours, theirs] = [&adapted, &back].map(|adapted| logits(&*model, adapted).to_vec::<f32>().unwrap());
        assert_eq!(ours, theirs, "{name} {bias:?}");
    }
}

#[test]
fn what_loralib_has_no_place_for_is_refused() {
    let model = base("gpt2");
    let config =
        |targets: &[&str]| LoraConfig { rank: 4, targets: targets.iter().copied().collect(), ..LoraConfig::default() };
    for (config, wanted) in [
        (
            LoraConfig { rank_pattern: vec![("c_fc".into(), 2)], ..config(&["c_attn", "c_fc"]) },
            &["rank_pattern", "h.0.mlp.c_fc has rank 2", "h.0.attn.c_attn has 4"][..],
        ),
        (config(&["h.0.attn.c_attn.q", "h.1.attn.c_attn.v"]), &["h.0.attn.c_attn", "h.1.attn.c_attn", "enable_lora"]),
        (config(&["h.0.attn.c_attn", "h.1.attn.c_attn.v"]), &["h.0.attn.c_attn", "h.1.attn.c_attn", "enable_lora"]),
        (config(&["c_attn", "wte"]), &["no place for transformer.wte", "lora.Embedding"]),
        (LoraConfig { modules_to_save: vec!["ln_f".into()], ..config(&["c_attn"]) }, &["ln_f", "as a whole"]),
    ] {
        let (dir, _) = saved(&*model, config);
        let e = convert::to_loralib(&adapter::load(dir.path()).unwrap(), &*model).unwrap_err().to_string();
        assert!(wanted.iter().all(|part| e.contains(part)), "no {wanted:?} in {e}");
    }
}

#[test]
fn what_is_not_loralibs_is_refused() {
    let (gpt2, llama) = (base("gpt2"), base("llama2"));
    let path = foreign("loralib/gpt2_qv.pt");
    let refused = |path: &std::path::Path, base: &dyn Model, parts: &[&str]| {
        let parts: Vec<String> = parts.iter().map(|p| p.to_string()).collect();
        convert::from_loralib(path, base, 8.0, &parts).unwrap_err().to_string()
    };
    for (e, part) in [
        (refused(&path, &*llama, &["q", "v"]), "no linear maps transformer.h.0.attn.c_attn"),
        (refused(&path, &*gpt2, &["q"]), "2 updates of 64 outputs in all, and the parts q have 32"),
        (refused(&path, &*gpt2, &["q", "x"]), "no part x; it has q, k, v"),
        (refused(&path, &*gpt2, &[]), "--parts"),
        (refused(&foreign("torch/state.pt"), &*gpt2, &[]), "no lora_A or lora_B"),
        (refused(&foreign("foreign.json"), &*gpt2, &[]), "no file of torch.save"),
        (refused(&foreign("none.pt"), &*gpt2, &[]), "none.pt"),
    ] {
        assert!(e.contains(part), "no {part:?} in {e}");
    }
    assert!(convert::from_loralib(&path, &*gpt2, -1.0, &["q".into(), "v".into()]).is_err());
    let dir = tempfile::tempdir().unwrap();
    let mut tensors = read_state_dict(&path).unwrap().tensors;
    let bias = Tensor::from_slice(&CPU, &[96], &[0f32; 96]).unwrap();
    tensors.insert("transformer.h.0.attn.c_attn.bias".into(), bias);
    let with_bias = dir.path().join("bias.pt");
    convert::write_state_dict(&with_bias, &tensors).unwrap();
    let e = refused(&with_bias, &*gpt2, &["q", "v"]);
    assert!(e.contains("h.0.attn.c_attn.bias") && e.contains("neither those of all modules nor"), "{e}");
    // What failed to train.
    let name = "transformer.h.1.attn.c_attn.lora_B";
    let shape = tensors[name].shape().to_vec();
    let mut values = tensors[name].to_vec::<f32>().unwrap();
    values[3] = f32::NAN;
    let sound = tensors.insert(name.into(), Tensor::from_slice(&CPU, &shape, &values).unwrap());
    convert::write_state_dict(&with_bias, &tensors).unwrap();
    let e = refused(&with_bias, &*gpt2, &["q", "v"]);
    assert!(e.contains("h.1.attn.c_attn.lora_B holds a NaN"), "{e}");
    tensors.extend(sound.map(|t| (name.to_owned(), t)));
    // One module's A alone.
    tensors.retain(|name, _| name.ends_with("h.0.attn.c_attn.lora_A"));
    convert::write_state_dict(&with_bias, &tensors).unwrap();
    assert!(refused(&with_bias, &*gpt2, &["q", "v"]).contains("only one of lora_A and lora_B"));
}

/// A classifier's head goes into AdapterHub's file of the head, under the names that its model has.
#[test]
fn heads_go_to_adapterhub_and_back() {
    let model = base("bert_classification");
    let options = Options { bottleneck: 3, ..Options::default() };
    let method = (find("adapter-p").unwrap().build)(&options).unwrap();
    let mut adapted = Adapted::new(&*method, &*model, &CPU, DType::F32, 3).unwrap();
    disturb(&mut adapted.params, 0.3);
    let (ours, hub) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    adapter::save(ours.path(), "adapter-p", &options, &adapted, &*model, None).unwrap();
    convert::to_adapterhub(&adapter::load(ours.path()).unwrap(), &*model, "golden", hub.path()).unwrap();
    let head = read_state_dict(&hub.path().join("pytorch_model_head.bin")).unwrap().tensors;
    assert_eq!(head.keys().collect::<Vec<_>>(), ["classifier.bias", "classifier.weight"]);
    let (_, _, back) = convert::from_adapterhub(hub.path(), &*model).unwrap();
    let [ours, theirs] = [&adapted, &back].map(|adapted| logits(&*model, adapted).to_vec::<f32>().unwrap());
    assert_eq!(ours, theirs);
}

#[test]
fn adapters_of_adapterhub_go_both_ways() {
    let about = about();
    let mut seen = 0;
    for (name, case) in about["adapterhub"].as_object().unwrap() {
        let model = base(case["model"].as_str().unwrap());
        let dir = foreign("adapterhub").join(name);
        let method = case["method"].as_str().unwrap();
        let (found, options, adapted) = convert::from_adapterhub(&dir, &*model).unwrap();
        let swish = (method == "swish").then_some(Activation::Silu);
        let method = match method {
            "swish" => "adapter-h",
            "prefix" | "prefix-mlp" => "pre-layer",
            other => other,
        };
        assert_eq!(options.count_prefix, method != "pre-layer");
        assert_eq!((found, options.non_linearity), (method, swish), "{name}");
        let far = off(&*model, &adapted, &format!("adapterhub.{name}"));
        assert!(far < 1e-5, "{name}: {far:e}");

        let (ours, hub) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        adapter::save(ours.path(), method, &options, &adapted, &*model, None).unwrap();
        convert::to_adapterhub(&adapter::load(ours.path()).unwrap(), &*model, "golden", hub.path()).unwrap();
        let [back, original] =
            [hub.path(), &dir].map(|d| read_state_dict(&d.join("pytorch_adapter.bin")).unwrap().tensors);
        // A prefix is written once, not for every layer, and a reparametrised one as its table.
        let original = original.into_iter().filter(|(n, _)| method != "pre-layer" || !n.contains(".pool.")).collect();
        if case["method"] != "prefix-mlp" {
            same(&back, &original, name);
        }
        let [back, original] = [hub.path(), &dir].map(|d| {
            let text = fs::read_to_string(d.join("adapter_config.json")).unwrap();
            serde_json::from_str::<Value>(&text).unwrap()
        });
        for (key, value) in back["config"].as_object().unwrap() {
            let wanted = &original["config"][key];
            if case["method"] == "prefix-mlp" && ["flat", "bottleneck_size"].contains(&key.as_str()) {
                continue;
            }
            assert!(value == wanted || value.as_f64() == wanted.as_f64(), "{name}: {key} = {value}, not {wanted}");
        }
        for key in ["model_type", "name", "hidden_size", "version"] {
            assert_eq!(back[key], original[key], "{name}: {key}");
        }
        seen += 1;
    }
    assert_eq!(seen, 14);
}

#[test]
fn other_kinds_of_adapterhub_are_refused_by_their_option() {
    let model = base("roberta_masked_lm");
    let golden = foreign("adapterhub/roberta_masked_lm-adapter-p");
    let text = fs::read_to_string(golden.join("adapter_config.json")).unwrap();
    let config: Value = serde_json::from_str(&text).unwrap();
    let dir = tempfile::tempdir().unwrap();
    fs::copy(golden.join("pytorch_adapter.bin"), dir.path().join("pytorch_adapter.bin")).unwrap();
    let refused = |change: &dyn Fn(&mut Value)| {
        let mut config = config.clone();
        change(&mut config);
        fs::write(dir.path().join("adapter_config.json"), config.to_string()).unwrap();
        convert::from_adapterhub(dir.path(), &*model).unwrap_err().to_string()
    };
    for (key, value) in [
        ("is_parallel", json!(true)),
        ("ln_before", json!(true)),
        ("ln_after", json!(true)),
        ("scaling", json!(4.0)),
        ("scaling", json!("learned")),
        ("use_gating", json!(true)),
        ("residual_before_ln", json!("post_add")),
        ("inv_adapter", json!("nice")),
        ("leave_out", json!([1])),
        ("phm_layer", json!(true)),
        ("original_ln_after", json!(false)),
        ("mh_adapter", json!(true)),
        ("original_ln_before", json!(false)),
        ("non_linearity", json!("leakyrelu")),
        ("non_linearity", json!(7)),
        ("architecture", json!("lora")),
    ] {
        let e = refused(&|c: &mut Value| c["config"][key] = value.clone());
        assert!(e.contains(key) && e.contains("adapter_config.json"), "{key}: {e}");
    }
    for (e, part) in [
        (refused(&|c| c["model_type"] = json!("bert")), "architecture bert, not on roberta"),
        (refused(&|c| c["name"] = json!("other")), "no place for"),
        (refused(&|c| c["name"] = Value::Null), "name"),
        (refused(&|c| c["config"] = json!("pfeiffer")), "config"),
        (refused(&|c| *c = json!({})), "name"),
    ] {
        assert!(e.contains(part), "no {part:?} in {e}");
    }
    // Files from before there was a version call the approximation gelu, and gelu another name.
    let golden = foreign("adapterhub/roberta_masked_lm-adapter-h");
    let mut config: Value =
        serde_json::from_str(&fs::read_to_string(golden.join("adapter_config.json")).unwrap()).unwrap();
    fs::copy(golden.join("pytorch_adapter.bin"), dir.path().join("pytorch_adapter.bin")).unwrap();
    config.as_object_mut().unwrap().remove("version");
    let mut old = |name: &str| {
        config["config"]["non_linearity"] = json!(name);
        fs::write(dir.path().join("adapter_config.json"), config.to_string()).unwrap();
        convert::from_adapterhub(dir.path(), &*model)
    };
    assert_eq!(old("gelu").unwrap().1.non_linearity, Some(Activation::GeluTanh));
    assert_eq!(old("gelu_orig").unwrap().1.non_linearity, None);
    // The other way: what AdapterHub has no place for.
    let gpt2 = base("gpt2");
    let lora = adapter::load(&goldens().join("gpt2/adapter")).unwrap();
    let e = convert::to_adapterhub(&lora, &*gpt2, "x", dir.path()).unwrap_err().to_string();
    assert!(e.contains("method lora"), "{e}");
}
