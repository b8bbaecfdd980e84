//! Every method on every architecture that it fits: the list that each pair passes. A new row of either table is tested
//! without a line here, as long as there is a golden model of the architecture.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use crate::common::{CPU, distance, disturb, goldens, gpus, norm, relative};

use lora_core::{
    Error, Grads, Noise, Params, Tape, Tensor, gradcheck_some,
    peft::{
        Adapted, Bias, Combined, Frozen, InitLoraWeights, Layers, METHODS, MethodRow, Modules, Options, PreEmbed,
        PreLayer, Start, VirtualTokens, find,
    },
};
use lora_kernels::{Activation, AdamW, DType, Device, adamw, axpby};
use lora_model::{
    ARCHITECTURES, Batch, LoadOptions, Model, Targets, Task, Texts, adapter, config::RawConfig, load_with,
};

/// The folders of the golden models, by the names of their cases.
fn golden() -> BTreeMap<String, PathBuf> {
    let cases = fs::read_dir(goldens()).unwrap().map(|e| e.unwrap());
    let cases = cases.map(|e| (e.file_name().into_string().unwrap(), e.path().join("model")));
    cases.filter(|(_, model)| model.join("config.json").exists()).collect()
}

/// A base of one architecture, and texts for it.
struct Base {
    case: String,
    model: Box<dyn Model>,
}

impl Base {
    fn new(case: &str, dir: &Path, dtype: DType) -> Base {
        Base::on(&CPU, case, dir, dtype).unwrap_or_else(|e| panic!("{case}: {e}"))
    }

    fn on(device: &Device, case: &str, dir: &Path, dtype: DType) -> lora_model::Result<Base> {
        let model = load_with(dir, device, &LoadOptions { dtype, ..LoadOptions::default() })?;
        Ok(Base { case: case.into(), model })
    }

    fn batch(&self, adapted: &Adapted) -> Batch {
        let limits = self.model.limits();
        let lengths = [6, 3, 4];
        let tokens: Vec<u32> = (0..13).map(|i| (i * i * 7 + 5) % limits.vocab_size as u32).collect();
        let segments: Vec<u32> = (0..13).map(|i| u32::from(limits.segments > 1 && i % 3 == 2)).collect();
        let rows = [2, 3, 4, 7, 9, 10, 11];
        let ids: Vec<u32> = rows.iter().map(|r| (r * 11 + 3) % limits.vocab_size as u32).collect();
        let targets = match self.model.task() {
            Task::CausalLm | Task::MaskedLm => Targets::Tokens { rows: &rows, ids: &ids },
            Task::Classification { .. } => Targets::Labels(&[1, 0, 1]),
            Task::Regression => Targets::Values(&[0.5, -1.0, 2.0]),
        };
        let mut texts = Texts::new(&tokens, &lengths).targets(targets);
        if limits.segments > 0 {
            texts = texts.segments(&segments);
        }
        self.model.batch(adapted, &texts).unwrap()
    }

    fn logits(&self, adapted: &Adapted) -> Tensor {
        self.model.logits(adapted, &self.batch(adapted)).unwrap()
    }

    fn bits(&self) -> Vec<Vec<u64>> {
        self.model.tensors().map(|(_, t)| bits(t)).collect()
    }

    fn adapt(&self, row: &MethodRow, o: &Options, seed: u64) -> Result<Adapted, Error> {
        Adapted::new((row.build)(o)?.as_ref(), &*self.model, &self.model.device(), self.model.dtype(), seed)
    }

    /// Plain options, with adapters to combine.
    fn options(&self) -> Options {
        let plain =
            Options { rank: 2, alpha: 3.0, bottleneck: 3, prefix: 2, layers: Layers::Last(1), ..Options::default() };
        let frozen = |name: &str, bottleneck: usize| {
            let o = Options { bottleneck, ..plain.clone() };
            let mut adapted = self.adapt(find("adapter-p").unwrap(), &o, bottleneck as u64).unwrap();
            disturb(&mut adapted.params, 0.3);
            // A head is no part of what is combined.
            let outline = self.model.outline();
            let tensors = adapted.adapter_tensors().unwrap().into_iter();
            let tensors = tensors.filter(|(name, _)| !outline.is_saved_module(name)).collect();
            Frozen { name: name.into(), bottleneck, tensors }
        };
        Options { fuse: vec![frozen("first", 3), frozen("second", 2)], ..plain }
    }
}

