//! The methods and the architectures on the command line: what `info` says of them, and what generation and evaluation do
//! with them.

use std::{fs, path::Path};

use lora_core::peft::METHODS;
use lora_model::config::RawConfig;
use serde_json::{Value, json};

use crate::{
    cli::bad_input::refused,
    cli::lab::Lab,
    common::{self, golden},
};

impl Lab {
    /// A model of a golden configuration, with random weights and a tokenizer.
    pub(crate) fn golden(&self, case: &str, to: &str, change: impl FnOnce(&mut RawConfig)) {
        let found = golden().into_iter().find(|model| model.ends_with(Path::new(case).join("model")));
        common::base(&found.unwrap_or_else(|| panic!("no {case}")), &self.path(to), change);
    }
}

#[test]
fn the_help_says_which_methods_read_an_option() {
    let help = Lab::new().ok("train --help");
    for row in METHODS {
        assert!(help.contains(&format!("- {}:", row.name)), "{} is not there", row.name);
        for option in row.options {
            let flag = format!("      --{option}");
            let whole = |at: &usize| !help[at + flag.len()..].starts_with('-');
            let from = help.match_indices(&flag).map(|(at, _)| at).find(whole);
            let from = from.unwrap_or_else(|| panic!("--{option} is not there"));
            let about = help[from..].split("\n\n").next().unwrap();
            let readers =
                about.split_once('\n').and_then(|(_, text)| text.trim().split_once(": ")).unwrap_or_default().0;
            let reads = |method: &str| readers.split(", ").any(|reader| reader == method);
            assert!(row.name.split('+').any(reads), "{} is not among those of --{option}: {about}", row.name);
        }
    }
}

#[test]
fn adapters_are_dropped_for_evaluation_and_generation() {
    let lab = Lab::new();
    lab.train("run", "--method adapter-p --bottleneck 4 --steps 8 --lr 0.03");
    let loss = |more: &str| lab.json(&format!("eval --model base --data valid.txt --json {more}"))["loss"].clone();
    let (base, whole) = (loss(""), loss("--adapter run"));
    let one = loss("--adapter run --drop-layers 0");
    assert!(one != base && one != whole && base != whole, "{base}, {one}, {whole}");
    assert_eq!(loss("--adapter run --drop-layers none"), whole);
    assert_eq!(loss("--adapter run --drop-layers first:2"), base);
    let text = |more: &str| lab.ok(&format!("generate --model base --prompt a --max-new-tokens 8 {more}"));
    assert_eq!(text("--adapter run --drop-layers all"), text(""));
    // An encoder with its task.
    lab.golden("bert_regression", "bert", |_| ());
    lab.write("pairs.tsv", &common::pairs(|i| format!("{}.5", i % 4)));
    let task = "--model bert --data pairs.tsv --task values";
    lab.ok(&format!("train {task} --out rated --method adapter-p --bottleneck 4 --steps 4 --lr 0.03"));
    let rated = |more: &str| lab.json(&format!("eval {task} --adapter rated --json {more}"))["loss"].clone();
    assert!(rated("--drop-layers 0") != rated(""));
    assert_eq!(rated("--drop-layers none"), rated(""));
    lab.fails(&format!("eval {task} --adapter rated --drop-layers 2"), &["drop-layers = 2", "2 layers"]);
    lab.train("prefix", "--method pre-layer --prefix 2 --steps 1");
    lab.train("some", "--method adapter-d --bottleneck 4 --drop-layers 0 --steps 1");
    for (args, parts) in [
        ("--drop-layers 0", ["--adapter", "required"]),
        ("--adapter run --drop-layers 2", ["drop-layers = 2", "2 layers"]),
        ("--adapter run --drop-layers last:3", ["drop-layers = last:3", "2 layers"]),
        ("--adapter run --drop-layers upper", ["--drop-layers", "last:N"]),
        ("--adapter prefix --drop-layers 1", ["drop-layers = 1", "no adapter"]),
        ("--adapter some --drop-layers 0", ["drop-layers = 0", "layer 0 has no adapter"]),
    ] {
        lab.fails(&format!("eval --model base --data valid.txt {args}"), &parts);
        lab.fails(&format!("generate --model base --prompt a {args}"), &parts);
    }
}

