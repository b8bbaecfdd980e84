//! `lora merge --adapters`.

use std::{collections::BTreeMap, fs};

use lora_core::Tensor;
use lora_kernels::{DType, Device};
use serde_json::{Value, json};

use crate::cli::lab::{Lab, names};

/// A base, and adapters of it that differ in rank, scale and targets.
fn lab() -> Lab {
    let lab = Lab::new();
    for (name, options) in [
        ("a", "--rank 2 --alpha 8 --targets c_attn,c_fc --seed 1"),
        ("b", "--rank 2 --alpha 4 --rslora --targets c_attn.q,c_attn.v --seed 2"),
        ("c", "--rank 2 --alpha 4 --targets c_attn --seed 3"),
    ] {
        lab.train(name, &format!("--steps 6 --batch-size 4 --lr 0.05 {options}"));
    }
    lab
}

#[test]
fn adapters_become_one_or_go_into_the_base() {
    let lab = lab();
    let loss = |args: &str| {
        let eval = lab.json(&format!("eval --data valid.txt --json {args}"));
        eval["loss"].as_f64().unwrap()
    };
    // The sum of all, once as an adapter and once in the base; what was one block each has no blocks any more.
    let about = lab.json("merge --adapters a:0.7,b:0.5,c:-0.2 --how cat --out cat --json");
    assert_eq!((&about["rank"], &about["modules"], &about["how"]), (&json!(8), &json!(4), &json!("cat")));
    assert_eq!(about["adapters"][2], json!({"adapter": "c", "weight": -0.2}));
    assert_eq!(names(&lab.path("cat")), ["adapter_config.json", "adapter_model.safetensors"]);
    let info = lab.json("info cat --json");
    assert_eq!((&info["rank"], &info["scaling"], &info["architecture"]), (&json!(8), &json!(1.0), &json!("gpt2")));
    assert_eq!(info["targets"], json!(["c_attn", "c_fc"]));
    let changed = lab.json("merge --model base --adapters a:0.7,b:0.5,c:-0.2 --how cat --out model --json");
    assert_eq!(changed["changed"], 4);
    let (beside, inside) = (loss("--model base --adapter cat"), loss("--model model"));
    assert!((beside - inside).abs() < 1e-5, "{beside} {inside}");
    assert!((beside - loss("--model base")).abs() > 1e-3);

    // A rank that holds the whole sum changes nothing; a lower one says what it costs.
    let svd = lab.json("merge --adapters a:0.7,b:0.5,c:-0.2 --how svd --svd-rank 8 --out svd --json");
    assert!(svd["cut"].as_f64().unwrap() < 1e-6, "{svd}");
    assert!((loss("--model base --adapter svd") - beside).abs() < 1e-5);
    let cut = lab.json("merge --adapters a:0.7,b:0.5,c:-0.2 --how svd --svd-rank 1 --out one --json");
    assert!((0.01..1.0).contains(&cut["cut"].as_f64().unwrap()), "{cut}");

    // The base given, and still an adapter; DARE by its seed.
    let dare = |out: &str, seed: u64| {
        lab.ok(&format!(
            "merge --model base --adapters a,c --how dare_ties --density 0.5 --majority-sign frequency --seed {seed} --into \
             adapter --out {out}"
        ));
        lab.bytes(&format!("{out}/adapter_model.safetensors"))
    };
    let (first, again, other) = (dare("d1", 4), dare("d2", 4), dare("d3", 5));
    assert!(first == again && first != other);
    // One alone, scaled: half of it twice is it.
    lab.ok("merge --adapters c:0.5 --out half");
    lab.ok("merge --adapters half,half --how cat --out again");
    assert!((loss("--model base --adapter again") - loss("--model base --adapter c")).abs() < 1e-5);
}

