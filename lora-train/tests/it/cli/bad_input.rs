//! Every kind of bad input ends with one paragraph that says where, and nothing is written.

use std::fs;

use serde_json::{Value, json};

use crate::cli::lab::{Lab, lines, names, safetensors};

/// `train` with the usual base and data, which has to fail and leave no output folder.
#[track_caller]
pub(crate) fn refused(lab: &Lab, args: &str, parts: &[&str]) {
    let defaults = [("--model", "base"), ("--data", "train.txt"), ("--out", "out"), ("--steps", "2")];
    let given: Vec<&str> = args.split_whitespace().collect();
    let given = |flag: &str| given.contains(&flag) || flag == "--steps" && given.contains(&"--epochs");
    let more: Vec<String> =
        defaults.iter().filter(|(flag, _)| !given(flag)).map(|(flag, value)| format!("{flag} {value}")).collect();
    lab.fails(&format!("train {} {args}", more.join(" ")), parts);
    assert!(!lab.path("out").exists(), "{args}: wrote to its output");
}

#[test]
fn hyperparameters() {
    let lab = Lab::new();
    for (args, part) in [
        ("--rank 0", "rank = 0"),
        ("--rank 1048577", "rank = 1048577"),
        ("--rank 99999999999", "rank = 99999999999"),
        ("--rank -1", "--rank"),
        ("--alpha nan", "alpha = NaN"),
        ("--alpha -1", "alpha = -1"),
        ("--alpha 0", "alpha = 0"),
        ("--alpha 1e30", "alpha = 1"),
        ("--dropout 1", "dropout = 1"),
        ("--dropout -0.1", "dropout = -0.1"),
        ("--dropout nan", "dropout = NaN"),
        ("--base-dropout 1.5", "base-dropout = 1.5"),
        ("--lr nan", "lr = NaN"),
        ("--lr inf", "lr = inf"),
        ("--lr -0.001", "lr = -0.001"),
        ("--lr 0", "lr = 0"),
        ("--lr 1e9", "lr = 1000000000"),
        ("--lr fast", "--lr"),
        ("--weight-decay -1", "weight-decay = -1"),
        ("--weight-decay inf", "weight-decay = inf"),
        ("--beta1 1", "beta1 = 1"),
        ("--eps 1e-50", "eps = "),
        ("--beta2 nan", "beta2 = NaN"),
        ("--eps 0", "eps = 0"),
        ("--label-smoothing 1", "label-smoothing = 1"),
        ("--clip -1", "clip = -1"),
        ("--clip nan", "clip = NaN"),
        ("--batch-size 0", "batch-size = 0"),
        ("--batch-size 99999999999", "batch-size = 99999999999"),
        ("--grad-accum 0", "grad-accum = 0"),
        ("--grad-accum 9", "grad-accum = 9"),
        ("--max-length 1", "max-length = 1"),
        ("--max-length 5", "--max-length"),
        ("--epochs 0", "epochs = 0"),
        ("--epochs nan", "epochs = NaN"),
        ("--epochs 1 --steps 1", "--steps"),
        ("--steps 0", "steps = 0"),
        ("--steps 99999999999", "steps = 99999999999"),
        ("--warmup 99999999999", "warmup = 99999999999"),
        ("--seed 18446744073709551615", "--seed"),
        ("--schedule step", "--schedule"),
        ("--method magic", "--method"),
        ("--format csv", "--format"),
        ("--device gpu", "device = gpu"),
        ("--dtype int4", "dtype = int4"),
        ("--targets nothing", "attn.c_attn.q"),
        ("--targets c_attn.x", "`c_attn.x` matches no module"),
        ("--targets c_attn,c_attn.q", "both adapt"),
        ("--targets c_fc,", "targets"),
        ("--threads 0", "--threads"),
        ("--threads 1000000", "--threads"),
        ("--unknown 1", "--unknown"),
    ] {
        refused(&lab, args, &[part]);
    }
    lab.fails("train --data train.txt --out out", &["--model is missing"]);
    lab.fails("train --model base --out out", &["--data is missing"]);
    lab.fails("train --model base --data train.txt", &["--out is missing"]);
    let warned = lab.lora("train --model base --data train.txt --out warm --steps 2 --warmup 9");
    assert!(warned.status.success() && String::from_utf8_lossy(&warned.stderr).contains("warm-up of 9 steps"));
}

