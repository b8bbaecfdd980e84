#![allow(unsafe_code)]

mod bf16;
#[cfg(target_arch = "x86_64")]
mod blocked;
#[cfg(feature = "cuda")]
mod cublaslt;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
#[cfg(feature = "cuda")]
pub(crate) mod engines;
mod few;
#[cfg(feature = "cuda")]
pub(crate) mod plan;
#[cfg(feature = "cuda")]
pub(crate) mod wgmma;

use std::ops::Range;

use gemm::Parallelism;

use crate::{
    Activation, Buffer, DType, Mat, MatMut, Result, activation, add_bias, axpby,
    mat::{HostMat, HostMut},
    real::{Real, dispatch},
};

/// General matrix product `C = α·A·B + β·C`, with A [m, k], B [k, n], C [m, n]; transposes are descriptors of A and B.
/// With β = 0 the old contents of C are not read.
///
/// C has the type of A and B, or their [accumulator's](crate::DType::accumulator): sums are taken in that one anyway. On the
/// CPU C is the accumulator's, and of A and B one may be bf16 and the other f32, which is then rounded to bf16 (each of its
/// elements to within 2⁻⁹ of itself).
///
/// Each element is summed in an order that depends only on the shapes: the result has the same bits for any number of
/// threads. Error: |ΔC| ≤ about k·ε·|α|·|A|·|B| elementwise, as for any summation of k products.
///
/// # Panics
/// When the shapes do not fit or the types differ.
pub fn gemm(alpha: f64, a: Mat, b: Mat, beta: f64, c: MatMut) -> Result<()> {
    gemm_with(alpha, a, b, beta, c, &Epilogue::default())
}

/// The widest vector instructions of this processor that products on the CPU use: `AVX-512 BF16`, `AVX-512`, `AVX2`, or
/// else the name of its architecture.
///
/// With the first of them products of many rows, in f32 and bf16, are this crate's own; elsewhere they are those of the crate
/// `gemm`, in f32 alone.
pub fn cpu_instructions() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    match () {
        () if blocked::available() => return "AVX-512 BF16",
        () if few::by_avx512() => return "AVX-512",
        () if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") => return "AVX2",
        () => {}
    }
    std::env::consts::ARCH
}

/// What happens to a product on its way into C.
#[derive(Clone, Copy, Default)]
pub struct Epilogue<'a> {
    /// Added to every row: [1, n], of the type of A and B or their accumulator's.
    pub bias: Option<Mat<'a>>,
    /// Applied to every element, after the bias.
    pub activation: Option<Activation>,
    /// Added at the end: [m, n], of C's type.
    pub residual: Option<Mat<'a>>,
}

/// `C = act(α·A·B + β·C + bias) + residual`: [`gemm()`] and what often follows it. On CUDA devices one kernel, which
/// rounds to C's type once.
///
/// # Panics
/// When the shapes do not fit or the types differ.
pub fn gemm_with(alpha: f64, a: Mat, b: Mat, beta: f64, mut c: MatMut, epilogue: &Epilogue) -> Result<()> {
    assert_eq!((a.rows(), a.cols(), b.cols()), (c.rows(), b.rows(), c.cols()), "gemm: [m, k]·[k, n] into [m, n]");
    check_types(a, b, &c);
    let Epilogue { bias, activation: kind, residual } = *epilogue;
    if let Some(bias) = bias {
        assert_eq!((bias.rows(), bias.cols()), (1, c.cols()), "gemm: a bias is [1, n]");
        assert!([a.dtype(), a.dtype().accumulator()].contains(&bias.dtype()), "gemm: a bias of another type");
    }
    if let Some(residual) = residual {
        assert_eq!((residual.rows(), residual.cols()), (c.rows(), c.cols()), "gemm: a residual is as large as C");
        assert_eq!(residual.dtype(), c.dtype(), "gemm: a residual of another type");
    }
    #[cfg(feature = "cuda")]
    if let Some(gpu) = c.gpu() {
        return cuda::gemm(gpu, &cuda::Problem::single(alpha, a, b, beta, c, *epilogue));
    }
    product(alpha, a, b, beta, bias, c.reborrow())?;
    if let Some(kind) = kind {
        let (rows, cols) = (c.rows(), c.cols());
        let mut x = Buffer::empty(c.device(), c.dtype(), rows * cols)?;
        axpby(1.0, c.as_mat(), 0.0, MatMut::new(&mut x, 0, rows, cols))?;
        activation(kind, Mat::new(&x, 0, rows, cols), c.reborrow())?;
    }
    match residual {
        Some(residual) => axpby(1.0, residual, 1.0, c),
        None => Ok(()),
    }
}

