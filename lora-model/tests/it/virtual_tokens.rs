//! Agreement with Transformers and PEFT on virtual tokens, on every device at hand: `golden/virtual.py` wrote what they
//! say of prompt tuning and prefix tuning, in f64.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
};

use crate::common::{Place, goldens, places, reference, relative, within};
use lora_core::{
    Grads, Tape, Tensor,
    peft::{Adapted, Options, find},
};
use lora_kernels::DType;
use lora_model::{Batch, Model, Targets, Texts, checkpoint::TensorFile, load_as};
use serde::Deserialize;

/// A model of each kind: fused projections; RoPE and fewer keys than queries; an encoder with pairs of texts.
const CASES: [&str; 3] = ["gpt2", "llama3", "bert_classification"];

#[derive(Deserialize)]
struct Golden {
    sequences: Vec<Vec<u32>>,
    segments: Option<Vec<Vec<u32>>>,
    #[serde(flatten)]
    task: Task,
    variants: BTreeMap<String, Variant>,
}

#[derive(Deserialize)]
#[serde(tag = "task", rename_all = "kebab-case")]
enum Task {
    CausalLm {
        /// Within each sequence.
        target_rows: Vec<Vec<u32>>,
        target_ids: Vec<Vec<u32>>,
    },
    Classification {
        labels: Vec<u32>,
    },
}

#[derive(Deserialize)]
struct Variant {
    method: String,
    prefix: usize,
    infix: usize,
    /// The name of the virtual tokens' parameter.
    parameter: String,
    loss: f64,
    /// How far PyTorch's own bf16 is from its f64.
    bf16_vs_f64: HashMap<String, f64>,
}

impl Golden {
    fn batch(&self, model: &dyn Model, adapted: &Adapted) -> (Batch, usize) {
        let lengths: Vec<usize> = self.sequences.iter().map(Vec::len).collect();
        let (tokens, segments) = (self.sequences.concat(), self.segments.as_ref().map(|s| s.concat()));
        let texts = Texts { segments: segments.as_deref(), ..Texts::new(&tokens, &lengths) };
        let (mut rows, mut first) = (Vec::new(), 0);
        let ids;
        let (targets, count) = match &self.task {
            Task::CausalLm { target_rows, target_ids } => {
                for (n, of) in lengths.iter().zip(target_rows) {
                    rows.extend(of.iter().map(|r| first + r));
                    first += *n as u32;
                }
                ids = target_ids.concat();
                (Targets::Tokens { rows: &rows, ids: &ids }, ids.len())
            }
            Task::Classification { labels } => (Targets::Labels(labels), labels.len()),
        };
        (model.batch(adapted, &texts.targets(targets)).unwrap(), count)
    }
}

impl Variant {
    /// The method on the model, with the golden's virtual tokens and the model's own head.
    fn adapted(&self, model: &dyn Model, place: &Place, parameter: Tensor) -> Adapted {
        let options = Options { prefix: self.prefix, infix: self.infix, ..Options::default() };
        let method = (find(&self.method).unwrap().build)(&options).unwrap();
        let mut adapted = Adapted::new(method.as_ref(), model, &place.device, place.dtype, 0).unwrap();
        let mut tensors: BTreeMap<String, Tensor> = adapted.adapter_tensors().unwrap().into_iter().collect();
        let begun = tensors.insert(self.parameter.clone(), parameter);
        assert!(begun.is_some(), "{} among {:?}", self.parameter, tensors.keys());
        adapted.load_adapter_tensors(tensors).unwrap();
        adapted
    }

    /// `stored` gives the variant's tensors.
    fn check(&self, what: &str, golden: &Golden, stored: impl Fn(&str) -> Tensor, model: &dyn Model, place: &Place) {
        // In bf16 up to three times PyTorch's own error, as of whole models.
        let close = |most: f64, part: &str| match place.dtype {
            DType::Bf16 => most.max(3.0 * self.bf16_vs_f64[part]),
            _ => most,
        };
        let adapted = self.adapted(model, place, stored("parameter"));
        let (batch, count) = golden.batch(model, &adapted);
        let logits = model.logits(&adapted, &batch).unwrap();
        within(&format!("{what}: logits"), relative(&logits, &stored("logits")), close(place.close, "logits"));

        let mut grads = Grads::new(&adapted.params).unwrap();
        let mut t = Tape::new(&adapted.params);
        let loss = model.loss(&mut t, &adapted, &batch, 0.0, 1.0 / count as f64).unwrap();
        let error = (loss.value().to_f64().unwrap()[0] - self.loss).abs() / self.loss;
        within(&format!("{what}: loss"), error, close(place.close, "loss"));
        t.backward(loss, &mut grads).unwrap();
        assert_eq!(grads.unwritten(), Vec::<&str>::new(), "{what}");
        let id = adapted.params.ids().find(|&id| adapted.params.name(id) == self.parameter).unwrap();
        let error = relative(&grads.get(id).unwrap().unwrap(), &stored("grad"));
        within(&format!("{what}: gradient"), error, close(place.each, "grad"));
    }
}

#[test]
fn logits_losses_and_gradients_of_virtual_tokens() {
    for place in places() {
        for name in CASES {
            let files = goldens().join("virtual");
            let text = fs::read_to_string(files.join(format!("{name}.json"))).unwrap();
            let golden: Golden = serde_json::from_str(&text).unwrap();
            let tensors = TensorFile::open(&files.join(format!("{name}.safetensors"))).unwrap();
            let model = load_as(&goldens().join(name).join("model"), &place.device, place.dtype).unwrap();
            assert_eq!(golden.variants.len(), 4, "prefix and infix, of embeddings and of keys and values");
            for (variant, of) in &golden.variants {
                let what = format!("{name}, {variant}, on {} in {:?}", place.device, place.dtype);
                let stored = |part: &str| reference(&tensors, &format!("{variant}.{part}"));
                of.check(&what, &golden, stored, model.as_ref(), &place);
            }
        }
    }
}
