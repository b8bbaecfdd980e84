//! Every method of the table that needs no tokens passes the same list, on a tiny model with a fused projection stored
//! [in, out] and a plain one stored [out, in]. On whole architectures the methods are tested in `lora-model`.

use std::collections::BTreeMap;

use crate::common::{NOISE, bits, ids, make_noisy, random, relative, tensor};
use lora_core::{
    Error, Grads, Params, Result, Tape, Tensor, Var, gradcheck,
    lowrank::Layout,
    ops,
    peft::{
        AdaLora, AdaLoraConfig, AdaLoraSchedule, Adapted, Base, BaseTensor, Bias, Combined, Frozen, InitLoraWeights,
        Layers, Linear, LinearSite, Lora, LoraConfig, METHODS, MethodRow, Modules, Options, Outline, Part, Site,
        SiteKind, Start, find,
    },
};
use lora_kernels::{AdamW, Attention, DType, Device, Sequences, adamw, axpby};

const CPU: Device = Device::Cpu;
const D: usize = 4;
const LAYERS: usize = 2;

/// A transformer of two layers: h += c_proj(attention(c_attn(ln(h)))), a tied head.
struct Toy {
    tensors: BTreeMap<String, Tensor>,
    outline: Outline,
}

impl Toy {
    fn new(dtype: DType) -> Toy {
        let (mut tensors, mut sites) = (BTreeMap::new(), Vec::new());
        let mut add = |name: String, shape: &[usize], around: f64| {
            let values = random(tensors.len() as u64, shape.iter().product(), 0.5);
            let values: Vec<f64> = values.iter().map(|v| f64::from((around + v) as f32)).collect();
            tensors.insert(name, tensor(dtype, shape, &values));
        };
        add("wte.weight".into(), &[7, D], 0.0);
        sites.push(Site { name: "wte".into(), layer: None, kind: SiteKind::Embedding { rows: 7, width: D } });
        for i in 0..LAYERS {
            add(format!("layers.{i}.ln.weight"), &[D], 1.0);
            add(format!("layers.{i}.ln.bias"), &[D], 0.0);
            add(format!("layers.{i}.c_attn.weight"), &[D, 3 * D], 0.0);
            add(format!("layers.{i}.c_attn.bias"), &[3 * D], 0.0);
            add(format!("layers.{i}.c_proj.weight"), &[D, D], 0.0);
            add(format!("layers.{i}.c_proj.bias"), &[D], 0.0);
            let parts = vec![("q", 0..D), ("k", D..2 * D), ("v", 2 * D..3 * D)];
            let mut site = |name: String, kind| sites.push(Site { name, layer: Some(i), kind });
            let linear = |outputs, layout, parts| SiteKind::Linear(LinearSite { inputs: D, outputs, layout, parts });
            site(format!("layers.{i}.c_attn"), linear(3 * D, Layout::InOut, parts));
            let halves = vec![("left", 0..2), ("right", 2..D)];
            site(format!("layers.{i}.c_proj"), linear(D, Layout::OutIn, halves));
            // Its only sublayer, so that the adapters of either kind find a place in one layer or the other.
            let part = if i == 0 { Part::Attention } else { Part::Mlp };
            site(format!("layers.{i}"), SiteKind::Sublayer { part, width: D });
        }
        let outline = Outline {
            architecture: "toy".into(),
            layers: LAYERS,
            max_positions: 9,
            tensors: tensors.iter().map(|(name, t)| base_tensor(name, t)).collect(),
            sites,
            default_targets: vec!["c_attn".into()],
            ..Outline::default()
        };
        Toy { tensors, outline }
    }

    /// The model with some of its tensors replaced.
    fn with(&self, changed: impl IntoIterator<Item = (String, Tensor)>) -> Toy {
        let mut tensors = self.tensors.clone();
        for (name, t) in changed {
            let old = tensors.insert(name.clone(), t);
            assert!(old.is_some(), "{name} is no tensor of the base");
        }
        Toy { tensors, outline: self.outline.clone() }
    }

    fn hidden(&self, t: &mut Tape, adapted: &Adapted) -> Result<Var> {
        let var = |t: &Tape, name: &str| adapted.weight(t, name, &self.tensors[name]).unwrap();
        let table = var(t, "wte.weight");
        let mut h = adapted.embed(t, "wte.weight", &table, &ids(&[3, 0, 6, 3, 1, 2]))?;
        for i in 0..LAYERS {
            let of = |t: &Tape, name: &str| var(t, &format!("layers.{i}.{name}"));
            let (gamma, beta) = (of(t, "ln.weight"), of(t, "ln.bias"));
            let x = ops::layer_norm(t, &h, &gamma, &beta, 1e-5)?;
            let (w, b) = (of(t, "c_attn.weight"), of(t, "c_attn.bias"));
            let base = Linear { w, layout: Layout::InOut, bias: Some(b) };
            let qkv = adapted.project(t, &format!("layers.{i}.c_attn"), &x, &base)?;
            let cfg = Attention { heads: 2, kv_heads: 2, head_dim: D / 2, scale: 0.7, causal: true, dropout: None };
            let x = ops::attention(t, cfg, &Sequences::new(&[4, 2]), ops::Qkv::Fused(&qkv))?;
            let (w, b) = (of(t, "c_proj.weight"), of(t, "c_proj.bias"));
            let base = Linear { w, layout: Layout::OutIn, bias: Some(b) };
            let y = adapted.project(t, &format!("layers.{i}.c_proj"), &x, &base)?;
            h = adapted.join(t, &format!("layers.{i}"), h, y, None)?;
        }
        Ok(h)
    }

    fn loss(&self, t: &mut Tape, adapted: &Adapted) -> Result<Var> {
        let h = self.hidden(t, adapted)?;
        let h = ops::gather(t, &h, &ids(&[1, 2, 3, 5]))?;
        let w = adapted.weight(t, "wte.weight", &self.tensors["wte.weight"]).unwrap();
        ops::loss_head(t, &h, &w, None, &ids(&[6, 3, 1, 0]), 0.0, 0.25)
    }

    /// The hidden states outside of training.
    fn output(&self, adapted: &Adapted) -> Tensor {
        self.hidden(&mut Tape::inference(&adapted.params), adapted).unwrap().into_value()
    }