#[test]
fn a_merged_model_of_16_bits_says_what_rounding_costs() {
    let lab = lab();
    lab.ok("merge --model base --adapter a --out f32");
    let tensors = |name: &str| {
        let model = lora_model::load(&lab.path(name), &Device::Cpu).unwrap();
        let tensors = model.tensors().map(|(name, t)| (name.to_owned(), t.to_f64().unwrap()));
        tensors.collect::<BTreeMap<_, _>>()
    };
    let (base, exact) = (tensors("base"), tensors("f32"));
    let mut shares = Vec::new();
    for (name, dtype, said) in [("bf16", DType::Bf16, "bfloat16"), ("f16", DType::F16, "float16")] {
        let about = lab.json(&format!("merge --model base --adapter a --dtype {name} --out {name} --json"));
        let config: Value = serde_json::from_str(&lab.read(&format!("{name}/config.json"))).unwrap();
        assert_eq!(config["torch_dtype"], said);
        let whole = |folder: &str| lab.bytes(&format!("{folder}/model.safetensors")).len();
        assert!(whole(name) < whole("f32") * 6 / 10, "{} of {} bytes", whole(name), whole("f32"));
        let (mut errors, mut updates, mut worst) = (0.0, 0.0, (String::new(), 0.0));
        for (tensor, read) in tensors(name) {
            let rounded = Tensor::from_slice(&Device::Cpu, &[exact[&tensor].len()], &exact[&tensor]).unwrap();
            let rounded = rounded.to_dtype(DType::F32).unwrap().to_dtype(dtype).unwrap().to_f64().unwrap();
            assert!(read == rounded, "{tensor} in {name}");
            let sum = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f64>();
            let (error, update) = (sum(&read, &exact[&tensor]), sum(&exact[&tensor], &base[&tensor]));
            if update > 0.0 {
                errors += error;
                updates += update;
                if (error / update).sqrt() > worst.1 {
                    worst = (tensor, (error / update).sqrt());
                }
            }
        }
        let near = |key: &str, expected: f64| {
            let found = about["rounding"][key].as_f64().unwrap();
            assert!((found - expected).abs() < 1e-9 * expected, "{key}: {found} {expected}");
        };
        near("share", (errors / updates).sqrt());
        near("worst", worst.1);
        assert_eq!(about["rounding"]["worst_tensor"], worst.0);
        shares.push(errors / updates);
    }
    // Three more bits, an eighth of the error.
    assert!((0.7..1.4).contains(&(shares[0].sqrt() / shares[1].sqrt() / 8.0)), "{shares:?}");

    lab.copy("a", "huge");
    lab.set("huge/adapter_config.json", "lora_alpha", json!(1e9));
    lab.fails("merge --model base --adapter huge --dtype f16 --out out", &["c_attn", "65504", "bf16"]);
    assert!(!lab.path("out").exists());
    lab.fails("merge --adapters a,c --dtype bf16 --out out", &["--dtype", "merged model"]);
}

/// What a person has to know is said without progress too.
#[test]
fn what_merging_leaves_out_is_said() {
    let lab = lab();
    lab.train("whole", "--steps 2 --batch-size 4 --rank 2 --targets c_attn --modules-to-save ln_f");
    let said = |args: &str| String::from_utf8(lab.lora(&format!("merge --no-progress {args}")).stderr).unwrap();
    let stderr = said("--adapters a,whole:0.5 --how cat --out one");
    assert!(stderr.contains("note: whole: its weight 0.5") && stderr.contains("transformer.ln_f.weight"), "{stderr}");
    let huge = "merge --adapters a,c --how svd --svd-rank 18446744073709551615 --out huge";
    lab.fails(huge, &["svd-rank = 18446744073709551615", "1048576"]);
    assert!(said("--adapters a,c --how svd --svd-rank 1 --out two").contains("note: cutting to rank 1"));
    assert!(said("--model base --adapter a --dtype bf16 --out three").contains("note: rounding to bf16"));
    // As scripts for PEFT spell flags.
    assert_eq!(said("--adapters a,c --how svd --svd_rank=2 --out four").lines().count(), 1);
}