#[test]
fn data() {
    let lab = Lab::new();
    let files: [(&str, &[u8], &[&str]); 11] = [
        ("latin.txt", b"a : b||caf\xe9\n", &["latin.txt:1", "UTF-8", "0xe9"]),
        ("empty.txt", b"", &["empty.txt", "empty"]),
        ("blank.txt", b" \n\n", &["blank.txt", "blank"]),
        ("line.txt", b"a||b\nno separator here\n", &["line.txt:2", "||", "no separator here"]),
        ("reference.txt", b"a||b\nc|| \n", &["reference.txt:2", "reference is empty"]),
        ("broken.jsonl", b"{\"text\": \"a\"}\n{\"text\": \n", &["broken.jsonl:2", "JSON"]),
        ("keys.jsonl", b"{\"input\": \"a\"}\n", &["keys.jsonl:1", "\"input\"", "completion"]),
        ("type.jsonl", b"{\"text\": 3}\n", &["type.jsonl:1", "\"text\"", "number"]),
        ("array.json", b"[1, 2]\n", &["array.json:1", "array"]),
        ("no.jsonl", b"{\"prompt\": \"a\", \"completion\": \"\"}", &["no.jsonl:1", "empty"]),
        ("long.txt", b"a a a a a a a a a a a a a a a a a a||b", &["long.txt", "--max-length"]),
    ];
    for (name, bytes, parts) in files {
        fs::write(lab.path(name), bytes).unwrap();
        refused(&lab, &format!("--data {name} --max-length 9"), parts);
        if name != "long.txt" {
            refused(&lab, &format!("--valid {name}"), parts);
        }
        lab.fails(&format!("eval --model base --data {name} --max-length 9"), parts);
    }
    lab.fails("generate --model base --data line.txt", &["line.txt:2", "||"]);
    refused(&lab, "--data nowhere.txt", &["nowhere.txt"]);
    refused(&lab, "--data base", &["base"]);

    // Long examples are cut and counted; a prompt that leaves no position free cannot be.
    lab.write("long.txt", &format!("a||b\n{}||c {}\n", "a ", "d ".repeat(200)));
    let output = lab.lora("train --model base --data long.txt --out cut --steps 1");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && stderr.contains("warning: 1 of 2 examples are longer than 65"), "{stderr}");
    lab.write("long.txt", &format!("a||b\n{}||c\n", "a ".repeat(200)));
    lab.fails("generate --model base --data long.txt", &["long.txt:2", "64 positions"]);
    // A vocabulary that is too small for its tokenizer.
    lab.model("small", |c| c.vocab_size = 262);
    refused(&lab, "--model small", &["train.txt:", "outside the model's vocabulary of 262"]);
    // A text file given as the log is not overwritten.
    refused(&lab, "--log valid.txt", &["valid.txt", "line 1", "no line of a training log"]);
    assert_eq!(lab.read("valid.txt"), lines(40, 12));
}

#[test]
fn generation() {
    let lab = Lab::new();
    for (args, part) in [
        ("--temperature 0", "temperature = 0"),
        ("--temperature nan", "temperature = NaN"),
        ("--top-p 0", "error: top-p = 0"),
        ("--top-p 1.5", "top-p = 1.5"),
        ("--max-new-tokens 0", "max-new-tokens = 0"),
        ("--num-beams 0", "num-beams = 0"),
        ("--num-beams 2 --sample", "error: sample = true: beam search"),
        ("--repetition-penalty -1", "repetition-penalty = -1"),
        ("--length-penalty inf", "length-penalty = inf"),
        ("--eos nothing", "eos = nothing"),
        ("--eos 99999", "eos = 99999"),
        ("--batch-size 0", "batch-size = 0"),
        ("--out base", "base: is a folder"),
        ("--out no/where.txt", "there is no folder no"),
        ("--data train.txt", "--data"),
    ] {
        lab.fails(&format!("generate --model base --prompt a {args}"), &[part]);
    }
    lab.fails("generate --model base", &["--prompt"]);
    lab.fails("generate --model base --prompt=", &["--prompt: it has no tokens"]);
}

