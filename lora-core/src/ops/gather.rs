use lora_kernels::{Acc, gather as kernel, scatter};

use crate::{Result, Tape, Tensor, Var};

/// yᵢ = table\[idsᵢ\], with table [rows, d], ids \[n\] of u32, y [n, d]: an embedding, or the rows that carry a target.
/// y is of the type that [activations](lora_kernels::Device::activations) beside the table have.
///
/// Backward: dtable\[idsᵢ\] += dyᵢ, in the order of i.
///
/// # Panics
/// When an id is not a row of the table: who reads ids from a user checks them first.
pub fn gather(t: &mut Tape, table: &Var, ids: &Tensor) -> Result<Var> {
    let dtype = t.device().activations(table.value.dtype());
    let mut y = Tensor::empty(&t.device(), dtype, &[ids.len(), table.value.cols()])?;
    kernel(table.value.mat(), ids.mat(), Acc { to: y.make_mut()?, beta: 0.0 })?;
    let dtable = table.slot.map(|s| (s, table.value.shape().to_vec(), ids.clone()));
    Ok(t.record(y, dtable.is_some(), move |dy, g| {
        let Some((s, shape, ids)) = dtable else { return Ok(()) };
        g.add(s, &shape, &dy, |d| Ok(scatter(dy.mat(), ids.mat(), d)?))
    }))
}
