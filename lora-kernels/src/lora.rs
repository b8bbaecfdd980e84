//! Low-rank adaptation of a projection, `y = x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ` (Hu et al. 2021, section 4.1), and its gradients.
//!
//! A fused projection (query, key and value in one) has several *parts*: part i has its own A_i [r_i, k] and B_i
//! [c_i, r_i] and writes its own columns of y. What passes between the steps is h = s·x·Aᵀ on the way forward and
//! g = s·dy·B on the way back, each [n, Σ r_i], the parts side by side.
//!
//! On the CPU each step is a few calls of [`gemm`]. On CUDA devices the steps are fused as far as that saves passes over
//! the wide matrices x, dy and y.

#[cfg(feature = "cuda")]
pub(crate) mod cuda;

use std::ops::Range;

use crate::{Acc, Buffer, Epilogue, Mat, MatMut, Result, gemm, gemm_with};

/// The upper half of one part: B [c, r], and the c columns of y it writes.
#[derive(Clone)]
pub struct LoraPart<'a> {
    /// Columns of y.
    pub cols: Range<usize>,
    /// B, as many rows as there are columns.
    pub b: Mat<'a>,
}

/// Each part's columns of h and g.
fn ranges(ranks: impl Iterator<Item = usize>) -> Vec<Range<usize>> {
    let mut end = 0;
    let range = |rank| {
        end += rank;
        end - rank..end
    };
    ranks.map(range).collect()
}

/// Checks the parts against h or g of the given width and y or dy with `n` columns.
fn check(kernel: &str, parts: &[LoraPart], width: usize, n: usize) {
    assert!(!parts.is_empty(), "{kernel}: no parts");
    assert_eq!(width, parts.iter().map(|p| p.b.cols()).sum(), "{kernel}: as many columns as all ranks together");
    for part in parts {
        assert_eq!(part.b.rows(), part.cols.len(), "{kernel}: B has a row for each of its columns {:?}", part.cols);
    }
    let ends = parts.iter().map(|p| p.cols.start).skip(1).chain([n]);
    let apart = parts.iter().zip(ends).all(|(p, next)| p.cols.start <= p.cols.end && p.cols.end <= next);
    assert!(apart, "{kernel}: parts have columns of their own, in order");
}

/// `h = s·x·Aᵀ` for all parts side by side, with x [n, k], A_i [r_i, k], h [n, Σ r_i].
///
/// On CUDA devices one product where the A's lie one below the other in memory, so that x is read once.
///
/// # Panics
/// When the shapes do not fit or the types differ.
pub fn lora_down(scale: f64, x: Mat, a: &[Mat], mut h: MatMut) -> Result<()> {
    assert_eq!(h.cols(), a.iter().map(Mat::rows).sum(), "lora_down: as many columns as all ranks together");
    #[cfg(feature = "cuda")]
    if h.gpu().is_some()
        && let Some(all) = cuda::stacked(a)
    {
        return gemm(scale, x, all.t(), 0.0, h);
    }
    for (a, range) in a.iter().zip(ranges(a.iter().map(Mat::rows))) {
        gemm(scale, x, a.t(), 0.0, h.reborrow().cols_in(range))?;
    }
    Ok(())
}

