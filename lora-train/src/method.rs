//! The options of methods in a run's configuration: made into a method, and taken over from an adapter.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use lora_core::peft::{self, Bias, InitLoraWeights, Layers, Modules};
use lora_kernels::Activation;
use lora_model::adapter::AdapterFile;

use crate::{Error, Result, TrainConfig};

impl TrainConfig {
    /// The method, with its options checked as far as they can be without a model.
    ///
    /// # Errors
    /// An unknown method, an option that makes no sense for it; adapters to combine that cannot be read.
    pub fn method_options(&self) -> Result<Box<dyn peft::Method>> {
        Ok((self.row()?.build)(&self.options()?)?)
    }

    /// The options of methods.
    ///
    /// # Errors
    /// Layers that cannot be read; adapters to combine that cannot be read.
    pub fn options(&self) -> Result<peft::Options> {
        let drop_layers = self.drop_layers.as_deref().map(|t| Layers::parse("drop-layers", t)).transpose()?;
        Ok(peft::Options {
            rank: self.rank,
            alpha: self.alpha,
            dropout: self.dropout,
            rslora: self.rslora,
            targets: self.targets.clone(),
            exclude_modules: self.exclude_modules.clone(),
            layers_to_transform: self.layers_to_transform.clone(),
            layers_pattern: self.layers_pattern.clone(),
            rank_pattern: self.rank_pattern.clone(),
            alpha_pattern: self.alpha_pattern.clone(),
            modules_to_save: self.modules_to_save.clone(),
            bias: Bias::parse(&self.bias)?,
            use_dora: self.use_dora,
            init_lora_weights: self.init_lora_weights,
            fan_in_fan_out: self.fan_in_fan_out,
            feedforward_modules: self.feedforward_modules.clone(),
            bottleneck: self.bottleneck,
            non_linearity: self.non_linearity.as_deref().map(peft::non_linearity).transpose()?,
            train_norms: self.train_norms,
            layers: Layers::parse("layers", &self.layers)?,
            drop_layers,
            prefix: self.prefix,
            infix: self.infix,
            count_prefix: self.count_prefix,
            classify_prefix: self.classify_prefix,
            reparam: self.reparam,
            decompose_both: self.decompose_both,
            decompose_factor: self.decompose_factor,
            d_initial: self.d_initial,
            projection_prng_key: self.projection_prng_key,
            save_projection: self.save_projection,
            projection: None,
            adalora: peft::AdaLoraSchedule {
                init_r: self.init_r,
                target_r: self.target_r,
                tinit: self.tinit,
                tfinal: self.tfinal,
                delta_t: self.delta_t,
                total_step: self.total_step,
                beta1: self.adalora_beta1,
                beta2: self.adalora_beta2,
                orth_reg_weight: self.orth_reg_weight,
                kept: BTreeMap::new(),
            },
            fuse: if self.reads("fuse")? { self.frozen()? } else { Vec::new() },
        })
    }

    /// Whether the method reads this option.
    fn reads(&self, option: &str) -> Result<bool> {
        Ok(self.row()?.options.contains(&option))
    }

    /// The adapters to combine, each by the name of its folder; of a fusion that training starts from, those that are in it.
    fn frozen(&self) -> Result<Vec<peft::Frozen>> {
        const OPTION: &str = "fuse";
        if let (Some(dir), true) = (&self.init_adapter, self.fuse.is_empty()) {
            return Ok(lora_model::adapter::load(dir)?.options.fuse);
        }
        let mut all: Vec<peft::Frozen> = Vec::new();
        for dir in &self.fuse {
            let refuse = |why: String| Err(Error::option(OPTION, dir.display(), why));
            let adapter = lora_model::adapter::load(dir)?;
            if !["adapter-p", "adapter-d"].contains(&adapter.method) {
                return refuse(format!(
                    "it was trained with {}; adapters of adapter-p can be combined",
                    adapter.method
                ));
            }
            // What adapter-p has by itself may be said or not.
            if let Some(kind) = adapter.options.non_linearity.filter(|kind| *kind != Activation::Relu) {
                return refuse(format!("its bottlenecks have {}; those of relu can be combined", kind.hf_name()));
            }
            let name = dir.file_name().map(|n| n.to_string_lossy().replace('.', "_")).unwrap_or_default();
            if name.is_empty() || all.iter().any(|a| a.name == name) {
                return refuse("the folders need names of their own, by which the adapters are told apart".into());
            }
            all.push(peft::Frozen { name, bottleneck: adapter.options.bottleneck, tensors: adapter.tensors });
        }
        Ok(all)
    }