#[test]
fn a_text_ends_at_any_of_the_tokens_that_the_folder_names() {
    let lab = Lab::new();
    lab.golden("llama3", "model", |_| ());
    let made = |more: &str| lab.json(&format!("generate --model model --prompt a --max-new-tokens 9 --json {more}"));
    let free = made("--eos none")["tokens"].as_array().unwrap().clone();
    assert_eq!(free.len(), 9);
    let end = lab.read("model/config.json").parse::<Value>().unwrap()["eos_token_id"].clone();
    let cut = |token: &Value| free.iter().position(|t| t == token).unwrap() + 1;
    let check = |what: &str, ends: &[&Value]| {
        let n = ends.iter().map(|t| cut(t)).min().unwrap_or(9);
        let (got, finished) = (made(""), !ends.is_empty());
        assert_eq!(got["tokens"].as_array().unwrap(), &free[..n], "{what}");
        assert_eq!(got["finished"], json!(finished), "{what}");
    };
    assert!(!free.contains(&end));
    check("one that does not come", &[]);
    lab.set("model/config.json", "eos_token_id", json!([end, free[4]]));
    check("a list", &[&free[4]]);
    lab.write("model/generation_config.json", &json!({"eos_token_id": [end, free[8], free[2]]}).to_string());
    check("that of generation_config.json instead", &[&free[8], &free[2]]);
    lab.write("model/generation_config.json", &json!({"eos_token_id": end}).to_string());
    check("a single one there", &[]);
    lab.write("model/generation_config.json", &json!({"eos_token_id": [-1]}).to_string());
    lab.fails("generate --model model --prompt a", &["model/generation_config.json", "eos_token_id", "[-1]"]);
}

/// Every kind of model, and adapters of every method, as objects and as text.
#[test]
fn info_tells_of_every_architecture_and_every_method() {
    let lab = Lab::new();
    for model in golden() {
        let path = model.display();
        let info = lab.json(&format!("info {path} --methods --json"));
        assert_eq!(info["parameters"], info["elements"], "{path}");
        let raw: Value = serde_json::from_str(&fs::read_to_string(model.join("config.json")).unwrap()).unwrap();
        for key in ["num_key_value_heads", "rope_theta", "rope_scaling", "rope_parameters"] {
            assert_eq!(info[key], raw[key], "{path}");
        }
        let class = raw["architectures"][0].as_str().unwrap();
        let head = match raw["id2label"].as_object().map(|names| names.len()) {
            Some(1) => "rating sequences",
            Some(_) if class.ends_with("ForSequenceClassification") => "classifying sequences: 3 labels",
            _ if class.ends_with("ForMaskedLM") => "filling in hidden tokens",
            _ => "continuing text",
        };
        assert_eq!(info["head"], head, "{path}");
        assert_eq!(info["labels"].as_array().is_some_and(|l| l.len() == 3), head.starts_with("classifying"), "{path}");
        let rows = info["methods"].as_array().unwrap();
        assert_eq!(rows.len(), METHODS.len());
        assert!(rows.iter().all(|row| row["trainable"].is_u64() != row["note"].is_string()), "{path}: {rows:?}");
        let text = lab.ok(&format!("info {path} --methods"));
        assert!(text.contains(head) && METHODS.iter().all(|m| text.contains(m.name)), "{text}");
    }
    // An encoder without a head: what stands in its file, and what a classifier would train.
    lab.golden("bert_regression", "bare", |_| ());
    let whole = lab.json("info bare --json")["parameters"].as_u64().unwrap();
    lab.set("bare/config.json", "architectures", json!(["BertModel"]));
    let bare = lab.json("info bare --methods --json");
    assert_eq!((&bare["parameters"], &bare["task_type"]), (&json!(whole), &Value::Null));
    assert!(bare["head"].as_str().unwrap().starts_with("none"));
    assert_eq!(bare["methods"].as_array().unwrap().len(), METHODS.len());

    for name in ["first", "second"] {
        lab.train(name, "--method adapter-p --bottleneck 3 --steps 1");
    }
    for row in METHODS.iter().filter(|m| !m.whole_model) {
        let fuse = if row.name == "fusion" { "--fuse first,second" } else { "" };
        lab.write("options.toml", "bottleneck = 4\nprefix = 2\n");
        lab.train("run", &format!("--config options.toml --method {} {fuse} --steps 1 --save-every 1", row.name));
        let run = lab.json("info run --json");
        let adapter = &run["adapter"];
        assert_eq!((&adapter["method"], &adapter["architecture"]), (&json!(row.name), &json!("gpt2")));
        // Targets that were not named are the architecture's, and the steps those of the run.
        let filled_in = ["fuse", "targets", "feedforward-modules", "total-step"];
        for option in row.options.iter().filter(|o| !filled_in.contains(*o)) {
            assert_eq!(adapter[*option], run["config"][*option], "{}: {option}", row.name);
        }
        // α/r where there is an α.
        let scaled = ["rank", "alpha"].iter().all(|option| row.options.contains(option));
        assert_eq!(adapter.get("scaling").is_some(), scaled, "{}", row.name);
        let trainable = adapter["trainable"].as_u64();
        assert!(trainable.is_some_and(|n| n > 0), "{adapter}");
        let checkpoint = lab.json("info run/checkpoints/step-00000001 --json");
        assert_eq!(checkpoint["trainable"].as_u64(), trainable, "{}", row.name);
        for path in ["run", "run/checkpoints/step-00000001"] {
            assert!(lab.ok(&format!("info {path}")).contains(row.name));
        }
        if row.name == "fusion" {
            assert_eq!(adapter["fuse"], json!({"first": 3, "second": 3}));
        }
        fs::remove_dir_all(lab.path("run")).unwrap();
    }
    // A base that has become another one is told of; one that is asked for has to fit.
    lab.model("base", |c| c.n_embd = 32);
    let info = lab.json("info first --json");
    assert!(info["adapter"]["note"].as_str().unwrap().contains("[3, 32]"), "{info}");
    lab.fails("info first --model base", &["first/adapter_model.safetensors", "[3, 32]"]);
}

