//! Agreement with PEFT on its own adapters, every method and option on a model of each architecture: `golden/peft_matrix.py`
//! wrote what it says, in f64. Whatever lies there is compared.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use crate::common::{CPU, goldens, reference, relative, within};
use lora_core::{Grads, Tape, Tensor, lowrank::Layout, ops, peft::Adapted};
use lora_kernels::{AdamW, DType, adamw};
use lora_model::{Batch, Model, Targets, Texts, adapter, checkpoint::TensorFile, load};
use serde::Deserialize;

#[derive(Deserialize)]
struct Golden {
    sequences: Vec<Vec<u32>>,
    labels: Option<Vec<u32>>,
    /// Within each sequence.
    target_rows: Option<Vec<Vec<u32>>>,
    target_ids: Option<Vec<Vec<u32>>>,
    adamw: Optimiser,
    variants: BTreeMap<String, Variant>,
}

#[derive(Deserialize)]
struct Optimiser {
    lr: f64,
    weight_decay: f64,
}

#[derive(Deserialize)]
struct Variant {
    /// Before each step of training.
    losses: Vec<f64>,
}

impl Golden {
    /// All sequences with their targets, and the number of these.
    fn batch(&self, model: &dyn Model, adapted: &Adapted) -> (Batch, usize) {
        let lengths: Vec<usize> = self.sequences.iter().map(Vec::len).collect();
        let (tokens, segments) = (self.sequences.concat(), vec![0; lengths.iter().sum()]);
        let segments = (model.limits().segments > 0).then_some(&segments[..]);
        let (mut rows, mut ids, mut first) = (Vec::new(), Vec::new(), 0);
        let (targets, count) = match (&self.labels, &self.target_rows, &self.target_ids) {
            (Some(labels), ..) => (Targets::Labels(labels), labels.len()),
            (_, Some(target_rows), Some(target_ids)) => {
                for (n, of) in lengths.iter().zip(target_rows) {
                    rows.extend(of.iter().map(|r| first + r));
                    first += *n as u32;
                }
                ids.extend(target_ids.concat());
                (Targets::Tokens { rows: &rows, ids: &ids }, ids.len())
            }
            _ => panic!("neither labels nor targets"),
        };
        let texts = Texts { segments, ..Texts::new(&tokens, &lengths) };
        (model.batch(adapted, &texts.targets(targets)).unwrap(), count)
    }

    /// The losses before each step of training.
    fn train(&self, model: &dyn Model, adapted: &mut Adapted, steps: usize) -> Vec<f64> {
        let (batch, count) = self.batch(model, adapted);
        let mut grads = Grads::new(&adapted.params).unwrap();
        let n = adapted.params.count();
        let [mut m, mut v] = [0, 1].map(|_| Tensor::zeros(&CPU, DType::F32, &[1, n]).unwrap());
        let step = |step: u64| {
            grads.reset();
            let mut t = Tape::new(&adapted.params);
            let mut loss = model.loss(&mut t, adapted, &batch, 0.0, 1.0 / count as f64).unwrap();
            if let Some(penalty) = adapted.penalty(&mut t).unwrap() {
                loss = ops::add(&mut t, loss, penalty).unwrap();
            }
            let value = loss.value().to_f64().unwrap()[0];
            t.backward(loss, &mut grads).unwrap();
            let Optimiser { lr, weight_decay } = self.adamw;
            let rule = AdamW { lr, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay, step };
            let (p, g) = (adapted.params.flat_mut().unwrap(), grads.flat_mut().unwrap());
            adamw(&rule, p, g.as_mat(), m.make_mut().unwrap(), v.make_mut().unwrap()).unwrap();
            adapted.after_step(step, &mut grads, 1.0).unwrap();
            value
        };
        (1..=steps as u64).map(step).collect()
    }
}

