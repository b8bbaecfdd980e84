use std::collections::BTreeMap;

use lora_kernels::Activation;

use super::{
    AdaLora, AdaLoraConfig, AdaLoraSchedule, Bias, Bottlenecks, Ia3, Ia3Config, InitLoraWeights, Layers, LoKr,
    LoKrConfig, Lora, LoraConfig, Modules, Pfeiffer, PreEmbed, PreLayer, Vera, VeraConfig, VirtualTokens,
};
use crate::{Result, Tensor};

/// Options from which the methods of the table are made; each reads those that its row names.
#[derive(Clone, Debug)]
pub struct Options {
    /// Rank r of low-rank updates.
    pub rank: usize,
    /// α: the update is scaled by α/r (or α/√r).
    pub alpha: f64,
    /// Dropout on the adapter's input.
    pub dropout: f64,
    /// Scale by α/√r (rank-stabilised LoRA, Kalajdzievski 2023).
    pub rslora: bool,
    /// What is adapted: PEFT's `target_modules`, or among names parts of a fused projection (`c_attn.q`); without any names
    /// the architecture's default.
    pub targets: Modules,
    /// What is not adapted, although a target says so.
    pub exclude_modules: Modules,
    /// The layers that are adapted; none: all of them.
    pub layers_to_transform: Vec<usize>,
    /// What stands before the number of a layer; none: anything.
    pub layers_pattern: Vec<String>,
    /// Ranks of modules that differ from `rank`.
    pub rank_pattern: Vec<(String, usize)>,
    /// α's of modules that differ from `alpha`.
    pub alpha_pattern: Vec<(String, f64)>,
    /// Among the targets of (IA)³ those whose inputs are multiplied.
    pub feedforward_modules: Modules,
    /// Modules of the base that train whole beside the method.
    pub modules_to_save: Vec<String>,
    /// Which biases of the base train beside LoRA.
    pub bias: Bias,
    /// DoRA on LoRA's targets.
    pub use_dora: bool,
    /// How LoRA's A and B begin.
    pub init_lora_weights: InitLoraWeights,
    /// Whether LoRA's weights are stored [in, out]; what is said has to agree with the base.
    pub fan_in_fan_out: Option<bool>,
    /// Width of the bottleneck of adapters.
    pub bottleneck: usize,
    /// What stands between its two maps; `None` is what the method's authors have there.
    pub non_linearity: Option<Activation>,
    /// Whether the base's normalisations train beside adapters: Houlsby et al. 2019 train them, the LoRA paper's counts
    /// leave them out, and so does the default.
    pub train_norms: bool,
    /// The layers that `top2` trains.
    pub layers: Layers,
    /// The layers that `adapter-d` leaves without an adapter; `None` is the lowest ⌊5·L/12⌋, five of RoBERTa base's
    /// twelve (Rücklé et al. 2021).
    pub drop_layers: Option<Layers>,
    /// Virtual tokens before the text.
    pub prefix: usize,
    /// Virtual tokens after the prompt.
    pub infix: usize,
    /// Whether the virtual tokens of `pre-layer` count as positions, as in PEFT; in AdapterHub they do not.
    pub count_prefix: bool,
    /// Whether a text is classified by the first virtual token of `pre-embed`, as in PEFT, rather than by its own first token.
    pub classify_prefix: bool,
    /// Width of the hidden layer that a prefix is reparametrised with; 0 is none.
    pub reparam: usize,
    /// Trained adapters that `fusion` combines.
    pub fuse: Vec<Frozen>,
    /// Whether LoKr factors both factors of its product.
    pub decompose_both: bool,
    /// One of LoKr's two factors of inputs and outputs, where it divides them; −1: near the square root.
    pub decompose_factor: i64,
    /// What the vector between VeRA's random matrices begins at.
    pub d_initial: f64,
    /// The seed of VeRA's random matrices.
    pub projection_prng_key: u64,
    /// Whether VeRA's random matrices are saved with it.
    pub save_projection: bool,
    /// VeRA's random matrices as they were saved; `None` draws them.
    pub projection: Option<[Tensor; 2]>,
    /// AdaLoRA's options but for those above.
    pub adalora: AdaLoraSchedule,
}

impl Default for Options {
    fn default() -> Options {
        let lora = LoraConfig::default();
        Options {
            rank: lora.rank,
            alpha: lora.alpha,
            dropout: lora.dropout,
            rslora: lora.rslora,
            targets: lora.targets,
            exclude_modules: lora.exclude_modules,
            layers_to_transform: lora.layers_to_transform,
            layers_pattern: lora.layers_pattern,
            rank_pattern: lora.rank_pattern,
            alpha_pattern: lora.alpha_pattern,
            feedforward_modules: Modules::default(),
            modules_to_save: lora.modules_to_save,
            bias: lora.bias,
            use_dora: lora.use_dora,
            init_lora_weights: lora.init_lora_weights,
            fan_in_fan_out: lora.fan_in_fan_out,
            bottleneck: 48,
            non_linearity: None,
            train_norms: false,
            layers: Layers::Last(2),
            drop_layers: None,
            prefix: 8,
            infix: 0,
            count_prefix: true,
            classify_prefix: false,
            reparam: 0,
            fuse: Vec::new(),
            decompose_both: false,
            decompose_factor: -1,
            d_initial: 0.1,
            projection_prng_key: 0,
            save_projection: true,
            projection: None,
            adalora: AdaLoraSchedule::default(),
        }
    }
}

