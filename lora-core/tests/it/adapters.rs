//! What adapters with bottlenecks compute, against their papers' formulas; which layers have them; and what a fusion accepts.

use std::collections::BTreeMap;

use crate::common::{bits, random, tensor};
use lora_core::{
    Error, Result, Tape, Tensor, Var, ops,
    peft::{Adapted, Base, BaseTensor, Frozen, Layers, Options, Outline, Part, Site, SiteKind, find},
};
use lora_kernels::{DType, Device, axpby};
use ndarray::{Array2, Axis};

type M = Array2<f64>;

const CPU: Device = Device::Cpu;
const D: usize = 4;
const ROWS: usize = 5;

/// Layers of an attention and an MLP, of which nothing is there but where they join the stream.
struct Joins {
    outline: Outline,
    weight: Tensor,
}

impl Joins {
    fn new(layers: usize) -> Joins {
        let site = |i: usize, name: &str, part| Site {
            name: format!("layers.{i}.{name}"),
            layer: Some(i),
            kind: SiteKind::Sublayer { part, width: D },
        };
        let sites =
            (0..layers).flat_map(|i| [site(i, "attention", Part::Attention), site(i, "mlp", Part::Mlp)]).collect();
        let head = BaseTensor { name: "head.weight".into(), shape: vec![2, D], layer: None, norm: false };
        let outline = Outline {
            architecture: "joins".into(),
            layers,
            tensors: vec![head],
            sites,
            modules_to_save: vec!["head".into()],
            ..Outline::default()
        };
        Joins { outline, weight: tensor(DType::F64, &[2, D], &[0.0; 2 * D]) }
    }

    fn adapt(&self, method: &str, o: &Options) -> Result<Adapted> {
        let mut adapted = Adapted::new((find(method)?.build)(o)?.as_ref(), self, &CPU, DType::F64, 1)?;
        let n = adapted.params.count();
        let noise = tensor(DType::F64, &[1, n], &random(77, n, 0.7));
        axpby(1.0, noise.mat(), 1.0, adapted.params.flat_mut()?)?;
        Ok(adapted)
    }

    /// An adapter that was trained before.
    fn frozen(&self, name: &str, bottleneck: usize) -> Frozen {
        let adapted = self.adapt("adapter-p", &Options { bottleneck, ..Options::default() }).unwrap();
        Frozen { name: name.into(), bottleneck, tensors: adapted.adapter_tensors().unwrap().into_iter().collect() }
    }
}

impl Base for Joins {
    fn outline(&self) -> &Outline {
        &self.outline
    }

    fn tensors(&self) -> Box<dyn Iterator<Item = (&str, &Tensor)> + '_> {
        Box::new([("head.weight", &self.weight)].into_iter())
    }
}

fn matrix(t: &Tensor) -> M {
    M::from_shape_vec((t.rows(), t.cols()), t.to_f64().unwrap()).unwrap()
}

/// LayerNorm, with ε as PyTorch's default.
fn normed(x: &M, gamma: &M, beta: &M) -> M {
    let mut y = x.clone();
    for mut row in y.rows_mut() {
        let (mean, var) = (row.mean().unwrap(), row.var(0.0));
        row.mapv_inplace(|v| (v - mean) / (var + 1e-5).sqrt());
    }
    y * gamma + beta
}

/// A layer norm of the base: of its γ and β, something that the adapter's own has not.
fn base_norm(x: &M) -> M {
    normed(x, &M::from_elem((1, D), 1.5), &M::from_elem((1, D), -0.25))
}

fn gelu(x: f64) -> f64 {
    // erf by its series, exact for small arguments.
    let (z, mut term, mut sum) = (x / 2f64.sqrt(), x / 2f64.sqrt(), 0.0);
    for n in 0..80 {
        sum += term / (2 * n + 1) as f64;
        term *= -z * z / (n + 1) as f64;
    }
    x / 2.0 * (1.0 + 2.0 / std::f64::consts::PI.sqrt() * sum)
}

