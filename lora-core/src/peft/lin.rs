use std::collections::BTreeMap;

use lora_kernels::Activation;

use super::{
    Adapter, Attached, BaseTensor, Method, Norm, Outline, Part, Plan, Site, Start, SublayerAdapter,
    bottleneck::{Bottleneck, Bottlenecks, sublayer},
    join, load_plain, save_plain,
};
use crate::{Init, ParamId, Params, Result, Tape, Tensor, Var, ops};

/// Epsilon of the adapter's own normalisation: PyTorch's default.
const EPS: f64 = 1e-5;

/// Adapter_L: after the MLP of every layer a bottleneck with a LayerNorm of its own (Lin et al. 2020, section 3).
///
/// For the layer's output h,
/// ```text
/// h ← h + W_up·relu(W_down·LN(h) + b_down) + b_up
/// ```
/// with W_down [r, d] and W_up [d, r]: 2·d·r + r + d and the LayerNorm's 2·d scalars in a layer, as the LoRA paper counts
/// them; 368,784 with r = 6 on GPT-2 Medium. That paper does not say how the matrices begin: here normal with deviation
/// 0.02, as those of [`Pfeiffer`](super::Pfeiffer), biases 0, γ = 1 and β = 0.
#[derive(Clone, Copy, Debug)]
pub struct Lin(Bottlenecks);

impl Lin {
    /// With these bottlenecks.
    pub fn new(bottlenecks: Bottlenecks) -> Lin {
        Lin(bottlenecks)
    }
}

impl Method for Lin {
    fn name(&self) -> &'static str {
        "adapter-l"
    }

    fn check(&self, outline: &Outline) -> Result<()> {
        self.0.check(self.name(), outline)
    }

    fn trains(&self, tensor: &BaseTensor, _outline: &Outline) -> bool {
        self.0.trains(tensor)
    }

    fn attach(&self, site: &Site, plan: &mut Plan) -> Result<Option<Attached>> {
        let Some(d) = sublayer(site, Part::Mlp) else { return Ok(None) };
        let gamma = plan.add(format!("{}.adapter_norm.weight", site.name), &[d], Init::Ones);
        let beta = plan.add(format!("{}.adapter_norm.bias", site.name), &[d], Init::Zeros);
        let bottleneck = self.0.add(plan, site, d, Activation::Relu, Init::Normal { std: 0.02 });
        Ok(Some(Attached::Sublayer(Box::new(Normed { site: site.name.clone(), norm: [gamma, beta], bottleneck }))))
    }

    fn start(&self) -> Start {
        Start::NearBase
    }
}

#[derive(Debug)]
struct Normed {
    site: String,
    norm: [ParamId; 2],
    bottleneck: Bottleneck,
}

impl Normed {
    fn ids(&self) -> Vec<ParamId> {
        self.norm.into_iter().chain(self.bottleneck.ids()).collect()
    }
}

impl SublayerAdapter for Normed {
    fn join(&self, t: &mut Tape, x: Var, f: Var, norm: Norm) -> Result<Var> {
        let h = join(t, x, f, norm)?;
        let (gamma, beta) = (t.param(self.norm[0])?, t.param(self.norm[1])?);
        let u = ops::layer_norm(t, &h, &gamma, &beta, EPS)?;
        let z = self.bottleneck.apply(t, &u)?;
        drop(u);
        ops::add(t, h, z)
    }
}

impl Adapter for Normed {
    fn save(&self, params: &Params) -> Result<Vec<(String, Tensor)>> {
        Ok(save_plain(params, &self.site, &self.ids()))
    }

    fn load(&self, params: &mut Params, _site: &str, tensors: &mut BTreeMap<String, Tensor>) -> Result<()> {
        load_plain(params, &self.ids(), tensors)
    }
}