/// What each method is tried with; a method that does not read an option runs unchanged.
type Change = fn(&mut Options);
const VARIANTS: &[(&str, Change)] = &[
    ("plain", |_| {}),
    ("an infix", |o| (o.prefix, o.infix) = (1, 2)),
    ("reparametrised", |o| o.reparam = 5),
    ("uncounted", |o| o.count_prefix = false),
    ("judged by the prefix", |o| o.classify_prefix = true),
    ("dropped layers", |o| o.drop_layers = Some(Layers::First(1))),
    ("norms train too", |o| o.train_norms = true),
    ("another nonlinearity", |o| o.non_linearity = Some(Activation::Tanh)),
    ("dropout", |o| o.dropout = 0.3),
    ("wider than the stream", |o| o.bottleneck = 40),
    ("DoRA", |o| o.use_dora = true),
    ("DoRA with dropout", |o| (o.use_dora, o.dropout) = (true, 0.3)),
    ("PiSSA", |o| o.init_lora_weights = InitLoraWeights::Pissa { niter: None }),
    ("OLoRA and DoRA with dropout", |o| {
        (o.init_lora_weights, o.use_dora, o.dropout) = (InitLoraWeights::Olora, true, 0.3);
    }),
    ("biases of what is adapted", |o| o.bias = Bias::LoraOnly),
    ("all linear maps", |o| o.targets = Modules::AllLinear),
    ("the output head", |o| {
        (o.targets, o.dropout) = (Modules::Regex(r"lm_head|.*(c_attn|q_proj)".into()), 0.3);
    }),
    ("PiSSA with the output head", |o| {
        o.targets = Modules::Regex(r"lm_head|.*(c_attn|q_proj)".into());
        o.init_lora_weights = InitLoraWeights::Pissa { niter: None };
    }),
    ("embeddings", |o| {
        o.targets = Modules::Regex(
            r".*(wte|wpe|embed_tokens|(word|position|token_type)_embeddings|c_attn|query|q_proj|query_proj)".into(),
        )
    }),
];

/// Whether a method reads what a variant changes.
fn reads(row: &MethodRow, variant: &str) -> bool {
    let option = match variant {
        "plain" => return true,
        "an infix" => "infix",
        "reparametrised" => "reparam",
        "uncounted" => "count-prefix",
        "judged by the prefix" => "classify-prefix",
        "dropped layers" => "drop-layers",
        "norms train too" => "train-norms",
        "another nonlinearity" => "non-linearity",
        "dropout" => "dropout",
        "wider than the stream" => "bottleneck",
        "DoRA" | "DoRA with dropout" => "use-dora",
        // LoRA alone adapts tables of embeddings and heads.
        "PiSSA" | "OLoRA and DoRA with dropout" | "embeddings" | "the output head" | "PiSSA with the output head" => {
            "init-lora-weights"
        }
        "biases of what is adapted" => "bias",
        // Which linear maps (IA)³ multiplies is a matter of its own.
        "all linear maps" => "rank",
        other => panic!("{other}"),
    };
    row.options.contains(&option)
}

/// Runs `check` for every method on every architecture that it fits, with every variant.
fn for_all(dtype: DType, check: impl Fn(&str, &Base, &MethodRow, &Options)) {
    for (case, dir) in golden() {
        let base = Base::new(&case, &dir, dtype);
        let before = base.bits();
        let plain = base.options();
        let mut tried = 0;
        for row in METHODS {
            match base.adapt(row, &plain, 0) {
                Ok(_) => {}
                Err(Error::DoesNotFit { architecture, .. } | Error::NothingTrainable { architecture, .. }) => {
                    assert_eq!(architecture, base.model.outline().architecture);
                    continue;
                }
                Err(e) => panic!("{case}, {}: {e}", row.name),
            }
            for (variant, change) in VARIANTS.iter().filter(|(v, _)| reads(row, v)) {
                let mut o = plain.clone();
                change(&mut o);
                if row.name == "adalora" {
                    // Its update is a product of three numbers, all of them small.
                    o.alpha = 300.0;
                }
                if o.targets.to_string().contains("lm_head") && base.model.task() != Task::CausalLm {
                    continue;
                }
                if o.classify_prefix && base.model.outline().task_type != Some("SEQ_CLS") {
                    continue;
                }
                check(&format!("{case}, {}, {variant}", row.name), &base, row, &o);
                tried += 1;
            }
        }
        assert!(tried > 5, "{case}: only {tried} methods fit");
        assert_eq!(base.bits(), before, "{case}: the base was written");
    }
}

