//! Adapters merged into one, against PEFT's `add_weighted_adapter` (`golden/merging.py`).

use std::{fs, path::PathBuf};

use lora_core::{
    Tensor,
    lowrank::{LowRank, MajoritySign},
    peft::{Adapted, Base},
};
use lora_model::{
    Texts,
    adapter::{self, Combined, Recipe, Updates, Weighted},
    checkpoint::TensorFile,
    load,
};
use ndarray::Array2;
use serde_json::Value;

use crate::common::{CPU, goldens, reference, relative};

fn merging() -> PathBuf {
    goldens().join("merging")
}

fn cases() -> Vec<Value> {
    let text = fs::read_to_string(merging().join("cases.json")).unwrap();
    serde_json::from_str::<Value>(&text).unwrap()["cases"].as_array().unwrap().clone()
}

fn part(model: &str, name: &str, weight: f64) -> Weighted {
    let dir = merging().join(format!("{model}_{name}"));
    Weighted { name: name.into(), weight, updates: Updates::load(&dir).unwrap() }
}

fn recipe(how: &str) -> Recipe {
    Recipe { how: how.into(), density: None, sign: None, rank: None, seed: 0 }
}

/// A case of the goldens, merged here.
fn merged(case: &Value) -> Combined {
    let model = case["model"].as_str().unwrap();
    let adapters = case["adapters"].as_array().unwrap();
    let parts: Vec<Weighted> =
        adapters.iter().map(|a| part(model, a[0].as_str().unwrap(), a[1].as_f64().unwrap())).collect();
    let how = case["how"].as_str().unwrap();
    let recipe = Recipe {
        density: case["density"].as_f64(),
        sign: (case["sign"] == "frequency").then_some(MajoritySign::Frequency),
        rank: case["svd_rank"].as_u64().map(|r| r as usize),
        seed: case["seed"].as_u64().unwrap(),
        ..recipe(how)
    };
    adapter::combine(&parts, &recipe).unwrap_or_else(|e| panic!("{case}: {e}"))
}

fn delta(a: &Array2<f32>, b: &Array2<f32>) -> Array2<f64> {
    b.mapv(f64::from).dot(&a.mapv(f64::from))
}

fn off(x: &Array2<f64>, reference: &Array2<f64>) -> f64 {
    let norm = |m: &Array2<f64>| m.iter().map(|x| x * x).sum::<f64>().sqrt();
    norm(&(x - reference)) / norm(reference)
}

/// `m` in the upper left of zeros.
fn filled(m: &Array2<f32>, dim: (usize, usize)) -> Array2<f32> {
    Array2::from_shape_fn(dim, |i| m.get(i).copied().unwrap_or(0.0))
}

