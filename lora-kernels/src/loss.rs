#[cfg(feature = "cuda")]
pub(crate) mod cuda;

use crate::{
    Acc, Buffer, Epilogue, Error, Mat, MatMut, Result, gemm, gemm_with,
    real::{Real, dispatch, simd},
    reduce::{max, rows_per_task, run, sum},
    sum_rows,
};

/// Memory for one chunk of logits in [`loss_head`] on the CPU.
const CHUNK_BYTES: usize = 48 << 20;

/// Most rows of such a chunk where w trains: its gradient sums over them, in one step along them (`gemm::blocked`).
const ROWS_OF_DW: usize = 192;

/// The same on a CUDA device, whose products need many rows to keep all its multiprocessors busy.
const DEVICE_CHUNK_BYTES: usize = 256 << 20;

/// Rows of a tile of a product on a CUDA device: chunks are multiples of it, so that no tile is partly empty.
const TILE: usize = 128;

/// Terms that are added in the matrix's own precision before they go into a sum in f64.
const BLOCK: usize = 512;

/// Cross-entropy with label smoothing (Szegedy et al. 2016, arXiv:1512.00567; PyTorch's `label_smoothing`) and its
/// gradient. For a row z of V logits with target t, smoothing ε and p = softmax(z):
///
/// ```text
/// loss = ln Σ e^z − (1 − ε)·z_t − ε/V · Σ z    z ← scale · (p − (1 − ε)·onehot(t) − ε/V)
/// ```
///
/// logits [n, V], overwritten with their gradient; targets [1, n] of u32; losses [n, 1], not scaled, in the logits'
/// [`accumulator`](crate::DType::accumulator).
///
/// # Panics
/// When the shapes or types differ, or a target is not below V. On a CUDA device targets are not looked at before they
/// are used: there the loss and the gradients of a row whose target is not below V are NaN.
pub fn cross_entropy(logits: MatMut, targets: Mat, smoothing: f64, scale: f64, losses: MatMut) -> Result<()> {
    check_shapes("cross_entropy", logits.rows(), targets, &losses);
    #[cfg(feature = "cuda")]
    if let Some(gpu) = logits.gpu() {
        return cuda::cross_entropy(gpu, None, targets, smoothing, scale, logits, losses);
    }
    let targets = checked("cross_entropy", logits.cols(), targets);
    dispatch!("cross_entropy", logits.dtype(), T => {
        let (z, losses) = (logits.host::<T>(), losses.host::<T>());
        let step = rows_per_task(z.cols);
        let tasks = z.row_chunks(step).into_iter().zip(losses.row_chunks(step)).collect();
        run(tasks, |i, (mut z, mut losses)| simd(#[inline(always)] || {
            for r in 0..z.rows {
                let loss = row_gradient(z.row_mut(r), targets[i * step + r] as usize, smoothing, scale);
                losses.row_mut(r)[0] = T::of(loss);
            }
        }));
        Ok(())
    })
}

/// The losses of [`cross_entropy`] alone, for evaluation: logits [n, V] stay as they are.
///
/// # Panics
/// As [`cross_entropy`].
pub fn nll(logits: Mat, targets: Mat, smoothing: f64, losses: MatMut) -> Result<()> {
    check_shapes("nll", logits.rows(), targets, &losses);
    #[cfg(feature = "cuda")]
    if let Some(gpu) = logits.gpu() {
        return cuda::nll(gpu, logits, targets, smoothing, losses);
    }
    let targets = checked("nll", logits.cols(), targets);
    dispatch!("nll", logits.dtype(), T => {
        let (z, losses) = (logits.host::<T>(), losses.host::<T>());
        let step = rows_per_task(z.cols);
        run(losses.row_chunks(step), |i, mut losses| simd(#[inline(always)] || {
            for r in 0..losses.rows {
                let loss = row_loss(z.row(i * step + r), targets[i * step + r] as usize, smoothing);
                losses.row_mut(r)[0] = T::of(loss);
            }
        }));
        Ok(())
    })
}

