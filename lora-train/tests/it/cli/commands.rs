//! What each command does when all is well.

use serde_json::{Value, json};

use crate::cli::lab::{Lab, lines, names, success};

const QUICK: &str = "--lr 3e-2 --rank 4 --alpha 8";

#[test]
fn training_leaves_an_adapter_and_a_log_and_a_lower_loss() {
    let lab = Lab::new();
    let before = lab.json("eval --model base --data valid.txt --json");
    let summary: Value = serde_json::from_str(&lab.train(
        "run",
        &format!("{QUICK} --targets c_attn,c_proj,c_fc --steps 40 --valid valid.txt --eval-every 20 --save-every 20 --log log.jsonl --json"),
    ))
    .unwrap();
    assert_eq!(
        names(&lab.path("run")),
        ["adapter_config.json", "adapter_model.safetensors", "checkpoints", "run.toml"]
    );
    assert_eq!(names(&lab.path("run/checkpoints")), ["step-00000020", "step-00000040"]);
    let checkpoint = ["adapter_config.json", "adapter_model.safetensors", "state.json", "state.safetensors"];
    assert_eq!(names(&lab.path("run/checkpoints/step-00000040")), checkpoint);
    let last = lab.bytes("run/checkpoints/step-00000040/adapter_model.safetensors");
    assert!(last == lab.bytes("run/adapter_model.safetensors"));

    let log: Vec<Value> = lab.read("log.jsonl").lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(log.len(), 42);
    for (i, line) in log.iter().enumerate() {
        let keys: Vec<&str> = line.as_object().unwrap().keys().map(String::as_str).collect();
        match i {
            20 | 41 => assert_eq!(keys, ["eval_step", "eval_loss", "eval_perplexity", "eval_targets"]),
            _ => assert_eq!(keys, ["step", "loss", "lr", "grad_norm", "tokens", "tokens_per_s"]),
        }
    }
    assert_eq!(lab.logged("log.jsonl", "step"), (1..=40).map(f64::from).collect::<Vec<_>>());
    assert_eq!(lab.logged("log.jsonl", "lr")[..2], [0.03, 0.03 * (39.0 / 40.0)]);

    let after = lab.json("eval --model base --adapter run --data valid.txt --json");
    let loss = |v: &Value| v["loss"].as_f64().unwrap();
    assert!(loss(&after) < loss(&before) - 0.05, "{before} {after}");
    assert_eq!(after["targets"], before["targets"]);
    assert_eq!(after["loss"], log[41]["eval_loss"]);
    assert!((after["perplexity"].as_f64().unwrap() - loss(&after).exp()).abs() < 1e-9);
    assert_eq!((&summary["steps"], &summary["interrupted"]), (&json!(40), &json!(false)));
    assert_eq!(summary["evaluation"]["loss"], after["loss"]);
    let text = lab.ok("eval --model base --adapter run --data valid.txt");
    assert!(text.starts_with("loss ") && text.contains("perplexity ") && text.contains("targets "), "{text}");
}

#[test]
fn splitting_a_batch_and_the_number_of_threads_change_nothing() {
    let lab = Lab::new();
    let options =
        format!("{QUICK} --dropout 0.1 --label-smoothing 0.1 --clip 1 --steps 8 --targets c_attn.q,c_attn.v,c_fc");
    for threads in [1, 2] {
        lab.train(&format!("t{threads}"), &format!("{options} --threads {threads} --log t{threads}.jsonl"));
    }
    assert_eq!(lab.log("t1.jsonl"), lab.log("t2.jsonl"));
    assert!(lab.bytes("t1/adapter_model.safetensors") == lab.bytes("t2/adapter_model.safetensors"));
    let whole = lab.logged("t1.jsonl", "loss");
    for parts in [2, 3, 4] {
        lab.train(&format!("g{parts}"), &format!("{options} --grad-accum {parts} --log g{parts}.jsonl"));
        let split = lab.logged(&format!("g{parts}.jsonl"), "loss");
        assert_eq!(lab.logged(&format!("g{parts}.jsonl"), "tokens"), lab.logged("t1.jsonl", "tokens"));
        assert!(whole.iter().zip(&split).all(|(a, b)| (a - b).abs() < 1e-6), "{parts}: {whole:?} {split:?}");
    }
}