/// How the matrices of a batch lie in one matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stack {
    /// One below the other: blocks of rows.
    Rows,
    /// Side by side: blocks of columns.
    Cols,
    /// One matrix, used by every product.
    Shared,
}

impl Stack {
    /// The i-th of `count` matrices.
    fn pick(self, x: Mat, i: usize, count: usize) -> Mat {
        match self {
            Stack::Rows => x.rows_in(part(x.rows(), i, count)),
            Stack::Cols => x.cols_in(part(x.cols(), i, count)),
            Stack::Shared => x,
        }
    }

    fn pick_mut(self, x: MatMut, i: usize, count: usize) -> MatMut {
        let (rows, cols) = (x.rows(), x.cols());
        match self {
            Stack::Rows => x.rows_in(part(rows, i, count)),
            Stack::Cols => x.cols_in(part(cols, i, count)),
            Stack::Shared => panic!("gemm_batched: every product needs a C of its own"),
        }
    }
}

fn part(n: usize, i: usize, count: usize) -> Range<usize> {
    assert!(n.is_multiple_of(count), "gemm_batched: {n} rows or columns are not {count} equal blocks");
    i * (n / count)..(i + 1) * (n / count)
}

/// A batch of products of the same shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Batch {
    /// How many.
    pub count: usize,
    /// Where the A's are.
    pub a: Stack,
    /// Where the B's are.
    pub b: Stack,
    /// Where the C's are; not [`Stack::Shared`].
    pub c: Stack,
}

/// `Cᵢ = α·Aᵢ·Bᵢ + β·Cᵢ` for every i of a batch, each as [`gemm()`]. The three matrices hold all of the batch: with
/// [`Stack::Rows`] A is [count·m, k], with [`Stack::Cols`] [m, count·k], with [`Stack::Shared`] [m, k].
///
/// # Panics
/// When the shapes do not fit, the types differ, a matrix does not divide into equal blocks, or C is shared.
pub fn gemm_batched(alpha: f64, a: Mat, b: Mat, beta: f64, mut c: MatMut, batch: &Batch) -> Result<()> {
    check_types(a, b, &c);
    let Batch { count, .. } = *batch;
    if count == 0 {
        return Ok(());
    }
    let (first_a, first_b) = (batch.a.pick(a, 0, count), batch.b.pick(b, 0, count));
    let first_c = batch.c.pick_mut(c.reborrow(), 0, count);
    assert_eq!(
        (first_a.rows(), first_a.cols(), first_b.cols()),
        (first_c.rows(), first_b.rows(), first_c.cols()),
        "gemm_batched: [m, k]·[k, n] into [m, n]"
    );
    #[cfg(feature = "cuda")]
    if let Some(gpu) = c.gpu() {
        return cuda::gemm(gpu, &cuda::Problem::batched(alpha, a, b, beta, c, batch));
    }
    for i in 0..count {
        let c = batch.c.pick_mut(c.reborrow(), i, count);
        product(alpha, batch.a.pick(a, i, count), batch.b.pick(b, i, count), beta, None, c)?;
    }
    Ok(())
}

fn check_types(a: Mat, b: Mat, c: &MatMut) {
    let mixed = c.device().is_cpu() && a.dtype().accumulator() == b.dtype().accumulator();
    assert!(a.dtype() == b.dtype() || mixed, "gemm: A and B of different types");
    assert!([a.dtype(), a.dtype().accumulator()].contains(&c.dtype()), "gemm: C of another type than A and B");
}

