use super::{Attached, BaseTensor, Method, Outline, Plan, Site, Start};
use crate::Result;

/// Two methods at once, at places of their own: LoRA with prefix tokens, as in the LoRA paper's section on combinations
/// (LoRA+PE and LoRA+PL, appendix E).
#[derive(Debug)]
pub struct Combined {
    name: &'static str,
    methods: [Box<dyn Method>; 2],
}

impl Combined {
    /// Both methods under one name.
    pub fn new(name: &'static str, first: impl Method + 'static, second: impl Method + 'static) -> Combined {
        Combined { name, methods: [Box::new(first), Box::new(second)] }
    }
}

impl Method for Combined {
    fn name(&self) -> &'static str {
        self.name
    }

    fn trains(&self, tensor: &BaseTensor, outline: &Outline) -> bool {
        self.methods.iter().any(|m| m.trains(tensor, outline))
    }

    fn check(&self, outline: &Outline) -> Result<()> {
        self.methods.iter().try_for_each(|m| m.check(outline))
    }

    fn attach(&self, site: &Site, plan: &mut Plan) -> Result<Option<Attached>> {
        for method in &self.methods {
            if let Some(attached) = method.attach(site, plan)? {
                return Ok(Some(attached));
            }
        }
        Ok(None)
    }

    fn start(&self) -> Start {
        let [a, b] = [self.methods[0].start(), self.methods[1].start()];
        match (a, b) {
            (Start::Base, other) | (other, Start::Base) => other,
            (Start::NearBase, other) | (other, Start::NearBase) => other,
            (Start::Elsewhere, Start::Elsewhere) => Start::Elsewhere,
        }
    }
}
