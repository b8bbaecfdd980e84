//! What every architecture's configuration is checked for. Each check gives the first impossible value: its key, and what
//! is wrong with it.

/// The largest sizes taken for real: a configuration beyond them is damaged, and must not end in an allocation.
pub(super) const MOST_LAYERS: usize = 1 << 12;
pub(super) const MOST_WIDTH: usize = 1 << 20;
pub(super) const MOST_ROWS: usize = 1 << 24;
/// Positions of which tables are made in advance.
pub(super) const MOST_POSITIONS: usize = 1 << 20;
const MOST_PARAMETERS: u128 = 1 << 42;

/// A key and what is wrong with its value.
pub(super) type Problem = (&'static str, String);

/// Sizes, each with the most that it may be.
pub(super) fn sizes(sizes: &[(&'static str, usize, usize)]) -> Option<Problem> {
    let (key, n, most) = sizes.iter().find(|(_, n, most)| *n == 0 || n > most)?;
    Some((key, format!("{n} is out of range; it must be from 1 to {most}")))
}

/// Rates of dropout.
pub(super) fn probabilities(rates: &[(&'static str, f64)]) -> Option<Problem> {
    let (key, p) = rates.iter().find(|(_, p)| !(0.0..1.0).contains(p))?;
    Some((key, format!("{p:?} is no dropout probability; it must be at least 0 and below 1")))
}

/// The ε of norms.
pub(super) fn epsilon(key: &'static str, eps: f64) -> Option<Problem> {
    (!(eps > 0.0 && eps < 1.0)).then(|| (key, format!("{eps:?} must be above 0 and below 1")))
}

/// The number of parameters that all sizes make together, told under the key of the width.
pub(super) fn parameters(key: &'static str, n: u128) -> Option<Problem> {
    (n > MOST_PARAMETERS).then(|| (key, format!("a model of {n} parameters is beyond any that exists")))
}
