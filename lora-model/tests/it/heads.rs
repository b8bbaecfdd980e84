//! Encoders from folders that other programs wrote: bare, with names of old, with a head of another kind or with none.

use std::{collections::BTreeMap, fs, path::Path};

use crate::common::{CPU, goldens};
use lora_core::{Tape, Tensor, peft::Adapted};
use lora_kernels::DType;
use lora_model::{
    Input, LoadOptions, Model, Result, Task, Texts,
    checkpoint::{Checkpoint, TensorSpec, write_tensors},
    load, load_with,
};
use serde_json::{Value, json};

const THREE: Task = Task::Classification { labels: 3 };

/// A copy of a golden model, whose tensors and configuration were changed.
fn folder(
    case: &str,
    tensors: impl FnOnce(&mut BTreeMap<String, Tensor>),
    config: impl FnOnce(&mut Value),
) -> tempfile::TempDir {
    let (from, to) = (goldens().join(case).join("model"), tempfile::tempdir().unwrap());
    let weights = Checkpoint::open(&from).unwrap();
    let read = |name: &str| weights.tensor(name, &weights.info(name).unwrap().shape, &CPU).unwrap();
    let mut all: BTreeMap<String, Tensor> = weights.names().map(|n| (n.to_owned(), read(n))).collect();
    tensors(&mut all);
    let specs: Vec<TensorSpec> = all.iter().map(|(n, t)| TensorSpec::new(n.clone(), t.shape())).collect();
    write_tensors(&to.path().join("model.safetensors"), &[], &specs, |n| Ok(all[n].clone())).unwrap();
    let mut keys = serde_json::from_str(&fs::read_to_string(from.join("config.json")).unwrap()).unwrap();
    config(&mut keys);
    fs::write(to.path().join("config.json"), keys.to_string()).unwrap();
    to
}

fn rename(tensors: &mut BTreeMap<String, Tensor>, new: impl Fn(&str) -> String) {
    *tensors = std::mem::take(tensors).into_iter().map(|(n, t)| (new(&n), t)).collect();
}

fn ask(dir: &Path, task: Task, seed: u64) -> Result<Box<dyn Model>> {
    load_with(dir, &CPU, &LoadOptions { dtype: DType::F32, task: Some(task), seed, ..LoadOptions::default() })
}

fn golden(case: &str) -> Box<dyn Model> {
    load(&goldens().join(case).join("model"), &CPU).unwrap()
}