    fn bits(&self) -> Vec<Vec<u64>> {
        self.tensors.values().map(bits).collect()
    }
}

impl Base for Toy {
    fn tensors(&self) -> Box<dyn Iterator<Item = (&str, &Tensor)> + '_> {
        Box::new(self.tensors.iter().map(|(name, t)| (name.as_str(), t)))
    }

    fn outline(&self) -> &Outline {
        &self.outline
    }
}

fn base_tensor(name: &str, t: &Tensor) -> BaseTensor {
    let layer = name.strip_prefix("layers.").and_then(|n| n.split('.').next()?.parse().ok());
    BaseTensor { name: name.into(), shape: t.shape().into(), layer, norm: name.contains(".ln.") }
}

fn targets(names: &[&str]) -> Modules {
    names.iter().copied().collect()
}

const PISSA: InitLoraWeights = InitLoraWeights::Pissa { niter: None };

/// A change of plain options.
type Change = fn(&mut Options);

/// What each method is tried with, besides the plain options; a method that does not read an option runs unchanged.
const VARIANTS: &[(&str, Change)] = &[
    ("whole modules", |_| {}),
    ("parts", |o| o.targets = targets(&["c_attn.v", "c_attn.q"])),
    ("parts of more rank together than the module", |o| o.targets = targets(&["c_attn.q", "c_attn.k", "c_attn.v"])),
    ("a part stored [out, in]", |o| o.targets = targets(&["c_proj.right"])),
    ("mixed", |o| o.targets = targets(&["c_proj", "layers.0.c_attn.k"])),
    ("one layer", |o| o.targets = targets(&["layers.1.c_attn"])),
    ("embeddings", |o| o.targets = targets(&["wte", "c_attn"])),
    ("embeddings alone, of a rank above their width", |o| {
        (o.targets, o.rank_pattern) = (targets(&["wte"]), vec![("wte".into(), D + 1)]);
    }),
    ("ranks above the smaller side of a module, and above both", |o| {
        (o.rank, o.rank_pattern) = (D + 1, vec![("c_attn".into(), 4 * D)]);
    }),
    ("embeddings beside PiSSA", |o| (o.targets, o.init_lora_weights) = (targets(&["wte", "c_proj"]), PISSA)),
    ("all linear maps", |o| o.targets = Modules::AllLinear),
    ("a regular expression", |o| o.targets = Modules::Regex(r".*\.c_(?!attn)\w+".into())),
    ("all but one", |o| (o.targets, o.exclude_modules) = (Modules::AllLinear, targets(&["0.c_attn"]))),
    ("a layer by a name before its number", |o| {
        (o.layers_to_transform, o.layers_pattern) = (vec![0], vec!["blocks".into(), "layers?".into()]);
    }),
    ("ranks and alphas of their own", |o| {
        o.rank_pattern = vec![("c_attn".into(), 1), (r"1\..*".into(), 3)];
        o.alpha_pattern = vec![("c_proj".into(), 2.0), ("0.c_attn".into(), 1.0)];
    }),
    ("parts of ranks of their own", |o| {
        o.targets = targets(&["c_attn.q", "c_attn.v", "c_proj"]);
        o.rank_pattern = vec![("0.c_attn".into(), 1)];
    }),
    ("biases of what is adapted", |o| (o.bias, o.targets) = (Bias::LoraOnly, targets(&["0.c_attn"]))),
    ("all biases", |o| o.bias = Bias::All),
    ("modules that train whole", |o| o.modules_to_save = vec!["ln".into(), "1.c_proj".into()]),
    ("rsLoRA", |o| o.rslora = true),
    ("dropout", |o| o.dropout = 0.3),
    ("A normal", |o| o.init_lora_weights = InitLoraWeights::Gaussian),
    ("A and B at random", |o| o.init_lora_weights = InitLoraWeights::Random),
    ("A and B apart from each other", |o| o.init_lora_weights = InitLoraWeights::Orthogonal),
    ("PiSSA", |o| o.init_lora_weights = PISSA),
    ("PiSSA of parts", |o| {
        (o.init_lora_weights, o.rslora, o.targets) = (PISSA, true, targets(&["c_attn.v", "c_attn.q"]));
    }),
    ("OLoRA with dropout", |o| (o.init_lora_weights, o.dropout) = (InitLoraWeights::Olora, 0.3)),
    ("one trained layer", |o| o.layers = Layers::Of(vec![0])),
    ("norms train too", |o| o.train_norms = true),
    ("a narrow bottleneck", |o| o.bottleneck = 1),
    ("dropped layers", |o| o.drop_layers = Some(Layers::First(1))),
    ("both factors of a product factored", |o| (o.rank, o.decompose_both) = (1, true)),
    ("a random matrix of another seed", |o| (o.projection_prng_key, o.save_projection) = (7, false)),
    ("ranks that were taken away", |o| {
        o.adalora.kept = [("layers.0.c_attn", [true, false, true]), ("layers.1.c_attn", [false; 3])]
            .map(|(module, kept)| (module.into(), kept.into()))
            .into();
    }),
    ("another factor of the widths", |o| o.decompose_factor = 2),
];

