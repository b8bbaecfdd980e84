//! One update of several: sums, TIES, DARE, pruning.
//!
//! These are the rules of PEFT's `add_weighted_adapter`, number for number. Some differ from the papers that they are named
//! after: TIES elects signs before the weights come in, and divides by the number of updates that agree, not by their
//! weights.

use super::adapter::check_rank;
use super::dense::{narrow, product, widen};
use super::{Error, LowRank, Real, Result, Truncated, svd, svd::svd_of_factors};
use lora_kernels::hash::fnv1a;
use ndarray::{Array2, ArrayView2, Axis, Zip, concatenate};

/// How several matrices x₁ … xₙ of one shape, with weights w₁ … wₙ, become one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rule {
    /// Σ wₖ·xₖ (task arithmetic; Ilharco et al. 2023, [arXiv:2212.04089](https://arxiv.org/abs/2212.04089)).
    Linear,
    /// Σ wₖ·top(xₖ), where top keeps the ⌊`density`·size⌋ elements of largest magnitude and zeroes the others. Of equal
    /// ones the first stay.
    MagnitudePrune {
        /// The share of elements that stay, in (0, 1].
        density: f64,
    },
    /// Trim, elect, merge (Yadav et al. 2023, [arXiv:2306.01708](https://arxiv.org/abs/2306.01708)): with the pruned
    /// yₖ = top(xₖ), each element takes the sign s of the majority (+1 when there is none) and becomes
    ///
    /// Σ wₖ·yₖ / max(1, m) over the m matrices with sign(yₖ) = s.
    Ties {
        /// The share of elements that stay, in (0, 1].
        density: f64,
        /// What elects the sign.
        sign: MajoritySign,
    },
    /// Σ wₖ·drop(xₖ), where drop keeps each element with probability `density`, divided by it, so that the expectation is
    /// that of [`Rule::Linear`] (Yu et al. 2024, [arXiv:2311.03099](https://arxiv.org/abs/2311.03099)).
    DareLinear {
        /// The probability with which an element stays, in (0, 1].
        density: f64,
        /// The same seed drops the same elements, on every machine.
        seed: u64,
    },
    /// As [`Rule::Ties`], with drop instead of top.
    DareTies {
        /// The probability with which an element stays, in (0, 1].
        density: f64,
        /// What elects the sign.
        sign: MajoritySign,
        /// The same seed drops the same elements, on every machine.
        seed: u64,
    },
}

/// What elects the sign of an element.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MajoritySign {
    /// The sign of Σ yₖ.
    #[default]
    Total,
    /// The sign of Σ sign(yₖ).
    Frequency,
}

/// What a [`Rule`] is applied to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Combination {
    /// No rule: A is all wₖ·sₖ·Aₖ one below the other and B all Bₖ side by side, which is Σ wₖ·ΔWₖ exactly, at the sum of
    /// the ranks.
    Cat,
    /// To the factors, which need one rank: A from all Aₖ with weights ±√|wₖ·sₖ|, B from all Bₖ with weights √|wₖ·sₖ|.
    /// Cheap, and no more than near Σ wₖ·ΔWₖ: products of Bₖ with another's A come in.
    Factors(Rule),
    /// To ΔWₖ = sₖ·Bₖ·Aₖ with weights wₖ; the result is cut to a rank by its SVD. Of a rank above min(out, in) the further
    /// directions are zero.
    Delta(Rule, usize),
}

