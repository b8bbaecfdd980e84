//! How far predicted labels agree with true ones.

/// Share of the labels that are right: Σ 1[ŷᵢ = yᵢ] / n; 0 of nothing.
///
/// # Panics
/// When there are not as many predictions as labels.
pub fn accuracy(predicted: &[u32], truth: &[u32]) -> f64 {
    let right = pairs(predicted, truth).filter(|(p, t)| p == t).count();
    ratio(right as f64, truth.len() as f64)
}

/// F₁ of the label `positive` against all others, the harmonic mean of precision and recall: 2·TP / (2·TP + FP + FN); 0
/// where neither predictions nor labels hold it.
///
/// # Panics
/// When there are not as many predictions as labels.
pub fn f1(predicted: &[u32], truth: &[u32], positive: u32) -> f64 {
    let both = pairs(predicted, truth).filter(|pair| *pair == (positive, positive)).count();
    let ones = |labels: &[u32]| labels.iter().filter(|&&l| l == positive).count();
    // Each true positive is in both counts.
    ratio(2.0 * both as f64, (ones(predicted) + ones(truth)) as f64)
}

/// Matthews' correlation of labels, in its form for any number of them (Gorodkin 2004): with s examples, c of them right,
/// label k predicted pₖ times and true tₖ times,
///
/// ```text
/// (c·s − Σ pₖtₖ) / √((s² − Σ pₖ²)·(s² − Σ tₖ²))
/// ```
/// which for two labels is (TP·TN − FP·FN) / √((TP+FP)(TP+FN)(TN+FP)(TN+FN)). 0 where predictions or labels are all the
/// same.
///
/// # Panics
/// When there are not as many predictions as labels.
pub fn matthews(predicted: &[u32], truth: &[u32]) -> f64 {
    let s = truth.len() as f64;
    let c = pairs(predicted, truth).filter(|(p, t)| p == t).count() as f64;
    let labels = predicted.iter().chain(truth).max().map_or(0, |&most| most as usize + 1);
    let counts = |of: &[u32]| {
        let mut counts = vec![0.0; labels];
        of.iter().for_each(|&label| counts[label as usize] += 1.0);
        counts
    };
    let (p, t) = (counts(predicted), counts(truth));
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
    let spread = |of: &[f64]| (s * s - dot(of, of)).sqrt();
    ratio(c * s - dot(&p, &t), spread(&p) * spread(&t))
}

fn pairs<'a>(predicted: &'a [u32], truth: &'a [u32]) -> impl Iterator<Item = (u32, u32)> + 'a {
    assert_eq!(predicted.len(), truth.len(), "one prediction for each label");
    predicted.iter().copied().zip(truth.iter().copied())
}

/// a/b, and 0 where b is.
fn ratio(a: f64, b: f64) -> f64 {
    if b == 0.0 { 0.0 } else { a / b }
}