/// Options that are senseless to whoever reads them.
const BAD: &[(&str, Change)] = &[
    ("rank", |o| o.rank = 0),
    ("rank", |o| o.rank = usize::MAX),
    ("alpha", |o| o.alpha = f64::NAN),
    ("alpha", |o| o.alpha = f64::INFINITY),
    ("alpha", |o| o.alpha = 0.0),
    ("alpha", |o| o.alpha = -1.0),
    ("dropout", |o| o.dropout = 1.0),
    ("dropout", |o| o.dropout = -0.1),
    ("dropout", |o| o.dropout = f64::NAN),
    ("targets", |o| o.targets = targets(&[" "])),
    ("target", |o| o.targets = targets(&["c_attn", "query"])),
    ("target", |o| o.targets = targets(&["c_attn.x"])),
    ("use-dora or target", |o| (o.targets, o.use_dora) = (targets(&["wte", "c_attn", "c_proj"]), true)),
    ("target", |o| o.targets = targets(&["c_attn", "c_attn.q"])),
    ("targets", |o| o.targets = Modules::Regex("(c_attn".into())),
    ("target", |o| o.targets = Modules::Regex("c_attn".into())),
    ("targets", |o| o.targets = Modules::Regex(".*".into())),
    ("exclude-modules", |o| o.exclude_modules = targets(&["query"])),
    ("exclude-modules", |o| o.exclude_modules = Modules::Regex("blocks.*".into())),
    ("exclude-modules", |o| o.exclude_modules = Modules::AllLinear),
    ("layers-to-transform", |o| o.layers_to_transform = vec![0, LAYERS]),
    ("layers-to-transform or targets", |o| (o.layers_to_transform, o.targets) = (vec![0], Modules::AllLinear)),
    ("layers-pattern", |o| o.layers_pattern = vec!["layers".into()]),
    ("layers-pattern", |o| (o.layers_to_transform, o.layers_pattern) = (vec![0], vec!["(".into()])),
    ("rank-pattern", |o| o.rank_pattern = vec![("c_attn".into(), 0)]),
    ("rank-pattern", |o| o.rank_pattern = vec![("query".into(), 2)]),
    ("rank-pattern", |o| o.rank_pattern = vec![("*".into(), 2)]),
    ("rank-pattern", |o| o.rank_pattern = vec![("c_attn".into(), usize::MAX)]),
    ("alpha-pattern", |o| o.alpha_pattern = vec![("c_attn".into(), f64::NAN)]),
    ("alpha-pattern", |o| o.alpha_pattern = vec![("wte".into(), 2.0)]),
    ("init-lora-weights", |o| (o.init_lora_weights, o.rank) = (InitLoraWeights::Orthogonal, 3)),
    ("init-lora-weights", |o| (o.init_lora_weights, o.rank) = (InitLoraWeights::Olora, D + 1)),
    ("init-lora-weights", |o| (o.init_lora_weights, o.rank_pattern) = (PISSA, vec![("c_proj".into(), D + 1)])),
    ("fan-in-fan-out", |o| o.fan_in_fan_out = Some(false)),
    ("fan-in-fan-out", |o| o.fan_in_fan_out = Some(true)),
    ("feedforward-modules", |o| o.feedforward_modules = targets(&["c_fc"])),
    ("feedforward-modules", |o| o.feedforward_modules = Modules::AllLinear),
    ("feedforward-modules", |o| o.feedforward_modules = Modules::Regex("(".into())),
    ("modules-to-save", |o| o.modules_to_save = vec!["lm_head".into()]),
    ("modules-to-save", |o| o.modules_to_save = vec![" ".into()]),
    ("bottleneck", |o| o.bottleneck = 0),
    ("bottleneck", |o| o.bottleneck = usize::MAX),
    ("layers", |o| o.layers = Layers::NONE),
    ("layers", |o| o.layers = Layers::Last(LAYERS + 1)),
    ("drop-layers", |o| o.drop_layers = Some(Layers::Of(vec![LAYERS]))),
    ("drop-layers", |o| o.drop_layers = Some(Layers::All)),
    ("decompose-factor", |o| o.decompose_factor = 0),
    ("decompose-factor", |o| o.decompose_factor = -2),
    ("d-initial", |o| o.d_initial = 0.0),
    ("d-initial", |o| o.d_initial = f64::NAN),
    ("init-r", |o| o.adalora.init_r = 0),
    ("target-r", |o| o.adalora.target_r = o.adalora.init_r + 1),
    ("delta-t", |o| o.adalora.delta_t = 0),
    ("total-step", |o| (o.adalora.tinit, o.adalora.tfinal, o.adalora.total_step) = (5, 5, Some(10))),
    ("adalora-beta1", |o| o.adalora.beta1 = 1.0),
    ("adalora-beta2", |o| o.adalora.beta2 = 0.0),
    ("orth-reg-weight", |o| o.adalora.orth_reg_weight = -0.1),
    ("rank-pattern", |o| drop(o.adalora.kept.insert("layers.0.c_attn".into(), vec![true]))),
    ("rank-pattern", |o| drop(o.adalora.kept.insert("wte".into(), vec![true; o.adalora.init_r]))),
];

/// Plain options, with adapters to combine.
fn options(base: &Toy) -> Options {
    let adapter = |name: &str, bottleneck: usize| {
        let o = Options { bottleneck, ..Options::default() };
        let mut adapted = adapt(find("adapter-p").unwrap(), base, base.dtype(), &o, bottleneck as u64);
        disturb(&mut adapted.params);
        Frozen { name: name.into(), bottleneck, tensors: adapted.adapter_tensors().unwrap().into_iter().collect() }
    };
    let fuse = vec![adapter("first", 3), adapter("second", 1)];
    Options {
        fuse,
        rank: 2,
        alpha: 3.0,
        targets: targets(&["c_attn", "c_proj"]),
        feedforward_modules: targets(&["c_proj"]),
        bottleneck: 3,
        d_initial: 2.0,
        adalora: AdaLoraSchedule { init_r: 3, target_r: 2, ..AdaLoraSchedule::default() },
        layers: Layers::Last(1),
        drop_layers: Some(Layers::NONE),
        ..Options::default()
    }
}

/// The same, with targets that this method can have.
fn options_of(row: &MethodRow, base: &Toy) -> Options {
    match row.name {
        "ln-tuning" => Options { targets: targets(&["ln"]), ..options(base) },
        // Its update is a product of three numbers, all of them small.
        "adalora" => Options { alpha: 4.5, ..options(base) },
        _ => options(base),
    }
}

fn try_adapt(row: &MethodRow, base: &Toy, dtype: DType, options: &Options, seed: u64) -> Result<Adapted> {
    Adapted::new((row.build)(options)?.as_ref(), base, &CPU, dtype, seed)
}

fn adapt(row: &MethodRow, base: &Toy, dtype: DType, options: &Options, seed: u64) -> Adapted {
    try_adapt(row, base, dtype, options, seed).unwrap_or_else(|e| panic!("{}: {e}", row.name))
}

/// Moves every parameter away from where it began: nothing is zero any more.
fn disturb(params: &mut Params) {
    let noise = tensor(params.dtype(), &[1, params.count()], &random(77, params.count(), 0.7));
    axpby(1.0, noise.mat(), 1.0, params.flat_mut().unwrap()).unwrap();
}

