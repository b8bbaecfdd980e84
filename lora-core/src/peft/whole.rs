use super::{Outline, modules::saves};
use crate::{Error, Result};

/// Modules of the base that train whole beside a method, and are saved with it: PEFT's `modules_to_save`.
#[derive(Clone, Debug, Default)]
pub(super) struct WholeModules(Vec<String>);

const OPTION: &str = "modules-to-save";

impl WholeModules {
    /// # Errors
    /// [`Error::Option`] for an empty name.
    pub(super) fn new(modules: &[String]) -> Result<WholeModules> {
        match modules.iter().any(|m| m.trim().is_empty()) {
            true => refused(modules.join(","), "name at least one module, such as ln_f".into()),
            false => Ok(WholeModules(modules.to_vec())),
        }
    }

    /// Whether a tensor of the base trains.
    pub(super) fn trains(&self, tensor: &str) -> bool {
        self.0.iter().any(|module| saves(module, tensor))
    }

    /// Refuses modules that the base lacks, or whose weight is another module's too.
    pub(super) fn check(&self, outline: &Outline) -> Result<()> {
        for module in &self.0 {
            if !outline.tensors.iter().any(|t| saves(module, &t.name)) {
                let tied = outline.tied_embedding().map(|table| format!(" (the output head's matrix is {table})"));
                let why = "names no module of this model that has weights of its own";
                return refused(module.clone(), format!("{why}{}", tied.unwrap_or_default()));
            }
        }
        if let Some(table) = outline.tied_embedding().filter(|table| self.trains(table)) {
            let why = format!(
                "{table} is the matrix of the output head too; PEFT would train a copy of it and leave the head as it is, \
                 which is not done here"
            );
            return refused(self.0.join(","), why);
        }
        Ok(())
    }
}

fn refused<T>(value: String, why: String) -> Result<T> {
    Err(Error::Option { option: OPTION, value, why })
}
