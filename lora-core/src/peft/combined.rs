use super::{Attached, BaseTensor, Budget, Method, Outline, Plan, Site, Start};
use crate::{Error, Result};

/// Two methods at once, at places of their own: LoRA with prefix tokens, as in the LoRA paper's section on combinations
/// (LoRA+PE and LoRA+PL, appendix E). Two that attach something at the same site, or that both cut ranks while they train,
/// are refused where they are applied ([`Error::DoesNotFit`]).
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

    fn refuse(&self, outline: &Outline, both: impl std::fmt::Display) -> Error {
        let [a, b] = [0, 1].map(|i| self.methods[i].name());
        let why = format!("{a} and {b} {both}");
        Error::DoesNotFit { method: self.name.into(), architecture: outline.architecture.clone(), why }
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
        match (self.methods[0].attach(site, plan)?, self.methods[1].attach(site, plan)?) {
            (Some(_), Some(_)) => Err(self.refuse(plan.outline(), format_args!("both adapt {}", site.name))),
            (first, second) => Ok(first.or(second)),
        }
    }

    fn budget(&self, outline: &Outline) -> Result<Option<Budget>> {
        match (self.methods[0].budget(outline)?, self.methods[1].budget(outline)?) {
            (Some(_), Some(_)) => Err(self.refuse(outline, "both cut ranks while they train")),
            (first, second) => Ok(first.or(second)),
        }
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
