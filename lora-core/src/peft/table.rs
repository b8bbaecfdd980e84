use super::{AdapterDrop, BitFit, Combined, Full, Fusion, Houlsby, Lin, LnTuning, Method, Options, Top};
use crate::{Error, Result};

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

const LORA: [&str; 15] = [
    "rank",
    "alpha",
    "dropout",
    "rslora",
    "targets",
    "exclude-modules",
    "layers-to-transform",
    "layers-pattern",
    "rank-pattern",
    "alpha-pattern",
    "modules-to-save",
    "bias",
    "use-dora",
    "init-lora-weights",
    "fan-in-fan-out",
];
const LOKR: [&str; 11] = [
    "rank",
    "alpha",
    "targets",
    "exclude-modules",
    "layers-to-transform",
    "layers-pattern",
    "rank-pattern",
    "alpha-pattern",
    "modules-to-save",
    "decompose-both",
    "decompose-factor",
];
const VERA: [&str; 9] = [
    "rank",
    "dropout",
    "targets",
    "layers-to-transform",
    "layers-pattern",
    "modules-to-save",
    "d-initial",
    "projection-prng-key",
    "save-projection",
];
const ADALORA: [&str; 16] = [
    "init-r",
    "target-r",
    "alpha",
    "dropout",
    "targets",
    "exclude-modules",
    "layers-to-transform",
    "layers-pattern",
    "modules-to-save",
    "tinit",
    "tfinal",
    "delta-t",
    "total-step",
    "adalora-beta1",
    "adalora-beta2",
    "orth-reg-weight",
];
const PRE_EMBED: [&str; 3] = ["prefix", "infix", "classify-prefix"];
const PRE_LAYER: [&str; 4] = ["prefix", "infix", "reparam", "count-prefix"];
const ADAPTER: [&str; 3] = ["bottleneck", "non-linearity", "train-norms"];

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
        name: "ia3",
        about: "vectors that multiply keys, values and the MLP's inner units (Liu et al. 2022)",
        options: &["targets", "exclude-modules", "feedforward-modules", "modules-to-save"],
        whole_model: false,
        build: |o| Ok(Box::new(o.ia3()?)),
    },
    MethodRow {
        name: "ln-tuning",
        about: "gains and biases of normalisations (Zhao et al. 2023)",
        options: &["targets", "exclude-modules", "modules-to-save"],
        whole_model: false,
        build: |o| Ok(Box::new(LnTuning::new(&o.targets, &o.exclude_modules, &o.modules_to_save)?)),
    },
    MethodRow {
        name: "lokr",
        about: "a Kronecker product s·(W1 ⊗ W2) beside frozen projections (Yeh et al. 2023)",
        options: &LOKR,
        whole_model: false,
        build: |o| Ok(Box::new(o.lokr()?)),
    },
    MethodRow {
        name: "vera",
        about: "vectors around one pair of random matrices that all projections share (Kopiczko et al. 2023)",
        options: &VERA,
        whole_model: false,
        build: |o| Ok(Box::new(o.vera()?)),
    },
    MethodRow {
        name: "adalora",
        about: "an update s·B·(E ∘ A) that loses the ranks that matter least (Zhang et al. 2023)",
        options: &ADALORA,
        whole_model: false,
        build: |o| Ok(Box::new(o.adalora()?)),
    },
    MethodRow {
        name: "adapter-h",
        about: "bottlenecks after attention and MLP (Houlsby et al. 2019)",
        options: &ADAPTER,
        whole_model: false,
        build: |o| Ok(Box::new(Houlsby::new(o.bottlenecks()?))),
    },
    MethodRow {
        name: "adapter-l",
        about: "bottlenecks with a LayerNorm of their own after the MLP (Lin et al. 2020)",
        options: &ADAPTER,
        whole_model: false,
        build: |o| Ok(Box::new(Lin::new(o.bottlenecks()?))),
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
        options: &["bottleneck", "non-linearity", "train-norms", "drop-layers"],
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
        options: &PRE_EMBED,
        whole_model: false,
        build: |o| Ok(Box::new(o.pre_embed()?)),
    },
    MethodRow {
        name: "pre-layer",
        about: "keys and values of virtual tokens in every layer (prefix tuning, Li and Liang 2021)",
        options: &PRE_LAYER,
        whole_model: false,
        build: |o| Ok(Box::new(o.pre_layer()?)),
    },
    MethodRow {
        name: "lora+pre-embed",
        about: "LoRA with embeddings of virtual tokens",
        options: &joined::<18>(&LORA, &PRE_EMBED),
        whole_model: false,
        build: |o| Ok(Box::new(Combined::new("lora+pre-embed", o.lora()?, o.pre_embed()?))),
    },
    MethodRow {
        name: "lora+pre-layer",
        about: "LoRA with keys and values of virtual tokens",
        options: &joined::<19>(&LORA, &PRE_LAYER),
        whole_model: false,
        build: |o| Ok(Box::new(Combined::new("lora+pre-layer", o.lora()?, o.pre_layer()?))),
    },
];

/// The options of two methods.
const fn joined<const N: usize>(a: &[&'static str], b: &[&'static str]) -> [&'static str; N] {
    assert!(a.len() + b.len() == N);
    let (mut all, mut i) = ([""; N], 0);
    while i < N {
        all[i] = if i < a.len() { a[i] } else { b[i - a.len()] };
        i += 1;
    }
    all
}

/// The row with that name.
pub fn find(name: &str) -> Result<&'static MethodRow> {
    METHODS.iter().find(|m| m.name == name).ok_or_else(|| Error::Option {
        option: "method",
        value: name.into(),
        why: format!("known methods are {}", METHODS.iter().map(|m| m.name).collect::<Vec<_>>().join(", ")),
    })
}
