use super::{BaseTensor, Method, Outline};

/// BitFit (Ben Zaken et al. 2022): all biases train, those of normalisations included, and nothing else but a
/// classifier's head.
///
/// On RoBERTa base these are 102,144 scalars besides the head. An architecture without biases has nothing to train.
#[derive(Clone, Copy, Debug)]
pub struct BitFit;

impl Method for BitFit {
    fn name(&self) -> &'static str {
        "bitfit"
    }

    fn trains(&self, tensor: &BaseTensor, _outline: &Outline) -> bool {
        tensor.is_bias()
    }
}
