//! What the kernels' tests share: matrices with gaps, comparisons, finite differences, thread pools.

use half::{bf16, f16};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::{Acc, Buffer, DType, Device, Mat, MatMut};

pub(crate) const FLOATS: [DType; 2] = [DType::F32, DType::F64];

/// Sizes around the widths of vectors and unrolled loops, and the width of a real model.
pub(crate) const SIZES: [usize; 8] = [1, 7, 8, 31, 33, 129, 768, 1100];

/// A matrix of a test: columns of a wider one, whose others hold NaN and must keep it.
pub(crate) struct Padded {
    buf: Buffer,
    rows: usize,
    cols: usize,
    pad: usize,
}

impl Padded {
    /// `pad` columns more than `cols`, one of them on the left.
    pub(crate) fn new(dtype: DType, rows: usize, cols: usize, pad: usize, data: &[f64]) -> Padded {
        Padded::on(&Device::Cpu, dtype, rows, cols, pad, data)
    }

    /// The same on a given device.
    pub(crate) fn on(device: &Device, dtype: DType, rows: usize, cols: usize, pad: usize, data: &[f64]) -> Padded {
        assert_eq!(data.len(), rows * cols);
        let mut wide = vec![f64::NAN; rows * (cols + pad)];
        for r in 0..rows {
            wide[r * (cols + pad) + pad.min(1)..][..cols].copy_from_slice(&data[r * cols..][..cols]);
        }
        let buf = match dtype {
            DType::F32 => Buffer::from_slice(device, &wide.iter().map(|&v| v as f32).collect::<Vec<_>>()),
            DType::Bf16 => Buffer::from_slice(device, &wide.iter().map(|&v| bf16::from_f64(v)).collect::<Vec<_>>()),
            DType::F16 => Buffer::from_slice(device, &wide.iter().map(|&v| f16::from_f64(v)).collect::<Vec<_>>()),
            _ => Buffer::from_slice(device, &wide),
        };
        Padded { buf: buf.unwrap(), rows, cols, pad }
    }

    /// All NaN: a destination that may only be written.
    pub(crate) fn poison(dtype: DType, rows: usize, cols: usize, pad: usize) -> Padded {
        Padded::new(dtype, rows, cols, pad, &vec![f64::NAN; rows * cols])
    }

    /// The destination of a test of β: NaN for 0, the given numbers else.
    pub(crate) fn target(dtype: DType, rows: usize, cols: usize, pad: usize, beta: f64, old: &[f64]) -> Padded {
        if beta == 0.0 { Padded::poison(dtype, rows, cols, pad) } else { Padded::new(dtype, rows, cols, pad, old) }
    }

    pub(crate) fn mat(&self) -> Mat<'_> {
        let left = self.pad.min(1);
        Mat::new(&self.buf, 0, self.rows, self.cols + self.pad).cols_in(left..left + self.cols)
    }

    pub(crate) fn mat_mut(&mut self) -> MatMut<'_> {
        let left = self.pad.min(1);
        MatMut::new(&mut self.buf, 0, self.rows, self.cols + self.pad).cols_in(left..left + self.cols)
    }

    pub(crate) fn acc(&mut self, beta: f64) -> Acc<'_> {
        Acc { to: self.mat_mut(), beta }
    }

    /// The elements, after a look at the gaps.
    pub(crate) fn get(&self) -> Vec<f64> {
        let wide: Vec<f64> = match self.buf.dtype() {
            DType::F32 => self.buf.to_vec::<f32>(0..self.buf.len()).unwrap().into_iter().map(f64::from).collect(),
            DType::Bf16 => self.buf.to_vec::<bf16>(0..self.buf.len()).unwrap().into_iter().map(f64::from).collect(),
            DType::F16 => self.buf.to_vec::<f16>(0..self.buf.len()).unwrap().into_iter().map(f64::from).collect(),
            _ => self.buf.to_vec(0..self.buf.len()).unwrap(),
        };
        let (ld, left) = (self.cols + self.pad, self.pad.min(1));
        let gap = |i: usize| !(left..left + self.cols).contains(&(i % ld));
        assert!(wide.iter().enumerate().all(|(i, v)| !gap(i) || v.is_nan()), "a neighbouring column was written");
        wide.into_iter().enumerate().filter(|&(i, _)| !gap(i)).map(|(_, v)| v).collect()
    }
}

/// A buffer of token or row numbers.
pub(crate) fn ids(ids: &[u32]) -> Buffer {
    Buffer::from_slice(&Device::Cpu, ids).unwrap()
}

/// `n` numbers in ±scale that f32 holds exactly.
pub(crate) fn random(seed: u64, n: usize, scale: f32) -> Vec<f64> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..n).map(|_| f64::from(rng.random_range(-scale..scale))).collect()
}

/// The numbers as `dtype` holds them.
pub(crate) fn rounded(dtype: DType, data: &[f64]) -> Vec<f64> {
    let round = |&v: &f64| match dtype {
        DType::F32 => f64::from(v as f32),
        DType::Bf16 => bf16::from_f64(v).to_f64(),
        DType::F16 => f16::from_f64(v).to_f64(),
        _ => v,
    };
    data.iter().map(round).collect()
}

/// |got − want| ≤ tol·(1 + |want|) everywhere; NaN never.
pub(crate) fn close(what: &str, got: &[f64], want: &[f64], tol: f64) {
    assert_eq!(got.len(), want.len(), "{what}: lengths");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((g - w).abs() <= tol * (1.0 + w.abs()), "{what} at {i}: {g}, expected {w}");
    }
}

/// `f32` for single precision, rounding errors for double.
pub(crate) fn tol(dtype: DType, f32: f64) -> f64 {
    if dtype == DType::F32 { f32 } else { 1e-12 }
}

/// `result + β·old`, as [`Acc`] says it.
pub(crate) fn accumulated(result: &[f64], beta: f64, old: &[f64]) -> Vec<f64> {
    result.iter().zip(old).map(|(r, o)| if beta == 0.0 { *r } else { r + beta * o }).collect()
}

/// ∂f/∂x by central differences.
pub(crate) fn slopes(x: &[f64], f: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    let mut x = x.to_vec();
    (0..x.len())
        .map(|i| {
            let (was, h) = (x[i], 1e-5);
            x[i] = was + h;
            let up = f(&x);
            x[i] = was - h;
            let down = f(&x);
            x[i] = was;
            (up - down) / (2.0 * h)
        })
        .collect()
}

pub(crate) fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Runs `f` on 1, 2 and 3 threads; all results have the same bits.
pub(crate) fn same_bits(what: &str, f: impl Fn() -> Vec<f64> + Sync) {
    let on = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| f().into_iter().map(f64::to_bits).collect::<Vec<_>>())
    };
    let one = on(1);
    for threads in [2, 3] {
        assert!(one == on(threads), "{what}: {threads} threads change the bits");
    }
}