/// The last prompt is refused before the first is continued.
#[test]
fn prompts_are_checked_before_any_is_continued() {
    let lab = Lab::new();
    lab.write("long.txt", &format!("{}{}||\n", "a : b||\nc : d||\n".repeat(3), "a ".repeat(99)));
    lab.write("long.jsonl", &format!("{{\"text\": \"a\"}}\n{{\"prompt\": \"{}\"}}\n", "a ".repeat(99)));
    lab.model("small", |c| c.vocab_size = 262);
    lab.write("words.txt", "a : b||\nname : Blue Fig||\n");
    for (args, parts) in [
        ("--model base --data long.txt", ["long.txt:7: its ", "64 positions"]),
        ("--model base --data long.jsonl", ["long.jsonl:2: its ", "64 positions"]),
        ("--model small --data words.txt", ["words.txt:", "outside the model's vocabulary of 262"]),
    ] {
        for more in ["", "--out texts.txt", "--out texts.jsonl --num-beams 2"] {
            let before = names(&lab.path(""));
            lab.fails(&format!("generate --batch-size 1 {args} {more}"), &parts);
            assert_eq!(names(&lab.path("")), before, "{args} {more}");
        }
    }
}

#[test]
fn weights_that_are_no_numbers_are_told_by_folder_and_tensor() {
    let lab = Lab::new();
    lab.train("run", "--rank 2 --steps 1 --targets c_attn.v,c_fc");
    lab.copy("base", "nan");
    let mut bytes = lab.bytes("nan/model.safetensors");
    let start = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..start]).unwrap();
    const FC: &str = "transformer.h.1.mlp.c_fc.weight";
    let at = start + header[FC]["data_offsets"][0].as_u64().unwrap() as usize;
    bytes[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(lab.path("nan/model.safetensors"), bytes).unwrap();
    lab.fails("merge --model nan --adapter run --out out", &["nan with run: ", FC, "NaN at [0, 0]"]);
    let what = ["nan with run: ", "not finite", "earlier checkpoint"];
    lab.fails("generate --model nan --adapter run --prompt a", &what);
    lab.fails("generate --model nan --adapter run --data train.txt --out texts.txt", &what);
    assert!(names(&lab.path("")).iter().all(|n| !n.contains("part") && n != "out" && n != "texts.txt"));
}