/// One update of several of one weight, each with a factor: B·A of the result, whose scale is 1, stands for Σ wₖ·ΔWₖ in
/// the way that `how` says. [`Truncated::error`] is what cutting to the rank left out (0 where nothing is cut).
///
/// A sum cut to its rank ([`Rule::Linear`]) goes through the factors, in O((out + in)·R²) for ranks that sum to R; other
/// rules on ΔW take O(out·in·min(out, in)).
///
/// # Errors
/// [`Error::Nothing`] for no updates; [`Error::Shape`] when they are of different shapes, or of different ranks where
/// factors are summed; [`Error::Density`], [`Error::Scale`] for weights that are no numbers; [`Error::Rank`] for rank 0;
/// [`Error::NonFinite`] when a result overflows `T`.
pub fn combine<T: Real>(updates: &[(f64, &LowRank<T>)], how: Combination) -> Result<Truncated<T>> {
    let Some((_, first)) = updates.first() else { return Err(Error::Nothing) };
    for (weight, update) in updates {
        if !(weight * update.scale()).is_finite() {
            return Err(Error::Scale { scale: weight * update.scale() });
        }
        let [left_shape, right_shape] = [update.dim().into(), first.dim().into()];
        if left_shape != right_shape {
            let rule = "updates of one weight have one shape";
            return Err(Error::Shape { left: "a ΔW", left_shape, right: "the first", right_shape, rule });
        }
    }
    let exact = |a: Array2<f64>, b: Array2<f64>| {
        Ok(Truncated { adapter: LowRank::new(narrow(&a), narrow(&b), 1.0)?, error: 0.0 })
    };
    match how {
        Combination::Cat => {
            let (a, b) = cat(updates);
            exact(a, b)
        }
        Combination::Factors(rule) => {
            check(rule)?;
            if let Some((_, update)) = updates.iter().find(|(_, u)| u.rank() != first.rank()) {
                let [left_shape, right_shape] = [update.a().dim().into(), first.a().dim().into()];
                let rule = "their factors are summed, so they need one rank (cat and svd take any)";
                return Err(Error::Shape { left: "an A", left_shape, right: "the first", right_shape, rule });
            }
            let scales: Vec<f64> = updates.iter().map(|(w, u)| w * u.scale()).collect();
            // A sign on both sides would cancel.
            let signed: Vec<f64> = scales.iter().map(|s| s.abs().sqrt().copysign(*s)).collect();
            let roots: Vec<f64> = scales.iter().map(|s| s.abs().sqrt()).collect();
            let all = |of: fn(&LowRank<T>) -> ArrayView2<'_, T>| updates.iter().map(|(_, u)| widen(of(u))).collect();
            exact(apply(rule, all(LowRank::a), &signed, 0), apply(rule, all(LowRank::b), &roots, 1))
        }
        Combination::Delta(rule, rank) => {
            check(rule)?;
            let (out, cols) = first.dim();
            check_rank(rank, None, (out, cols))?;
            let svd = if rule == Rule::Linear {
                let (a, b) = cat(updates);
                svd_of_factors(b.view(), a.view(), 1.0)?
            } else {
                let deltas = updates.iter().map(|(_, u)| product(u.scale(), widen(u.b()).view(), widen(u.a()).view()));
                let weights: Vec<f64> = updates.iter().map(|(w, _)| *w).collect();
                svd(apply(rule, deltas.collect(), &weights, 2).view())?
            };
            padded(svd.truncate(rank.min(svd.sigma.len()))?, rank)
        }
    }
}

fn check(rule: Rule) -> Result<()> {
    match rule {
        Rule::Linear => Ok(()),
        Rule::MagnitudePrune { density }
        | Rule::Ties { density, .. }
        | Rule::DareLinear { density, .. }
        | Rule::DareTies { density, .. } => match density > 0.0 && density <= 1.0 {
            true => Ok(()),
            false => Err(Error::Density { density }),
        },
    }
}

/// A and B of Σ wₖ·ΔWₖ, at the sum of the ranks.
fn cat<T: Real>(updates: &[(f64, &LowRank<T>)]) -> (Array2<f64>, Array2<f64>) {
    let a: Vec<_> = updates.iter().map(|(w, u)| widen(u.a()) * (w * u.scale())).collect();
    let b: Vec<_> = updates.iter().map(|(_, u)| widen(u.b())).collect();
    let beside = |axis, all: &[Array2<f64>]| {
        let views: Vec<_> = all.iter().map(|m| m.view()).collect();
        // Along the second axis the result need not be row-major.
        widen(concatenate(Axis(axis), &views).expect("one shape but for the rank").view())
    };
    (beside(0, &a), beside(1, &b))
}

