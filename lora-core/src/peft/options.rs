use std::collections::BTreeMap;

use super::{
    AdapterDrop, BitFit, Combined, Full, Fusion, Houlsby, Layers, Lin, Lora, LoraConfig, Method, Pfeiffer, PreEmbed,
    PreLayer, Top, VirtualTokens,
};
use crate::{Error, Result, Tensor};

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
    /// Module names, as PEFT's `target_modules`, or parts of a fused projection (`c_attn.q`); none: the architecture's
    /// default.
    pub targets: Vec<String>,
    /// Width of the bottleneck of adapters.
    pub bottleneck: usize,
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
    /// Width of the hidden layer that a prefix is reparametrised with; 0 is none.
    pub reparam: usize,
    /// Trained adapters that `fusion` combines.
    pub fuse: Vec<Frozen>,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            rank: 8,
            alpha: 16.0,
            dropout: 0.0,
            rslora: false,
            targets: Vec::new(),
            bottleneck: 48,
            train_norms: false,
            layers: Layers::Last(2),
            drop_layers: None,
            prefix: 8,
            infix: 0,
            reparam: 0,
            fuse: Vec::new(),
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
        LoraConfig { rank: o.rank, alpha: o.alpha, dropout: o.dropout, rslora: o.rslora, targets: o.targets.clone() }
    }
}

impl From<&LoraConfig> for Options {
    fn from(c: &LoraConfig) -> Self {
        let LoraConfig { rank, alpha, dropout, rslora, ref targets } = *c;
        Options { rank, alpha, dropout, rslora, targets: targets.clone(), ..Options::default() }
    }
}

impl Options {
    /// The options of what a method has saved: a reparametrised prefix is saved flattened.
    pub fn saved(&self) -> Options {
        Options { reparam: 0, ..self.clone() }
    }

    fn virtual_tokens(&self) -> VirtualTokens {
        VirtualTokens { prefix: self.prefix, infix: self.infix }
    }

    fn lora(&self) -> Result<Lora> {
        Lora::new(LoraConfig::from(self))
    }

    fn pfeiffer(&self) -> Result<Pfeiffer> {
        Pfeiffer::new(self.bottleneck, self.train_norms)
    }

    fn pre_embed(&self) -> Result<PreEmbed> {
        PreEmbed::new(self.virtual_tokens())
    }

    fn pre_layer(&self) -> Result<PreLayer> {
        PreLayer::new(self.virtual_tokens(), self.reparam)
    }
}

/// One row of the table of methods.
pub struct MethodRow {
    /// The name on the command line.
    pub name: &'static str,
    /// What it trains, in a line.
    pub about: &'static str,
    /// The options that it reads, by their names on the command line.
    pub options: &'static [&'static str],
    /// Whether its result is a whole model, because all of it trains; else it is an adapter beside the base.
    pub whole_model: bool,
    /// Makes the method; refuses options that make no sense on any model.
    pub build: fn(&Options) -> Result<Box<dyn Method>>,
}

const LORA: [&str; 5] = ["rank", "alpha", "dropout", "rslora", "targets"];
const ADAPTER: [&str; 2] = ["bottleneck", "train-norms"];

/// All methods. The command line, the tests and the comparison tables iterate over this.
pub const METHODS: &[MethodRow] = &[
    MethodRow {
        name: "lora",
        about: "a low-rank update s·B·A beside frozen projections (Hu et al. 2021)",
        options: &LORA,
        whole_model: false,
        build: |o| Ok(Box::new(o.lora()?)),
    },
    MethodRow {
        name: "full",
        about: "every weight of the base",
        options: &[],
        whole_model: true,
        build: |_| Ok(Box::new(Full)),
    },
    MethodRow {
        name: "top2",
        about: "the last two layers, or those of --layers (FT_Top2)",
        options: &["layers"],
        whole_model: false,
        build: |o| Ok(Box::new(Top::new(o.layers.clone())?)),
    },
    MethodRow {
        name: "bitfit",
        about: "all biases (Ben Zaken et al. 2022)",
        options: &[],
        whole_model: false,
        build: |_| Ok(Box::new(BitFit)),
    },
    MethodRow {
        name: "adapter-h",
        about: "bottlenecks after attention and MLP (Houlsby et al. 2019)",
        options: &ADAPTER,
        whole_model: false,
        build: |o| Ok(Box::new(Houlsby::new(o.bottleneck, o.train_norms)?)),
    },
    MethodRow {
        name: "adapter-l",
        about: "bottlenecks with a LayerNorm of their own after the MLP (Lin et al. 2020)",
        options: &ADAPTER,
        whole_model: false,
        build: |o| Ok(Box::new(Lin::new(o.bottleneck, o.train_norms)?)),
    },
    MethodRow {
        name: "adapter-p",
        about: "bottlenecks after the MLP (Pfeiffer et al. 2021)",
        options: &ADAPTER,
        whole_model: false,
        build: |o| Ok(Box::new(o.pfeiffer()?)),
    },
    MethodRow {
        name: "adapter-d",
        about: "those of adapter-p, but none in some layers (AdapterDrop, Rücklé et al. 2021)",
        options: &["bottleneck", "train-norms", "drop-layers"],
        whole_model: false,
        build: |o| Ok(Box::new(AdapterDrop::new(o.pfeiffer()?, o.drop_layers.clone())?)),
    },
    MethodRow {
        name: "fusion",
        about: "attention over several trained adapters of adapter-p (AdapterFusion, Pfeiffer et al. 2021)",
        options: &["fuse"],
        whole_model: false,
        build: |o| Ok(Box::new(Fusion::new(o.fuse.clone())?)),
    },
    MethodRow {
        name: "pre-embed",
        about: "embeddings of virtual tokens (prompt tuning, Lester et al. 2021)",
        options: &["prefix", "infix"],
        whole_model: false,
        build: |o| Ok(Box::new(o.pre_embed()?)),
    },
    MethodRow {
        name: "pre-layer",
        about: "keys and values of virtual tokens in every layer (prefix tuning, Li and Liang 2021)",
        options: &["prefix", "infix", "reparam"],
        whole_model: false,
        build: |o| Ok(Box::new(o.pre_layer()?)),
    },
    MethodRow {
        name: "lora+pre-embed",
        about: "LoRA with embeddings of virtual tokens",
        options: &["rank", "alpha", "dropout", "rslora", "targets", "prefix", "infix"],
        whole_model: false,
        build: |o| Ok(Box::new(Combined::new("lora+pre-embed", o.lora()?, o.pre_embed()?))),
    },
    MethodRow {
        name: "lora+pre-layer",
        about: "LoRA with keys and values of virtual tokens",
        options: &["rank", "alpha", "dropout", "rslora", "targets", "prefix", "infix", "reparam"],
        whole_model: false,
        build: |o| Ok(Box::new(Combined::new("lora+pre-layer", o.lora()?, o.pre_layer()?))),
    },
];

/// The row with that name.
pub fn find(name: &str) -> Result<&'static MethodRow> {
    METHODS.iter().find(|m| m.name == name).ok_or_else(|| Error::Option {
        option: "method",
        value: name.into(),
        why: format!("known methods are {}", METHODS.iter().map(|m| m.name).collect::<Vec<_>>().join(", ")),
    })
}
