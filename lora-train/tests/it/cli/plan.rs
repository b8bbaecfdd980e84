//! `lora plan`.

use crate::cli::lab::Lab;

#[test]
fn virtual_tokens_take_positions_where_they_are_counted() {
    let lab = Lab::new();
    let planned =
        |flags: &str| lab.json(&format!("plan --arch gpt2 --method pre-layer --json {flags}"))["seq_len"].clone();
    assert_eq!(planned("--prefix 24"), 1000);
    assert_eq!(planned("--prefix 24 --seq-len 1000"), 1000);
    assert_eq!(planned("--prefix 24 --count-prefix=false --seq-len 1024"), 1024);
    assert_eq!(planned("--prefix 1025 --count-prefix=false"), 1024);
    lab.fails(
        "plan --arch gpt2 --method pre-layer --prefix 24 --seq-len 1001",
        &["1024 positions", "24 virtual tokens"],
    );
    lab.fails("plan --arch gpt2 --method pre-layer --prefix 1024", &["prefix", "1024 positions"]);
}

#[test]
fn gpt3_stands_beside_the_paper() {
    let lab = Lab::new();
    let setting = "plan --arch gpt3-175b --rank 4 --targets c_attn.q,c_attn.v --dtype f16";
    let plan = lab.json(&format!("{setting} --json"));
    let (full, lora) = (&plan["full"], &plan["adapted"]);
    let number = |v: &serde_json::Value| v.as_u64().unwrap();
    let p = number(&plan["parameters"]);
    assert_eq!((p, number(&full["trainable"])), (174_604_259_328, 174_604_259_328));
    assert_eq!(number(&lora["trainable"]), 2 * 2 * 96 * 4 * 12_288);
    // In 16 bits, as the paper has them: 350 GB and 35 MB, 35 TB and 354 GB.
    let close = |got: u64, theirs: f64| (got as f64 / theirs - 1.0).abs() < 0.08;
    assert_eq!(number(&lora["checkpoint_bytes_16"]), 37_748_736);
    assert!(close(37_748_736, 35e6) && close(number(&full["checkpoint_bytes_16"]), 350e9));
    assert!(close(number(&full["tasks_bytes_16"]), 35e12) && close(number(&lora["tasks_bytes_16"]), 354e9));
    // Training memory: LoRA's is that of the frozen weights and little more.
    let memory = &lora["memory"];
    assert_eq!(number(&memory["weights"]), 2 * p + 6 * 18_874_368);
    assert_eq!(number(&memory["gradients"]), 4 * 18_874_368);
    assert_eq!(number(&memory["optimiser"]), 8 * 18_874_368);
    let activations = number(&memory["activations"]);
    assert!((10_000_000_000..80_000_000_000).contains(&activations), "{activations}");
    let memory = &full["memory"];
    assert_eq!(number(&memory["weights"]) + number(&memory["gradients"]) + number(&memory["optimiser"]), 22 * p);
    let sum: u64 = ["weights", "gradients", "optimiser", "activations"].map(|part| number(&memory[part])).iter().sum();
    assert_eq!(sum, number(&memory["total"]));

    let text = lab.ok(setting);
    for part in ["174,604,259,328", "18,874,368", "37.7 MB", "1.2 TB", "350 GB", "35.0 MB", "354 GB", "100 tasks"] {
        assert!(text.contains(part), "no {part} in {text}");
    }
    // Rows of a table are aligned at their right.
    let ends: Vec<usize> =
        text.lines().filter(|l| l.starts_with("  weights") || l.starts_with("  gradients")).map(str::len).collect();
    assert!(ends.len() == 2 && ends[0] == ends[1], "{text}");
    let other = lab.ok("plan --arch gpt3-175b --rank 4 --tasks 7");
    assert!(other.contains("7 tasks") && !other.contains("354 GB"), "{other}");
}

