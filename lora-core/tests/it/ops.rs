//! Every operation, by table: gradients against finite differences in f64, values against plain loops in f64, for every
//! choice of what is trainable.

mod attention;
mod case;
mod elements;
mod oracles;
mod projections;

use crate::common::{random, relative, tensor};
use case::{Case, choices};
use lora_core::{Grads, Init, ParamsBuilder, Tape, gradcheck, lowrank::Layout, ops};
use lora_kernels::{DType, Device};

/// The table.
fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    projections::linear_cases(&mut all);
    projections::lora_cases(&mut all);
    projections::block_cases(&mut all);
    elements::elementwise_cases(&mut all);
    elements::row_cases(&mut all);
    elements::part_cases(&mut all);
    elements::orthogonality_cases(&mut all);
    elements::mix_cases(&mut all);
    attention::attention_cases(&mut all);
    attention::block_case(&mut all);
    all
}

#[test]
fn values_are_those_of_plain_loops() {
    for c in cases() {
        let want = c.expected();
        let want = want.as_slice().unwrap();
        for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::F64, 1e-12)] {
            let mut first = None;
            for trains in choices(c.inputs.len()) {
                for (record, computed) in [(false, false), (true, false), (true, true)] {
                    let params = c.params(dtype, &trains);
                    let mut t = if record { Tape::new(&params) } else { Tape::inference(&params) };
                    let y = c.run(&mut t, &params, &trains, computed).unwrap();
                    assert_eq!(y.is_tracked(), record && trains.contains(&true), "{}, {trains:?}: tracked", c.name);
                    let y = y.value().to_f64().unwrap();
                    let error = relative(&y, want);
                    assert!(error <= tolerance, "{}, {dtype:?}: off by {error}", c.name);
                    // What trains, and whether it is recorded, changes no bit; nor does a write in place.
                    let first = first.get_or_insert_with(|| y.clone());
                    assert_eq!(&y, first, "{}, {trains:?}", c.name);
                }
            }
        }
    }
}

#[test]
fn gradients_are_those_of_finite_differences() {
    for c in cases() {
        for trains in choices(c.inputs.len()) {
            let params = c.params(DType::F64, &trains);
            for computed in [false, true] {
                let once = gradcheck(&params, |t| c.run(t, &params, &trains, computed)).unwrap();
                let twice = gradcheck(&params, |t| c.run_twice(t, &params, &trains, computed)).unwrap();
                for worst in [once, twice] {
                    let what = format!("{}, {trains:?} trains, computed {computed}: {worst:?}", c.name);
                    assert!(worst.error <= 1e-8, "{what}");
                    assert!(worst.largest > 0.01 || !trains.contains(&true), "{what} checks nothing");
                }
            }
        }
    }
}

/// One operation or several: the same values and the same gradients.
#[test]
fn lora_linear_is_linear_and_linear_onto() {
    let (n, k, out, s) = (6, 5, 8, 0.75);
    let shapes: [(&str, &[usize]); 6] =
        [("x", &[n, k]), ("w", &[k, out]), ("a_0", &[2, k]), ("b_0", &[3, 2]), ("a_1", &[2, k]), ("b_1", &[4, 2])];
    let mut b = ParamsBuilder::new();
    for ((name, shape), seed) in shapes.iter().zip(1..) {
        b.add(*name, shape, Init::Copy(tensor(DType::F64, shape, &random(seed, shape.iter().product(), 1.0))));
    }
    let params = b.build(&Device::Cpu, DType::F64, 0).unwrap();
    let dy = tensor(DType::F64, &[n, out], &random(9, n * out, 1.0));
    let run = |fused: bool| {
        let mut t = Tape::new(&params);
        let mut v = params.ids().map(|id| t.param(id).unwrap()).collect::<Vec<_>>().into_iter();
        let mut next = || v.next().unwrap();
        let (x, w) = (next(), next());
        let parts = [0..3, 4..8].map(|cols| ops::LoraPart { cols, a: next(), b: next() });
        let y = if fused {
            ops::lora_linear(&mut t, &x, &w, Layout::InOut, None, &parts, s).unwrap()
        } else {
            let mut y = ops::linear(&mut t, &x, &w, Layout::InOut, None).unwrap();
            for part in &parts {
                let u = ops::linear(&mut t, &x, &part.a, Layout::OutIn, None).unwrap();
                y = ops::linear_onto(&mut t, y, part.cols.clone(), &u, &part.b, s).unwrap();
            }
            y
        };
        let values = y.value().to_f64().unwrap();
        let mut grads = Grads::new(&params).unwrap();
        t.backward_from(y, dy.clone(), &mut grads).unwrap();
        let gradients = params.ids().flat_map(|id| grads.get(id).unwrap().unwrap().to_f64().unwrap());
        values.into_iter().chain(gradients).collect::<Vec<_>>()
    };
    let error = relative(&run(true), &run(false));
    assert!(error <= 1e-14, "{error}");
}