#[test]
fn full_fine_tuning_leaves_a_model_that_trains_on() {
    let lab = Lab::new();
    lab.train("full", "--method full --steps 12 --lr 5e-3");
    let loss =
        |model: &str| lab.json(&format!("eval --model {model} --data valid.txt --json"))["loss"].as_f64().unwrap();
    assert!(loss("full") < loss("base") - 0.1);
    lab.ok("train --model full --data train.txt --out next --steps 2");
}

#[test]
fn a_model_from_nothing() {
    let lab = Lab::new();
    let text: String = lines(0, 200).replace("||", "\n");
    lab.write("a.txt", &text[..text.len() / 2]);
    lab.write("b.txt", &text[text.len() / 2..]);
    let options = "--text a.txt b.txt --valid a.txt --vocab 300 --layers 2 --dim 16 --heads 2 --context 32 --steps 30 \
                   --batch-size 4 --lr 1e-2 --warmup 3";
    lab.ok(&format!("pretrain {options} --out one --log one.jsonl"));
    lab.ok(&format!("pretrain {options} --out two --log two.jsonl --threads 1"));
    assert_eq!(lab.log("one.jsonl"), lab.log("two.jsonl"));
    assert!(lab.bytes("one/model.safetensors") == lab.bytes("two/model.safetensors"));
    let losses = lab.logged("one.jsonl", "loss");
    assert!(losses[29] < losses[0] - 1.0, "{losses:?}");

    lab.ok("train --model one --data train.txt --out adapter --steps 2");
    lab.ok("generate --model one --adapter adapter --prompt name");
}

#[test]
fn generation_is_deterministic_and_goes_where_it_is_told() {
    let lab = Lab::new();
    lab.train("run", &format!("{QUICK} --steps 30"));
    let base = "generate --model base --adapter run --max-new-tokens 12";
    let greedy = lab.ok(&format!("{base} --prompt name"));
    assert_eq!(greedy, lab.ok(&format!("{base} --prompt name --threads 1")));
    let drawn = |seed: u64, how: &str| lab.ok(&format!("{base} --prompt name --seed {seed} {how}"));
    assert_eq!(drawn(1, "--top-k 40"), drawn(1, "--top-k 40"));
    assert_ne!(drawn(1, "--temperature 3"), drawn(2, "--temperature 3"));
    assert_ne!(drawn(1, "--temperature 3"), greedy);
    assert_eq!(drawn(1, "--top-k 1"), greedy, "the likeliest of one is the likeliest");

    // Equal contexts of neighbouring lines are one prompt; in JSON lines each stands for itself.
    lab.write("prompts.txt", "a : b||x\na : b||\nc : d||z\na : b||z\n");
    lab.write("prompts.jsonl", "{\"prompt\": \"a : b\", \"completion\": \"x\"}\n{\"prompt\": \"a : b\"}\n");
    let texts = |args: &str| lab.ok(&format!("{base} {args}")).lines().map(str::to_owned).collect::<Vec<_>>();
    let lines = texts("--data prompts.txt");
    assert_eq!(lines.len(), 3);
    assert_eq!(lines[0], lines[2]);
    assert_eq!(texts("--data prompts.txt --batch-size 1"), lines, "batches change no greedy text");
    assert_eq!(texts("--data prompts.jsonl"), [lines[0].clone(), lines[0].clone()]);
    let alone = lab.lora_with(&format!("{base} --append-end-of-text --prompt"), " a : b ");
    assert_eq!(success("generate", alone).trim_end(), lines[0]);
    assert!(lab.ok(&format!("{base} --data prompts.txt --out texts.txt")).is_empty());
    assert_eq!(lab.read("texts.txt").lines().collect::<Vec<_>>(), lines);
    assert!(!lab.path("texts.txt.part").exists());

    // Drawn texts do not depend on how the prompts are divided, and equal prompts have texts of their own.
    let drawn = |size: usize| texts(&format!("--data train.txt --temperature 2 --top-k 0 --batch-size {size}"));
    let all = drawn(64);
    assert_eq!(all.len(), 40);
    assert!([1, 7].into_iter().all(|size| drawn(size) == all));
    lab.write("same.jsonl", &"{\"prompt\": \"a : b\"}\n".repeat(4));
    let mut same = texts("--data same.jsonl --temperature 3 --top-k 0 --batch-size 2");
    same.sort();
    same.dedup();
    assert_eq!(same.len(), 4);

    lab.ok(&format!("{base} --data prompts.txt --num-beams 3 --eos none --out texts.jsonl"));
    for line in lab.read("texts.jsonl").lines() {
        let v: Value = serde_json::from_str(line).unwrap();
        let keys: Vec<&str> = v.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(keys, ["prompt", "text", "tokens", "finished", "score"]);
        assert_eq!((v["tokens"].as_array().unwrap().len(), &v["finished"]), (12, &json!(false)));
    }
    let stopped = lab.json(&format!("{base} --prompt name --json --eos 299,<|endoftext|>,{}", {
        lab.json(&format!("{base} --prompt name --json"))["tokens"][0].as_u64().unwrap()
    }));
    assert_eq!((stopped["tokens"].as_array().unwrap().len(), &stopped["finished"]), (1, &json!(true)));
}