/// A fusion trains on from its own folder, whatever became of the adapters that it combines.
#[test]
fn a_run_that_ends_before_its_ranks_are_cut_says_so() {
    let lab = Lab::new();
    let run = "train --model base --data train.txt --method adalora --init-r 4 --target-r 2 --batch-size 4 --steps 6";
    for (i, (schedule, told)) in
        [("--total-step 100", true), ("--total-step 100 --tfinal 94", false), ("", false)].into_iter().enumerate()
    {
        let output = lab.lora(&format!("{run} {schedule} --out out{i}"));
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{stderr}");
        assert_eq!(stderr.contains("total-step = 100: ranks come down to target-r at step 100"), told, "{stderr}");
    }
}

#[test]
fn a_fusion_trains_on() {
    let lab = Lab::new();
    for name in ["first", "second"] {
        lab.train(name, "--method adapter-p --bottleneck 3 --steps 1");
    }
    lab.train("fused", "--method fusion --fuse first,second --steps 2");
    let loss =
        |out: &str| lab.json(&format!("eval --model base --adapter {out} --data valid.txt --json"))["loss"].clone();
    refused(&lab, "--init-adapter fused --fuse first", &["fuse = first", "the adapter fused has first,second"]);
    for name in ["first", "second"] {
        fs::remove_dir_all(lab.path(name)).unwrap();
    }
    lab.train("more", "--init-adapter fused --steps 4 --lr 0.01 --save-every 2");
    assert!(loss("more").as_f64() < loss("fused").as_f64());
    assert_eq!(lab.json("info more --json")["adapter"]["fuse"], json!({"first": 3, "second": 3}));
    // Interrupted after its second step, it goes on to the same result.
    let end = lab.bytes("more/adapter_model.safetensors");
    fs::remove_dir_all(lab.path("more/checkpoints/step-00000004")).unwrap();
    lab.train("more", "--init-adapter fused --steps 4 --lr 0.01 --save-every 2 --resume");
    assert!(lab.bytes("more/adapter_model.safetensors") == end);
}

