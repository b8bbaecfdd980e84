//! `lora analyze`.

use serde_json::Value;

use crate::cli::lab::{Lab, names};

fn trained() -> Lab {
    let lab = Lab::new();
    for (name, options) in [
        ("a", "--rank 4 --targets c_attn,mlp.c_proj --seed 1"),
        ("b", "--rank 2 --targets c_attn --seed 2"),
        ("c", "--rank 2 --targets c_fc --seed 3"),
    ] {
        lab.train(name, &format!("--steps 6 --batch-size 4 --lr 0.05 --alpha 8 {options}"));
    }
    lab
}

fn numbers(v: &Value) -> Vec<f64> {
    v.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

#[test]
fn an_adapter_is_measured_alone_on_its_base_and_against_another() {
    let lab = trained();
    let all = lab.json("analyze a --model base --against b --json --out report");
    let modules = all["modules"].as_object().unwrap();
    assert_eq!(modules.len(), 4);
    assert_eq!(all["not_compared"].as_array().unwrap().len(), 2);
    for (name, m) in modules {
        let sigma = numbers(&m["singular_values"]);
        assert!(sigma.len() == 4 && sigma.is_sorted_by(|a, b| a >= b), "{name}: {sigma:?}");
        let norm = sigma.iter().map(|s| s * s).sum::<f64>().sqrt();
        let delta = m["delta_norm"].as_f64().unwrap();
        assert!((norm - delta).abs() < 1e-9 * norm, "{name}");
        let sum: f64 = sigma.iter().sum();
        let entropy: f64 = sigma.iter().map(|s| -(s / sum) * (s / sum).ln()).sum();
        assert!((m["effective_rank"].as_f64().unwrap() - entropy.exp()).abs() < 1e-9, "{name}");
        let of = |key: &str| m[key].as_f64().unwrap();
        assert!((of("relative_norm") - delta / of("base_norm")).abs() < 1e-12, "{name}");
        assert!((of("amplification") - delta / of("projected_norm")).abs() < 1e-9 * of("amplification"), "{name}");
        assert_eq!(m["scale"], 2.0);
        match name.contains("c_attn") {
            true => {
                for phi in ["phi_a", "phi_b"] {
                    let rows: Vec<Vec<f64>> = m[phi].as_array().unwrap().iter().map(numbers).collect();
                    assert_eq!((rows.len(), rows[0].len()), (4, 2), "{name} {phi}");
                    assert!(rows.iter().flatten().all(|x| (0.0..=1.0).contains(x)), "{name} {phi}: {rows:?}");
                }
            }
            false => assert!(m.get("phi_a").is_none(), "{name}"),
        }
    }
    let files = ["analysis.json", "similarity_a.svg", "similarity_b.svg", "singular_values.svg"];
    assert_eq!(names(&lab.path("report")), files);
    let written: Value = serde_json::from_str(&lab.read("report/analysis.json")).unwrap();
    assert_eq!(written, all);
    for file in &files[1..] {
        let svg = lab.read(&format!("report/{file}"));
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"), "{file}");
        let panels = if file.starts_with("sing") { ["attn.c_attn", "mlp.c_proj"] } else { ["attn.c_attn", "layer 1"] };
        panels.iter().for_each(|p| assert!(svg.contains(p), "{file}: {p}"));
        assert!(!svg.contains("NaN"), "{file}");
    }
    // The paper's cells: 4 × 2 of each of two modules, beside the shades of the legend.
    let cells = lab.read("report/similarity_a.svg").matches("<rect").count();
    assert!(cells > 16, "{cells}");

    // An adapter against itself: the first directions are the first directions.
    let own = lab.json("analyze b --against b --json");
    for (name, m) in own["modules"].as_object().unwrap() {
        assert!(m.get("base_norm").is_none() && own.get("not_compared").is_none());
        for phi in ["phi_a", "phi_b"] {
            for i in 0..2 {
                assert!((m[phi][i][i].as_f64().unwrap() - 1.0).abs() < 1e-9, "{name} {phi}");
            }
        }
    }
    let table = lab.ok("analyze a --model base --against b");
    let head = table.lines().next().unwrap();
    ["effective", "σ₁", "of ‖W‖", "amplified", "φ_A(1,1)"].iter().for_each(|c| assert!(head.contains(c), "{head}"));
    assert_eq!(table.lines().count(), 6, "{table}");
    assert!(!lab.ok("analyze a").lines().next().unwrap().contains("of ‖W‖"));

    // A rank above both sides of a matrix has as many directions as the matrix.
    lab.train("above", "--rank 50 --targets c_attn --steps 2 --batch-size 4 --lr 0.05");
    let above = lab.json("analyze above --model base --against a --json");
    for (name, m) in above["modules"].as_object().unwrap() {
        assert_eq!((&m["rank"], numbers(&m["singular_values"]).len()), (&serde_json::json!(50), 16), "{name}");
        assert_eq!(m["phi_a"].as_array().unwrap().len(), 16, "{name}");
    }
}

#[test]
fn a_factor_of_zeros_has_no_directions() {
    let lab = trained();
    // A becomes zero, and B stays what it is.
    lab.ok("merge --adapters b:0 --how cat --out zero");
    let zero = lab.json("analyze zero --model base --against zero --json --out out");
    for m in zero["modules"].as_object().unwrap().values() {
        assert_eq!((m["delta_norm"].as_f64(), m["effective_rank"].as_f64()), (Some(0.0), Some(0.0)));
        assert!(m["amplification"].is_null() && m["phi_a"] == serde_json::json!([]));
    }
    assert_eq!(names(&lab.path("out")), ["analysis.json", "similarity_b.svg"]);
    lab.ok("analyze zero --model base --against zero");
}

#[test]
fn what_cannot_be_analysed_is_refused() {
    let lab = trained();
    lab.train("p", "--steps 1 --batch-size 4 --method adapter-p --bottleneck 4");
    lab.model("wide", |c| c.n_embd = 32);
    lab.train("other", "--steps 1 --batch-size 4 --rank 2 --targets c_attn");
    for (args, parts) in [
        ("p", &["p/adapter_config.json", "adapter-p"][..]),
        ("none", &["none"]),
        ("base", &["base", "adapter_config.json"]),
        ("a --model wide", &["a on wide", "c_attn"]),
        ("b --against c", &["b against c", "no module in common", "c_fc"]),
        ("a --out train.txt", &["train.txt"]),
        ("a --out b", &["b is not empty"]),
    ] {
        lab.fails(&format!("analyze {args}"), parts);
    }
    let wide = "train --model wide --data train.txt --out far --steps 1 --batch-size 4 --rank 2 --targets c_attn";
    lab.ok(wide);
    lab.fails("analyze b --against far", &["b against far", "module transformer.h.0.attn.c_attn", "columns"]);
}