/// A, B and what PEFT's configuration says, for every case; the factors of an SVD by their product, because PEFT puts all
/// singular values into B, and signs are anybody's.
#[test]
fn every_combination_is_pefts() {
    let file = TensorFile::open(&merging().join("merged.safetensors")).unwrap();
    let array = |t: &Tensor| Array2::from_shape_vec((t.rows(), t.cols()), t.to_vec::<f32>().unwrap()).unwrap();
    let (mut compared, mut worst) = (0, 0f64);
    for (i, case) in cases().iter().enumerate() {
        let what = format!("case {i}: {} {}", case["model"], case["how"]);
        let Combined { updates, .. } = merged(case);
        let prefix = format!("{i}.");
        let name_of = |n: &str| Some(n.strip_prefix(&prefix)?.strip_suffix(".lora_A")?.to_owned());
        let names: Vec<String> = file.names().filter_map(name_of).collect();
        assert_eq!(updates.modules.keys().collect::<Vec<_>>(), names.iter().collect::<Vec<_>>(), "{what}");
        let dir = tempfile::tempdir().unwrap();
        updates.save(dir.path()).unwrap();
        let saved = TensorFile::open(&dir.path().join(adapter::WEIGHTS_FILE)).unwrap();
        for name in names {
            let theirs = ["lora_A", "lora_B"].map(|f| array(&reference(&file, &format!("{i}.{name}.{f}"))));
            let ours = ["lora_A", "lora_B"]
                .map(|f| array(&reference(&saved, &format!("{}{name}.{f}.weight", adapter::PREFIX))));
            let product = off(&delta(&ours[0], &ours[1]), &delta(&theirs[0], &theirs[1]));
            assert!(product < 1e-5, "{what}: {name}: ΔW is off by {product:e}");
            worst = worst.max(product);
            for (ours, theirs) in ours.iter().zip(&theirs) {
                // Where `rank_pattern` gave a module a lower rank, PEFT's factors keep it, which its own file of the result
                // does not say; here they are filled up with zeros.
                let theirs = filled(theirs, ours.dim());
                let far = off(&ours.mapv(f64::from), &theirs.mapv(f64::from));
                assert!(case["how"].as_str().unwrap().ends_with("svd") || far < 1e-5, "{what}: {name}: {far:e}");
            }
            compared += 1;
        }
        let config: Value = serde_json::from_slice(&fs::read(dir.path().join(adapter::CONFIG_FILE)).unwrap()).unwrap();
        for key in ["r", "lora_alpha", "target_modules"] {
            assert_eq!(config[key], case[key], "{what}: {key}");
        }
    }
    println!("{compared} modules, ΔW off by {worst:e} at most");
    assert!(compared > 130, "{compared} modules");
}

/// A merged adapter is an adapter: it loads, and its base computes the same with it in its weights.
#[test]
fn a_merged_adapter_loads_and_goes_into_its_base() {
    let model = load(&goldens().join("gpt2/model"), &CPU).unwrap();
    let texts = Texts::new(&[5, 17, 99, 3, 42, 8, 8, 61], &[8]);
    let none = Adapted::none(&CPU).unwrap();
    let batch = model.batch(&none, &texts).unwrap();
    let mut seen = 0;
    for case in cases().iter().filter(|c| c["model"] == "gpt2" && c["r"].as_u64() < Some(12)) {
        let updates = merged(case).updates;
        let dir = tempfile::tempdir().unwrap();
        updates.save(dir.path()).unwrap();
        let adapted = adapter::attach(dir.path(), &*model, &CPU).unwrap();
        let beside = model.logits(&adapted, &batch).unwrap();
        let changed = updates.merged(&*model).unwrap();
        // As the adapter itself merges.
        let own = adapted.merged(&*model).unwrap();
        assert_eq!(changed.keys().collect::<Vec<_>>(), own.keys().collect::<Vec<_>>());
        for (name, w) in &changed {
            assert!(relative(w, &own[name]) < 1e-6, "{name}");
        }
        let folder = tempfile::tempdir().unwrap();
        model.save(folder.path(), &changed).unwrap();
        let whole = load(folder.path(), &CPU).unwrap();
        let far = relative(&whole.logits(&none, &batch).unwrap(), &beside);
        assert!(far < 1e-5, "{}: {far:e}", case["how"]);
        // Read again it is what it was.
        let again = Updates::load(dir.path()).unwrap();
        assert_eq!(again.modules.keys().collect::<Vec<_>>(), updates.modules.keys().collect::<Vec<_>>());
        assert_eq!((again.rank(), again.fan_in_fan_out), (updates.rank(), true));
        seen += 1;
    }
    assert!(seen > 10, "{seen}");
}

