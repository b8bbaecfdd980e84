//! Metrics against scikit-learn and SciPy: `metrics/make.py` writes what they give. Those of texts have authorities of their
//! own.

mod text;

use lora_train::metrics::{Metric, Scores, pearson, spearman};
use serde_json::Value;

#[test]
fn metrics_are_those_of_scikit_learn_and_scipy() {
    let cases: Value = serde_json::from_str(include_str!("metrics/metrics.json")).unwrap();
    let all = [Metric::Accuracy, Metric::F1, Metric::Matthews, Metric::Pearson, Metric::Spearman];
    let mut compared = 0;
    for kind in ["labels", "values"] {
        for (i, case) in cases[kind].as_array().unwrap().iter().enumerate() {
            let numbers =
                |key: &str| -> Vec<f64> { case[key].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect() };
            let (predicted, truth) = (numbers("predicted"), numbers("truth"));
            let labels = |of: &[f64]| of.iter().map(|&v| v as u32).collect::<Vec<_>>();
            for metric in all {
                let ours = match kind {
                    "labels" => metric.of_labels(&labels(&predicted), &labels(&truth), 1),
                    _ => metric.of_values(&predicted, &truth),
                };
                assert_eq!(ours.is_some(), !case[metric.name()].is_null(), "{kind} have {metric}");
                let Some(ours) = ours else { continue };
                let theirs = case[metric.name()].as_f64().unwrap();
                assert!((ours - theirs).abs() < 1e-12, "{metric} of {kind} {i}: {ours}, not {theirs}");
                compared += 1;
            }
        }
    }
    assert!(compared >= 30, "{compared}");
}

#[test]
fn what_is_not_defined_is_zero() {
    for f in [pearson, spearman] {
        assert_eq!(f(&[0.1; 3], &[1.0, 2.0, 3.0]), 0.0);
        assert_eq!(f(&[], &[]), 0.0);
    }
    assert_eq!(Metric::Accuracy.of_labels(&[], &[], 1), Some(0.0));
    let scores = Scores(vec![(Metric::F1, 0.5), (Metric::Accuracy, 0.25)]);
    assert_eq!((scores.get(Metric::Accuracy), scores.get(Metric::Pearson)), (Some(0.25), None));
    assert_eq!(serde_json::to_string(&scores).unwrap(), r#"{"f1":0.5,"accuracy":0.25}"#);
    assert_eq!(scores.to_string(), "f1 0.5000, accuracy 0.2500");
}