/// An adapter that was trained before, and is combined with others.
#[derive(Clone, Debug)]
pub struct Frozen {
    /// Its name among them.
    pub name: String,
    /// Width of its bottleneck.
    pub bottleneck: usize,
    /// Its tensors, by the names that [`Adapted::adapter_tensors`](super::Adapted::adapter_tensors) gives them.
    pub tensors: BTreeMap<String, Tensor>,
}

impl From<&Options> for LoraConfig {
    fn from(o: &Options) -> Self {
        LoraConfig {
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
            bias: o.bias,
            use_dora: o.use_dora,
            init_lora_weights: o.init_lora_weights,
            fan_in_fan_out: o.fan_in_fan_out,
        }
    }
}

impl From<&LoraConfig> for Options {
    fn from(c: &LoraConfig) -> Self {
        let c = c.clone();
        Options {
            rank: c.rank,
            alpha: c.alpha,
            dropout: c.dropout,
            rslora: c.rslora,
            targets: c.targets,
            exclude_modules: c.exclude_modules,
            layers_to_transform: c.layers_to_transform,
            layers_pattern: c.layers_pattern,
            rank_pattern: c.rank_pattern,
            alpha_pattern: c.alpha_pattern,
            modules_to_save: c.modules_to_save,
            bias: c.bias,
            use_dora: c.use_dora,
            init_lora_weights: c.init_lora_weights,
            fan_in_fan_out: c.fan_in_fan_out,
            ..Options::default()
        }
    }
}

impl Options {
    /// The options of what a method has saved: a reparametrised prefix is saved flattened, and an adapter that began at a
    /// part of the base as one that began at zero ([`LoraConfig::saved`]).
    pub fn saved(&self) -> Options {
        let lora = LoraConfig::from(self).saved();
        Options {
            reparam: 0,
            rank: lora.rank,
            alpha: lora.alpha,
            rank_pattern: lora.rank_pattern,
            alpha_pattern: lora.alpha_pattern,
            init_lora_weights: lora.init_lora_weights,
            ..self.clone()
        }
    }

    fn virtual_tokens(&self) -> VirtualTokens {
        VirtualTokens { prefix: self.prefix, infix: self.infix, ..VirtualTokens::default() }
    }

    pub(super) fn lora(&self) -> Result<Lora> {
        Lora::new(LoraConfig::from(self))
    }

    pub(super) fn lokr(&self) -> Result<LoKr> {
        LoKr::new(LoKrConfig {
            rank: self.rank,
            alpha: self.alpha,
            targets: self.targets.clone(),
            exclude_modules: self.exclude_modules.clone(),
            layers_to_transform: self.layers_to_transform.clone(),
            layers_pattern: self.layers_pattern.clone(),
            rank_pattern: self.rank_pattern.clone(),
            alpha_pattern: self.alpha_pattern.clone(),
            modules_to_save: self.modules_to_save.clone(),
            decompose_both: self.decompose_both,
            decompose_factor: self.decompose_factor,
        })
    }

    pub(super) fn vera(&self) -> Result<Vera> {
        Vera::new(VeraConfig {
            rank: self.rank,
            dropout: self.dropout,
            targets: self.targets.clone(),
            layers_to_transform: self.layers_to_transform.clone(),
            layers_pattern: self.layers_pattern.clone(),
            modules_to_save: self.modules_to_save.clone(),
            d_initial: self.d_initial,
            projection_prng_key: self.projection_prng_key,
            save_projection: self.save_projection,
            projection: self.projection.clone(),
        })
    }

    pub(super) fn adalora(&self) -> Result<AdaLora> {
        AdaLora::new(AdaLoraConfig {
            schedule: self.adalora.clone(),
            alpha: self.alpha,
            dropout: self.dropout,
            targets: self.targets.clone(),
            exclude_modules: self.exclude_modules.clone(),
            layers_to_transform: self.layers_to_transform.clone(),
            layers_pattern: self.layers_pattern.clone(),
            modules_to_save: self.modules_to_save.clone(),
        })
    }

    pub(super) fn ia3(&self) -> Result<Ia3> {
        Ia3::new(&Ia3Config {
            targets: self.targets.clone(),
            exclude_modules: self.exclude_modules.clone(),
            feedforward_modules: self.feedforward_modules.clone(),
            modules_to_save: self.modules_to_save.clone(),
        })
    }

    pub(super) fn bottlenecks(&self) -> Result<Bottlenecks> {
        Bottlenecks::new(self.bottleneck, self.non_linearity, self.train_norms)
    }

    pub(super) fn pfeiffer(&self) -> Result<Pfeiffer> {
        Ok(Pfeiffer::new(self.bottlenecks()?))
    }

    pub(super) fn pre_embed(&self) -> Result<PreEmbed> {
        PreEmbed::new(VirtualTokens { classify: self.classify_prefix, ..self.virtual_tokens() })
    }

    pub(super) fn pre_layer(&self) -> Result<PreLayer> {
        let tokens = VirtualTokens { uncounted: !self.count_prefix, ..self.virtual_tokens() };
        PreLayer::new(tokens, self.reparam)
    }
}
