//! Batches whose sequences have different adapters: each sequence gets what its adapter alone gives it.

use std::{ops::Range, path::Path, sync::Arc};

use lora_core::peft::{Adapted, Bias, Modules, Options, find};
use lora_kernels::{DType, Device};
use lora_model::{
    Error, LoadOptions, Model, Targets, Task, Texts,
    adapter::{self, Adapters},
    generate::{GenerationConfig, generate},
    load_with,
};

use crate::common::{CPU, disturb, goldens, gpus, relative, within};

fn model(case: &str, device: &Device, dtype: DType) -> Box<dyn Model> {
    load_with(&goldens().join(case).join("model"), device, &LoadOptions { dtype, ..LoadOptions::default() }).unwrap()
}

fn options(change: impl FnOnce(&mut Options)) -> Options {
    let mut options = Options { rank: 2, alpha: 3.0, bottleneck: 3, ..Options::default() };
    change(&mut options);
    options
}

fn adapted(method: &str, options: &Options, model: &dyn Model, seed: u64) -> Adapted {
    let method = (find(method).unwrap().build)(options).unwrap();
    let mut adapted = Adapted::new(&*method, model, &model.device(), model.dtype(), seed).unwrap();
    disturb(&mut adapted.params, 0.2);
    adapted
}

/// Of several ranks, on different modules, and of kinds that add to the base's output and that do not.
fn several(model: &dyn Model) -> Adapters {
    let mut adapters = Adapters::new();
    let everywhere = options(|o| (o.rank, o.targets) = (3, Modules::AllLinear));
    adapters.insert("small", adapted("lora", &options(|_| ()), model, 1));
    adapters.insert("everywhere", adapted("lora", &everywhere, model, 2));
    adapters.insert("dora", adapted("lora", &options(|o| o.use_dora = true), model, 3));
    adapters.insert("ia3", adapted("ia3", &options(|_| ()), model, 4));
    adapters.insert("vera", adapted("vera", &options(|_| ()), model, 5));
    adapters.insert("adalora", adapted("adalora", &options(|o| o.alpha = 300.0), model, 6));
    adapters
}

const OF: [Option<&str>; 10] = [
    Some("small"),
    None,
    Some("everywhere"),
    Some("everywhere"),
    Some("dora"),
    Some("ia3"),
    None,
    Some("vera"),
    Some("adalora"),
    Some("small"),
];

/// The same, where some have changed the output head, which is a linear map of its own, or other maps as a whole.
fn several_with_heads(model: &dyn Model) -> Adapters {
    let mut adapters = several(model);
    let head = options(|o| o.targets = ["lm_head", "q_proj"].into_iter().collect());
    let whole = options(|o| o.modules_to_save = vec!["lm_head".into(), "1.mlp".into()]);
    adapters.insert("small", adapted("lora", &head, model, 7));
    adapters.insert("everywhere", adapted("lora", &whole, model, 8));
    adapters
}

/// Those of a golden model.
fn several_of(case: &str, model: &dyn Model) -> Adapters {
    if case == "llama2" { several_with_heads(model) } else { several(model) }
}

/// Sequences of different lengths, each other tokens.
fn sequences(model: &dyn Model) -> Vec<Vec<u32>> {
    let vocab = model.limits().vocab_size as u32;
    (0..OF.len() as u32).map(|i| (0..2 + i * 3 % 7).map(|j| (i * 31 + j * j * 7 + 5) % vocab).collect()).collect()
}

/// The adapter of that name, or the bare base.
fn one(adapters: &Adapters, name: Option<&str>, device: &Device) -> Arc<Adapted> {
    match name {
        Some(name) => adapters.get(name).unwrap().clone(),
        None => Arc::new(Adapted::none(device).unwrap()),
    }
}