fn bits(t: &Tensor) -> Vec<u64> {
    t.to_f64().unwrap().into_iter().map(f64::to_bits).collect()
}

#[test]
fn every_architecture_has_a_golden_model() {
    let models: Vec<String> = golden()
        .values()
        .map(|dir| RawConfig::from_dir(dir).unwrap().str("model_type").unwrap().unwrap().to_owned())
        .collect();
    for row in ARCHITECTURES {
        assert!(models.iter().any(|m| m == row.model_type), "{} is not tested", row.model_type);
    }
}

#[test]
fn at_initialisation_the_output_is_what_the_method_says() {
    for_all(DType::F32, |what, base, row, o| {
        let adapted = base.adapt(row, o, 1).unwrap();
        let (want, got) = (base.logits(&Adapted::none(&CPU).unwrap()), base.logits(&adapted));
        let error = relative(&got, &want);
        match (row.build)(o).unwrap().start() {
            Start::Base => assert_eq!(bits(&got), bits(&want), "{what}"),
            Start::NearBase => assert!(error < 0.05, "{what}: {error}"),
            Start::Elsewhere => assert!(error > 1e-4, "{what}: {error}"),
        }
    });
}

#[test]
fn gradients_are_those_of_finite_differences() {
    for_all(DType::F64, |what, base, row, o| {
        // DoRA's gradients are those of constant norms; PEFT's training steps are held against them.
        if o.use_dora {
            return;
        }
        let mut adapted = base.adapt(row, o, 1).unwrap();
        disturb(&mut adapted.params, 0.1);
        let batch = base.batch(&adapted);
        let worst = gradcheck_some(&adapted.params, 3, |t| {
            let idle = Tape::inference(&Params::none(&CPU)?);
            *t = std::mem::replace(t, idle).with_noise(Noise {
                seed: 5,
                step: 3,
                row_offset: 0,
                sequence_offset: 0,
                target_offset: 0,
            });
            Ok(base.model.loss(t, &adapted, &batch, 0.1, 0.25).unwrap())
        })
        .unwrap();
        assert!(worst.error <= 1e-7 && worst.largest > 1e-3, "{what}: {worst:?}");
    });
}

#[test]
fn what_is_saved_loads_bit_for_bit() {
    for_all(DType::F32, |what, base, row, o| {
        let mut adapted = base.adapt(row, o, 1).unwrap();
        disturb(&mut adapted.params, 0.1);
        let (want, dir) = (base.logits(&adapted), tempfile::tempdir().unwrap());
        let got = if row.whole_model {
            base.model.save(dir.path(), &adapted.merged(&*base.model).unwrap()).unwrap();
            let loaded = Base::new(what, dir.path(), DType::F32);
            loaded.logits(&Adapted::none(&CPU).unwrap())
        } else {
            adapter::save(dir.path(), row.name, o, &adapted, &*base.model, Some("base")).unwrap();
            let file = adapter::load(dir.path()).unwrap();
            assert_eq!((file.method, file.base_model_name_or_path.as_deref()), (row.name, Some("base")), "{what}");
            let loaded = file.attach(&*base.model, &CPU).unwrap();
            // Saved once more it is the same.
            let again = tempfile::tempdir().unwrap();
            adapter::save(again.path(), row.name, &file.options, &loaded, &*base.model, Some("base")).unwrap();
            for name in [adapter::CONFIG_FILE, adapter::WEIGHTS_FILE] {
                let read = |dir: &tempfile::TempDir| fs::read(dir.path().join(name)).unwrap();
                assert!(read(&dir) == read(&again), "{what}: {name} changes");
            }
            base.logits(&loaded)
        };
        match o.init_lora_weights.takes_from_base() && row.options.contains(&"init-lora-weights") {
            // What it began at is one of its directions now, and summed with the others.
            true => assert!(relative(&got, &want) < 1e-5, "{what}: {}", relative(&got, &want)),
            false => assert_eq!(bits(&got), bits(&want), "{what}"),
        }
    });
}

