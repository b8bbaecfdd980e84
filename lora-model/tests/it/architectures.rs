//! Agreement with PyTorch, Transformers and PEFT on a small model of every architecture, on every device at hand:
//! `golden/architectures.py` wrote what they say, in f64. Whatever folder lies there is compared; nothing here knows
//! one.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use crate::common::{Place, distance, goldens, norm, places, reference, relative, within};
use lora_core::{
    Grads, Tape,
    peft::{Adapted, Full},
};
use lora_kernels::{DType, Error as KernelError};
use lora_model::{
    Batch, Error, LoadOptions, Model, Targets, Texts, adapter, assemble, checkpoint::TensorFile, load_as,
};
use serde::Deserialize;

#[derive(Deserialize)]
struct Golden {
    sequences: Vec<Vec<u32>>,
    segments: Option<Vec<Vec<u32>>>,
    #[serde(flatten)]
    task: Task,
    loss: BTreeMap<String, f64>,
    /// How far PyTorch's own bf16 is from its f64: of `logits.base`, `whole.full` and the like.
    bf16_vs_f64: BTreeMap<String, f64>,
    /// Gradients that are zero by the mathematics, so that there is nothing to be relative to.
    zero: Vec<String>,
}

#[derive(Deserialize)]
#[serde(tag = "task", rename_all = "kebab-case")]
enum Task {
    #[serde(alias = "masked-lm")]
    CausalLm {
        /// Within each sequence.
        target_rows: Vec<Vec<u32>>,
        target_ids: Vec<Vec<u32>>,
    },
    Classification {
        labels: Vec<u32>,
    },
    Regression {
        values: Vec<f32>,
    },
}

struct Case {
    name: String,
    folder: PathBuf,
    golden: Golden,
    tensors: TensorFile,
    place: Place,
    model: Box<dyn Model>,
}

/// Every folder that `architectures.py` has written: the ones whose goldens have a task.
fn folders() -> Vec<(PathBuf, Golden)> {
    let mut folders: Vec<PathBuf> = fs::read_dir(goldens()).unwrap().map(|entry| entry.unwrap().path()).collect();
    folders.sort();
    let golden = |folder: &Path| {
        let text = fs::read_to_string(folder.join("golden.json")).ok()?;
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        value.get("task")?;
        Some(serde_json::from_value(value).unwrap())
    };
    let found: Vec<_> = folders.into_iter().filter_map(|f| golden(&f).map(|g| (f, g))).collect();
    assert!(!found.is_empty(), "no goldens in {}", goldens().display());
    found
}

impl Case {
    /// None for an architecture that says that it runs on the CPU only, elsewhere.
    fn new(folder: PathBuf, golden: Golden, place: &Place) -> Option<Case> {
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        let name = format!("{name} on {} in {:?}", place.device, place.dtype);
        let model = match load_as(&folder.join("model"), &place.device, place.dtype) {
            Err(Error::Kernel(e @ KernelError::NoCuda { .. })) if !place.device.is_cpu() => {
                println!("{name}: skipped: {e}");
                return None;
            }
            model => model.unwrap(),
        };
        let tensors = TensorFile::open(&folder.join("golden.safetensors")).unwrap();
        Some(Case { name, folder, golden, tensors, place: place.clone(), model })
    }

    /// The bare base, all of it trainable, or PEFT's adapter on it.
    fn adapted(&self, which: &str) -> Adapted {
        let (base, device) = (self.model.as_ref(), &self.place.device);
        match which {
            "base" => Adapted::none(device).unwrap(),
            "full" => Adapted::new(&Full, base, device, self.place.dtype, 0).unwrap(),
            which => adapter::attach(&self.folder.join(which), base, device).unwrap(),
        }
    }

    /// The largest error of something: in bf16 up to three times that of PyTorch's own, since models as small as
    /// these leave much to luck.
    fn close(&self, what: &str) -> f64 {
        let theirs = if self.place.dtype == DType::Bf16 { 3.0 * self.golden.bf16_vs_f64[what] } else { 0.0 };
        self.place.close.max(theirs)
    }

    /// All sequences with their targets, and the number of these.
    fn batch(&self, adapted: &Adapted) -> (Batch, usize) {
        let g = &self.golden;
        let lengths: Vec<usize> = g.sequences.iter().map(Vec::len).collect();
        let tokens = g.sequences.concat();
        let segments = g.segments.as_ref().map(|s| s.concat());
        let texts = Texts { segments: segments.as_deref(), ..Texts::new(&tokens, &lengths) };
        let mut in_run = Vec::new();
        let ids;
        let (targets, count) = match &g.task {
            Task::CausalLm { target_rows, target_ids } => {
                let mut first = 0;
                for (n, rows) in lengths.iter().zip(target_rows) {
                    in_run.extend(rows.iter().map(|r| first + r));
                    first += *n as u32;
                }
                ids = target_ids.concat();
                (Targets::Tokens { rows: &in_run, ids: &ids }, ids.len())
            }
            Task::Classification { labels } => (Targets::Labels(labels), labels.len()),
            Task::Regression { values } => (Targets::Values(values), values.len()),
        };
        (self.model.batch(adapted, &texts.targets(targets)).unwrap(), count)
    }

    fn logits(&self, which: &str) {
        let adapted = self.adapted(which);
        let logits = self.model.logits(&adapted, &self.batch(&adapted).0).unwrap();
        let error = relative(&logits, &reference(&self.tensors, &format!("logits.{which}")));
        within(&format!("{}: logits of {which}", self.name), error, self.close(&format!("logits.{which}")));
    }