#[test]
fn each_sequence_has_the_logits_of_its_adapter() {
    let places = gpus().into_iter().map(|gpu| (gpu, DType::F32)).chain([(CPU, DType::F32), (CPU, DType::Bf16)]);
    for (device, dtype) in places {
        // In bf16 each row is rounded as it is alone.
        for case in ["gpt2", "llama2", "llama3", "qwen3", "mistral", "bert_masked_lm", "roberta_masked_lm"] {
            let model = model(case, &device, dtype);
            let (adapters, sequences) = (several_of(case, &*model), sequences(&*model));
            let mixed = adapters.mixed(&OF, &*model, &device).unwrap();
            let lengths: Vec<usize> = sequences.iter().map(Vec::len).collect();
            let batch = model.batch(&mixed, &Texts::new(&sequences.concat(), &lengths)).unwrap();
            let together = model.logits(&mixed, &batch).unwrap();
            let (mut worst, mut at) = (0f64, 0);
            for (tokens, name) in sequences.iter().zip(OF) {
                let adapted = one(&adapters, name, &device);
                let batch = model.batch(&adapted, &Texts::new(tokens, &[tokens.len()])).unwrap();
                let alone = model.logits(&adapted, &batch).unwrap();
                worst = worst.max(relative(&together.rows_in(at..at + tokens.len()), &alone));
                at += tokens.len();
            }
            within(&format!("{case} in {dtype:?} on {device:?}"), worst, 2e-6);
        }
    }
}

/// The loss looks at the rows of targets alone, of which each sequence has its own number.
#[test]
fn losses_add_up() {
    for case in ["gpt2", "llama2", "qwen2", "bert_masked_lm"] {
        let model = model(case, &CPU, DType::F32);
        let (adapters, sequences) = (several_of(case, &*model), sequences(&*model));
        let loss = |adapted: &Adapted, some: &[Vec<u32>]| {
            let (lengths, mut rows, mut start): (Vec<usize>, Vec<u32>, u32) =
                (some.iter().map(Vec::len).collect(), vec![], 0);
            for tokens in some {
                let n = tokens.len() as u32;
                rows.extend(start + n / 2..start + n - 1);
                start += n;
            }
            let ids = vec![7; rows.len()];
            let tokens = some.concat();
            let texts = Texts::new(&tokens, &lengths).targets(Targets::Tokens { rows: &rows, ids: &ids });
            let batch = model.batch(adapted, &texts).unwrap();
            let mut t = lora_core::Tape::inference(&adapted.params);
            model.loss(&mut t, adapted, &batch, 0.0, 1.0).unwrap().value().to_f64().unwrap()[0]
        };
        let together = loss(&adapters.mixed(&OF, &*model, &CPU).unwrap(), &sequences);
        let alone: f64 =
            sequences.iter().zip(OF).map(|(s, name)| loss(&one(&adapters, name, &CPU), std::slice::from_ref(s))).sum();
        within(&format!("{case}: {together} of {alone}"), (together - alone).abs() / alone, 1e-6);
    }
}

/// Whether products of few rows and of many are this project's own. Elsewhere another crate computes those of many, whose
/// sums are of another order: logits are 2.1e-6 apart on AVX2.
fn products_of_rows_agree() -> bool {
    lora_kernels::cpu_instructions() == "AVX-512 BF16"
}