/// The names of a model's variants.
fn variants(model: &str) -> BTreeSet<&'static str> {
    const ALL: &str = "adalora adalora_all_linear adalora_cut all_linear bias_all bias_lora_only default dora dora_patterns \
        embedding embedding_pissa embeddings exclude exclude_regex gaussian ia3 ia3_feedforward init_false layers_pattern \
        layers_to_transform ln_tuning ln_tuning_some lookahead modules_to_save orthogonal patterns pissa pissa_dora \
        pissa_moved pissa_rslora prefix prompt rank_above regex rslora vera vera_all_linear vera_drawn";
    // For weights [out, in].
    const LINEAR: &str = "lokr lokr_both lokr_layers lokr_patterns olora";
    // Of models that continue text.
    const CAUSAL: &str = "pissa_converted";
    let lists: &[&'static str] = match model {
        "gpt2" => &[ALL, CAUSAL],
        "bert_classification" | "roberta_classification" => &[ALL, LINEAR],
        "llama3" | "qwen2" => &[ALL, LINEAR, CAUSAL],
        "llama2" => &["lm_head lm_head_alone lm_head_embedding lm_head_pissa"],
        other => panic!("a model that has no goldens: {other}"),
    };
    lists.iter().flat_map(|list| list.split_whitespace()).collect()
}

/// Every model with its variants.
fn each(check: impl Fn(&str, &Path, &Golden, &Variant, &dyn Model, &TensorFile)) {
    let folder = goldens().join("peft");
    let mut files: Vec<PathBuf> = fs::read_dir(&folder).unwrap().map(|e| e.unwrap().path()).collect();
    files.retain(|f| f.extension().is_some_and(|e| e == "json"));
    files.sort();
    assert_eq!(files.len(), 6, "{files:?}");
    for file in files {
        let name = file.file_stem().unwrap().to_str().unwrap();
        let golden: Golden = serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
        let tensors = TensorFile::open(&file.with_extension("safetensors")).unwrap();
        let mut model = load(&goldens().join(name).join("model"), &CPU).unwrap();
        model.set_base_dropout(0.0);
        assert_eq!(golden.variants.keys().map(String::as_str).collect::<BTreeSet<_>>(), variants(name), "{name}");
        for (variant, of) in &golden.variants {
            check(&format!("{name}, {variant}"), &folder.join(name).join(variant), &golden, of, &*model, &tensors);
        }
    }
}

#[test]
fn logits_and_ten_steps_of_training_of_pefts_adapters() {
    each(|what, dir, golden, variant, model, tensors| {
        let mut adapted = adapter::attach(dir, model, &CPU).unwrap_or_else(|e| panic!("{what}: {e}"));
        let logits = model.logits(&adapted, &golden.batch(model, &adapted).0).unwrap();
        let name = what.rsplit_once(", ").unwrap().1;
        within(&format!("{what}: logits"), relative(&logits, &reference(tensors, name)), 1e-5);
        let losses = golden.train(model, &mut adapted, variant.losses.len());
        let worst = losses.iter().zip(&variant.losses).map(|(x, y)| (x / y - 1.0).abs()).fold(0.0, f64::max);
        within(&format!("{what}: losses"), worst, 1e-4);
    });
}

/// What PEFT wrote, read and written here, is what PEFT wrote: tensor by tensor, and by every key of the configuration that
/// both have.
#[test]
fn pefts_adapters_are_written_as_peft_writes_them() {
    each(|what, dir, _, _, model, _| {
        let file = adapter::load(dir).unwrap();
        if file.options.init_lora_weights.takes_from_base() {
            // PEFT writes these for a base without what they began at.
            return;
        }
        let saved = written(dir, model);
        let (ours, theirs) = (tensors_of(saved.path()), tensors_of(dir));
        assert_eq!(ours.keys().collect::<Vec<_>>(), theirs.keys().collect::<Vec<_>>(), "{what}");
        for (name, t) in &ours {
            assert_eq!(t.shape(), theirs[name].shape(), "{what}: {name}");
            assert_eq!(t.to_f64().unwrap(), theirs[name].to_f64().unwrap(), "{what}: {name}");
        }
        same_config(what, saved.path(), dir);
    });
}