#[test]
fn a_merged_model_is_the_base_with_its_adapter() {
    let lab = Lab::new();
    for (name, more) in [("whole", "--targets c_attn,c_proj"), ("parts", "--targets c_attn.q,c_attn.v --rslora")] {
        lab.train(name, &format!("{QUICK} --steps 10 {more}"));
        let summary = lab.json(&format!("merge --model base --adapter {name} --out {name}-merged --json"));
        assert_eq!(summary["changed"], if name == "whole" { 6 } else { 2 });
        let loss = |args: &str| lab.json(&format!("eval {args} --data valid.txt --json"))["loss"].as_f64().unwrap();
        let (beside, merged) =
            (loss(&format!("--model base --adapter {name}")), loss(&format!("--model {name}-merged")));
        assert!((beside - merged).abs() < 1e-5, "{beside} {merged}");
        assert!((loss("--model base") - merged).abs() > 1e-3);
    }
    assert!(lab.path("whole-merged/tokenizer.json").exists());
    lab.ok("generate --model whole-merged --prompt a");
    assert!(names(&lab.path("")).iter().all(|n| !n.contains("partial")));
    lab.fails("merge --model base --adapter whole --out whole-merged", &["whole-merged", "not empty"]);

    // What a merge that was killed has left goes, unless it is still at work.
    let stale = lab.path(".again.partial");
    std::fs::create_dir(&stale).unwrap();
    std::fs::write(stale.join("model-00001-of-00002.safetensors"), "half").unwrap();
    let held = std::fs::File::open(&stale).unwrap();
    held.lock().unwrap();
    lab.fails("merge --model base --adapter whole --out again", &["another process", "again"]);
    assert!(stale.exists());
    drop(held);
    lab.ok("merge --model base --adapter whole --out again");
    assert!(!stale.exists());
    assert_eq!(names(&lab.path("again")), names(&lab.path("whole-merged")));
}

