use std::collections::{BTreeMap, BTreeSet};

use lora_kernels::{DType, Device};

use super::{
    Adapter, Attached, Frozen, Method, Norm, Outline, Part, Plan, Site, SiteKind, Start, SublayerAdapter,
    bottleneck::{self, SUBLAYERS, sublayer},
    load_plain,
    pfeiffer::{KIND, after},
    save_plain, take,
};
use crate::{Error, Init, ParamId, Params, Result, Tape, Tensor, Var, lowrank::Layout, ops};

/// AdapterFusion: attention of every token over several trained [`Pfeiffer`](super::Pfeiffer) adapters, which stay as they
/// are (Pfeiffer et al. 2021, "AdapterFusion", section 3.2).
///
/// For the stream x before the MLP, the MLP's output f and h = norm(x + f) (x + f in an architecture that normalises before
/// its sublayers), with adapter c giving z_c = W_up·relu(W_down·h + b_down) + b_up,
/// ```text
/// s_c = (Q·h + b)·(K·z_c)        p = softmax(s)        o = Σ_c p_c·V·z_c        the stream becomes norm(x + f + o)
/// ```
/// Query, keys and residual are those of the authors' code (AdapterHub). Its keys have a bias as well, which adds the same
/// number to all scores of a token and so changes nothing: here there is none. These are 3·d² + d scalars in a layer.
///
/// Q and K begin normal with deviation 0.02, V as the identity with noise of 10⁻⁶ (section 3.2), so that training starts near
/// the mean of the adapters. The authors' penalty on V's distance
/// from the identity is not applied; plain weight decay pulls V towards 0 instead, so train with little of it.
///
/// It is saved with the adapters that it combines (`{site}.adapters.{name}.adapter_down.weight` and so on), so that it needs
/// nothing else.
#[derive(Clone, Debug)]
pub struct Fusion {
    adapters: Vec<Frozen>,
}

const OPTION: &str = "fuse";

/// The tensors of an adapter at a site, with their shapes on a stream of d columns for a bottleneck of width r.
fn expected(d: usize, r: usize) -> [(&'static str, Vec<usize>); 4] {
    [
        ("adapter_down.weight", vec![r, d]),
        ("adapter_down.bias", vec![r]),
        ("adapter_up.weight", vec![d, r]),
        ("adapter_up.bias", vec![d]),
    ]
}

impl Fusion {
    /// Of these adapters.
    ///
    /// # Errors
    /// [`Error::Option`] when there are none, or their names cannot tell them apart in a file.
    pub fn new(adapters: Vec<Frozen>) -> Result<Fusion> {
        let refused =
            |value: &str, why: &str| Err(Error::Option { option: OPTION, value: value.into(), why: why.into() });
        if adapters.is_empty() {
            return refused("nothing", "name the trained adapters to combine, at least one");
        }
        let mut seen = BTreeSet::new();
        for Frozen { name, .. } in &adapters {
            let usual = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
            if name.is_empty() || !name.chars().all(usual) {
                return refused(name, "an adapter's name consists of letters, digits, - and _");
            }
            if !seen.insert(name) {
                return refused(name, "two adapters have this name");
            }
        }
        Ok(Fusion { adapters })
    }
}

/// That an adapter is one of the method adapter-p for this base, whole and with nothing besides.
fn check(adapter: &Frozen, outline: &Outline) -> Result<()> {
    let Frozen { name: of, bottleneck: r, tensors } = adapter;
    let wrong = |name: &str, why: String| Err(Error::Structure { name: name.into(), why });
    let mut used = BTreeSet::new();
    for site in &outline.sites {
        let Some(d) = sublayer(site, Part::Mlp) else { continue };
        for (name, shape) in expected(d, *r) {
            let name = format!("{}.{name}", site.name);
            match tensors.get(&name).map(Tensor::shape) {
                None => {
                    let why = format!(
                        "adapter `{of}` does not have it; only adapters of adapter-p for this base can be fused"
                    );
                    return wrong(&name, why);
                }
                Some(found) if found != shape => {
                    return wrong(&name, format!("adapter `{of}` has it in shape {found:?}, but {shape:?} is needed"));
                }
                Some(_) => used.insert(name),
            };
        }
    }
    match tensors.keys().find(|name| !used.contains(*name) && !outline.is_saved_module(name)) {
        Some(name) => wrong(
            name,
            format!(
                "adapter `{of}` has it, which nothing here uses; fuse adapters of adapter-p alone, \
                                           trained without the base's norms"
            ),
        ),
        None => Ok(()),
    }
}

impl Method for Fusion {
    fn name(&self) -> &'static str {
        "fusion"
    }

    fn check(&self, outline: &Outline) -> Result<()> {
        outline.needs(self.name(), SUBLAYERS, |k| matches!(k, SiteKind::Sublayer { part: Part::Mlp, .. }))?;
        self.adapters.iter().try_for_each(|adapter| check(adapter, outline))
    }

    fn attach(&self, site: &Site, plan: &mut Plan) -> Result<Option<Attached>> {
        let Some(d) = sublayer(site, Part::Mlp) else { return Ok(None) };
        let base = plan.outline().tensors.first().and_then(|t| plan.base_tensor(&t.name));
        let place = base.map(|t| (t.device(), t.dtype()));
        let adapters: Result<Vec<_>> = self.adapters.iter().map(|a| Member::new(a, site, d, place.as_ref())).collect();
        let mut add = |name: &str, shape: &[usize], init| plan.add(format!("{}.{name}", site.name), shape, init);
        let normal = || Init::Normal { std: 0.02 };
        Ok(Some(Attached::Sublayer(Box::new(Mixture {
            site: site.name.clone(),
            query: [add("fusion_query.weight", &[d, d], normal()), add("fusion_query.bias", &[d], Init::Zeros)],
            key: add("fusion_key.weight", &[d, d], normal()),
            value: add("fusion_value.weight", &[d, d], Init::NearIdentity { std: 1e-6 }),
            adapters: adapters?,
        }))))
    }

    fn start(&self) -> Start {
        Start::Elsewhere
    }
}

