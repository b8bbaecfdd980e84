//! Adapters saved, loaded and merged; PEFT's own files; every bad file provoked.

use std::{collections::BTreeMap, fs, path::Path};

use half::{bf16, f16};
use lora_core::{
    Tensor,
    peft::{Adapted, Full, Lora, LoraConfig, Options},
};
use lora_kernels::{DType, Device};
use lora_model::{Batch, Error, Gpt2, Model, Texts, adapter, checkpoint::TensorFile, config::Gpt2Config, load};
use serde_json::{Value, json};

use crate::common::{copied, edit, goldens, refused, rename, saved_config, set};

const CPU: Device = Device::Cpu;
const A: &str = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight";
const B: &str = "base_model.model.transformer.h.0.attn.c_attn.lora_B.weight";

fn golden(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/gpt2").join(name)
}

fn model() -> Box<dyn Model> {
    load(&golden("model"), &CPU).unwrap()
}

fn batch(model: &dyn Model) -> Batch {
    let texts = Texts::new(&[5, 17, 99, 3, 42, 8, 8, 61, 0, 77], &[4, 6]);
    model.batch(&Adapted::none(&CPU).unwrap(), &texts).unwrap()
}

/// Saves what LoRA trained.
fn save(
    dir: &Path,
    config: &LoraConfig,
    adapted: &Adapted,
    base: &dyn Model,
    name: Option<&str>,
) -> lora_model::Result<()> {
    adapter::save(dir, "lora", &Options::from(config), adapted, base, name)
}

/// A LoRA configuration of rank 2 with α 5 and dropout 0.25.
fn config(targets: &[&str], rslora: bool) -> LoraConfig {
    let targets = targets.iter().copied().collect();
    LoraConfig { rank: 2, alpha: 5.0, dropout: 0.25, rslora, targets, ..LoraConfig::default() }
}

/// The base adapted, with random numbers in every B too.
fn adapted(model: &dyn Model, config: &LoraConfig) -> Adapted {
    let lora = Lora::new(config.clone()).unwrap();
    let mut adapted = Adapted::new(&lora, model, &CPU, DType::F32, 7).unwrap();
    let (mut state, ids) = (1u64, adapted.params.ids());
    for id in ids {
        let shape = adapted.params.shape(id).to_vec();
        let mut next = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1 << 24) as f32 - 0.5
        };
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| next()).collect();
        adapted.params.set(id, &Tensor::from_slice(&CPU, &shape, &values).unwrap()).unwrap();
    }
    adapted
}