/// Whatever a merged model would hold that is no number, by its name: in what an adapter changes, and elsewhere.
#[test]
fn what_is_no_number_is_not_written() {
    let lab = lab();
    lab.train("ia3", "--method ia3 --steps 1 --batch-size 4");
    for tensor in ["transformer.ln_f.bias", "transformer.h.1.attn.c_attn.weight"] {
        let _ = fs::remove_dir_all(lab.path("bad"));
        lab.copy("base", "bad");
        let mut bytes = lab.bytes("bad/model.safetensors");
        let start = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header: Value = serde_json::from_slice(&bytes[8..start]).unwrap();
        let at = start + header[tensor]["data_offsets"][0].as_u64().unwrap() as usize;
        bytes[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
        fs::write(lab.path("bad/model.safetensors"), bytes).unwrap();
        let what = tensor.split('.').rev().nth(1).unwrap();
        for adapters in ["--adapter a", "--adapter ia3", "--adapters a,c"] {
            for dtype in ["f32", "bf16", "f16"] {
                lab.fails(&format!("merge --model bad {adapters} --dtype {dtype} --out out"), &[what, "NaN"]);
                assert!(!lab.path("out").exists(), "{adapters} {dtype}");
            }
        }
    }
}

#[test]
fn what_cannot_be_merged_is_refused_and_leaves_nothing() {
    let lab = lab();
    lab.train("p", "--steps 1 --batch-size 4 --method adapter-p --bottleneck 4");
    lab.model("wide", |c| c.n_embd = 32);
    lab.copy("a", "damaged");
    lab.write("damaged/adapter_model.safetensors", "x");
    let before = names(&lab.path("."));
    for (args, parts) in [
        ("--adapters a,b --how linear", &["linear", "a has rank 2", "b has rank 4", "cat"][..]),
        ("--adapters a,c --how ties", &["density", "ties"]),
        ("--adapters a,c --how ties --density 2", &["density = 2"]),
        ("--adapters a,c --how nothing", &["nothing", "magnitude_prune"]),
        ("--adapters a,p", &["p/adapter_config.json", "adapter-p"]),
        ("--adapters a,none", &["none"]),
        ("--adapters a,damaged", &["damaged"]),
        ("--adapters a:x,c", &["a:x"]),
        ("--adapters a:nan,c", &["weight"]),
        ("--adapters a,c --into model", &["--into", "--model"]),
        ("--adapters a,c --adapter a --model base", &["--adapter"]),
        ("--adapters a,c --model wide", &["wide with the merged adapter", "[16, 48]", "[32, 96]"]),
        ("--model base", &["--adapter"]),
        ("--model base --adapter a --how cat", &["--adapters"]),
        ("--adapters a,c --seed 3", &["--seed", "linear drops nothing"]),
    ] {
        lab.fails(&format!("merge {args} --out out"), parts);
        assert_eq!(names(&lab.path(".")), before, "{args}");
    }
    lab.fails("merge --adapters a,c --out base", &["base", "not empty"]);
}

/// Adapted embeddings go into a base whose head shares their matrix: the head keeps it, and is a map of its own then, which can
/// be adapted too.
#[test]
fn adapted_embeddings_and_heads_go_into_the_base() {
    let lab = Lab::new();
    let loss = |args: &str| {
        let eval = lab.json(&format!("eval --data valid.txt --json {args}"));
        eval["loss"].as_f64().unwrap()
    };
    let same = |a: f64, b: f64| assert!((a - b).abs() < 1e-5, "{a} {b}");
    let config = |model: &str| -> serde_json::Value {
        serde_json::from_slice(&lab.bytes(&format!("{model}/config.json"))).unwrap()
    };
    lab.train(
        "words",
        "--rank 2 --targets wte,wpe,c_attn --lr 0.01 --steps 6 --loraplus-lr-ratio 2 --loraplus-lr-embedding 0.01",
    );
    let beside = loss("--model base --adapter words");
    assert!((beside - loss("--model base")).abs() > 1e-2);
    lab.ok("merge --model base --adapter words --out merged");
    assert_ne!(config("base")["tie_word_embeddings"], json!(false));
    assert_eq!(config("merged")["tie_word_embeddings"], json!(false));
    same(loss("--model merged"), beside);
    lab.ok("merge --model base --adapters words --out merged-as-one-of-several");
    same(loss("--model merged-as-one-of-several"), beside);

    lab.ok("train --model merged --data train.txt --out head --rank 2 --targets lm_head,c_fc --lr 0.01 --steps 6");
    // The head is measured like any map.
    let measured = lab.json("analyze head --model merged --json")["modules"]["lm_head"].clone();
    let of = |key: &str| measured[key].as_f64().unwrap();
    assert!(measured["shape"][1] == 16 && of("base_norm") > 0.0 && of("amplification") > 0.0, "{measured}");
    let beside = loss("--model merged --adapter head");
    assert!((beside - loss("--model merged")).abs() > 1e-3);
    for (how, out) in [("--adapter head", "whole"), ("--adapters head", "again")] {
        lab.ok(&format!("merge --model merged {how} --out {out}"));
        same(loss(&format!("--model {out}")), beside);
    }
    let prompt = "--prompt name --max-new-tokens 8";
    assert_eq!(
        lab.ok(&format!("generate --model merged --adapter head {prompt}")),
        lab.ok(&format!("generate --model whole {prompt}"))
    );
    lab.fails(
        "train --model base --data train.txt --out no --targets lm_head",
        &["lm_head", "matches no module", "wte"],
    );
    lab.fails("train --model merged --data train.txt --out no --targets lm_head --use-dora", &["use-dora", "lm_head"]);
    lab.fails(
        "train --model base --data train.txt --out no --targets wte --use-dora",
        &["use-dora", "transformer.wte"],
    );
}