/// `C = α·A·B + β·C + bias` on the CPU.
fn product(alpha: f64, a: Mat, b: Mat, beta: f64, bias: Option<Mat>, mut c: MatMut) -> Result<()> {
    let (m, k, n) = (a.rows(), a.cols(), b.cols());
    let floats = (a.dtype(), c.dtype()) == (DType::F32, DType::F32);
    let few = floats && few::fits(m, k, n);
    let halves = [a.dtype(), b.dtype()].iter().any(|t| t.size() == 2);
    let to = c.reborrow();
    match b.dtype() {
        DType::F32 if few => few::product(alpha, a.host(), b.host::<f32>(), beta, to.host())?,
        DType::Bf16 if few => few::product(alpha, a.host(), b.host::<half::bf16>(), beta, to.host())?,
        DType::F32 if floats && few::fits_narrow(m, k, n) => few::narrow(alpha, a.host(), b.host(), beta, to.host())?,
        // A result of few columns would leave most lanes of a vector idle there.
        #[cfg(target_arch = "x86_64")]
        _ if blocked::available() && to.dtype() == DType::F32 && (halves || n > 16) => {
            let bias = bias.map(|bias| bias.host().row(0));
            let form = blocked::Form { alpha: alpha as f32, beta: beta as f32, bias };
            return match halves {
                true => blocked::bf16_product(form, bf16::Operand::of(a)?, bf16::Operand::of(b)?, to.host()),
                false => blocked::f32_product(form, a.host(), b.host(), to.host()),
            };
        }
        _ if halves => bf16::product(alpha, bf16::Operand::of(a)?, bf16::Operand::of(b)?, beta, to)?,
        _ => dispatch!("gemm", a.dtype(), T => {
            parallel::<T>(alpha, a.host(), b.host(), beta, to.host());
            Ok(())
        })?,
    }
    bias.map_or(Ok(()), |bias| add_bias(bias, c))
}

/// As [`gemm`], on the threads of rayon's pool.
fn parallel<T: Real>(alpha: f64, a: HostMat<T>, b: HostMat<T>, beta: f64, c: HostMut<T>) {
    let threads = rayon::current_num_threads();
    // Below about a microsecond of work per thread, waking the others costs more than it gives.
    let work = c.rows * c.cols * if a.transposed { a.rows } else { a.cols };
    let par = if threads > 1 && work > 1 << 16 { Parallelism::Rayon(threads) } else { Parallelism::None };
    run::<T>(alpha, a, b, beta, c, par);
}

/// What of a product is wanted, where query i sees the keys up to `first + i`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// All of it.
    All,
    /// The rows of C are queries and its columns keys: those that are not seen may become anything.
    Seen { first: usize },
    /// The rows of A are queries and its columns keys: where they are not seen, A is zero.
    OfQueries { first: usize },
    /// The rows of A are keys and its columns queries: where they are not seen, A is zero.
    OfKeys { first: usize },
}

impl Part {
    /// What of `ks`, a step along the inner dimension, the block `rows` × `cols` of C needs; `None` where it is not wanted.
    #[cfg(any(target_arch = "x86_64", test))]
    fn of(self, rows: &Range<usize>, cols: &Range<usize>, ks: &Range<usize>) -> Option<Range<usize>> {
        match self {
            Part::All => Some(ks.clone()),
            Part::Seen { first } => (cols.start < first + rows.end).then(|| ks.clone()),
            Part::OfQueries { first } => Some(ks.start..(first + rows.end).clamp(ks.start, ks.end)),
            Part::OfKeys { first } => Some(rows.start.saturating_sub(first).clamp(ks.start, ks.end)..ks.end),
        }
    }
}

/// Products on the calling thread alone, for tasks that already run side by side.
pub(crate) trait Serial: Sized {
    /// As [`gemm`], as far as `part` wants it.
    fn product(alpha: f64, a: HostMat<Self>, b: HostMat<Self>, beta: f64, c: HostMut<Self>, part: Part);
}

impl Serial for f32 {
    fn product(alpha: f64, a: HostMat<f32>, b: HostMat<f32>, beta: f64, c: HostMut<f32>, part: Part) {
        #[cfg(target_arch = "x86_64")]
        if blocked::available() {
            return blocked::direct(alpha, a, b, beta, c, part);
        }
        let _ = part;
        run(alpha, a, b, beta, c, Parallelism::None);
    }
}

impl Serial for f64 {
    fn product(alpha: f64, a: HostMat<f64>, b: HostMat<f64>, beta: f64, c: HostMut<f64>, _: Part) {
        run(alpha, a, b, beta, c, Parallelism::None);
    }
}