/// `y = x·W + b`, plus `h_i·B_iᵀ` on the columns of each part: x [n, k], W [k, out] (a transposed descriptor where it is
/// stored as [out, k]), b [1, out], h [n, Σ r_i] as [`lora_down`] makes it, y [n, out].
///
/// On CUDA devices one kernel, which adds up the low-rank products where it adds up those of W, unless cuBLASLt is faster
/// or there are few rows. Where that kernel is the one for Hopper, the parts share one matrix with zeros between them: what
/// is not finite in one part's h makes NaN of the other parts' columns as well.
///
/// # Panics
/// When the shapes do not fit, the types differ, or the parts' columns are not apart and in order.
pub fn lora_forward(x: Mat, w: Mat, bias: Option<Mat>, h: Mat, parts: &[LoraPart], mut y: MatMut) -> Result<()> {
    check("lora_forward", parts, h.cols(), y.cols());
    assert_eq!(
        (x.rows(), x.cols(), w.cols()),
        (y.rows(), w.rows(), y.cols()),
        "lora_forward: [n, k]·[k, out] into [n, out]"
    );
    assert_eq!(h.rows(), y.rows(), "lora_forward: h has a row for each of x");
    #[cfg(feature = "cuda")]
    if let Some(gpu) = y.gpu() {
        let done = cuda::forward(gpu, x, w, bias, h, parts, &mut y)?;
        if done {
            return Ok(());
        }
    }
    gemm_with(1.0, x, w, 0.0, y.reborrow(), &Epilogue { bias, ..Epilogue::default() })?;
    for (part, range) in parts.iter().zip(ranges(parts.iter().map(|p| p.b.cols()))) {
        gemm(1.0, h.cols_in(range), part.b.t(), 1.0, y.reborrow().cols_in(part.cols.clone()))?;
    }
    Ok(())
}

/// The gradients of h's use in y: `g_i = s·dy_i·B_i` (s times that of h) and `dB_i = dy_iᵀ·h_i`, with dy [n, out] of
/// which part i has its columns dy_i. Only what is asked for is computed: g, and for each part dB, which needs h and in
/// bf16 may be f32.
///
/// On CUDA devices dy is read once, for ranks up to 64 (32 in f32): beyond, arithmetic takes longer than memory.
///
/// # Panics
/// When the shapes do not fit, the types differ, a dB is asked for without h, or the parts' columns are not apart and in
/// order.
pub fn lora_backward_up(
    scale: f64,
    dy: Mat,
    h: Option<Mat>,
    parts: &[LoraPart],
    mut g: Option<MatMut>,
    db: Vec<Option<Acc>>,
) -> Result<()> {
    let rank = parts.iter().map(|p| p.b.cols()).sum();
    check("lora_backward_up", parts, rank, dy.cols());
    for x in h.iter().copied().chain(g.as_ref().map(MatMut::as_mat)) {
        assert_eq!((x.rows(), x.cols()), (dy.rows(), rank), "lora_backward_up: h and g are [n, Σ r]");
    }
    assert_eq!(db.len(), parts.len(), "lora_backward_up: a gradient, or none, for each part");
    for (part, db) in parts.iter().zip(&db) {
        let fits = db.as_ref().is_none_or(|db| (db.to.rows(), db.to.cols()) == (part.b.rows(), part.b.cols()));
        assert!(fits, "lora_backward_up: dB is as large as B");
    }
    #[cfg(feature = "cuda")]
    let mut db = db;
    #[cfg(feature = "cuda")]
    if let (Some(gpu), Some(h), Some(g)) = (dy.gpu(), h, &mut g) {
        let done = cuda::backward_up(gpu, scale, dy, h, parts, g, &mut db)?;
        if done {
            return Ok(());
        }
    }
    for ((part, range), db) in parts.iter().zip(ranges(parts.iter().map(|p| p.b.cols()))).zip(db) {
        let dy = dy.cols_in(part.cols.clone());
        if let Some(db) = db {
            let h = h.expect("lora_backward_up: dB needs h");
            gemm(1.0, dy.t(), h.cols_in(range.clone()), db.beta, db.to)?;
        }
        if let Some(g) = &mut g {
            gemm(scale, dy, part.b, 0.0, g.reborrow().cols_in(range))?;
        }
    }
    Ok(())
}

/// The gradients of the A's: `dA = g_iᵀ·x` for each given part, named by its columns of g, with g [n, Σ r_i] from
/// [`lora_backward_up`] and x [n, k]. In bf16 they may be f32.
///
/// On CUDA devices one product (over ranges of rows that are added up in a fixed order) where the gradients lie one
/// below the other in memory, so that x is read once.
///
/// # Panics
/// When the shapes do not fit or the types differ.
pub fn lora_backward_down(g: Mat, x: Mat, da: Vec<(Range<usize>, Acc)>) -> Result<()> {
    #[cfg(feature = "cuda")]
    let da = if g.gpu().is_some() { cuda::joined(da) } else { da };
    for (range, da) in da {
        gemm(1.0, g.cols_in(range).t(), x, da.beta, da.to)?;
    }
    Ok(())
}

