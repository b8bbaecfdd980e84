#![allow(unsafe_code)]

use gemm::Parallelism;

use crate::{
    Mat, MatMut, Result,
    mat::{HostMat, HostMut},
    real::{Real, dispatch},
};

/// General matrix product `C = α·A·B + β·C`, with A [m, k], B [k, n], C [m, n]; transposes are descriptors of A and B.
/// With β = 0 the old contents of C are not read.
///
/// Each element is summed in an order that depends only on the shapes: the result has the same bits for any number of
/// threads. Error: |ΔC| ≤ about k·ε·|α|·|A|·|B| elementwise, as for any summation of k products.
///
/// # Panics
/// When the shapes do not fit or the types differ.
pub fn gemm(alpha: f64, a: Mat, b: Mat, beta: f64, c: MatMut) -> Result<()> {
    assert_eq!((a.rows(), a.cols(), b.cols()), (c.rows(), b.rows(), c.cols()), "gemm: [m, k]·[k, n] into [m, n]");
    assert_eq!((a.dtype(), b.dtype()), (c.dtype(), c.dtype()), "gemm: one type");
    dispatch!("gemm", c.dtype(), T => {
        let threads = rayon::current_num_threads();
        // Below about a microsecond of work per thread, waking the others costs more than it gives.
        let work = c.rows() * c.cols() * a.cols();
        let par = if threads > 1 && work > 1 << 16 { Parallelism::Rayon(threads) } else { Parallelism::None };
        run::<T>(alpha, a.host(), b.host(), beta, c.host(), par);
        Ok(())
    })
}

/// As [`gemm`], on the calling thread alone: for tasks that already run side by side.
pub(crate) fn serial<T: Real>(alpha: f64, a: HostMat<T>, b: HostMat<T>, beta: f64, c: HostMut<T>) {
    run(alpha, a, b, beta, c, Parallelism::None);
}

