use crate::{
    Acc, Error, Mat, MatMut, Result, Sequences,
    mat::{HostMat, HostMut},
    real::{Real, dispatch, simd},
    reduce::{put, rows_per_task, run},
};

/// What a convolution over the tokens of each sequence reads, one row per token:
/// ```text
/// y[t, c·k + j] = x[t + j − (k − 1)/2, c]      j < k; 0 where that token lies outside t's sequence
/// ```
/// x: [tokens, c]; y: [tokens, c·k], with k odd from the two widths. The columns are in the order in which a convolution's
/// weight [out, c, k] lies in memory, so that y·Wᵀ with W as [out, c·k] is the convolution ("im2col"). CPU only.
///
/// # Errors
/// [`Error::NoCuda`] for matrices on a CUDA device.
///
/// # Panics
/// When the shapes or types do not fit.
pub fn unfold(seqs: &Sequences, x: Mat, y: MatMut) -> Result<()> {
    let width = taps("unfold", seqs, (x.rows(), x.cols()), (y.rows(), y.cols()));
    if !y.device().is_cpu() {
        return Err(Error::NoCuda { kernel: "a convolution over tokens" });
    }
    dispatch!("unfold", y.dtype(), T => {
        let (x, y, starts) = (x.host::<T>(), y.host::<T>(), Starts::of(seqs));
        let step = rows_per_task(y.cols);
        run(y.row_chunks(step), |i, y| simd(#[inline(always)] || spread(&starts, x, i * step, width, y)));
        Ok(())
    })
}

/// The backward pass of [`unfold`], a sum over the places that a row went to:
/// ```text
/// dx[t, c] = β·dx[t, c] + Σⱼ dy[t − j + (k − 1)/2, c·k + j]      over the tokens of t's sequence
/// ```
///
/// # Errors
/// As there.
///
/// # Panics
/// When the shapes or types do not fit.
pub fn unfold_backward(seqs: &Sequences, dy: Mat, dx: Acc) -> Result<()> {
    let Acc { to: dx, beta } = dx;
    let width = taps("unfold_backward", seqs, (dx.rows(), dx.cols()), (dy.rows(), dy.cols()));
    if !dx.device().is_cpu() {
        return Err(Error::NoCuda { kernel: "a convolution over tokens" });
    }
    dispatch!("unfold_backward", dx.dtype(), T => {
        let (dy, dx, starts, beta) = (dy.host::<T>(), dx.host::<T>(), Starts::of(seqs), T::of(beta));
        let step = rows_per_task(dy.cols);
        run(dx.row_chunks(step), |i, dx| simd(#[inline(always)] || collect(&starts, dy, i * step, width, beta, dx)));
        Ok(())
    })
}

/// k, from the widths.
fn taps(kernel: &str, seqs: &Sequences, x: (usize, usize), y: (usize, usize)) -> usize {
    let width = y.1.checked_div(x.1).unwrap_or(1);
    assert_eq!((x.0, y.0), (seqs.tokens(), seqs.tokens()), "{kernel}: a row per token");
    assert!(width % 2 == 1 && y.1 == x.1 * width, "{kernel}: {} columns of {}, an odd multiple", y.1, x.1);
    width
}

/// Where the sequences begin, and where the last one ends.
struct Starts(Vec<usize>);

impl Starts {
    fn of(seqs: &Sequences) -> Starts {
        Starts((0..seqs.len()).map(|s| seqs.range(s).start).chain([seqs.tokens()]).collect())
    }

    /// Token t + shift, if it lies in t's sequence.
    #[inline(always)]
    fn beside(&self, t: usize, shift: isize) -> Option<usize> {
        let next = self.0.partition_point(|&start| start <= t);
        let to = t.checked_add_signed(shift)?;
        (self.0[next - 1]..self.0[next]).contains(&to).then_some(to)
    }
}

#[inline(always)]
fn spread<T: Real>(starts: &Starts, x: HostMat<T>, first: usize, width: usize, mut y: HostMut<T>) {
    let half = (width / 2) as isize;
    for r in 0..y.rows {
        let row = y.row_mut(r);
        for j in 0..width {
            let to = row[j..].iter_mut().step_by(width);
            match starts.beside(first + r, j as isize - half) {
                Some(t) => to.zip(x.row(t)).for_each(|(y, &x)| *y = x),
                None => to.for_each(|y| *y = T::ZERO),
            }
        }
    }
}

#[inline(always)]
fn collect<T: Real>(starts: &Starts, dy: HostMat<T>, first: usize, width: usize, beta: T, mut dx: HostMut<T>) {
    let half = (width / 2) as isize;
    for r in 0..dx.rows {
        let row = dx.row_mut(r);
        put(row, beta, |_| T::ZERO);
        for j in 0..width {
            if let Some(t) = starts.beside(first + r, half - j as isize) {
                row.iter_mut().zip(dy.row(t)[j..].iter().step_by(width)).for_each(|(dx, &dy)| *dx += dy);
            }
        }
    }
}