fn bits(t: &Tensor) -> Vec<u32> {
    t.to_vec::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

fn relative(x: &Tensor, reference: &Tensor) -> f64 {
    let (x, r) = (x.to_f64().unwrap(), reference.to_f64().unwrap());
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
    norm(&mut x.iter().zip(&r).map(|(x, r)| x - r)) / norm(&mut r.iter().copied())
}

/// Targets, whether rsLoRA, and what the saved configuration says: r, lora_alpha, target_modules, rank_pattern.
fn cases() -> Vec<(Vec<&'static str>, bool, Value)> {
    let root2 = std::f64::consts::SQRT_2;
    vec![
        (vec!["c_attn"], false, json!([2, 5, ["c_attn"], {}, {}])),
        (vec!["c_attn", "c_fc", "c_proj"], true, json!([2, 5, ["c_attn", "c_fc", "c_proj"], {}, {}])),
        (vec!["c_attn.q", "c_attn.v"], false, json!([4, 10, ["c_attn"], {}, {}])),
        (vec!["c_attn.v", "c_attn.q"], true, json!([4, 5.0 * root2, ["c_attn"], {}, {}])),
        (vec!["c_attn.v"], false, json!([2, 5, ["c_attn"], {}, {}])),
        (
            vec!["c_attn.q", "mlp.c_proj", "c_attn.k", "c_attn.v"],
            false,
            json!([2, 5, ["c_attn", "mlp.c_proj"], {"c_attn": 6}, {"c_attn": 15}]),
        ),
        (
            vec!["c_attn.q", "h.1.attn.c_attn.v"],
            true,
            json!([2, 5, ["c_attn", "h.1.attn.c_attn"], {"h.1.attn.c_attn": 4}, {"h.1.attn.c_attn": 5.0 * root2}]),
        ),
    ]
}

#[test]
fn saving_and_loading_gives_the_same_adapter() {
    let model = model();
    for (targets, rslora, wanted) in cases() {
        let (dir, c) = (tempfile::tempdir().unwrap(), config(&targets, rslora));
        let before = adapted(&*model, &c);
        save(dir.path(), &c, &before, &*model, Some("gpt2")).unwrap();
        let file = adapter::load(dir.path()).unwrap();
        assert_eq!(LoraConfig::from(&file.options), c, "{targets:?}");
        assert_eq!(file.base_model_name_or_path.as_deref(), Some("gpt2"));
        let after = file.attach(&*model, &CPU).unwrap();
        // Parts are parts again, bit for bit.
        assert_eq!(after.params.ids().len(), before.params.ids().len(), "{targets:?}");
        for id in before.params.ids() {
            assert_eq!(after.params.name(id), before.params.name(id), "{targets:?}");
            assert_eq!(bits(&after.params.tensor(id)), bits(&before.params.tensor(id)), "{targets:?}");
        }
        let logits = |a| bits(&model.logits(a, &batch(&*model)).unwrap());
        assert_eq!(logits(&after), logits(&before), "{targets:?}");

        let saved = saved_config(dir.path());
        let keys = ["r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern"];
        assert_eq!(Value::from_iter(keys.map(|k| saved[k].clone())), wanted, "{targets:?}");
        for (key, value) in [
            ("peft_type", json!("LORA")),
            ("task_type", json!("CAUSAL_LM")),
            ("bias", json!("none")),
            ("fan_in_fan_out", json!(true)),
            ("inference_mode", json!(true)),
            ("lora_dropout", json!(0.25)),
            ("use_rslora", json!(rslora)),
            ("use_dora", json!(false)),
            ("modules_to_save", Value::Null),
            ("init_lora_weights", json!(true)),
        ] {
            assert_eq!(saved.get(key), Some(&value), "{key}");
        }
        let names: Vec<&String> = saved.as_object().unwrap().keys().collect();
        assert!(names.is_sorted(), "{names:?}");

        // Saved again, it is the same file.
        let again = tempfile::tempdir().unwrap();
        save(again.path(), &c, &after, &*model, Some("gpt2")).unwrap();
        for file in [adapter::CONFIG_FILE, adapter::WEIGHTS_FILE] {
            let read = |d: &tempfile::TempDir| fs::read(d.path().join(file)).unwrap();
            assert!(read(&again) == read(&dir), "{targets:?} {file}");
        }
    }
}

#[test]
fn parts_are_saved_as_blocks_of_the_module() {
    let (model, dir, c) = (model(), tempfile::tempdir().unwrap(), config(&["c_attn.v", "c_attn.q"], false));
    let adapted = adapted(&*model, &c);
    save(dir.path(), &c, &adapted, &*model, None).unwrap();
    let file = TensorFile::open(&dir.path().join(adapter::WEIGHTS_FILE)).unwrap();
    assert_eq!(file.metadata()["format"], "pt");
    let [a, b] = [(A, [4, 32]), (B, [96, 4])].map(|(n, s)| file.tensor(n, &s, &CPU).unwrap().to_vec::<f32>().unwrap());
    let part = |name: &str| {
        let id = adapted.params.find(&format!("transformer.h.0.attn.c_attn.{name}.weight")).unwrap();
        adapted.params.tensor(id).to_vec::<f32>().unwrap()
    };
    assert_eq!(a, [part("q.lora_A"), part("v.lora_A")].concat());
    let (q, v) = (part("q.lora_B"), part("v.lora_B"));
    for row in 0..96 {
        let wanted = match row {
            0..32 => [q[2 * row], q[2 * row + 1], 0.0, 0.0],
            32..64 => [0.0; 4],
            _ => [0.0, 0.0, v[2 * (row - 64)], v[2 * (row - 64) + 1]],
        };
        assert_eq!(b[4 * row..4 * row + 4], wanted, "row {row}");
    }
}

/// What PEFT does with our file: without the memory of the parts it is one adapter of whole modules.
#[test]
fn the_block_adapter_alone_computes_the_same() {
    let model = model();
    for (targets, rslora, wanted) in cases() {
        let (dir, c) = (tempfile::tempdir().unwrap(), config(&targets, rslora));
        let before = adapted(&*model, &c);
        save(dir.path(), &c, &before, &*model, None).unwrap();
        forget_parts(dir.path());
        let file = adapter::load(dir.path()).unwrap();
        assert_eq!(json!(file.options.rank), wanted[0]);
        let whole = file.attach(&*model, &CPU).unwrap();
        let [x, reference] = [&whole, &before].map(|a| model.logits(a, &batch(&*model)).unwrap());
        let error = relative(&x, &reference);
        assert!(error < 1e-6, "{targets:?}: {error:e}");
    }
}

fn forget_parts(dir: &Path) {
    edit(dir, |header, _| {
        header["__metadata__"] = json!({"format": "pt"});
    });
}

#[test]
fn merged_and_saved_it_computes_the_same() {
    let model = model();
    let mut configs: Vec<LoraConfig> = cases().iter().map(|(t, rslora, _)| config(t, *rslora)).collect();
    // The parts' ranks add up to 36, beyond the 32 inputs of the module.
    configs.push(LoraConfig { rank: 12, ..config(&["c_attn.q", "c_attn.k", "c_attn.v"], false) });
    for c in configs {
        let dir = tempfile::tempdir().unwrap();
        let adapted = adapted(&*model, &c);
        let reference = model.logits(&adapted, &batch(&*model)).unwrap();
        save(dir.path(), &c, &adapted, &*model, None).unwrap();
        let loaded = adapter::attach(dir.path(), &*model, &CPU).unwrap();
        model.save(dir.path(), &loaded.merged(&*model).unwrap()).unwrap();
        let merged = load(dir.path(), &CPU).unwrap();
        let error = relative(&merged.logits(&Adapted::none(&CPU).unwrap(), &batch(&*merged)).unwrap(), &reference);
        assert!(error < 1e-5, "{c:?}: {error:e}");
        let base = relative(&model.logits(&Adapted::none(&CPU).unwrap(), &batch(&*model)).unwrap(), &reference);
        assert!(base > 1e-2, "{c:?}: the adapter does too little to test: {base:e}");
    }
}

#[test]
fn a_thousand_merges_leave_the_base_as_it_was() {
    let model = model();
    let all = |m: &dyn Model| m.tensors().map(|(n, t)| (n.to_owned(), bits(t))).collect::<BTreeMap<_, _>>();
    let before = all(&*model);
    let logits = |m: &dyn Model| bits(&m.logits(&Adapted::none(&CPU).unwrap(), &batch(m)).unwrap());
    let first = logits(&*model);
    let adapted = adapted(&*model, &config(&["c_attn.q", "c_attn.v"], false));
    for _ in 0..1000 {
        assert_eq!(adapted.merged(&*model).unwrap().len(), 2);
    }
    assert!(all(&*model) == before);
    assert_eq!(logits(&*model), first);
}

#[test]
fn pefts_own_files_load() {
    let model = model();
    for (name, rank, alpha, rslora, targets) in [
        ("adapter", 4, 8.0, false, &["c_attn"][..]),
        ("adapter_all", 3, 6.0, true, &["attn.c_proj", "c_attn", "c_fc", "mlp.c_proj"]),
    ] {
        let file = adapter::load(&golden(name)).unwrap();
        let targets = targets.iter().copied().collect();
        assert_eq!(
            LoraConfig::from(&file.options),
            LoraConfig { rank, alpha, rslora, targets, ..LoraConfig::default() }
        );
        assert_eq!(file.base_model_name_or_path.as_deref(), Some("model"));
        let adapted = file.attach(&*model, &CPU).unwrap();
        // Saved here, its tensors are the same bytes.
        let dir = tempfile::tempdir().unwrap();
        save(dir.path(), &LoraConfig::from(&file.options), &adapted, &*model, Some("model")).unwrap();
        let again = adapter::load(dir.path()).unwrap();
        assert_eq!(LoraConfig::from(&again.options), LoraConfig::from(&file.options));
        let all = |f: &adapter::AdapterFile| f.tensors.iter().map(|(n, t)| (n.clone(), bits(t))).collect::<Vec<_>>();
        assert!(all(&again) == all(&file), "{name}");
    }
}

#[test]
fn names_with_an_adapters_name_and_half_precision_load() {
    let model = model();
    for dtype in ["F16", "BF16"] {
        let dir = copy("adapter");
        edit(dir.path(), |header, data| {
            let (mut bytes, mut tensors) = (Vec::new(), json!({}));
            for (name, t) in header.as_object().unwrap().iter().filter(|(n, _)| *n != "__metadata__") {
                let [from, to] = [0, 1].map(|i| t["data_offsets"][i].as_u64().unwrap() as usize);
                let start = bytes.len();
                for x in data[from..to].as_chunks::<4>().0 {
                    let x = f32::from_le_bytes(*x);
                    bytes.extend(if dtype == "F16" {
                        f16::from_f32(x).to_le_bytes()
                    } else {
                        bf16::from_f32(x).to_le_bytes()
                    });
                }
                let name = name.replace(".weight", ".default.weight");
                tensors[name] = json!({"dtype": dtype, "shape": t["shape"], "data_offsets": [start, bytes.len()]});
            }
            (*header, *data) = (tensors, bytes);
        });
        let [half, full] =
            [dir.path(), &golden("adapter")].map(|d| adapter::attach(d, &*model, &CPU).unwrap().params.flat());
        let error = relative(&half, &full);
        assert!(error > 1e-5 && error < 4e-3, "{dtype}: {error:e}");
    }
}

/// Saving over another adapter: whatever the moment, no configuration stands beside tensors of another.
#[test]
fn another_adapter_in_the_folder_is_replaced_or_kept_whole() {
    let (model, dir) = (model(), tempfile::tempdir().unwrap());
    let (first, second) = (config(&["c_attn"], false), config(&["c_attn.q", "c_attn.v"], true));
    save(dir.path(), &first, &adapted(&*model, &first), &*model, None).unwrap();
    save(dir.path(), &second, &adapted(&*model, &second), &*model, None).unwrap();
    assert_eq!(LoraConfig::from(&adapter::load(dir.path()).unwrap().options), second);

    // A folder in the tensors' place makes writing fail: the old configuration is put back.
    let weights = dir.path().join(adapter::WEIGHTS_FILE);
    fs::remove_file(&weights).unwrap();
    fs::create_dir(&weights).unwrap();
    let before = saved_config(dir.path());
    let e = save(dir.path(), &first, &adapted(&*model, &first), &*model, None).unwrap_err();
    assert!(matches!(e, Error::Io { .. }) && e.to_string().contains(adapter::WEIGHTS_FILE), "{e}");
    assert_eq!(saved_config(dir.path()), before);

    // What a kill between the two files leaves is no adapter.
    fs::remove_dir(&weights).unwrap();
    save(dir.path(), &first, &adapted(&*model, &first), &*model, None).unwrap();
    fs::remove_file(dir.path().join(adapter::CONFIG_FILE)).unwrap();
    assert!(!adapter::is_adapter(dir.path()));
    refused(dir.path(), &*model, &["adapter_config.json", "could not read"]);
}

#[test]
#[should_panic(expected = "no adapter to save")]
fn full_fine_tuning_is_no_adapter() {
    let (model, dir) = (model(), tempfile::tempdir().unwrap());
    let full = Adapted::new(&Full, &*model, &CPU, DType::F32, 0).unwrap();
    let _ = save(dir.path(), &config(&["c_attn"], false), &full, &*model, None);
}

// Bad files -----------------------------------------------------------------------------------------------------------

/// A copy of one of PEFT's adapters.
fn copy(name: &str) -> tempfile::TempDir {
    copied(&golden(name))
}

#[test]
fn bad_configurations_are_refused_by_key() {
    let model = model();
    for (key, value, wanted) in [
        ("peft_type", json!("OFT"), &["OFT", "\"LORA\""][..]),
        ("peft_type", Value::Null, &["no configuration of a PEFT adapter"]),
        ("task_type", json!("SEQ_CLS"), &["SEQ_CLS", "CAUSAL_LM"]),
        ("bias", json!("some"), &["some", "lora_only"]),
        ("use_dora", json!(true), &["adapter_model.safetensors", "c_attn.lora_magnitude_vector"]),
        ("use_rslora", json!("yes"), &["true or false"]),
        ("use_something_new", json!(true), &["variant of LoRA is not supported"]),
        ("modules_to_save", json!(["lm_head"]), &["lm_head", "no module"]),
        ("modules_to_save", json!(["wte"]), &["wte", "the output head too"]),
        ("layers_to_transform", json!([2]), &["2", "the model has 2 layers"]),
        ("layers_to_transform", json!("all"), &["a layer's number", "all"]),
        ("layers_pattern", json!("h"), &["goes with layers-to-transform"]),
        ("exclude_modules", json!("(c_fc"), &["(c_fc", "no regular expression"]),
        ("target_parameters", json!(["wte"]), &["not supported"]),
        ("init_lora_weights", json!("pissa_niter_4"), &["pissa_niter_4", "path_initial_model_for_weight_conversion"]),
        ("init_lora_weights", json!("corda"), &["corda", "path_initial_model_for_weight_conversion"]),
        ("init_lora_weights", json!("loftq"), &["loftq", "path_initial_model_for_weight_conversion"]),
        ("init_lora_weights", json!("lora_ga"), &["lora_ga", "path_initial_model_for_weight_conversion"]),
        ("init_lora_weights", json!("olora"), &["OLoRA", "[in, out]"]),
        ("init_lora_weights", json!("zeros"), &["zeros", "gaussian", "orthogonal"]),
        ("init_lora_weights", json!(3), &["3"]),
        ("target_modules", json!("all-linear"), &["adapter_model.safetensors", "mlp.c_fc.lora_A"]),
        ("target_modules", json!(".*_fc"), &["adapter_model.safetensors", "mlp.c_fc.lora_A"]),
        ("target_modules", json!(".*(attn"), &[".*(attn", "no regular expression"]),
        ("target_modules", json!("attn"), &["`attn`", "attn.c_attn"]),
        ("target_modules", json!(".*(c_attn|ln_1)"), &["ln_1", "no linear map"]),
        ("target_modules", json!([]), &["one or more modules"]),
        ("target_modules", json!([1]), &["one or more modules"]),
        ("target_modules", json!(["q_proj"]), &["q_proj", "attn.c_attn", "mlp.c_fc"]),
        ("target_modules", json!(["c_attn.q"]), &["lora_B.weight", "not zero outside of the blocks"]),
        (
            "target_modules",
            json!(["c_fc"]),
            &["adapter_model.safetensors", "h.0.mlp.c_fc.lora_A", "h.0.attn.c_attn.lora_A"],
        ),
        ("r", json!(0), &["0", "from 1"]),
        ("r", json!(-4), &["whole number", "found -4"]),
        ("r", json!(1e300), &["whole number", "found 1e+300"]),
        ("r", json!(1u64 << 40), &["1099511627776", "from 1 to 1048576"]),
        ("rank_pattern", json!({"c_attn": 0}), &["c_attn=0", "from 1"]),
        ("r", Value::Null, &["missing"]),
        ("r", json!(8), &["adapter_model.safetensors", A, "its rank is 4", "adapter_config.json says that it is 8"]),
        ("lora_alpha", json!(-1), &["positive", "found -1"]),
        ("lora_alpha", json!(1e300), &["at most 1e9"]),
        ("lora_alpha", json!("8"), &["finite number"]),
        ("lora_alpha", Value::Null, &["missing"]),
        ("lora_dropout", json!(1.0), &["[0, 1)", "found 1"]),
        ("rank_pattern", json!({"c_attn": 8}), &[A, "its rank is 4", "says that it is 8"]),
        ("rank_pattern", json!({"*": 4}), &["no regular expression"]),
        ("target_modules", json!(".*attn.*"), &[".*attn.*", "matches transformer.h.0.attn too"]),
        ("rank_pattern", json!([4]), &["module names and numbers"]),
        ("rank_pattern", json!({"c_attn": "4"}), &["whole number for \"c_attn\""]),
        ("alpha_pattern", json!({"c_attn": 0}), &["positive"]),
        ("base_model_name_or_path", json!(3), &["a string"]),
    ] {
        let dir = copy("adapter");
        set(dir.path(), key, value.clone());
        let place = match wanted[0].starts_with("adapter_model") || wanted[0] == A || wanted[0].starts_with("lora_B") {
            true => "adapter_model.safetensors".to_owned(),
            false => format!("adapter_config.json: key {key:?}"),
        };
        println!("{key}: {value}");
        refused(dir.path(), &*model, &[&[place.as_str()], wanted].concat());
    }
}

#[test]
fn what_leaves_nothing_to_adapt_is_refused() {
    let dir = copy("adapter");
    for (key, value) in [("exclude_modules", json!(["c_attn"])), ("modules_to_save", json!(["attn"]))] {
        set(dir.path(), key, value);
        let e = adapter::attach(dir.path(), &*model(), &CPU).unwrap_err().to_string();
        assert!(e.contains("target_modules") && e.contains("nothing would be adapted"), "{e}");
        set(dir.path(), key, Value::Null);
    }
}

#[test]
fn harmless_configurations_are_accepted() {
    let model = model();
    for (key, value) in [
        ("init_lora_weights", json!("gaussian")),
        ("init_lora_weights", json!(false)),
        ("init_lora_weights", json!("orthogonal")),
        ("init_lora_weights", json!("eva")),
        ("init_lora_weights", json!("mica")),
        ("init_lora_weights", json!("pissa")),
        ("target_modules", json!(["c_attn", "attn.c_attn"])),
        ("modules_to_save", json!([])),
        ("fan_in_fan_out", json!(false)),
        ("unknown_size", json!(16)),
        ("task_type", Value::Null),
        ("rank_pattern", json!({"attn.c_attn": 4})),
        ("rank_pattern", json!({".*": 4})),
        ("alpha_pattern", json!({"h.0.attn.c_attn": 3})),
        ("target_modules", Value::Null),
        // PEFT warns of these, or passes over them.
        ("target_modules", json!(["c_attn", "w1"])),
        ("exclude_modules", json!(["q_proj"])),
        ("exclude_modules", json!(".*q_proj")),
        ("rank_pattern", json!({"c_fc": 8})),
        ("alpha_pattern", json!({"c_fc": 8})),
        ("target_modules", json!(r"(?!.*mlp).*c_(?!proj).*")),
        ("exclude_modules", json!(["c_fc"])),
        ("layers_to_transform", json!([0, 1])),
        ("base_model_name_or_path", Value::Null),
    ] {
        let dir = copy("adapter");
        set(dir.path(), key, value);
        adapter::attach(dir.path(), &*model, &CPU).unwrap_or_else(|e| panic!("{key}: {e}"));
    }
    let dir = copy("adapter");
    set(dir.path(), "alpha_pattern", json!({"c_attn": 3}));
    assert_eq!(adapter::load(dir.path()).unwrap().options.alpha_pattern, [("c_attn".to_owned(), 3.0)]);
}

type Edit = Box<dyn Fn(&mut Value, &mut Vec<u8>)>;

#[test]
fn bad_tensors_are_refused_by_name() {
    const PREFIXLESS: &str = "transformer.h.0.attn.c_attn.lora_A.weight";
    const DORA: &str = "base_model.model.transformer.h.0.attn.c_attn.lora_magnitude_vector";
    const ELSEWHERE: &str = "base_model.model.transformer.h.7.attn.c_attn.lora_A.weight";
    let put = |name: &'static str, at: usize, x: f32| -> Edit {
        Box::new(move |h, data| {
            let from = h[name]["data_offsets"][0].as_u64().unwrap() as usize + 4 * at;
            data[from..from + 4].copy_from_slice(&x.to_le_bytes());
        })
    };
    let shape = |name: &'static str, shape: Value| -> Edit { Box::new(move |h, _| h[name]["shape"] = shape.clone()) };
    let rows: Vec<(Edit, &[&str])> = vec![
        (put(A, 5, f32::NAN), &[A, "NaN or an infinity"]),
        (put(B, 383, f32::INFINITY), &[B, "NaN or an infinity"]),
        (shape(A, json!([8, 16])), &[A, "[8, 16]", "its rank is 8", "adapter_config.json says that it is 4"]),
        (shape(B, json!([4, 96])), &[B, "[4, 96]", "its rank is 96", "adapter_config.json says that it is 4"]),
        (shape(A, json!([128])), &[A, "[128]", "a factor is a matrix"]),
        (shape(A, json!([4, 33])), &[A, "needs"]),
        (Box::new(|h, _| h[A]["dtype"] = json!("I32")), &[A, "I32"]),
        (Box::new(rename(A, PREFIXLESS)), &[PREFIXLESS, "another prefix"]),
        (Box::new(rename(A, DORA)), &[DORA, "use_dora = true"]),
        (Box::new(rename(A, ELSEWHERE)), &["missing", A]),
        (
            Box::new(|h, d| {
                rename(A, ELSEWHERE)(h, d);
                rename(B, "base_model.model.transformer.h.7.attn.c_attn.lora_B.weight")(h, d);
            }),
            &["missing", A, B, "unexpected", ELSEWHERE],
        ),
        (
            Box::new(rename(B, "base_model.model.transformer.h.0.attn.c_attn.lora_A.default.weight")),
            &[A, "lora_A.default.weight", "are the same"],
        ),
        (Box::new(|_, data| data.truncate(9)), &["damaged"]),
        (Box::new(|h, data| (*h, *data) = (json!({}), vec![])), &["no tensors"]),
    ];
    let model = model();
    for (change, wanted) in rows {
        let dir = copy("adapter");
        edit(dir.path(), change);
        refused(dir.path(), &*model, &[&["adapter_model.safetensors"], wanted].concat());
    }
}