    /// Takes over what the adapter in `dir` has settled, and refuses to contradict it where a key was `given`.
    pub(crate) fn adopt(&mut self, dir: &Path, adapter: &AdapterFile, given: impl Fn(&str) -> bool) -> Result<()> {
        let conflict = |option, ours: String, theirs: String| {
            let why = format!("the adapter {} has {theirs}; leave the option out, or start without it", dir.display());
            Err(Error::option(option, ours, why))
        };
        if given("method") && self.method != adapter.method {
            if self.row()?.whole_model {
                return Err(Error::option(
                    "init-adapter",
                    dir.display(),
                    format!("method {} has no adapter", self.method),
                ));
            }
            return conflict("method", self.method.clone(), adapter.method.into());
        }
        self.method = adapter.method.into();
        let adapters = TrainConfig::default().with_options(&adapter.options);
        for option in self.row()?.options {
            if *option == "fuse" && given(option) && !self.fuse.is_empty() {
                let names = |all: Vec<&str>| all.join(",");
                let ours = names(self.fuse.iter().filter_map(|p| p.to_str()).collect());
                return conflict(option, ours, names(adapter.options.fuse.iter().map(|f| f.name.as_str()).collect()));
            }
            // What a fusion combines stays in its own folder, how weights are stored is the base's to say, and how long a run
            // is, its own.
            if *option == "total-step" || *option == "fuse" || OF_TRAINING.contains(option) && given(option) {
                continue;
            }
            let (ours, theirs) = (self.shown(option), adapters.shown(option));
            if given(option) && ours != theirs {
                return conflict(option, ours, theirs);
            }
            self.take(option, &adapters);
        }
        Ok(())
    }

    /// The same with these options of methods, apart from adapters to combine.
    pub fn with_options(self, o: &peft::Options) -> TrainConfig {
        TrainConfig {
            rank: o.rank,
            alpha: o.alpha,
            dropout: o.dropout,
            rslora: o.rslora,
            targets: o.targets.clone(),
            exclude_modules: o.exclude_modules.clone(),
            layers_to_transform: o.layers_to_transform.clone(),
            layers_pattern: o.layers_pattern.clone(),
            rank_pattern: o.rank_pattern.clone(),
            alpha_pattern: o.alpha_pattern.clone(),
            modules_to_save: o.modules_to_save.clone(),
            bias: o.bias.word().into(),
            use_dora: o.use_dora,
            init_lora_weights: o.init_lora_weights,
            fan_in_fan_out: o.fan_in_fan_out,
            feedforward_modules: o.feedforward_modules.clone(),
            bottleneck: o.bottleneck,
            non_linearity: o.non_linearity.map(|kind| kind.hf_name().to_owned()),
            train_norms: o.train_norms,
            layers: o.layers.to_string(),
            drop_layers: o.drop_layers.as_ref().map(Layers::to_string),
            prefix: o.prefix,
            infix: o.infix,
            count_prefix: o.count_prefix,
            classify_prefix: o.classify_prefix,
            reparam: o.reparam,
            decompose_both: o.decompose_both,
            decompose_factor: o.decompose_factor,
            d_initial: o.d_initial,
            projection_prng_key: o.projection_prng_key,
            save_projection: o.save_projection,
            init_r: o.adalora.init_r,
            target_r: o.adalora.target_r,
            tinit: o.adalora.tinit,
            tfinal: o.adalora.tfinal,
            delta_t: o.adalora.delta_t,
            total_step: o.adalora.total_step,
            adalora_beta1: o.adalora.beta1,
            adalora_beta2: o.adalora.beta2,
            orth_reg_weight: o.adalora.orth_reg_weight,
            ..self
        }
    }
}