/// A rank above the smaller side of a matrix is a rank like others: read, merged, saved, and read again.
#[test]
fn ranks_above_the_smaller_side_of_a_matrix_are_merged() {
    let model = load(&goldens().join("gpt2/model"), &CPU).unwrap();
    let above = Updates::load(&goldens().join("peft/gpt2/rank_above")).unwrap();
    assert_eq!(above.rank(), 40);
    let none = Adapted::none(&CPU).unwrap();
    let batch = model.batch(&none, &Texts::new(&[5, 17, 9, 3, 42, 8, 8, 31], &[8])).unwrap();
    let both = vec![Weighted { name: "above".into(), weight: 0.5, updates: above.clone() }, part("gpt2", "c", -0.4)];
    let sum = |module: &str| {
        let deltas = both.iter().filter_map(|p| Some((p.weight, p.updates.modules.get(module)?)));
        deltas.map(|(w, u)| u.delta.delta().mapv(f64::from) * w).reduce(|a, b| a + b).unwrap()
    };
    for (how, given, rank) in [("cat", None, 42), ("svd", None, 40), ("svd", Some(100), 100)] {
        let Combined { updates, cut } = adapter::combine(&both, &Recipe { rank: given, ..recipe(how) }).unwrap();
        let dir = tempfile::tempdir().unwrap();
        updates.save(dir.path()).unwrap();
        let again = Updates::load(dir.path()).unwrap();
        assert!(again.rank() == rank && cut < 1e-6, "{how}: {}, {cut:e}", again.rank());
        for (module, update) in &again.modules {
            let far = off(&update.delta.delta().mapv(f64::from), &sum(module));
            assert!(far < 1e-6, "{how}: {module}: {far:e}");
        }
        // Beside the base and in it.
        let beside = adapter::attach(dir.path(), &*model, &CPU).unwrap();
        let folder = tempfile::tempdir().unwrap();
        model.save(folder.path(), &again.merged(&*model).unwrap()).unwrap();
        let inside = load(folder.path(), &CPU).unwrap();
        let logits = model.logits(&beside, &batch).unwrap();
        let far = relative(&inside.logits(&none, &batch).unwrap(), &logits);
        assert!(far < 1e-5, "{how}: {far:e}");
    }
}

/// Biases that trained are no part of an update, and stay what they are beside it.
#[test]
fn biases_that_trained_stay_beside_an_update() {
    let model = load(&goldens().join("gpt2/model"), &CPU).unwrap();
    let none = Adapted::none(&CPU).unwrap();
    for (variant, biases) in [("bias_lora_only", 4), ("bias_all", 13)] {
        let golden = goldens().join("peft/gpt2").join(variant);
        let beside = adapter::attach(&golden, &*model, &CPU).unwrap();
        let batch = model.batch(&beside, &Texts::new(&[3, 1, 4, 1, 5], &[5])).unwrap();
        let wanted = model.logits(&beside, &batch).unwrap();
        let updates = Updates::load(&golden).unwrap();
        assert_eq!(updates.whole.len(), biases, "{variant}: {:?}", updates.whole.keys());

        let folder = tempfile::tempdir().unwrap();
        model.save(folder.path(), &updates.merged(&*model).unwrap()).unwrap();
        let inside = load(folder.path(), &CPU).unwrap();
        let batch = inside.batch(&none, &Texts::new(&[3, 1, 4, 1, 5], &[5])).unwrap();
        let far = relative(&inside.logits(&none, &batch).unwrap(), &wanted);
        assert!(far < 1e-5, "{variant} merged: {far:e}");

        let dir = tempfile::tempdir().unwrap();
        updates.save(dir.path()).unwrap();
        let again = adapter::attach(dir.path(), &*model, &CPU).unwrap();
        let batch = model.batch(&again, &Texts::new(&[3, 1, 4, 1, 5], &[5])).unwrap();
        let far = relative(&model.logits(&again, &batch).unwrap(), &wanted);
        assert!(far < 1e-5, "{variant} saved: {far:e}");
    }
}