/// One of the adapters at one site.
#[derive(Debug)]
struct Member {
    name: String,
    /// As they were given, by their names below the site.
    given: Vec<(&'static str, Tensor)>,
    /// The same where the base lies, in its type.
    placed: Vec<Tensor>,
}

impl Member {
    fn new(adapter: &Frozen, site: &Site, d: usize, place: Option<&(Device, DType)>) -> Result<Member> {
        let one = |(name, _)| {
            let full = format!("{}.{name}", site.name);
            Ok((name, adapter.tensors.get(&full).cloned().ok_or(Error::Missing { name: full })?))
        };
        let given: Vec<_> = expected(d, adapter.bottleneck).into_iter().map(one).collect::<Result<_>>()?;
        let placed = |(_, t): &(_, Tensor)| match place {
            Some((device, dtype)) => t.to(device, *dtype),
            None => Ok(t.clone()),
        };
        Ok(Member { name: adapter.name.clone(), placed: given.iter().map(placed).collect::<Result<_>>()?, given })
    }

    /// Its name of a tensor in a file, below the site.
    fn saved_name(&self, tensor: &str) -> String {
        format!("adapters.{}.{tensor}", self.name)
    }

    fn apply(&self, t: &mut Tape, h: &Var) -> Result<Var> {
        let [a, b, c, d] = &self.placed[..] else { unreachable!("a bottleneck has two maps with biases") };
        let maps = [[t.constant(a), t.constant(b)], [t.constant(c), t.constant(d)]];
        bottleneck::apply(t, h, &maps, KIND)
    }
}

#[derive(Debug)]
struct Mixture {
    site: String,
    query: [ParamId; 2],
    key: ParamId,
    value: ParamId,
    adapters: Vec<Member>,
}

impl Mixture {
    fn ids(&self) -> [ParamId; 4] {
        [self.query[0], self.query[1], self.key, self.value]
    }

    /// o. With q = Q·h + b its scores are q·(K·z) = (Kᵀ·q)·z and its sum V·(Σ p·z): K and V are needed once for a token,
    /// not for each of its adapters.
    fn mix(&self, t: &mut Tape, h: &Var) -> Result<Var> {
        let [query, bias, key, value] = self.ids().map(|id| t.param(id));
        let (query, bias, key, value) = (query?, bias?, key?, value?);
        let mut all: Option<Var> = None;
        for adapter in &self.adapters {
            let z = adapter.apply(t, h)?;
            all = Some(match all {
                Some(all) => ops::concat_rows(t, &all, &z)?,
                None => z,
            });
        }
        let z = all.expect("a fusion has an adapter");
        let q = ops::linear(t, h, &query, Layout::OutIn, Some(&bias))?;
        let q = ops::linear(t, &q, &key, Layout::InOut, None)?;
        let o = ops::mix(t, &q, &z)?;
        ops::linear(t, &o, &value, Layout::OutIn, None)
    }
}

impl SublayerAdapter for Mixture {
    fn join(&self, t: &mut Tape, x: Var, f: Var, norm: Norm) -> Result<Var> {
        after(t, x, f, norm, |t, h| self.mix(t, h))
    }
}

impl Adapter for Mixture {
    fn save(&self, params: &Params) -> Result<Vec<(String, Tensor)>> {
        let mut all = save_plain(params, &self.site, &self.ids());
        for adapter in &self.adapters {
            all.extend(adapter.given.iter().map(|(name, t)| (adapter.saved_name(name), t.clone())));
        }
        Ok(all)
    }

    fn load(&self, params: &mut Params, site: &str, tensors: &mut BTreeMap<String, Tensor>) -> Result<()> {
        load_plain(params, &self.ids(), tensors)?;
        for adapter in &self.adapters {
            for (name, given) in &adapter.given {
                let name = format!("{site}.{}", adapter.saved_name(name));
                let saved = take(tensors, &name, given.shape())?;
                let bits = |t: &Tensor| -> Result<Vec<u64>> { Ok(t.to_f64()?.into_iter().map(f64::to_bits).collect()) };
                if !saved.same_memory(given) && bits(&saved)? != bits(given)? {
                    let why = format!("this fusion was trained with another adapter under the name `{}`", adapter.name);
                    return Err(Error::Structure { name, why });
                }
            }
        }
        Ok(())
    }
}