/// Of classifiers, whose heads are each adapter's own, and of adapters that have changed linear maps as a whole.
#[test]
fn each_text_is_judged_by_the_head_of_its_adapter() {
    let mut places: Vec<_> = gpus().into_iter().map(|gpu| (gpu, DType::F32)).collect();
    places.extend([(CPU, DType::F32), (CPU, DType::Bf16)]);
    for (device, dtype) in places {
        for (case, layer) in [("bert_classification", "intermediate.dense"), ("roberta_regression", "output.dense")] {
            let model = model(case, &device, dtype);
            let task = model.task();
            let mut adapters = several(&*model);
            let whole = options(|o| o.modules_to_save = vec![layer.into()]);
            adapters.insert("small", adapted("lora", &whole, &*model, 7));
            adapters.insert("dora", adapted("lora", &options(|o| o.bias = Bias::LoraOnly), &*model, 8));
            let own = |name: &str| adapters.get(name).unwrap().trained().map(str::to_owned).collect::<Vec<_>>();
            for part in [layer, "classifier"] {
                assert!(own("small").iter().any(|n| n.contains(part)), "{:?}", own("small"));
            }
            assert!(own("dora").iter().any(|n| n.ends_with("query.bias")), "{:?}", own("dora"));
            let sequences = sequences(&*model);
            let labels: Vec<u32> = (0..OF.len() as u32).map(|i| i % 3).collect();
            let numbers: Vec<f32> = labels.iter().map(|&l| l as f32 - 0.7).collect();
            let judged = |adapted: &Adapted, some: Range<usize>| {
                let lengths: Vec<usize> = sequences[some.clone()].iter().map(Vec::len).collect();
                let targets = match task {
                    Task::Regression => Targets::Values(&numbers[some.clone()]),
                    _ => Targets::Labels(&labels[some.clone()]),
                };
                let tokens = sequences[some].concat();
                let batch = model.batch(adapted, &Texts::new(&tokens, &lengths).targets(targets)).unwrap();
                let mut t = lora_core::Tape::inference(&adapted.params);
                let loss = model.loss(&mut t, adapted, &batch, 0.0, 0.3).unwrap().value().to_f64().unwrap()[0];
                (model.logits(adapted, &batch).unwrap(), loss)
            };
            let (together, loss) = judged(&adapters.mixed(&OF, &*model, &device).unwrap(), 0..OF.len());
            let (mut worst, mut sum, mut bare) = (0f64, 0.0, 0f64);
            for (i, name) in OF.into_iter().enumerate() {
                let (alone, loss) = judged(&one(&adapters, name, &device), i..i + 1);
                worst = worst.max(relative(&together.rows_in(i..i + 1), &alone));
                bare = bare.max(relative(&judged(&one(&adapters, None, &device), i..i + 1).0, &alone));
                sum += loss;
            }
            let what = format!("{case} in {dtype:?} on {device:?}");
            within(&what, worst, if products_of_rows_agree() { 2e-6 } else { 4e-6 });
            within(&format!("{what}: loss {loss} of {sum}"), (loss - sum).abs() / sum, 2e-6);
            assert!(bare > 1e-2, "{what}: the adapters change nothing");
        }
    }
}

#[test]
fn each_prompt_is_continued_as_by_its_adapter_alone() {
    for device in gpus().into_iter().chain([CPU]) {
        for case in ["gpt2", "llama2", "llama3"] {
            let model = model(case, &device, DType::F32);
            let (adapters, prompts) = (several_of(case, &*model), sequences(&*model));
            let mixed = adapters.mixed(&OF, &*model, &device).unwrap();
            // Texts end at different times, so that the batch loses sequences, and beams change places.
            let vocab = model.limits().vocab_size as u32;
            let every = |n| (0..vocab).step_by(n).collect();
            let greedy = GenerationConfig { max_new_tokens: 8, eos_token_id: every(3), ..Default::default() };
            let beams = GenerationConfig { num_beams: 3, eos_token_id: every(7), ..greedy.clone() };
            for config in [greedy, beams] {
                let together = generate(&*model, &mixed, &prompts, &config, None).unwrap();
                let mut lengths = Vec::new();
                for ((prompt, name), together) in prompts.iter().zip(OF).zip(&together) {
                    let adapted = one(&adapters, name, &device);
                    let alone = generate(&*model, &adapted, std::slice::from_ref(prompt), &config, None).unwrap();
                    assert_eq!(together.tokens, alone[0].tokens, "{case}, {} beams, {name:?}", config.num_beams);
                    lengths.push(together.tokens.len());
                }
                lengths.dedup();
                assert!(lengths.len() > 1, "{case}: all texts are as long: {lengths:?}");
            }
        }
    }
}

