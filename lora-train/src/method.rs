//! The options of methods in a run's configuration: made into a method, and taken over from an adapter.

use std::{collections::BTreeMap, path::Path};

use lora_core::peft::{self, Bias, Layers, Modules};
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

    /// An option of methods, for comparison and messages.
    fn shown(&self, option: &str) -> String {
        let layers = |text: &str| Layers::parse("layers", text).map_or(text.to_owned(), |l| l.to_string());
        // In any order they mean the same.
        let sorted = |list: &[String]| list.iter().cloned().collect::<std::collections::BTreeSet<_>>();
        let listed = |list: &[String]| sorted(list).into_iter().collect::<Vec<_>>().join(",");
        let modules = |modules: &Modules| match modules {
            Modules::Names(names) => listed(names),
            other => other.to_string(),
        };
        match option {
            "rank" => self.rank.to_string(),
            "alpha" => self.alpha.to_string(),
            "dropout" => self.dropout.to_string(),
            "rslora" => self.rslora.to_string(),
            "targets" => modules(&self.targets),
            "exclude-modules" => modules(&self.exclude_modules),
            "layers-to-transform" => Layers::Of(self.layers_to_transform.clone()).to_string(),
            "layers-pattern" => self.layers_pattern.join(","),
            "rank-pattern" => pattern(&self.rank_pattern),
            "alpha-pattern" => pattern(&self.alpha_pattern),
            "modules-to-save" => listed(&self.modules_to_save),
            "bias" => self.bias.clone(),
            "use-dora" => self.use_dora.to_string(),
            "init-lora-weights" => self.init_lora_weights.word(),
            "fan-in-fan-out" => self.fan_in_fan_out.map_or("the base's".into(), |b| b.to_string()),
            "feedforward-modules" => modules(&self.feedforward_modules),
            "bottleneck" => self.bottleneck.to_string(),
            "non-linearity" => {
                let known =
                    |name: &str| peft::non_linearity(name).map_or(name.to_owned(), |kind| kind.hf_name().into());
                self.non_linearity.as_deref().map_or("the default".into(), known)
            }
            "train-norms" => self.train_norms.to_string(),
            "layers" => layers(&self.layers),
            "drop-layers" => self.drop_layers.as_deref().map_or("the default".into(), layers),
            "prefix" => self.prefix.to_string(),
            "infix" => self.infix.to_string(),
            "count-prefix" => self.count_prefix.to_string(),
            "classify-prefix" => self.classify_prefix.to_string(),
            "reparam" => self.reparam.to_string(),
            "decompose-both" => self.decompose_both.to_string(),
            "decompose-factor" => self.decompose_factor.to_string(),
            "d-initial" => self.d_initial.to_string(),
            "projection-prng-key" => self.projection_prng_key.to_string(),
            "save-projection" => self.save_projection.to_string(),
            "init-r" => self.init_r.to_string(),
            "target-r" => self.target_r.to_string(),
            "tinit" => self.tinit.to_string(),
            "tfinal" => self.tfinal.to_string(),
            "delta-t" => self.delta_t.to_string(),
            "total-step" => self.total_step.map_or("that of the run".into(), |n| n.to_string()),
            "adalora-beta1" => self.adalora_beta1.to_string(),
            "adalora-beta2" => self.adalora_beta2.to_string(),
            "orth-reg-weight" => self.orth_reg_weight.to_string(),
            other => panic!("an option of a method that the configuration does not know: {other}"),
        }
    }

    /// Takes an option of methods from another configuration.
    fn take(&mut self, option: &str, from: &TrainConfig) {
        match option {
            "rank" => self.rank = from.rank,
            "alpha" => self.alpha = from.alpha,
            "dropout" => self.dropout = from.dropout,
            "rslora" => self.rslora = from.rslora,
            "targets" => self.targets.clone_from(&from.targets),
            "exclude-modules" => self.exclude_modules.clone_from(&from.exclude_modules),
            "layers-to-transform" => self.layers_to_transform.clone_from(&from.layers_to_transform),
            "layers-pattern" => self.layers_pattern.clone_from(&from.layers_pattern),
            "rank-pattern" => self.rank_pattern.clone_from(&from.rank_pattern),
            "alpha-pattern" => self.alpha_pattern.clone_from(&from.alpha_pattern),
            "modules-to-save" => self.modules_to_save.clone_from(&from.modules_to_save),
            "bias" => self.bias.clone_from(&from.bias),
            "use-dora" => self.use_dora = from.use_dora,
            "init-lora-weights" => self.init_lora_weights = from.init_lora_weights,
            "fan-in-fan-out" => self.fan_in_fan_out = from.fan_in_fan_out,
            "feedforward-modules" => self.feedforward_modules.clone_from(&from.feedforward_modules),
            "bottleneck" => self.bottleneck = from.bottleneck,
            "non-linearity" => self.non_linearity.clone_from(&from.non_linearity),
            "train-norms" => self.train_norms = from.train_norms,
            "layers" => self.layers.clone_from(&from.layers),
            "drop-layers" => self.drop_layers.clone_from(&from.drop_layers),
            "prefix" => self.prefix = from.prefix,
            "infix" => self.infix = from.infix,
            "count-prefix" => self.count_prefix = from.count_prefix,
            "classify-prefix" => self.classify_prefix = from.classify_prefix,
            "reparam" => self.reparam = from.reparam,
            "decompose-both" => self.decompose_both = from.decompose_both,
            "decompose-factor" => self.decompose_factor = from.decompose_factor,
            "d-initial" => self.d_initial = from.d_initial,
            "projection-prng-key" => self.projection_prng_key = from.projection_prng_key,
            "save-projection" => self.save_projection = from.save_projection,
            "init-r" => self.init_r = from.init_r,
            "target-r" => self.target_r = from.target_r,
            "tinit" => self.tinit = from.tinit,
            "tfinal" => self.tfinal = from.tfinal,
            "delta-t" => self.delta_t = from.delta_t,
            "total-step" => self.total_step = from.total_step,
            "adalora-beta1" => self.adalora_beta1 = from.adalora_beta1,
            "adalora-beta2" => self.adalora_beta2 = from.adalora_beta2,
            "orth-reg-weight" => self.orth_reg_weight = from.orth_reg_weight,
            other => panic!("an option of a method that the configuration does not know: {other}"),
        }
    }
}

/// Options that an adapter may train on with other values of.
const OF_TRAINING: [&str; 8] =
    ["dropout", "fan-in-fan-out", "tinit", "tfinal", "delta-t", "adalora-beta1", "adalora-beta2", "orth-reg-weight"];

fn pattern<T: ToString>(pattern: &[(String, T)]) -> String {
    pattern.iter().map(|(key, value)| format!("{key}={}", value.to_string())).collect::<Vec<_>>().join(",")
}