#[cfg(unix)]
#[test]
fn ctrl_c_keeps_the_texts_so_far_and_no_half_of_a_merged_model() {
    let lab = Lab::new();
    let interrupt = |child: std::process::Child| {
        let sent = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
        assert!(sent.success());
        let output = child.wait_with_output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    lab.write("many.txt", &lines(0, 40).repeat(100));
    let args = "generate --model base --data many.txt --batch-size 2 --max-new-tokens 20 --eos none";
    let mut child = lab.spawn(&format!("{args} --out texts.txt"));
    lab.wait_for_lines(&mut child, "texts.txt.part", 4);
    let (code, stderr) = interrupt(child);
    assert_eq!(code, Some(130), "{stderr}");
    assert!(stderr.contains("texts.txt.part") && !stderr.contains("error"), "{stderr}");
    assert!(!lab.path("texts.txt").exists());
    let kept = lab.read("texts.txt.part");
    assert!(kept.ends_with('\n') && (4..4000).contains(&kept.lines().count()));

    lab.model("wide", |c| c.n_embd = 768);
    lab.ok("train --model wide --data train.txt --out run --steps 1 --batch-size 1 --targets c_attn.q --rank 1");
    let child = lab.spawn("merge --model wide --adapter run --out merged");
    let partial = lab.path(".merged.partial");
    let start = std::time::Instant::now();
    while !partial.join("tokenizer.json").exists() && !lab.path("merged").exists() {
        assert!(start.elapsed().as_secs() < 60, "no merge in a minute");
    }
    let (code, stderr) = interrupt(child);
    // It may have been done before.
    assert_eq!(lab.path("merged").exists(), code == Some(0), "{stderr}");
    assert!(code == Some(0) || code == Some(130) && stderr.contains("nothing is left"), "{code:?} {stderr}");
    assert!(!partial.exists());
}

#[test]
fn quiet_wins_over_rust_log() {
    let lab = Lab::new();
    let stderr = |flag: &str| {
        let mut c = std::process::Command::new(env!("CARGO_BIN_EXE_lora"));
        c.args("generate --model base --prompt a --max-new-tokens 99".split(' ')).args(flag.split_whitespace());
        String::from_utf8(c.current_dir(lab.path("")).env("RUST_LOG", "debug").output().unwrap().stderr).unwrap()
    };
    assert!(stderr("").contains("warning: "));
    assert_eq!(stderr("-q"), "");
}

#[cfg(feature = "hub")]
#[test]
fn the_hub_is_asked_only_for_what_the_cache_has_not() {
    use std::io::{Read, Write};

    let lab = Lab::new();
    // A hub that has only weights in another format.
    let hub = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = hub.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in hub.incoming() {
            let (mut stream, mut request) = (stream.unwrap(), [0; 4096]);
            let _ = stream.read(&mut request).unwrap();
            let files = ["config.json", "pytorch_model.bin", "tokenizer.json"].map(|name| json!({"rfilename": name}));
            let body = json!({"siblings": files, "sha": "abc"}).to_string();
            let n = body.len();
            write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {n}\r\nConnection: close\r\n\r\n{body}").unwrap();
        }
    });
    let lora = |endpoint: &str, args: &str| {
        let mut c = std::process::Command::new(env!("CARGO_BIN_EXE_lora"));
        c.args(args.split_whitespace()).current_dir(lab.path(""));
        c.env("HF_HOME", lab.path("hf")).env("HF_ENDPOINT", endpoint).env_remove("RUST_LOG");
        let output = c.output().unwrap();
        (output.status.success(), String::from_utf8(output.stderr).unwrap())
    };
    let nobody = "http://127.0.0.1:1";
    let eval = "eval --model some/model --data valid.txt";
    let (ok, stderr) = lora(nobody, eval);
    assert!(!ok && stderr.contains("model = some/model") && stderr.contains("the list of files"), "{stderr}");
    let (ok, stderr) = lora(&format!("http://{address}"), eval);
    assert!(!ok && stderr.contains("some/model/pytorch_model.bin") && stderr.contains("convert"), "{stderr}");

    let cache = "hf/hub/models--some--model";
    let snapshot = format!("{cache}/snapshots/abc");
    lab.copy("base", &snapshot);
    std::fs::create_dir_all(lab.path(&format!("{cache}/refs"))).unwrap();
    lab.write(&format!("{cache}/refs/main"), "abc");
    let (ok, stderr) = lora(nobody, eval);
    assert!(ok, "a whole model in the cache needs no network: {stderr}");
    for file in ["model.safetensors", "tokenizer.json", "config.json"] {
        std::fs::remove_file(lab.path(&format!("{snapshot}/{file}"))).unwrap();
        let (ok, stderr) = lora(nobody, eval);
        assert!(!ok && stderr.contains("the list of files"), "{file}: {stderr}");
        lab.copy("base", &snapshot);
    }
}

