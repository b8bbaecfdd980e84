//! The tape's promises: nothing saved without need, no write that shows elsewhere, gradients that add up and never leak
//! from step to step, masks and initial values that depend on nothing they should not.

use std::{cell::Cell, rc::Rc};

use crate::common::{NOISE, bits, ids, random, tensor};
use lora_core::{Grads, Init, Noise, ParamId, Params, ParamsBuilder, Result, Tape, Tensor, Var, lowrank::Layout, ops};
use lora_kernels::{Activation, Attention, DType, Device, Sequences, axpby};

const CPU: Device = Device::Cpu;
const KIND: Activation = Activation::GeluTanh;

/// Parameters of the given names and shapes, with values.
fn params(of: &[(&str, &[usize])]) -> Params {
    let mut b = ParamsBuilder::new();
    for &(name, shape) in of {
        b.add(name, shape, Init::Normal { std: 1.0 });
    }
    b.build(&CPU, DType::F32, 1).unwrap()
}

fn random_tensor(seed: u64, shape: &[usize]) -> Tensor {
    tensor(DType::F32, shape, &random(seed, shape.iter().product(), 1.0))
}

fn id(p: &Params, name: &str) -> ParamId {
    p.find(name).unwrap()
}

fn grad(g: &Grads, id: ParamId) -> Vec<f32> {
    g.get(id).unwrap().expect("a gradient").to_vec().unwrap()
}

/// A value with a gradient, computed from the parameter `p`; nobody but the result holds its tensor.
fn computed(t: &mut Tape, p: &Params) -> Var {
    let v = t.param(id(p, "p")).unwrap();
    let (s, copy) = (v.slot().unwrap(), v.value().to_f64().unwrap());
    t.record(tensor(DType::F32, v.value().shape(), &copy), true, move |dy, g| g.pass(s, dy))
}

/// One use of x beside the frozen w.
type Use = fn(&mut Tape, &Params, &Var, &Var) -> Result<Var>;

fn attention() -> (Attention, Sequences) {
    let cfg = Attention { heads: 1, kv_heads: 1, head_dim: 2, scale: 1.0, causal: true, dropout: None };
    (cfg, Sequences::new(&[4]))
}

/// A projection with one low-rank part; `a` and `b` name parameters where they train.
fn lora(t: &mut Tape, x: &Var, w: &Var, a: Option<ParamId>, b: Option<ParamId>) -> Result<Var> {
    let var = |t: &Tape, id: Option<ParamId>| match id {
        Some(id) => t.param(id),
        None => Ok(t.constant(&random_tensor(4, &[6, 6]))),
    };
    let part = ops::LoraPart { cols: 0..6, a: var(t, a)?, b: var(t, b)? };
    ops::lora_linear(t, x, w, Layout::OutIn, None, &[part], 0.5)
}

