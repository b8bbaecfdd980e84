use super::{BaseTensor, Method, Outline};

/// Full fine-tuning: every weight of the base trains. The control that every other method is measured against.
#[derive(Clone, Copy, Debug)]
pub struct Full;

impl Method for Full {
    fn name(&self) -> &'static str {
        "full"
    }

    fn trains(&self, _tensor: &BaseTensor, _outline: &Outline) -> bool {
        true
    }
}
