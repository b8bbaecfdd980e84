use lora_kernels::{MatMut, axpby, gemm};

use crate::{Result, Tape, Tensor, Var};

/// The same elements in another shape. Backward: dx is dy in the shape of x.
///
/// # Panics
/// When the number of elements differs.
pub fn reshape(t: &mut Tape, x: Var, shape: &[usize]) -> Var {
    let (was, slot) = (x.value.shape().to_vec(), x.slot);
    let y = x.value.reshape(shape);
    t.record(y, slot.is_some(), move |dy, g| match slot {
        Some(s) => g.pass(s, dy.reshape(&was)),
        None => Ok(()),
    })
}

/// y = x·(W ⊗ I)ᵀ, a linear map of blocks of columns: with x [n, m·q] as m blocks of q columns, W [l, m] and y [n, l·q],
/// block i of y is Σⱼ wᵢⱼ·(block j of x).
///
/// Backward: dx = dy·(W ⊗ I), dwᵢⱼ = ⟨block i of dy, block j of x⟩, each only where something trainable lies; with a
/// frozen W, x is not kept.
///
/// The blocks are laid one after another and back, so that all of it is one product.
///
/// # Panics
/// When the columns of x are not as many blocks as W has columns.
pub fn linear_blocks(t: &mut Tape, x: &Var, w: &Var) -> Result<Var> {
    let (n, [l, m]) = (x.value.rows(), [w.value.rows(), w.value.cols()]);
    assert!(x.value.cols().is_multiple_of(m), "linear_blocks: {} columns in {m} blocks", x.value.cols());
    let q = x.value.cols() / m;
    let apart = apart(&x.value, m)?;
    let mut blocks = Tensor::empty(&t.device(), x.value.dtype(), &[l, n * q])?;
    gemm(1.0, w.value.mat(), apart.mat(), 0.0, blocks.make_mut()?)?;
    let mut y = Tensor::empty(&t.device(), x.value.dtype(), &[n, l * q])?;
    together(&blocks, n, 0.0, y.make_mut()?)?;
    drop(blocks);
    let dx = x.slot.map(|s| (s, w.value.clone(), x.value.shape().to_vec()));
    let dw = w.slot.map(|s| (s, apart, w.value.shape().to_vec()));
    Ok(t.record(y, dx.is_some() || dw.is_some(), move |dy, g| {
        let dy = self::apart(&dy, l)?;
        if let Some((s, x, shape)) = dw {
            g.add(s, &shape, &dy, |dw| Ok(gemm(1.0, dy.mat(), x.t(), dw.beta, dw.to)?))?;
        }
        if let Some((s, w, shape)) = dx {
            let mut blocks = Tensor::empty(&dy.device(), dy.dtype(), &[m, n * q])?;
            gemm(1.0, w.t(), dy.mat(), 0.0, blocks.make_mut()?)?;
            g.add(s, &shape, &dy, |dx| together(&blocks, n, dx.beta, dx.to))?;
        }
        Ok(())
    }))
}

/// The blocks of columns of x [n, count·q], one after another: [count, n·q].
fn apart(x: &Tensor, count: usize) -> Result<Tensor> {
    let (n, q) = (x.rows(), x.cols() / count);
    let mut y = Tensor::empty(&x.device(), x.dtype(), &[count, n * q])?;
    for i in 0..count {
        let to = y.make_mut()?.rows_in(i..i + 1).reshape(n, q);
        axpby(1.0, x.mat().cols_in(i * q..(i + 1) * q), 0.0, to)?;
    }
    Ok(y)
}

/// The opposite: `to` [n, count·q] becomes the blocks [count, n·q], plus β times what it was.
fn together(blocks: &Tensor, n: usize, beta: f64, mut to: MatMut) -> Result<()> {
    let (count, q) = (blocks.rows(), blocks.cols().checked_div(n).unwrap_or_default());
    for i in 0..count {
        let block = blocks.rows_in(i..i + 1).reshape(&[n, q]);
        axpby(1.0, block.mat(), beta, to.reborrow().cols_in(i * q..(i + 1) * q))?;
    }
    Ok(())
}