/// What begins at a part of the base trains beside the rest of it, and is an ordinary adapter in the end.
#[test]
fn an_adapter_can_begin_at_a_part_of_the_base() {
    let lab = Lab::new();
    let losses = |out: &str| {
        let lines = String::from_utf8(lab.bytes(&format!("{out}.jsonl"))).unwrap();
        let steps = lines.lines().map(|l| serde_json::from_str::<Value>(l).unwrap());
        steps.filter_map(|s| s["loss"].as_f64()).collect::<Vec<f64>>()
    };
    let run = |out: &str, flags: &str| {
        lab.train(out, &format!("--rank 2 --alpha 6 --steps 3 --lr 0.003 --log {out}.jsonl {flags}"));
        losses(out)
    };
    let plain = run("plain", "");
    for (word, toml) in [("pissa", "\"pissa\""), ("pissa_niter_3", "\"pissa_niter_3\""), ("olora", "\"OLoRA\"")] {
        let begun = run(word, &format!("--init-lora-weights {word}"));
        // The base's own output at the beginning, and another course.
        assert!((begun[0] / plain[0] - 1.0).abs() < 1e-5 && begun[2] != plain[2], "{word}: {begun:?}, {plain:?}");
        lab.write("init.toml", &format!("init_lora_weights = {toml}\n"));
        assert_eq!(run(&format!("{word}-file"), "--config init.toml"), begun, "{word}");
        let config: Value = serde_json::from_slice(&lab.bytes(&format!("{word}/adapter_config.json"))).unwrap();
        let said = ["r", "lora_alpha", "init_lora_weights"].map(|key| config[key].clone());
        assert_eq!(said, [json!(4), json!(12), json!(true)], "{word}");
        lab.train("more", &format!("--init-adapter {word} --rank 4 --alpha 12 --steps 3 --log more.jsonl"));
        assert!(losses("more")[2] < begun[0], "{word}: {:?}", losses("more"));
        fs::remove_dir_all(lab.path("more")).unwrap();
    }
    for (flag, toml, value) in [("false", "false", json!(false)), ("gaussian", "\"gaussian\"", json!("gaussian"))] {
        let begun = run(flag, &format!("--init-lora-weights {flag}"));
        assert_eq!((begun[0] - plain[0]).abs() < 1e-5, flag == "gaussian", "{flag}: {begun:?}, {plain:?}");
        lab.write("init.toml", &format!("init-lora-weights = {toml}\n"));
        assert_eq!(run(&format!("{flag}-file"), "--config init.toml"), begun, "{flag}");
        let config: Value = serde_json::from_slice(&lab.bytes(&format!("{flag}/adapter_config.json"))).unwrap();
        assert_eq!([&config["r"], &config["init_lora_weights"]], [&json!(2), &value], "{flag}");
    }
}

/// PEFT's options as flags, and in a file by the names that PEFT has for them: one adapter, which says them in PEFT's words.
#[test]
fn pefts_options_reach_the_adapter() {
    let lab = Lab::new();
    lab.write(
        "peft.toml",
        "r = 2\nlora_alpha = 6\ntarget_modules = \".*c_(attn|fc)\"\nexclude_modules = [\"1.mlp.c_fc\"]\nuse_dora = true\n\
         bias = \"lora_only\"\nmodules_to_save = [\"ln_f\"]\nsteps = 2\n\n[rank_pattern]\nc_fc = 1\n\"0.attn.c_attn\" = 3\n",
    );
    lab.train("file", "--config peft.toml");
    let flags = "--r 2 --lora-alpha 6 --target-modules .*c_(attn|fc) --exclude-modules 1.mlp.c_fc --use-dora --bias lora_only \
                 --modules-to-save ln_f --rank-pattern c_fc=1 --rank-pattern 0.attn.c_attn=3 --steps 2";
    lab.train("flags", flags);
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        assert!(lab.bytes(&format!("file/{file}")) == lab.bytes(&format!("flags/{file}")), "{file}");
    }
    let config: Value = serde_json::from_slice(&lab.bytes("file/adapter_config.json")).unwrap();
    for (key, value) in [
        ("r", json!(2)),
        ("lora_alpha", json!(6)),
        ("target_modules", json!(".*c_(attn|fc)")),
        ("exclude_modules", json!(["1.mlp.c_fc"])),
        ("rank_pattern", json!({"c_fc": 1, "0.attn.c_attn": 3})),
        ("use_dora", json!(true)),
        ("bias", json!("lora_only")),
        ("modules_to_save", json!(["ln_f"])),
    ] {
        assert_eq!(config[key], value, "{key}");
    }
    // It trains on, and its own options may be said again.
    lab.train("said", "--fan-in-fan-out --steps 1");
    let said: Value = serde_json::from_slice(&lab.bytes("said/adapter_config.json")).unwrap();
    assert_eq!(said["fan_in_fan_out"], json!(true));
    lab.train(
        "more",
        "--init-adapter flags --fan-in-fan-out --rank-pattern c_fc=1 --rank-pattern 0.attn.c_attn=3 --steps 1",
    );
    refused(&lab, "--init-adapter flags --rank-pattern c_fc=2", &["rank-pattern = c_fc=2", "c_fc=1,0.attn.c_attn=3"]);
    for (args, parts) in [
        ("--targets (c_attn", ["targets = (c_attn", "no regular expression"]),
        ("--rank-pattern c_fc=1", ["rank-pattern = c_fc", "no module that is adapted"]),
        ("--layers-to-transform 2", ["layers-to-transform = 2", "2 layers"]),
        ("--loraplus-lr-ratio 0", ["loraplus-lr-ratio = 0", "positive"]),
        ("--method bitfit --loraplus-lr-ratio 2", ["loraplus-lr-ratio = 2", "bitfit has none"]),
        ("--loraplus-lr-embedding=-1", ["loraplus-lr-embedding = -1", "≥ 0"]),
        ("--fan-in-fan-out=false", ["fan-in-fan-out = false", "c_attn of the architecture gpt2"]),
        ("--init-adapter flags --fan-in-fan-out=false", ["fan_in_fan_out", "so it is true"]),
        ("--init-lora-weights eva", ["--init-lora-weights", "activations"]),
        ("--init-lora-weights zeros", ["--init-lora-weights", "pissa_niter_N"]),
        ("--init-lora-weights orthogonal --rank 1048576", ["rank = 1048576", "at most 8192"]),
        ("--method adalora --init-r 1048576", ["init-r = 1048576", "to 8192"]),
        ("--init-lora-weights orthogonal --rank 3", ["init-lora-weights = orthogonal", "even"]),
        ("--init-lora-weights pissa --rank 17", ["init-lora-weights = pissa", "directions of the weight"]),
        ("--method lokr --loraplus-lr-ratio 2", ["loraplus-lr-ratio = 2", "lokr has none"]),
        ("--method vera --loraplus-lr-ratio 2", ["loraplus-lr-ratio = 2", "vera has none"]),
        ("--loraplus-lr-embedding 0.01", ["loraplus-lr-embedding = 0.01", "without loraplus-lr-ratio"]),
        ("--init-adapter flags --init-lora-weights olora", ["init-lora-weights = olora", "the adapter flags has true"]),
        (
            "--method ia3 --targets c_attn --feedforward-modules c_fc",
            ["feedforward-modules = c_fc", "some of the targets"],
        ),
        ("--method ln-tuning --targets c_attn", ["targets = transformer.h.0.attn.c_attn", "no normalisation"]),
    ] {
        refused(&lab, args, &parts);
    }
}

