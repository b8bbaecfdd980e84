use std::collections::{BTreeMap, btree_map::Entry};

use lora_kernels::Device;

use super::AdaLoraSchedule;
use crate::{Error, Grads, ParamId, Params, Result, Tape, Tensor, Var, ops};

/// How AdaLoRA's ranks are chosen while it trains (Zhang et al. 2023, sections 3.2 and 3.3), as PEFT's `RankAllocator` does it.
///
/// After every step, for each parameter p of the updates and its gradient g, element by element,
///
/// ```text
/// I = |p·g|        Ī ← β₁·Ī + (1 − β₁)·I        U ← β₂·U + (1 − β₂)·|I − Ī|        S = Ī·U
/// ```
/// and the importance of rank i of an update is S of its E, plus the means of S over row i of A and over column i of B. Up to
/// step `tinit` nothing is cut; from then on the budget, the ranks of all updates together, falls from their sum to
/// `target_r` for each along a cubic, reached `tfinal` steps before the end, and at every multiple of Δt those beyond the
/// budget that matter least get E = 0. They may come back, until the last cut; after it they are held at zero.
#[derive(Debug)]
pub struct Budget {
    config: AdaLoraSchedule,
    /// Steps of the schedule, as far as they are known.
    total: Option<u64>,
    updates: Vec<Of>,
    cuts: Cuts,
    /// I of each rank that there is, where the parameters lie.
    identities: BTreeMap<usize, Tensor>,
}

/// One update.
#[derive(Debug)]
struct Of {
    site: String,
    /// A, E and B, where any of its ranks are left, with what was measured of each.
    factors: Option<[Measured; 3]>,
    /// Which of the first ranks are left.
    kept: Vec<bool>,
}

/// What was measured of a parameter: Ī and U.
#[derive(Debug)]
struct Measured {
    id: ParamId,
    importance: Vec<f32>,
    uncertainty: Vec<f32>,
}

/// What has become of the ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cuts {
    /// None was taken away, so far.
    None,
    /// Some may have been, and lie there with E = 0.
    Masked,
    /// They were when the adapter was loaded, and nothing of them is there.
    Loaded,
}

/// Names of what was measured, as checkpoints have them.
const KINDS: [&str; 2] = ["exp_avg_ipt", "exp_avg_unc"];
const KEPT: &str = "kept";
const CUT: &str = "adalora_cut";

impl Budget {
    pub(super) fn new(config: AdaLoraSchedule, sites: Vec<String>) -> Budget {
        let cuts = if config.kept.is_empty() { Cuts::None } else { Cuts::Loaded };
        let of = |site: String| {
            let kept = config.kept.get(&site).cloned().unwrap_or_else(|| vec![true; config.init_r]);
            Of { site, factors: None, kept }
        };
        let (updates, total) = (sites.into_iter().map(of).collect(), config.total_step);
        Budget { config, total, updates, cuts, identities: BTreeMap::new() }
    }

    /// Finds the updates' parameters.
    pub(crate) fn bind(&mut self, params: &Params) -> Result<()> {
        for of in &mut self.updates {
            let found = ["lora_A", "lora_E", "lora_B"].map(|name| params.find(&format!("{}.{name}", of.site)));
            let [Some(a), Some(e), Some(b)] = found else { continue };
            of.factors = Some([a, e, b].map(|id| {
                let zeros = || vec![0.0; params.range(id).len()];
                Measured { id, importance: zeros(), uncertainty: zeros() }
            }));
            let r = params.shape(a)[0];
            if let Entry::Vacant(place) = self.identities.entry(r) {
                let ones: Vec<f64> = (0..r * r).map(|i| f64::from(i / r == i % r)).collect();
                let identity = Tensor::from_slice(&Device::Cpu, &[r, r], &ones)?.to_dtype(params.dtype())?;
                place.insert(identity.to_device(&params.device())?);
            }
        }
        Ok(())
    }

    /// Steps of the schedule, as far as they are known.
    pub fn total_step(&self) -> Option<u64> {
        self.total
    }

    /// By module, which of the first ranks are left, once any may have been taken away.
    pub fn kept(&self) -> Option<BTreeMap<&str, &[bool]>> {
        let kept = || self.updates.iter().map(|of| (of.site.as_str(), &of.kept[..])).collect();
        (self.cuts != Cuts::None).then(kept)
    }

