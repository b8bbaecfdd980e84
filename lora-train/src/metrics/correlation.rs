//! How far predicted numbers go with true ones.

/// Pearson's correlation: Σ (xᵢ − x̄)(yᵢ − ȳ) / √(Σ (xᵢ − x̄)² · Σ (yᵢ − ȳ)²); 0 where all x or all y are the same, where
/// it is not defined.
///
/// # Panics
/// When there are not as many predictions as true numbers.
pub fn pearson(predicted: &[f64], truth: &[f64]) -> f64 {
    assert_eq!(predicted.len(), truth.len(), "one prediction for each number");
    let (x, y) = (centred(predicted), centred(truth));
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
    let (dx, dy) = (dot(&x, &x).sqrt(), dot(&y, &y).sqrt());
    // Rounding alone may carry it beyond ±1.
    if dx == 0.0 || dy == 0.0 { 0.0 } else { (dot(&x, &y) / dx / dy).clamp(-1.0, 1.0) }
}

/// Spearman's correlation: Pearson's of the ranks, where equal numbers share the mean of their ranks.
///
/// # Panics
/// When there are not as many predictions as true numbers.
pub fn spearman(predicted: &[f64], truth: &[f64]) -> f64 {
    pearson(&ranks(predicted), &ranks(truth))
}

fn centred(values: &[f64]) -> Vec<f64> {
    // Numbers that are all the same have no deviations, whatever their mean rounds to.
    if values.windows(2).all(|w| w[0] == w[1]) {
        return vec![0.0; values.len()];
    }
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    values.iter().map(|v| v - mean).collect()
}

/// The rank of each number, from 1.
fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[a].total_cmp(&values[b]));
    let mut ranks = vec![0.0; values.len()];
    let mut start = 0;
    for tied in order.chunk_by(|&a, &b| values[a] == values[b]) {
        let rank = start as f64 + (tied.len() as f64 + 1.0) / 2.0;
        tied.iter().for_each(|&i| ranks[i] = rank);
        start += tied.len();
    }
    ranks
}