#[test]
fn nothing_is_saved_that_only_a_frozen_weight_would_need() {
    let loss: Use = |t, _, x, w| ops::loss_head(t, x, w, None, &ids(&[0, 1, 2, 3]), 0.0, 1.0);
    let row = |t: &Tape| t.constant(&random_tensor(5, &[6]));
    let norm = |t: &mut Tape, x: &Var| {
        let (gamma, beta) = (row(t), row(t));
        ops::layer_norm(t, x, &gamma, &beta, 1e-5)
    };
    // The name, whether x has a gradient, whether x and the weight w may be kept for the backward pass.
    let table: &[(&str, bool, bool, bool, Use)] = &[
        ("linear, x trains", true, false, true, |t, _, x, w| ops::linear(t, x, w, Layout::InOut, None)),
        ("linear, x trains", true, false, true, |t, _, x, w| ops::linear(t, x, w, Layout::OutIn, None)),
        ("linear, x and b train", true, false, true, |t, p, x, w| {
            ops::linear(t, x, w, Layout::OutIn, Some(&t.param(id(p, "b")).unwrap()))
        }),
        ("linear, b trains", false, false, false, |t, p, x, w| {
            ops::linear(t, x, w, Layout::OutIn, Some(&t.param(id(p, "b")).unwrap()))
        }),
        ("linear, w trains", false, true, false, |t, p, x, _| {
            ops::linear(t, x, &t.param(id(p, "p")).unwrap(), Layout::OutIn, None)
        }),
        ("linear, frozen", false, false, false, |t, _, x, w| ops::linear(t, x, w, Layout::OutIn, None)),
        ("linear_onto, x trains", true, false, true, |t, _, x, w| {
            let y = t.constant(&random_tensor(6, &[4, 6]));
            ops::linear_onto(t, y, 0..6, x, w, 1.0)
        }),
        ("linear_onto, y trains", false, false, false, |t, p, x, w| {
            let y = ops::gather(t, &t.param(id(p, "p")).unwrap(), &ids(&[0, 1, 2, 3]))?;
            ops::linear_onto(t, y, 0..6, x, w, 1.0)
        }),
        ("lora_linear, x trains", true, false, true, |t, _, x, w| lora(t, x, w, None, None)),
        ("lora_linear, b trains", false, false, false, |t, p, x, w| lora(t, x, w, None, Some(id(p, "p")))),
        ("lora_linear, a trains", false, true, false, |t, p, x, w| lora(t, x, w, Some(id(p, "p")), None)),
        ("lora_linear, frozen", false, false, false, |t, _, x, w| lora(t, x, w, None, None)),
        ("add", true, false, false, |t, _, x, _| {
            let y = t.constant(&random_tensor(6, &[4, 6]));
            ops::add(t, x.share(), y)
        }),
        ("gather", true, false, false, |t, _, x, _| ops::gather(t, x, &ids(&[3, 3]))),
        ("dropout", true, false, false, |t, _, x, _| ops::dropout(t, x.share(), 0.5)),
        ("activation, frozen", false, false, false, |t, _, x, _| ops::activation(t, KIND, x)),
        ("activation, x trains", true, true, false, |t, _, x, _| ops::activation(t, KIND, x)),
        ("loss_head, x trains", true, false, false, loss),
        ("loss_head, frozen", false, false, false, loss),
        ("attention, frozen", false, false, false, |t, _, x, _| {
            let (cfg, sequences) = attention();
            ops::attention(t, cfg, &sequences, ops::Qkv::Fused(x))
        }),
        ("attention of separate projections, frozen", false, false, false, |t, _, x, w| {
            let cfg = Attention { heads: 3, kv_heads: 3, ..attention().0 };
            let v = ops::linear(t, x, w, Layout::OutIn, None)?;
            ops::attention(t, cfg, &Sequences::new(&[4]), ops::Qkv::Separate { q: x, k: x, v: &v })
        }),
        ("rope", true, false, false, |t, _, x, _| {
            let table = random_tensor(6, &[1, 3]);
            ops::rope(t, x, &ids(&[0; 4]), &table, &table, 6)
        }),
        ("silu_gate, frozen", false, false, false, |t, _, x, _| ops::silu_gate(t, x, x)),
        ("silu_gate, the gate trains", true, true, false, |t, _, x, _| {
            let up = t.constant(&random_tensor(6, &[4, 6]));
            ops::silu_gate(t, x, &up)
        }),
        ("silu_gate, up trains", true, false, false, |t, _, x, _| {
            let gate = t.constant(&random_tensor(6, &[4, 6]));
            ops::silu_gate(t, &gate, x)
        }),
        ("concat_rows", true, false, false, |t, _, x, _| ops::concat_rows(t, x, x)),
        ("columns", true, false, false, |t, _, x, _| ops::columns(t, x, 1..3)),
        ("squared_error", true, false, false, |t, _, x, _| ops::squared_error(t, x, &random_tensor(6, &[24]), 1.0)),
    ];
    for &(name, tracked, keeps_x, keeps_w, op) in table {
        let p = params(&[("p", &[6, 6]), ("b", &[6])]);
        let mut t = Tape::new(&p).with_noise(NOISE);
        let x = match tracked {
            true => {
                let all = computed(&mut t, &p);
                ops::gather(&mut t, &all, &ids(&[0, 1, 2, 3])).unwrap()
            }
            false => t.constant(&random_tensor(2, &[4, 6])),
        };
        let w = t.constant(&random_tensor(3, &[6, 6]));
        let y = op(&mut t, &p, &x, &w).unwrap();
        assert_eq!(!x.value().is_unshared(), keeps_x, "{name}: x kept");
        assert_eq!(!w.value().is_unshared(), keeps_w, "{name}: w kept");
        drop(y);
    }
    // Norms keep x only where something about them trains.
    let p = params(&[("p", &[4, 6])]);
    let mut t = Tape::new(&p);
    let x = t.constant(&random_tensor(2, &[4, 6]));
    norm(&mut t, &x).unwrap();
    let gamma = row(&t);
    ops::rms_norm(&mut t, &x, &gamma, 1e-5).unwrap();
    assert!(x.value().is_unshared(), "norms of a constant keep it");
    let x = computed(&mut t, &p);
    norm(&mut t, &x).unwrap();
    assert!(!x.value().is_unshared(), "the backward of a norm needs x: this test would see it");
}