#[test]
fn merging_equals_applying() {
    for_all(DType::F32, |what, base, row, o| {
        let mut adapted = base.adapt(row, o, 1).unwrap();
        disturb(&mut adapted.params, 0.1);
        if !adapted.is_mergeable() {
            return assert!(adapted.merged(&*base.model).is_err(), "{what}");
        }
        if o.targets.to_string().contains("embed") && base.model.task() == Task::MaskedLm {
            // Its head has the embeddings for its matrix, and can have no other.
            let refused = adapted.merged(&*base.model).unwrap_err();
            return assert!(matches!(refused, Error::Structure { .. }), "{what}: {refused}");
        }
        let (want, dir) = (base.logits(&adapted), tempfile::tempdir().unwrap());
        base.model.save(dir.path(), &adapted.merged(&*base.model).unwrap()).unwrap();
        let merged = Base::new(what, dir.path(), DType::F32);
        let none = Adapted::none(&CPU).unwrap();
        let error = relative(&merged.logits(&none), &want);
        assert!(error <= 1e-5, "{what}: merged and applied differ by {error}");
        assert!(relative(&base.logits(&none), &want) > 1e-3, "{what}: nothing was adapted");
    });
}

#[test]
fn training_reaches_what_trains_and_no_byte_of_what_is_frozen() {
    for_all(DType::F32, |what, base, row, o| {
        let mut adapted = base.adapt(row, o, 1).unwrap();
        let (frozen, batch) = (base.bits(), base.batch(&adapted));
        let mut grads = Grads::new(&adapted.params).unwrap();
        let n = adapted.params.count();
        let [mut m, mut v] = [0, 1].map(|_| Tensor::zeros(&CPU, DType::F32, &[1, n]).unwrap());
        let mut losses = Vec::new();
        for step in 1..=8 {
            grads.reset();
            let mut t = Tape::new(&adapted.params);
            let loss = base.model.loss(&mut t, &adapted, &batch, 0.0, 0.2).unwrap();
            losses.push(loss.value().to_f64().unwrap()[0]);
            t.backward(loss, &mut grads).unwrap();
            assert_eq!(grads.unwritten(), [""; 0], "{what}: trains, but has no gradient in step {step}");
            let rule = AdamW { lr: 0.01, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01, step };
            let (p, g) = (adapted.params.flat_mut().unwrap(), grads.flat_mut().unwrap());
            adamw(&rule, p, g.as_mat(), m.make_mut().unwrap(), v.make_mut().unwrap()).unwrap();
        }
        assert!(losses[7] < losses[0], "{what}: the loss does not fall: {losses:?}");
        assert_eq!(base.bits(), frozen, "{what}: the base was written");
    });
}

