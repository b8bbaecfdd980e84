use std::ops::Range;

use lora_kernels::{axpby, fill};

use crate::{Result, Tape, Tensor, Var};

/// y = [a; b], the rows of a above those of b: a [n, d], b [m, d], y [n + m, d].
///
/// Backward: each gets its rows of dy.
///
/// # Panics
/// When the columns or the types differ.
pub fn concat_rows(t: &mut Tape, a: &Var, b: &Var) -> Result<Var> {
    assert_eq!(a.value.cols(), b.value.cols(), "concat_rows: as many columns");
    let (n, m, d) = (a.value.rows(), b.value.rows(), a.value.cols());
    let mut y = Tensor::empty(&t.device(), a.value.dtype(), &[n + m, d])?;
    axpby(1.0, a.value.mat(), 0.0, y.make_mut()?.rows_in(0..n))?;
    axpby(1.0, b.value.mat(), 0.0, y.make_mut()?.rows_in(n..n + m))?;
    let part = |x: &Var, rows: Range<usize>| x.slot.map(|s| (s, x.value.shape().to_vec(), rows));
    let parts = [part(a, 0..n), part(b, n..n + m)];
    Ok(t.record(y, parts.iter().any(Option::is_some), move |dy, g| {
        parts.into_iter().flatten().try_for_each(|(slot, shape, rows)| g.pass(slot, dy.rows_in(rows).reshape(&shape)))
    }))
}

/// y = x[:, cols], copied: x [n, d], y \[n, as many as the columns\].
///
/// Backward: dx[:, cols] += dy, and 0 in the other columns of a gradient that nobody has written yet.
///
/// # Panics
/// When x does not have the columns.
pub fn columns(t: &mut Tape, x: &Var, cols: Range<usize>) -> Result<Var> {
    let mut y = Tensor::empty(&t.device(), x.value.dtype(), &[x.value.rows(), cols.len()])?;
    axpby(1.0, x.value.mat().cols_in(cols.clone()), 0.0, y.make_mut()?)?;
    let dx = x.slot.map(|s| (s, x.value.shape().to_vec()));
    Ok(t.record(y, dx.is_some(), move |dy, g| {
        let Some((s, shape)) = dx else { return Ok(()) };
        g.add(s, &shape, &dy, |dx| {
            let beta = dx.beta;
            let (before, rest) = dx.to.split_cols(cols.start);
            let (part, after) = rest.split_cols(cols.len());
            if beta == 0.0 {
                fill(0.0, before)?;
                fill(0.0, after)?;
            }
            Ok(axpby(1.0, dy.mat(), beta, part)?)
        })
    }))
}