#[test]
fn results_are_made_in_place_unless_somebody_holds_them() {
    let p = params(&[("p", &[3, 4]), ("w", &[4, 2])]);
    let u = random_tensor(2, &[3, 2]);
    // Whether a later step needs y as it was, and whether another share of it is used later.
    for (saved, shared) in [(false, false), (true, false), (false, true), (true, true)] {
        let mut t = Tape::new(&p);
        let y = computed(&mut t, &p);
        let was = y.value().to_vec::<f32>().unwrap();
        let z = if saved { Some(ops::activation(&mut t, KIND, &y).unwrap()) } else { None };
        let other = shared.then(|| y.share());
        assert_eq!(y.value().is_unshared(), !saved && !shared, "saved {saved}, shared {shared}");
        let (u, w) = (t.constant(&u), t.param(id(&p, "w")).unwrap());
        let y = ops::linear_onto(&mut t, y, 0..4, &u, &w, 1.0).unwrap();
        assert_ne!(y.value().to_vec::<f32>().unwrap(), was);
        if let Some(other) = other {
            assert_eq!(other.value().to_vec::<f32>().unwrap(), was, "a write showed through a share");
        }
        if let Some(z) = z {
            // The saved y was f's input: its derivative there, not at the new y.
            let dz = tensor(DType::F32, &[3, 4], &[1.0; 12]);
            let mut g = Grads::new(&p).unwrap();
            t.backward_from(z, dz, &mut g).unwrap();
            let slope = |x: f32| {
                let h = 1e-3;
                let f = |x: f64| x / 2.0 * (1.0 + (0.7978845608028654 * (x + 0.044715 * x.powi(3))).tanh());
                (f(f64::from(x) + h) - f(f64::from(x) - h)) / (2.0 * h)
            };
            for (got, x) in grad(&g, id(&p, "p")).iter().zip(was) {
                assert!((f64::from(*got) - slope(x)).abs() < 1e-5, "f′({x}) = {got}");
            }
            assert_eq!(g.unwritten(), ["w"], "nothing flows from z to w");
        }
    }
}

