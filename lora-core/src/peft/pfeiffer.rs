use std::collections::BTreeMap;

use lora_kernels::Activation;

use super::{
    Adapter, Attached, BaseTensor, Method, Norm, Outline, Part, Plan, Site, Start, SublayerAdapter,
    bottleneck::{Bottleneck, Bottlenecks, sublayer},
    load_plain, save_plain,
};
use crate::{Init, Params, Result, Tape, Tensor, Var, ops};

/// The nonlinearity of the bottleneck.
pub(super) const KIND: Activation = Activation::Relu;

/// Adapter_P: one bottleneck after the MLP of every layer, which reads the normalised stream (Pfeiffer et al. 2021,
/// "AdapterFusion", section 3.1 and appendix; AdapterHub's `seq_bn`).
///
/// For the stream x before the MLP and the MLP's output f,
/// ```text
/// h = norm(x + f)        z = W_up·relu(W_down·h + b_down) + b_up        the stream becomes norm(x + f + z)
/// ```
/// both times with the base's own norm; in an architecture that normalises before its sublayers h = x + f and the stream
/// becomes h + z. These are 2·d·r + r + d scalars in a layer (W_down [r, d], W_up [d, r]); 811,392 with r = 16 on RoBERTa
/// large. As in AdapterHub the matrices begin normal with deviation 0.02, as BERT's, and the biases at 0.
#[derive(Clone, Copy, Debug)]
pub struct Pfeiffer(Bottlenecks);

impl Pfeiffer {
    /// With these bottlenecks.
    pub fn new(bottlenecks: Bottlenecks) -> Pfeiffer {
        Pfeiffer(bottlenecks)
    }

    /// [`Method::check`], in the name of a method that is built on this one.
    pub(super) fn check_as(&self, method: &str, outline: &Outline) -> Result<()> {
        self.0.check(method, outline)
    }
}

impl Method for Pfeiffer {
    fn name(&self) -> &'static str {
        "adapter-p"
    }

    fn check(&self, outline: &Outline) -> Result<()> {
        self.check_as(self.name(), outline)
    }

    fn trains(&self, tensor: &BaseTensor, _outline: &Outline) -> bool {
        self.0.trains(tensor)
    }

    fn attach(&self, site: &Site, plan: &mut Plan) -> Result<Option<Attached>> {
        let Some(d) = sublayer(site, Part::Mlp) else { return Ok(None) };
        let bottleneck = self.0.add(plan, site, d, KIND, Init::Normal { std: 0.02 });
        Ok(Some(Attached::Sublayer(Box::new(Sequential { site: site.name.clone(), bottleneck }))))
    }

    fn start(&self) -> Start {
        Start::NearBase
    }
}

#[derive(Debug)]
struct Sequential {
    site: String,
    bottleneck: Bottleneck,
}

impl SublayerAdapter for Sequential {
    fn join(&self, t: &mut Tape, x: Var, f: Var, norm: Norm) -> Result<Var> {
        after(t, x, f, norm, |t, h| self.bottleneck.apply(t, h))
    }
}

/// The stream norm(x + f + z) with z = `adapt`(norm(x + f)).
pub(super) fn after(
    t: &mut Tape,
    x: Var,
    f: Var,
    norm: Norm,
    adapt: impl FnOnce(&mut Tape, &Var) -> Result<Var>,
) -> Result<Var> {
    let sum = ops::add(t, x, f)?;
    let Some(norm) = norm else {
        let z = adapt(t, &sum)?;
        return ops::add(t, sum, z);
    };
    let h = norm(t, &sum)?;
    let z = adapt(t, &h)?;
    drop(h);
    let sum = ops::add(t, sum, z)?;
    norm(t, &sum)
}

impl Adapter for Sequential {
    fn save(&self, params: &Params) -> Result<Vec<(String, Tensor)>> {
        Ok(save_plain(params, &self.site, &self.bottleneck.ids()))
    }

    fn load(&self, params: &mut Params, _site: &str, tensors: &mut BTreeMap<String, Tensor>) -> Result<()> {
        load_plain(params, &self.bottleneck.ids(), tensors)
    }
}