/// W_up·act(W_down·x + b_down) + b_up, of tensors below `prefix`.
fn bottleneck(p: &BTreeMap<String, M>, prefix: &str, x: &M, act: fn(f64) -> f64) -> M {
    let of = |name: &str| &p[&format!("{prefix}.{name}")];
    let h = (x.dot(&of("adapter_down.weight").t()) + of("adapter_down.bias")).mapv(act);
    h.dot(&of("adapter_up.weight").t()) + of("adapter_up.bias")
}

#[test]
fn adapters_compute_what_their_papers_say() {
    let base = Joins::new(2);
    let relu = |x: f64| x.max(0.0);
    let (x, f) = (random(1, ROWS * D, 1.0), random(2, ROWS * D, 1.0));
    let (xm, fm) = [&x, &f].map(|v| M::from_shape_vec((ROWS, D), v.clone()).unwrap()).into();
    let (xm, fm): (&M, &M) = (&xm, &fm);
    for method in ["adapter-h", "adapter-l", "adapter-p", "adapter-d", "fusion"] {
        let fuse = vec![base.frozen("a", 3), base.frozen("b", 2), base.frozen("c-3_", 1)];
        let o = Options { bottleneck: 3, fuse, drop_layers: Some(Layers::First(1)), ..Options::default() };
        let adapted = base.adapt(method, &o).unwrap();
        let saved = adapted.adapter_tensors().unwrap();
        let p: BTreeMap<String, M> = saved.iter().map(|(name, t)| (name.clone(), matrix(t))).collect();
        for post in [false, true] {
            let norm = |x: M| if post { base_norm(&x) } else { x };
            for site in ["layers.0.attention", "layers.0.mlp", "layers.1.attention", "layers.1.mlp"] {
                let of = |name: &str| &p[&format!("{site}.{name}")];
                let mlp = site.ends_with("mlp");
                let want = match method {
                    "adapter-h" => norm(xm + fm + bottleneck(&p, site, fm, gelu)),
                    "adapter-l" if mlp => {
                        let h = norm(xm + fm);
                        let u = normed(&h, of("adapter_norm.weight"), of("adapter_norm.bias"));
                        h + bottleneck(&p, site, &u, relu)
                    }
                    "adapter-p" if mlp => norm(xm + fm + bottleneck(&p, site, &norm(xm + fm), relu)),
                    "adapter-d" if site == "layers.1.mlp" => norm(xm + fm + bottleneck(&p, site, &norm(xm + fm), relu)),
                    "fusion" if mlp => {
                        let h = norm(xm + fm);
                        let z = ["a", "b", "c-3_"].map(|n| bottleneck(&p, &format!("{site}.adapters.{n}"), &h, relu));
                        let q = h.dot(&of("fusion_query.weight").t()) + of("fusion_query.bias");
                        let keys = z.each_ref().map(|z| z.dot(&of("fusion_key.weight").t()));
                        let values = z.each_ref().map(|z| z.dot(&of("fusion_value.weight").t()));
                        let e = keys.map(|k| (&q * &k).sum_axis(Axis(1)).mapv(f64::exp).insert_axis(Axis(1)));
                        let total = e.iter().fold(M::zeros((ROWS, 1)), |sum, e| sum + e);
                        let o = e.iter().zip(&values).fold(M::zeros((ROWS, D)), |o, (e, v)| o + e / &total * v);
                        norm(xm + fm + o)
                    }
                    _ => norm(xm + fm),
                };
                let mut t = Tape::inference(&adapted.params);
                let ln = |t: &mut Tape, x: &Var| {
                    let gamma = t.constant(&tensor(DType::F64, &[D], &[1.5; D]));
                    let beta = t.constant(&tensor(DType::F64, &[D], &[-0.25; D]));
                    ops::layer_norm(t, x, &gamma, &beta, 1e-5)
                };
                let [a, b] = [&x, &f].map(|v| t.constant(&tensor(DType::F64, &[ROWS, D], v)));
                let got = adapted.join(&mut t, site, a, b, post.then_some(&ln as _)).unwrap();
                let error = (matrix(got.value()) - want).mapv(f64::abs).into_iter().fold(0.0, f64::max);
                assert!(error < 1e-12, "{method} at {site}, norm after: {post}: off by {error}");
            }
        }
    }
}

