//! The report of a CUDA device: its kernels against cuBLASLt, against the device's own copies, and against each other.
//!
//! Inputs are independent normal numbers. Every measurement runs over several copies of its matrices in turn, which
//! together are larger than the second-level cache, after a warm-up; it is the median of at least 50 event timings, taken
//! alternately with those of what it is compared with. On an emulated device everything runs at toy sizes and nothing is
//! timed: that checks this program.

mod attention;
mod gemm;
mod lora;
mod memory;
pub mod model;
mod timing;

use std::{cell::Cell, process::Command, sync::Arc, time::Instant};

use anyhow::{Context, Result};
use lora_core::Tensor;
use lora_kernels::{DType, Device, axpby, cuda::Gpu};
use serde_json::{Value, json};

use crate::report::{Goal, Report, Row};

/// Bytes of all copies of a measurement's matrices: more than any second-level cache.
const ROTATED: usize = 256 << 20;

/// Where and how long is measured.
pub struct Bench {
    gpu: Arc<Gpu>,
    device: Device,
    /// Whether sizes are those of a test on an emulated device.
    toy: bool,
    /// Timings of each measurement.
    rounds: usize,
    /// From here on rows are left out.
    deadline: Option<Instant>,
    /// Normal numbers, of which all inputs are made.
    normals: Tensor,
    /// Where the next input begins among them.
    next: Cell<usize>,
}

/// A part of the report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Group {
    /// Matrix products.
    Gemm,
    /// Projections with LoRA.
    Lora,
    /// Kernels that memory bounds.
    Memory,
    /// Attention.
    Attention,
    /// Generating a token.
    Decode,
    /// Training steps of a whole model.
    Train,
}

impl Bench {
    /// Measures on `gpu`, `rounds` timings each, and leaves out what would begin after `deadline`. `toy` chooses sizes for
    /// an emulated device.
    ///
    /// # Errors
    /// No memory.
    pub fn new(gpu: Arc<Gpu>, toy: bool, rounds: usize, deadline: Option<Instant>) -> Result<Bench> {
        let device = Device::Cuda(gpu.clone());
        // A prime, so that the rows of no matrix repeat.
        let values = normals(if toy { 4093 } else { 16_777_213 });
        let normals = Tensor::from_slice(&device, &[1, values.len()], &values)?;
        Ok(Bench { gpu, device, toy, rounds, deadline, normals, next: Cell::new(0) })
    }

    /// Measures the rows of some groups, but not those that need a process of their own ([`model`]), and says on standard
    /// error which. A row that fails has a note in place of figures.
    pub fn run(&self, groups: &[Group], report: &mut Report) {
        for group in groups {
            let rows = match group {
                Group::Gemm => gemm::rows(self),
                Group::Lora => lora::rows(self),
                Group::Memory => memory::rows(self),
                Group::Attention => attention::rows(self),
                Group::Decode | Group::Train => continue,
            };
            for (row, measure) in rows {
                eprintln!("{}", row.what);
                report.rows.push(self.row(row, measure));
                self.gpu.release_idle_memory();
            }
            report.facts.insert(format!("after {group:?}").to_lowercase(), clocks().into());
        }
    }

    fn row(&self, row: Row, measure: Measure) -> Row {
        if self.deadline.is_some_and(|end| Instant::now() > end) {
            return row.noted("left out: the time was up");
        }
        measure(self, row.clone()).unwrap_or_else(|e| row.failed(&e))
    }

    /// What the device is, and the state that it is in.
    pub fn facts(&self, report: &mut Report) {
        let info = self.gpu.info();
        let (major, minor) = info.compute_capability;
        let facts: [(&str, Value); 5] = [
            ("device", info.name.clone().into()),
            ("compute capability", format!("{major}.{minor}").into()),
            ("multiprocessors", info.multiprocessors.into()),
            ("memory, MiB", (info.memory >> 20).into()),
            ("timings of each figure", json!(if self.toy { 0 } else { self.rounds })),
        ];
        report.facts.extend(facts.map(|(name, value)| (name.to_owned(), value)));
        report.facts.insert("driver".into(), nvidia_smi("driver_version").into());
        report.facts.insert("before".into(), clocks().into());
    }

