use crate::{
    Acc, Buffer, Mat, MatMut, Result, gemm,
    real::{Real, dispatch, simd},
    reduce::{max, rows_per_task, run, sum},
};

/// Memory for one chunk of logits in [`loss_head`].
const CHUNK_BYTES: usize = 32 << 20;

/// Terms that are added in the matrix's own precision before they go into a sum in f64.
const BLOCK: usize = 512;

/// Cross-entropy with label smoothing (Szegedy et al. 2016, arXiv:1512.00567; PyTorch's `label_smoothing`) and its
/// gradient. For a row z of V logits with target t, smoothing ε and p = softmax(z):
///
/// ```text
/// loss = ln Σ e^z − (1 − ε)·z_t − ε/V · Σ z    z ← scale · (p − (1 − ε)·onehot(t) − ε/V)
/// ```
///
/// logits [n, V], overwritten with their gradient; targets [1, n] of u32; losses [n, 1], not scaled.
///
/// # Panics
/// When the shapes or types differ, or a target is not below V.
pub fn cross_entropy(logits: MatMut, targets: Mat, smoothing: f64, scale: f64, losses: MatMut) -> Result<()> {
    let targets = checked("cross_entropy", logits.rows(), logits.cols(), targets, &losses);
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
/// When the shapes or types differ, or a target is not below V.
pub fn nll(logits: Mat, targets: Mat, smoothing: f64, losses: MatMut) -> Result<()> {
    let targets = checked("nll", logits.rows(), logits.cols(), targets, &losses);
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

/// The head of a language model with its loss and backward pass, for rows x [n, d] that have a target:
///
/// ```text
/// z = x·w    losses and dz as in cross_entropy    dx = dz·wᵀ    dw = xᵀ·dz
/// ```
///
/// w [d, V] may be the transpose of a stored [V, d] matrix (a tied embedding); dw has the layout that is stored, here
/// [V, d]. Rows are taken in chunks of at most 32 MiB of logits, so [n, V] is never held at once.
///
/// # Panics
/// When the shapes or types differ, or a target is not below V.
#[allow(clippy::too_many_arguments)]
pub fn loss_head(
    x: Mat,
    w: Mat,
    targets: Mat,
    smoothing: f64,
    scale: f64,
    mut losses: MatMut,
    mut dx: Option<Acc>,
    mut dw: Option<Acc>,
) -> Result<()> {
    let (n, v) = (x.rows(), w.cols());
    assert_eq!(x.cols(), w.rows(), "loss_head: x [n, d] and w [d, V]");
    checked("loss_head", n, v, targets, &losses);
    let transposed = dispatch!("loss_head", w.dtype(), T => Ok(w.host::<T>().transposed))?;
    let most = (CHUNK_BYTES / (v * x.dtype().size()).max(1)).max(1);
    // Chunks of equal size; one even of no rows, because dw takes its β in any case.
    let chunks = n.div_ceil(most).max(1);
    let rows = n.div_ceil(chunks);
    let mut logits = Buffer::empty(&x.device(), x.dtype(), rows * v)?;
    for i in 0..chunks {
        let r = (i * rows).min(n)..((i + 1) * rows).min(n);
        let x = x.rows_in(r.clone());
        let mut z = MatMut::new(&mut logits, 0, r.len(), v);
        gemm(1.0, x, w, 0.0, z.reborrow())?;
        let losses = losses.reborrow().rows_in(r.clone());
        if dx.is_none() && dw.is_none() {
            nll(z.as_mat(), targets.cols_in(r), smoothing, losses)?;
            continue;
        }
        cross_entropy(z.reborrow(), targets.cols_in(r.clone()), smoothing, scale, losses)?;
        if let Some(dx) = &mut dx {
            gemm(1.0, z.as_mat(), w.t(), dx.beta, dx.to.reborrow().rows_in(r))?;
        }
        if let Some(dw) = &mut dw {
            let beta = if i == 0 { dw.beta } else { 1.0 };
            let (a, b) = if transposed { (z.as_mat(), x) } else { (x, z.as_mat()) };
            gemm(1.0, a.t(), b, beta, dw.to.reborrow())?;
        }
    }
    Ok(())
}

/// The targets, one per row and all below `classes`; one loss per row.
fn checked<'a>(kernel: &str, rows: usize, classes: usize, targets: Mat<'a>, losses: &MatMut) -> &'a [u32] {
    assert_eq!((targets.rows(), targets.cols()), (1, rows), "{kernel}: one target per row");
    assert_eq!((losses.rows(), losses.cols()), (rows, 1), "{kernel}: one loss per row");
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
            shifted += sum(z, #[inline(always)] |z| z - m).f64();
        }
        for z in z.iter_mut() {
            *z = (*z - m).exp();
        }
        total += sum(z, #[inline(always)] |e| e).f64();
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
            shifted += sum(part, #[inline(always)] |z| z - m).f64();
        }
        let exps = &mut exps[..part.len()];
        for (e, &z) in exps.iter_mut().zip(part) {
            *e = (z - m).exp();
        }
        total += sum(exps, #[inline(always)] |e| e).f64();
    }
    loss(total, (z[target] - m).f64(), shifted, z.len(), smoothing)
}