#[test]
fn adapter_d_leaves_out_the_lowest_layers() {
    let layers_of = |layers: usize, drop: Option<Layers>| -> Result<Vec<usize>> {
        let adapted = Joins::new(layers)
            .adapt("adapter-d", &Options { bottleneck: 2, drop_layers: drop, ..Options::default() })?;
        let names = adapted.adapter_tensors()?.into_iter().map(|(name, _)| name);
        let mut of: Vec<usize> =
            names.filter_map(|n| n.strip_prefix("layers.")?.split('.').next()?.parse().ok()).collect();
        of.dedup();
        Ok(of)
    };
    assert_eq!(layers_of(12, None).unwrap(), [5, 6, 7, 8, 9, 10, 11]);
    assert_eq!(layers_of(2, None).unwrap(), [0, 1], "⌊10/12⌋ = 0 layers");
    assert_eq!(layers_of(3, Some(Layers::NONE)).unwrap(), [0, 1, 2]);
    assert_eq!(layers_of(4, Some(Layers::Of(vec![1, 3]))).unwrap(), [0, 2]);
    for all in [Layers::All, Layers::Last(3), Layers::Of(vec![0, 1, 2])] {
        let error = layers_of(3, Some(all)).unwrap_err().to_string();
        assert!(error.contains("drop-layers") && error.contains("at least one layer"), "{error}");
    }
    let error = layers_of(3, Some(Layers::Of(vec![3]))).unwrap_err().to_string();
    assert!(error.contains("drop-layers") && error.contains("3 layers"), "{error}");
}

#[test]
fn a_fusion_refuses_what_is_no_adapter_of_its_base() {
    let base = Joins::new(2);
    let fused = |fuse: Vec<Frozen>| base.adapt("fusion", &Options { fuse, ..Options::default() });
    let name = "layers.1.mlp.adapter_up.weight";
    let damaged = |change: fn(&mut BTreeMap<String, Tensor>, &str)| {
        let mut adapter = base.frozen("squad", 3);
        change(&mut adapter.tensors, name);
        fused(vec![base.frozen("mnli", 2), adapter])
    };
    for (what, error) in [
        ("missing", damaged(|t, name| drop(t.remove(name)))),
        (
            "of another shape",
            damaged(|t, name| {
                let turned = t[name].clone().reshape(&[3, D]);
                t.insert(name.into(), turned);
            }),
        ),
        (
            "renamed",
            damaged(|t, name| {
                let moved = t.remove(name).unwrap();
                t.insert(name.replace("mlp", "attention"), moved);
            }),
        ),
    ] {
        let error = error.unwrap_err();
        assert!(matches!(&error, Error::Structure { name: n, .. } if n == name), "{what}: {error}");
        assert!(error.to_string().contains("`squad`"), "{what}: {error}");
    }
    // Its head is ignored, anything else is not.
    let mut with_head = base.frozen("squad", 3);
    assert!(with_head.tensors.contains_key("head.weight"), "saved with a module of its own");
    fused(vec![with_head.clone()]).unwrap();
    with_head.tensors.insert("ln.weight".into(), tensor(DType::F64, &[D], &[1.0; D]));
    let error = fused(vec![with_head]).unwrap_err().to_string();
    assert!(error.contains("ln.weight") && error.contains("`squad`"), "{error}");

    for (fuse, part) in [
        (vec![], "at least one"),
        (vec![base.frozen("a", 1), base.frozen("a", 2)], "two adapters"),
        (vec![base.frozen("a.b", 1)], "letters"),
        (vec![base.frozen("", 1)], "letters"),
    ] {
        let error = fused(fuse).unwrap_err();
        assert!(matches!(error, Error::Option { option: "fuse", .. }) && error.to_string().contains(part), "{error}");
    }
}