/// The gradient of x: `dx = dy·Wᵀ + Σ g_i·A_i + β·dx`, with dy [n, out], W [k, out] as [`lora_forward`] takes it,
/// g [n, Σ r_i] from [`lora_backward_up`], A_i [r_i, k].
///
/// On CUDA devices one kernel, unless cuBLASLt computes dy·Wᵀ faster or there are few rows.
///
/// # Panics
/// When the shapes do not fit or the types differ.
pub fn lora_backward_input(dy: Mat, w: Mat, g: Mat, a: &[Mat], mut dx: Acc) -> Result<()> {
    assert_eq!(g.cols(), a.iter().map(Mat::rows).sum(), "lora_backward_input: as many columns as all ranks together");
    assert_eq!(
        (dy.rows(), dy.cols(), w.rows()),
        (dx.to.rows(), w.cols(), dx.to.cols()),
        "lora_backward_input: [n, out]·[out, k] into [n, k]"
    );
    assert!(
        g.rows() == dy.rows() && a.iter().all(|a| a.cols() == w.rows()),
        "lora_backward_input: rows of g, columns of A"
    );
    #[cfg(feature = "cuda")]
    if let Some(gpu) = dx.to.gpu() {
        let done = cuda::backward_input(gpu, dy, w, g, a, &mut dx)?;
        if done {
            return Ok(());
        }
    }
    gemm(1.0, dy, w.t(), dx.beta, dx.to.reborrow())?;
    for (a, range) in a.iter().zip(ranges(a.iter().map(Mat::rows))) {
        gemm(1.0, g.cols_in(range), *a, 1.0, dx.to.reborrow())?;
    }
    Ok(())
}

/// A low-rank update of some columns of a projection's output: one of several adapters of [`lora_grouped`].
#[derive(Clone)]
pub struct LoraAdapter<'a> {
    /// s.
    pub scale: f64,
    /// A [r, k].
    pub a: Mat<'a>,
    /// B [c, r].
    pub b: Mat<'a>,
    /// The c columns of y.
    pub cols: Range<usize>,
}