/// Token by token over a cache, with prompts of different lengths in one batch, as all at once.
#[test]
fn cached_logits_are_those_of_the_whole_text() {
    for_all(DType::F32, |what, base, row, o| {
        if base.model.task() != Task::CausalLm {
            return;
        }
        let mut adapted = base.adapt(row, o, 1).unwrap();
        disturb(&mut adapted.params, 0.1);
        let vocabulary = base.model.limits().vocab_size as u32;
        let text = |seed: u32, n: u32| (0..n).map(|i| (i * i * 5 + seed) % vocabulary).collect::<Vec<u32>>();
        let (first, second) = (text(3, 4), text(8, 2));
        let more = text(17, 3);
        let mut cache = base.model.cache(2, 4).unwrap();
        let prompts: Vec<u32> = first.iter().chain(&second).copied().collect();
        let mut got = vec![base.model.step(&adapted, &mut cache, &prompts, &[4, 2]).unwrap()];
        for &token in &more {
            got.push(base.model.step(&adapted, &mut cache, &[token, token], &[1, 1]).unwrap());
        }
        for (s, prompt) in [&first, &second].into_iter().enumerate() {
            let whole: Vec<u32> = prompt.iter().chain(&more).copied().collect();
            // An infix stands after the prompt: the first token after it is what is to be predicted.
            let rows: Vec<u32> = (prompt.len() as u32 - 1..whole.len() as u32 - 1).collect();
            let ids = &whole[prompt.len()..];
            let lengths = [whole.len()];
            let texts = Texts::new(&whole, &lengths).targets(Targets::Tokens { rows: &rows, ids });
            let batch = base.model.batch(&adapted, &texts).unwrap();
            let all = base.model.logits(&adapted, &batch).unwrap();
            for (i, step) in got.iter().enumerate().skip(1) {
                let want = all.rows_in(prompt.len() - 1 + i..prompt.len() + i);
                let error = relative(&step.rows_in(s..s + 1), &want);
                assert!(error <= 1e-5, "{what}: text {s}, token {i} differs by {error}");
            }
            // What predicts the first of them is the last row of the infix: its loss tells.
            let mut t = Tape::inference(&adapted.params);
            let loss = base.model.loss(&mut t, &adapted, &batch, 0.0, 1.0).unwrap().value().to_f64().unwrap()[0];
            let nll = |z: &Tensor, id: u32| {
                let z = z.to_f64().unwrap();
                z.iter().map(|v| v.exp()).sum::<f64>().ln() - z[id as usize]
            };
            let want: f64 = ids.iter().zip(&got).map(|(&id, z)| nll(&z.rows_in(s..s + 1), id)).sum();
            assert!((loss - want).abs() <= 1e-5 * want.abs(), "{what}: text {s}, loss {loss} for {want}");
        }
    });
}

/// On a GPU every method gives the logits and the gradients that it gives on the CPU, dropout included.
#[test]
fn devices_agree() {
    let noise = Noise { seed: 5, step: 3, row_offset: 7, sequence_offset: 2, target_offset: 3 };
    for device in gpus() {
        for case in ["gpt2", "qwen3", "bert_classification"] {
            let dir = &golden()[case];
            let (cpu, gpu) = (Base::new(case, dir, DType::F32), Base::on(&device, case, dir, DType::F32).unwrap());
            let o = Options { dropout: 0.2, infix: 1, reparam: 3, ..cpu.options() };
            for row in METHODS.iter().filter(|row| cpu.adapt(row, &o, 0).is_ok()) {
                let run = |base: &Base| {
                    let mut adapted = base.adapt(row, &o, 1).unwrap();
                    disturb(&mut adapted.params, 0.1);
                    let (batch, mut grads) = (base.batch(&adapted), Grads::new(&adapted.params).unwrap());
                    let mut t = Tape::new(&adapted.params).with_noise(noise);
                    let loss = base.model.loss(&mut t, &adapted, &batch, 0.1, 0.25).unwrap();
                    t.backward(loss, &mut grads).unwrap();
                    let n = adapted.params.count();
                    let mut flat = Tensor::empty(&base.model.device(), DType::F32, &[1, n]).unwrap();
                    let all = grads.flat_mut().unwrap();
                    axpby(1.0, all.as_mat(), 0.0, flat.make_mut().unwrap()).unwrap();
                    (base.logits(&adapted), flat)
                };
                let ((logits, grads), (want_logits, want_grads)) = (run(&gpu), run(&cpu));
                let what = format!("{case}, {} on {device}", row.name);
                let error = relative(&logits, &want_logits);
                assert!(error <= 1e-5, "{what}: logits differ by {error}");
                let error = distance(&grads, &want_grads) / norm(&want_grads);
                assert!(error <= 1e-5, "{what}: gradients differ by {error}");
            }
        }
    }
}