/// The same update at a higher rank, whose further directions are zero.
fn padded<T: Real>(cut: Truncated<T>, rank: usize) -> Result<Truncated<T>> {
    let (a, b, scale) = cut.adapter.into_parts();
    let zero = T::round(0.0);
    let wide = |m: &Array2<T>, rows, cols| Array2::from_shape_fn((rows, cols), |at| m.get(at).copied().unwrap_or(zero));
    let (a, b) = (wide(&a, rank, a.ncols()), wide(&b, b.nrows(), rank));
    Ok(Truncated { adapter: LowRank::new(a, b, scale)?, error: cut.error })
}

/// A rule on whole matrices; `tensor` tells the masks of A, B and ΔW apart.
fn apply(rule: Rule, mut xs: Vec<Array2<f64>>, weights: &[f64], tensor: u8) -> Array2<f64> {
    match rule {
        Rule::Linear => {}
        Rule::MagnitudePrune { density } | Rule::Ties { density, .. } => xs.iter_mut().for_each(|x| top(x, density)),
        Rule::DareLinear { density, seed } | Rule::DareTies { density, seed, .. } => {
            for (k, x) in (0u64..).zip(&mut xs) {
                let place = seed.to_le_bytes().into_iter().chain([tensor]).chain(k.to_le_bytes());
                drop_some(x, density, fnv1a(place));
            }
        }
    }
    match rule {
        Rule::Ties { sign, .. } | Rule::DareTies { sign, .. } => agreed(&xs, weights, sign),
        _ => sum(&xs, weights),
    }
}

fn sum(xs: &[Array2<f64>], weights: &[f64]) -> Array2<f64> {
    let mut sum = Array2::zeros(xs[0].dim());
    xs.iter().zip(weights).for_each(|(x, w)| sum.scaled_add(*w, x));
    sum
}

/// Of each element the mean of those that have the elected sign.
fn agreed(xs: &[Array2<f64>], weights: &[f64], sign: MajoritySign) -> Array2<f64> {
    let signum = |x: f64| if x == 0.0 { 0.0 } else { x.signum() };
    Array2::from_shape_fn(xs[0].dim(), |at| {
        let votes = xs.iter().map(|x| match sign {
            MajoritySign::Total => x[at],
            MajoritySign::Frequency => signum(x[at]),
        });
        let elected = if votes.sum::<f64>() >= 0.0 { 1.0 } else { -1.0 };
        let agreeing = || xs.iter().zip(weights).filter(|(x, _)| signum(x[at]) == elected);
        let sum: f64 = agreeing().map(|(x, w)| w * x[at]).sum();
        sum / agreeing().count().max(1) as f64
    })
}

/// Zeroes all but the ⌊density·size⌋ elements of largest magnitude.
fn top(x: &mut Array2<f64>, density: f64) {
    let keep = (density * x.len() as f64) as usize;
    if keep >= x.len() {
        return;
    }
    let values = x.as_slice_mut().expect("row-major");
    let mut order: Vec<usize> = (0..values.len()).collect();
    let largest = |&i: &usize, &j: &usize| values[j].abs().total_cmp(&values[i].abs()).then(i.cmp(&j));
    order.select_nth_unstable_by(keep, largest);
    order[keep..].iter().for_each(|&i| values[i] = 0.0);
}

/// Keeps each element with probability `density`, divided by it.
fn drop_some(x: &mut Array2<f64>, density: f64, state: u64) {
    if density >= 1.0 {
        return;
    }
    let cols = x.ncols() as u64;
    Zip::indexed(x).for_each(|(i, j), x| {
        let kept = uniform(state, i as u64 * cols + j as u64) < density;
        *x = if kept { *x / density } else { 0.0 };
    });
}

/// Number `i` of SplitMix64 (Steele, Lea and Flood 2014) that begins at `state`, in [0, 1): a function of the place, so
/// that a mask does not depend on how it is drawn, and other programs can draw the same.
fn uniform(state: u64, i: u64) -> f64 {
    let z = state.wrapping_add((i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first numbers of the generator's reference implementation from state 1234567.
    #[test]
    fn masks_are_those_of_splitmix64() {
        let known = [6457827717110365317u64, 3203168211198807973, 9817491932198370423];
        for (i, z) in known.into_iter().enumerate() {
            assert_eq!(uniform(1234567, i as u64), (z >> 11) as f64 / (1u64 << 53) as f64);
        }
    }
}
