use super::{BaseTensor, Method, Modules, Outline, selection::Matcher, whole::WholeModules};
use crate::{Error, Result};

/// LN tuning (Zhao et al. 2023, "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning"): gains and
/// biases of normalisations train.
///
/// Which ones is PEFT's `target_modules`: names, or a regular expression. Without any these are PEFT's for the architecture,
/// and all of them where PEFT has none.
#[derive(Clone, Debug)]
pub struct LnTuning {
    targets: Matcher,
    is_default: bool,
    exclude: Matcher,
    whole: WholeModules,
}

/// PEFT's targets for architectures that it has some for.
const DEFAULTS: [(&str, &[&str]); 5] = [
    ("gpt2", &["ln_1", "ln_2", "ln_f"]),
    ("llama", &["input_layernorm", "post_attention_layernorm", "norm"]),
    ("mistral", &["input_layernorm", "post_attention_layernorm", "norm"]),
    ("qwen2", &["post_attention_layernorm"]),
    ("qwen3", &["post_attention_layernorm"]),
];

impl LnTuning {
    /// Of these modules but for those, with others that train whole.
    ///
    /// # Errors
    /// [`Error::Option`] for what names nothing.
    pub fn new(targets: &Modules, exclude_modules: &Modules, modules_to_save: &[String]) -> Result<LnTuning> {
        for (option, modules) in [("targets", targets), ("exclude-modules", exclude_modules)] {
            if *modules == Modules::AllLinear {
                let why = "linear maps are no normalisations; name those, such as ln_f".into();
                return Err(Error::Option { option, value: modules.to_string(), why });
            }
        }
        Ok(LnTuning {
            targets: Matcher::new("targets", targets)?,
            is_default: targets.is_default(),
            exclude: Matcher::new("exclude-modules", exclude_modules)?,
            whole: WholeModules::new(modules_to_save)?,
        })
    }

    /// What trains on a base that looks like this when nothing is named.
    pub fn default_targets(outline: &Outline) -> Modules {
        match DEFAULTS.iter().find(|(architecture, _)| *architecture == outline.architecture) {
            Some((_, names)) => names.iter().copied().collect(),
            None => {
                let mut names: Vec<&str> = Vec::new();
                for tensor in outline.tensors.iter().filter(|t| t.norm) {
                    let module = tensor.name.rsplit_once('.').map_or("", |(module, _)| module);
                    let name = module.rsplit('.').next().unwrap_or_default();
                    if !names.contains(&name) {
                        names.push(name);
                    }
                }
                names.into_iter().collect()
            }
        }
    }

    fn is_target(&self, module: &str, outline: &Outline) -> Result<bool> {
        let named = match self.is_default {
            true => Matcher::new("targets", &LnTuning::default_targets(outline))?.matches(module)?,
            false => self.targets.matches(module)?,
        };
        Ok(named && !self.exclude.matches(module)?)
    }
}

impl Method for LnTuning {
    fn name(&self) -> &'static str {
        "ln-tuning"
    }

    fn trains(&self, tensor: &BaseTensor, outline: &Outline) -> bool {
        let module = tensor.name.rsplit_once('.').map_or("", |(module, _)| module);
        tensor.norm && self.is_target(module, outline).unwrap_or(false) || self.whole.trains(&tensor.name)
    }

    fn check(&self, outline: &Outline) -> Result<()> {
        let norms: Vec<&str> = outline.modules_of(|t| t.norm).collect();
        let mut matched = false;
        for module in outline.modules_of(|_| true) {
            let is_norm = norms.contains(&module);
            if !self.is_target(module, outline)? || outline.is_saved_module(&format!("{module}.")) {
                continue;
            }
            if !is_norm {
                let why = "it is no normalisation; name those alone".into();
                return Err(Error::Option { option: "targets", value: module.into(), why });
            }
            matched = true;
        }
        if !matched {
            let mut modules: Vec<String> = norms.iter().map(|m| (*m).to_owned()).collect();
            modules.dedup();
            let target = match &self.targets {
                Matcher::Names(names) => names.join(","),
                Matcher::Regex(regex) => regex.text().into(),
                Matcher::AllLinear => String::new(),
            };
            return Err(Error::NoSuchTarget { target, modules });
        }
        self.exclude.check_excludes(outline)?;
        self.whole.check(outline)
    }
}
