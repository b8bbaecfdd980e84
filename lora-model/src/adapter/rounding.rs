use std::collections::BTreeMap;

use half::{bf16, f16};
use lora_core::{Tensor, peft::Base};
use lora_kernels::DType;

use crate::Result;

/// What it costs a merged model's updates that its weights are rounded to 16 bits. An update is small beside its weight, so
/// it loses far more of itself than the weight does.
#[derive(Clone, Debug, PartialEq)]
pub struct Rounding {
    /// ‖round(W) − W‖ / ‖W − W₀‖ over all tensors that were changed: the share of the update that rounding is.
    pub share: f64,
    /// The tensor with the largest share, and that.
    pub worst: (String, f64),
    /// The largest |round(w) − w|.
    pub largest: f64,
}

/// The type's value next to x, ties to even.
fn rounded(x: f32, dtype: DType) -> f32 {
    match dtype {
        DType::Bf16 => bf16::from_f32(x).to_f32(),
        DType::F16 => f16::from_f32(x).to_f32(),
        _ => x,
    }
}

/// What rounding to `dtype` costs the tensors of a base that merging has `changed`; `None` where nothing was changed.
pub fn rounding(base: &dyn Base, changed: &BTreeMap<String, Tensor>, dtype: DType) -> Result<Option<Rounding>> {
    let (mut errors, mut updates, mut largest) = (0.0, 0.0, 0f64);
    let mut worst: Option<(String, f64)> = None;
    for (name, new) in changed {
        // An output head that shared the embeddings' matrix, and now has one of its own, is as it was.
        let Some(old) = base.tensor(name) else { continue };
        let [new, old] = [new.to_dtype(DType::F32)?, old.to_dtype(DType::F32)?].map(|t| t.to_vec::<f32>());
        let (mut error, mut update) = (0f64, 0f64);
        for (&w, &w0) in new?.iter().zip(&old?) {
            let off = f64::from(rounded(w, dtype)) - f64::from(w);
            error += off * off;
            update += (f64::from(w) - f64::from(w0)).powi(2);
            largest = largest.max(off.abs());
        }
        let share = (error / update).sqrt();
        if update > 0.0 && worst.as_ref().is_none_or(|(_, most)| share > *most) {
            worst = Some((name.clone(), share));
        }
        errors += error;
        updates += update;
    }
    Ok(worst.map(|worst| Rounding { share: (errors / updates).sqrt(), worst, largest }))
}