#[test]
fn adapters_that_do_not_belong_together_are_refused() {
    let ab = || vec![part("gpt2", "a", 0.7), part("gpt2", "b", 0.3)];
    let sparse = |how: &str| Recipe { density: Some(0.5), ..recipe(how) };
    let with = |change: &dyn Fn(&mut Updates)| {
        let mut parts = ab();
        change(&mut parts[1].updates);
        parts
    };
    let mut whole = ab();
    for part in &mut whole {
        let t = Tensor::from_slice(&CPU, &[1], &[1f32]).unwrap();
        part.updates.whole.insert("classifier.bias".into(), t);
    }
    let reshaped = |u: &mut Updates| {
        let name = u.modules.keys().next().unwrap().clone();
        let (a, b) = (Array2::ones((4, 5)), Array2::ones((6, 4)));
        u.modules.get_mut(&name).unwrap().delta = LowRank::new(a, b, 1.0).unwrap();
    };
    for (parts, recipe, needed) in [
        (vec![], recipe("linear"), &["none to merge"][..]),
        (ab(), recipe("slerp"), &["slerp", "magnitude_prune_svd"]),
        (ab(), recipe("ties"), &["density", "ties"]),
        (ab(), sparse("svd"), &["density", "svd"]),
        (ab(), Recipe { density: Some(1.2), ..recipe("ties") }, &["density", "1.2"]),
        (ab(), Recipe { density: Some(f64::NAN), ..recipe("ties") }, &["density", "NaN"]),
        (ab(), Recipe { sign: Some(MajoritySign::Total), ..recipe("cat") }, &["majority-sign"]),
        (ab(), Recipe { rank: Some(4), ..recipe("linear") }, &["svd-rank", "linear"]),
        (ab(), Recipe { rank: Some(0), ..recipe("svd") }, &["svd-rank"]),
        (vec![part("gpt2", "a", 1.0), part("gpt2", "c", 1.0)], recipe("linear"), &["rank 4", "c has rank 2", "cat"]),
        (vec![part("gpt2", "a", 1.0)], sparse("ties"), &["a alone", "linear"]),
        (with(&|u| u.task_type = Some("SEQ_CLS".into())), recipe("cat"), &["a was trained", "CAUSAL_LM", "SEQ_CLS"]),
        (with(&reshaped), recipe("cat"), &["module transformer.h.0.attn.c_", "[6, 5]"]),
        (whole, recipe("cat"), &["classifier.bias", "a and b"]),
        (vec![part("gpt2", "a", f64::INFINITY)], recipe("linear"), &["inf"]),
    ] {
        let e = adapter::combine(&parts, &recipe).unwrap_err().to_string();
        needed.iter().for_each(|part| assert!(e.contains(part), "{part:?} in {e}"));
    }
    let llama = load(&goldens().join("llama2/model"), &CPU).unwrap();
    let mut biased = ab();
    let golden = goldens().join("peft/gpt2/bias_lora_only");
    biased.push(Weighted { name: "c".into(), weight: 1.0, updates: Updates::load(&golden).unwrap() });
    let e = adapter::combine(&biased, &recipe("cat")).unwrap_err().to_string();
    assert!(e.contains("c trained biases (bias = lora_only)"), "{e}");
    let e = part("gpt2", "a", 1.0).updates.merged(&*llama).unwrap_err().to_string();
    assert!(e.contains("no such modules") && e.contains("c_attn"), "{e}");
}

/// PEFT trains a copy of a table that is the output head's matrix too, and the head stays.
#[test]
fn embeddings_that_trained_whole_leave_a_tied_head_as_it_was() {
    let model = load(&goldens().join("gpt2/model"), &CPU).unwrap();
    let base: &dyn Base = &*model;
    let table = base.tensor("transformer.wte.weight").unwrap();
    let moved: Vec<f32> = table.to_vec::<f32>().unwrap().into_iter().map(|v| v + 0.5).collect();
    let mut updates = part("gpt2", "a", 1.0).updates;
    let moved = Tensor::from_slice(&CPU, table.shape(), &moved).unwrap();
    updates.whole.insert("transformer.wte.weight".into(), moved.clone());
    let merged = updates.merged(base).unwrap();
    let values = |t: &Tensor| t.to_vec::<f32>().unwrap();
    assert_eq!(values(&merged["transformer.wte.weight"]), values(&moved));
    assert_eq!(values(&merged["lm_head.weight"]), values(table));
}