#[test]
fn an_addition_of_two_values_that_both_are_needed_later_writes_neither() {
    let p = params(&[("p", &[4, 6])]);
    let (cfg, sequences) = attention();
    let mut t = Tape::new(&p);
    let a = computed(&mut t, &p);
    // The attention keeps its input a and its output b.
    let b = ops::attention(&mut t, cfg, &sequences, ops::Qkv::Fused(&a)).unwrap();
    let c = ops::attention(&mut t, cfg, &sequences, ops::Qkv::Fused(&a)).unwrap();
    let (b_was, c_was) = (b.share(), c.share());
    let (b_bits, c_bits) = (bits(b.value()), bits(c.value()));
    let sum = ops::add(&mut t, b, c).unwrap();
    assert_eq!((bits(b_was.value()), bits(c_was.value())), (b_bits.clone(), c_bits));
    assert_ne!(bits(sum.value()), b_bits);
}

/// Two losses that share one parameter each way: p in both, q in the first and r in the second.
fn losses(t: &mut Tape, p: &Params, which: usize) -> Var {
    let x = ops::activation(t, KIND, &t.param(id(p, "p")).unwrap()).unwrap();
    let w = t.param(id(p, ["q", "r"][which])).unwrap();
    ops::loss_head(t, &x, &w, None, &ids(&[0, 4, 2]), 0.0, 0.5).unwrap()
}

fn three() -> Params {
    params(&[("p", &[3, 4]), ("q", &[5, 4]), ("r", &[5, 4])])
}

#[test]
fn two_backwards_add_up_to_one_of_the_sum() {
    let p = three();
    let (mut apart, mut together) = (Grads::new(&p).unwrap(), Grads::new(&p).unwrap());
    for which in 0..2 {
        let mut t = Tape::new(&p);
        let loss = losses(&mut t, &p, which);
        t.backward(loss, &mut apart).unwrap();
        assert_eq!(apart.unwritten(), if which == 0 { &["r"][..] } else { &[] });
    }
    let mut t = Tape::new(&p);
    let (a, b) = (losses(&mut t, &p, 0), losses(&mut t, &p, 1));
    let sum = ops::add(&mut t, a, b).unwrap();
    t.backward(sum, &mut together).unwrap();
    for i in p.ids() {
        for (x, y) in grad(&apart, i).iter().zip(grad(&together, i)) {
            assert!((x - y).abs() <= 1e-6 * y.abs().max(0.1), "{}: {x} and {y}", p.name(i));
        }
        assert!(grad(&apart, i).iter().any(|v| v.abs() > 0.01), "{}: no gradient to compare", p.name(i));
    }
}

#[test]
fn gradients_of_an_earlier_step_never_leak() {
    let p = three();
    let run = |g: &mut Grads, which: usize| {
        let mut t = Tape::new(&p);
        let loss = losses(&mut t, &p, which);
        t.backward(loss, g).unwrap();
    };
    let mut clean = Grads::new(&p).unwrap();
    run(&mut clean, 0);
    let mut g = Grads::new(&p).unwrap();
    run(&mut g, 1);
    let poison = tensor(DType::F32, &[1, p.count()], &vec![f64::NAN; p.count()]);
    axpby(1.0, poison.mat(), 0.0, g.flat_mut().unwrap()).unwrap();
    g.reset();
    assert_eq!(g.unwritten(), ["p", "q", "r"]);
    assert!(p.ids().all(|i| g.get(i).unwrap().is_none()), "a gradient right after the reset");
    run(&mut g, 0);
    for name in ["p", "q"] {
        let of = |g: &Grads| grad(g, id(&p, name));
        assert_eq!(of(&g), of(&clean), "{name}");
    }
    assert!(g.get(id(&p, "r")).unwrap().is_none());

    // What nobody wrote counts as zero, and is still named.
    let all = |g: &mut Grads| {
        let mut copy = Tensor::empty(&CPU, DType::F32, &[1, p.count()]).unwrap();
        axpby(1.0, g.flat_mut().unwrap().as_mat(), 0.0, copy.make_mut().unwrap()).unwrap();
        copy.to_vec::<f32>().unwrap()
    };
    let flat = all(&mut g);
    assert!(flat[p.range(id(&p, "r"))].iter().all(|&v| v == 0.0), "{flat:?}");
    assert_eq!(flat[p.range(id(&p, "q"))], grad(&clean, id(&p, "q")));
    assert_eq!(g.unwritten(), ["r"]);
    assert!(g.get(id(&p, "r")).unwrap().is_none());
    // After that, a backward without a reset adds to it as to any other.
    run(&mut g, 1);
    assert!(g.unwritten().is_empty());
    let mut other = Grads::new(&p).unwrap();
    run(&mut other, 1);
    assert_eq!(grad(&g, id(&p, "r")), grad(&other, id(&p, "r")));
}