#[test]
fn info_tells_what_everything_is() {
    let lab = Lab::new();
    lab.train("run", "--rank 2 --alpha 8 --targets c_attn.q,c_attn.v --steps 2 --save-every 1");
    let about = |args: &str| lab.json(&format!("info --json {args}"));
    let base = about("base");
    assert_eq!((&base["kind"], &base["architecture"], &base["n_layer"]), (&json!("model"), &json!("gpt2"), &json!(2)));
    assert_eq!((&base["parameters"], &base["dtypes"]["F32"]), (&base["elements"], &json!(28)));
    assert_eq!(base["bytes"].as_u64(), base["elements"].as_u64().map(|n| 4 * n));

    let run = about("run");
    assert_eq!((&run["kind"], &run["finished"], &run["config"]["rank"]), (&json!("run"), &json!(true), &json!(2)));
    assert_eq!(run["checkpoints"].as_array().unwrap().len(), 2);
    let adapter = &run["adapter"];
    assert_eq!((&adapter["method"], &adapter["rank"], &adapter["scaling"]), (&json!("lora"), &json!(2), &json!(4.0)));
    assert_eq!(adapter["targets"], json!(["c_attn.q", "c_attn.v"]));
    // In both layers A [2, 16] and B [16, 2] of both parts.
    assert_eq!(adapter["trainable"], json!(2 * 2 * 2 * (2 * 16)));
    let share = adapter["trainable_share"].as_f64().unwrap() * base["parameters"].as_f64().unwrap();
    assert!((share - 256.0).abs() < 1e-6, "{adapter}");

    let checkpoint = about("run/checkpoints/step-00000002");
    let expected =
        [("kind", json!("checkpoint")), ("step", json!(2)), ("trainable", json!(256)), ("sequences", json!(40))];
    expected.iter().for_each(|(key, value)| assert_eq!(&checkpoint[*key], value, "{key}"));
    lab.copy("run", "alone");
    std::fs::remove_file(lab.path("alone/run.toml")).unwrap();
    assert_eq!(about("alone --model base")["kind"], "adapter");
    let file = about("run/adapter_model.safetensors");
    assert_eq!((&file["kind"], file["tensors"].as_array().unwrap().len()), (&json!("file"), 4));
    assert_eq!(file["tensors"][0]["shape"], json!([4, 16]));
    for (path, part) in [
        ("base", "parameters"),
        ("run", "step 1"),
        ("alone", "scaling"),
        ("run/checkpoints/step-00000001", "sequences"),
        ("run/adapter_model.safetensors", "lora_A"),
    ] {
        let text = lab.ok(&format!("info {path}"));
        assert!(text.contains(part), "{path}: {text}");
    }
    // A run of another method has none of LoRA's options.
    lab.train("full", "--method full --steps 1 --save-every 1");
    lab.ok("pretrain --text train.txt valid.txt --out new --vocab 260 --layers 1 --dim 4 --heads 1 --steps 1");
    for path in ["full", "full/checkpoints/step-00000001", "new"] {
        let config = about(path)["config"].clone();
        assert_eq!(config["method"], "full");
        assert!(["rank", "alpha", "rslora", "targets"].iter().all(|key| config[key].is_null()), "{config}");
    }
    assert_eq!(about("new")["config"]["data"], "train.txt, valid.txt");
    lab.fails("info train.txt", &["train.txt", "safetensors"]);
    lab.fails("info run/checkpoints", &["config.json", "adapter_config.json"]);
    lab.fails("info nothing", &["nothing"]);

    // Without a path: the devices, and why there is none but the CPU.
    let machine = lab.json("info --json");
    let devices = machine["devices"].as_array().unwrap();
    assert_eq!((&machine["kind"], &devices[0]["device"]), (&json!("machine"), &json!("cpu")));
    let why = lora_kernels::Device::auto().1.map(|e| e.to_string());
    assert_eq!(machine["note"].as_str(), why.as_deref());
    let text = lab.ok("info");
    assert!(text.contains("cpu") && text.contains(why.as_deref().unwrap_or("cuda:0")), "{text}");
}