/// The head of a language model or a classifier with its loss and backward pass, for rows x [n, d] that have a target:
///
/// ```text
/// z = x·w + b    losses and dz as in cross_entropy    dx = dz·wᵀ    dw = xᵀ·dz    db = Σᵢ dzᵢ
/// ```
///
/// w [d, V] may be the transpose of a stored [V, d] matrix (a tied embedding); dw has the layout that is stored, here
/// [V, d]. b and db are [1, V]. Rows are taken in chunks of at most 48 MiB of logits, and 192 rows where there is a dw
/// (256 MiB on a CUDA device), so [n, V] is never held at once. With x and w of a 16-bit type, b is of that type or f32,
/// logits and losses are f32, dz is rounded to the type of x, and dx, dw and db are either.
///
/// # Panics
/// As [`cross_entropy`].
#[allow(clippy::too_many_arguments)]
pub fn loss_head(
    x: Mat,
    w: Mat,
    bias: Option<Mat>,
    targets: Mat,
    smoothing: f64,
    scale: f64,
    losses: MatMut,
    dx: Option<Acc>,
    dw: Option<Acc>,
    db: Option<Acc>,
) -> Result<()> {
    loss_head_of(vec![HeadTerm { factor: 1.0, x, w, dx, dw }], bias, targets, smoothing, scale, losses, db)
}

/// One product of the sum that the logits of [`loss_head_of`] are: factor·x·w, with x [n, d] and w [d, V], each term with a
/// d of its own, and where its gradients go.
pub struct HeadTerm<'a> {
    /// The factor.
    pub factor: f64,
    /// x.
    pub x: Mat<'a>,
    /// w, which may be the transpose of a stored [V, d] matrix.
    pub w: Mat<'a>,
    /// [n, d].
    pub dx: Option<Acc<'a>>,
    /// In the layout that is stored.
    pub dw: Option<Acc<'a>>,
}

/// [`loss_head`] with logits that are a sum of products, z = Σ cᵢ·xᵢ·wᵢ + b: an output head and a low-rank update beside it.
///
/// # Panics
/// As [`loss_head`]; when there is no term, or the terms have other numbers of rows or classes.
pub fn loss_head_of(
    terms: Vec<HeadTerm>,
    bias: Option<Mat>,
    targets: Mat,
    smoothing: f64,
    scale: f64,
    losses: MatMut,
    db: Option<Acc>,
) -> Result<()> {
    let HeadTerm { x, w, .. } = terms.first().expect("loss_head: at least one product");
    let (n, v) = (x.rows(), w.cols());
    for HeadTerm { x, w, .. } in &terms {
        assert_eq!((x.rows(), x.cols(), w.cols()), (n, w.rows(), v), "loss_head: x [n, d] and w [d, V]");
    }
    // Before anything is written, also where there is no row.
    for b in bias.iter().copied().chain(db.iter().map(|db| db.to.as_mat())) {
        assert_eq!((b.rows(), b.cols()), (1, v), "loss_head: one number of the bias per class");
    }
    check_shapes("loss_head", n, targets, &losses);
    let bytes = v * x.dtype().accumulator().size();
    let rows = if x.device().is_cpu() {
        // Before anything is written.
        checked("loss_head", v, targets);
        let most = if terms.iter().any(|t| t.dw.is_some()) { ROWS_OF_DW } else { usize::MAX };
        chunk_rows(n, most.min(CHUNK_BYTES / bytes.max(1)), 1)
    } else {
        chunk_rows(n, DEVICE_CHUNK_BYTES / bytes.max(1), TILE)
    };
    in_chunks(rows, terms, bias, targets, smoothing, scale, losses, db)
}

/// Rows of each chunk but the last of n rows: chunks of almost equal size with at most `most` rows, or one, and
/// multiples of `tile` where `most` allows it.
fn chunk_rows(n: usize, most: usize, tile: usize) -> usize {
    let tile = if most < tile { 1 } else { tile };
    let most = (most / tile * tile).max(1);
    if n <= most {
        return n;
    }
    n.div_ceil(n.div_ceil(most)).next_multiple_of(tile)
}