/// The methods that a model without tokens has a place for.
fn fitting(base: &Toy) -> Vec<&'static MethodRow> {
    let fits = |row: &&MethodRow| match try_adapt(row, base, base.dtype(), &options_of(row, base), 0) {
        Ok(_) => true,
        Err(Error::DoesNotFit { .. }) => false,
        Err(e) => panic!("{}: {e}", row.name),
    };
    METHODS.iter().filter(fits).collect()
}

/// Runs `check` for every method with every set of options.
fn for_all(dtype: DType, check: impl Fn(&str, &Toy, &MethodRow, &Options)) {
    let base = Toy::new(dtype);
    for row in fitting(&base) {
        for (variant, change) in VARIANTS {
            let mut o = options_of(row, &base);
            change(&mut o);
            if !row.name.starts_with("lora") {
                // These are ways to say what LoRA adapts.
                let own = options_of(row, &base);
                (o.targets, o.exclude_modules) = (own.targets, own.exclude_modules);
                o.rank_pattern.retain(|(module, _)| module != "wte");
            }
            check(&format!("{}, {variant}", row.name), &base, row, &o);
        }
    }
    assert_eq!(base.bits(), Toy::new(dtype).bits(), "the base was written");
}

// ---- the list ----

#[test]
fn at_initialisation_the_output_is_what_the_method_says() {
    for_all(DType::F32, |what, base, row, o| {
        let adapted = adapt(row, base, DType::F32, o, 1);
        let none = Adapted::none(&CPU).unwrap();
        let (want, got) = (base.output(&none), base.output(&adapted));
        let error = relative(&got.to_f64().unwrap(), &want.to_f64().unwrap());
        let start = (row.build)(o).unwrap().start();
        match start {
            Start::Base => assert_eq!(bits(&got), bits(&want), "{what}"),
            // The product of factors that are apart from each other is what rounding leaves of zero.
            Start::NearBase if row.name == "lora" && o.init_lora_weights == InitLoraWeights::Orthogonal => {
                assert!(error < 1e-5, "{what}: {error}");
            }
            Start::NearBase => assert!(error < 0.02 && bits(&got) != bits(&want), "{what}: {error}"),
            Start::Elsewhere => assert!(error > 0.02, "{what}: {error}"),
        }
        if adapted.is_mergeable() {
            let merged = base.with(adapted.merged(base).unwrap());
            match start {
                Start::Base => assert_eq!(merged.bits(), base.bits(), "{what}, merged"),
                _ => {
                    let error = relative(&merged.output(&none).to_f64().unwrap(), &got.to_f64().unwrap());
                    assert!(error < 1e-6, "{what}, merged: {error}");
                }
            }
        }
        // Of the seed, nothing shows but the values themselves.
        let [a, b, c] = [1, 1, 2].map(|seed| bits(&adapt(row, base, DType::F32, o, seed).params.flat()));
        assert_eq!(a, b, "{what}: same seed");
        // (IA)³ begins at ones, VeRA's vectors at numbers of their own, and some of LoRA at the base.
        let settled =
            ["ia3", "vera"].contains(&row.name) || [PISSA, InitLoraWeights::Olora].contains(&o.init_lora_weights);
        assert!(a != c || adapted.site_count() == 0 || settled, "{what}: the seed has no effect");
    });
}

#[test]
fn gradients_are_those_of_finite_differences() {
    for_all(DType::F64, |what, base, row, o| {
        let mut adapted = adapt(row, base, DType::F64, o, 1);
        disturb(&mut adapted.params);
        for noisy in [false, true] {
            let start = |t: &mut Tape| {
                if noisy {
                    make_noisy(t, NOISE)
                }
            };
            let hidden = gradcheck(&adapted.params, |t| {
                start(t);
                base.hidden(t, &adapted)
            });
            let loss = gradcheck(&adapted.params, |t| {
                start(t);
                base.loss(t, &adapted)
            });
            // What begins at the base is larger, and curves more.
            let limit = if o.init_lora_weights.takes_from_base() { 1e-7 } else { 1e-8 };
            for worst in [hidden.unwrap(), loss.unwrap()] {
                assert!(worst.error <= limit && worst.largest > 0.01, "{what}: {worst:?}");
            }
        }
    });
}

#[test]
fn what_is_saved_loads_bit_for_bit() {
    for_all(DType::F32, |what, base, row, o| {
        let mut adapted = adapt(row, base, DType::F32, o, 1);
        disturb(&mut adapted.params);
        let saved: BTreeMap<_, _> = adapted.adapter_tensors().unwrap().into_iter().collect();
        assert!(!saved.is_empty(), "{what}");
        let mut loaded = adapt(row, base, DType::F32, o, 2);
        loaded.load_adapter_tensors(saved).unwrap();
        assert_eq!(bits(&loaded.params.flat()), bits(&adapted.params.flat()), "{what}");
        assert_eq!(bits(&base.output(&loaded)), bits(&base.output(&adapted)), "{what}");
    });
}

#[test]
fn merging_equals_applying() {
    for_all(DType::F32, |what, base, row, o| {
        let mut adapted = adapt(row, base, DType::F32, o, 1);
        disturb(&mut adapted.params);
        let none = Adapted::none(&CPU).unwrap();
        if !adapted.is_mergeable() {
            let refusal = adapted.merged(base).unwrap_err();
            return assert!(matches!(refusal, Error::Structure { .. }), "{what}: {refusal}");
        }
        let merged = base.with(adapted.merged(base).unwrap());
        let of = |base: &Toy, adapted: &Adapted| base.output(adapted).to_f64().unwrap();
        let applied = of(base, &adapted);
        let error = relative(&of(&merged, &none), &applied);
        assert!(error <= 1e-5, "{what}: merged and applied differ by {error}");
        assert!(relative(&of(base, &none), &applied) > 0.01, "{what}: nothing was adapted");
    });
}