/// Tensors of another width: the base is another model.
#[test]
fn an_adapter_of_another_base_is_refused_with_both_shapes() {
    let keys =
        json!({"model_type": "gpt2", "n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 101, "n_positions": 40});
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), keys.to_string()).unwrap();
    let raw = lora_model::config::RawConfig::from_dir(dir.path()).unwrap();
    let other = Gpt2::init(Gpt2Config::from_raw(&raw).unwrap(), dir.path(), 0, &CPU).unwrap();
    refused(&golden("adapter"), &other, &["adapter_model.safetensors", A, "[4, 32]", "[4, 16]"]);
}

/// What the file does not hold is refused before there is memory for it.
#[test]
fn options_that_ask_for_far_more_than_the_file_holds_are_refused() {
    let model = model();
    for (rank, wanted) in
        [(8, &["missing", "h.0.mlp.c_fc.lora_A"][..]), (1 << 20, &["holds 1024 numbers", "335545344"])]
    {
        let dir = copy("adapter");
        set(dir.path(), "target_modules", json!(["c_attn", "c_fc"]));
        set(dir.path(), "rank_pattern", json!({"c_fc": rank}));
        refused(dir.path(), &*model, &[&["adapter_model.safetensors"], wanted].concat());
    }
}

#[test]
fn parts_that_contradict_the_configuration_are_refused() {
    let (model, c) = (model(), config(&["c_attn.q", "c_attn.v"], false));
    let parts = |targets: Value, rank: Value, alpha: Value| {
        json!({"targets": targets, "rank": rank, "alpha": alpha}).to_string()
    };
    let qv = json!(["c_attn.q", "c_attn.v"]);
    let rows = [
        ("[]".to_owned(), "adapter_model.safetensors", "lora_parts"),
        (parts(qv.clone(), json!(0), json!(5)), "adapter_model.safetensors", "rank = 0"),
        (parts(qv.clone(), json!(3), json!(5)), "adapter_model.safetensors", "no multiple"),
        (parts(qv.clone(), json!(4), json!(5)), "adapter_config.json", "\"lora_alpha\": 10"),
        (parts(qv.clone(), json!(2), json!(7)), "adapter_config.json", "\"lora_alpha\": 10"),
        (parts(json!(["c_fc", "c_attn.q"]), json!(2), json!(5)), "adapter_config.json", "target_modules"),
        (parts(json!(["c_attn.q", "c_attn.k"]), json!(2), json!(5)), "adapter_model.safetensors", "not zero outside"),
        (parts(json!(["attn.c_attn.q", "c_attn.v"]), json!(2), json!(5)), "adapter_config.json", "target_modules"),
    ];
    for (text, place, wanted) in rows {
        let dir = tempfile::tempdir().unwrap();
        save(dir.path(), &c, &adapted(&*model, &c), &*model, None).unwrap();
        edit(dir.path(), |h, _| h["__metadata__"][adapter::PARTS_KEY] = json!(text));
        println!("{text}");
        refused(dir.path(), &*model, &[place, wanted]);
    }
}

#[test]
fn missing_and_foreign_files_are_named() {
    let model = model();
    let dir = copy("adapter");
    fs::rename(dir.path().join(adapter::WEIGHTS_FILE), dir.path().join("adapter_model.bin")).unwrap();
    refused(dir.path(), &*model, &["adapter_model.bin", "no file of torch.save"]);
    fs::copy(goldens().join("foreign/torch/state.pt"), dir.path().join("adapter_model.bin")).unwrap();
    refused(dir.path(), &*model, &["adapter_model.bin", "no tensor of an adapter: ids"]);
    fs::remove_file(dir.path().join("adapter_model.bin")).unwrap();
    refused(dir.path(), &*model, &["could not read", "adapter_model.safetensors"]);
    fs::remove_file(dir.path().join(adapter::CONFIG_FILE)).unwrap();
    refused(dir.path(), &*model, &["could not read", "adapter_config.json"]);
    refused(&dir.path().join("nowhere"), &*model, &["could not read", "nowhere"]);
    fs::write(dir.path().join(adapter::CONFIG_FILE), "{\"r\": 4,").unwrap();
    refused(dir.path(), &*model, &["adapter_config.json", "not valid JSON"]);
}
