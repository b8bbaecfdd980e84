use lora_kernels::Activation;

use super::{BaseTensor, Outline, Part, Plan, Site, SiteKind};
use crate::{Error, Init, ParamId, Result, Tape, Var, lowrank::Layout, ops};

/// What all methods with bottlenecks read.
#[derive(Clone, Copy, Debug)]
pub struct Bottlenecks {
    /// Width r of the bottleneck.
    width: usize,
    /// What stands between its two maps, where it is not what the method's authors have there.
    non_linearity: Option<Activation>,
    /// Whether the base's normalisations train.
    train_norms: bool,
}

impl Bottlenecks {
    /// Bottlenecks of this width; `non_linearity`: another than the method's; `train_norms`: the base's normalisations train
    /// too.
    ///
    /// # Errors
    /// [`Error::Option`] for a width of 0, and for an absurd one.
    pub fn new(width: usize, non_linearity: Option<Activation>, train_norms: bool) -> Result<Bottlenecks> {
        match width {
            0 => Err(refused(0, "a bottleneck has at least one unit; 48 is usual".into())),
            _ if width > MOST => Err(refused(width, format!("a bottleneck has at most {MOST} units; 48 is usual"))),
            _ => Ok(Bottlenecks { width, non_linearity, train_norms }),
        }
    }

    /// Whether the base's tensor trains beside the adapters.
    pub(super) fn trains(&self, tensor: &BaseTensor) -> bool {
        self.train_norms && tensor.norm
    }

    /// That the base has sublayers.
    pub(super) fn check(&self, method: &str, outline: &Outline) -> Result<()> {
        outline.needs(method, SUBLAYERS, |k| matches!(k, SiteKind::Sublayer { .. }))
    }

    /// A bottleneck at a site of this width, with matrices that begin as `init` says and biases of zero; `own` is the method's
    /// nonlinearity.
    pub(super) fn add(&self, plan: &mut Plan, site: &Site, width: usize, own: Activation, init: Init) -> Bottleneck {
        let kind = self.non_linearity.unwrap_or(own);
        let (d, r) = (width, self.width);
        let mut map = |name: &str, shape: [usize; 2]| {
            let w = plan.add(format!("{}.{name}.weight", site.name), &shape, init.clone());
            [w, plan.add(format!("{}.{name}.bias", site.name), &shape[..1], Init::Zeros)]
        };
        Bottleneck { down: map("adapter_down", [r, d]), up: map("adapter_up", [d, r]), kind }
    }
}

/// The nonlinearity of that name, by Hugging Face's.
///
/// # Errors
/// [`Error::Option`] with the names that there are.
pub fn non_linearity(name: &str) -> Result<Activation> {
    Activation::from_hf(name).ok_or_else(|| Error::Option {
        option: "non-linearity",
        value: name.into(),
        why: "a bottleneck has relu, gelu, gelu_new (its approximation by tanh), silu (also called swish) or tanh"
            .into(),
    })
}

/// Units beyond which a width is a mistake, and must not end in an allocation.
const MOST: usize = 1 << 20;

/// What an architecture without sites for adapters lacks.
pub(super) const SUBLAYERS: &str = "sublayers that an adapter could follow";

fn refused(width: usize, why: String) -> Error {
    Error::Option { option: "bottleneck", value: width.to_string(), why }
}

/// The width of the stream at a site where a sublayer of this kind joins it.
pub(super) fn sublayer(site: &Site, wanted: Part) -> Option<usize> {
    match site.kind {
        SiteKind::Sublayer { part, width } if part == wanted => Some(width),
        _ => None,
    }
}

/// W_up·act(W_down·x + b_down) + b_up, with W_down [r, d] and W_up [d, r].
#[derive(Debug)]
pub(super) struct Bottleneck {
    down: [ParamId; 2],
    up: [ParamId; 2],
    kind: Activation,
}

impl Bottleneck {
    pub(super) fn apply(&self, t: &mut Tape, x: &Var) -> Result<Var> {
        let map = |t: &Tape, [w, b]: [ParamId; 2]| -> Result<[Var; 2]> { Ok([t.param(w)?, t.param(b)?]) };
        let maps = [map(t, self.down)?, map(t, self.up)?];
        apply(t, x, &maps, self.kind)
    }

    /// Its parameters.
    pub(super) fn ids(&self) -> [ParamId; 4] {
        let ([a, b], [c, d]) = (self.down, self.up);
        [a, b, c, d]
    }
}

/// A bottleneck of given maps, each a matrix and a bias.
pub(super) fn apply(t: &mut Tape, x: &Var, [down, up]: &[[Var; 2]; 2], kind: Activation) -> Result<Var> {
    let h = ops::linear(t, x, &down[0], Layout::OutIn, Some(&down[1]))?;
    let h = ops::activation(t, kind, &h)?;
    ops::linear(t, &h, &up[0], Layout::OutIn, Some(&up[1]))
}