#[test]
fn nothing_below_the_lowest_trainable_value_and_nothing_unused_runs_backwards() {
    let p = params(&[("p", &[3, 4])]);
    let ran = Rc::new(Cell::new(0));
    let count = |value: Tensor, tracked: bool, t: &mut Tape| {
        let ran = ran.clone();
        t.record(value, tracked, move |_, _| {
            ran.set(ran.get() + 1);
            Ok(())
        })
    };
    let mut t = Tape::new(&p);
    let below = count(random_tensor(2, &[3, 4]), false, &mut t);
    assert!(!below.is_tracked());
    assert_eq!(Rc::strong_count(&ran), 1, "the step of a constant keeps what it captured");
    let unused = count(random_tensor(3, &[3, 4]), true, &mut t);
    let _unused = ops::activation(&mut t, KIND, &unused).unwrap();
    let x = t.param(id(&p, "p")).unwrap();
    let y = ops::add(&mut t, x, below).unwrap();
    let used = count(random_tensor(4, &[3, 4]), true, &mut t);
    let y = ops::add(&mut t, y, used).unwrap();
    let mut g = Grads::new(&p).unwrap();
    t.backward_from(y, tensor(DType::F32, &[3, 4], &[2.0; 12]), &mut g).unwrap();
    assert_eq!(ran.get(), 1, "only the step that was used");
    assert_eq!(grad(&g, id(&p, "p")), [2.0; 12]);

    let mut t = Tape::inference(&p);
    let x = t.param(id(&p, "p")).unwrap();
    assert!(!ops::activation(&mut t, KIND, &x).unwrap().is_tracked(), "inference records nothing");
}

#[test]
fn parameters_change_for_no_tape_and_no_tensor_that_holds_them() {
    let mut p = params(&[("p", &[3, 4]), ("q", &[2])]);
    let start = bits(&p.flat());
    let (tape, tensor_of_q, other) = (Tape::new(&p), p.tensor(id(&p, "q")), p.clone());
    let i = id(&p, "p");
    p.set(i, &random_tensor(9, &[3, 4])).unwrap();
    assert_ne!(bits(&p.flat()), start);
    assert_eq!(bits(&other.flat()), start, "a clone changed");
    assert_eq!(bits(tape.param(i).unwrap().value()), start[p.range(i)], "a tape's parameter changed");
    assert_eq!(bits(&tensor_of_q), start[p.range(id(&p, "q"))]);
}