/// Ten steps of AdamW; the losses.
fn train(what: &str, base: &Toy, adapted: &mut Adapted) -> Vec<f64> {
    let n = adapted.params.count();
    let mut grads = Grads::new(&adapted.params).unwrap();
    let [mut m, mut v] = [0, 1].map(|_| Tensor::zeros(&CPU, DType::F32, &[1, n]).unwrap());
    let step = |step: u64| {
        grads.reset();
        let mut t = Tape::new(&adapted.params);
        let loss = base.loss(&mut t, adapted).unwrap();
        let value = loss.value().to_f64().unwrap()[0];
        t.backward(loss, &mut grads).unwrap();
        assert_eq!(grads.unwritten(), [""; 0], "{what}: trains, but has no gradient in step {step}");
        let rule = AdamW { lr: 0.03, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01, step };
        let g = grads.flat_mut().unwrap();
        let p = adapted.params.flat_mut().unwrap();
        adamw(&rule, p, g.as_mat(), m.make_mut().unwrap(), v.make_mut().unwrap()).unwrap();
        value
    };
    (1..=10).map(step).collect()
}

#[test]
fn training_changes_what_trains_and_no_byte_of_what_is_frozen() {
    for_all(DType::F32, |what, base, row, o| {
        let mut adapted = adapt(row, base, DType::F32, o, 1);
        let (frozen, start) = (base.bits(), bits(&adapted.params.flat()));
        let losses = train(what, base, &mut adapted);
        assert!(losses[9] < losses[0], "{what}: the loss does not fall: {losses:?}");
        assert_eq!(base.bits(), frozen, "{what}: the base was written");
        let end = bits(&adapted.params.flat());
        for id in adapted.params.ids() {
            let range = adapted.params.range(id);
            assert_ne!(start[range.clone()], end[range], "{what}: {} never moved", adapted.params.name(id));
        }
        // What the method says it changes is all that it changes.
        let saved: BTreeMap<_, _> = adapted.adapter_tensors().unwrap().into_iter().collect();
        for (name, tensor) in &base.tensors {
            let var = adapted.weight(&Tape::new(&adapted.params), name, tensor).unwrap();
            assert!(!var.is_tracked() || saved.contains_key(name), "{what}: {name} trains and is not saved");
            assert!(var.is_tracked() || bits(var.value()) == bits(tensor), "{what}: {name} is frozen and differs");
        }
    });
}

#[test]
fn bad_options_are_refused_by_whoever_reads_them() {
    let base = Toy::new(DType::F32);
    for row in fitting(&base) {
        // In training, so that every option shows.
        let output = |o: &Options| -> Result<(Vec<u64>, Vec<u64>)> {
            let mut adapted = try_adapt(row, &base, DType::F32, o, 1)?;
            disturb(&mut adapted.params);
            let mut t = Tape::new(&adapted.params).with_noise(NOISE);
            Ok((bits(&adapted.params.flat()), bits(base.hidden(&mut t, &adapted)?.value())))
        };
        let good = output(&options_of(row, &base)).unwrap();
        for (i, (option, change)) in BAD.iter().enumerate() {
            let mut o = options_of(row, &base);
            change(&mut o);
            // These come with ranks, which others than LoRA read too.
            if *option == "init-lora-weights" && !row.options.contains(option) {
                continue;
            }
            // In LoKr what no rank cuts is one whole factor.
            let largest = o.rank == usize::MAX || o.rank_pattern.iter().any(|(_, r)| *r == usize::MAX);
            if largest && row.name == "lokr" {
                continue;
            }
            match output(&o) {
                // Methods that read only some of what was changed name those.
                Err(e) => {
                    let e = e.to_string();
                    assert!(option.split(" or ").any(|o| e.contains(o)), "{}, {i}: {e}", row.name);
                }
                Ok(got) => assert!(got == good, "{}: reads {option} and accepts {o:?}", row.name),
            }
        }
    }
    let error = find("lorra").err().unwrap().to_string();
    assert!(METHODS.iter().all(|m| error.contains(m.name)), "{error}");
    assert!(METHODS.iter().all(|m| find(m.name).unwrap().name == m.name));
}

#[test]
fn an_adapter_loads_wholly_or_not_at_all() {
    type Damage = fn(&mut BTreeMap<String, Tensor>, &str);
    type Expected = fn(&Error, &str) -> bool;
    let changes: [(&str, Damage, Expected); 4] = [
        ("missing", |t, name| drop(t.remove(name)), |e, n| matches!(e, Error::Missing { name } if name == n)),
        (
            "larger",
            |t, name| {
                let [a, b] = [t[name].rows() + 1, t[name].cols()];
                t.insert(name.into(), Tensor::zeros(&CPU, DType::F32, &[a, b]).unwrap());
            },
            |e, n| matches!(e, Error::Shape { name, .. } if name == n),
        ),
        (
            "of one more dimension",
            |t, name| {
                let shape: Vec<usize> = [1].into_iter().chain(t[name].shape().iter().copied()).collect();
                let t_name = t[name].clone().reshape(&shape);
                t.insert(name.into(), t_name);
            },
            |e, n| matches!(e, Error::Shape { name, .. } if name == n),
        ),
        (
            "under another name",
            |t, name| {
                let tensor = t[name].clone();
                t.insert(format!("{name}.stranger"), tensor);
            },
            |e, n| matches!(e, Error::Unexpected { names } if *names == [format!("{n}.stranger")]),
        ),
    ];
    for_all(DType::F32, |what, base, row, o| {
        let mut adapted = adapt(row, base, DType::F32, o, 1);
        let before = bits(&adapted.params.flat());
        disturb(&mut adapted.params);
        let saved: BTreeMap<_, _> = adapted.adapter_tensors().unwrap().into_iter().collect();
        let mut fresh = adapt(row, base, DType::F32, o, 1);
        for name in saved.keys() {
            for (change, apply, expected) in &changes {
                let mut tensors = saved.clone();
                apply(&mut tensors, name);
                let error = fresh.load_adapter_tensors(tensors).unwrap_err();
                assert!(expected(&error, name), "{what}, {name} {change}: {error}");
                assert!(error.to_string().contains(name), "{what}, {name} {change}: {error}");
                assert_eq!(bits(&fresh.params.flat()), before, "{what}, {name} {change}: half loaded");
            }
        }
        let mut tensors = saved.clone();
        for name in ["nobody.a", "nobody.b"] {
            tensors.insert(name.into(), Tensor::zeros(&CPU, DType::F32, &[1]).unwrap());
        }
        let error = fresh.load_adapter_tensors(tensors).unwrap_err().to_string();
        assert!(error.contains("nobody.a") && error.contains("nobody.b"), "{what}: {error}");
        assert_eq!(bits(&fresh.params.flat()), before, "{what}: half loaded");
        fresh.load_adapter_tensors(saved).unwrap();
    });
}

