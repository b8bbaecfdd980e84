//! Finite differences: whether an operation's backward is the derivative of its forward.

use lora_kernels::DType;

use crate::{Grads, Params, Result, Tape, Tensor, Var};

/// The worst disagreement that [`gradcheck`] found.
#[derive(Clone, Debug, Default)]
pub struct Worst {
    /// |tape − difference| / max(1, |difference|).
    pub error: f64,
    /// Where: parameter, element, both derivatives.
    pub place: String,
    /// The largest |difference| of all: where every derivative is about 0, agreement says nothing.
    pub largest: f64,
}

/// Compares the tape's gradient of ⟨c, f(θ)⟩ with central differences, for every element of every parameter θ, where c is
/// a fixed vector without structure. The parameters must be f64: then a correct gradient agrees to about 1e-8, and the
/// kernels that run are the same generic code that runs in f32.
///
/// # Panics
/// When the parameters are not f64.
pub fn gradcheck<'m>(params: &Params, f: impl Fn(&mut Tape<'m>) -> Result<Var>) -> Result<Worst> {
    gradcheck_some(params, usize::MAX, f)
}

/// As [`gradcheck`], for at most `most` elements of each parameter, spread evenly over it: whole models have too many.
///
/// # Panics
/// When the parameters are not f64, or `most` is 0.
pub fn gradcheck_some<'m>(params: &Params, most: usize, f: impl Fn(&mut Tape<'m>) -> Result<Var>) -> Result<Worst> {
    assert_eq!(params.dtype(), DType::F64, "finite differences need f64");
    // The golden ratio's multiples modulo 1 are spread evenly and repeat no pattern of a shape.
    let weights = |n: usize| (0..n).map(|i| (i as f64 * 0.618_033_988_749_895).fract() - 0.45).collect::<Vec<_>>();
    let value = |p: &Params| -> Result<f64> {
        let y = f(&mut Tape::inference(p))?.into_value().to_vec::<f64>()?;
        Ok(y.iter().zip(weights(y.len())).map(|(y, c)| y * c).sum())
    };
    let mut tape = Tape::new(params);
    let y = f(&mut tape)?;
    let dy = Tensor::from_slice(&params.device(), y.value().shape(), &weights(y.value().len()))?;
    let mut grads = Grads::new(params)?;
    tape.backward_from(y, dy, &mut grads)?;

    let mut worst = Worst::default();
    for id in params.ids() {
        let values = params.tensor(id).to_vec::<f64>()?;
        let grad = grads.get(id)?.map(|g| g.to_vec::<f64>()).transpose()?.unwrap_or(vec![0.0; values.len()]);
        // An odd stride does not keep to the first columns of a matrix.
        let stride = if values.len() <= most { 1 } else { values.len().div_ceil(most) | 1 };
        for i in (0..values.len()).step_by(stride) {
            let h = 1e-5 * values[i].abs().max(1.0);
            let at = |v: f64| -> Result<f64> {
                let mut moved = values.clone();
                moved[i] = v;
                let mut p = params.clone();
                p.set(id, &Tensor::from_slice(&params.device(), params.shape(id), &moved)?)?;
                value(&p)
            };
            let difference = (at(values[i] + h)? - at(values[i] - h)?) / (2.0 * h);
            let error = (grad[i] - difference).abs() / difference.abs().max(1.0);
            worst.largest = worst.largest.max(difference.abs());
            if error > worst.error || error.is_nan() {
                worst.place = format!("{}[{i}]: tape {}, difference {difference}", params.name(id), grad[i]);
                worst.error = error;
            }
        }
    }
    Ok(worst)
}