    /// A matrix of normal numbers of deviation 1.
    fn normal(&self, dtype: DType, rows: usize, cols: usize) -> Result<Tensor> {
        let mut x = Tensor::empty(&self.device, dtype, &[rows, cols])?;
        let (n, all) = (rows * cols, self.normals.len());
        let (mut at, mut done) = (self.next.get(), 0);
        while done < n {
            let take = (all - at).min(n - done);
            let part = self.normals.mat().cols_in(at..at + take);
            axpby(1.0, part, 0.0, x.make_mut()?.reshape(1, n).cols_in(done..done + take))?;
            done += take;
            at = (at + take) % all;
        }
        self.next.set(at);
        Ok(x)
    }

    /// As many of them as [`Bench::copies`].
    fn normal_copies(&self, copies: usize, dtype: DType, rows: usize, cols: usize) -> Result<Vec<Tensor>> {
        (0..copies).map(|_| self.normal(dtype, rows, cols)).collect()
    }

    /// Matrices for results.
    fn results(&self, copies: usize, dtype: DType, rows: usize, cols: usize) -> Result<Vec<Tensor>> {
        (0..copies).map(|_| Ok(Tensor::zeros(&self.device, dtype, &[rows, cols])?)).collect()
    }

    /// How many copies of matrices of so many bytes are measured in turn.
    fn copies(&self, bytes: usize) -> usize {
        if self.toy { 2 } else { ROTATED.div_ceil(bytes).clamp(2, 64) }
    }

    /// One of two sizes.
    fn size<T>(&self, real: T, toy: T) -> T {
        if self.toy { toy } else { real }
    }

    /// Median seconds of a call of each of `ways` ways to do something; see [`timing::medians`].
    fn medians(
        &self,
        ways: usize,
        run: &mut dyn FnMut(usize, usize) -> Result<()>,
    ) -> Vec<std::result::Result<Option<f64>, String>> {
        timing::medians(&|work| self.gpu.time(|| work().map_err(Failed)).map_err(|e| e.0), ways, self.rounds, run)
    }
}

/// The error of a measured call, whichever crate it comes from.
struct Failed(anyhow::Error);

impl From<lora_kernels::Error> for Failed {
    fn from(e: lora_kernels::Error) -> Failed {
        Failed(e.into())
    }
}

/// Fills in the figures of a row.
type Measure = Box<dyn FnOnce(&Bench, Row) -> Result<Row>>;
/// The rows of a group.
type Rows = Vec<(Row, Measure)>;

/// Ours over a reference that must not be slower.
const fn goal(at_least: f64, aim: f64) -> Option<Goal> {
    Some(Goal { at_least, aim })
}

/// The figure of a way that has to work.
fn needed(way: &std::result::Result<Option<f64>, String>) -> Result<Option<f64>> {
    way.clone().map_err(anyhow::Error::msg)
}

/// Independent normal numbers by Box and Muller's method, always the same.
fn normals(n: usize) -> Vec<f32> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    // SplitMix64, in (0, 1].
    let mut uniform = move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (((z ^ (z >> 31)) >> 40) + 1) as f32 / (1u64 << 24) as f32
    };
    let mut values = Vec::with_capacity(n + 1);
    while values.len() < n {
        let (radius, angle) = ((-2.0 * uniform().ln()).sqrt(), uniform() * std::f32::consts::TAU);
        values.extend([radius * angle.cos(), radius * angle.sin()]);
    }
    values.truncate(n);
    values
}

fn nvidia_smi(query: &str) -> String {
    let output = Command::new("nvidia-smi").args([&format!("--query-gpu={query}"), "--format=csv,noheader"]).output();
    let text = output.context("no nvidia-smi").map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned());
    text.unwrap_or_else(|e| format!("{e}"))
}

/// Clocks, temperature and power as they are now.
fn clocks() -> String {
    nvidia_smi("clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu,power.draw,power.limit")
}

#[cfg(test)]
mod tests {
    use super::normals;

    #[test]
    fn inputs_are_normal() {
        let x = normals(100_001);
        let moment = |p: i32| x.iter().map(|x| f64::from(*x).powi(p)).sum::<f64>() / x.len() as f64;
        assert_eq!(x.len(), 100_001);
        for (p, want, tol) in [(1, 0.0, 0.01), (2, 1.0, 0.02), (3, 0.0, 0.05), (4, 3.0, 0.15)] {
            assert!((moment(p) - want).abs() < tol, "moment {p}: {}", moment(p));
        }
        let neighbours = x.windows(2).map(|w| f64::from(w[0] * w[1])).sum::<f64>() / x.len() as f64;
        assert!(neighbours.abs() < 0.02, "{neighbours}");
    }
}