/// A file of a model's folder, and what becomes of it.
type Damage = (&'static str, fn(&Lab, &str), &'static [&'static str]);

const WEIGHTS: &str = "bad/model.safetensors";

pub(crate) fn with_header(lab: &Lab, path: &str, change: fn(&mut Value)) {
    let bytes = lab.bytes(path);
    let start = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&bytes[8..start]).unwrap();
    change(&mut header);
    fs::write(lab.path(path), safetensors(&header.to_string(), &bytes[start..])).unwrap();
}

fn cut(lab: &Lab, path: &str, n: usize) {
    let bytes = lab.bytes(path);
    fs::write(lab.path(path), &bytes[..n.min(bytes.len())]).unwrap();
}

#[test]
fn models() {
    let lab = Lab::new();
    const WTE: &str = "transformer.wte.weight";
    let damages: &[Damage] = &[
        (
            "config.json",
            |lab, f| fs::remove_file(lab.path(f)).unwrap(),
            &["model = bad", "no config.json", "tokenizer.json"],
        ),
        ("config.json", |lab, f| cut(lab, f, 30), &["bad/config.json", "JSON"]),
        ("config.json", |lab, f| lab.set(f, "model_type", json!("rnn")), &["bad/config.json", "rnn", "gpt2"]),
        (
            "config.json",
            |lab, f| lab.set(f, "activation_function", json!("sine")),
            &["config.json", "sine", "gelu_new"],
        ),
        ("config.json", |lab, f| lab.set(f, "n_head", json!(3)), &["config.json", "n_head"]),
        ("config.json", |lab, f| lab.set(f, "n_embd", json!("wide")), &["config.json", "n_embd", "wide"]),
        ("config.json", |lab, f| lab.set(f, "n_embd", json!(8)), &[WEIGHTS, WTE, "16", "8"]),
        ("config.json", |lab, f| lab.set(f, "n_layer", json!(3)), &["bad", "missing", "transformer.h.2."]),
        ("config.json", |lab, f| lab.set(f, "n_layer", json!(1)), &["bad", "unexpected", "transformer.h.1."]),
        ("model.safetensors", |lab, f| fs::remove_file(lab.path(f)).unwrap(), &["bad", "no weights"]),
        ("model.safetensors", |lab, f| cut(lab, f, 0), &[WEIGHTS]),
        ("model.safetensors", |lab, f| cut(lab, f, 5), &[WEIGHTS]),
        ("model.safetensors", |lab, f| cut(lab, f, 1000), &[WEIGHTS]),
        ("model.safetensors", |lab, f| cut(lab, f, lab.bytes(f).len() - 1), &[WEIGHTS]),
        ("model.safetensors", |lab, f| fs::write(lab.path(f), [0xff; 64]).unwrap(), &[WEIGHTS]),
        (
            "model.safetensors",
            |lab, f| with_header(lab, f, |h| h[WTE]["data_offsets"] = json!([0, 1u64 << 60])),
            &[WEIGHTS],
        ),
        ("model.safetensors", |lab, f| with_header(lab, f, |h| h[WTE]["data_offsets"] = json!([4, 0])), &[WEIGHTS]),
        ("model.safetensors", |lab, f| with_header(lab, f, |h| h[WTE]["shape"] = json!([1, 1])), &[WEIGHTS]),
        ("model.safetensors", |lab, f| with_header(lab, f, |h| h[WTE]["dtype"] = json!("I32")), &[WEIGHTS, WTE, "I32"]),
        (
            "model.safetensors",
            |lab, f| {
                fs::rename(lab.path(f), lab.path("bad/pytorch_model.bin")).unwrap();
            },
            &["bad/pytorch_model.bin", "convert"],
        ),
        (
            "model.safetensors",
            |lab, f| {
                fs::rename(lab.path(f), lab.path("out.safetensors")).unwrap();
                let index = json!({"weight_map": {WTE: "../out.safetensors"}});
                lab.write("bad/model.safetensors.index.json", &index.to_string());
            },
            &["bad/model.safetensors.index.json", "../out.safetensors"],
        ),
        ("tokenizer.json", |lab, f| fs::remove_file(lab.path(f)).unwrap(), &["bad", "tokenizer"]),
        ("tokenizer.json", |lab, f| cut(lab, f, 100), &["bad/tokenizer.json"]),
    ];
    for (file, damage, parts) in damages {
        let _ = fs::remove_dir_all(lab.path("bad"));
        lab.copy("base", "bad");
        damage(&lab, &format!("bad/{file}"));
        refused(&lab, "--model bad", parts);
        lab.fails("eval --model bad --data train.txt", parts);
        lab.fails("generate --model bad --prompt a", parts);
    }
    refused(&lab, "--model ./nowhere", &["model = ./nowhere", "no such folder"]);
    refused(&lab, "--model train.txt", &["model = train.txt", "is a file"]);
}

#[test]
fn adapters() {
    let lab = Lab::new();
    lab.train("good", "--rank 2 --steps 1 --targets c_fc");
    fs::remove_file(lab.path("good/run.toml")).unwrap();
    const A: &str = "base_model.model.transformer.h.0.mlp.c_fc.lora_A.weight";
    let damages: &[Damage] = &[
        (
            "adapter_config.json",
            |lab, f| lab.set(f, "r", json!(4)),
            &["adapter_model.safetensors", "lora_A", "rank is 2", "4"],
        ),
        ("adapter_config.json", |lab, f| lab.set(f, "r", json!(0)), &["adapter_config.json", "\"r\"", "0"]),
        ("adapter_config.json", |lab, f| lab.set(f, "lora_alpha", json!(-1)), &["adapter_config.json", "lora_alpha"]),
        ("adapter_config.json", |lab, f| lab.set(f, "peft_type", json!("OFT")), &["adapter_config.json", "OFT"]),
        (
            "adapter_config.json",
            |lab, f| lab.set(f, "use_dora", json!(true)),
            &["adapter_model.safetensors", "c_fc.lora_magnitude_vector"],
        ),
        (
            "adapter_config.json",
            |lab, f| lab.set(f, "target_modules", json!(["x"])),
            &["adapter_config.json", "mlp.c_fc"],
        ),
        ("adapter_config.json", |lab, f| cut(lab, f, 40), &["adapter_config.json", "JSON"]),
        ("adapter_model.safetensors", |lab, f| fs::remove_file(lab.path(f)).unwrap(), &["adapter_model.safetensors"]),
        ("adapter_model.safetensors", |lab, f| cut(lab, f, 300), &["adapter_model.safetensors"]),
        (
            "adapter_model.safetensors",
            |lab, f| {
                with_header(lab, f, |h| {
                    let a = h.as_object_mut().unwrap().remove(A).unwrap();
                    h["other"] = a;
                })
            },
            &["adapter_model.safetensors", "other"],
        ),
        (
            "adapter_model.safetensors",
            |lab, f| with_header(lab, f, |h| h[A]["shape"] = json!([4, 8])),
            &["adapter_model.safetensors", A],
        ),
        (
            "adapter_model.safetensors",
            |lab, f| {
                fs::rename(lab.path(f), lab.path("bad/adapter_model.bin")).unwrap();
            },
            &["adapter_model.bin", "no file of torch.save"],
        ),
    ];
    for (file, damage, parts) in damages {
        let _ = fs::remove_dir_all(lab.path("bad"));
        lab.copy("good", "bad");
        damage(&lab, &format!("bad/{file}"));
        refused(&lab, "--init-adapter bad", parts);
        lab.fails("eval --model base --adapter bad --data train.txt", parts);
        lab.fails("merge --model base --adapter bad --out out", parts);
    }
    assert!(!lab.path("out").exists());
    // A base of another width.
    lab.model("wide", |c| c.n_embd = 32);
    lab.fails(
        "eval --model wide --adapter good --data train.txt",
        &["good/adapter_model.safetensors", "[2, 16]", "[2, 32]"],
    );
    lab.fails("eval --model good --data train.txt", &["model = good: is an adapter", "--adapter"]);
    refused(&lab, "--model good", &["model = good: is an adapter", "--init-adapter"]);
    lab.fails("merge --model good --adapter good --out out", &["model = good: is an adapter"]);
    lab.fails("eval --model base --adapter wide --data train.txt", &["wide is a whole model", "--model"]);
    lab.fails("eval --model base --adapter ./nowhere --data train.txt", &["nowhere/adapter_config.json"]);
    assert!(names(&lab.path("")).iter().all(|n| !n.starts_with('.')), "{:?}", names(&lab.path("")));
}

#[test]
fn pretraining() {
    let lab = Lab::new();
    lab.write("empty.txt", "");
    for (args, part) in [
        ("--vocab 100", "vocab = 100"),
        ("--layers 0", "layers = 0"),
        ("--dim 0", "dim = 0"),
        ("--dim 100 --heads 3", "heads = 3"),
        ("--dim 1000000 --layers 4000 --heads 1", "dim = 1000000"),
        ("--context 0", "context = 0"),
        ("--dropout 1", "dropout = 1"),
        ("--lr nan", "lr = NaN"),
        ("--steps 0", "steps = 0"),
        ("--batch-size 0", "batch-size = 0"),
        ("--clip -1", "clip = -1"),
        ("--text nowhere.txt", "nowhere.txt"),
        ("--text train.txt empty.txt", "empty.txt"),
        ("--valid empty.txt", "empty.txt"),
        ("--out base", "config.json"),
    ] {
        let text = if args.contains("--text") { "" } else { "--text train.txt" };
        let out = if args.contains("--out") { "" } else { "--out out" };
        lab.fails(&format!("pretrain {text} {out} {args}"), &[part]);
        assert!(!lab.path("out").exists(), "{args}: wrote to its output");
    }
    lab.fails("pretrain --out out", &["--text"]);
}

/// What no method reads is written down all the same, in checkpoints that have to be read again.
#[test]
fn a_demo_wants_a_folder_of_its_own() {
    let lab = Lab::new();
    lab.fails("demo --short --no-cache --out base", &["base is not empty"]);
}

#[test]
fn numbers_that_nothing_reads_are_numbers() {
    let lab = Lab::new();
    for (key, value) in [("d-initial", "nan"), ("orth-reg-weight", "inf"), ("adalora-beta1", "nan")] {
        lab.write("run.toml", &format!("model = \"base\"\ndata = \"train.txt\"\nout = \"out\"\n{key} = {value}\n"));
        let shown = if value == "nan" { "NaN" } else { value };
        lab.fails("train --config run.toml", &[&format!("{key} = {shown}"), "finite"]);
    }
}

#[cfg(unix)]
#[test]
fn paths_that_are_not_utf8_are_shown_as_far_as_they_go() {
    use std::{ffi::OsStr, os::unix::ffi::OsStrExt, process::Command};
    let lab = Lab::new();
    lab.train("run", "--steps 2");
    let odd = lab.path("x").with_file_name(OsStr::from_bytes(b"odd\xff"));
    let mut command = Command::new(env!("CARGO_BIN_EXE_lora"));
    command.args(["merge", "--json", "--model"]).arg(lab.path("base")).arg("--adapter").arg(lab.path("run"));
    let output = command.arg("--out").arg(&odd).output().unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && stdout.contains("odd\u{fffd}"), "{stdout}{stderr}");
    let output = Command::new(env!("CARGO_BIN_EXE_lora")).arg("info").arg(&odd).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    // Deeper than its columns.
    let nested: String = (0..14).map(|i| format!("[a{}]\nx = 1\n", ".b".repeat(i))).collect();
    lab.write("run/run.toml", &format!("{}{nested}", lab.read("run/run.toml")));
    lab.ok("info run");
}