/// The adapter of a folder, read and written here.
fn written(dir: &Path, model: &dyn Model) -> tempfile::TempDir {
    let file = adapter::load(dir).unwrap();
    let adapted = file.attach(model, &CPU).unwrap();
    let saved = tempfile::tempdir().unwrap();
    let name = file.base_model_name_or_path.as_deref();
    adapter::save(saved.path(), file.method, &file.options, &adapted, model, name).unwrap();
    saved
}

/// The tensors of an adapter's file.
fn tensors_of(dir: &Path) -> BTreeMap<String, Tensor> {
    let file = TensorFile::open(&dir.join(adapter::WEIGHTS_FILE)).unwrap();
    // With all biases PEFT writes those inside its wrappers once more, and beside an embedding the base's.
    const REPEATED: [&str; 3] = [".original_module.", ".modules_to_save.", ".base_layer.weight"];
    let names = file.names().filter(|n| !REPEATED.iter().any(|w| n.contains(w)));
    names.map(|n| (n.to_owned(), reference(&file, n))).collect()
}

/// That every key of the configuration written here has the value of PEFT's.
fn same_config(what: &str, ours: &Path, theirs: &Path) {
    let config = |dir: &Path| -> serde_json::Map<String, serde_json::Value> {
        serde_json::from_slice(&fs::read(dir.join(adapter::CONFIG_FILE)).unwrap()).unwrap()
    };
    let (ours, theirs) = (config(ours), config(theirs));
    for (key, value) in &ours {
        let same = |a: &serde_json::Value, b: &serde_json::Value| match (a.as_array(), b) {
            // One layer is one, or a list of one.
            (Some(list), b) if list.len() == 1 => list[0] == *b || a == b,
            _ => a == b || a.as_f64().is_some_and(|x| Some(x) == b.as_f64()),
        };
        // PEFT lists two names for every classifier's head, whatever it is called.
        let known = key == "modules_to_save";
        assert!(known || same(value, &theirs[key]), "{what}: {key} is {value}, in PEFT's file {}", theirs[key]);
    }
}

/// s·B·A for the rows of A, which are columns of B, from `from` on.
fn product(a: &Tensor, b: &Tensor, scale: f64, rows: std::ops::Range<usize>) -> Tensor {
    let (r, cols, outputs) = (a.rows(), a.cols(), b.rows());
    let (a, b) = (a.to_f64().unwrap(), b.to_f64().unwrap());
    let at = |o: usize, i: usize| scale * rows.clone().map(|k| b[o * r + k] * a[k * cols + i]).sum::<f64>();
    let values: Vec<f64> = (0..outputs * cols).map(|n| at(n / cols, n % cols)).collect();
    Tensor::from_slice(&CPU, &[outputs, cols], &values).unwrap()
}

/// Factors of an adapter by their module.
fn pairs(tensors: &BTreeMap<String, Tensor>) -> impl Iterator<Item = (&str, &Tensor, &Tensor)> {
    tensors.iter().filter_map(|(name, a)| {
        let module = name.strip_suffix(".lora_A.weight")?;
        Some((module, a, &tensors[&format!("{module}.lora_B.weight")]))
    })
}