// ---- LoRA alone ----

fn lora(base: &Toy, change: impl Fn(&mut Options)) -> Adapted {
    let mut o = options(base);
    change(&mut o);
    adapt(find("lora").unwrap(), base, DType::F32, &o, 1)
}

#[test]
fn lora_adapts_its_targets_and_saves_pefts_shapes() {
    let base = Toy::new(DType::F32);
    // Targets, trained scalars, saved tensors of layer 0 with their shapes, changed columns of c_attn.
    type Row = (&'static [&'static str], usize, &'static [(&'static str, [usize; 2])], std::ops::Range<usize>);
    let table: &[Row] = &[
        (&["c_attn"], 2 * (8 + 24), &[("c_attn.lora_A.weight", [2, 4]), ("c_attn.lora_B.weight", [12, 2])], 0..12),
        (&["c_attn.k"], 2 * 16, &[("c_attn.lora_A.weight", [2, 4]), ("c_attn.lora_B.weight", [12, 2])], 4..8),
        (
            &["c_attn.k", "c_attn.v"],
            2 * 32,
            &[("c_attn.lora_A.weight", [4, 4]), ("c_attn.lora_B.weight", [12, 4])],
            4..12,
        ),
        (
            &["c_proj", "c_attn.q"],
            2 * 32,
            &[
                ("c_attn.lora_A.weight", [2, 4]),
                ("c_attn.lora_B.weight", [12, 2]),
                ("c_proj.lora_A.weight", [2, 4]),
                ("c_proj.lora_B.weight", [4, 2]),
            ],
            0..4,
        ),
        (&["layers.1.c_proj"], 16, &[], 0..0),
    ];
    for (names, count, tensors, columns) in table {
        let mut adapted = lora(&base, |o| o.targets = targets(names));
        assert_eq!(adapted.params.count(), *count, "{names:?}");
        disturb(&mut adapted.params);
        let saved = adapted.adapter_tensors().unwrap();
        let first = saved.iter().filter_map(|(n, t)| Some((n.strip_prefix("layers.0.")?, t.shape())));
        let want: Vec<(&str, &[usize])> = tensors.iter().map(|(n, s)| (*n, &s[..])).collect();
        assert_eq!(first.collect::<Vec<_>>(), want, "{names:?}");

        let merged = adapted.merged(&base).unwrap();
        let name = "layers.0.c_attn.weight";
        let (was, is) = (bits(&base.tensors[name]), merged.get(name).map(bits));
        let changed = |c: usize| is.as_ref().is_some_and(|is| (0..D).any(|r| is[r * 12 + c] != was[r * 12 + c]));
        let changed: Vec<usize> = (0..12).filter(|&c| changed(c)).collect();
        assert_eq!(changed, columns.clone().collect::<Vec<_>>(), "{names:?}");
    }
}

/// ΔW of a module's weight, as merged.
fn delta(base: &Toy, adapted: &Adapted, name: &str) -> Vec<f64> {
    let merged = adapted.merged(base).unwrap()[name].to_f64().unwrap();
    merged.iter().zip(base.tensors[name].to_f64().unwrap()).map(|(m, w)| m - w).collect()
}

#[test]
fn the_scale_is_alpha_over_r_or_over_its_root() {
    let base = Toy::new(DType::F32);
    for (rslora, scale) in [(false, 3.0 / 2.0), (true, 3.0 / 2f64.sqrt())] {
        let mut adapted = lora(&base, |o| o.rslora = rslora);
        disturb(&mut adapted.params);
        let p = &adapted.params;
        let of = |name: &str| p.tensor(p.find(name).unwrap()).to_f64().unwrap();
        // c_proj is stored [out, in], as ΔW = s·B·A is; c_attn [in, out], the transpose.
        for (module, out) in [("layers.1.c_proj", D), ("layers.1.c_attn", 3 * D)] {
            let (a, b) = (of(&format!("{module}.lora_A.weight")), of(&format!("{module}.lora_B.weight")));
            let entry = |o: usize, i: usize| scale * (0..2).map(|k| b[o * 2 + k] * a[k * D + i]).sum::<f64>();
            let want: Vec<f64> = match out {
                D => (0..out * D).map(|n| entry(n / D, n % D)).collect(),
                _ => (0..out * D).map(|n| entry(n % out, n / out)).collect(),
            };
            let error = relative(&delta(&base, &adapted, &format!("{module}.weight")), &want);
            assert!(error < 1e-6, "{module}, rsLoRA {rslora}: off by {error}");
        }
    }
}

/// What PiSSA and OLoRA take from the base is constant, and saved beside what trained: an ordinary adapter of the base.
#[test]
fn what_began_at_a_part_of_the_base_is_saved_as_an_adapter_of_the_base() {
    let base = Toy::new(DType::F32);
    let row = find("lora").unwrap();
    let changes: [Change; 4] = [
        |_| {},
        |o| o.rslora = true,
        |o| o.targets = targets(&["c_attn.v", "c_attn.q"]),
        |o| (o.rank_pattern, o.alpha_pattern) = (vec![("c_attn".into(), 1)], vec![("c_proj".into(), 2.0)]),
    ];
    for init in [PISSA, InitLoraWeights::Pissa { niter: Some(3) }, InitLoraWeights::Olora] {
        for (i, change) in changes.iter().enumerate() {
            let what = format!("{init:?}, {i}");
            let mut o = Options { init_lora_weights: init, ..options(&base) };
            change(&mut o);
            let mut adapted = adapt(row, &base, DType::F32, &o, 1);
            train(&what, &base, &mut adapted);
            let tensors: BTreeMap<_, _> = adapted.adapter_tensors().unwrap().into_iter().collect();
            let saved = o.saved();
            assert_eq!((saved.rank, saved.init_lora_weights), (2 * o.rank, InitLoraWeights::Kaiming), "{what}");
            let mut loaded = adapt(row, &base, DType::F32, &saved, 2);
            loaded.load_adapter_tensors(tensors.clone()).unwrap();
            let [want, got] = [&adapted, &loaded].map(|a| base.output(a).to_f64().unwrap());
            assert!(relative(&got, &want) < 1e-6, "{what}: {}", relative(&got, &want));
            let [want, got] = [&adapted, &loaded].map(|a| base.with(a.merged(&base).unwrap()).bits());
            assert!(got == want, "{what}: merged");

            // Another base begins elsewhere.
            let name = "layers.0.c_attn.weight";
            let double = base.tensors[name].to_f64().unwrap().iter().map(|w| 2.0 * w).collect::<Vec<_>>();
            let other = base.with([(name.to_owned(), tensor(DType::F32, &[D, 3 * D], &double))]);
            let mut strange = adapt(row, &other, DType::F32, &o, 1);
            let error = strange.load_adapter_tensors(tensors).unwrap_err();
            assert!(matches!(&error, Error::Structure { name, .. } if name.contains("0.c_attn")), "{what}: {error}");
        }
    }
}