#[test]
fn what_cannot_share_a_batch_is_refused_by_name() {
    let gpt2 = model("gpt2", &CPU, DType::F32);
    let mut adapters = several(&*gpt2);
    let e = adapters.mixed(&[Some("smal")], &*gpt2, &CPU).unwrap_err().to_string();
    assert!(e.contains("`smal`") && e.contains("adalora, dora, everywhere, ia3, small, vera"), "{e}");
    assert!(Adapters::new().get("x").unwrap_err().to_string().contains("none is loaded"));

    adapters.insert("biases", adapted("lora", &options(|o| o.bias = Bias::All), &*gpt2, 5));
    adapters.insert("bottleneck", adapted("adapter-p", &options(|_| ()), &*gpt2, 6));
    for (name, wanted) in [("biases", ".bias of the base itself"), ("bottleneck", "no change of a linear map")] {
        let Err(Error::Adapters { problem }) = adapters.mixed(&[Some("small"), Some(name)], &*gpt2, &CPU) else {
            panic!()
        };
        assert!(problem.contains(name) && problem.contains(wanted), "{problem}");
    }

    // A fresh head for filling in tokens trains with every method, and is more than linear maps.
    let folder = goldens().join("bert_classification/model");
    let filling = LoadOptions { task: Some(Task::MaskedLm), head_follows: true, ..LoadOptions::default() };
    let filling = load_with(&folder, &CPU, &filling).unwrap();
    let mut fresh = Adapters::new();
    fresh.insert("fresh", adapted("lora", &options(|_| ()), &*filling, 1));
    let e = fresh.mixed(&[Some("fresh"), None], &*filling, &CPU).unwrap_err().to_string();
    assert!(e.contains("of the base itself"), "{e}");

    // Several are not saved, loaded or merged as if they were one.
    let mut mixed = adapters.mixed(&OF, &*gpt2, &CPU).unwrap();
    let tensors = adapters.get("small").unwrap().adapter_tensors().unwrap();
    for e in [
        mixed.adapter_tensors().unwrap_err(),
        mixed.merged(&*gpt2).unwrap_err(),
        mixed.load_adapter_tensors(tensors.into_iter().collect()).unwrap_err(),
    ] {
        assert!(e.to_string().contains("each by itself"), "{e}");
    }
    // Nor are several of several.
    adapters.insert("mixed", mixed);
    let e = adapters.mixed(&[Some("mixed")], &*gpt2, &CPU).unwrap_err().to_string();
    assert!(e.contains("`mixed`") && e.contains("several"), "{e}");

    // DeBERTa projects one table for all sequences.
    let deberta = model("deberta_v2_masked_lm", &CPU, DType::F32);
    assert_eq!(deberta.task(), Task::MaskedLm);
    let mut adapters = Adapters::new();
    adapters.insert("one", adapted("lora", &options(|o| o.targets = Modules::AllLinear), &*deberta, 1));
    let mixed = adapters.mixed(&[Some("one"), None], &*deberta, &CPU).unwrap();
    let batch = deberta.batch(&mixed, &Texts::new(&[1, 2, 3], &[2, 1])).unwrap();
    let e = deberta.logits(&mixed, &batch).unwrap_err().to_string();
    assert!(e.contains("belong to all sequences"), "{e}");
}

#[test]
fn an_adapter_is_replaced_while_it_is_in_use() {
    let gpt2 = model("gpt2", &CPU, DType::F32);
    let (old, new, bad) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), Path::new("no/such/folder"));
    for (dir, seed) in [(&old, 1), (&new, 2)] {
        let adapted = adapted("lora", &options(|_| ()), &*gpt2, seed);
        adapter::save(dir.path(), "lora", &options(|_| ()), &adapted, &*gpt2, None).unwrap();
    }
    let mut adapters = Adapters::new();
    assert!(adapters.load("a", old.path(), &*gpt2, &CPU).unwrap().is_none());
    let logits = |adapted: &Adapted| {
        let batch = gpt2.batch(adapted, &Texts::new(&[1, 2, 3], &[3])).unwrap();
        gpt2.logits(adapted, &batch).unwrap().to_vec::<f32>().unwrap()
    };
    let in_use = adapters.get("a").unwrap().clone();
    let before = logits(&in_use);
    assert!(adapters.load("a", bad, &*gpt2, &CPU).is_err());
    assert_eq!(logits(adapters.get("a").unwrap()), before, "a failed load changes nothing");
    let replaced = adapters.load("a", new.path(), &*gpt2, &CPU).unwrap().unwrap();
    assert!(Arc::ptr_eq(&replaced, &in_use));
    assert_eq!(logits(&in_use), before);
    assert_ne!(logits(adapters.get("a").unwrap()), before);
    assert_eq!(adapters.names().collect::<Vec<_>>(), ["a"]);
    assert!(adapters.remove("a").is_some() && adapters.get("a").is_err());
}