/// Value and gradients of an operation all of whose inputs train.
#[cfg(feature = "cuda")]
fn value_and_gradients(c: &Case, device: &Device, dtype: DType, computed: bool) -> Vec<(String, Vec<f64>)> {
    let trains = vec![true; c.inputs.len()];
    let params = c.params_on(device, dtype, &trains);
    let mut t = Tape::new(&params);
    let y = c.run(&mut t, &params, &trains, computed).unwrap();
    let mut all = vec![("y".to_owned(), y.value().to_f64().unwrap())];
    let dy = tensor(DType::F64, y.value().shape(), &random(99, y.value().len(), 1.0));
    let dy = dy.to_dtype(y.value().dtype()).unwrap().to_device(device).unwrap();
    let mut grads = Grads::new(&params).unwrap();
    t.backward_from(y, dy, &mut grads).unwrap();
    for id in params.ids() {
        all.push((format!("d{}", params.name(id)), grads.get(id).unwrap().unwrap().to_f64().unwrap()));
    }
    all
}

/// The whole table on every GPU at hand (with their features the emulated device and the first CUDA device), in f32 and in
/// bf16, against the CPU in f64.
#[cfg(feature = "cuda")]
#[test]
fn devices_agree() {
    let gpus = [
        #[cfg(feature = "emulator")]
        lora_kernels::cuda::Gpu::emulated(0),
        lora_kernels::cuda::Gpu::open(0),
    ];
    for gpu in gpus {
        let device = match gpu {
            Ok(gpu) => Device::Cuda(gpu),
            Err(e) => {
                println!("skipped: no CUDA device ({e})");
                continue;
            }
        };
        // Not every kernel reads bf16 and writes the f32 gradient of a parameter: only those that meet one in a model.
        for (dtype, tolerance, ways) in [(DType::F32, 1e-5, &[false, true][..]), (DType::Bf16, 3e-2, &[true])] {
            for c in cases() {
                // A penalty on parameters sees their own values, which are f32.
                if dtype == DType::Bf16 && c.name.starts_with("orthogonality") {
                    continue;
                }
                for &computed in ways {
                    let want = value_and_gradients(&c, &Device::Cpu, DType::F64, computed);
                    let got = value_and_gradients(&c, &device, dtype, computed);
                    for ((name, want), (_, got)) in want.iter().zip(&got) {
                        let error = relative(got, want);
                        assert!(error <= tolerance, "{} in {dtype:?}: {name} off by {error}", c.name);
                    }
                }
            }
        }
    }
}

#[test]
fn operations_leave_their_inputs_as_they_were() {
    for c in cases() {
        for trains in choices(c.inputs.len()) {
            let params = c.params(DType::F32, &trains);
            let before = params.flat().to_f64().unwrap();
            let mut t = Tape::new(&params);
            let shared: Vec<_> =
                c.inputs.iter().zip(c.values()).map(|((_, s, _), v)| tensor(DType::F32, s, &v)).collect();
            let vars = shared.iter().map(|x| t.constant(x)).collect();
            (c.op)(&mut t, vars).unwrap();
            for (x, v) in shared.iter().zip(c.values()) {
                assert_eq!(x.to_f64().unwrap(), v, "{}: an input was written", c.name);
            }
            let y = c.run(&mut t, &params, &trains, false).unwrap();
            assert_eq!(params.flat().to_f64().unwrap(), before, "{}: a parameter was written", c.name);
            drop(y);
        }
    }
}