#[test]
fn initial_values_depend_on_the_seed_and_the_parameter_alone() {
    let build = |names: &[&str], seed: u64, dtype: DType| {
        let mut b = ParamsBuilder::new();
        for (i, &name) in names.iter().enumerate() {
            b.add(name, &[4, 8], if i % 2 == 0 { Init::kaiming_uniform(16) } else { Init::Normal { std: 0.5 } });
        }
        b.build(&CPU, dtype, seed).unwrap()
    };
    let of = |p: &Params, name: &str| bits(&p.tensor(id(p, name)));
    let a = build(&["a", "b"], 1, DType::F32);
    assert_eq!(bits(&a.flat()), bits(&build(&["a", "b"], 1, DType::F32).flat()), "same seed, same bits");
    let other = build(&["x", "y", "a", "b", "z"], 1, DType::F32);
    for name in ["a", "b"] {
        assert_eq!(of(&a, name), of(&other, name), "{name} depends on its neighbours");
        assert_ne!(of(&a, name), of(&build(&["a", "b"], 2, DType::F32), name), "{name}: another seed");
    }
    assert_ne!(of(&other, "x"), of(&other, "a"), "two parameters, two streams");
    let a = a.tensor(id(&a, "a")).to_vec::<f32>().unwrap();
    assert!(a.iter().all(|v| v.abs() <= 0.25) && a.iter().any(|v| v.abs() > 0.2), "uniform within 1/√16: {a:?}");
    let wide = build(&["a"], 1, DType::F64).flat().to_vec::<f64>().unwrap();
    assert!(wide.iter().zip(&a).all(|(w, a)| *w as f32 == *a), "f64 begins where f32 does");

    let exact = random_tensor(3, &[2, 3]);
    let mut b = ParamsBuilder::new();
    b.add("ones", &[2], Init::Ones);
    b.add("copy", &[2, 3], Init::Copy(exact.clone()));
    b.add("zeros", &[2], Init::Zeros);
    let p = b.build(&CPU, DType::F32, 0).unwrap();
    assert_eq!(of(&p, "copy"), bits(&exact));
    assert_eq!(p.tensor(id(&p, "ones")).to_vec::<f32>().unwrap(), [1.0; 2]);
    assert_eq!(p.tensor(id(&p, "zeros")).to_vec::<f32>().unwrap(), [0.0; 2]);
    assert_eq!([p.is_vector(id(&p, "ones")), p.is_vector(id(&p, "copy"))], [true, false]);
}

/// Dropout on the activations and on the probabilities of attention, of some sequences of a step.
fn noisy(p: &Params, qkv: &Tensor, lengths: &[usize], noise: Noise) -> (Tensor, Vec<u64>) {
    let mut t = Tape::new(p).with_noise(noise);
    let scale = t.param(id(p, "scale")).unwrap();
    let x = t.constant(qkv);
    let x = ops::rms_norm(&mut t, &x, &scale, 1e-5).unwrap();
    let x = ops::dropout(&mut t, x, 0.3).unwrap();
    let dropout = t.dropout_mask(0.3);
    let cfg = Attention { heads: 2, kv_heads: 2, head_dim: 3, scale: 1.0, causal: true, dropout };
    let y = ops::attention(&mut t, cfg, &Sequences::new(lengths), ops::Qkv::Fused(&x)).unwrap();
    let y = ops::dropout(&mut t, y, 0.3).unwrap();
    let value = y.value().clone();
    let mut g = Grads::new(p).unwrap();
    let dy = tensor(DType::F32, value.shape(), &vec![1.0; value.len()]);
    t.backward_from(y, dy, &mut g).unwrap();
    (value, bits(&g.get(id(p, "scale")).unwrap().unwrap()))
}

#[test]
fn micro_batches_see_the_masks_of_the_whole_batch() {
    let p = params(&[("scale", &[18])]);
    let lengths = [5, 1, 4, 7];
    let qkv = random_tensor(1, &[17, 18]);
    let whole = noisy(&p, &qkv, &lengths, NOISE);
    assert_eq!(bits(&whole.0), bits(&noisy(&p, &qkv, &lengths, NOISE).0), "same noise, same bits");
    assert!(bits(&whole.0).contains(&0), "something is dropped");
    let mut split = Vec::new();
    for (rows, lengths) in [(0..5, &lengths[..1]), (5..10, &lengths[1..3]), (10..17, &lengths[3..])] {
        let noise = Noise { row_offset: NOISE.row_offset + rows.start as u32, ..NOISE };
        split.extend(bits(&noisy(&p, &qkv.rows_in(rows), lengths, noise).0));
    }
    assert_eq!(split, bits(&whole.0));
    for other in [
        Noise { seed: NOISE.seed + (1 << 40), ..NOISE },
        Noise { step: NOISE.step + 1, ..NOISE },
        Noise { row_offset: NOISE.row_offset + 1, ..NOISE },
    ] {
        assert_ne!(bits(&noisy(&p, &qkv, &lengths, other).0), bits(&whole.0), "{other:?} changes the masks");
    }
}