/// [`loss_head`], `rows` rows at a time.
#[allow(clippy::too_many_arguments)]
fn in_chunks(
    rows: usize,
    mut terms: Vec<HeadTerm>,
    bias: Option<Mat>,
    targets: Mat,
    smoothing: f64,
    scale: f64,
    mut losses: MatMut,
    mut db: Option<Acc>,
) -> Result<()> {
    let (x, n, v) = (terms[0].x, terms[0].x.rows(), terms[0].w.cols());
    let wide = x.dtype().accumulator();
    let gradients = db.is_some() || terms.iter().any(|t| t.dx.is_some() || t.dw.is_some());
    let epilogue = Epilogue { bias, ..Epilogue::default() };
    // On a CUDA device every row begins at a multiple of 16 bytes, in f32 and in 16 bits: faster loads and products.
    let stride = if x.device().is_cpu() { v } else { v.next_multiple_of(8) };
    let mut logits = Buffer::empty(x.device(), wide, rows * stride)?;
    let mut narrow = match gradients && wide != x.dtype() {
        true => Some(Buffer::empty(x.device(), x.dtype(), rows * stride)?),
        false => None,
    };
    // One even of no rows, because dw and db take their β in any case.
    for i in 0..n.div_ceil(rows.max(1)).max(1) {
        let r = (i * rows).min(n)..((i + 1) * rows).min(n);
        let targets = targets.cols_in(r.clone());
        let losses = losses.reborrow().rows_in(r.clone());
        let mut z = MatMut::new(&mut logits, 0, r.len(), stride).cols_in(0..v);
        for (i, HeadTerm { factor, x, w, .. }) in terms.iter().enumerate() {
            let x = x.rows_in(r.clone());
            match i {
                0 => gemm_with(*factor, x, *w, 0.0, z.reborrow(), &epilogue)?,
                _ => gemm(*factor, x, *w, 1.0, z.reborrow())?,
            }
        }
        if !gradients {
            nll(z.as_mat(), targets, smoothing, losses)?;
            continue;
        }
        let dz = match &mut narrow {
            None => {
                cross_entropy(z.reborrow(), targets, smoothing, scale, losses)?;
                z
            }
            Some(narrow) => {
                let mut dz = MatMut::new(narrow, 0, r.len(), stride).cols_in(0..v);
                narrowed(z.as_mat(), targets, smoothing, scale, dz.reborrow(), losses)?;
                dz
            }
        };
        for HeadTerm { factor, x, w, dx, dw } in &mut terms {
            let x = x.rows_in(r.clone());
            if let Some(dx) = dx {
                gemm(*factor, dz.as_mat(), w.t(), dx.beta, dx.to.reborrow().rows_in(r.clone()))?;
            }
            if let Some(dw) = dw {
                let beta = if i == 0 { dw.beta } else { 1.0 };
                let (a, b) = if w.is_transposed() { (dz.as_mat(), x) } else { (x, dz.as_mat()) };
                gemm(*factor, a.t(), b, beta, dw.to.reborrow())?;
            }
        }
        if let Some(db) = &mut db {
            let beta = if i == 0 { db.beta } else { 1.0 };
            sum_rows(dz.as_mat(), Acc { to: db.to.reborrow(), beta })?;
        }
    }
    Ok(())
}

/// [`cross_entropy`] of f32 logits, which stay, with the gradient rounded to a 16-bit type: on CUDA devices alone, since
/// no kernel of the CPU takes those types.
#[cfg_attr(not(feature = "cuda"), allow(unused_variables))]
fn narrowed(z: Mat, targets: Mat, smoothing: f64, scale: f64, dz: MatMut, losses: MatMut) -> Result<()> {
    #[cfg(feature = "cuda")]
    if let Some(gpu) = z.gpu() {
        return cuda::cross_entropy(gpu, Some(z), targets, smoothing, scale, dz, losses);
    }
    Err(Error::DType { kernel: "loss_head", dtype: dz.dtype() })
}

/// One target per row, one loss per row.
fn check_shapes(kernel: &str, rows: usize, targets: Mat, losses: &MatMut) {
    assert_eq!((targets.rows(), targets.cols()), (1, rows), "{kernel}: one target per row");
    assert_eq!((losses.rows(), losses.cols()), (rows, 1), "{kernel}: one loss per row");
}