/// [`Serial::product`].
pub(crate) fn serial<T: Real>(alpha: f64, a: HostMat<T>, b: HostMat<T>, beta: f64, c: HostMut<T>, part: Part) {
    T::product(alpha, a, b, beta, c, part);
}

/// The sizes m, k and n of a product.
fn sizes<T: Real>(a: &HostMat<T>, b: &HostMat<T>, c: &HostMut<T>) -> [usize; 3] {
    let (m, k) = if a.transposed { (a.cols, a.rows) } else { (a.rows, a.cols) };
    let (k2, n) = if b.transposed { (b.cols, b.rows) } else { (b.rows, b.cols) };
    assert_eq!((m, k, n), (c.rows, k2, c.cols), "gemm: [m, k]·[k, n] into [m, n]");
    [m, k, n]
}

fn run<T: Real>(alpha: f64, a: HostMat<T>, b: HostMat<T>, beta: f64, mut c: HostMut<T>, par: Parallelism) {
    let [m, k, n] = sizes(&a, &b, &c);
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
        let shapes = [
            (1, 1, 1),
            (1, 7, 33),
            (33, 1, 8),
            (8, 31, 1),
            (129, 64, 31),
            (64, 300, 65),
            (250, 193, 40),
            (17, 1000, 130),
            // So few columns that the transpose is computed.
            (300, 193, 5),
            (64, 1000, 16),
            (4200, 9, 3),
        ];
        for shape in shapes.into_iter().chain([(0, 3, 2), (3, 0, 2)]) {
            for (ta, tb) in [(false, false), (false, true), (true, false), (true, true)] {
                for (alpha, beta) in [(1.0, 0.0), (0.5, 1.0), (-2.0, 0.25)] {
                    check(&mut rng, shape, ta, tb, alpha, beta);
                }
            }
        }
    }

    #[test]
    fn same_bits_for_any_number_of_threads_and_however_rows_are_cut() {
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        let mut numbers = |dtype: DType, n: usize| {
            let x: Vec<f32> = (0..n).map(|_| rng.random_range(-1.0..1.0)).collect();
            match dtype {
                DType::F32 => Buffer::from_slice(&Device::Cpu, &x),
                _ => Buffer::from_slice(&Device::Cpu, &x.iter().map(|&v| half::bf16::from_f32(v)).collect::<Vec<_>>()),
            }
            .unwrap()
        };
        // And how many rows a part has: not so few that `few` takes it, whose sums have another order.
        let shapes = [
            (400, 768, 2304, 20),
            // Where no products are made for few columns, their sums have an order that depends on all rows.
            (397, 768, 8, if few::fits_narrow(62, 768, 8) { 67 } else { 397 }),
            (397, 8, 768, 61),
            (8, 400, 768, 8),
            (1, 768, 2304, 1),
            (256, 768, 5003, 100),
            (768, 401, 2304, 96),
            (37, 768, 520, 19),
        ];
        for ((m, k, n, part), dtype) in shapes.into_iter().flat_map(|s| [DType::F32, DType::Bf16].map(|t| (s, t))) {
            let (a, b) = (numbers(DType::F32, m * k), numbers(dtype, k * n));
            let run = |threads: usize, rows: usize, ta: bool, tb: bool| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let mut c = Buffer::empty(&Device::Cpu, DType::F32, m * n).unwrap();
                let mb = if tb { Mat::new(&b, 0, n, k).t() } else { Mat::new(&b, 0, k, n) };
                let ma = if ta { Mat::new(&a, 0, k, m).t() } else { Mat::new(&a, 0, m, k) };
                for first in (0..m).step_by(rows) {
                    let end = (first + rows).min(m);
                    let to = MatMut::new(&mut c, first * n, end - first, n);
                    pool.install(|| gemm(1.0, ma.rows_in(first..end), mb, 0.0, to)).unwrap();
                }
                c.to_vec::<f32>(0..m * n).unwrap().iter().map(|v| v.to_bits()).collect::<Vec<_>>()
            };
            for (ta, tb) in [(false, false), (false, true), (true, false)] {
                let one = run(1, m, ta, tb);
                for (threads, rows) in [(2, m), (3, m), (5, m), (2, part)] {
                    assert!(
                        one == run(threads, rows, ta, tb),
                        "{m}×{k}×{n} in {dtype:?}, transposed {ta} {tb}: {threads} threads, {rows} rows"
                    );
                }
            }
        }
    }

    fn filled(rng: &mut ChaCha8Rng, n: usize) -> Buffer {
        let x: Vec<f64> = (0..n).map(|_| rng.random_range(-1.0..1.0)).collect();
        Buffer::from_slice(&Device::Cpu, &x).unwrap()
    }

    #[test]
    fn an_epilogue_is_bias_then_activation_then_residual() {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let (m, n, k) = (5, 7, 4);
        let [a, b, c, bias, residual] = [m * k, k * n, m * n, n, m * n].map(|len| filled(&mut rng, len));
        let (a, b) = (Mat::new(&a, 0, m, k), Mat::new(&b, 0, k, n));
        let values = |x: &Buffer| x.to_vec::<f64>(0..x.len()).unwrap();
        let mut plain = c.try_clone(0..m * n).unwrap();
        gemm(0.5, a, b, 2.0, MatMut::new(&mut plain, 0, m, n)).unwrap();
        let (plain, added, last) = (values(&plain), values(&bias), values(&residual));
        for (with_bias, with_residual) in [(true, false), (false, true), (true, true), (false, false)] {
            let mut got = c.try_clone(0..m * n).unwrap();
            let epilogue = Epilogue {
                bias: with_bias.then(|| Mat::new(&bias, 0, 1, n)),
                activation: Some(Activation::Relu),
                residual: with_residual.then(|| Mat::new(&residual, 0, m, n)),
            };
            gemm_with(0.5, a, b, 2.0, MatMut::new(&mut got, 0, m, n), &epilogue).unwrap();
            for (i, got) in values(&got).into_iter().enumerate() {
                let x = plain[i] + if with_bias { added[i % n] } else { 0.0 };
                assert_eq!(got, x.max(0.0) + if with_residual { last[i] } else { 0.0 }, "at {i}");
            }
        }
    }

    /// Wherever it is added: in the product's last step along k, which is one of several here, or after it.
    #[test]
    fn a_bias_changes_no_bit_of_the_product() {
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        for (m, k, n) in [(1, 3, 40), (5, 900, 70), (13, 190, 17), (250, 400, 45), (3, 0, 20), (20, 7, 9)] {
            let mut f32s = |len: usize| -> Vec<f32> { (0..len).map(|_| rng.random_range(-1.0..1.0)).collect() };
            let (a, b, c, bias) = (f32s(m * k), f32s(k * n), f32s(m * n), f32s(n));
            let on = |x: &[f32]| Buffer::from_slice(&Device::Cpu, x).unwrap();
            let halves: Vec<half::bf16> = b.iter().map(|&x| half::bf16::from_f32(x)).collect();
            let a = on(&a);
            for b in [on(&b), Buffer::from_slice(&Device::Cpu, &halves).unwrap()] {
                let (a, b) = (Mat::new(&a, 0, m, k), Mat::new(&b, 0, k, n));
                let (bias, mut plain, mut got) = (on(&bias), on(&c), on(&c));
                let bias = Mat::new(&bias, 0, 1, n);
                gemm(0.5, a, b, 2.0, MatMut::new(&mut plain, 0, m, n)).unwrap();
                add_bias(bias, MatMut::new(&mut plain, 0, m, n)).unwrap();
                let epilogue = Epilogue { bias: Some(bias), ..Epilogue::default() };
                gemm_with(0.5, a, b, 2.0, MatMut::new(&mut got, 0, m, n), &epilogue).unwrap();
                let [got, plain] = [got, plain].map(|x| x.to_vec::<f32>(0..m * n).unwrap());
                assert_eq!(got, plain, "{m}×{k}×{n} {:?}", b.dtype());
            }
        }
    }

    #[test]
    fn a_batch_is_its_products() {
        let mut rng = ChaCha8Rng::seed_from_u64(4);
        let (count, m, n, k) = (3, 4, 5, 6);
        let (a, b) = (filled(&mut rng, count * m * k), filled(&mut rng, count * k * n));
        let mut c = Buffer::zeros(&Device::Cpu, a.dtype(), count * m * n).unwrap();
        // A's below each other; B's side by side, seen through a transpose; C's side by side.
        let (x, y) = (Mat::new(&a, 0, count * m, k), Mat::new(&b, 0, count * n, k).t());
        let batch = Batch { count, a: Stack::Rows, b: Stack::Cols, c: Stack::Cols };
        gemm_batched(1.0, x, y, 0.0, MatMut::new(&mut c, 0, m, count * n), &batch).unwrap();
        let c = c.to_vec::<f64>(0..count * m * n).unwrap();
        for i in 0..count {
            let mut one = Buffer::zeros(&Device::Cpu, a.dtype(), m * n).unwrap();
            let (x, y) = (Mat::new(&a, i * m * k, m, k), Mat::new(&b, i * n * k, n, k).t());
            gemm(1.0, x, y, 0.0, MatMut::new(&mut one, 0, m, n)).unwrap();
            for (j, want) in one.to_vec::<f64>(0..m * n).unwrap().into_iter().enumerate() {
                assert_eq!(c[j / n * count * n + i * n + j % n], want, "product {i} at {j}");
            }
        }
    }

    #[test]
    #[should_panic(expected = "every product needs a C of its own")]
    fn a_shared_result_is_refused() {
        let a = Buffer::zeros(&Device::Cpu, crate::DType::F32, 4).unwrap();
        let mut c = Buffer::zeros(&Device::Cpu, crate::DType::F32, 4).unwrap();
        let batch = Batch { count: 2, a: Stack::Shared, b: Stack::Shared, c: Stack::Shared };
        let (a, c) = (Mat::new(&a, 0, 2, 2), MatMut::new(&mut c, 0, 2, 2));
        gemm_batched(1.0, a, a, 0.0, c, &batch).unwrap();
    }

    /// Against the whole product, with zeros where nothing is seen, for queries that begin anywhere among the keys.
    #[test]
    fn a_causal_part_is_what_the_whole_has_there() {
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        for (queries, first, width) in
            [(1, 0, 1), (5, 0, 4), (12, 3, 16), (64, 0, 32), (64, 64, 64), (41, 250, 80), (13, 200, 17)]
        {
            let keys = first + queries;
            let sees = |(i, j): (usize, usize)| j <= first + i;
            let f32s = |m: &Array2<f64>| m.mapv(|x| x as f32);
            let (q, k) = (f32s(&random(&mut rng, queries, width)), f32s(&random(&mut rng, keys, width)));
            let mut p = f32s(&random(&mut rng, queries, keys));
            p.indexed_iter_mut().filter(|(at, _)| !sees(*at)).for_each(|(_, p)| *p = 0.0);
            let [hq, hk, hp] =
                [&q, &k, &p].map(|m| HostMat::from_slice(m.as_slice().expect("contiguous"), m.nrows(), m.ncols()));
            let [q, k, p] = [&q, &k, &p].map(|m| m.mapv(f64::from));
            let cases = [
                (hq, hk.t(), q.dot(&k.t()), Part::Seen { first }),
                (hq, hk.t(), q.dot(&k.t()), Part::All),
                (hp, hk, p.dot(&k), Part::OfQueries { first }),
                (hp.t(), hq, p.t().dot(&q), Part::OfKeys { first }),
                (hp.t(), hq, p.t().dot(&q), Part::All),
            ];
            for (a, b, product, part) in cases {
                let (m, n) = product.dim();
                let old = random(&mut rng, m, n).mapv(|x| f64::from(x as f32));
                for beta in [0.0, 1.0, 0.5] {
                    // What β = 0 must not read.
                    let mut c: Vec<f32> = old.iter().map(|&x| if beta == 0.0 { f32::NAN } else { x as f32 }).collect();
                    serial(0.5, a, b, beta, HostMut::from_slice(&mut c, m, n), part);
                    for ((at, product), got) in product.indexed_iter().zip(c) {
                        let want = 0.5 * product + if beta == 0.0 { 0.0 } else { beta * old[at] };
                        let counts = !matches!(part, Part::Seen { .. }) || sees(at);
                        let close = (f64::from(got) - want).abs() < 1e-6 * (1 + keys) as f64;
                        assert!(
                            !counts || close,
                            "{part:?} {queries} from {first}, {width} wide, β {beta}: {at:?} {got} {want}"
                        );
                    }
                }
            }
        }
    }
}