/// Of a network some parts that read a common value, one of them with another inside, one that trains nothing and one that
/// nothing uses: its value, its gradients, how often a part was computed, and how many of their backward steps are kept after the way forward.
fn in_parts(checkpoints: bool) -> (Vec<u64>, Vec<Vec<f32>>, usize, usize) {
    let p = params(&[("a", &[8]), ("b", &[8]), ("c", &[8]), ("common", &[8])]);
    let x = random_tensor(1, &[5, 8]);
    let (calls, held) = (Cell::new(0), Rc::new(()));
    let part = |t: &mut Tape, x: Var, name: &str, common: &Var| -> Result<Var> {
        calls.set(calls.get() + 1);
        let scale = t.param(id(&p, name))?;
        let y = ops::rms_norm(t, &x, &scale, 1e-5)?;
        let y = ops::dropout(t, y, 0.3)?;
        let y = ops::add(t, y, common.share())?;
        let (slot, value, held) = (y.slot().unwrap(), y.into_value(), held.clone());
        let y = t.record(value, true, move |dy, g| {
            drop(held);
            g.pass(slot, dy)
        });
        ops::add(t, x, y)
    };
    let part = &part;
    let mut t = Tape::new(&p).with_noise(NOISE).with_checkpoints(checkpoints);
    let (scale, y) = (t.param(id(&p, "common")).unwrap(), t.constant(&random_tensor(3, &[5, 8])));
    let common = ops::rms_norm(&mut t, &y, &scale, 1e-5).unwrap();
    let h = t.constant(&x);
    let h = t.checkpoint(h, |t, x| ops::dropout(t, x, 0.1)).unwrap();
    assert!(!h.is_tracked(), "nothing trains there");
    let z = common.share();
    let h = t.checkpoint(h, move |t, x| part(t, x, "a", &z)).unwrap();
    let z = common.share();
    let h = t.checkpoint(h, move |t, x| {
        let (x, z) = (part(t, x, "b", &z)?, z.share());
        t.checkpoint(x, move |t, x| part(t, x, "c", &z))
    });
    let (h, z) = (h.unwrap(), common.share());
    let unused = t.checkpoint(h.share(), move |t, x| part(t, x, "a", &z)).unwrap();
    assert!(unused.is_tracked());
    let kept = Rc::strong_count(&held) - 1;
    let (value, mut g) = (h.value().clone(), Grads::new(&p).unwrap());
    let dy = random_tensor(2, &[5, 8]);
    t.backward_from(h, dy, &mut g).unwrap();
    (bits(&value), ["a", "b", "c", "common"].map(|name| grad(&g, id(&p, name))).into(), calls.get(), kept)
}

#[test]
fn parts_that_are_computed_once_more_have_the_same_bits() {
    let (plain, again) = (in_parts(false), in_parts(true));
    assert_eq!((&again.0, &again.1), (&plain.0, &plain.1));
    assert_eq!((plain.2, plain.3), (4, 4), "what is not in parts is computed once, and kept");
    // On the way back a once; b and c once by the outer part, whose inner one computes c once more.
    assert_eq!((again.2, again.3), (4 + 1 + 2 + 1, 0));
}

#[test]
fn a_dropout_of_rate_zero_keeps_the_masks_of_its_neighbours() {
    let p = Params::none(&CPU).unwrap();
    let x = random_tensor(1, &[4, 8]);
    let second = |first: f64| {
        let mut t = Tape::new(&p).with_noise(NOISE);
        let y = t.constant(&x);
        ops::dropout(&mut t, y, first).unwrap();
        let y = t.constant(&x);
        bits(ops::dropout(&mut t, y, 0.5).unwrap().value())
    };
    assert_eq!(second(0.0), second(0.5));
}