fn bits(t: &Tensor) -> Vec<u32> {
    t.to_vec::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

fn weight(model: &dyn Model, name: &str) -> Vec<u32> {
    bits(model.tensor(name).unwrap_or_else(|| panic!("no {name}")))
}

/// Hidden states and logits of two sequences.
fn computed(model: &dyn Model) -> [Vec<u32>; 2] {
    let adapted = Adapted::none(&CPU).unwrap();
    let batch = model.batch(&adapted, &Texts::new(&[7, 30, 12, 9, 44, 8, 21], &[4, 3])).unwrap();
    let mut t = Tape::inference(&adapted.params);
    let h = model.hidden(&mut t, &adapted, &mut Input::whole(&batch)).unwrap();
    [bits(h.value()), bits(&model.logits(&adapted, &batch).unwrap())]
}

#[test]
fn bare_encoders_get_the_head_that_is_asked_for() {
    for (case, root, bare) in
        [("bert_classification", "bert.", "BertModel"), ("roberta_classification", "roberta.", "RobertaModel")]
    {
        let dir = folder(
            case,
            |tensors| {
                tensors.retain(|n, _| !n.starts_with("classifier."));
                rename(tensors, |n| n.strip_prefix(root).unwrap().to_owned());
                let table = tensors["embeddings.position_embeddings.weight"].clone();
                tensors.insert("embeddings.position_ids".into(), table);
            },
            |keys| keys["architectures"] = json!([bare]),
        );
        let error = load(dir.path(), &CPU).err().unwrap().to_string();
        assert!(error.contains("architectures") && error.contains(bare), "{error}");

        let (whole, model) = (golden(case), ask(dir.path(), THREE, 1).unwrap());
        assert_eq!(computed(&*model)[0], computed(&*whole)[0], "{case}");
        let head: Vec<String> =
            whole.tensors().map(|(n, _)| n.to_owned()).filter(|n| n.starts_with("classifier.")).collect();
        for name in &head {
            let [new, other, old] = [&model, &ask(dir.path(), THREE, 2).unwrap(), &whole].map(|m| weight(&**m, name));
            assert_ne!(new, old, "{name} begins anew");
            match name.ends_with("bias") {
                true => assert!(new.iter().all(|&b| b == 0), "{name}"),
                false => assert_ne!(new, other, "{name} is another with another seed"),
            }
            assert_eq!(
                new,
                weight(&*ask(dir.path(), THREE, 1).unwrap(), name),
                "{name} is the same with the same seed"
            );
        }
        assert_eq!(model.outline().modules_to_save, ["classifier"]);

        // Beside a head, names without the prefix are what Transformers 4 takes for damaged.
        let out = tempfile::tempdir().unwrap();
        model.save(out.path(), &BTreeMap::new()).unwrap();
        let saved = Checkpoint::open(out.path()).unwrap();
        assert!(saved.names().all(|n| n.starts_with(root) || n.starts_with("classifier.")), "{case}");
        assert_eq!(computed(&*load(out.path(), &CPU).unwrap()), computed(&*model), "{case}");
    }
}

#[test]
fn names_of_old_and_repeated_tensors_are_understood() {
    let old = |tensors: &mut BTreeMap<String, Tensor>| {
        rename(tensors, |n| {
            n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        });
    };
    let dir = folder("bert_classification", old, |_| {});
    assert_eq!(computed(&*load(dir.path(), &CPU).unwrap()), computed(&*golden("bert_classification")));

    for (case, root, head) in
        [("bert_masked_lm", "bert", "cls.predictions"), ("roberta_masked_lm", "roberta", "lm_head")]
    {
        let dir = folder(
            case,
            |tensors| {
                let words = tensors[&format!("{root}.embeddings.word_embeddings.weight")].clone();
                let bias = tensors[&format!("{head}.bias")].clone();
                // The tied head again, and what the head for another task left behind.
                tensors.insert(format!("{head}.decoder.weight"), words.clone());
                tensors.insert(format!("{head}.decoder.bias"), bias);
                tensors.insert(format!("{root}.pooler.dense.weight"), words.clone());
                tensors.insert("classifier.weight".into(), words);
            },
            |_| {},
        );
        assert_eq!(computed(&*load(dir.path(), &CPU).unwrap()), computed(&*golden(case)), "{case}");
    }
}

#[test]
fn a_new_head_is_kept_and_named_when_the_model_is_saved() {
    for (case, task, fresh) in [
        // Of a masked LM, which has no pooler.
        ("bert_masked_lm", THREE, &["bert.pooler.dense", "classifier"][..]),
        ("bert_masked_lm", Task::Regression, &["bert.pooler.dense", "classifier"]),
        ("roberta_masked_lm", THREE, &["classifier"]),
        (
            "bert_classification",
            Task::MaskedLm,
            &["cls.predictions", "cls.predictions.transform.LayerNorm", "cls.predictions.transform.dense"],
        ),
        // The same kind of head, for more labels: only the classifier begins anew.
        ("bert_classification", Task::Classification { labels: 5 }, &["classifier"]),
        ("roberta_regression", THREE, &["classifier"]),
    ] {
        let model = ask(&goldens().join(case).join("model"), task, 3).unwrap();
        assert_eq!(model.task(), task, "{case}");
        let mut saved = model.outline().modules_to_save.clone();
        saved.sort();
        let covered = |module: &str| saved.iter().any(|s| module == s || module.starts_with(&format!("{s}.")));
        assert!(
            fresh.iter().all(|f| covered(f)) && saved.iter().all(|s| fresh.contains(&s.as_str())),
            "{case}: {saved:?}"
        );
        let dir = tempfile::tempdir().unwrap();
        model.save(dir.path(), &BTreeMap::new()).unwrap();
        let again = load(dir.path(), &CPU).unwrap();
        assert_eq!((again.task(), computed(&*again)), (task, computed(&*model)), "{case}");
    }
    // What is there is used: the pooler stays when the labels change.
    let [old, new] = [
        golden("bert_classification"),
        ask(&goldens().join("bert_classification/model"), Task::Regression, 0).unwrap(),
    ];
    assert_eq!(weight(&*old, "bert.pooler.dense.weight"), weight(&*new, "bert.pooler.dense.weight"));
    // And everything, when the task that is asked for is the folder's own.
    let same = ask(&goldens().join("bert_classification/model"), THREE, 0).unwrap();
    assert_eq!(computed(&*same), computed(&*old));
    assert_eq!(same.config().keys(), old.config().keys());
}

#[test]
fn what_is_missing_or_strange_is_named() {
    const QUERY: &str = "bert.encoder.layer.1.attention.self.query.weight";
    let without = |name: &'static str| folder("bert_classification", move |t| drop(t.remove(name)), |_| {});
    let with = |name: &'static str| {
        let add = move |t: &mut BTreeMap<String, Tensor>| drop(t.insert(name.into(), t["classifier.bias"].clone()));
        folder("bert_classification", add, |_| {})
    };
    let untied = folder("bert_masked_lm", |_| {}, |keys| keys["tie_word_embeddings"] = json!(false));
    for (dir, task, wanted) in [
        (without("classifier.bias"), None, &["classifier.bias", "missing"][..]),
        (without(QUERY), None, &[QUERY, "missing"]),
        // A fresh head makes up for a missing one, not for a damaged encoder.
        (without(QUERY), Some(Task::Regression), &[QUERY, "missing"]),
        (with("bert.encoder.layer.2.output.dense.bias"), Some(THREE), &["layer.2", "unexpected"]),
        (with("bert.embeddings.LayerNorm.gamma"), None, &["LayerNorm.gamma", "LayerNorm.weight"]),
        (untied, None, &["tie_word_embeddings"]),
    ] {
        let options = LoadOptions { task, ..LoadOptions::default() };
        let text = load_with(dir.path(), &CPU, &options).err().expect("an error").to_string();
        assert!(wanted.iter().all(|w| text.contains(w)), "{text} lacks some of {wanted:?}");
    }
}