fn run<T: Real>(alpha: f64, a: HostMat<T>, b: HostMat<T>, beta: f64, mut c: HostMut<T>, par: Parallelism) {
    let (m, k) = if a.transposed { (a.cols, a.rows) } else { (a.rows, a.cols) };
    let (k2, n) = if b.transposed { (b.cols, b.rows) } else { (b.rows, b.cols) };
    assert_eq!((m, k, n), (c.rows, k2, c.cols), "gemm: [m, k]·[k, n] into [m, n]");
    let stride = |x: &HostMat<T>| if x.transposed { (x.ld as isize, 1) } else { (1, x.ld as isize) };
    let ((a_cs, a_rs), (b_cs, b_rs)) = (stride(&a), stride(&b));
    // SAFETY: the three matrices lie inside live memory with exactly these shapes and strides (`Mat` and `MatMut` check
    // it when they are made), and C, uniquely borrowed, overlaps neither A nor B.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.ptr(),
            1,
            c.ld as isize,
            beta != 0.0,
            a.ptr(),
            a_cs,
            a_rs,
            b.ptr(),
            b_cs,
            b_rs,
            T::of(beta),
            T::of(alpha),
            false,
            false,
            false,
            par,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Buffer, Device};
    use ndarray::{Array2, ArrayView2, s};
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    fn random(rng: &mut ChaCha8Rng, m: usize, n: usize) -> Array2<f64> {
        Array2::from_shape_fn((m, n), |_| rng.random_range(-1.0..1.0))
    }

    /// One product: shapes, transposes and scalars in f32, against plain loops in f64.
    fn check(rng: &mut ChaCha8Rng, (m, k, n): (usize, usize, usize), ta: bool, tb: bool, alpha: f64, beta: f64) {
        let shape = |r, c, t| if t { (c, r) } else { (r, c) };
        let (am, an) = shape(m, k, ta);
        let (bm, bn) = shape(k, n, tb);
        // Two columns more than needed, so that the leading dimension differs from the width.
        let (a, b, mut c) = (random(rng, am, an + 2), random(rng, bm, bn + 2), random(rng, m, n + 2));
        let of = |x: &Array2<f64>| x.iter().map(|&v| v as f32).collect::<Vec<_>>();
        let (fa, fb) =
            (Buffer::from_slice(&Device::Cpu, &of(&a)).unwrap(), Buffer::from_slice(&Device::Cpu, &of(&b)).unwrap());
        if beta == 0.0 {
            c.fill(f64::NAN);
        }
        let mut fc = Buffer::from_slice(&Device::Cpu, &of(&c)).unwrap();
        let (ma, mb) = (Mat::new(&fa, 0, am, an + 2).cols_in(1..an + 1), Mat::new(&fb, 0, bm, bn + 2).cols_in(0..bn));
        gemm(alpha, ma.t_if(ta), mb.t_if(tb), beta, MatMut::new(&mut fc, 0, m, n + 2).cols_in(2..n + 2)).unwrap();

        let round = |x: &Array2<f64>| x.mapv(|v| f64::from(v as f32));
        let (a, b, c) = (round(&a), round(&b), round(&c));
        let (a, b) = (a.slice(s![.., 1..an + 1]), b.slice(s![.., 0..bn]));
        let t = |x: ArrayView2<f64>, t| if t { x.reversed_axes().to_owned() } else { x.to_owned() };
        let (a, b) = (t(a, ta), t(b, tb));
        let got = fc.to_vec::<f32>(0..m * (n + 2)).unwrap();
        for i in 0..m {
            for j in 0..n {
                let sum: f64 = (0..k).map(|p| a[[i, p]] * b[[p, j]]).sum();
                let want = alpha * sum + if beta == 0.0 { 0.0 } else { beta * c[[i, j + 2]] };
                let got = f64::from(got[i * (n + 2) + j + 2]);
                assert!(
                    (got - want).abs() <= 1e-6 * (k as f64 + 4.0),
                    "{m}×{k}×{n} ta {ta} tb {tb} α {alpha} β {beta} at {i},{j}: {got} {want}"
                );
            }
            // The columns beside the result stay as they were (NaN counts as itself).
            for j in 0..2 {
                let (got, was) = (got[i * (n + 2) + j], c[[i, j]] as f32);
                assert!(got.to_bits() == was.to_bits() || (got.is_nan() && was.is_nan()), "a neighbour was written");
            }
        }
    }

    #[test]
    fn equals_plain_loops_in_all_transposes_sizes_and_scalars() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let shapes =
            [(1, 1, 1), (1, 7, 33), (33, 1, 8), (8, 31, 1), (129, 64, 31), (64, 300, 65), (0, 3, 2), (3, 0, 2)];
        for shape in shapes {
            for (ta, tb) in [(false, false), (false, true), (true, false), (true, true)] {
                for (alpha, beta) in [(1.0, 0.0), (0.5, 1.0), (-2.0, 0.25)] {
                    check(&mut rng, shape, ta, tb, alpha, beta);
                }
            }
        }
    }

    #[test]
    fn same_bits_for_any_number_of_threads() {
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        for (m, k, n) in [
            (400, 768, 2304),
            (397, 768, 8),
            (397, 8, 768),
            (8, 400, 768),
            (1, 768, 2304),
            (256, 768, 5003),
            (768, 401, 2304),
        ] {
            let a: Vec<f32> = (0..m * k).map(|_| rng.random_range(-1.0..1.0)).collect();
            let b: Vec<f32> = (0..k * n).map(|_| rng.random_range(-1.0..1.0)).collect();
            let (fa, fb) =
                (Buffer::from_slice(&Device::Cpu, &a).unwrap(), Buffer::from_slice(&Device::Cpu, &b).unwrap());
            let run = |threads: usize, tb: bool| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let mut fc = Buffer::empty(&Device::Cpu, crate::DType::F32, m * n).unwrap();
                let mb = if tb { Mat::new(&fb, 0, n, k).t() } else { Mat::new(&fb, 0, k, n) };
                pool.install(|| gemm(1.0, Mat::new(&fa, 0, m, k), mb, 0.0, MatMut::new(&mut fc, 0, m, n)).unwrap());
                fc.to_vec::<f32>(0..m * n).unwrap().iter().map(|v| v.to_bits()).collect::<Vec<_>>()
            };
            for tb in [false, true] {
                let one = run(1, tb);
                for threads in [2, 3, 5] {
                    assert!(one == run(threads, tb), "{m}×{k}×{n}, transposed {tb}: {threads} threads change the bits");
                }
            }
        }
    }
}