#[test]
fn a_fusion_goes_on_with_the_adapters_that_it_was_trained_with() {
    let base = Joins::new(1);
    let o = |fuse: Vec<Frozen>| Options { fuse, ..Options::default() };
    let (a, b) = (base.frozen("a", 3), base.frozen("b", 2));
    let trained = base.adapt("fusion", &o(vec![a.clone(), b.clone()])).unwrap();
    let saved: BTreeMap<_, _> = trained.adapter_tensors().unwrap().into_iter().collect();
    let name = "layers.0.mlp.adapters.b.adapter_down.bias";
    assert_eq!(bits(&saved[name]), bits(&b.tensors["layers.0.mlp.adapter_down.bias"]));

    let mut again = base.adapt("fusion", &o(vec![a.clone(), b.clone()])).unwrap();
    again.load_adapter_tensors(saved.clone()).unwrap();
    let mut other = b;
    other.tensors.insert("layers.0.mlp.adapter_down.bias".into(), tensor(DType::F64, &[2], &[0.5, 0.5]));
    let mut again = base.adapt("fusion", &o(vec![a, other])).unwrap();
    let error = again.load_adapter_tensors(saved).unwrap_err();
    assert!(matches!(&error, Error::Structure { name: n, .. } if n == name), "{error}");
    assert!(error.to_string().contains("`b`"), "{error}");
}

/// How the parameters begin, by the papers' distributions.
#[test]
fn adapters_begin_as_their_papers_say() {
    let outline = |d: usize| {
        let kind = |part| SiteKind::Sublayer { part, width: d };
        let site = |name: &str, part| Site { name: name.into(), layer: Some(0), kind: kind(part) };
        let sites = vec![site("attention", Part::Attention), site("mlp", Part::Mlp)];
        Outline { architecture: "joins".into(), layers: 1, sites, ..Outline::default() }
    };
    let base = Joins { outline: outline(64), weight: tensor(DType::F32, &[1], &[0.0]) };
    let begin = |method: &str, name: &str| {
        let fuse = match method {
            "fusion" => {
                let o = Options { bottleneck: 2, ..Options::default() };
                let p = find("adapter-p").unwrap();
                let adapted = Adapted::new((p.build)(&o).unwrap().as_ref(), &base, &CPU, DType::F32, 1).unwrap();
                let tensors = adapted.adapter_tensors().unwrap().into_iter().collect();
                vec![Frozen { name: "a".into(), bottleneck: 2, tensors }]
            }
            _ => Vec::new(),
        };
        let o = Options { bottleneck: 64, fuse, ..Options::default() };
        let row = find(method).unwrap();
        let adapted = Adapted::new((row.build)(&o).unwrap().as_ref(), &base, &CPU, DType::F32, 1).unwrap();
        let id = adapted.params.find(name).unwrap_or_else(|| panic!("{method} has no {name}"));
        adapted.params.tensor(id).to_f64().unwrap()
    };
    let deviation = |v: &[f64]| (v.iter().map(|x| x * x).sum::<f64>() / v.len() as f64).sqrt();
    for (method, std, most) in [("adapter-h", 0.01 * 0.880, 0.02), ("adapter-l", 0.02, 0.1), ("adapter-p", 0.02, 0.1)] {
        for name in ["mlp.adapter_down.weight", "mlp.adapter_up.weight"] {
            let v = begin(method, name);
            // Of 4096 numbers the deviation is known to about one in ninety.
            assert!((deviation(&v) / std - 1.0).abs() < 0.05, "{method}, {name}: {}", deviation(&v));
            assert!(v.iter().all(|v| v.abs() <= most) && v.iter().any(|v| v.abs() > 1.8 * std), "{method}, {name}");
        }
        assert!(begin(method, "mlp.adapter_up.bias").iter().all(|&b| b == 0.0), "{method}");
    }
    let (gamma, beta) = (begin("adapter-l", "mlp.adapter_norm.weight"), begin("adapter-l", "mlp.adapter_norm.bias"));
    assert!(gamma.iter().all(|&v| v == 1.0) && beta.iter().all(|&v| v == 0.0));
    let v = begin("fusion", "mlp.fusion_value.weight");
    assert!((0..64 * 64).all(|i| if i / 64 == i % 64 { v[i] == 1.0 } else { v[i].abs() < 1e-5 }), "near the identity");
    assert!(deviation(&begin("fusion", "mlp.fusion_query.weight")) > 0.018);
}