/// Without the adapters of some layers a model computes what it computes with those of the others alone.
#[test]
fn layers_are_dropped_for_inference() {
    for_all(DType::F32, |what, base, row, o| {
        let outline = base.model.outline();
        let mut adapted = base.adapt(row, o, 1).unwrap();
        disturb(&mut adapted.params, 0.3);
        let (before, last) = (base.logits(&adapted), outline.layers - 1);
        for layers in [Layers::Of(vec![last, last + 1]), Layers::First(last + 2)] {
            let refused = adapted.drop_layers(&layers, outline);
            assert!(matches!(refused, Err(Error::Option { option: "drop-layers", .. })), "{what}: {refused:?}");
        }
        let first = Layers::First(1);
        let everywhere = ["rank", "init-r", "bottleneck", "fuse", "feedforward-modules"]
            .iter()
            .any(|option| row.options.contains(option));
        if !everywhere || o.drop_layers == Some(first.clone()) {
            // The second of these has an adapter, perhaps, and keeps it.
            let refused = adapted.drop_layers(&Layers::All, outline);
            assert!(matches!(refused, Err(Error::Option { option: "drop-layers", .. })), "{what}: {refused:?}");
            return assert_eq!(bits(&base.logits(&adapted)), bits(&before), "{what}: refused, and yet dropped");
        }
        let sites = adapted.site_count();
        adapted.drop_layers(&first, outline).unwrap();
        let dropped = base.logits(&adapted);
        assert!(adapted.site_count() < sites && relative(&dropped, &before) > 1e-4, "{what}: nothing was dropped");
        if row.name == "adapter-p" {
            let o = Options { drop_layers: Some(first), ..o.clone() };
            let mut others = base.adapt(find("adapter-d").unwrap(), &o, 9).unwrap();
            let kept: Vec<String> = others.adapter_tensors().unwrap().into_iter().map(|(name, _)| name).collect();
            let all = base.adapt(row, &o, 1).map(|mut all| {
                disturb(&mut all.params, 0.3);
                all.adapter_tensors().unwrap()
            });
            let tensors = all.unwrap().into_iter().filter(|(name, _)| kept.contains(name));
            others.load_adapter_tensors(tensors.collect()).unwrap();
            assert_eq!(bits(&dropped), bits(&base.logits(&others)), "{what}");
        }
    });
}

#[test]
fn virtual_tokens_stand_in_one_place() {
    let tokens = VirtualTokens { prefix: 2, ..VirtualTokens::default() };
    let both = Combined::new("both", PreEmbed::new(tokens).unwrap(), PreLayer::new(tokens, 0).unwrap());
    let base = Base::new("gpt2", &golden()["gpt2"], DType::F32);
    let e = Adapted::new(&both, &*base.model, &CPU, DType::F32, 1).unwrap_err();
    assert!(matches!(e, Error::DoesNotFit { .. }) && e.to_string().contains("not in both"), "{e}");
}

/// An adapter of one architecture and method on a base of another, or read as another method.
#[test]
fn an_adapter_of_another_architecture_or_method_is_refused() {
    let bases: Vec<Base> = golden().iter().map(|(case, dir)| Base::new(case, dir, DType::F32)).collect();
    for base in &bases {
        let o = base.options();
        for row in METHODS.iter().filter(|m| !m.whole_model) {
            let Ok(adapted) = base.adapt(row, &o, 1) else { continue };
            let dir = tempfile::tempdir().unwrap();
            adapter::save(dir.path(), row.name, &o, &adapted, &*base.model, None).unwrap();
            let path = dir.path().join(adapter::CONFIG_FILE);
            let text = fs::read_to_string(&path).unwrap();
            // PEFT's types are told apart by other keys.
            let own = text.contains("\"method\"");
            for another in METHODS.iter().filter(|m| own && m.name != row.name && m.name != "lora") {
                fs::write(&path, text.replace(&format!("\"{}\"", row.name), &format!("\"{}\"", another.name))).unwrap();
                let attached = adapter::attach(dir.path(), &*base.model, &CPU);
                assert!(attached.is_err(), "{}: {} as {}", base.case, row.name, another.name);
                fs::write(&path, &text).unwrap();
            }
            for other in &bases {
                let (ours, theirs) = (base.model.outline(), other.model.outline());
                if ours.architecture == theirs.architecture || ours.tensors == theirs.tensors {
                    continue;
                }
                let e = adapter::attach(dir.path(), &*other.model, &CPU);
                let e =
                    e.err().unwrap_or_else(|| panic!("{} of {} on {}", row.name, base.case, other.case)).to_string();
                assert!(e.contains(&*dir.path().to_string_lossy()), "{}: {e}", row.name);
            }
        }
    }
}
