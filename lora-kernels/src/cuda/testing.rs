//! What the tests of CUDA kernels share: the same calls on the host in f64 and on every device at hand, compared.

use std::{
    cell::{Cell, RefCell},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

pub(crate) use crate::DType::{Bf16, F16, F32};
#[cfg(feature = "emulator")]
use crate::cuda::emulated::Patch;
use crate::{
    Buffer, DType, Device,
    cuda::Gpu,
    testing::{Padded, random, rounded},
};

thread_local! {
    /// The bug to plant in emulated devices of this thread.
    #[cfg(feature = "emulator")]
    static PATCH: Cell<Option<Patch>> = const { Cell::new(None) };
    /// Whether only emulated devices count.
    static EMULATED_ONLY: Cell<bool> = const { Cell::new(false) };
}

/// The devices to test on: the emulation, running threads far ahead and in lockstep, and the first real one. With none
/// of them the test says so and passes, unless `LORA_GATES=required`.
pub(crate) fn gpus() -> Vec<Arc<Gpu>> {
    let mut gpus = Vec::new();
    #[cfg(feature = "emulator")]
    for seed in [0, 1] {
        match Gpu::emulated_with(seed, PATCH.get()) {
            Ok(gpu) => gpus.push(gpu),
            Err(e) => missing(&format!("no emulation ({e})")),
        }
    }
    // A device that is there and cannot be opened is a failure, not a skip.
    if !EMULATED_ONLY.get() && crate::cuda::devices().is_ok_and(|d| !d.is_empty()) {
        gpus.push(Gpu::open(0).unwrap());
    }
    if gpus.is_empty() {
        missing("no CUDA device");
    }
    gpus
}

/// Says what a check cannot do without; fails where it is required.
pub(crate) fn missing(what: &str) {
    assert!(std::env::var_os("LORA_GATES").is_none_or(|v| v != "required"), "required, but there is {what}");
    println!("skipped: {what}");
}

/// One of the places where a test's calls run.
pub(crate) struct Side {
    device: Device,
    /// The type of the matrices here.
    dtype: DType,
    /// The type that is tested: inputs are rounded to it on both sides.
    tested: DType,
    outputs: RefCell<Vec<(String, Vec<f64>)>>,
}

impl Side {
    /// Where matrices lie.
    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    /// Whether this is the reference, on the host.
    pub(crate) fn is_reference(&self) -> bool {
        self.device.is_cpu()
    }

    /// The type that is tested.
    pub(crate) fn tested(&self) -> DType {
        self.tested
    }

    /// Given numbers, rounded to the tested type.
    pub(crate) fn given(&self, rows: usize, cols: usize, pad: usize, data: &[f64]) -> Padded {
        Padded::on(&self.device, self.dtype, rows, cols, pad, &rounded(self.tested, data))
    }

    /// Given numbers in the accumulator's type.
    pub(crate) fn given_acc(&self, rows: usize, cols: usize, pad: usize, data: &[f64]) -> Padded {
        let data = rounded(self.tested.accumulator(), data);
        Padded::on(&self.device, self.dtype.accumulator(), rows, cols, pad, &data)
    }

    /// Random numbers in ±scale.
    pub(crate) fn random(&self, seed: u64, rows: usize, cols: usize, pad: usize, scale: f32) -> Padded {
        self.given(rows, cols, pad, &random(seed, rows * cols, scale))
    }

    /// Random numbers in ±scale, in the accumulator's type.
    pub(crate) fn random_acc(&self, seed: u64, rows: usize, cols: usize, pad: usize, scale: f32) -> Padded {
        self.given_acc(rows, cols, pad, &random(seed, rows * cols, scale))
    }

    /// All NaN: a destination that may only be written.
    pub(crate) fn poison(&self, rows: usize, cols: usize, pad: usize) -> Padded {
        self.given(rows, cols, pad, &vec![f64::NAN; rows * cols])
    }

    /// All NaN, in the accumulator's type.
    pub(crate) fn poison_acc(&self, rows: usize, cols: usize, pad: usize) -> Padded {
        self.given_acc(rows, cols, pad, &vec![f64::NAN; rows * cols])
    }

    /// The destination of a test of β: NaN for 0, random numbers else.
    pub(crate) fn target(&self, seed: u64, rows: usize, cols: usize, pad: usize, beta: f64) -> Padded {
        if beta == 0.0 { self.poison(rows, cols, pad) } else { self.random(seed, rows, cols, pad, 1.0) }
    }

    /// As [`Side::target`], in the accumulator's type.
    pub(crate) fn target_acc(&self, seed: u64, rows: usize, cols: usize, pad: usize, beta: f64) -> Padded {
        if beta == 0.0 { self.poison_acc(rows, cols, pad) } else { self.random_acc(seed, rows, cols, pad, 1.0) }
    }

    /// Token or row numbers.
    pub(crate) fn ids(&self, ids: &[u32]) -> Buffer {
        Buffer::from_slice(&self.device, ids).unwrap()
    }

    /// A result to compare.
    pub(crate) fn out(&self, what: impl Into<String>, values: Vec<f64>) {
        self.outputs.borrow_mut().push((what.into(), values));
    }
}

/// Runs `f` on the host in f64 and, for each type with its tolerance, on every device: all outputs agree within
/// |Δ| ≤ tolerance·(1 + |reference|).
pub(crate) fn parity(kernel: &str, types: &[(DType, f64)], f: impl Fn(&Side)) {
    let gpus = gpus();
    for &(tested, tolerance) in types {
        if gpus.is_empty() {
            return;
        }
        let run = |device: Device, dtype| {
            let side = Side { device, dtype, tested, outputs: RefCell::default() };
            f(&side);
            side.outputs.into_inner()
        };
        let reference = run(Device::Cpu, DType::F64);
        assert!(!reference.is_empty(), "{kernel}: nothing is compared");
        for gpu in &gpus {
            let got = run(Device::Cuda(gpu.clone()), tested);
            gpu.synchronize().unwrap();
            assert_eq!(got.len(), reference.len(), "{kernel}: outputs");
            let mut worst = 0.0f64;
            for ((what, got), (_, want)) in got.iter().zip(&reference) {
                assert_eq!(got.len(), want.len(), "{kernel}: length of {what}");
                for (i, (g, w)) in got.iter().zip(want).enumerate() {
                    let same = g == w || g.is_nan() && w.is_nan();
                    let error = if same { 0.0 } else { (g - w).abs() / (1.0 + w.abs()) };
                    assert!(error <= tolerance, "{kernel} {tested:?} on {gpu:?}: {what} at {i}: {g}, expected {w}");
                    worst = worst.max(error);
                }
            }
            println!("{kernel} {tested:?} on {gpu:?}: worst error {worst:.1e} of {tolerance:.0e}");
        }
    }
}

/// A bug planted in a kernel, which `check` must catch.
pub(crate) struct Mutation {
    /// What is wrong.
    pub(crate) name: &'static str,
    /// The module's name.
    pub(crate) module: &'static str,
    /// Text of the module's source; its first occurrence is replaced.
    pub(crate) from: &'static str,
    /// The bug.
    pub(crate) to: &'static str,
    /// A test of the kernel.
    pub(crate) check: fn(),
}

/// Plants each bug and expects its check to fail.
#[cfg(feature = "emulator")]
pub(crate) fn all_are_caught(mutations: &[Mutation]) {
    if Gpu::emulated(0).is_err() {
        return missing("no emulation");
    }
    EMULATED_ONLY.set(true);
    let mut survivors = Vec::new();
    for m in mutations {
        PATCH.set(Some(Patch { module: m.module, from: m.from, to: m.to }));
        let caught = catch_unwind(AssertUnwindSafe(m.check));
        let Err(why) = caught else {
            survivors.push(m.name);
            continue;
        };
        let text = why.downcast_ref::<String>().cloned().unwrap_or_default();
        // A mutation whose text is gone, or that does not compile, proves nothing.
        assert!(!text.contains("there is no") && !text.contains("the C++ compiler"), "{}: {text}", m.name);
        println!("caught: {} in {}: {}", m.name, m.module, text.lines().next().unwrap_or_default());
    }
    PATCH.set(None);
    EMULATED_ONLY.set(false);
    assert!(survivors.is_empty(), "planted bugs that no check noticed: {survivors:?}");
}