/// The options of methods: each one's field, and how it is told in comparisons and messages.
macro_rules! options {
    ($($option:literal: $field:ident, $told:expr;)*) => {
        impl TrainConfig {
            /// An option of methods, for comparison and messages.
            fn shown(&self, option: &str) -> String {
                match option {
                    $($option => $told(&self.$field),)*
                    other => panic!("an option of a method that the configuration does not know: {other}"),
                }
            }

            /// Takes an option of methods from another configuration.
            fn take(&mut self, option: &str, from: &TrainConfig) {
                match option {
                    $($option => self.$field.clone_from(&from.$field),)*
                    other => panic!("an option of a method that the configuration does not know: {other}"),
                }
            }
        }
    };
}

options! {
    "rank": rank, usize::to_string;
    "alpha": alpha, f64::to_string;
    "dropout": dropout, f64::to_string;
    "rslora": rslora, bool::to_string;
    "targets": targets, modules;
    "exclude-modules": exclude_modules, modules;
    "layers-to-transform": layers_to_transform, |layers: &Vec<usize>| Layers::Of(layers.clone()).to_string();
    "layers-pattern": layers_pattern, |names: &Vec<String>| names.join(",");
    "rank-pattern": rank_pattern, pattern;
    "alpha-pattern": alpha_pattern, pattern;
    "modules-to-save": modules_to_save, listed;
    "bias": bias, String::clone;
    "use-dora": use_dora, bool::to_string;
    "init-lora-weights": init_lora_weights, |init: &InitLoraWeights| init.word();
    "fan-in-fan-out": fan_in_fan_out, |given: &Option<bool>| given.map_or("the base's".into(), |b| b.to_string());
    "feedforward-modules": feedforward_modules, modules;
    "bottleneck": bottleneck, usize::to_string;
    "non-linearity": non_linearity, non_linearity;
    "train-norms": train_norms, bool::to_string;
    "layers": layers, |text: &String| layers(text);
    "drop-layers": drop_layers, |given: &Option<String>| given.as_deref().map_or("the default".into(), layers);
    "prefix": prefix, usize::to_string;
    "infix": infix, usize::to_string;
    "count-prefix": count_prefix, bool::to_string;
    "classify-prefix": classify_prefix, bool::to_string;
    "reparam": reparam, usize::to_string;
    "decompose-both": decompose_both, bool::to_string;
    "decompose-factor": decompose_factor, i64::to_string;
    "d-initial": d_initial, f64::to_string;
    "projection-prng-key": projection_prng_key, u64::to_string;
    "save-projection": save_projection, bool::to_string;
    "init-r": init_r, usize::to_string;
    "target-r": target_r, usize::to_string;
    "tinit": tinit, u64::to_string;
    "tfinal": tfinal, u64::to_string;
    "delta-t": delta_t, u64::to_string;
    "total-step": total_step, |given: &Option<u64>| given.map_or("that of the run".into(), |n| n.to_string());
    "adalora-beta1": adalora_beta1, f64::to_string;
    "adalora-beta2": adalora_beta2, f64::to_string;
    "orth-reg-weight": orth_reg_weight, f64::to_string;
}

/// Options that an adapter may train on with other values of.
const OF_TRAINING: [&str; 8] =
    ["dropout", "fan-in-fan-out", "tinit", "tfinal", "delta-t", "adalora-beta1", "adalora-beta2", "orth-reg-weight"];

/// Module names, which mean the same in any order.
fn modules(modules: &Modules) -> String {
    match modules {
        Modules::Names(names) => listed(names),
        other => other.to_string(),
    }
}

fn listed(names: &[String]) -> String {
    names.iter().map(String::as_str).collect::<BTreeSet<_>>().into_iter().collect::<Vec<_>>().join(",")
}

fn layers(text: &str) -> String {
    Layers::parse("layers", text).map_or(text.to_owned(), |layers| layers.to_string())
}

fn non_linearity(name: &Option<String>) -> String {
    let known = |name: &str| peft::non_linearity(name).map_or(name.to_owned(), |kind| kind.hf_name().into());
    name.as_deref().map_or("the default".into(), known)
}

fn pattern<T: ToString>(pattern: &[(String, T)]) -> String {
    pattern.iter().map(|(key, value)| format!("{key}={}", value.to_string())).collect::<Vec<_>>().join(",")
}