    /// What is added to the loss of a step: `orth_reg_weight` times the mean of [`ops::orthogonality`] over all A and B.
    pub(crate) fn penalty(&self, t: &mut Tape) -> Result<Option<Var>> {
        let mut sum: Option<Var> = None;
        let c = self.config.orth_reg_weight / (2 * self.updates.len()) as f64;
        for [a, _, b] in self.updates.iter().filter_map(|of| of.factors.as_ref()).filter(|_| c > 0.0) {
            let (a, b) = (t.param_wide(a.id), t.param_wide(b.id));
            let identity = &self.identities[&a.value().rows()];
            for (x, columns) in [(a, false), (b, true)] {
                let one = ops::orthogonality(t, &x, identity, columns, c)?;
                sum = Some(match sum {
                    None => one,
                    Some(sum) => ops::add(t, sum, one)?,
                });
            }
        }
        Ok(sum)
    }

    /// Fixes the steps of the schedule, unless they are known.
    ///
    /// # Errors
    /// [`Error::Option`] for a schedule that has no step at which to cut.
    pub(crate) fn set_total_step(&mut self, total: u64) -> Result<()> {
        if self.total.is_none() && self.cuts != Cuts::Loaded {
            self.config.check_steps(total)?;
            self.total = Some(total);
        }
        Ok(())
    }

    /// What follows the update of step `step`, counted from 1: measures, and takes ranks away when their time has come. The
    /// gradients were multiplied by `factor` before they were applied.
    ///
    /// # Errors
    /// What reading from a device can cause.
    ///
    /// Without a schedule whose steps are known, nothing is measured and nothing taken away.
    pub(crate) fn allocate(&mut self, step: u64, params: &mut Params, grads: &mut Grads, factor: f64) -> Result<()> {
        let Some(total) = self.total.filter(|_| self.cuts != Cuts::Loaded) else { return Ok(()) };
        let last = total.saturating_sub(self.config.tfinal);
        let is_time = step > self.config.tinit && step.is_multiple_of(self.config.delta_t);
        if step < last {
            self.measure(params, grads, factor)?;
            if is_time {
                self.choose(self.ranks_at(step, last));
            }
        } else if step == last {
            self.choose(self.config.target_r * self.updates.len());
            let measured = self.updates.iter_mut().filter_map(|of| of.factors.as_mut()).flatten();
            for Measured { importance, uncertainty, .. } in measured {
                importance.fill(0.0);
                uncertainty.fill(0.0);
            }
        }
        // Between two cuts what was taken away may come back, after the last it may not.
        match (is_time || step >= last) && self.cuts == Cuts::Masked {
            true => self.mask(params),
            false => Ok(()),
        }
    }

    /// The budget of a step before the last cut, in ranks.
    fn ranks_at(&self, step: u64, last: u64) -> usize {
        let n = self.updates.len();
        let (from, to) = ((self.config.init_r * n) as f64, (self.config.target_r * n) as f64);
        let left = 1.0 - (step - self.config.tinit) as f64 / (last - self.config.tinit) as f64;
        ((from - to) * left.powi(3) + to) as usize
    }

    fn measure(&mut self, params: &Params, grads: &mut Grads, factor: f64) -> Result<()> {
        let AdaLoraSchedule { beta1, beta2, .. } = self.config;
        for of in self.updates.iter_mut().filter_map(|of| of.factors.as_mut()).flatten() {
            let Some(g) = grads.get(of.id)? else { continue };
            let (p, g) = (params.tensor(of.id).to_f64()?, g.to_f64()?);
            for (i, (p, g)) in p.iter().zip(g).enumerate() {
                let now = (p * g * factor).abs();
                let mean = beta1 * f64::from(of.importance[i]) + (1.0 - beta1) * now;
                let spread = beta2 * f64::from(of.uncertainty[i]) + (1.0 - beta2) * (now - mean).abs();
                (of.importance[i], of.uncertainty[i]) = (mean as f32, spread as f32);
            }
        }
        Ok(())
    }

    /// Keeps so many ranks, those of most importance; what is as important as the first that goes, goes too.
    fn choose(&mut self, ranks: usize) {
        let scores: Vec<Vec<f64>> = self.updates.iter().map(Of::scores).collect();
        let mut all: Vec<f64> = scores.iter().flatten().copied().collect();
        all.sort_by(f64::total_cmp);
        // Where nothing was measured there is nothing to choose by.
        if ranks >= all.len() || all.last() == Some(&0.0) {
            return;
        }
        let threshold = all[all.len() - ranks - 1];
        for (of, scores) in self.updates.iter_mut().zip(scores) {
            of.kept = scores.into_iter().map(|score| score > threshold).collect();
        }
        self.cuts = Cuts::Masked;
    }