/// `y[rows, cols] += s·(x[rows]·Aᵀ)·Bᵀ` for groups of rows of one batch that have different adapters, of different ranks,
/// or none: x [n, k], y [n, out].
///
/// On CUDA devices two kernels for all groups together, whatever their number.
///
/// # Panics
/// When the shapes do not fit, the types differ, or the groups' rows are not apart and in order.
pub fn lora_grouped(x: Mat, groups: &[(Range<usize>, Option<LoraAdapter>)], mut y: MatMut) -> Result<()> {
    assert_eq!(x.rows(), y.rows(), "lora_grouped: x and y have the same rows");
    let ends = groups.iter().map(|(rows, _)| rows.start).skip(1).chain([y.rows()]);
    let apart = groups.iter().zip(ends).all(|((rows, _), next)| rows.start <= rows.end && rows.end <= next);
    assert!(apart, "lora_grouped: groups have rows of their own, in order");
    for adapter in groups.iter().filter_map(|(_, adapter)| adapter.as_ref()) {
        let LoraAdapter { a, b, cols, .. } = adapter;
        assert_eq!((a.cols(), a.rows(), b.rows()), (x.cols(), b.cols(), cols.len()), "lora_grouped: [r, k] and [c, r]");
        assert!(cols.end <= y.cols(), "lora_grouped: columns {cols:?} of {}", y.cols());
    }
    #[cfg(feature = "cuda")]
    if let Some(gpu) = y.gpu() {
        return cuda::grouped(gpu, x, groups, &y);
    }
    for (rows, adapter) in groups {
        let Some(LoraAdapter { scale, a, b, cols }) = adapter else { continue };
        let mut h = Buffer::empty(x.device(), x.dtype(), rows.len() * a.rows())?;
        gemm(*scale, x.rows_in(rows.clone()), a.t(), 0.0, MatMut::new(&mut h, 0, rows.len(), a.rows()))?;
        let y = y.reborrow().rows_in(rows.clone()).cols_in(cols.clone());
        gemm(1.0, Mat::new(&h, 0, rows.len(), a.rows()), b.t(), 1.0, y)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        DType,
        testing::{FLOATS, Padded, close, random, tol},
    };

    /// Σ over the middle of two row-major matrices.
    fn times(a: &[f64], b: &[f64], (m, k, n): (usize, usize, usize)) -> Vec<f64> {
        (0..m * n).map(|i| (0..k).map(|p| a[i / n * k + p] * b[p * n + i % n]).sum()).collect()
    }

    fn t(a: &[f64], rows: usize, cols: usize) -> Vec<f64> {
        (0..rows * cols).map(|i| a[i % rows * cols + i / rows]).collect()
    }

    fn part<'a>(cols: Range<usize>, b: &'a Padded) -> LoraPart<'a> {
        LoraPart { cols, b: b.mat() }
    }

    /// The whole of a projection with two parts, by plain loops.
    #[test]
    fn forward_and_backward_are_the_formulas() {
        let (n, k, out, s) = (5, 7, 11, -0.75);
        let (ranks, cols) = ([2, 3], [1..5, 6..11]);
        let x = random(1, n * k, 1.0);
        let w = random(2, k * out, 1.0);
        let bias = random(3, out, 1.0);
        let a: Vec<_> = ranks.iter().zip(4..).map(|(r, seed)| random(seed, r * k, 1.0)).collect();
        let b: Vec<_> = ranks.iter().zip(&cols).zip(6..).map(|((r, c), seed)| random(seed, r * c.len(), 1.0)).collect();
        let dy = random(8, n * out, 1.0);
        let old = random(9, n * k, 1.0);
        // y, g, dB, dA and dx, one part after the other.
        let mut y: Vec<f64> = times(&x, &w, (n, k, out)).iter().enumerate().map(|(i, v)| v + bias[i % out]).collect();
        let mut dx = times(&dy, &t(&w, k, out), (n, out, k));
        let (mut db, mut da) = (Vec::new(), Vec::new());
        for i in 0..2 {
            let (r, c) = (ranks[i], cols[i].clone());
            let u = times(&x, &t(&a[i], r, k), (n, k, r));
            let update = times(&u, &t(&b[i], c.len(), r), (n, r, c.len()));
            let mut mine = Vec::new();
            for row in 0..n {
                for (j, col) in c.clone().enumerate() {
                    y[row * out + col] += s * update[row * c.len() + j];
                    mine.push(dy[row * out + col]);
                }
            }
            db.push(times(&t(&mine, n, c.len()), &u, (c.len(), n, r)).iter().map(|v| s * v).collect::<Vec<_>>());
            let g: Vec<f64> = times(&mine, &b[i], (n, c.len(), r)).iter().map(|v| s * v).collect();
            da.push(times(&t(&g, n, r), &x, (r, n, k)));
            dx.iter_mut().zip(times(&g, &a[i], (n, r, k))).for_each(|(dx, v)| *dx += v);
        }
        dx.iter_mut().zip(&old).for_each(|(dx, o)| *dx += 0.5 * o);

        for dtype in FLOATS {
            for transposed in [false, true] {
                let of = |rows, cols, v: &[f64]| Padded::new(dtype, rows, cols, 2, v);
                let w = if transposed { of(out, k, &t(&w, k, out)) } else { of(k, out, &w) };
                let w = w.mat().t_if(transposed);
                let (x, bias, dy) = (of(n, k, &x), of(1, out, &bias), of(n, out, &dy));
                let a = [of(2, k, &a[0]), of(3, k, &a[1])];
                let b = [of(4, 2, &b[0]), of(5, 3, &b[1])];
                let a_mats = [a[0].mat(), a[1].mat()];
                let parts = [part(1..5, &b[0]), part(6..11, &b[1])];
                let empty = |rows, cols| Padded::poison(dtype, rows, cols, 1);
                let (mut h, mut got_y, mut g) = (empty(n, 5), empty(n, out), empty(n, 5));
                let (mut b0, mut b1, mut a0, mut a1) = (empty(4, 2), empty(5, 3), empty(2, k), empty(3, k));
                let mut got_dx = of(n, k, &old);
                lora_down(s, x.mat(), &a_mats, h.mat_mut()).unwrap();
                lora_forward(x.mat(), w, Some(bias.mat()), h.mat(), &parts, got_y.mat_mut()).unwrap();
                let wanted = vec![Some(b0.acc(0.0)), Some(b1.acc(0.0))];
                lora_backward_up(s, dy.mat(), Some(h.mat()), &parts, Some(g.mat_mut()), wanted).unwrap();
                lora_backward_down(g.mat(), x.mat(), vec![(0..2, a0.acc(0.0)), (2..5, a1.acc(0.0))]).unwrap();
                lora_backward_input(dy.mat(), w, g.mat(), &a_mats, got_dx.acc(0.5)).unwrap();
                let tol = tol(dtype, 1e-5);
                for (what, got, want) in [
                    ("y", got_y.get(), &y),
                    ("dB 0", b0.get(), &db[0]),
                    ("dB 1", b1.get(), &db[1]),
                    ("dA 0", a0.get(), &da[0]),
                    ("dA 1", a1.get(), &da[1]),
                    ("dx", got_dx.get(), &dx),
                ] {
                    close(&format!("{what} {dtype:?} {transposed}"), &got, want, tol);
                }
            }
        }
    }

    #[test]
    fn rows_get_their_own_adapters_and_others_none() {
        let (n, k, out) = (9, 4, 6);
        let (x, y) = (random(1, n * k, 1.0), random(2, n * out, 1.0));
        let of = |rows, cols, seed| Padded::new(DType::F64, rows, cols, 1, &random(seed, rows * cols, 1.0));
        let (a1, b1, a2, b2) = (of(1, k, 3), of(6, 1, 4), of(3, k, 5), of(2, 3, 6));
        let first = LoraAdapter { scale: 2.0, a: a1.mat(), b: b1.mat(), cols: 0..6 };
        let second = LoraAdapter { scale: -0.5, a: a2.mat(), b: b2.mat(), cols: 3..5 };
        let groups = [(0..2, Some(first.clone())), (2..3, None), (3..7, Some(second)), (7..8, Some(first))];
        let mut got = Padded::new(DType::F64, n, out, 2, &y);
        lora_grouped(Padded::new(DType::F64, n, k, 1, &x).mat(), &groups, got.mat_mut()).unwrap();

        let mut want = y.clone();
        let mut add = |rows: Range<usize>, s: f64, (a, b): (&Padded, &Padded), cols: Range<usize>, r: usize| {
            for row in rows {
                let h = times(&x[row * k..][..k], &t(&a.get(), r, k), (1, k, r));
                let update = times(&h, &t(&b.get(), cols.len(), r), (1, r, cols.len()));
                cols.clone().zip(update).for_each(|(col, v)| want[row * out + col] += s * v);
            }
        };
        add(0..2, 2.0, (&a1, &b1), 0..6, 1);
        add(3..7, -0.5, (&a2, &b2), 3..5, 3);
        add(7..8, 2.0, (&a1, &b1), 0..6, 1);
        close("grouped", &got.get(), &want, 1e-12);
    }

    #[test]
    #[should_panic(expected = "parts have columns of their own, in order")]
    fn parts_that_overlap_are_refused() {
        let b = Padded::new(DType::F64, 2, 1, 0, &[1.0, 2.0]);
        let (x, mut y) = (Padded::new(DType::F64, 1, 3, 0, &[0.0; 3]), Padded::new(DType::F64, 1, 3, 0, &[0.0; 3]));
        let (w, h) = (Padded::new(DType::F64, 3, 3, 0, &[0.0; 9]), Padded::new(DType::F64, 1, 2, 0, &[0.0; 2]));
        let parts = [part(0..2, &b), part(1..3, &b)];
        let _ = lora_forward(x.mat(), w.mat(), None, h.mat(), &parts, y.mat_mut());
    }
}
