//! What the benchmarks share: random data, the measured ceiling, medians, peak memory.
//!
//! - `cargo bench` runs the criterion groups in `benches/`.
//! - `cargo run --release -p lora-bench --bin cpu` is the report of the CPU: training, generation and more in turn with
//!   PyTorch, Transformers and PEFT, and the shares of the machine's ceilings.
//! - `cargo run --release -p lora-bench --features cuda --bin gpu` is the report of a CUDA device; `gpu-report.sh` builds
//!   and runs it with all checks that need a device, on a machine without Rust.
//! - `interop/` holds the Python sides of comparisons, `results/` what was measured, with commands and machines.
//!
//! ```
//! use lora_bench::{median, numbers};
//!
//! // The median time of x·Wᵀ.
//! let (x, w, mut y) = (numbers(4, 64), numbers(32, 64), numbers(4, 32));
//! let mut seconds = Vec::new();
//! for _ in 0..5 {
//!     let start = std::time::Instant::now();
//!     lora_kernels::gemm(1.0, x.mat(), w.t(), 0.0, y.make_mut()?)?;
//!     seconds.push(start.elapsed().as_secs_f64());
//! }
//! println!("{:.1} µs", median(&seconds) * 1e6);
//! # Ok::<(), lora_core::Error>(())
//! ```

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod gpu;
pub mod models;
pub mod report;
pub mod training;

use std::{
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use lora_core::Tensor;
use lora_kernels::{DType, Device, gemm};
use serde_json::Value;

/// A matrix of numbers in [−1, 1) without structure, the same at every call.
///
/// # Panics
/// When there is no memory for it.
pub fn numbers(rows: usize, cols: usize) -> Tensor {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    let data: Vec<f32> = (0..rows * cols).map(|_| next()).collect();
    Tensor::from_slice(&Device::Cpu, &[rows, cols], &data).expect("memory for a benchmark's matrix")
}

/// The sizes of the product that a ceiling is measured by.
const EVEN: usize = 960;

/// How long a ceiling is looked for.
pub const CEILING: Duration = Duration::from_secs(2);

/// The GEMM ceiling of this machine in FLOP/s, measured for so long: the best of many products of 960³, whose operands stay
/// in cache and whose blocks come out even. With `DType::Bf16` one factor is of that type.
///
/// # Panics
/// When there is no memory for three matrices.
pub fn ceiling(dtype: DType, during: Duration) -> f64 {
    let (a, b, mut c) = (numbers(EVEN, EVEN), typed(&numbers(EVEN, EVEN), dtype), numbers(EVEN, EVEN));
    // As training and generation do: on a thread of the pool.
    let best = Device::Cpu.run(|| {
        best_of(during, || gemm(1.0, a.mat(), b.t(), 0.0, c.make_mut().expect("unshared")).expect("types that fit"))
    });
    2.0 * (EVEN as f64).powi(3) / best
}

/// Bytes of memory that all cores together read in a second, measured for so long: the best of many products of one row with
/// 512 MiB, which no cache holds.
///
/// # Panics
/// When there is no memory for them.
pub fn read_bandwidth(during: Duration) -> f64 {
    let [k, n] = [1 << 13, 1 << 14];
    let (x, w, mut y) = (numbers(1, k), zeros(k, n), zeros(1, n));
    let best = Device::Cpu.run(|| {
        best_of(during, || gemm(1.0, x.mat(), w.mat(), 0.0, y.make_mut().expect("unshared")).expect("types that fit"))
    });
    (k * n * size_of::<f32>()) as f64 / best
}

fn zeros(rows: usize, cols: usize) -> Tensor {
    Tensor::zeros(&Device::Cpu, DType::F32, &[rows, cols]).expect("memory for a benchmark's matrix")
}

/// The shortest of the calls within a time, in seconds: at least one.
fn best_of(during: Duration, mut run: impl FnMut()) -> f64 {
    let start = Instant::now();
    let mut best = f64::INFINITY;
    while best.is_infinite() || start.elapsed() < during {
        let t = Instant::now();
        run();
        best = best.min(t.elapsed().as_secs_f64());
    }
    best
}

/// The matrix in another type.
///
/// # Panics
/// When there is no memory for it.
pub fn typed(of: &Tensor, dtype: DType) -> Tensor {
    of.to(&Device::Cpu, dtype).expect("memory for a benchmark's matrix")
}

/// The median of some measurements; NaN of none.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
    }
}

/// [`peak_memory`](lora_train::peak_memory) in MiB.
pub fn peak_memory_mib() -> Option<f64> {
    Some(lora_train::peak_memory()? as f64 / (1 << 20) as f64)
}

/// Seconds of processor time that all threads of this process have taken so far; `None` where the system does not tell.
pub fn processor_seconds() -> Option<f64> {
    // User and system time, in hundredths.
    Some((stat(14)? + stat(15)?) / 100.0)
}

/// Pages that the system had to give to this process so far, none of them from a disk; `None` where it does not tell.
pub fn page_faults() -> Option<f64> {
    stat(10)
}

/// A field of /proc/self/stat by its number in the manual.
fn stat(field: usize) -> Option<f64> {
    let text = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The second is the program's name, which may hold anything.
    text.rsplit_once(')')?.1.split_whitespace().nth(field - 3)?.parse().ok()
}

/// The JSON object that a program prints as its last line.
///
/// # Errors
/// When it cannot be started, fails, or prints anything else there.
pub fn json_of(command: &mut Command) -> Result<Value> {
    let output = command.output().with_context(|| format!("could not run {command:?}"))?;
    let program = command.get_program().to_string_lossy().into_owned();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if !output.status.success() {
        bail!("{program} failed: {}", err.trim());
    }
    let last = out.lines().last().with_context(|| format!("{program} printed nothing"))?;
    serde_json::from_str(last).with_context(|| format!("{program} printed {last:?}, which is no JSON"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn the_system_tells_what_a_process_took() {
        let Some(before) = processor_seconds() else { return };
        let (start, faults) = (Instant::now(), page_faults().unwrap());
        let mut x = vec![0u8; 64 << 20];
        while start.elapsed() < Duration::from_millis(500) {
            x.iter_mut().for_each(|x| *x = std::hint::black_box(x.wrapping_add(1)));
        }
        let took = processor_seconds().unwrap() - before;
        // Other tests run beside it, and other processes.
        assert!(took > 0.0 && took < 1e4, "{took} s");
        assert!(page_faults().unwrap() > faults);
    }
}
