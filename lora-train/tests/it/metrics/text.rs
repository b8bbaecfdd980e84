//! Metrics of texts against sacrebleu, nltk and pycocoevalcap: `text.py` writes what they give.

use lora_train::metrics::{
    Metric::{self, Bleu, Cider, MeteorExactStem, Nist, RougeL},
    text::{Completions, words},
};
use serde_json::Value;

const ALL: [Metric; 5] = [Bleu, Nist, MeteorExactStem, RougeL, Cider];

fn fixture() -> Value {
    serde_json::from_str(include_str!("text.json")).unwrap()
}

fn strings(value: &Value) -> Vec<&str> {
    value.as_array().unwrap().iter().map(|v| v.as_str().unwrap()).collect()
}

/// Our scores against those that stand beside the texts.
fn agree(case: &Value, texts: &Completions, what: &str) {
    for metric in ALL {
        let ours = metric.of_texts(texts).unwrap();
        let theirs = case[metric.name()].as_f64().unwrap();
        assert!((ours - theirs).abs() < 1e-9, "{metric} of {what}: {ours}, not {theirs}");
    }
}

#[test]
fn what_a_model_says_is_scored_as_published_programs_score_it() {
    let fixture = fixture();
    let texts: Vec<Vec<&str>> = fixture["texts"].as_array().unwrap().iter().map(strings).collect();
    let references: usize = texts.iter().map(|t| t.len() - 1).sum();
    assert!(texts.len() >= 200 && references > 2 * texts.len(), "{} texts, {references} references", texts.len());
    let parts = fixture["parts"].as_array().unwrap();
    for part in parts {
        let number = |key: &str| part[key].as_u64().unwrap() as usize;
        let (from, to, most) = (number("from"), number("to"), number("references"));
        let (said, references): (Vec<&str>, Vec<&[&str]>) =
            texts[from..to].iter().map(|t| (t[0], &t[1..t.len().min(most + 1)])).unzip();
        agree(part, &Completions::new(&said, &references), &format!("{from}..{to} with {most} references"));
    }
    // It is half right: neither everything nor nothing is matched.
    let whole = |metric: Metric| parts[0][metric.name()].as_f64().unwrap();
    assert!(
        parts.len() == 12 && whole(Bleu) > 5.0 && whole(Bleu) < 50.0 && whole(MeteorExactStem) < 0.6,
        "{}",
        parts[0]
    );
}

#[test]
fn odd_texts_are_scored_as_published_programs_score_them() {
    let fixture = fixture();
    let mut whole = 0;
    for case in fixture["odd"].as_array().unwrap() {
        let references: Vec<Vec<&str>> = case["references"].as_array().unwrap().iter().map(strings).collect();
        agree(case, &Completions::new(&strings(&case["predictions"]), &references), &case["predictions"].to_string());
        whole += usize::from((case["bleu"].as_f64().unwrap() - 100.0).abs() < 1e-9);
    }
    assert_eq!(whole, 3, "corpora with all that BLEU looks for");
    assert_eq!(fixture["signature"], "nrefs:var|case:lc|eff:no|tok:13a|smooth:exp|version:2.6.0");
}

#[test]
fn words_are_those_of_13a() {
    for pair in fixture()["words"].as_array().unwrap() {
        assert_eq!(words(pair[0].as_str().unwrap()), strings(&pair[1]), "{pair}");
    }
}

#[test]
fn scores_do_not_depend_on_chance() {
    let fixture = fixture();
    let texts: Vec<Vec<&str>> = fixture["texts"].as_array().unwrap().iter().map(strings).collect();
    let scores = || {
        let (said, references): (Vec<&str>, Vec<&[&str]>) = texts.iter().map(|t| (t[0], &t[1..])).unzip();
        let texts = Completions::new(&said, &references);
        ALL.map(|metric| metric.of_texts(&texts).unwrap().to_bits())
    };
    // Every map of words has an order of its own.
    assert!((0..4).all(|_| scores() == scores()));
}

#[test]
fn of_nothing_every_score_is_zero() {
    let nothing = Completions::new::<&str, Vec<&str>, _>(&[], &[]);
    assert!(nothing.is_empty() && ALL.iter().all(|m| m.of_texts(&nothing) == Some(0.0)));
    assert_eq!(Metric::Accuracy.of_texts(&nothing), None);
    assert!(ALL.iter().all(|m| m.of_labels(&[], &[], 1).is_none() && m.of_values(&[], &[]).is_none()));
    assert_eq!((MeteorExactStem.name(), MeteorExactStem.title()), ("meteor_exact_stem", "METEOR (exact, stem)"));
    assert_eq!(serde_json::to_string(&ALL).unwrap(), format!("{:?}", ALL.map(Metric::name)).replace(", ", ","));
}