/// Transformers ties no head that a checkpoint has with other values than the embeddings; one with the same is the same model.
#[test]
fn a_tied_head_with_values_of_its_own_is_refused() {
    for (case, head, table) in [
        ("gpt2", "lm_head.weight", "transformer.wte.weight"),
        ("smollm", "lm_head.weight", "model.embed_tokens.weight"),
        ("bert_masked_lm", "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
        ("roberta_masked_lm", "lm_head.decoder.weight", "roberta.embeddings.word_embeddings.weight"),
        ("deberta_v2_masked_lm", "cls.predictions.decoder.weight", "deberta.embeddings.word_embeddings.weight"),
    ] {
        let with = |head_of: &dyn Fn(&Tensor) -> Tensor| {
            folder(
                case,
                |all| {
                    let name = all.keys().find(|n| table.ends_with(n.as_str())).cloned().unwrap();
                    let of = head_of(&all[&name]);
                    all.insert(head.into(), of);
                },
                |_| (),
            )
        };
        let same = with(&|t| t.clone());
        assert_eq!(computed(&*load(same.path(), &CPU).unwrap()), computed(&*golden(case)), "{case}");
        let other = with(&|t| {
            let values: Vec<f32> = t.to_vec::<f32>().unwrap().into_iter().map(|v| v + 0.5).collect();
            Tensor::from_slice(&CPU, t.shape(), &values).unwrap()
        });
        let e = load(other.path(), &CPU).err().unwrap_or_else(|| panic!("{case}: loaded")).to_string();
        assert!(e.contains(head) && e.contains("tie_word_embeddings"), "{case}: {e}");
    }
}
