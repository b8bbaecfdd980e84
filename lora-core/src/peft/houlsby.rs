use std::collections::BTreeMap;

use lora_kernels::Activation;

use super::{
    Adapter, Attached, BaseTensor, Method, Norm, Outline, Part, Plan, Site, Start, SublayerAdapter,
    bottleneck::{Bottleneck, Bottlenecks, sublayer},
    join, load_plain, save_plain,
};
use crate::{Init, Params, Result, Tape, Tensor, Var, ops};

/// Adapter_H: bottlenecks with a residual of their own after attention and after the MLP of every layer, before their
/// outputs join the stream (Houlsby et al. 2019, section 2.1 and figure 2).
///
/// For a sublayer's output f,
/// ```text
/// A(f) = f + W_up·gelu(W_down·f + b_down) + b_up        the stream becomes norm(x + A(f))
/// ```
/// with W_down [r, d] and W_up [d, r]: 2·d·r + r + d scalars at each of two sites in a layer; 835,968 with r = 8 on
/// RoBERTa large. The matrices begin normal with deviation 0.01, cut off at two deviations (section 3.6), the biases at 0,
/// so that training starts near the base. With `train_norms` the base's normalisations train too, as in that paper.
#[derive(Clone, Copy, Debug)]
pub struct Houlsby(Bottlenecks);

impl Houlsby {
    /// With these bottlenecks.
    pub fn new(bottlenecks: Bottlenecks) -> Houlsby {
        Houlsby(bottlenecks)
    }
}

impl Method for Houlsby {
    fn name(&self) -> &'static str {
        "adapter-h"
    }

    fn check(&self, outline: &Outline) -> Result<()> {
        self.0.check(self.name(), outline)
    }

    fn trains(&self, tensor: &BaseTensor, _outline: &Outline) -> bool {
        self.0.trains(tensor)
    }

    fn attach(&self, site: &Site, plan: &mut Plan) -> Result<Option<Attached>> {
        let Some(d) = sublayer(site, Part::Attention).or_else(|| sublayer(site, Part::Mlp)) else { return Ok(None) };
        let bottleneck = self.0.add(plan, site, d, Activation::GeluErf, Init::TruncatedNormal { std: 0.01 });
        Ok(Some(Attached::Sublayer(Box::new(Series { site: site.name.clone(), bottleneck }))))
    }

    fn start(&self) -> Start {
        Start::NearBase
    }
}

#[derive(Debug)]
struct Series {
    site: String,
    bottleneck: Bottleneck,
}

impl SublayerAdapter for Series {
    fn join(&self, t: &mut Tape, x: Var, f: Var, norm: Norm) -> Result<Var> {
        let z = self.bottleneck.apply(t, &f)?;
        let f = ops::add(t, f, z)?;
        join(t, x, f, norm)
    }
}

impl Adapter for Series {
    fn save(&self, params: &Params) -> Result<Vec<(String, Tensor)>> {
        Ok(save_plain(params, &self.site, &self.bottleneck.ids()))
    }

    fn load(&self, params: &mut Params, _site: &str, tensors: &mut BTreeMap<String, Tensor>) -> Result<()> {
        load_plain(params, &self.bottleneck.ids(), tensors)
    }
}