/// Where PiSSA and OLoRA begin on a base is where PEFT begins, up to the signs of directions; what is left of the base's
/// weight is what PEFT leaves; and training goes on from there as PEFT's does.
#[test]
fn an_adapter_begins_at_the_part_of_the_base_that_pefts_begins_at() {
    let residuals = RefCell::new(0);
    each(|what, dir, golden, variant, model, tensors| {
        let (_, name) = what.rsplit_once(", ").unwrap();
        if !["pissa", "olora"].contains(&name) {
            return;
        }
        let file = adapter::load(dir).unwrap();
        let method = (file.row().unwrap().build)(&file.options).unwrap();
        let mut adapted = Adapted::new(&*method, model, &CPU, DType::F32, 5).unwrap();
        let (r, scale) = (file.options.rank, file.options.alpha / file.options.rank as f64);
        let ours: BTreeMap<String, Tensor> = adapted.adapter_tensors().unwrap().into_iter().collect();
        for (module, a, b) in pairs(&file.tensors) {
            let [own_a, own_b] = ["A", "B"].map(|f| &ours[&format!("{module}.lora_{f}.weight")]);
            assert_eq!((own_a.rows(), own_b.cols()), (2 * r, 2 * r), "{what}: {module}");
            let (theirs, began) = (product(a, b, scale, 0..r), product(own_a, own_b, scale, 0..r));
            within(&format!("{what}: start of {module}"), relative(&began, &theirs), 1e-5);
            let taken = product(own_a, own_b, -scale, r..2 * r);
            assert_eq!(taken.to_f64().unwrap(), began.to_f64().unwrap(), "{what}: {module}");
            let key = format!("{name}.residual.{module}");
            if !tensors.names().any(|n| n == key) {
                continue;
            }
            let w = model.tensor(&format!("{module}.weight")).unwrap();
            let layout = model.outline().linear_sites().find(|(s, _)| s.name == module).unwrap().1.layout;
            let (cols, taken) = (w.cols(), taken.to_f64().unwrap());
            let taken = |i: usize| match layout {
                Layout::OutIn => taken[i],
                Layout::InOut => taken[i % cols * w.rows() + i / cols],
            };
            let left: Vec<f64> = w.to_f64().unwrap().iter().enumerate().map(|(i, w)| w - taken(i)).collect();
            let left = Tensor::from_slice(&CPU, w.shape(), &left).unwrap();
            within(&format!("{what}: what is left of {module}"), relative(&left, &reference(tensors, &key)), 1e-5);
            *residuals.borrow_mut() += 1;
        }
        // The head of a classifier begins at random, wherever it began there.
        let head = file.tensors.iter().filter(|(name, _)| !name.contains(".lora_"));
        head.for_each(|(name, t)| adapted.params.set(adapted.params.find(name).unwrap(), t).unwrap());
        let losses = golden.train(model, &mut adapted, variant.losses.len());
        let worst = losses.iter().zip(&variant.losses).map(|(x, y)| (x / y - 1.0).abs()).fold(0.0, f64::max);
        within(&format!("{what}: losses from the start here"), worst, 1e-4);
    });
    assert_eq!(residuals.into_inner(), 9, "pissa of five models, olora of four");
}

/// What is written of an adapter that began at a part of the base is what PEFT's conversion writes.
#[test]
fn what_began_at_a_part_of_the_base_is_written_as_pefts_conversion_writes_it() {
    let compared = RefCell::new(0);
    each(|what, dir, _, _, model, _| {
        let converted = dir.with_file_name("pissa_converted");
        if !what.ends_with(", pissa_moved") || !converted.exists() {
            return;
        }
        let saved = written(dir, model);
        same_config(what, saved.path(), &converted);
        let (ours, theirs) = (tensors_of(saved.path()), tensors_of(&converted));
        assert_eq!(ours.keys().collect::<Vec<_>>(), theirs.keys().collect::<Vec<_>>(), "{what}");
        for ((module, a, b), (_, their_a, their_b)) in pairs(&ours).zip(pairs(&theirs)) {
            assert_eq!((a.shape(), b.shape()), (their_a.shape(), their_b.shape()), "{what}: {module}");
            let r = a.rows() / 2;
            let trained = |a: &Tensor, b: &Tensor| product(a, b, 1.0, 0..r).to_f64().unwrap();
            assert_eq!(trained(a, b), trained(their_a, their_b), "{what}: {module}");
            let constant = |a: &Tensor, b: &Tensor| product(a, b, 1.0, r..2 * r);
            within(&format!("{what}: {module}"), relative(&constant(a, b), &constant(their_a, their_b)), 1e-5);
            *compared.borrow_mut() += 1;
        }
    });
    assert!(compared.into_inner() >= 12);
}

