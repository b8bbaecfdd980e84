//! The mathematics of a low-rank update, ΔW = s·B·A, on [`ndarray`] arrays of f32 or f64.
//!
//! | question | function |
//! |---|---|
//! | what does an adapter add to a weight, or to an output? | [`LowRank::delta`], [`LowRank::apply`] |
//! | what is the scale s? | [`Scaling`]: α/r, or α/√r |
//! | how does the adapted weight become one weight, and W₀ again? | [`merge`], [`Merged::unmerge`] |
//! | which adapter of rank r is nearest to a given ΔW? | [`truncate`], [`Svd::truncate`] |
//! | what are the singular values and directions? | [`svd`], [`svd_of`] |
//! | how do several updates become one? | [`combine`] |
//! | where can an adapter begin in a weight? | [`pissa`], [`pissa_by_iterations`], [`olora`]; at a product of zero: [`orthogonal`] |
//! | do two adapters look in the same directions? | [`subspace_similarity`] |
//! | how strongly does ΔW amplify what W₀ has only a little of? | [`amplification`] |
//!
//! Everything is computed in f64. What is a weight comes back in the precision that went in, each element rounded
//! once; what is an analysis (singular values, similarities, norms) stays f64. One thread computes all of it, in an
//! order that depends on the shapes alone: the same arrays give the same bits.
//!
//! Nothing here knows the rest of the crate. This is the whole story of an adapter:
//!
//! ```
//! use lora_core::lowrank::{self, Layout, LowRank, Scaling, Side};
//! use ndarray::{Array2, array};
//!
//! // Make: A [r, in] = [1, 3] and B [out, r] = [2, 1], with α = 2.
//! let adapter = LowRank::with_alpha(array![[1.0, 0.0, -1.0]], array![[0.5], [1.0]], 2.0, Scaling::Lora)?;
//! assert_eq!(adapter.delta(), array![[1.0, 0.0, -1.0], [2.0, 0.0, -2.0]]);
//!
//! // Merge: one weight that costs nothing at inference. W₀ is borrowed and never written …
//! let w0: Array2<f64> = array![[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]];
//! let merged = lowrank::merge(w0.view(), &adapter, Layout::OutIn)?;
//! assert_eq!(merged.weight(), array![[2.0, 2.0, 2.0], [6.0, 5.0, 4.0]]);
//! // … so unmerging gives back that very array.
//! assert_eq!(merged.unmerge(), w0);
//!
//! // Take apart: the adapter nearest to a ΔW, and the distance that remains.
//! let nearest = lowrank::truncate(adapter.delta().view(), 1)?;
//! assert!(nearest.error < 1e-12);
//!
//! // Compare: both look at their input in the same direction.
//! let phi = lowrank::subspace_similarity(adapter.a(), nearest.adapter.a(), Side::Right)?;
//! assert!((phi[[0, 0]] - 1.0).abs() < 1e-12);
//! # Ok::<(), lowrank::Error>(())
//! ```
//!
//! Section numbers refer to Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*,
//! [arXiv:2106.09685](https://arxiv.org/abs/2106.09685).

mod adapter;
mod combine;
mod dense;
mod error;
mod merge;
mod start;
mod subspace;
mod svd;

pub use adapter::{LowRank, Scaling};
pub use combine::{Combination, MajoritySign, Rule, combine};
pub use dense::Real;
pub use error::{Error, Result};
pub use merge::{Layout, Merged, merge};
pub use start::{olora, orthogonal, pissa, pissa_by_iterations};
pub use subspace::{Amplification, Side, amplification, subspace_similarity};
pub use svd::{Svd, Truncated, svd, svd_of, truncate};