    /// Loss and every gradient of everything that trains, as the golden file calls it: `grad.{which}.{prefix}{name}`.
    fn gradients(&self, which: &str, prefix: &str) {
        let of = if which == "full" { "base" } else { which };
        let loss = self.golden.loss[of];
        let what = format!("{}: {which}", self.name);
        let adapted = self.adapted(which);
        let (batch, count) = self.batch(&adapted);
        let mut grads = Grads::new(&adapted.params).unwrap();
        let mut t = Tape::new(&adapted.params);
        let got = self.model.loss(&mut t, &adapted, &batch, 0.0, 1.0 / count as f64).unwrap();
        let error = (got.value().to_f64().unwrap()[0] - loss).abs() / loss;
        within(&format!("{what}: loss"), error, self.close(&format!("loss.{of}")));
        t.backward(got, &mut grads).unwrap();
        assert_eq!(grads.unwritten(), Vec::<&str>::new(), "{what}");

        let ids: Vec<_> = adapted.params.ids().collect();
        let pairs: Vec<_> = ids
            .iter()
            .map(|&id| {
                let key = format!("grad.{which}.{prefix}{}", adapted.params.name(id));
                let reference = reference(&self.tensors, &key);
                (key, grads.get(id).unwrap().unwrap(), reference)
            })
            .collect();
        let whole = pairs.iter().map(|(_, _, r)| norm(r).powi(2)).sum::<f64>().sqrt();
        let each = self.place.each.max(self.close(&format!("grad.{which}")));
        let (mut worst, mut wrong) = (0.0f64, 0.0);
        for (key, got, reference) in &pairs {
            let error = distance(got, reference);
            let zero = self.golden.zero.contains(key);
            assert_eq!(zero, norm(reference) == 0.0, "{key}");
            let error_of_its_own = error / if zero { whole } else { norm(reference) };
            assert!(error_of_its_own <= each, "{what}: {key}: {error_of_its_own:.2e} is above {each:.0e}");
            worst = worst.max(error_of_its_own);
            wrong += error * error;
        }
        within(&format!("{what}: the whole gradient"), wrong.sqrt() / whole, self.close(&format!("whole.{which}")));
        println!("{what}: gradients: {worst:.2e}");
        // And no gradient of PyTorch's is left out.
        let stored = self.tensors.names().filter(|n| n.starts_with(&format!("grad.{which}."))).count();
        assert_eq!(pairs.len(), stored, "{what}");
    }

    /// The logits of the cache's newest rows are those of whole sequences: token by token, all at once, and in two
    /// parts.
    fn cached(&self, which: &str) {
        let adapted = self.adapted(which);
        let whole = self.model.logits(&adapted, &self.batch(&adapted).0).unwrap();
        let sequences = &self.golden.sequences;
        let shortest = sequences.iter().map(Vec::len).min().unwrap();
        for steps in [vec![1; shortest], vec![shortest], vec![shortest - 2, 2]] {
            let mut cache = self.model.cache(sequences.len(), 1).unwrap();
            let mut at = 0;
            for n in steps {
                let tokens: Vec<u32> = sequences.iter().flat_map(|s| s[at..at + n].to_vec()).collect();
                at += n;
                let logits = self.model.step(&adapted, &mut cache, &tokens, &vec![n; sequences.len()]).unwrap();
                let mut first = 0;
                for (i, s) in sequences.iter().enumerate() {
                    let row = first + at - 1;
                    let error = relative(&logits.rows_in(i..i + 1), &whole.rows_in(row..row + 1));
                    let what = || format!("{}: {which}, token {at} of sequence {i}", self.name);
                    assert!(error <= self.close(&format!("logits.{which}")), "{}: {error:.2e}", what());
                    first += s.len();
                }
            }
        }
    }
}

#[test]
fn logits_losses_and_every_gradient() {
    for place in places() {
        for (folder, golden) in folders() {
            let Some(case) = Case::new(folder, golden, &place) else { continue };
            case.logits("base");
            case.logits("adapter");
            case.gradients("full", "");
            case.gradients("adapter", "base_model.model.");
        }
    }
}

#[test]
fn a_model_of_given_weights_is_the_model_they_were_taken_from() {
    for place in places() {
        for (folder, golden) in folders() {
            let Some(mut case) = Case::new(folder, golden, &place) else { continue };
            let (model, raw) = (&case.model, case.model.config().clone());
            let options = LoadOptions { task: Some(model.task()), ..LoadOptions::default() };
            let mut fetch = |name: &str, _: &[usize]| Ok(model.tensor(name).unwrap().clone());
            let same = assemble(raw, &place.device, &options, &mut fetch).unwrap();
            assert_eq!(same.outline(), case.model.outline(), "{}", case.name);
            case.model = same;
            case.logits("base");
            let mut missing = |name: &str, _: &[usize]| Err(lora_core::Error::Missing { name: name.into() }.into());
            let raw = case.model.config().clone();
            assert!(assemble(raw, &place.device, &options, &mut missing).is_err(), "{}", case.name);
        }
    }
}

#[test]
fn generation_computes_what_whole_sequences_do() {
    for place in places() {
        for (folder, golden) in folders() {
            let Some(case) = Case::new(folder, golden, &place) else { continue };
            if case.model.kv_shape().is_some() {
                case.cached("base");
                case.cached("adapter");
            }
        }
    }
}