#[test]
fn any_model_and_method_by_its_configuration_alone() {
    let lab = Lab::new();
    // Nothing but the configuration is there.
    std::fs::create_dir(lab.path("only")).unwrap();
    lab.write("only/config.json", &lab.read("base/config.json"));
    let plan = |more: &str| lab.json(&format!("plan --model only --json --dtype f32 {more}"));
    let (one, two) = (plan("--batch-size 4 --seq-len 30"), plan("--batch-size 8 --seq-len 30"));
    let activations = |v: &serde_json::Value, side: &str| v[side]["memory"]["activations"].as_u64().unwrap();
    assert!(activations(&two, "adapted") > activations(&one, "adapted"));
    assert_eq!(one["seq_len"], 30);
    // Without gradients to the lower layers, less is kept.
    let top = plan("--method top2 --layers last:1 --batch-size 8 --seq-len 30");
    assert!(activations(&top, "adapted") < activations(&top, "full"));
    // Nor where layers are computed once more on the way back.
    let long =
        |more: &str| lab.json(&format!("plan --arch gpt2 --json --dtype f32 --batch-size 4 --seq-len 1024 {more}"));
    let (kept, again) = (long(""), long("--checkpoint"));
    for side in ["adapted", "full"] {
        assert!(2 * activations(&again, side) < activations(&kept, side), "{side}");
    }
    for method in ["full", "bitfit", "adapter-h", "adapter-l", "adapter-p", "pre-embed", "pre-layer", "lora+pre-layer"]
    {
        let of = plan(&format!("--method {method} --seq-len 30"));
        assert_eq!(
            (of["method"].as_str(), of["full"].clone()),
            (Some(method), plan("--seq-len 30")["full"].clone()),
            "{method}"
        );
        assert!(lab.ok(&format!("plan --model only --method {method}")).contains("trainable parameters"));
    }
    for arch in ["roberta-large", "deberta-v2-xxlarge", "llama-3-8b", "qwen3-0.6b"] {
        assert!(lab.ok(&format!("plan --arch {arch}")).contains("activations"), "{arch}");
    }
}

#[test]
fn what_cannot_be_planned_is_said() {
    let lab = Lab::new();
    for (args, parts) in [
        ("", &["--arch is missing"][..]),
        ("--arch gpt5", &["arch = gpt5", "gpt3-175b", "llama-3-8b"]),
        ("--arch gpt2 --model base", &["--model"]),
        ("--model nowhere", &["nowhere"]),
        ("--arch gpt2 --method magic", &["--method"]),
        ("--arch llama-3-8b --method bitfit", &["bitfit", "trains nothing"]),
        ("--arch deberta-v2-xxlarge --method pre-layer", &["pre-layer", "does not fit"]),
        ("--arch gpt2 --rank 0", &["rank = 0"]),
        ("--arch gpt2 --targets nothing", &["nothing", "c_attn"]),
        ("--arch gpt2 --method bitfit --rank 4", &["rank", "bitfit", "does not read it"]),
        ("--arch gpt2 --method fusion", &["fuse"]),
        ("--arch gpt2 --batch-size 0", &["batch-size = 0"]),
        ("--arch gpt2 --batch-size 9999999999", &["batch-size = 9999999999"]),
        ("--arch gpt3-175b --batch-size 4294967295", &["batch-size = 4294967295", "beyond"]),
        ("--arch gpt2 --seq-len 0", &["seq-len = 0"]),
        ("--arch gpt2 --seq-len 1025", &["seq-len = 1025", "1024 positions"]),
        ("--arch gpt2 --method pre-embed --prefix 24 --seq-len 1001", &["seq-len = 1001", "24 virtual"]),
        ("--arch gpt2 --method pre-embed --prefix 1024", &["prefix = 1024"]),
        ("--arch gpt2 --tasks 0", &["tasks = 0"]),
        ("--arch gpt3-175b --tasks 18446744073709551615", &["beyond", "--tasks"]),
        ("--arch gpt2 --dtype int4", &["--dtype"]),
    ] {
        lab.fails(&format!("plan {args}"), parts);
    }
}