/// A base that an adapter of embeddings, or of the output head, was merged into gives its logits, also where the head shares their matrix, which the
/// adapter does not touch.
/// As PEFT passes over them: of an adapter that was trained on a larger model, or for several kinds of them.
#[test]
fn what_a_base_lacks_of_an_adapter_is_passed_over() {
    let model = load(&goldens().join("gpt2/model"), &CPU).unwrap();
    let golden: Golden = serde_json::from_str(&fs::read_to_string(goldens().join("peft/gpt2.json")).unwrap()).unwrap();
    for (variant, keys) in [
        ("ia3", &["target_modules", "feedforward_modules"][..]),
        ("layers_pattern", &["layers_to_transform"]),
        ("modules_to_save", &["modules_to_save"]),
    ] {
        let (from, to) = (goldens().join("peft/gpt2").join(variant), tempfile::tempdir().unwrap());
        fs::copy(from.join(adapter::WEIGHTS_FILE), to.path().join(adapter::WEIGHTS_FILE)).unwrap();
        let text = fs::read_to_string(from.join(adapter::CONFIG_FILE)).unwrap();
        let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
        for key in keys {
            let absent = if *key == "layers_to_transform" { 7.into() } else { "down_proj".into() };
            config[key].as_array_mut().unwrap_or_else(|| panic!("{key} of {variant} is no list")).push(absent);
        }
        fs::write(to.path().join(adapter::CONFIG_FILE), config.to_string()).unwrap();
        let logits = |dir: &Path| {
            let adapted = adapter::attach(dir, &*model, &CPU).unwrap_or_else(|e| panic!("{variant}: {e}"));
            model.logits(&adapted, &golden.batch(&*model, &adapted).0).unwrap().to_f64().unwrap()
        };
        assert_eq!(logits(to.path()), logits(&from), "{variant}");
    }
}

#[test]
fn adapted_embeddings_and_heads_are_merged() {
    let merged = RefCell::new(0);
    each(|what, dir, golden, _, model, tensors| {
        let name = what.rsplit_once(", ").unwrap().1;
        if !name.starts_with("embedding") && !name.starts_with("lm_head") {
            return;
        }
        let adapted = adapter::attach(dir, model, &CPU).unwrap();
        let saved = tempfile::tempdir().unwrap();
        model.save(saved.path(), &adapted.merged(model).unwrap()).unwrap();
        let mut alone = load(saved.path(), &CPU).unwrap();
        alone.set_base_dropout(0.0);
        let none = Adapted::none(&CPU).unwrap();
        let logits = alone.logits(&none, &golden.batch(&*alone, &none).0).unwrap();
        within(&format!("{what}: merged"), relative(&logits, &reference(tensors, name)), 1e-5);
        *merged.borrow_mut() += 1;
    });
    assert_eq!(merged.into_inner(), 19);
}

/// Trains each adapter on and writes it with its logits where `lora-bench/interop/check_adapters.py` looks for them.
#[test]
#[ignore = "for lora-bench/interop/check_adapters.py: set LORA_INTEROP to a folder"]
fn adapters_for_peft_to_read() {
    let folder = PathBuf::from(std::env::var_os("LORA_INTEROP").expect("LORA_INTEROP names a folder"));
    each(|what, dir, golden, _, model, _| {
        let file = adapter::load(dir).unwrap();
        let mut adapted = file.attach(model, &CPU).unwrap();
        golden.train(model, &mut adapted, 3);
        let (name, variant) = what.rsplit_once(", ").unwrap();
        let to = folder.join(name).join(variant);
        let base = file.base_model_name_or_path.as_deref();
        adapter::save(&to, file.method, &file.options, &adapted, model, base).unwrap();
        // Between two cuts of its budget AdaLoRA has ranks that no file has.
        let adapted = adapter::attach(&to, model, &CPU).unwrap();
        let logits = model.logits(&adapted, &golden.batch(model, &adapted).0).unwrap().to_f64().unwrap();
        fs::write(to.join("logits.json"), serde_json::to_string(&logits).unwrap()).unwrap();
    });
}
