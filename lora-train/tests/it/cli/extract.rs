//! `lora extract`.

use serde_json::json;

use crate::cli::lab::{Lab, names};

#[test]
fn an_adapter_out_of_a_tuned_model_is_as_near_as_its_rank_allows() {
    let lab = Lab::new();
    lab.train("tuned", "--method full --steps 8 --batch-size 4 --lr 0.01");
    let loss = |args: &str| lab.json(&format!("eval --data valid.txt --json {args}"))["loss"].as_f64().unwrap();
    let (before, tuned) = (loss("--model base"), loss("--model tuned"));
    let mut errors = Vec::new();
    for rank in [1, 4, 16] {
        let found = lab.json(&format!("extract --model base --tuned tuned --rank {rank} --out r{rank} --json"));
        assert_eq!((&found["rank"], found["modules"].as_array().unwrap().len()), (&json!(rank), 8));
        assert_eq!(found["targets"], json!(["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]));
        // Biases, norms and embeddings changed too, and are named, the largest first.
        let left: Vec<&str> = found["left"].as_array().unwrap().iter().map(|t| t["tensor"].as_str().unwrap()).collect();
        for name in ["transformer.wte.weight", "transformer.h.0.ln_1.weight", "transformer.h.1.attn.c_attn.bias"] {
            assert!(left.contains(&name), "{name}: {left:?}");
        }
        assert!(left.iter().all(|name| !name.ends_with("c_attn.weight")), "{left:?}");
        let changes: Vec<f64> =
            found["left"].as_array().unwrap().iter().map(|t| t["change"].as_f64().unwrap()).collect();
        assert!(changes.is_sorted_by(|a, b| a >= b));
        let sum = |key: &str| {
            found["modules"].as_array().unwrap().iter().map(|m| m[key].as_f64().unwrap().powi(2)).sum::<f64>()
        };
        let (error, change) = (sum("error"), sum("change"));
        let relative = found["relative_error"].as_f64().unwrap();
        assert!((relative - (error / change).sqrt()).abs() < 1e-9);
        let beside: f64 = changes.iter().map(|c| c * c).sum();
        let of_all = ((error + beside) / (change + beside)).sqrt();
        assert!((found["relative_error_of_all"].as_f64().unwrap() - of_all).abs() < 1e-9);
        errors.push(relative);
        assert!(loss(&format!("--model base --adapter r{rank}")) < before);
    }
    // At full rank of the smaller side nothing of these modules is left out.
    assert!(errors[0] > errors[1] && errors[1] > 0.01 && errors[2] < 1e-6, "{errors:?}");
    assert!(tuned < before);

    // What an adapter changed comes back as that adapter: LoRA of rank 2, merged, and taken out again.
    lab.train("lora", "--steps 8 --batch-size 4 --lr 0.05 --rank 2 --targets c_attn");
    lab.ok("merge --model base --adapter lora --out merged");
    let table = lab.ok("extract --model base --tuned merged --rank 2 --out back");
    assert!(table.contains("transformer.h.1.attn.c_attn") && !table.contains("not in the adapter"), "{table}");
    let found = lab.json("extract --model base --tuned merged --rank 2 --targets c_attn --out again --json");
    assert!(found["relative_error"].as_f64().unwrap() < 1e-4, "{found}");
    assert_eq!(found["left"], json!([]));
    let (one, other) = (loss("--model base --adapter lora"), loss("--model base --adapter back"));
    assert!((one - other).abs() < 1e-5, "{one} {other}");
    // Of a rank above what a module can have no more is taken than that; and embeddings are held where they are named.
    let above = lab.json("extract --model base --tuned tuned --rank 20 --targets c_attn,wpe --out above --json");
    assert_eq!((&above["rank"], above["modules"].as_array().unwrap().len()), (&json!(16), 3));
    assert!(above["relative_error"].as_f64().unwrap() < 1e-6, "{above}");
    let left: Vec<&str> = above["left"].as_array().unwrap().iter().map(|t| t["tensor"].as_str().unwrap()).collect();
    assert!(!left.contains(&"transformer.wpe.weight") && left.contains(&"transformer.wte.weight"), "{left:?}");
    assert!(loss("--model base --adapter above") < before);
    // Of a module that is not among the targets nothing is held.
    let part = lab.json("extract --model base --tuned merged --rank 2 --targets h.0.attn.c_attn --out part --json");
    assert_eq!(part["left"][0]["tensor"], "transformer.h.1.attn.c_attn.weight");
}

#[test]
fn what_cannot_be_extracted_is_refused_and_leaves_nothing() {
    let lab = Lab::new();
    lab.train("tuned", "--method full --steps 1 --batch-size 4 --lr 0.01");
    lab.train("bitfit", "--method bitfit --steps 1 --batch-size 4 --lr 0.01");
    lab.ok("merge --model base --adapter bitfit --out biases");
    lab.model("wide", |c| c.n_embd = 32);
    lab.model("deep", |c| c.n_layer = 3);
    let before = names(&lab.path("."));
    for (args, parts) in [
        ("--model base --tuned base --rank 2", &["nothing changed"][..]),
        ("--model base --tuned biases --rank 2", &["no linear map changed", "bias"]),
        ("--model base --tuned wide --rank 2", &["wide from base", "[48]", "[96]"]),
        ("--model base --tuned deep --rank 2", &["deep from base", "h.2"]),
        ("--model base --tuned tuned --rank 0", &["a rank is at least 1"]),
        // The head has the same matrix, and would stay as it is.
        ("--model base --tuned tuned --rank 2 --targets wte", &["target wte", "wpe"]),
        ("--model base --tuned tuned --rank 2 --targets c_attn.q", &["c_attn.q", "attn.c_proj"]),
        ("--model base --tuned none --rank 2", &["none"]),
        ("--model base --tuned tuned", &["--rank"]),
    ] {
        lab.fails(&format!("extract {args} --out out"), parts);
        assert_eq!(names(&lab.path(".")), before, "{args}");
    }
    lab.fails("extract --model base --tuned tuned --rank 2 --out base", &["base", "not empty"]);
}