    /// Sets E to zero where a rank was taken away.
    fn mask(&self, params: &mut Params) -> Result<()> {
        for of in &self.updates {
            let Some([_, e, _]) = of.factors.as_ref().filter(|_| of.kept.contains(&false)) else { continue };
            let mut values = params.tensor(e.id).to_f64()?;
            values.iter_mut().zip(&of.kept).filter(|(_, kept)| !**kept).for_each(|(v, _)| *v = 0.0);
            let values = Tensor::from_slice(&Device::Cpu, params.shape(e.id), &values)?.to_dtype(params.dtype())?;
            params.set(e.id, &values)?;
        }
        Ok(())
    }

    /// The tensors of an adapter without what was taken away.
    pub(crate) fn cut(&self, tensors: Vec<(String, Tensor)>) -> Result<Vec<(String, Tensor)>> {
        if self.cuts != Cuts::Masked {
            return Ok(tensors);
        }
        let of_site: BTreeMap<&str, &Of> = self.updates.iter().map(|of| (of.site.as_str(), of)).collect();
        let one = |(name, t): (String, Tensor)| {
            let (site, factor) = name.rsplit_once('.').unwrap_or_default();
            let Some(of) = of_site.get(site).filter(|_| ["lora_A", "lora_E", "lora_B"].contains(&factor)) else {
                return Ok((name, t));
            };
            let (cols, by_rows) = (t.cols(), factor != "lora_B");
            let left = |i: &usize| of.kept[if by_rows { i / cols } else { i % cols }];
            let values = t.to_f64()?;
            let values: Vec<f64> = (0..values.len()).filter(left).map(|i| values[i]).collect();
            let rank = of.kept.iter().filter(|kept| **kept).count();
            let shape = if by_rows { [rank, cols] } else { [t.rows(), rank] };
            Ok((name, Tensor::from_slice(&Device::Cpu, &shape, &values)?.to_dtype(t.dtype())?))
        };
        tensors.into_iter().map(one).collect()
    }

    /// Everything that the choices to come depend on, by name, for a checkpoint: what was measured, which ranks are left, and
    /// whether any were taken away.
    pub fn state(&self) -> Result<Vec<(String, Tensor)>> {
        let mut all = Vec::new();
        let mut add = |name: String, values: &[f32]| -> Result<()> {
            all.push((name, Tensor::from_slice(&Device::Cpu, &[values.len()], values)?));
            Ok(())
        };
        for of in &self.updates {
            let kept: Vec<f32> = of.kept.iter().map(|kept| f32::from(u8::from(*kept))).collect();
            add(format!("{KEPT}.{}", of.site), &kept)?;
            for (m, factor) in of.factors.iter().flatten().zip(["lora_A", "lora_E", "lora_B"]) {
                for (kind, values) in KINDS.into_iter().zip([&m.importance, &m.uncertainty]) {
                    add(format!("{kind}.{}.{factor}", of.site), values)?;
                }
            }
        }
        add(CUT.into(), &[f32::from(u8::from(self.cuts == Cuts::Masked))])?;
        Ok(all)
    }

    /// Goes on from a [`state`](Budget::state), whose tensors have the names and shapes of this one's.
    ///
    /// # Errors
    /// [`Error::Missing`].
    pub fn set_state(&mut self, state: &BTreeMap<String, Tensor>) -> Result<()> {
        let read = |name: String| -> Result<Vec<f32>> { state.get(&name).ok_or(Error::Missing { name })?.to_vec() };
        for of in &mut self.updates {
            of.kept = read(format!("{KEPT}.{}", of.site))?.into_iter().map(|kept| kept != 0.0).collect();
            for (m, factor) in of.factors.iter_mut().flatten().zip(["lora_A", "lora_E", "lora_B"]) {
                let [importance, uncertainty] = KINDS.map(|kind| read(format!("{kind}.{}.{factor}", of.site)));
                (m.importance, m.uncertainty) = (importance?, uncertainty?);
            }
        }
        if self.cuts != Cuts::Loaded {
            self.cuts = if read(CUT.into())? == [0.0] { Cuts::None } else { Cuts::Masked };
        }
        Ok(())
    }
}

impl Of {
    /// The importance of each of its ranks.
    fn scores(&self) -> Vec<f64> {
        let Some([a, e, b]) = &self.factors else { return Vec::new() };
        let r = e.importance.len();
        let score = |m: &Measured, i: usize| f64::from(m.importance[i]) * f64::from(m.uncertainty[i]);
        let (inputs, outputs) = (a.importance.len() / r, b.importance.len() / r);
        let of = |i: usize| {
            let row: f64 = (0..inputs).map(|j| score(a, i * inputs + j)).sum();
            let column: f64 = (0..outputs).map(|o| score(b, o * r + i)).sum();
            score(e, i) + row / inputs as f64 + column / outputs as f64
        };
        (0..r).map(of).collect()
    }
}