#[test]
fn ways_to_begin_have_pefts_words() {
    for word in ["true", "false", "gaussian", "pissa", "pissa_niter_16", "olora", "orthogonal"] {
        assert_eq!(InitLoraWeights::parse(word).unwrap().word(), word);
        assert_eq!(InitLoraWeights::parse(&word.to_uppercase()).unwrap().word(), word);
    }
    let words = [
        ("eva", "activations"),
        ("corda", "covariance"),
        ("loftq", "quantis"),
        ("lora_ga", "gradient"),
        ("mica", "A alone"),
    ];
    for (word, why) in words.into_iter().chain([
        ("pissa_niter_", "pissa_niter_N"),
        ("pissa_niter_-1", "olora"),
        ("pissa_niter_4000000000", "up to 1000"),
        ("", "gaussian"),
    ]) {
        let error = InitLoraWeights::parse(word).unwrap_err().to_string();
        assert!(error.contains("init-lora-weights") && error.contains(why) && error.contains(word), "{error}");
    }
}

/// E[i] + s·B·A[:, i], saved in PEFT's shapes; every linear map is no embedding.
#[test]
fn an_adapted_embedding_adds_to_the_rows_of_its_tokens() {
    let base = Toy::new(DType::F32);
    let mut adapted = lora(&base, |o| (o.targets, o.rank) = (targets(&["wte"]), 2));
    assert_eq!(adapted.params.count(), 2 * (7 + D));
    let start: BTreeMap<_, _> = adapted.adapter_tensors().unwrap().into_iter().collect();
    let [a, b] = ["wte.lora_embedding_A", "wte.lora_embedding_B"].map(|name| start[name].clone());
    assert_eq!((a.shape(), b.shape()), (&[2, 7][..], &[D, 2][..]));
    assert!(a.to_f64().unwrap().iter().all(|v| *v == 0.0) && b.to_f64().unwrap().iter().all(|v| *v != 0.0));
    disturb(&mut adapted.params);
    let saved: BTreeMap<_, _> = adapted.adapter_tensors().unwrap().into_iter().collect();
    let [a, b] = ["wte.lora_embedding_A", "wte.lora_embedding_B"].map(|name| saved[name].to_f64().unwrap());
    let want = |i: usize, j: usize| 1.5 * (0..2).map(|k| b[j * 2 + k] * a[k * 7 + i]).sum::<f64>();
    let want: Vec<f64> = (0..7 * D).map(|n| want(n / D, n % D)).collect();
    let error = relative(&delta(&base, &adapted, "wte.weight"), &want);
    assert!(error < 1e-6, "off by {error}");
    let names: Vec<String> = lora(&base, |o| o.targets = Modules::AllLinear)
        .adapter_tensors()
        .unwrap()
        .into_iter()
        .map(|(n, _)| n)
        .collect();
    assert!(!names.iter().any(|n| n.contains("wte")), "{names:?}");
}

#[test]
fn a_layout_that_is_the_bases_may_be_said() {
    let base = Toy::new(DType::F32);
    for (target, right) in [("c_attn", true), ("c_proj", false)] {
        lora(&base, |o| (o.targets, o.fan_in_fan_out) = (targets(&[target]), Some(right)));
        let o = Options { targets: targets(&[target]), fan_in_fan_out: Some(!right), ..options(&base) };
        let error = try_adapt(find("lora").unwrap(), &base, DType::F32, &o, 1).unwrap_err().to_string();
        let stored = if right { "[in, out]" } else { "[out, in]" };
        for part in ["fan-in-fan-out", &(!right).to_string(), target, "toy", stored, &format!("so it is {right}")] {
            assert!(error.contains(part), "{error}");
        }
    }
}

#[test]
fn dropout_is_active_in_training_alone() {
    let base = Toy::new(DType::F32);
    let with = |dropout: f64, noise: Option<lora_core::Noise>| {
        let mut adapted = lora(&base, |o| o.dropout = dropout);
        disturb(&mut adapted.params);
        let mut t = Tape::new(&adapted.params);
        if let Some(noise) = noise {
            t = t.with_noise(noise);
        }
        bits(base.hidden(&mut t, &adapted).unwrap().value())
    };
    let plain = with(0.0, None);
    assert_eq!(with(0.5, None), plain, "dropout outside of training");
    assert_eq!(with(0.0, Some(NOISE)), plain, "dropout of rate 0");
    assert_ne!(with(0.5, Some(NOISE)), plain, "no dropout in training");
    assert_eq!(with(0.5, Some(NOISE)), with(0.5, Some(NOISE)));
    assert_ne!(with(0.5, Some(NOISE)), with(0.5, Some(lora_core::Noise { step: NOISE.step + 1, ..NOISE })));
}