/// `--device` and `--dtype` of every command that has them, on whatever machine this is.
#[test]
fn where_to_compute() {
    let lab = Lab::new();
    let train = "train --model base --data train.txt --steps 2 --save-every 2";
    let commands = [
        format!("{train} --out run"),
        "pretrain --text train.txt --vocab 260 --layers 1 --dim 4 --heads 1 --steps 1 --out new".to_owned(),
        "eval --model base --data valid.txt".to_owned(),
        "generate --model base --prompt name --max-new-tokens 2".to_owned(),
    ];
    let why = lora_kernels::Device::auto().1.map(|e| e.to_string());
    for command in &commands {
        let output = lab.lora(&format!("{command} --device auto"));
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{command}: {stderr}");
        let said: Vec<&str> = stderr.lines().filter(|l| l.contains("computing on the CPU")).collect();
        match &why {
            // One line that names what is missing, without the advice that was just followed.
            Some(why) => {
                assert_eq!(said, [format!("note: computing on the CPU: {}", why.replace(", or use --device cpu", ""))]);
                assert!(
                    ["--features cuda", "install", "nvidia-smi", "8.0"].iter().any(|p| said[0].contains(p)),
                    "{said:?}"
                );
            }
            None => assert!(said.is_empty(), "{command}: {said:?}"),
        }
        let quiet = lab.lora(&format!("{} --device auto --quiet", command.replace("--out ", "--out quiet-")));
        assert!(quiet.status.success() && quiet.stderr.is_empty(), "{}", String::from_utf8_lossy(&quiet.stderr));
        let elsewhere = command.replace("--out ", "--out other-");
        lab.fails(&format!("{elsewhere} --dtype f16"), &["dtype = f16", "--device cuda"]);
        lab.fails(&format!("{elsewhere} --device gpu"), &["device = gpu", "cuda:N or auto"]);
        lab.fails(&format!("{elsewhere} --device cuda:77"), &["CUDA"]);
        if let Some(why) = &why {
            lab.fails(&format!("{elsewhere} --device cuda"), &[why]);
            lab.fails(&format!("{elsewhere} --device auto --dtype f16"), &["dtype = f16", "computing on the CPU"]);
        }
    }
    assert!(!lab.path("other-run").exists() && !lab.path("other-new").exists(), "a device that is not there");

    // A run keeps the names of what `auto` came to, and its type; any device may continue it.
    let config = lab.json("info run --json")["config"].clone();
    let kept = if why.is_some() { ["cpu", "f32"] } else { ["cuda:0", "bf16"] };
    assert_eq!([config["device"].as_str(), config["dtype"].as_str()], kept.map(Some));
    let checkpoint = lab.json("info run/checkpoints/step-00000002 --json")["config"].clone();
    assert_eq!([checkpoint["device"].as_str(), checkpoint["dtype"].as_str()], kept.map(Some));
    lab.ok(&format!("{train} --out run --resume --device auto"));
    lab.ok(&format!("{train} --out run --resume --device {} --dtype {}", kept[0], kept[1]));
    let other = if why.is_some() { "bf16" } else { "f32" };
    lab.fails(&format!("{train} --out run --resume --device auto --dtype {other}"), &["dtype = ", other]);
    // As older versions wrote it: the choice is made now.
    let run = lab.read("run/run.toml");
    lab.write("run/run.toml", &run.replace(&format!("dtype = \"{}\"", kept[1]), "dtype = \"auto\""));
    lab.ok(&format!("{train} --out run --resume --device auto"));
    assert_eq!(lab.read("run/run.toml"), run);
    // One that another machine began in f16 says what it needs.
    lab.write("run/run.toml", &run.replace("\"f32\"", "\"f16\""));
    lab.fails(&format!("{train} --out run --resume"), &["dtype = f16", "the run was started", "--device cuda"]);
}