/// The targets, in host memory and all below `classes`.
fn checked<'a>(kernel: &str, classes: usize, targets: Mat<'a>) -> &'a [u32] {
    let targets = targets.host::<u32>().row(0);
    if let Some((i, t)) = targets.iter().enumerate().find(|&(_, &t)| t as usize >= classes) {
        panic!("{kernel}: target {t} of row {i} is none of {classes} classes");
    }
    targets
}

/// ln Σ e^(z − m) − (1 − ε)·(z_t − m) − ε·mean(z − m): nothing is lost where all logits are large.
#[inline(always)]
fn loss(total: f64, target: f64, shifted: f64, classes: usize, smoothing: f64) -> f64 {
    total.ln() - (1.0 - smoothing) * target - smoothing * shifted / classes as f64
}

#[inline(always)]
fn row_gradient<T: Real>(z: &mut [T], target: usize, smoothing: f64, scale: f64) -> f64 {
    let m = max(z);
    let at_target = (z[target] - m).f64();
    let (mut total, mut shifted) = (0.0, 0.0);
    for z in z.chunks_mut(BLOCK) {
        if smoothing != 0.0 {
            shifted += sum(
                [&*z],
                #[inline(always)]
                |[z]| z - m,
            )
            .f64();
        }
        for z in z.iter_mut() {
            *z = (*z - m).exp();
        }
        total += sum(
            [&*z],
            #[inline(always)]
            |[e]| e,
        )
        .f64();
    }
    let (k, uniform) = (T::of(scale / total), T::of(-scale * smoothing / z.len() as f64));
    for z in z.iter_mut() {
        *z = z.mul_add(k, uniform);
    }
    z[target] += T::of(-scale * (1.0 - smoothing));
    loss(total, at_target, shifted, z.len(), smoothing)
}