/// Names that PEFT has in the configurations of its types, and values that it allows, in a TOML file.
#[test]
fn keys_of_pefts_types_are_read() {
    let lab = Lab::new();
    let read = |text: &str, key: &str| {
        lab.write("peft.toml", &format!("{text}\nsteps = 1\n"));
        let _ = fs::remove_dir_all(lab.path("run"));
        lab.train("run", "--config peft.toml");
        lab.json("info run --json")["config"][key].clone()
    };
    for (text, key, value) in [
        ("method = \"adalora\"\ndeltaT = 3", "delta-t", json!(3)),
        ("method = \"vera\"\nvera_dropout = 0.25", "dropout", json!(0.25)),
        ("method = \"pre-layer\"\nnum_virtual_tokens = 5", "prefix", json!(5)),
        ("layers_to_transform = 1", "layers-to-transform", json!([1])),
        ("layers_to_transform = [0]\nlayers_pattern = \"h\"", "layers-pattern", json!(["h"])),
        ("method = \"adalora\"\nbeta1 = 0.8\nadalora_beta1 = 0.7", "adalora-beta1", json!(0.7)),
    ] {
        assert_eq!(read(text, key), value, "{text}");
    }
    // PEFT's AdaLoRA has β's too: the file has to say whose they are.
    for key in ["beta1", "beta2"] {
        lab.write("peft.toml", &format!("method = \"adalora\"\n{key} = 0.8\nsteps = 1\n"));
        refused(&lab, "--config peft.toml", &[&format!("{key} = 0.8"), &format!("adalora-{key}")]);
        lab.train(key, &format!("--config peft.toml --{key} 0.9"));
    }
}

/// Of several keys of a pattern that match, the first holds: an adapter that trains on keeps their order.
#[test]
fn patterns_keep_their_order() {
    let lab = Lab::new();
    lab.train("first", "--targets c_fc --rank 2 --rank-pattern mlp.c_fc=3 --rank-pattern c_fc=1 --steps 1");
    lab.train("second", "--init-adapter first --steps 1");
    for name in ["first", "second"] {
        let info = lab.json(&format!("info {name} --json --tensors"));
        let config: Value = serde_json::from_slice(&lab.bytes(&format!("{name}/adapter_config.json"))).unwrap();
        assert_eq!(config["rank_pattern"].to_string(), r#"{"mlp.c_fc":3,"c_fc":1}"#, "{name}");
        assert!(info.to_string().contains("c_fc.lora_A.weight"), "{name}: {info}");
    }
    assert!(lab.bytes("first/adapter_model.safetensors").len() == lab.bytes("second/adapter_model.safetensors").len());
    lab.ok("eval --model base --adapter second --data valid.txt");
}