/// The command on the emulated device: what it trains there is read everywhere.
#[cfg(feature = "emulator")]
#[test]
fn on_the_emulated_device() {
    let lab = Lab::new();
    lab.train("run", "--rank 2 --steps 2 --batch-size 2 --device emulated --dtype bf16");
    let command = "--model base --adapter run";
    lab.write("few.txt", &lines(40, 2));
    let loss =
        |place: &str| lab.json(&format!("eval {command} --data few.txt --json {place}"))["loss"].as_f64().unwrap();
    let [cpu, f32, bf16] = ["", "--device emulated --dtype f32", "--device emulated"].map(loss);
    assert!((f32 - cpu).abs() / cpu < 1e-5 && (bf16 - cpu).abs() / cpu < 1e-2, "{cpu} {f32} {bf16}");
    let text = |place: &str| lab.ok(&format!("generate {command} --prompt name --max-new-tokens 4 {place}"));
    assert_eq!(text("--device emulated --dtype f32"), text(""));
}

#[test]
fn a_file_configures_and_flags_override() {
    let lab = Lab::new();
    lab.write(
        "run.toml",
        "model = \"base\"\ndata = \"train.txt\"\nsteps = 3\nbatch_size = 4\nlr = 1\nschedule = \"constant\"\n\
         targets = [\"c_fc\"]\nrank = 2\nno-shuffle = true\n",
    );
    lab.ok("train --config run.toml --out run --lr 1e-3 --log log.jsonl");
    assert_eq!(lab.logged("log.jsonl", "lr"), [1e-3; 3]);
    let config = lab.json("info run --json")["config"].clone();
    assert_eq!((&config["batch-size"], &config["targets"]), (&json!(4), &json!(["c_fc"])));
    // What a run writes down is itself a configuration.
    lab.ok("train --config run/run.toml --out again --log again.jsonl");
    assert_eq!(lab.log("log.jsonl"), lab.log("again.jsonl"));
    // What the file turns on, a flag turns off; the number of steps gives way to one of epochs.
    lab.write("on.toml", "no-shuffle = true\nrslora = true\nno_decay_vectors = true\nsteps = 2\n");
    for (flags, on) in [
        ("", json!([true, true, true])),
        ("--rslora --no-shuffle=true", json!([true, true, true])),
        ("--no-shuffle=false --rslora=false --no-decay-vectors=false --epochs 1", json!([false, false, false])),
    ] {
        let out = format!("on{}", flags.len());
        lab.train(&out, &format!("--config on.toml {flags}"));
        let config = lab.json(&format!("info {out} --json"))["config"].clone();
        assert_eq!(json!([config["no-shuffle"], config["rslora"], config["no-decay-vectors"]]), on, "{flags}");
        assert_eq!(config["steps"].is_null(), flags.contains("epochs"), "{config}");
    }
    // So does data to judge by to a share that is held out; and a table may be written in either way.
    lab.write("table.toml", "valid = \"valid.txt\"\nsteps = 1\n[rank_pattern] # by module = rank\nc_attn = 2\n");
    lab.write("dotted.toml", "valid = \"valid.txt\"\nsteps = 1\nrank_pattern.c_attn = 2\n");
    for name in ["table", "dotted"] {
        lab.train(name, &format!("--config {name}.toml --hold-out 0.2"));
        let config = lab.json(&format!("info {name} --json"))["config"].clone();
        assert_eq!(json!([config["valid"], config["hold-out"]]), json!([null, 0.2]), "{name}: {config}");
        assert_eq!(config["rank-pattern"], json!({"c_attn": 2}), "{name}: {config}");
    }
    lab.fails("train --model base --data train.txt --out bad --rslora=perhaps", &["--rslora", "perhaps"]);
    for (text, parts) in [
        ("steps = 3\nlearning_rate = 1\n", &["bad.toml", "line 2", "learning-rate"][..]),
        ("steps = 3\nbatch_size = \"many\"\n", &["bad.toml", "line 2", "many"]),
        ("steps = \n", &["bad.toml", "line 1"]),
        ("method = \"magic\"\n", &["method", "magic", "lora"]),
    ] {
        lab.write("bad.toml", text);
        lab.fails("train --config bad.toml --model base --data train.txt --out bad", parts);
    }
}