#[inline(always)]
fn row_loss<T: Real>(z: &[T], target: usize, smoothing: f64) -> f64 {
    let m = max(z);
    let (mut total, mut shifted) = (0.0, 0.0);
    let mut exps = [T::ZERO; BLOCK];
    for part in z.chunks(BLOCK) {
        if smoothing != 0.0 {
            shifted += sum(
                [part],
                #[inline(always)]
                |[z]| z - m,
            )
            .f64();
        }
        let exps = &mut exps[..part.len()];
        for (e, &z) in exps.iter_mut().zip(part) {
            *e = (z - m).exp();
        }
        total += sum(
            [&*exps],
            #[inline(always)]
            |[e]| e,
        )
        .f64();
    }
    loss(total, (z[target] - m).f64(), shifted, z.len(), smoothing)
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use super::*;
    use crate::{DType, testing::*};

    fn classes(n: usize, v: usize) -> Vec<u32> {
        (0..n).map(|i| ((i * 7919 + v / 2) % v) as u32).collect()
    }

    /// Losses and gradients by plain loops in f64.
    fn oracle(z: &[f64], v: usize, targets: &[u32], smoothing: f64, scale: f64) -> (Vec<f64>, Vec<f64>) {
        let mut grads = Vec::new();
        let losses = z.chunks(v).zip(targets).map(|(z, &t)| {
            let m = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let lse = m + z.iter().map(|z| (z - m).exp()).sum::<f64>().ln();
            grads.extend(z.iter().enumerate().map(|(j, z)| {
                let hot = if j == t as usize { 1.0 - smoothing } else { 0.0 };
                scale * ((z - lse).exp() - hot - smoothing / v as f64)
            }));
            lse - (1.0 - smoothing) * z[t as usize] - smoothing * z.iter().sum::<f64>() / v as f64
        });
        (losses.collect(), grads)
    }

    #[test]
    fn losses_and_gradients_equal_their_formulas() {
        // Random rows, then extreme ones: far apart, all equal and large, all zero.
        type Row = fn(usize, usize) -> Vec<f64>;
        let rows: [(&str, Row); 5] = [
            ("random", |n, v| random(1, n * v, 5.0)),
            ("far apart", |n, v| random(2, n * v, 1e4)),
            ("equal", |n, v| vec![1e4; n * v]),
            ("low", |n, v| vec![-1e4; n * v]),
            ("zero", |n, v| vec![0.0; n * v]),
        ];
        for (what, z) in rows {
            for (n, v) in [(0, 3), (1, 1), (3, 7), (5, 8), (2, 31), (40, 1033), (3, 50_257)] {
                for smoothing in [0.0, 0.1] {
                    let (z, t) = (z(n, v), classes(n, v));
                    let (losses, grads) = oracle(&z, v, &t, smoothing, 0.5);
                    let t = ids(&t);
                    let t = Mat::new(&t, 0, 1, n);
                    for (dtype, pad) in [(DType::F32, 0), (DType::F32, 3), (DType::F64, 2)] {
                        let mut pz = Padded::new(dtype, n, v, pad, &z);
                        let mut pl = Padded::poison(dtype, n, 1, pad);
                        // ln Σ is the difference of numbers of the size of the logits: in f64 that costs digits.
                        let tolerance = tol(dtype, 1e-6).max(1e-11);
                        nll(pz.mat(), t, smoothing, pl.mat_mut()).unwrap();
                        close(&format!("nll of {what} {n}×{v}"), &pl.get(), &losses, tolerance);
                        pl = Padded::poison(dtype, n, 1, pad);
                        cross_entropy(pz.mat_mut(), t, smoothing, 0.5, pl.mat_mut()).unwrap();
                        close(&format!("loss of {what} {n}×{v}"), &pl.get(), &losses, tolerance);
                        close(&format!("gradient of {what} {n}×{v}"), &pz.get(), &grads, tolerance);
                        // Closer than `close` looks, where probabilities are small.
                        let scaled = |g: &[f64]| g.iter().map(|g| g * v as f64).collect::<Vec<_>>();
                        if what == "random" && v > 1000 {
                            close("relative", &scaled(&pz.get()), &scaled(&grads), tolerance * 2.0);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn gradients_are_those_of_finite_differences() {
        let (n, v) = (3, 9);
        let (z, t) = (random(3, n * v, 3.0), ids(&classes(n, v)));
        let t = Mat::new(&t, 0, 1, n);
        let total = |z: &[f64]| {
            let (z, mut l) = (Padded::new(DType::F64, n, v, 0, z), Padded::poison(DType::F64, n, 1, 0));
            nll(z.mat(), t, 0.1, l.mat_mut()).unwrap();
            0.25 * l.get().iter().sum::<f64>()
        };
        let (mut g, mut l) = (Padded::new(DType::F64, n, v, 0, &z), Padded::poison(DType::F64, n, 1, 0));
        cross_entropy(g.mat_mut(), t, 0.1, 0.25, l.mat_mut()).unwrap();
        close("dz", &g.get(), &slopes(&z, total), 1e-8);
    }

    #[test]
    fn nan_logits_give_a_nan_loss() {
        let t = ids(&[0]);
        let mut l = Padded::new(DType::F32, 1, 1, 0, &[0.0]);
        let z = Padded::new(DType::F32, 1, 3, 0, &[1.0, f64::NAN, 2.0]);
        nll(z.mat(), Mat::new(&t, 0, 1, 1), 0.0, l.mat_mut()).unwrap();
        assert!(l.get()[0].is_nan(), "NaN logits must not look like a loss");
    }

    #[test]
    #[should_panic(expected = "nll: target 3 of row 0 is none of 3 classes")]
    fn a_target_that_is_no_class_is_refused() {
        let (t, z, mut l) = (ids(&[3]), Padded::poison(DType::F32, 1, 3, 0), Padded::poison(DType::F32, 1, 1, 0));
        nll(z.mat(), Mat::new(&t, 0, 1, 1), 0.0, l.mat_mut()).unwrap();
    }

    /// losses, dx, dw and db of the head; dw as w is stored. Asked for a gradient of the bias, it has one.
    fn head(dtype: DType, (n, d, v): (usize, usize, usize), stored: bool, beta: f64, ask: [bool; 3]) -> [Vec<f64>; 4] {
        let (x, w, old) = (random(4, n * d, 1.0), random(5, v * d, 1.0), random(6, (n + v) * d, 1.0));
        let (b, old_b) = (random(7, v, 2.0), random(8, v, 1.0));
        let (r, c) = if stored { (v, d) } else { (d, v) };
        let (px, pw) = (Padded::new(dtype, n, d, 3, &x), Padded::new(dtype, r, c, 2, &w));
        let pb = Padded::new(dtype, 1, v, 1, &b);
        let mut l = Padded::poison(dtype, n, 1, 0);
        let mut dx = Padded::target(dtype, n, d, 1, beta, &old[..n * d]);
        let mut dw = Padded::target(dtype, r, c, 1, beta, &old[n * d..]);
        let mut db = Padded::target(dtype, 1, v, 0, beta, &old_b);
        let t = ids(&classes(n, v));
        let (to_x, to_w) = (ask[0].then(|| dx.acc(beta)), ask[1].then(|| dw.acc(beta)));
        let to_b = ask[2].then(|| db.acc(beta));
        let (t, w) = (Mat::new(&t, 0, 1, n), pw.mat().t_if(stored));
        loss_head(px.mat(), w, Some(pb.mat()), t, 0.1, 0.5, l.mat_mut(), to_x, to_w, to_b).unwrap();
        [l.get(), dx.get(), dw.get(), db.get()]
    }

    /// The same from whole logits, by plain loops.
    fn head_oracle((n, d, v): (usize, usize, usize), stored: bool, beta: f64) -> [Vec<f64>; 4] {
        let (x, w, old) = (random(4, n * d, 1.0), random(5, v * d, 1.0), random(6, (n + v) * d, 1.0));
        let (b, old_b) = (random(7, v, 2.0), random(8, v, 1.0));
        let at = |j: usize, k: usize| if stored { j * d + k } else { k * v + j };
        let dot = |i: usize| (0..d).map(|k| x[i / v * d + k] * w[at(i % v, k)]).sum::<f64>();
        let z: Vec<f64> = (0..n * v).map(|i| dot(i) + b[i % v]).collect();
        let (losses, dz) = oracle(&z, v, &classes(n, v), 0.1, 0.5);
        let (mut dx, mut dw, mut db) = (vec![0.0; n * d], vec![0.0; v * d], vec![0.0; v]);
        for (i, g) in dz.iter().enumerate() {
            db[i % v] += g;
            for k in 0..d {
                dx[i / v * d + k] += g * w[at(i % v, k)];
                dw[at(i % v, k)] += g * x[i / v * d + k];
            }
        }
        let (dx, dw) = (accumulated(&dx, beta, &old[..n * d]), accumulated(&dw, beta, &old[n * d..]));
        [losses, dx, dw, accumulated(&db, beta, &old_b)]
    }

    /// Some columns of x and of w, times a factor.
    fn term<'a>(factor: f64, [x, w]: [&'a Padded; 2], cols: Range<usize>, [dx, dw]: [Acc<'a>; 2]) -> HeadTerm<'a> {
        HeadTerm { factor, x: x.mat().cols_in(cols.clone()), w: w.mat().cols_in(cols).t(), dx: Some(dx), dw: Some(dw) }
    }

    /// Columns of x and w that are split, a factor between them, change nothing but the order of sums; in several chunks too.
    #[test]
    fn a_sum_of_products_is_one_product_of_all_their_columns() {
        for (n, d, v) in [(7, 8, 33), (170, 3, 50_257)] {
            let (x, w) = (random(4, n * d, 1.0), random(5, v * d, 1.0));
            let doubled: Vec<f64> = x.iter().map(|x| 2.0 * x).collect();
            let t = ids(&classes(n, v));
            let t = Mat::new(&t, 0, 1, n);
            for dtype in FLOATS {
                let [px, p2] = [&x, &doubled].map(|x| Padded::new(dtype, n, d, 3, x));
                let pw = Padded::new(dtype, v, d, 2, &w);
                let run = |split: usize| {
                    let mut l = Padded::poison(dtype, n, 1, 0);
                    let mut dx = Padded::target(dtype, n, d, 1, 0.0, &x);
                    let mut dw = Padded::target(dtype, v, d, 1, 0.0, &w);
                    let [[to_x, to_x2], [to_w, to_w2]] = [&mut dx, &mut dw].map(|to| {
                        let (first, rest) = to.acc(0.0).to.split_cols(split);
                        [first, rest].map(|to| Acc { to, beta: 0.0 })
                    });
                    let mut terms = vec![term(1.0, [&px, &pw], 0..split, [to_x, to_w])];
                    if split < d {
                        terms.push(term(0.5, [&p2, &pw], split..d, [to_x2, to_w2]));
                    }
                    loss_head_of(terms, None, t, 0.1, 0.5, l.mat_mut(), None).unwrap();
                    [l.get(), dx.get(), dw.get()]
                };
                let (whole, parts) = (run(d), run(2));
                close(&format!("losses of {v} classes"), &parts[0], &whole[0], tol(dtype, 3e-6));
                // The gradient of 2x is half that of x, and that of w the same.
                let halved: Vec<f64> =
                    whole[1].iter().enumerate().map(|(i, g)| if i % d < 2 { *g } else { g / 2.0 }).collect();
                close(&format!("dx of {v} classes"), &parts[1], &halved, tol(dtype, 3e-6));
                close(&format!("dw of {v} classes"), &parts[2], &whole[2], tol(dtype, 3e-6));
            }
        }
    }

    #[test]
    fn the_head_equals_its_formulas() {
        // The last two take several chunks in f32 and f64, and in f64 alone.
        for shape in [(0, 3, 5), (1, 1, 1), (7, 8, 33), (33, 31, 129), (170, 3, 50_257), (9, 2, 600_000)] {
            for stored in [true, false] {
                // The large ones once.
                for &beta in if shape.2 > 1000 { &[1.0][..] } else { &[0.0, 1.0] } {
                    let want = head_oracle(shape, stored, beta);
                    for dtype in FLOATS {
                        let got = head(dtype, shape, stored, beta, [true; 3]);
                        for k in 0..4 {
                            close(&format!("output {k} of {shape:?}"), &got[k], &want[k], tol(dtype, 3e-6));
                        }
                        if shape.2 < 1000 {
                            for (k, what) in [(0, "dx"), (1, "dw"), (2, "db")] {
                                let alone = head(dtype, shape, stored, beta, [0, 1, 2].map(|i| i == k));
                                assert_eq!(alone[k + 1], got[k + 1], "{what} alone");
                            }
                            let none = head(dtype, shape, stored, beta, [false; 3]);
                            close("losses alone", &none[0], &got[0], tol(dtype, 1e-6));
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn chunks_are_of_equal_size_and_cover_all_rows() {
        // n, most, tile → rows of a chunk.
        for (n, most, tile, rows) in [
            (0, 10, 1, 0),
            (7, 10, 1, 7),
            (10, 10, 1, 10),
            (11, 10, 1, 6),
            (21, 10, 1, 7),
            (5, 0, 1, 1),
            (5, 0, 128, 1),
            (1335, 1335, 128, 768),
            (1280, 1335, 128, 1280),
            (1281, 1335, 128, 768),
            (3000, 1335, 128, 1024),
            (3000, 127, 128, 125),
            (200, 128, 128, 128),
        ] {
            let got = chunk_rows(n, most, tile);
            assert_eq!(got, rows, "{n} rows, at most {most}, tiles of {tile}");
            assert!(got <= most.max(1) && (got == n || most < tile || got.is_multiple_of(tile)));
        }
        // GPT-2's vocabulary on a CUDA device.
        assert_eq!(chunk_rows(8192, DEVICE_CHUNK_BYTES / (4 * 50_257), TILE), 1280);
    }

    #[test]
    fn same_bits_for_any_number_of_threads() {
        same_bits("head", || head(DType::F32, (170, 8, 50_257), true, 1.0, [true; 3]).concat());
    }
}