#[test]
fn parts_refuse_an_adapter_that_is_not_theirs() {
    let base = Toy::new(DType::F32);
    let mut adapted = lora(&base, |o| o.targets = targets(&["c_attn.q", "c_attn.v"]));
    disturb(&mut adapted.params);
    let before = bits(&adapted.params.flat());
    let mut tensors: BTreeMap<_, _> = adapted.adapter_tensors().unwrap().into_iter().collect();
    let name = "layers.1.c_attn.lora_B.weight";
    let mut b = tensors[name].to_f64().unwrap();
    // Row 4 belongs to k, which is no target.
    b[4 * 4] = 0.5;
    tensors.insert(name.into(), tensor(DType::F32, &[12, 4], &b));
    let a = "layers.0.c_attn.lora_A.weight";
    tensors.insert(a.into(), Tensor::zeros(&CPU, DType::F32, &[4, D]).unwrap());
    let error = adapted.load_adapter_tensors(tensors).unwrap_err();
    assert!(matches!(&error, Error::Structure { name: n, .. } if n == name), "{error}");
    assert_eq!(bits(&adapted.params.flat()), before);
}

#[test]
fn an_unknown_target_is_answered_with_what_there_is() {
    let base = Toy::new(DType::F32);
    let o = Options { targets: targets(&["q_proj"]), ..options(&base) };
    let error = try_adapt(find("lora").unwrap(), &base, DType::F32, &o, 1).unwrap_err();
    let modules = ["c_attn", "c_attn.k", "c_attn.q", "c_attn.v", "c_proj", "c_proj.left", "c_proj.right", "wte"];
    assert!(matches!(&error, Error::NoSuchTarget { modules: m, .. } if *m == modules), "{error}");
}

#[test]
fn two_methods_at_once_lose_nothing_that_either_does() {
    let base = Toy::new(DType::F32);
    let lora = |target| {
        Lora::new(LoraConfig { rank: 2, alpha: 3.0, targets: targets(&[target]), ..LoraConfig::default() }).unwrap()
    };
    let adalora = |target| {
        let config = AdaLoraConfig {
            schedule: AdaLoraSchedule { init_r: 3, target_r: 2, ..AdaLoraSchedule::default() },
            alpha: 3.0,
            dropout: 0.0,
            targets: targets(&[target]),
            exclude_modules: Modules::default(),
            layers_to_transform: Vec::new(),
            layers_pattern: Vec::new(),
            modules_to_save: Vec::new(),
        };
        AdaLora::new(config).unwrap()
    };
    let adapt = |both: &Combined| Adapted::new(both, &base, &CPU, DType::F32, 1);
    for both in [
        Combined::new("both", adalora("c_attn"), lora("c_proj")),
        Combined::new("both", lora("c_proj"), adalora("c_attn")),
    ] {
        let adapted = adapt(&both).unwrap();
        assert!(adapted.budget().is_some(), "{both:?} cuts no ranks");
        assert_eq!(adapted.site_count(), 2 * LAYERS);
    }
    for (both, why) in [
        (Combined::new("both", adalora("c_attn"), lora("c_attn")), "adalora and lora both adapt layers.0.c_attn"),
        (Combined::new("both", adalora("c_attn"), adalora("c_proj")), "both cut ranks"),
    ] {
        let e = adapt(&both).unwrap_err();
        assert!(matches!(e, Error::DoesNotFit { .. }) && e.to_string().contains(why), "{e}");
    }
}

/// Whatever A and B begin at, the lengths are those of the sum: DoRA begins where LoRA does.
#[test]
fn dora_begins_where_lora_does() {
    let base = Toy::new(DType::F32);
    for init in [InitLoraWeights::Random, InitLoraWeights::Gaussian, InitLoraWeights::Orthogonal] {
        let out = |use_dora: bool| {
            let adapted = lora(&base, |o| (o.use_dora, o.init_lora_weights) = (use_dora, init));
            base.output(&adapted).to_f64().unwrap()
        };
        let error = relative(&out(true), &out(false));
        assert!(error < 1e-6, "{init:?}: DoRA begins {error} from LoRA");
    }
    let bare = base.output(&Adapted::none(&CPU).unwrap()).to_f64().unwrap();
    let drawn = lora(&base, |o| (o.use_dora, o.init_lora_weights) = (true, InitLoraWeights::Random));
    assert!(relative(&base.output(&drawn).to_f64().unwrap(), &bare) > 1e-3);
}

/// Lengths of their own: the base at the beginning, and afterwards what a weight of those lengths and directions computes.
#[test]
fn dora_splits_weights_into_lengths_and_directions() {
    let base = Toy::new(DType::F32);
    let out = |base: &Toy, adapted: &Adapted| base.output(adapted).to_f64().unwrap();
    let none = Adapted::none(&CPU).unwrap();
    let mut adapted = lora(&base, |o| o.use_dora = true);
    let error = relative(&out(&base, &adapted), &out(&base, &none));
    assert!(error < 1e-6, "it begins {error} from the base");
    disturb(&mut adapted.params);
    let (merged, p) = (adapted.merged(&base).unwrap(), &adapted.params);
    let error = relative(&out(&base.with(merged.clone()), &none), &out(&base, &adapted));
    assert!(error < 1e-5, "merged and applied differ by {error}");
    for (module, outputs) in [("layers.0.c_attn", 3 * D), ("layers.1.c_proj", D)] {
        let w = merged[&format!("{module}.weight")].to_f64().unwrap();
        let m = p.tensor(p.find(&format!("{module}.lora_magnitude_vector")).unwrap()).to_f64().unwrap();
        for (o, m) in m.iter().enumerate() {
            let of_output = |i: &usize| if outputs == D { i / D == o } else { i % outputs == o };
            let norm = (0..w.len()).filter(of_output).map(|i| w[i] * w[i]).sum::<f64>().sqrt();
            assert!((norm - m.abs()).abs() < 1e-5, "{module}, output {o}: {norm} long, not {m}");
        }
    }
    let saved: BTreeMap<_, _> = adapted.adapter_tensors().unwrap().into_iter().collect();
    assert_eq!(saved["layers.0.c_attn.lora_magnitude_vector"].shape(), [3 * D]);
    let parts = Options { use_dora: true, targets: targets(&["c_attn.q"]), ..options(&base) };
    let error = try_adapt(find("lora").unwrap(), &base, DType::F32, &parts, 1).unwrap_err().to_string();
    assert!(error.contains("use-dora") && error.contains("c_attn"), "{error}");
    let mut again = lora(&base, |o| o.use_dora = true);
    again.load_adapter_tensors(saved).unwrap();
    assert_eq!(bits(&base.output(&again)), bits(&base.output(&adapted)));
}