#[test]
fn an_adapter_to_start_from_settles_its_own_options() {
    let lab = Lab::new();
    lab.train("first", "--rank 2 --alpha 6 --targets c_attn.q,c_fc --rslora --dropout 0.2 --steps 3");
    lab.train("second", "--init-adapter first --steps 2 --log log.jsonl");
    let adapter = |name: &str| lab.json(&format!("info {name} --json"))["adapter"].clone();
    for key in ["rank", "alpha", "targets", "rslora", "dropout", "scaling"] {
        assert_eq!(adapter("first")[key], adapter("second")[key], "{key}");
    }
    // The same values said again are no conflict, and another dropout is a choice.
    lab.train("third", "--init-adapter first --rank 2 --targets c_fc,c_attn.q --dropout 0 --steps 1");
    assert_eq!(adapter("third")["dropout"], json!(0.0));
    let start = "train --model base --data train.txt --out none --init-adapter first";
    for (flag, parts) in [
        ("--rank 4", ["rank = 4", "has 2"]),
        ("--alpha 16", ["alpha = 16", "has 6"]),
        ("--targets c_fc", ["targets = c_fc", "c_attn.q"]),
        ("--method full", ["init-adapter", "full"]),
        ("--method adapter-p", ["method = adapter-p", "has lora"]),
    ] {
        lab.fails(&format!("{start} {flag}"), &parts);
    }
    lab.write("plain.toml", "rslora = false\n");
    lab.fails(&format!("{start} --config plain.toml"), &["rslora = false", "has true"]);
    assert!(!lab.path("none").exists());
}

/// The help states defaults in words: they have to be those of the code.
#[test]
fn the_help_tells_the_defaults() {
    let lab = Lab::new();
    let help = lab.ok("train --help");
    // From each line that begins with a flag to the next.
    let starts: Vec<usize> = help.match_indices("\n      --").map(|(i, _)| i).chain([help.len()]).collect();
    let flags: Vec<String> =
        starts.windows(2).map(|w| help[w[0]..w[1]].split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    let defaults = serde_json::to_value(lora_train::TrainConfig::default()).unwrap();
    for (key, value) in defaults.as_object().unwrap() {
        let own = flags.iter().find(|f| f.split([' ', '[']).next() == Some(&format!("--{key}")));
        let own = own.unwrap_or_else(|| panic!("{key} is no flag"));
        let shown = match value {
            Value::Number(n) => format!("{}", n.as_f64().unwrap()),
            Value::String(s) if !s.is_empty() => s.clone(),
            _ => continue,
        };
        assert!(own.contains(&format!("[default: {shown}]")), "{key}: no {shown} in {own}");
    }
    for command in ["pretrain", "eval", "generate", "merge", "convert", "info"] {
        assert!(lab.ok(&format!("{command} --help")).contains("Usage: lora"));
    }
}

#[test]
fn what_a_model_says_of_generation_is_told_where_no_flag_does_it() {
    let lab = Lab::new();
    let said = |config: &str| {
        lab.write("base/generation_config.json", config);
        let output = lab.lora("generate --model base --prompt name --max-new-tokens 2");
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{stderr}");
        stderr
    };
    let all = said(r#"{"do_sample": true, "top_p": 0.8, "top_k": 50, "repetition_penalty": 1.1, "eos_token_id": 1}"#);
    assert!(all.contains("has do_sample = true, top_p = 0.8, repetition_penalty = 1.1, which"), "{all}");
    // Without drawing the rest of it does nothing.
    let quiet = said(r#"{"do_sample": false, "top_p": 0.8, "temperature": 0.6, "repetition_penalty": 1.0}"#);
    assert!(!quiet.contains("generation_config"), "{quiet}");
}
